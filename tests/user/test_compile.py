"""torch.compile and torch.export of adapted models: whole graphs, and no recompilation while the adapters train."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D
from user.methods import METHODS, adapted, base, batch
from zoo import close, differ, gpt2, llama, outputs, shake

import sarac


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module) -> tuple[Any, CompileCounterWithBackend]:
    """The model as one graph, and the counter of how often it was compiled."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True), counter


def require_one_graph(model: nn.Module, call: Callable[[Any], Tensor]) -> None:
    """Three steps with other shifts each: one compilation, and the outputs and gradients of the plain model."""
    fast, counter = compiled(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        expected = call(model)
        expected.square().mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        optimizer.zero_grad()
        found = call(fast)
        close(found, expected)
        found.square().mean().backward()
        close([p.grad for p in model.parameters() if p.requires_grad], gradients)
        assert all(gradient.any() for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(call(model), expected)
    assert counter.frame_count == 1


SITES: dict[str, Callable[[], nn.Module]] = {"Linear": lambda: nn.Linear(6, 5), "Conv1D": lambda: nn.Sequential(Conv1D(5, 6))}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("method", METHODS)
def test_site_compiles_once_for_all_steps(method: str, site: str) -> None:
    model, x = shake(sarac.transform(SITES[site](), **METHODS[method])), torch.randn(3, 6)
    require_one_graph(model, lambda m: m(x))


@pytest.mark.parametrize("method", ["sara", "mosara"])
def test_whole_llama_compiles_once_for_all_steps(method: str) -> None:
    require_one_graph(adapted(method).train(), lambda m: m(input_ids=batch(), use_cache=False).logits)


@pytest.mark.parametrize("method", METHODS)
def test_disabling_compiles_once_a_state(method: str) -> None:
    plain = nn.Linear(6, 5)
    model, x = shake(sarac.transform(plain, **METHODS[method])), torch.randn(3, 6)
    (fast, counter), on, counts = compiled(model), outputs(model, x), []
    for _ in range(3):
        close(outputs(fast, x), on)
        with sarac.disabled(model):
            close(outputs(fast, x), outputs(plain, x))
        counts.append(counter.frame_count)
    differ(on, outputs(plain, x))
    assert counts == [2, 2, 2]


@pytest.mark.parametrize("method", METHODS)
def test_modes_compile_once_each(method: str) -> None:
    model, x = shake(sarac.transform(nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5)), **METHODS[method])), torch.randn(3, 6)
    (fast, counter), counts = compiled(model), []
    for _ in range(2):
        for mode in (True, False):
            model.train(mode)
            found = outputs(fast, x)
            counts.append(counter.frame_count)
        close(found, outputs(model, x))
        differ(found, outputs(model.train(), x))
    assert counts == [1, 2, 2, 2]


def test_read_weight_compiles_too() -> None:
    """The layer's children are read, not called."""
    model, x = shake(sarac.transform(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0))), torch.randn(3, 2, 16)
    require_one_graph(model, lambda m: m(x))


@pytest.mark.parametrize(("build", "method"), [(llama, "sara"), (gpt2, "factors"), (llama, "mosara")])
def test_whole_model_exports(build: Callable[[], Any], method: str) -> None:
    model, inputs = adapted(method, build).eval(), {"input_ids": batch(), "use_cache": False}
    program = torch.export.export(model, (), inputs, strict=False)
    found = program.module()(**inputs).logits
    close(found, outputs(model, **inputs).logits)
    differ(found, outputs(base(build), **inputs).logits)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained < set(program.state_dict)
