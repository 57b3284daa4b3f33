"""Adapted calls as a model around them meets them: what was seen to go wrong, each with its case."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint
from zoo import close, differ, shake

import sarac
from sarac.ir import calls, materialised

METHODS = ("sara", "mosara")
SCHEDULES = ("auto", "two-sided", "right", "left", "materialised", "rebuilt", "plain")


def adapted(base: nn.Module, schedule: str = "auto", method: str = "sara", plan: str = "rank:4") -> Any:
    model = shake(sarac.transform(base, plan, method=method))
    sarac.schedule(model, schedule)
    return model


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
def test_output_may_be_written_to(shape: tuple[int, ...], bias: bool, schedule: str, method: str) -> None:
    model, x = adapted(nn.Linear(8, 12, bias=bias), schedule, method), torch.randn(shape)
    found = gradients(nn.Sequential(model, nn.ReLU(inplace=True)), x)
    close(found, gradients(nn.Sequential(model, nn.ReLU()), x))
    differ(found[0], model(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [(48, 20), (20, 48)])
def test_bias_that_is_large_costs_no_digits(size: tuple[int, int], schedule: str, method: str) -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(*size), torch.randn(64, size[0])
    with torch.no_grad():
        base.bias.fill_(1e3)
    model = adapted(base, schedule, method)
    found = gradients(model, x)
    exact = gradients(adapted_as(model, torch.float64), x.double())
    for one, other in zip(found[1:], exact[1:], strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 2e-6


def adapted_as(model: Any, dtype: torch.dtype) -> Any:
    """A copy in another dtype, by the formula."""
    wide = copy.deepcopy(model).to(dtype)
    sarac.schedule(wide, "plain")
    return wide


@pytest.mark.parametrize("schedule", ["right", "left", "materialised", "auto"])
def test_verdict_of_one_dtype_is_none_of_another(schedule: str) -> None:
    torch.manual_seed(0)
    model = adapted(nn.Linear(32, 64, bias=False), schedule, plan="rank:16").to(torch.bfloat16)
    gradients(model, torch.randn(4, 32).bfloat16())
    wide = model.double()  # whose factors are singular vectors to three digits
    x = torch.randn(4, 32, dtype=torch.float64)
    close(gradients(wide, x), gradients(adapted_as(wide, torch.float64), x), torch.float64)


def test_scale_that_trains_has_its_gradient() -> None:
    model, x = adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    gradients(model, x)
    model.sara_scale.requires_grad_()
    found = gradients(model, x)
    sarac.schedule(model, "plain")
    close(found, gradients(model, x))
    assert model.sara_scale.grad.any()


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "to": lambda model: model.to(torch.float64),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
}


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("way", WAYS)
def test_tensors_may_be_swapped_after_a_call(way: str) -> None:
    model, x = adapted(nn.Sequential(nn.Linear(6, 5))), torch.randn(3, 6)
    expected = model(x).detach()  # whose graph would hold the tensors
    WAYS[way](model)
    close(model(x.to(model[0].weight.dtype)).to(expected.dtype), expected)


def test_accumulation_tells_weights_apart_that_share_a_shift() -> None:
    model = adapted(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)), "materialised")
    model[1].sara_shift, x = model[0].sara_shift, torch.randn(3, 8)
    expected = model(x)
    with sarac.accumulating():
        close(model(x), expected)
        differ(model[1](model[0](x)), model[1](model[1](x)))


def test_accumulation_makes_what_is_rebuilt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, made = adapted(nn.Linear(8, 6), "rebuilt"), torch.randn(3, 8), list[int]()
    real = materialised._made
    monkeypatch.setattr(materialised, "_made", lambda *given: made.append(1) or real(*given))
    with sarac.accumulating():
        for _ in range(3):
            gradients(model, x)
    assert len(made) == 1
    gradients(model, x)
    assert len(made) == 2  # x takes no gradient: none is made for the way back
    gradients(model, x.requires_grad_())
    assert len(made) == 4


def test_siblings_take_what_inference_mode_made() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x)

    model = shake(sarac.transform(Pair(), "rank:3", example_inputs=torch.randn(4, 8)))
    sarac.schedule(model, "right")
    with torch.inference_mode():
        x = torch.randn(4, 8)
    found = gradients(model, x)
    close(found, gradients(model, x.clone()))


def test_projection_of_factors_that_were_is_not_taken() -> None:
    model = adapted(nn.Sequential(nn.Linear(8, 8, bias=False)), "right")
    joint = sarac.ir.siblings.Siblings([(model[0], "sara_v"), (model[0], "sara_v")])
    x = torch.randn(3, 8)
    joint.project(x, model[0].sara_v)
    with torch.no_grad():
        model[0].sara_v.mul_(2.0)
    close(joint.project(x, model[0].sara_v), model[0].sara_v @ x.mT)


@pytest.mark.parametrize("schedule", ["right", "left", "materialised", "rebuilt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedule_serves_under_autocast_too(dtype: torch.dtype, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(nn.Linear(64, 48, bias=False).to(dtype), schedule), torch.randn(5, 64)
    seen: list[str] = []
    known = dict(calls.SCHEDULES)
    for name, function in known.items():
        watched = type(name, (), {"apply": lambda *given, n=name, f=function: seen.append(n) or f.apply(*given)})
        monkeypatch.setitem(calls.SCHEDULES, name, watched)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert seen == [schedule]


@pytest.mark.parametrize("method", METHODS)
def test_dynamic_shapes_compile_as_one_graph(method: str) -> None:
    model, x = adapted(nn.Linear(8, 12, bias=False), method=method), torch.randn(5, 8)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for one, other in zip(gradients(fast, x), gradients(model, x), strict=True):
        close(one, other)
    differ(fast(x), fast(2 * x))


@pytest.mark.parametrize("schedule", ["two-sided", "right", "materialised", "rebuilt"])
def test_many_layers_of_free_sizes_compile_as_one_graph(schedule: str) -> None:
    # A compiler takes a float of the module for an input, and lost it between the gradients of the third layer on.
    layers = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False))
    model, x = adapted(layers, schedule), torch.randn(5, 8)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for one, other in zip(gradients(fast, x), gradients(model, x), strict=True):
        close(one, other)
    differ(fast(x), fast(2 * x))


@pytest.mark.parametrize("schedule", ["materialised", "rebuilt"])
def test_block_of_accumulation_may_end_between_forward_and_backward(schedule: str) -> None:
    model, x = adapted(nn.Linear(8, 12), schedule), torch.randn(5, 8)
    close(expected := gradients(model, x), gradients(model, x))
    for first, second in ((sarac.accumulating, contextlib.nullcontext), (contextlib.nullcontext, sarac.accumulating)):
        model.zero_grad()
        with first():
            y = checkpoint(model, x, use_reentrant=False)
        with second():
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        for one, other in zip((p.grad for p in model.parameters() if p.grad is not None), expected[1:], strict=True):
            close(one, other)
            differ(one, 2 * other)


def test_threads_accumulate_each_on_its_own() -> None:
    model, x = adapted(nn.Linear(8, 12), "materialised"), torch.randn(5, 8)
    one, other = sarac.accumulating(), sarac.accumulating()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)  # of another thread than that whose block is the last
    assert len(materialised._held) == 1
    model(x).sum().backward()
    assert len(materialised._held[0]) == 1
    other.__exit__(None, None, None)
    assert materialised._held == []


def test_weights_that_fsdp_refills_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, made = adapted(nn.Linear(8, 12), "materialised"), torch.randn(5, 8), list[int]()
    make = materialised._made
    monkeypatch.setattr(materialised, "_made", lambda *given: made.append(1) or make(*given))
    for runs, times in ((False, 1), (True, 2)):
        monkeypatch.setattr(materialised, "fsdp_runs", lambda runs=runs: runs)
        made.clear()
        with sarac.accumulating():
            model(x), model(x)
        assert len(made) == times


@pytest.mark.parametrize(("low", "name"), [(1.0, "left"), (0.01, "right")])
def test_routed_scores_are_not_taken_from_an_uneven_left_side(low: float, name: str) -> None:
    """s⁻¹ Uᵀ W x carries the rounding of W x at the largest value's size: its router would read noise."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(8, 8))[0], torch.linalg.qr(torch.randn(64, 8))[0].mT
    base = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        base.weight.copy_(u @ torch.diag(torch.linspace(1.0, low, 8)) @ v)
    model = adapted(base, method="mosara", plan="rank:7,sets=3")
    shown = sarac.schedule(model, tokens=64).sites[0].schedule
    assert (shown == "left") == (name == "left")
    assert sarac.schedule(model, tokens=64, compiled=True).sites[0].schedule == shown
    x = torch.randn(64, 64)
    assert reads_v(model, x) == (name != "left")
    assert ("RoutedLeftBackward" in [type(node).__name__ for node in nodes(model(x))]) == (name == "left")
    sarac.schedule(model, "left")
    assert ("RoutedLeftBackward" in [type(node).__name__ for node in nodes(model(x))]) == (name == "left")


def reads_v(model: Any, x: Tensor) -> bool:
    """Whether the compiled forward of a linear module computes with V."""
    seen: list[torch.fx.Graph] = []
    torch._dynamo.reset()

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(module.graph)
        return make_boxed_func(module.forward)

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    found, expected = compiled(x), model(x)
    close(found, expected)
    differ(found, torch.nn.functional.linear(x, model.weight_base))
    (graph,) = seen
    return any(node.users for node in graph.find_nodes(op="placeholder") if node.meta["val"].shape == model.sara_v.shape)


def nodes(y: Tensor) -> list[Any]:
    """The functions behind a tensor."""
    found, todo = list[Any](), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.append(node)
            todo += [one for one, _ in node.next_functions]
    return found
