"""The figures of a site against their formulas on dense float64 weights, token by token."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import mlp, seed, shake

import sarac
from sarac.ir.gates import Watch, slots, watching
from sarac.ir.health import Health, change, equal_gates, farthest, floored, health, likeness, misfits, moves, norms
from sarac.ir.weight import Slot

PLANS = {
    "singular values": ("rank:{k}", "sara"),
    "factors from the SVD": ("rank:{k},train=factors", "sara"),
    "random factors": ("rank:{k},train=factors,init=random", "sara"),
    "one set": ("rank:{k},sets=1", "mosara"),
    "equal gates": ("rank:{k},router=uniform", "mosara"),
}
ROUTERS = ("soft", "topk:2", "hard")


def tiny(plan: str, method: str = "sara", out: int = 7, inner: int = 9, number: int = 0) -> nn.Module:
    seed(number)
    return shake(sarac.transform(nn.Sequential(nn.Linear(inner, out)).double(), plan, method=method))


def held(model: nn.Module) -> tuple[nn.Module, Slot, dict[str, Tensor]]:
    module, slot = next(slots(model))
    return module, slot, {role: tensor.detach() for role, tensor in slot.tensors(module).items()}


def figures(model: nn.Module, watch: Watch | None = None) -> Health:
    module, slot, _ = held(model)
    return health(module, slot, norms(model)[slot.site], watch or Watch(model), lambda tensor: tensor.grad)


@settings(max_examples=30)
@given(st.sampled_from(sorted(PLANS)), st.integers(2, 9), st.integers(2, 9), st.integers(0, 99))
def test_change_is_that_of_the_dense_weight(name: str, out: int, inner: int, number: int) -> None:
    plan, method = PLANS[name]
    model = tiny(plan.format(k=1 + number % min(out, inner)), method, out, inner, number)
    module, slot, tensors = held(model)
    dense = slot.adapter.delta(tensors)
    assert change(slot, tensors) == pytest.approx(float(dense.norm()), rel=1e-9)
    base = module._parameters["weight"]
    assert base is not None
    assert figures(model).delta == pytest.approx(float(dense.norm() / base.norm()), rel=1e-9)
    tensors["shift"] = tensors["shift"] * 1.5
    assert change(slot, tensors) != pytest.approx(float(dense.norm()), rel=1e-3)


def test_trained_factors_are_not_taken_for_orthonormal() -> None:
    _, slot, tensors = held(tiny("rank:4,train=factors"))
    plain = float((tensors["shift"] * tensors["scale"]).norm())
    assert change(slot, tensors) != pytest.approx(plain, rel=1e-3)
    _, slot, tensors = held(tiny("rank:4"))
    assert change(slot, tensors) == pytest.approx(float((tensors["shift"] * tensors["scale"]).norm()), rel=1e-12)


def routed(router: str, number: int = 0, rows: int = 40, **sizes: int) -> tuple[nn.Module, Watch, Tensor]:
    """A routed model, what was watched of it on random rows, and their gates by the formula."""
    model = tiny(f"rank:4,sets=3,router={router}", "mosara", number=number, **sizes)
    x = torch.randn(rows, sizes.get("inner", 9), dtype=torch.float64)
    with watching(model) as watch, torch.no_grad():
        model(x)
    _, _, tensors = held(model)
    soft = torch.softmax(x @ tensors["v"].mT @ tensors["router"].mT, -1)
    if router == "hard":
        return model, watch, nn.functional.one_hot(soft.argmax(-1), 3).double()
    kept = soft >= soft.topk(2).values[:, 1:] if router.startswith("topk") else soft > 0
    return model, watch, soft * kept


@settings(max_examples=15)
@given(st.sampled_from(ROUTERS), st.integers(0, 99))
def test_change_of_a_routed_site_is_the_mean_square_over_the_tokens(router: str, number: int) -> None:
    model, watch, gates = routed(router, number)
    _, slot, tensors = held(model)
    dense = torch.stack([slot.adapter.mean_delta(tensors, row) for row in gates])  # type: ignore[attr-defined]
    assert change(slot, tensors, watch) == pytest.approx(math.sqrt(float(dense.square().sum((1, 2)).mean())), rel=1e-9)
    assert change(slot, tensors, watch) > float(dense.mean(0).norm()) * 1.001  # the mean weight is another thing
    equal = slot.adapter.mean_delta(tensors, equal_gates(model)[slot.site])  # type: ignore[attr-defined]
    assert change(slot, tensors) == pytest.approx(float(equal.norm()), rel=1e-6)  # with nothing watched


@pytest.mark.parametrize("router", ROUTERS)
def test_gates_are_those_of_every_token(router: str) -> None:
    model, watch, gates = routed(router)
    found = figures(model, watch).gates
    assert found is not None
    shares = gates / gates.sum(-1, keepdim=True)
    logs = torch.where(shares > 0, shares.log(), 0.0)
    assert found.tokens == 40
    assert found.use == pytest.approx(shares.mean(0).tolist(), rel=1e-9)
    assert found.entropy == pytest.approx(float(-(shares * logs).sum(-1).mean()) / math.log(3), rel=1e-6, abs=1e-12)
    between = float(shares.var(0, correction=0).sum()) / (1.0 - float(shares.mean(0).square().sum()))
    assert found.spread == pytest.approx(between, rel=1e-6)
    _, other, _ = routed(router, 1)
    assert next(iter(other._tallies.values())).gates().use != pytest.approx(found.use, rel=1e-3)


@pytest.mark.parametrize(
    ("gates", "entropy", "use", "spread"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], 0.0, (0.5, 0.5), 1.0),  # each token a set of its own
        ([[1.0, 0.0], [1.0, 0.0]], 0.0, (1.0, 0.0), 0.0),  # one set for all
        ([[0.5, 0.5], [0.5, 0.5]], 1.0, (0.5, 0.5), 0.0),  # no choice
        ([[0.4, 0.0], [0.2, 0.0]], 0.0, (1.0, 0.0), 0.0),  # of topk, not normalised
    ],
)
def test_gates_at_their_ends(gates: list[list[float]], entropy: float, use: tuple[float, ...], spread: float) -> None:
    model = tiny("rank:4,sets=2", "mosara")
    watch, (_, slot, _) = Watch(model), held(model)
    watch.note(slot.tensors(held(model)[0])["shift"], torch.tensor(gates))
    found = watch.gates(slot.site)
    assert found is not None
    assert (found.entropy, found.spread) == pytest.approx((entropy, spread), abs=1e-6)
    assert found.use == pytest.approx(use)


def test_watch_knows_its_own_model_alone() -> None:
    model, other = tiny("rank:4,sets=2", "mosara"), tiny("rank:4,sets=2", "mosara")
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    with watching(model) as watch:
        other(x)
        assert watch.means() == {}
        assert watch.tokens == {}
        model(x)
    assert watch.tokens == {"0.weight": 10}
    assert float(watch.means()["0.weight"].sum()) == pytest.approx(1.0)
    model(x)
    assert watch.product("0.weight") is not None
    assert next(iter(watch._tallies.values())).count == 10  # nothing after it
    assert not next(iter(model.modules()))._forward_hooks


def test_checkpointed_forward_counts_once() -> None:
    model = tiny("rank:4,sets=2", "mosara")
    x = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    with watching(model) as watch:
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert next(iter(watch._tallies.values())).count == 6


def test_stack_is_taken_matrix_by_matrix_without_its_padding() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight[:8] *= torch.logspace(1, -3, 8, dtype=torch.float64)[:, None]  # ranks that differ
    model = shake(sarac.transform(nn.Sequential(attention), "threshold:0.6"))
    module, slot = next((m, s) for m, s in slots(model) if s.adapter.parts)
    assert len(set(slot.adapter.parts)) > 1
    tensors = {role: tensor.detach() for role, tensor in slot.tensors(module).items()}
    assert change(slot, tensors) == pytest.approx(float(slot.adapter.delta(tensors).norm()), rel=1e-9)
    found = health(module, slot, norms(model)[slot.site], Watch(model), lambda tensor: None)
    assert len(moves(slot, tensors)) == sum(slot.adapter.parts) < tensors["shift"].numel()
    assert found.rank == pytest.approx(sum(slot.adapter.parts) / 3)
    assert found.shape == (3, 8, 8)
    real = torch.cat([row[:k] for row, k in zip(tensors["shift"], slot.adapter.parts, strict=True)])
    assert found.moved == pytest.approx(float(real.square().mean().sqrt()), rel=1e-12)
    assert found.moved != pytest.approx(float(tensors["shift"].square().mean().sqrt()), rel=1e-3)


def test_gradient_is_that_of_all_that_trains() -> None:
    model, _, _ = routed("soft")
    model(torch.randn(5, 9, dtype=torch.float64)).square().sum().backward()
    module, slot, _ = held(model)
    live = slot.tensors(module)
    grads = [live[role].grad for role in slot.adapter.trainable]
    assert figures(model).grad == pytest.approx(float(torch.cat([one.reshape(-1) for one in grads if one is not None]).norm()))
    assert figures(model).router_grad == pytest.approx(float(live["router"].grad.norm()))  # type: ignore[union-attr]
    assert figures(model).router_grad != pytest.approx(figures(model).grad)
    model.zero_grad()
    assert figures(model).grad is None


def test_shifts_moved_and_stayed() -> None:
    model = tiny("rank:4")
    shift = held(model)[0].sara_shift
    shift.data.copy_(torch.tensor([0.0, -0.6, 1e-5, 0.3]))
    found = figures(model)
    assert found.largest == pytest.approx(0.6)
    assert found.moved == pytest.approx(math.sqrt((0.36 + 1e-10 + 0.09) / 4))
    assert found.still == 0.5
    assert (found.beyond, found.turned) == (0.0, 0.0)
    shift.data.copy_(torch.tensor([1.0, -1.0, -2.0, 0.3]))
    assert (figures(model).beyond, figures(model).turned) == (0.75, 0.5)
    shift.data.zero_()
    assert (figures(model).still, figures(model).moved, figures(model).delta) == (0.0, 0.0, 0.0)


def test_direction_is_as_far_as_its_farthest_set_that_is_used() -> None:
    model = tiny("rank:4,sets=3", "mosara")
    module, slot, tensors = held(model)
    rows = torch.tensor([[0.5, -0.4, 0.0, 0.0], [0.0, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, 0.9]], dtype=torch.float64)
    tensors["shift"].copy_(rows)
    assert farthest(slot, tensors).tolist() == [0.5, 0.4, 0.3, 0.9]
    assert figures(model).still == 0.0
    watch = Watch(model)
    watch.note(slot.tensors(module)["shift"], torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert farthest(slot, tensors, watch.gates(slot.site)).tolist() == [0.5, 0.4, 0.3, 0.0]
    assert figures(model, watch).still == 0.25


def test_spectrum_that_is_covered() -> None:
    model = tiny("rank:3")
    weight = held(model)[0]._parameters["weight"]
    assert weight is not None
    squares = torch.linalg.svdvals(weight.detach()).square()
    assert figures(model).covered == pytest.approx(float(squares[:3].sum() / squares.sum()), rel=1e-9)
    assert figures(tiny("rank:3,train=factors,init=random")).covered is None


@pytest.mark.parametrize("plan", ["rank:3", "threshold:1.0", "rank:4,sets=2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factors_of_another_weight_do_not_fit(plan: str, dtype: torch.dtype) -> None:
    """Rounding, of the model too after it was adapted, is no misfit."""
    model = sarac.transform(nn.Sequential(nn.Linear(40, 30)), plan, method="mosara" if "sets" in plan else "sara").to(dtype)
    (found,) = misfits(model).values()
    assert found is not None
    assert found <= {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    module, slot, tensors = held(model)
    tensors["scale"] *= 3.0
    assert misfits(model)[slot.site] == pytest.approx(0.5, abs=0.02)  # (3 - 1) / (3 + 1)
    tensors["scale"] /= 3.0
    nn.init.normal_(module._parameters["weight"], std=0.1)  # type: ignore[arg-type]
    (found,) = misfits(model).values()
    assert found is not None
    assert found > 0.4


@pytest.mark.parametrize("init", ["svd", "random"])
def test_columns_of_factors_that_train_start_near_1(init: str) -> None:
    model = sarac.transform(nn.Sequential(nn.Linear(9, 7)).double(), f"rank:3,train=factors,init={init}")
    before = figures(model).columns
    assert before == pytest.approx(1.0, rel=1e-6 if init == "svd" else 0.9)
    tensors = held(model)[2]
    tensors["v"][1] *= 7.0
    assert figures(model).columns == pytest.approx(float(tensors["v"][1].norm()), rel=1e-12)
    assert figures(model).columns != before
    assert figures(tiny("rank:3")).columns is None


@pytest.mark.parametrize("init", ["svd", "random"])
def test_factors_that_train_need_not_fit(init: str) -> None:
    assert list(misfits(tiny(f"rank:3,train=factors,init={init}")).values()) == [None]


@pytest.mark.parametrize(("rank", "expected"), [(3, 0), (6, 2)])
def test_floored_values_are_counted(rank: int, expected: int) -> None:
    for dtype in (torch.float32, torch.float64):
        linear = nn.Linear(9, 7).to(dtype)
        linear.weight.data = torch.randn(7, 4, dtype=dtype) @ torch.randn(4, 9, dtype=dtype)
        model = sarac.transform(nn.Sequential(linear), f"rank:{rank}")
        assert figures(model).floored == expected
    assert floored(torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.5, 1e-9]]), torch.empty(3, 3)) == 1  # a zero is padding


def test_likeness_is_the_mean_cosine() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert likeness(rows) == pytest.approx((0.0 + 2 * math.sqrt(0.5)) / 3)
    assert likeness(torch.tensor([[1.0, 2.0], [2.0, 4.0]])) == pytest.approx(1.0)
    assert likeness(torch.stack([rows, -rows])) == likeness(rows)
    assert likeness(torch.tensor([[1.0, 0.0], [0.0, 0.0]])) is None


BYTES: list[tuple[str, str, Callable[[int, int, int], int], Callable[[int, int, int], int]]] = [
    ("rank:3", "sara", lambda k, m, n: k, lambda k, m, n: k * (m + n + 1)),
    ("rank:3,train=factors", "sara", lambda k, m, n: k * (m + n + 1), lambda k, m, n: k),
    ("rank:3,sets=2", "mosara", lambda k, m, n: 4 * k, lambda k, m, n: k * (m + n + 1)),
    ("rank:3,sets=2,bottleneck=1", "mosara", lambda k, m, n: 3 * k + 2, lambda k, m, n: k * (m + n + 1)),
]


@pytest.mark.parametrize(("plan", "method", "trains", "frozen"), BYTES)
def test_bytes_are_those_of_the_tensors(plan: str, method: str, trains: Any, frozen: Any) -> None:
    found = figures(tiny(plan, method))
    assert (found.adapters, found.factors, found.base) == (8 * trains(3, 7, 9), 8 * frozen(3, 7, 9), 8 * 7 * 9)


def test_tied_weight_is_one_site() -> None:
    layers = mlp(6, 6, 6)
    layers[2].weight = layers[0].weight
    assert [slot.site for _, slot in slots(sarac.transform(layers, "rank:2"))] == ["0.weight"]
