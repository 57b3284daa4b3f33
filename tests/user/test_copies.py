"""Copies, casts, state dicts and functional calls of adapted models: what people do with any module."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune, spectral_norm
from user.methods import FOLDABLE, METHODS, adapted, base, batch, fresh
from zoo import bert, close, differ, gpt2, llama, mlp, outputs, same, shake, t5, trainables

import sarac
from sarac import WeightError
from sarac.ir.check import gate
from sarac.ir.record import record_of


def logits(model: nn.Module) -> Tensor:
    return outputs(model, batch()).logits


# --- copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_deepcopy_is_another_model(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    before, twin = logits(model), copy.deepcopy(model)
    same(logits(twin), before)
    assert record_of(twin).plan == record_of(model).plan
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    shake(twin)
    differ(logits(twin), before)
    same(logits(model), before)
    twin.save_pretrained(tmp_path)  # itself, not the model that it was copied from
    same(logits(sarac.load(tmp_path)), logits(twin))
    with sarac.disabled(twin):
        same(logits(model), before)
        differ(logits(twin), before)


@pytest.mark.parametrize("method", FOLDABLE)
def test_deepcopy_trains_and_folds(method: str) -> None:
    twin = copy.deepcopy(adapted(method))
    optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=sarac.recommended_lr(twin))
    before = logits(twin)
    twin(batch(), labels=batch()).loss.backward()
    optimizer.step()
    differ(logits(twin), before)
    close(logits(sarac.fold(twin)), logits(twin))


def test_shallow_copy_shares_its_tensors() -> None:
    model = adapted("sara")
    twin = copy.copy(model)
    same(logits(twin), logits(model))
    assert dict(twin.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(p is other for p, other in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_travels_through_a_file(method: str, tmp_path: Path) -> None:
    model, other = adapted(method), fresh(method)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    differ(logits(other), logits(model))
    missing, unexpected = other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not missing
    assert not unexpected
    same(logits(other), logits(model))
    assigned = fresh(method)
    assigned.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), assign=True)
    same(logits(assigned), logits(model))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*sara_shift"):
        base().load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*sara_shift"):
        model.load_state_dict(base().state_dict())


@pytest.mark.parametrize("save", [pickle.dumps, lambda m: torch.save(m, io.BytesIO())])
def test_pickling_says_what_to_do_instead(save: Callable[[Any], Any]) -> None:
    with pytest.raises(WeightError, match=r"cannot be pickled: .*sarac\.save .*state_dict"):
        save(adapted("sara"))
    pickle.dumps(sarac.fold(adapted("sara")))


@pytest.mark.parametrize(("build", "method"), [(llama, "sara"), (bert, "mosara"), (gpt2, "factors"), (t5, "sara")])
def test_signature_class_and_names_are_the_models_own(build: Callable[[], Any], method: str) -> None:
    plain, model = base(build), fresh(method, build)
    assert type(model) is type(plain)
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in plain.modules()]
    assert all(isinstance(m, type(plain.get_submodule(name))) for name, m in model.named_modules())
    for name in ("forward", "generate", "state_dict", "to", "save_pretrained"):
        if name != "generate" or hasattr(plain, name):
            own = inspect.signature(getattr(type(plain), name))
            assert inspect.signature(getattr(type(model), name)) == own
    for name, module in plain.named_modules():
        assert inspect.signature(model.get_submodule(name).forward) == inspect.signature(module.forward), name


# --- casts and flags ------------------------------------------------------------------------------------------------------

CASTS: dict[str, Callable[[Any], Any]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to float16": lambda m: m.to(torch.float16),
    "to tensor": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    "to device": lambda m: m.to("cpu", torch.float64, non_blocking=True),
}


@pytest.mark.parametrize(("cast", "method"), [*(("half", m) for m in METHODS), *((c, "sara") for c in CASTS if c != "half")])
def test_cast_model_computes_alike_and_trains_on(cast: str, method: str) -> None:
    model = adapted(method)
    expected = logits(model)
    moved = CASTS[cast](model)
    assert moved is model
    (dtype,) = {p.dtype for p in model.parameters()}
    found = logits(model)
    assert found.dtype == dtype != torch.float32
    assert found.isfinite().all()
    close(found.float(), expected, min(dtype, torch.float32, key=lambda d: -torch.finfo(d).eps))
    differ(found.float(), logits(base()))
    model(batch(), labels=batch()).loss.backward()
    for name in trainables(model):
        gradient = model.get_parameter(name).grad
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()
        assert gradient.any(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", FOLDABLE)
def test_cast_model_folds_to_what_it_computes(dtype: torch.dtype, method: str) -> None:
    model = adapted(method).to(dtype)
    merged = sarac.fold(model)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    close(logits(merged), logits(model), dtype)
    assert (logits(model).float() - logits(base())).norm() / logits(base()).norm() > 10 * gate(dtype)


def test_flags_may_be_set_as_on_any_model() -> None:
    model = adapted("sara")
    model.requires_grad_(False)
    assert not trainables(model)
    assert not model(batch()).logits.requires_grad
    model.requires_grad_(True)
    model(batch(), labels=batch()).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None and grad.any() for grad in grads.values())
    layer = sarac.fold(adapted("sara")).requires_grad_(True)
    layer(batch(), labels=batch()).loss.backward()
    name = "model.layers.0.mlp.up_proj.weight"
    close(grads[name], layer.get_parameter(name).grad)


def test_modes_reach_every_layer() -> None:
    model = adapted("sara", gpt2)
    assert model.train().training
    assert all(m.training for m in model.modules())
    torch.manual_seed(1)
    first, second = model(batch()).logits, model(batch()).logits
    differ(first, second)  # dropout
    model.eval()
    assert not any(m.training for m in model.modules())
    same(model(batch()).logits, model(batch()).logits)


# --- functional calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_functional_call_of_a_whole_model(method: str) -> None:
    model, other = adapted(method), shake(adapted(method))
    other.model.layers[0].mlp.up_proj.weight_base.data.mul_(0.5)
    given = {name: p.detach().clone() for name, p in other.named_parameters()}
    assert "model.layers.0.mlp.up_proj.weight" in given
    found = functional_call(model, given, (batch(),)).logits
    with torch.no_grad():  # as the given tensors are: while it trains it takes the same sums in another order
        same(found, other(batch()).logits)
    close(found, other(batch()).logits)
    differ(found, model(batch()).logits)
    part = {"model.layers.0.mlp.up_proj.weight": given["model.layers.0.mlp.up_proj.weight"]}
    differ(functional_call(model, part, (batch(),)).logits, model(batch()).logits)


@pytest.mark.parametrize("method", METHODS)
def test_functional_gradients_are_autograds(method: str) -> None:
    model = adapted(method, dtype=torch.float64)
    given = {name: model.get_parameter(name).detach() for name in trainables(model)}
    found = grad(lambda tensors: functional_call(model, tensors, (batch(),), {"labels": batch()}).loss)(given)
    model(batch(), labels=batch()).loss.backward()
    for name, gradient in found.items():
        close(gradient, model.get_parameter(name).grad)
        assert gradient.any()


@pytest.mark.parametrize(
    "choice",
    [*METHODS.values(), {"method": "mosara", "plan": "rank:4,router=topk:2"}, {"method": "mosara", "plan": "rank:4,router=hard"}],
)
def test_ensembles_and_gradients_by_sample_through_vmap(choice: dict[str, Any]) -> None:
    model, x = shake(sarac.transform(mlp(6, 5, 4), **choice)), torch.randn(3, 6)
    other = shake(copy.deepcopy(model))
    stacked, buffers = stack_module_state([model, other])
    found = vmap(lambda tensors, rest: functional_call(model, (tensors, rest), (x,)))(stacked, buffers)
    close(found, torch.stack([model(x), other(x)]))
    differ(found[0], found[1])
    given = {name: model.get_parameter(name).detach() for name in trainables(model)}
    loss = lambda tensors, row: functional_call(model, tensors, (row[None],)).square().sum()  # noqa: E731
    rows = vmap(grad(loss), in_dims=(None, 0))(given, x)
    model(x).square().sum().backward()
    for name, gradient in rows.items():
        close(gradient.sum(0), model.get_parameter(name).grad)
        differ(gradient[0], gradient[1])


# --- tools that put another weight in its place ---------------------------------------------------------------------------

TOOLS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral_norm": spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "reset_parameters": lambda m: m.reset_parameters(),
    "register_parameter": lambda m: m.register_parameter("weight", nn.Parameter(torch.zeros(5, 6))),
    "del": lambda m: delattr(m, "weight"),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_on_an_adapted_weight_gets_a_sentence_and_breaks_nothing(tool: str) -> None:
    model, x = shake(sarac.transform(mlp(6, 5, 4))), torch.randn(3, 6)
    before, kind, names = model(x), type(model[0]), list(model.state_dict())
    with pytest.raises(WeightError, match=r"0\.weight is adapted.*sarac\.fold"):
        TOOLS[tool](model[0])
    same(model(x), before)
    assert type(model[0]) is kind
    assert list(model.state_dict()) == names
    TOOLS[tool](sarac.fold(model)[0])


def test_capsule_of_an_effective_weight_is_refused() -> None:
    model = shake(sarac.transform(mlp(6, 5, 4)))
    with pytest.raises(RuntimeError):
        torch.utils.dlpack.to_dlpack(model[0].weight)
    assert torch.equal(
        torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(model[0].weight.detach().clone())), model[0].weight + 0
    )


@pytest.mark.parametrize("plan", ["rank:3,train=factors", "rank:3,train=factors,init=random"])
def test_what_trains_may_be_wider_than_a_half_precision_base(plan: str) -> None:
    base, x = mlp(6, 5, 4).bfloat16(), torch.randn(3, 6).bfloat16()
    model = sarac.transform(base, plan)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    same(model(x), base(x))
    shake(model)
    assert model(x).dtype == torch.bfloat16
    assert not torch.equal(model(x), base(x))
    close(sarac.fold(model)(x), model(x), torch.bfloat16)
