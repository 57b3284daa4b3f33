"""Every schedule against float64 autograd of the plain formula: outputs and all gradients, whatever the shapes and dtypes."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.functional import linear
from zoo import differ, same

from sarac.ir.calls import AUTO, CHOICES, PLAIN, routed, shifted, singular
from sarac.ir.check import gate
from sarac.ir.routes import ROUTED
from sarac.ir.schedules import SCHEDULES

KINDS = ("soft", "topk:1", "topk:2", "hard")
SETS = 3
FIELDS = ("x", "weight", "bias", "u", "v", "scale", "shift")


@dataclass
class Case:
    """A weight with its leading singular vectors, inputs and shifts, in a dtype."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    u: Tensor
    v: Tensor
    scale: Tensor
    shift: Tensor
    router: Tensor | None = None
    inward: Tensor | None = None
    kind: str = ""

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another dtype; what trains in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        small = {"scale", "shift", "router", "inward"}
        cast = {
            name: value.detach().to(wide if name in small else dtype)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return Case(**{**vars(self), **cast})

    def run(self, schedule: str, op: str = "linear", factors: bool = False) -> dict[str, Tensor]:
        """The output, and the gradients of all that takes one."""
        trained = ["x", "bias", "shift", "router", "inward", *(("u", "v") if factors else ())]
        leaves = {
            name: getattr(self, name).detach().clone().requires_grad_() for name in trained if getattr(self, name) is not None
        }
        case = Case(**{**vars(self), **leaves})
        y = case.call(schedule, op)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}

    def call(self, schedule: str, op: str = "linear") -> Tensor:
        weight = self.weight if op == "linear" else self.weight.mT.contiguous()
        own = (self.x, weight, self.bias, self.u, self.v, self.scale, self.shift)
        if self.router is None:
            return shifted(*own, schedule, op)
        return routed(*own, self.router, self.inward, self.kind, schedule, op)


def made(out: int, inner: int, rank: int, tokens: int, bias: bool, seed: int = 0, kind: str = "", width: int = 0) -> Case:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    weight = random(out, inner)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    shift = random(SETS, rank) if kind else random(rank)
    case = Case(
        random(tokens, inner), weight, random(out) if bias else None, u[:, :rank].contiguous(), v[:rank].contiguous(), s[:rank],
        shift, kind=kind,
    )  # fmt: skip
    if kind:
        case.router = random(SETS, width or rank)
        case.inward = random(width, rank) if width else None
    return case


def errors(found: dict[str, Tensor], expected: dict[str, Tensor], usual: dict[str, Tensor] | None = None) -> dict[str, float]:
    """The errors relative to what is expected, or to what is usual where that is more: shifts of -1 may leave nothing."""
    assert found.keys() == expected.keys()
    sizes = {name: max(float(one[name].norm()) for one in (expected, usual or expected)) for name in expected}
    return {name: float((found[name].double() - expected[name]).norm()) / max(size, 1e-3) for name, size in sizes.items()}


def compared(case: Case, schedule: str, **how: Any) -> dict[str, float]:
    """The errors of a schedule against the formula, both in float64."""
    usual = Case(**{**vars(case), "shift": torch.ones_like(case.shift)})
    return errors(case.run(schedule, **how), case.run(PLAIN, **how), usual.run(PLAIN, **how))


@st.composite
def cases(draw: Any, kinds: tuple[str, ...] = ("",)) -> Case:
    out, inner = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rank, tokens = draw(st.integers(1, min(out, inner))), draw(st.sampled_from([1, 2, 3, 17, 64, 300, 4096]))
    kind = draw(st.sampled_from(kinds))
    case = made(
        out, inner, rank, tokens, draw(st.booleans()), draw(st.integers(0, 9)), kind, draw(st.integers(0, 2)) if kind else 0
    )
    near = draw(st.integers(0, rank))  # those a materialised call takes the long way
    if not kind and near:
        case.shift[:near] = -1.0 + draw(st.sampled_from([0.0, 1e-9, -1e-5, 0.2]))
    if draw(st.booleans()):
        case.x[: draw(st.integers(1, tokens))] = 0.0
    shape = draw(st.sampled_from(["rows", "batch", "turned", "stepped"]))
    if shape == "batch":
        case.x = case.x[None].expand(2, -1, -1)
    elif shape == "turned":
        case.x = case.x.mT.contiguous().mT
    elif shape == "stepped":
        case.x = torch.cat([case.x, case.x], 1)[:, ::2] if inner > 1 else case.x
    return case


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(sorted(SCHEDULES)), st.sampled_from(["linear", "matmul", "addmm", "mm"]))
def test_every_schedule_is_the_formula_and_its_gradients(case: Case, schedule: str, op: str) -> None:
    if op in ("addmm", "mm"):
        case.x = case.x.reshape(-1, case.x.shape[-1])
    if op in ("matmul", "mm") or (op == "addmm" and case.bias is None):
        case.bias, op = None, "matmul" if op == "addmm" else op
    assume(singular(case.weight, case.u, case.v, case.scale))  # else each is the two-sided one
    found = compared(case, schedule, op=op)
    assert max(found.values()) < 1e-9, found


@settings(max_examples=80, deadline=None)
@given(cases(KINDS), st.sampled_from(sorted(ROUTED)))
def test_every_routed_schedule_is_the_formula_and_its_gradients(case: Case, schedule: str) -> None:
    found = compared(case, schedule)
    assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("schedule", sorted(ROUTED))
def test_rows_of_zeros_tie_the_scores_whatever_the_schedule(schedule: str) -> None:
    """Of equal scores the first set is taken; h = 1e-17 would take another, whose gradient of x differs by a tenth."""
    case = made(3, 4, 2, 2, bias=True, kind="topk:1")
    case.x[0] = 0.0
    assert max(compared(case, schedule).values()) < 1e-9
    case.bias = None
    assert max(compared(case, schedule).values()) < 1e-9


@settings(max_examples=40, deadline=None)
@given(cases())
def test_factors_that_train_have_the_gradients_of_the_formula(case: Case) -> None:
    found = compared(case, AUTO, factors=True)
    assert {"u", "v", "shift", "x"} <= found.keys()
    assert max(found.values()) < 1e-9, found


WAYS = [
    *((name, "", biased) for name in sorted(SCHEDULES) for biased in (True, False) if not (biased and name == "left")),
    *((name, kind, name == "two-sided") for name in sorted(ROUTED) for kind in ("soft", "hard")),
    ("factors", "", True),
]


@pytest.mark.parametrize(("schedule", "kind", "biased"), WAYS)
@pytest.mark.parametrize(("out", "inner"), [(48, 40), (40, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_rounding_is_no_larger_than_the_formulas(
    dtype: torch.dtype, out: int, inner: int, schedule: str, kind: str, biased: bool, tokens: int
) -> None:
    case, factors = made(out, inner, 20, tokens, biased, kind=kind), schedule == "factors"
    case.shift *= 0.3
    case.scale = case.scale.clamp_min(float(case.scale[0]) / 3) if kind else case.scale  # near each other, as the left asks
    case.weight = case.weight + case.u @ ((case.scale - torch.linalg.svdvals(case.weight)[:20]).unsqueeze(1) * case.v)
    exact = case.to(dtype).to(torch.float64)
    expected = exact.run(PLAIN, factors=factors)
    by_formula = errors(exact.to(dtype).run(PLAIN, factors=factors), expected)
    found = errors(exact.to(dtype).run(AUTO if factors else schedule, factors=factors), expected)
    for name, error in found.items():
        assert error <= 4 * by_formula[name] + gate(dtype) / 10, (name, found, by_formula)
    taken = "TwoSided" if factors else schedule.title().replace("-", "")
    narrow = exact.to(dtype)
    narrow.shift.requires_grad_()
    narrow.u.requires_grad_(factors)
    assert type(narrow.call(AUTO if factors else schedule).grad_fn).__name__ == f"{'Routed' if kind else ''}{taken}Backward"


@pytest.mark.parametrize("mean", [1.0, 10.0])
def test_shifts_beside_factors_are_summed_before_anything_is_rounded(mean: float) -> None:
    """A mean of the input that V does not see is most of dV, and nothing of dδ: seen to be off by a fifth from a rounded dV."""
    case, draw = made(64, 80, 16, 1024, bias=False).to(torch.bfloat16), torch.Generator().manual_seed(1)
    wide = case.v.double()
    along = torch.randn(80, generator=draw, dtype=torch.float64)
    case.x = (case.x.double() + mean * (along - torch.linalg.pinv(wide) @ (wide @ along))).bfloat16()
    dy = (torch.randn(1024, 64, generator=draw) + torch.randn(64, generator=draw) / 2).bfloat16()

    def error(schedule: str) -> float:
        found = [gradient(case.to(dtype), name, dy) for dtype, name in ((torch.bfloat16, schedule), (torch.float64, PLAIN))]
        return float((found[0].double() - found[1]).norm() / found[1].norm())

    assert error(AUTO) <= 2 * error(PLAIN) + 1e-3


def gradient(case: Case, schedule: str, dy: Tensor) -> Tensor:
    """δ's, where the factors train too."""
    for one in (case.shift, case.u, case.v):
        one.requires_grad_()
    return torch.autograd.grad(case.call(schedule), case.shift, dy.to(case.x.dtype))[0]


@pytest.mark.parametrize(("out", "inner"), [(7, 5), (5, 7), (40, 30), (30, 40)])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("biased", [True, False])  # without one left runs, and materialised looks at y
def test_gradcheck(schedule: str, out: int, inner: int, biased: bool) -> None:
    case = made(out, inner, min(out, inner) - 1, 3, bias=biased)
    case.shift *= 0.5
    names = ["x", "shift", *(["bias"] if biased else [])]

    def call(*tensors: Tensor) -> Tensor:
        return Case(**{**vars(case), **dict(zip(names, tensors, strict=True))}).call(schedule)

    tensors = tuple(getattr(case, name).detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)  # a gradient may be differentiated again


@pytest.mark.parametrize("trained", [("u",), ("v",), ("u", "v")])
@pytest.mark.parametrize("biased", [True, False])
def test_gradcheck_of_factors(biased: bool, trained: tuple[str, ...]) -> None:
    case = made(5, 7, 3, 4, bias=biased)
    case.shift[0] = -1.0
    names = ["x", "shift", *trained, *(["bias"] if biased else [])]

    def call(*tensors: Tensor) -> Tensor:
        return Case(**{**vars(case), **dict(zip(names, tensors, strict=True))}).call(AUTO)

    tensors = tuple(getattr(case, name).detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("kind", ["soft", "topk:2"])
@pytest.mark.parametrize("width", [0, 2])
@pytest.mark.parametrize("schedule", sorted(ROUTED))
def test_routed_gradcheck(schedule: str, kind: str, width: int) -> None:
    case = made(6, 5, 4, 3, bias=False, kind=kind, width=width)
    names = ["x", "shift", "router", *(["inward"] if width else [])]

    def call(*tensors: Tensor) -> Tensor:
        return Case(**{**vars(case), **dict(zip(names, tensors, strict=True))}).call(schedule)

    tensors = tuple(getattr(case, name).detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("schedule", CHOICES)
@pytest.mark.parametrize("op", ["linear", "matmul", "addmm"])
@pytest.mark.parametrize(("out", "inner"), [(48, 20), (20, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_shift_changes_no_bit(schedule: str, op: str, out: int, inner: int, dtype: torch.dtype) -> None:
    case = made(out, inner, 8, 12, bias=op != "matmul").to(dtype)
    weight = case.weight if op == "linear" else case.weight.mT.contiguous()
    plain = {"linear": lambda: linear(case.x, weight, case.bias), "matmul": lambda: case.x @ weight}
    expected = plain.get(op, lambda: torch.addmm(case.bias, case.x, weight))()
    still = Case(**{**vars(case), "shift": torch.zeros_like(case.shift).requires_grad_()})
    same(still.call(schedule, op).detach(), expected)
    differ(case.call(schedule, op), expected)


def test_one_sided_schedules_are_for_singular_vectors_of_the_weight_that_is_there() -> None:
    case = made(12, 10, 4, 6, bias=False)
    assert singular(case.weight, case.u, case.v, case.scale)
    others = {
        "another base": {"weight": case.weight * 1.01},
        "random factors": {"u": torch.randn(12, 4, dtype=torch.float64)},
        "a floored value": {"scale": case.scale.clamp_min(float(case.scale[-1]) * 1.01)},
    }
    for what, changed in others.items():
        other = Case(**{**vars(case), **changed})
        assert not singular(other.weight, other.u, other.v, other.scale), what
        for schedule in SCHEDULES:  # each falls back to what holds for any factors
            assert max(compared(other, schedule).values()) < 1e-9, (what, schedule)
        for schedule in ("right", "left"):
            y = SCHEDULES[schedule].apply("linear", *(getattr(other, name) for name in FIELDS), None)[0]
            assert not torch.allclose(y, other.call(PLAIN)), (what, schedule)


def test_base_that_is_written_to_is_looked_at_again() -> None:
    case = made(12, 10, 4, 6, bias=False)
    case.weight, case.shift = nn.Parameter(case.weight, requires_grad=False), case.shift.requires_grad_()
    before = case.call("right")
    with torch.no_grad():
        case.weight.mul_(0.5)
    differ(case.call("right"), before)
    assert torch.allclose(case.call("right"), case.call(PLAIN), rtol=1e-12)


def saved_by(call: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward, frozen tensors aside."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    return sum(kept.values())


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_kept_of_tokens_is_one_projection(schedule: str) -> None:
    case = made(64, 64, 8, 512, bias=False).to(torch.bfloat16)
    case.x, case.shift = case.x.requires_grad_(), case.shift.requires_grad_()
    frozen = sum(one.numel() * one.element_size() for one in (case.weight, case.u, case.v, case.scale, case.shift))
    made_weight = 64 * 64 * 2 if schedule == "materialised" else 0
    assert saved_by(lambda: case.call(schedule)) <= 512 * 8 * 2 + frozen + made_weight
    assert saved_by(lambda: case.call(PLAIN)) > 512 * 8 * 4  # autograd keeps more than one, and in float32
    case.x = case.x.detach()  # as of a first layer: no weight is kept for a gradient that nobody takes
    assert saved_by(lambda: case.call(schedule)) <= 512 * 8 * 2 + frozen


@pytest.mark.parametrize(("schedule", "kind"), [*itertools.product(sorted(SCHEDULES), [""]), ("right", "soft")])
def test_function_transforms_take_the_formula(schedule: str, kind: str) -> None:
    case = made(6, 5, 4, 3, bias=True, kind=kind)

    def loss(shift: Tensor, x: Tensor) -> Tensor:
        return Case(**{**vars(case), "x": x, "shift": shift}).call(schedule).square().sum()

    expected = case.shift.clone().requires_grad_()
    loss(expected, case.x).backward()
    assert torch.allclose(grad(loss)(case.shift, case.x), expected.grad)
    each = vmap(grad(loss), (None, 0))(case.shift, case.x[:, None])
    assert torch.allclose(each.sum(0), expected.grad)
    tangent = jvp(lambda shift: loss(shift, case.x), (case.shift,), (torch.ones_like(case.shift),))[1]
    assert torch.allclose(tangent, expected.grad.sum())


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_autocast_runs_in_its_dtype(schedule: str) -> None:
    case = made(24, 20, 8, 12, bias=True).to(torch.float32)
    case.x, case.shift = case.x.requires_grad_(), (case.shift * 0.3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.call(schedule)
        plain = case.call(PLAIN)
    assert y.dtype == plain.dtype == torch.bfloat16
    y.float().square().sum().backward()
    found = case.shift.grad.clone()
    assert case.x.grad.dtype == torch.float32
    case.shift.grad = None
    case.call(PLAIN).square().sum().backward()
    assert float((found - case.shift.grad).norm() / case.shift.grad.norm()) < gate(torch.bfloat16)
