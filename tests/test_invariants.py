"""Every spelling of a linear weight x every method x what must hold: a table of cases and a list of laws.

Each law that two things are equal says in the same breath what must differ, so that an adapter without effect fails it.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.plain import CASES
from torch import Tensor, nn
from zoo import require_untouched, seed, shake, snapshot

import sarac
from sarac.ir import check
from sarac.ir.inputs import Inputs
from sarac.ir.layers import adapted
from sarac.ir.layout import dense

METHODS: dict[str, tuple[str, str]] = {
    "values": ("threshold:0.6", "sara"),
    "factors": ("threshold:0.3,train=factors,init=random", "sara"),
    "routed": ("threshold:0.6,sets=3", "mosara"),
}
# What they give does not depend on all that is adapted: the benchmark judges them, these laws cannot.
WITHOUT_EFFECT = {"half of it zeros"}
READ_OUTSIDE = {"kernel as a matrix"}  # by a module that owns no weight and so is no region
SOME_ONLY = {"branching on numbers", "experts: chosen", "experts: token"}  # an input reaches a part of the weights
SPELLINGS = [name for name, case in CASES.items() if not case.refused and name not in WITHOUT_EFFECT]
# Factors take the way of the values but for what trains: a third of the spellings shows it.
PAIRS = [(name, method) for i, name in enumerate(SPELLINGS) for method in METHODS if method != "factors" or i % 3 == 0]


@dataclass
class Case:
    """A base, its adapted form at the start and moved, and what they are called with."""

    name: str
    method: str

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        case, (plan, method) = CASES[self.name], METHODS[self.method]
        self.base = case.make().train(case.train)
        self.inputs = Inputs.of(case.example())
        self.before = snapshot(self.base)
        where = case.options.get("where")
        if self.method == "routed":
            sites = sarac.trace(self.base).sites.values()
            where = [s.name for s in sites if s.form == "call" and not s.others and (where or s.default)]
        if self.method == "routed" and (not where or self.name in READ_OUTSIDE):
            pytest.skip("no input-side path")
        self.start, self.model = (_transformed(self.base, plan, method, where) for _ in range(2))
        shake(self.model)

    @cached_property
    def folded(self) -> nn.Module:
        return sarac.fold(self.model)

    def out(self, model: nn.Module) -> list[Tensor]:
        seed(7)
        with torch.no_grad():
            return [tensor.clone() for _, tensor in check.leaves(self.inputs.call(model))]

    def slots(self) -> Iterator[tuple[str, nn.Module, Any]]:
        for path, module, state in adapted(self.model):
            for slot in state.slots.values():
                yield path, module, slot

    @property
    def dtype(self) -> torch.dtype:
        return check.coarsest(self.base)


def _transformed(base: nn.Module, plan: str, method: str, where: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sarac.SaracWarning)
        return sarac.transform(base, plan, method=method, where=where)


def close(case: Case, one: Any, two: Any) -> None:
    check.require_close(one, two, case.dtype, "two outputs")


def differ(case: Case, one: Any, two: Any) -> None:
    assert check.difference(one, two).error > 3 * check.gate(case.dtype)


def backward(case: Case, model: nn.Module) -> None:
    model.zero_grad()
    seed(7)
    outputs = [t for _, t in check.leaves(case.inputs.call(model)) if t.is_floating_point() and t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    sum((t * torch.randn(t.shape, generator=generator, device="cpu").to(t)).sum() for t in outputs).backward()


def it_starts_as_the_base(case: Case) -> None:
    ours, base = case.out(case.start), case.out(case.base)
    # A weight that another module reads may leave that module's fused kernel: there the last bits differ.
    sites = sarac.trace(case.base).sites.values()
    if all(site.form == "call" and not site.others for site in sites):
        check.require_identical(ours, base, "the start and the base")
    close(case, ours, base)
    differ(case, case.out(case.model), base)


def it_leaves_the_source_alone(case: Case) -> None:
    case.out(case.model)
    require_untouched(case.base, case.before)


def only_adapters_train_and_all_of_each(case: Case) -> None:
    backward(case, case.model)
    owned = {}
    for path, module, slot in case.slots():
        tensors = slot.tensors(module)
        for role in slot.adapter.trainable:
            owned[f"{path}.{slot.attribute(role)}".lstrip(".")] = (role, tensors)
    for name, parameter in case.model.named_parameters():
        assert parameter.requires_grad is (name in owned), name
        if case.name != "branching on numbers":
            assert (parameter.grad is not None) is (name in owned), name
        if name in owned and parameter.grad is not None:
            role, tensors = owned[name]
            reached = parameter.grad != 0
            if (
                role == "shift" and case.method == "values" and case.name not in SOME_ONLY
            ):  # but the padding of a stack, whose scale is zero
                assert torch.equal(reached, tensors["scale"] != 0), name
            assert reached.any(), name


def the_gradient_is_that_of_the_weight(case: Case) -> None:
    """dL/dδ_j = s_j u_jᵀ (dL/dW) v_j, with dL/dW from the plain model that it folds to."""
    if case.method != "values" or case.dtype in (torch.float16, torch.bfloat16) or case.name in SOME_ONLY:
        pytest.skip("only singular values in full precision, all of them reached")
    gradients = []
    for model in (case.model, case.folded.requires_grad_(True)):
        backward(case, model)
        gradients.append({name: p.grad for name, p in model.named_parameters(remove_duplicate=False)})
    for path, module, slot in case.slots():
        tensors = slot.tensors(module)
        dense_gradient = slot.layout.matrix(gradients[1][f"{path}.{slot.param}".lstrip(".")])
        along = torch.einsum("...ok,...oi,...ki->...k", tensors["u"], dense_gradient, tensors["v"])
        found = gradients[0][f"{path}.{slot.attribute('shift')}".lstrip(".")]
        expected = tensors["scale"] * along
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-5, slot.site
        assert expected.norm() > 0


def it_folds_to_what_it_computes(case: Case) -> None:
    if case.method == "routed":
        with pytest.raises(sarac.NotFoldable, match="routed"):
            sarac.fold(case.model)
        return
    close(case, case.out(case.folded), case.out(case.model))
    differ(case, case.out(case.folded), case.out(case.base))


def it_folds_to_the_same_again_and_once_only(case: Case) -> None:
    if case.method == "routed":
        pytest.skip("it does not fold")
    check.require_identical(case.out(sarac.fold(case.model)), case.out(case.folded), "two folds")
    with pytest.raises(sarac.RewriteError, match="carries no adapters"):
        sarac.fold(case.folded)


def folding_restores_names_and_classes(case: Case) -> None:
    if case.method == "routed":
        pytest.skip("it does not fold")
    assert list(case.folded.state_dict()) == list(case.base.state_dict())
    assert [type(module) for module in case.folded.modules()] == [type(module) for module in case.base.modules()]
    assert [type(module) for module in case.model.modules()] != [type(module) for module in case.base.modules()]
    shared = {p.data_ptr() for p in case.base.parameters()} & {p.data_ptr() for p in case.folded.parameters()}
    touched = {slot.site for _, _, slot in case.slots()}
    assert len(shared) == sum(p.numel() > 0 for p in case.base.parameters()) - len(touched)


def disabled_it_is_the_base(case: Case) -> None:
    moved = case.out(case.model)
    with sarac.disabled(case.model):
        close(case, case.out(case.model), case.out(case.base))
        differ(case, case.out(case.model), moved)
    check.require_identical(case.out(case.model), moved, "before and after it was disabled")


def it_travels_in_a_file(case: Case, folder: Path) -> None:
    sarac.save_adapter(case.model, folder / "a.safetensors")
    torch.manual_seed(99)
    again = sarac.load_adapter(case.base, folder / "a.safetensors")
    check.require_identical(case.out(again), case.out(case.model), "the loaded and the saved model")
    differ(case, case.out(again), case.out(case.start))


def every_weight_reads_as_the_effective_one(case: Case) -> None:
    """Law 2, by hand, in every mode."""
    if case.method == "routed":
        for _, module, slot in case.slots():
            with pytest.raises(sarac.NotFoldable, match=slot.adapter.method.replace("mosara", "routed Mo-SARA")):
                getattr(module, slot.param) + 0
        return
    merged = dict(case.folded.named_parameters(remove_duplicate=False))
    base = dict(case.base.named_parameters(remove_duplicate=False))
    for training in (True, False):
        case.model.train(training)
        for grad in (True, False):
            for path, module, slot in case.slots():
                name = f"{path}.{slot.param}".lstrip(".")
                with torch.set_grad_enabled(grad):
                    read = getattr(module, slot.param) + 0
                close(case, read, merged[name])
                assert not torch.equal(read, dense(base[name]))
                assert read.requires_grad is grad
    case.model.train(CASES[case.name].train)


LAWS: list[Callable[..., None]] = [
    it_starts_as_the_base,
    it_leaves_the_source_alone,
    only_adapters_train_and_all_of_each,
    the_gradient_is_that_of_the_weight,
    it_folds_to_what_it_computes,
    it_folds_to_the_same_again_and_once_only,
    folding_restores_names_and_classes,
    disabled_it_is_the_base,
    it_travels_in_a_file,
    every_weight_reads_as_the_effective_one,
]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_spelling(name: str, method: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    case = Case(name, method)
    for law in LAWS:
        with subtests.test(law=law.__name__):
            law(case, tmp_path) if law is it_travels_in_a_file else law(case)


@pytest.mark.parametrize("name", READ_OUTSIDE)
def test_routed_weight_that_is_read_from_outside_is_never_silent(name: str) -> None:
    case = CASES[name]
    x = case.example()
    model = sarac.transform(case.make(), method="mosara")
    with pytest.raises(sarac.NotFoldable, match=r"conv\.weight: A routed"):
        model(x)
    with pytest.raises(sarac.PlanError, match=r"conv\.weight cannot carry a routed adapter, .* reads the weight as well"):
        sarac.transform(case.make(), method="mosara", example_inputs=x, where="conv.weight")
    plain = case.make()
    model = shake(sarac.transform(plain))
    check.require_close(sarac.fold(model)(x), model(x), torch.float32, "folded and adapted")
    assert not torch.allclose(model(x), plain(x))
