"""`run` holds every pass to law 1: a pass that changes what the model computes is named, with the place."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from zoo import TiedHead, adapt, close, ids, mlp, require_untouched, same, shake, snapshot

from sarac.ir.errors import CheckFailed, InputError, PlanError
from sarac.ir.graph import ModelGraph
from sarac.ir.pipeline import run
from sarac.passes.analyze import Analyze
from sarac.passes.choose import Choose
from sarac.passes.fold import Fold
from sarac.passes.rewrite import Rewrite
from sarac.trace import trace


@dataclass(frozen=True)
class Meddle:
    """A pass that changes one weight, in a copy or in the model itself, and may say so."""

    factor: float
    exact: bool = True
    inplace: bool = False
    copies: bool = True

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        model = copy.deepcopy(graph.module) if self.copies else graph.module
        model[2].weight.data.mul_(self.factor)
        return replace(graph, module=model)


@pytest.mark.parametrize("example", [None, torch.ones(3, 6)])
def test_pass_that_changes_the_model_is_caught(example: Tensor | None) -> None:
    place = "2" if example is None else "Sequential"
    with pytest.raises(CheckFailed, match=rf"outputs of {place} before and after Meddle must be bit-exact"):
        run(trace(mlp(6, 5, 4), example), Meddle(1 + 1e-6))
    run(trace(mlp(6, 5, 4), example), Meddle(1.0))
    run(trace(mlp(6, 5, 4), example), Meddle(1 + 1e-6), check=False)


def test_pass_that_is_close_is_held_to_the_gate() -> None:
    run(trace(mlp(6, 5, 4)), Meddle(1 + 1e-6, exact=False))
    with pytest.raises(CheckFailed, match=r"before and after Meddle differ at .* float32 allows 1e-05"):
        run(trace(mlp(6, 5, 4)), Meddle(1 + 1e-3, exact=False))
    with pytest.raises(CheckFailed, match="NaN or Inf"):
        run(trace(mlp(6, 5, 4)), Meddle(float("nan"), exact=False))


@pytest.mark.parametrize("tells", [True, False])
def test_pass_that_works_in_place_is_caught(tells: bool) -> None:
    with pytest.raises(CheckFailed, match="Meddle"):
        run(trace(mlp(6, 5, 4)), Meddle(2.0, inplace=tells, copies=False))


def test_every_pass_of_a_row_is_checked() -> None:
    with pytest.raises(CheckFailed, match="Meddle"):
        run(trace(mlp(6, 5, 4)), Analyze(), Meddle(2.0), Choose(), Rewrite())
    with pytest.raises(CheckFailed, match="Meddle"):
        run(trace(mlp(6, 5, 4)), Analyze(), Choose("rank:1", where="0.weight"), Rewrite(), Meddle(2.0))


@dataclass(frozen=True)
class Break:
    """A pass after which a layer does not run any more."""

    exact: ClassVar[bool] = True

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        model = copy.deepcopy(graph.module)
        model[0].weight = nn.Parameter(torch.ones(5, 7))
        return replace(graph, module=model)


def test_pass_that_breaks_the_model_is_caught() -> None:
    with pytest.raises(CheckFailed, match="After Break, 0 does not run any more"):
        run(trace(mlp(6, 5, 4)), Break())
    with pytest.raises((CheckFailed, InputError)):
        run(trace(mlp(6, 5, 4), torch.ones(3, 6)), Break())


def test_probing_leaves_modes_and_random_numbers_alone() -> None:
    model = mlp(6, 5, 4)
    model[1].eval()
    before = snapshot(model)
    state = torch.get_rng_state()
    result = run(trace(model), Choose(), Rewrite()).module
    assert torch.equal(torch.get_rng_state(), state)
    require_untouched(model, before)
    assert [module.training for module in result.modules()] == [module.training for module in model.modules()]


def test_generators_of_devices_that_the_model_is_not_on_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeded.append)
    run(trace(mlp(6, 5, 4), torch.ones(3, 6)), Choose(), Rewrite())
    assert seeded == []
    torch.manual_seed(3)
    assert seeded == [3]


@pytest.mark.parametrize("example", [None, torch.ones(3, 6)])
def test_in_place_surgery_is_checked_and_right(example: Tensor | None) -> None:
    model, x = mlp(6, 5, 4), torch.randn(3, 6)
    expected = model(x)
    graph = run(trace(model, example), Choose(), Rewrite(inplace=True))
    assert graph.module is model
    same(model(x), expected)
    shake(model)
    trained = model(x)
    assert run(trace(model), Fold(inplace=True)).module is model
    assert type(model[0]) is nn.Linear
    assert not torch.equal(model(x), expected)
    close(model(x), trained)


def test_model_that_takes_no_floats_is_probed_at_its_layers() -> None:
    model = TiedHead(8)
    with pytest.raises(CheckFailed, match="outputs of inner"):
        run(trace(model), MeddleInner())
    with pytest.raises(CheckFailed, match="outputs of TiedHead"):
        run(trace(model, ids()), MeddleInner())


@dataclass(frozen=True)
class MeddleInner:
    exact: ClassVar[bool] = True

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        model = copy.deepcopy(graph.module)
        model.inner.weight.data.mul_(2)
        return replace(graph, module=model)


class ToFloat(nn.Module):
    """A bfloat16 model that gives float32, as language models' heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).float()


@pytest.mark.parametrize("example", [None, torch.ones(2, 16, dtype=torch.bfloat16)])
def test_gate_is_that_of_the_least_precise_tensor_on_the_way(example: Tensor | None) -> None:
    model = shake(adapt(ToFloat(), "rank:8"))
    graph = run(trace(model, example), Fold())
    assert graph.module(torch.ones(2, 16, dtype=torch.bfloat16)).dtype == torch.float32


@dataclass
class Out:
    """An output that torch's pytree does not look into."""

    value: Tensor


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Out:
        return Out(torch.tanh(x) @ self.w)


@dataclass(frozen=True)
class MeddleW:
    exact: ClassVar[bool] = True

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        model = copy.deepcopy(graph.module)
        model.w.data.mul_(2)
        return replace(graph, module=model)


def test_outputs_that_cannot_be_seen_do_not_pass_for_equal() -> None:
    with pytest.raises((CheckFailed, InputError)):
        run(trace(Opaque()), MeddleW())


def test_routed_weight_that_is_read_elsewhere_is_refused_at_once() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w + self.w.sum()

    same(adapt(model := Sums())(torch.ones(2, 6)), model(torch.ones(2, 6)))
    with pytest.raises(PlanError, match=r"w cannot carry a routed adapter, .*: add reads the weight as well"):
        adapt(Sums(), method="mosara")


CHANGED: list[Callable[[nn.Module], nn.Module]] = [lambda m: adapt(m), lambda m: shake(adapt(m))]


@pytest.mark.parametrize("change", CHANGED)
def test_passes_that_only_look_return_the_same_module(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(mlp(6, 5, 4))
    graph = trace(model)
    assert run(graph, Analyze()).module is model
    assert run(graph, Analyze(), Choose("rank:1")).module is model
