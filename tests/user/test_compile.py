"""torch.compile and torch.export of adapted models: whole graphs, and no recompilation while the adapters train."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
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


# Every schedule with either method and with either site; every method with every site is the test above.
@pytest.mark.parametrize("schedule", ["two-sided", "right", "left", "materialised", "rebuilt", "plain"])
@pytest.mark.parametrize(("method", "site"), [("sara", "Linear"), ("mosara", "Conv1D")])
def test_every_schedule_compiles_once_for_all_steps(method: str, schedule: str, site: str) -> None:
    model, x = shake(sarac.transform(SITES[site](), **METHODS[method])), torch.randn(3, 6)
    sarac.schedule(model, schedule)
    require_one_graph(model, lambda m: m(x))


def products(schedule: str, bias: bool = True, tokens: int = 64, out: int = 24, inner: int = 16, rank: int = 4) -> int:
    """The operations of the compiled products of a forward and backward, all gradients taken."""
    model, x = sarac.transform(nn.Linear(inner, out, bias=bias), f"rank:{rank}"), torch.randn(tokens, inner, requires_grad=True)
    sarac.schedule(model, schedule)
    counts: list[int] = []

    def count(graph: fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.mv.default):
                left, right = (one.meta["val"].shape for one in node.args[-2:])
                counts.append(2 * math.prod(left) * (right[1] if len(right) > 1 else 1))
        return make_boxed_func(graph.forward)

    fast = torch.compile(model, backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True)
    fast(x).sum().backward()
    return sum(counts)


def test_compiled_products_are_those_of_the_schedule_and_no_more() -> None:
    t, m, n, k = 64, 24, 16, 4
    frozen = 4 * t * m * n
    assert products("two-sided") == frozen + 4 * t * k * (m + n)
    assert products("right") == frozen + 8 * t * k * n
    assert products("left", bias=False) == frozen + 8 * t * k * m
    assert products("left") == products("two-sided")  # beside a bias
    assert products("materialised") == frozen + 4 * t * k * n + 2 * k * m * n
    assert products("rebuilt") == frozen + 4 * t * k * n + 4 * k * m * n


def test_tokens_that_change_compile_once_a_range() -> None:
    model = shake(sarac.transform(nn.Linear(24, 16), "rank:4"))
    fast, counter = compiled(model)
    for tokens in (3, 5, 7, 11, 13):
        x = torch.randn(tokens, 24)
        close(fast(x), model(x))
    assert counter.frame_count == 2  # the first, and one for all numbers


@pytest.mark.parametrize(("method", "layers"), [("sara", 2), ("mosara", 1)])
def test_whole_llama_compiles_once_for_all_steps(method: str, layers: int) -> None:
    require_one_graph(adapted(method, lambda: llama(layers)).train(), lambda m: m(input_ids=batch(), use_cache=False).logits)


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
