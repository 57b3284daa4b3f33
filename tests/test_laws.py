"""The laws, over random small models, shapes, dtypes and plans."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import (
    CALLS,
    TRANSFORMERS,
    Own,
    Shared,
    TiedHead,
    Twice,
    adapt,
    close,
    differ,
    folded,
    ids,
    mlp,
    outputs,
    require_untouched,
    roles,
    same,
    shake,
    snapshot,
    trainables,
)

from sarac.ir import check
from sarac.ir.layers import adapted
from sarac.trace import trace

WIDE = [torch.float64, torch.float32]
DTYPES = [*WIDE, torch.float16, torch.bfloat16]
FOLDABLE = [
    ("threshold:0.6", "sara"),
    ("energy:0.9", "sara"),
    ("threshold:1", "sara"),
    ("rank:1", "sara"),
    ("budget:40", "sara"),
    ("rank:2,train=factors", "sara"),
    ("threshold:0.3,train=factors,init=random", "sara"),
    ("threshold:0.6,router=uniform", "mosara"),
    ("rank:3,sets=1", "mosara"),
]
ROUTED = [
    ("threshold:0.6", "mosara"),
    ("rank:3,sets=2", "mosara"),
    ("rank:2,sets=3,bottleneck=2", "mosara"),
    ("rank:3,router=hard", "mosara"),
    ("rank:3,router=topk:2", "mosara"),
]
SMOOTH = [*FOLDABLE, *ROUTED[:3]]  # every number of these is reached by every input


@dataclass
class Case:
    """A model, what to call it with, and how to adapt it."""

    model: nn.Module
    x: Tensor
    plan: str
    method: str
    dtype: torch.dtype

    def adapted(self) -> nn.Module:
        return adapt(self.model, self.plan, method=self.method, where="*" if isinstance(self.model, TiedHead) else None)


def models(draw: Any, dtype: torch.dtype, routed: bool) -> tuple[nn.Module, Tensor]:
    out, inner, tokens = draw(st.integers(3, 7)), draw(st.integers(3, 7)), draw(st.integers(8, 12))
    kinds = ["call", "mlp", "norm", "shared"] + ([] if routed else ["own", "twice", "tied"])
    kind = draw(st.sampled_from(kinds))
    x = torch.randn(tokens, inner)
    if kind == "tied":
        return TiedHead(inner).to(dtype), ids(2, 6)
    if kind in ("own", "call"):
        known = [name for name, call in CALLS.items() if kind == "own" or call.form == "call"]
        model: nn.Module = Own(draw(st.sampled_from(known)), out, inner)
    elif kind == "shared":
        model = Shared(inner)
    elif kind == "twice":
        model = Twice(out, inner)
    else:
        model = mlp(inner, out + 2, out, between=nn.Tanh if kind == "mlp" else lambda: nn.Sequential(nn.Dropout(0.5), nn.Tanh()))
    return model.to(dtype), x.to(dtype)


ANY_MODE = st.booleans()


@st.composite
def cases(draw: Any, plans: list[tuple[str, str]], dtypes: list[torch.dtype], training: Any = ANY_MODE) -> Case:
    torch.manual_seed(draw(st.integers(0, 999)))
    dtype, (plan, method) = draw(st.sampled_from(dtypes)), draw(st.sampled_from(plans))
    model, x = models(draw, dtype, (plan, method) in ROUTED)
    return Case(model.train(draw(training)), x, plan, method, dtype)


@settings(max_examples=30)
@given(cases([*FOLDABLE, *ROUTED], DTYPES))
def test_surgery_starts_as_an_exact_no_op_and_leaves_the_source_alone(case: Case) -> None:
    before, expected = snapshot(case.model), outputs(case.model, case.x)
    model = case.adapted()
    assert type(model).__name__ == type(case.model).__name__
    assert isinstance(model, type(case.model))
    same(outputs(model, case.x), expected)
    assert outputs(model, case.x).dtype == expected.dtype
    shake(model)
    assert not torch.equal(outputs(model, case.x), expected)
    require_untouched(case.model, before)
    same(outputs(case.model, case.x), expected)


@settings(max_examples=30)
@given(cases(FOLDABLE, DTYPES))
def test_folding_keeps_the_outputs_and_not_the_base(case: Case) -> None:
    model = shake(case.adapted())
    merged = folded(model)
    check.require_close(outputs(merged, case.x), outputs(model, case.x), case.dtype, "folded and adapted")
    require_moved(merged, model, case.model, case.x)
    assert list(merged.state_dict()) == list(case.model.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in case.model.modules()]


def require_moved(merged: nn.Module, model: nn.Module, base: nn.Module, x: Tensor) -> None:
    """Folding is nearer to what was trained than to the base, which it must not be."""
    end, trained, start = (check.leaves(outputs(each, x)) for each in (merged, model, base))
    (_, end), (_, trained), (_, start) = next(end), next(trained), next(start)
    assert not torch.equal(end, start)
    assert check.difference(end, start).error > 3 * check.difference(end, trained).error


def loss(case: Case, model: nn.Module) -> Tensor:
    out = model(case.x).double()
    return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).reshape(out.shape)).sum() + out.square().sum()


@settings(max_examples=30)
@given(cases(SMOOTH, WIDE, st.just(False)))
def test_gradients_are_where_training_is_and_nowhere_else(case: Case) -> None:
    model = case.adapted()
    trains = {name for names in roles(model).values() for name in names}
    unique = {id(model.get_parameter(name)) for name in trains}
    assert {id(p) for p in model.parameters() if p.requires_grad} == unique
    for start in (True, False):
        model.zero_grad()
        loss(case, model if start else shake(model)).backward()
        for name, parameter in model.named_parameters():
            if id(parameter) not in unique:
                assert parameter.grad is None, name
                continue
            assert torch.isfinite(parameter.grad).all()
            moves = not start or name.endswith("shift")
            assert (parameter.grad != 0).all() if moves else not parameter.grad.any(), name


@settings(max_examples=15)
@given(cases([*FOLDABLE, *ROUTED], [torch.float16, torch.bfloat16], st.just(False)))
def test_gradients_exist_in_half_precision(case: Case) -> None:
    model = shake(case.adapted())
    loss(case, model).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@settings(max_examples=15)
@given(cases(FOLDABLE, DTYPES))
def test_who_reads_an_adapted_weight_reads_the_merged_one(case: Case) -> None:
    model = shake(case.adapted())
    merged = folded(model)
    seen = 0
    for path, module, state in adapted(model):
        for param in state.slots:
            weight = merged.get_submodule(path).get_parameter(param)
            close(getattr(module, param), weight, case.dtype)
            seen += not torch.equal(weight, getattr(module, f"{param}_base"))
    assert seen == len(list(adapted(model)))


@settings(max_examples=15)
@given(cases([*FOLDABLE, *ROUTED], WIDE, st.just(False)), st.integers(1, 3))
def test_training_steps_move_the_copy_and_never_the_source(case: Case, steps: int) -> None:
    before = snapshot(case.model)
    model = case.adapted()
    bases = {path: {p: module._parameters[p].clone() for p in state.slots} for path, module, state in adapted(model)}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(case, model).backward()
        optimiser.step()
    assert not torch.equal(outputs(model, case.x), outputs(case.model, case.x))
    require_untouched(case.model, before)
    for path, module, _ in adapted(model):
        assert all(torch.equal(module._parameters[p], base) for p, base in bases[path].items())


@settings(max_examples=15)
@given(cases([*FOLDABLE, *ROUTED], DTYPES))
def test_surgery_can_be_repeated_with_the_same_result(case: Case) -> None:
    one, two = case.adapted(), case.adapted()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert list(trace(one).sites) == list(trace(two).sites)
    assert trainables(one) == trainables(two)


FAMILY_PLANS = [("threshold:0.6", "sara"), ("rank:2,train=factors", "sara"), ("rank:3,sets=2", "mosara")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("plan", "method"), FAMILY_PLANS)
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_laws_hold_for_transformers(family: str, plan: str, method: str, dtype: torch.dtype) -> None:
    model, tokens = TRANSFORMERS[family]().to(dtype), ids()
    before, expected = snapshot(model), outputs(model, tokens)[0]
    changed = adapt(model, plan, method=method)
    assert type(changed) is type(model)
    same(outputs(changed, tokens)[0], expected)
    same(outputs(changed.train(), tokens)[0], outputs(model.train(), tokens)[0])
    shake(changed.eval())
    model.eval()
    differ(outputs(changed, tokens)[0], expected)
    out = changed(tokens)[0].float()
    (out * torch.randn(out.shape)).sum().backward()
    for name, parameter in changed.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad or "pooler" in name, name
    if method == "sara":
        check.require_close(outputs(folded(changed), tokens)[0], outputs(changed, tokens)[0], dtype, "folded and adapted")
        require_moved(folded(changed), changed, model, tokens)
    require_untouched(model, before)
