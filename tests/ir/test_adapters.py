"""The maths of each method, each option of Mo-SARA where it matters, and what the options may be."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from zoo import close, differ, same

from sarac.ir.adapters import Adapter, MoSara, Sara
from sarac.ir.errors import NotFoldable, PlanError
from sarac.ir.methods import build, describe, options, trainable_count
from sarac.ir.terms import leaf

OUT, INNER, RANK, TOKENS = 5, 7, 3, 12


def start(adapter: Adapter, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A weight, inputs, and the adapter's tensors at its start."""
    weight, x = torch.randn(OUT, INNER, dtype=torch.float64), torch.randn(TOKENS, INNER, dtype=torch.float64)
    return weight.to(dtype), x.to(dtype), adapter.init(weight.to(dtype), torch.Generator().manual_seed(seed), "w")


def moved(adapter: Adapter, **changed: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same with random shifts, or with the given tensors."""
    weight, x, tensors = start(adapter)
    shift = torch.randn(tensors["shift"].shape, dtype=torch.float64)
    return weight, x, {**tensors, "shift": shift, **changed}


def change(adapter: Adapter, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """What the adapter adds to the base's output."""
    return adapter.apply(x, torch.zeros(len(x), OUT, dtype=x.dtype), tensors)


EVERY = [
    Sara(RANK),
    Sara(RANK, train="factors"),
    Sara(RANK, train="factors", basis="random"),
    MoSara(RANK),
    MoSara(RANK, sets=1),
    MoSara(RANK, router="topk:2"),
    MoSara(RANK, router="hard"),
    MoSara(RANK, router="uniform"),
    MoSara(RANK, bottleneck=2),
    MoSara(RANK, sets=3, router="topk:1", bottleneck=1),
]


@pytest.mark.parametrize("adapter", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_init_changes_nothing_and_has_the_shapes_it_tells(adapter: Adapter, dtype: torch.dtype) -> None:
    weight, x, tensors = start(adapter, dtype)
    assert {role: tuple(tensor.shape) for role, tensor in tensors.items()} == adapter.shapes(OUT, INNER)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert tensors["u"].dtype == tensors["v"].dtype == dtype
    y = functional.linear(x, weight)
    assert torch.equal(adapter.apply(x, y, tensors), y)
    assert adapter.apply(x, y, tensors).dtype == dtype
    tensors["shift"] = tensors["shift"] + 1.0
    assert not torch.equal(adapter.apply(x, y, tensors), y)


@pytest.mark.parametrize("adapter", EVERY, ids=str)
def test_trainable_names_roles_that_exist(adapter: Adapter) -> None:
    shapes = adapter.shapes(OUT, INNER)
    assert set(adapter.trainable) <= set(shapes)
    assert "shift" in adapter.trainable
    assert "scale" not in adapter.trainable
    count = sum(torch.Size(shapes[role]).numel() for role in adapter.trainable)
    assert trainable_count(adapter, (OUT, INNER)) == count


def test_how_many_numbers_each_method_trains() -> None:
    counts = [trainable_count(adapter, (OUT, INNER)) for adapter in EVERY]
    factors = RANK * (OUT + INNER + 1)
    assert counts == [3, factors, factors, 30, 3, 30, 30, 15, 5 * 3 + 5 * 2 + 2 * 3, 3 * 3 + 3 * 1 + 1 * 3]


@pytest.mark.parametrize("adapter", [adapter for adapter in EVERY if adapter.foldable], ids=str)
def test_delta_is_what_apply_adds(adapter: Adapter) -> None:
    _, x, tensors = moved(adapter)
    close(change(adapter, x, tensors), functional.linear(x, adapter.delta(tensors)), torch.float64)
    differ(change(adapter, x, tensors), torch.zeros(TOKENS, OUT))


def test_delta_of_sara_is_u_lambda_v() -> None:
    weight, _, tensors = moved(Sara(RANK))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    expected = u[:, :RANK] @ torch.diag(tensors["shift"] * s[:RANK]) @ v[:RANK]
    close(Sara(RANK).delta(tensors), expected, torch.float64)
    differ(Sara(RANK).delta(tensors), u[:, :RANK] @ torch.diag(tensors["shift"]) @ v[:RANK])


def test_a_shift_of_one_doubles_the_leading_part() -> None:
    weight, _, tensors = moved(Sara(OUT), shift=torch.ones(OUT, dtype=torch.float64))
    close(Sara(OUT).delta(tensors), weight, torch.float64)


def test_one_sided_forms_give_the_same() -> None:
    """DESIGN section 5: U = W Vᵀ S⁻¹, so one factor is enough."""
    weight, x, tensors = moved(Sara(RANK))
    h = functional.linear(x, tensors["v"]) * tensors["shift"]
    right = functional.linear(functional.linear(h, tensors["v"].T), weight)
    close(change(Sara(RANK), x, tensors), right, torch.float64)
    left = tensors["u"] @ torch.diag(tensors["shift"]) @ tensors["u"].T @ weight
    close(Sara(RANK).delta(tensors), left, torch.float64)


def test_random_start_depends_on_the_seed_and_svd_start_does_not() -> None:
    random, svd = Sara(RANK, "factors", "random"), Sara(RANK, "factors")
    torch.manual_seed(0)
    first, again = start(random, seed=1)[2], None
    for seed, equal in ((1, True), (2, False)):
        torch.manual_seed(0)
        again = start(random, seed=seed)[2]
        assert torch.equal(first["u"], again["u"]) is equal
        assert torch.equal(first["v"], again["v"]) is equal
    assert first["scale"].tolist() == [1.0] * RANK
    torch.manual_seed(0)
    assert not torch.equal(start(svd)[2]["u"], first["u"])


def test_scale_is_floored_where_the_weight_has_no_direction() -> None:
    weight = torch.diag(torch.tensor([2.0, 0.0]))
    scale = Sara(2).init(weight, torch.Generator(), "w")["scale"]
    assert scale[0] == 2.0
    assert scale[1] == 2 * torch.finfo(torch.float32).eps * 2.0
    assert torch.isfinite(1 / scale).all()


# Mo-SARA: every option where it matters.


def test_soft_gates_mix_every_set() -> None:
    adapter = MoSara(RANK, sets=4)
    _, x, tensors = moved(adapter)
    h = functional.linear(x, tensors["v"])
    gates = torch.softmax(h @ tensors["router"].T, -1)
    lambdas = torch.einsum("ts,sk->tk", gates, tensors["shift"] * tensors["scale"])
    close(change(adapter, x, tensors), (h * lambdas) @ tensors["u"].T, torch.float64)
    close(adapter.gates(h, tensors).sum(-1), torch.ones(TOKENS), torch.float64)


def test_two_tokens_get_two_weights() -> None:
    """What routing is for: no single weight change explains the output."""
    soft, control = MoSara(RANK, sets=2), MoSara(RANK, sets=2, router="uniform")
    torch.manual_seed(0)
    _, x, tensors = moved(soft)
    tensors["router"] = tensors["router"] * 20
    for adapter, linear in ((soft, False), (control, True)):
        added = change(adapter, x, tensors)
        fitted = x @ torch.linalg.lstsq(x, added).solution
        if linear:
            close(fitted, added, torch.float64)
        else:
            differ(fitted, added)


def test_topk_keeps_the_largest_gates_as_they_are() -> None:
    soft, topk = MoSara(RANK, sets=4), MoSara(RANK, sets=4, router="topk:2")
    _, x, tensors = moved(soft)
    h = functional.linear(x, tensors["v"])
    full, kept = soft.gates(h, tensors), topk.gates(h, tensors)
    assert torch.equal((kept > 0).sum(-1), torch.full((TOKENS,), 2))
    assert torch.equal(kept, torch.where(full >= full.topk(2).values[:, 1:], full, 0.0))
    differ(change(topk, x, tensors), change(soft, x, tensors))
    same(change(MoSara(RANK, sets=4, router="topk:4"), x, tensors), change(soft, x, tensors))


def test_topk_one_still_trains_its_router() -> None:
    adapter = MoSara(RANK, sets=4, router="topk:1")
    _, x, tensors = moved(adapter)
    router = tensors["router"].requires_grad_()
    change(adapter, x, tensors).square().sum().backward()
    assert router.grad is not None
    assert (router.grad != 0).all()


def test_hard_gate_is_one_set_and_trains_straight_through() -> None:
    hard, soft = MoSara(RANK, sets=4, router="hard"), MoSara(RANK, sets=4)
    _, x, tensors = moved(hard)
    h = functional.linear(x, tensors["v"])
    chosen = soft.gates(h, tensors).argmax(-1)
    close(hard.gates(h, tensors), functional.one_hot(chosen, 4), torch.float64)
    assert len(set(chosen.tolist())) > 1
    lambdas = (tensors["shift"] * tensors["scale"])[chosen]
    close(change(hard, x, tensors), (h * lambdas) @ tensors["u"].T, torch.float64)
    differ(change(hard, x, tensors), change(soft, x, tensors))
    router = tensors["router"].requires_grad_()
    change(hard, x, tensors).square().sum().backward()
    assert router.grad is not None
    assert (router.grad != 0).all()


def test_uniform_is_the_mean_of_the_sets_and_folds() -> None:
    adapter = MoSara(RANK, sets=4, router="uniform")
    _, x, tensors = moved(adapter)
    assert "router" not in tensors
    one = {**tensors, "shift": tensors["shift"].mean(0)}
    close(adapter.delta(tensors), Sara(RANK).delta(one), torch.float64)
    close(change(adapter, x, tensors), change(Sara(RANK), x, one), torch.float64)


@pytest.mark.parametrize("router", ["soft", "topk:1", "hard", "uniform"])
def test_one_set_is_sara(router: str) -> None:
    adapter = MoSara(RANK, sets=1, router=router)
    _, x, tensors = moved(adapter)
    assert adapter.foldable
    one = {**tensors, "shift": tensors["shift"][0]}
    same(change(adapter, x, tensors), change(Sara(RANK), x, one))
    close(adapter.delta(tensors), Sara(RANK).delta(one), torch.float64)


def test_bottleneck_is_a_router_of_that_rank() -> None:
    narrow, wide = MoSara(RANK, sets=5, bottleneck=1), MoSara(RANK, sets=5)
    _, x, tensors = moved(narrow)
    product = {**tensors, "router": tensors["router"] @ tensors["router_in"]}
    close(change(narrow, x, tensors), change(wide, x, product), torch.float64)
    assert torch.linalg.matrix_rank(product["router"]) == 1
    assert torch.linalg.matrix_rank(start(wide)[2]["router"]) > 1
    assert trainable_count(narrow, (OUT, INNER)) < trainable_count(wide, (OUT, INNER))


@pytest.mark.parametrize("adapter", [MoSara(RANK), MoSara(RANK, bottleneck=2)], ids=str)
def test_router_starts_with_rows_that_differ(adapter: MoSara) -> None:
    router = start(adapter)[2]["router"]
    assert len({tuple(row.tolist()) for row in router}) == 5
    assert torch.equal(router, start(adapter)[2]["router"])
    assert not torch.equal(router, start(adapter, seed=1)[2]["router"])


@pytest.mark.parametrize("router", ["soft", "topk:2", "hard"])
def test_routed_adapter_has_no_single_weight(router: str) -> None:
    adapter = MoSara(RANK, sets=3, router=router)
    tensors = moved(adapter)[2]
    with pytest.raises(NotFoldable, match=f"3 sets, router {router}"):
        adapter.delta(tensors)
    fixed = adapter.mean_delta(tensors, torch.tensor([0.0, 1.0, 0.0]))
    second = {**tensors, "shift": tensors["shift"][1]}
    close(fixed, Sara(RANK).delta(second), torch.float64)


def test_infinite_projection_in_half_precision_stays_out_of_the_output() -> None:
    """inf · 0 would make NaN of a good model: V x is taken in float32 there."""
    weight, x = torch.full((4, 64), 1e-3, dtype=torch.half), torch.full((2, 64), 6e4, dtype=torch.half)
    for adapter in (Sara(1), MoSara(1), MoSara(1, router="hard")):
        tensors = adapter.init(weight, torch.Generator().manual_seed(0), "w")
        assert torch.isinf(functional.linear(x, tensors["v"])).all()
        y = functional.linear(x, weight)
        assert torch.equal(adapter.apply(x, y, tensors), y)
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("shape", [(INNER,), (2, INNER), (2, 3, INNER), (0, INNER)])
@pytest.mark.parametrize("adapter", EVERY, ids=str)
def test_apply_takes_any_leading_dimensions(adapter: Adapter, shape: tuple[int, ...]) -> None:
    _, _, tensors = moved(adapter)
    x = torch.randn(shape, dtype=torch.float64)
    one_by_one = change(adapter, x.reshape(-1, INNER), tensors).reshape(*shape[:-1], OUT)
    close(adapter.apply(x, torch.zeros(*shape[:-1], OUT, dtype=x.dtype), tensors), one_by_one, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [Sara(RANK), MoSara(RANK)], ids=str)
def test_autocast_changes_the_dtype_of_the_base_only(adapter: Adapter, dtype: torch.dtype) -> None:
    weight, x, tensors = start(adapter, torch.float32)
    with torch.autocast("cpu", dtype):
        y = functional.linear(x, weight)
        assert y.dtype == dtype
        out = adapter.apply(x, y, tensors)
        assert out.dtype == dtype
        assert torch.equal(out, y)
        tensors["shift"] = torch.full_like(tensors["shift"], 0.5)
        close(adapter.apply(x, y, tensors), adapter.apply(x, functional.linear(x, weight), tensors), dtype)
    whole = adapter.apply(x, functional.linear(x, weight), tensors)
    with torch.autocast("cpu", dtype):
        close(adapter.apply(x, y, tensors), whole, dtype)


def test_leaf_is_itself_on_tensors() -> None:
    assert leaf(torch.add)(torch.ones(2), torch.ones(2)).tolist() == [2.0, 2.0]


# What the options may be.


@pytest.mark.parametrize(
    ("method", "rank", "chosen", "said"),
    [
        ("sara", 0, {}, "rank=0"),
        ("sara", 2, {"train": "all"}, "train=all is not possible: train is one of singular_values, factors"),
        ("sara", 2, {"init": "zero"}, "init=zero is not possible: init is one of svd, random"),
        ("sara", 2, {"init": "random"}, "random ones need train=factors"),
        ("sara", 2, {"set": 3}, "has no option 'set'"),
        ("sara", 2, {"rank": 3}, "has no option 'rank'"),
        ("lora", 2, {}, "'lora' is unknown"),
        ("mosara", 2, {"sets": 0}, "sets=0 is not possible: there is at least 1 set"),
        ("mosara", 2, {"sets": "many"}, "sets=many is not possible: it takes a whole number"),
        ("mosara", 2, {"sets": None}, "sets=None is not possible"),
        ("mosara", 2, {"sets": 2.5}, "sets=2.5 is not possible"),
        ("mosara", 2, {"bottleneck": -1}, "bottleneck=-1 is not possible"),
        ("mosara", 2, {"router": "topk"}, "router=topk is not possible"),
        ("mosara", 2, {"router": "topk:0"}, "router=topk:0 is not possible: N is a number from 1 to sets"),
        ("mosara", 2, {"router": "topk:6"}, r"router=topk:6 is not possible: N is a number from 1 to sets \(5\)"),
        ("mosara", 2, {"router": "soft:2"}, "router=soft:2 is not possible"),
        ("mosara", 2, {"router": "random"}, "soft, topk:N, hard or uniform"),
        ("mosara", 2, {"train": "factors"}, "has no option 'train'"),
    ],
)
def test_impossible_option_is_told_with_its_value(method: str, rank: int, chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        build(method, rank, chosen)


@pytest.mark.parametrize("adapter", EVERY, ids=str)
def test_description_builds_the_same_adapter(adapter: Adapter) -> None:
    told = describe(adapter)
    method, rank = told.pop("method"), told.pop("rank")
    assert build(method, rank, told) == adapter
    assert build(method, rank, {name: str(value) for name, value in told.items()}) == adapter
    assert build(method, rank + 1, told) != adapter
    assert set(told) == set(options(method)) - {"router_of"}
