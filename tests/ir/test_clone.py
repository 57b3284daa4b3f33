"""The adapted copy: it shares base tensors and nothing else, and computes like its source in every mode."""

import functools
import random
import threading
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from zoo import Own, adapt, close, differ, folded, mlp, outputs, require_untouched, same, shake, snapshot, trainables

from sarac.ir.clone import clone
from sarac.ir.errors import CheckFailed, RewriteError


def normed() -> nn.Sequential:
    """Linear layers around a BatchNorm and a dropout: buffers that training changes, and random numbers."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))


def test_base_tensors_are_shared_and_frozen() -> None:
    model = mlp(6, 5, 4)
    copied = clone(model, frozen=True)
    for (name, ours), theirs in zip(copied.named_parameters(), model.parameters(), strict=True):
        assert ours is not theirs, name
        assert ours.data_ptr() == theirs.data_ptr()
        assert (ours.requires_grad, theirs.requires_grad) == (False, True)


def test_what_trains_gets_storage_of_its_own() -> None:
    model = mlp(6, 5, 4)
    copied = clone(model, frozen=True, own=frozenset(["0.bias"]))
    assert trainables(copied) == {"0.bias"}
    assert copied[0].bias.data_ptr() != model[0].bias.data_ptr()
    assert copied[0].weight.data_ptr() == model[0].weight.data_ptr()
    copied[0].bias.data.zero_()
    assert (model[0].bias != 0).any()


def test_thawed_clone_keeps_flags() -> None:
    model = mlp(6, 5, 4)
    model[0].requires_grad_(False)
    copied = clone(model, frozen=False)
    assert trainables(copied) == {"2.weight", "2.bias"}
    assert copied[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert copied[2].weight.data_ptr() != model[2].weight.data_ptr()


def test_in_place_is_the_module_itself() -> None:
    model = mlp(6, 5)
    assert clone(model, frozen=True, own=frozenset(["0.bias"]), inplace=True) is model
    assert trainables(model) == {"0.bias"}


def test_ties_and_attributes_of_parameters_survive() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].weight.tag = "decay"
    copied = clone(model, frozen=True)
    assert copied[0].weight is copied[1].weight
    assert copied[0].weight.tag == "decay"
    adapted = adapt(model, where="0.weight")
    assert adapted[0].weight_base is adapted[1].weight_base
    assert folded(adapted)[0].weight.tag == "decay"


@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_and_dropout_act_as_in_the_source(training: bool) -> None:
    model, x = normed().train(training), torch.randn(9, 6)
    copied = adapt(model)
    assert copied.training is training
    for mode in (True, False):
        twin = normed()
        twin.load_state_dict(model.state_dict())
        same(outputs(copied.train(mode), x), outputs(twin.train(mode), x))
        copied.load_state_dict(model.state_dict(), strict=False)
    differ(outputs(copied.train(), x), outputs(copied.eval(), x))


def test_training_the_copy_leaves_the_source_alone() -> None:
    model, x = normed().train(), torch.randn(9, 6)
    before = snapshot(model)
    copied = adapt(model, also_train=["*.bias", "1.weight"])
    assert trainables(copied) == {"0.sara_shift", "3.sara_shift", "0.bias", "1.weight", "1.bias", "3.bias"}
    optimiser = torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.1)
    start = outputs(clone(copied, frozen=True).eval(), x)
    for _ in range(3):
        optimiser.zero_grad()
        copied(x).square().sum().backward()
        optimiser.step()
    differ(outputs(copied.eval(), x), start)
    differ(copied[1].running_mean, model[1].running_mean)
    require_untouched(model, before)
    merged = folded(copied)
    close(outputs(merged, x), outputs(copied, x))
    require_untouched(model, before)
    assert merged[0].bias.equal(copied[0].bias)
    assert not merged[0].bias.equal(model[0].bias)


def test_gradients_never_reach_the_source() -> None:
    model = mlp(6, 5, 4)
    adapt(model)(torch.randn(3, 6)).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.randn(3, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Masked(nn.Module):
    """An optional mask, on a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        y = x @ self.w * scale
        return y if mask is None else y.masked_fill(mask, 0.0)


class NeedsMask(Masked):
    """The same, where the caller must give the mask or None."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().forward(x, mask)


@pytest.mark.parametrize("kind", [Masked, NeedsMask])
def test_mask_may_be_there_or_not(kind: type[Masked]) -> None:
    model, x = kind(), torch.randn(3, 6)
    copied = adapt(model)
    masks = (None, x > 0, None, x > 9)
    for mask in masks:
        same(copied(x, mask), model(x, mask))
    shake(copied)
    for mask in masks:
        close(copied(x, mask), folded(copied, checked=False)(x, mask))
        assert mask is None or not mask.any() or not torch.equal(copied(x, mask), copied(x, None))


def test_other_optional_arguments_keep_their_effect() -> None:
    model, x = Masked(), torch.randn(3, 6)
    copied = shake(adapt(model))
    close(copied(x, scale=3.0), copied(x) * 3)


class Changeable(nn.Module):
    """A forward that depends on attributes of its own, on its child's, and on a method."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))
        self.scale, self.on, self.act = 1.5, True, torch.relu
        self.norm, self.drop = nn.LayerNorm(6), nn.Dropout(0.5)

    def shift(self, y: Tensor) -> Tensor:
        return y + 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.shift(x @ self.w))
        y = F.dropout(y, self.drop.p, self.drop.training)
        y = F.layer_norm(y, (6,), eps=self.norm.eps)
        return y * self.scale if self.on else y


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "number": lambda m: setattr(m, "scale", 3.0),
    "flag": lambda m: setattr(m, "on", False),
    "function": lambda m: setattr(m, "act", torch.tanh),
    "childs_number": lambda m: setattr(m.norm, "eps", 1.0),
    "childs_mode": lambda m: m.drop.train(),
    "mode": lambda m: m.train(),
    "method": lambda m: setattr(m, "shift", types.MethodType(lambda self, y: y - 1, m)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_attribute_changes_the_copy_too(change: Callable[[nn.Module], None]) -> None:
    model, x = Changeable().eval(), torch.randn(3, 6)
    copied = adapt(model)
    before = outputs(copied, x)
    same(before, outputs(model, x))
    change(model)
    change(copied)
    same(outputs(copied, x), outputs(model, x))
    assert not torch.equal(outputs(copied, x), before)
    shake(copied)
    close(outputs(folded(copied, checked=False), x), outputs(copied, x))


class Moody(nn.Module):
    """A forward that takes another way by things that a trace cannot see."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.w, self.way = nn.Parameter(torch.randn(6, 6)), way

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w
        if self.way == "isinstance":
            return y * 2 if isinstance(x, Tensor) else y
        if self.way == "grad":
            return y * 2 if torch.is_grad_enabled() else y
        if self.way == "python":
            return y * random.random()
        return y * torch.rand(()).item() if self.way == "item" else y


@pytest.mark.parametrize("way", ["isinstance", "grad", "item", "python", "none of them"])
def test_branches_that_a_trace_cannot_see_are_never_frozen_in_silence(way: str) -> None:
    model, x = Moody(way), torch.randn(3, 6)
    found = []
    try:
        copied = adapt(model)
    except CheckFailed:
        assert way != "none of them"
        return
    for each in (copied, model):
        random.seed(7)
        found.append(outputs(each, x))
        torch.manual_seed(7)
        found.append(each(x))
        found.append(each(x))
    same(found[:3], found[3:])


# Buffers, loose tensors, replaced forwards.


def test_buffers_are_copies() -> None:
    model = normed()
    copied = adapt(model)
    for (name, ours), theirs in zip(copied.named_buffers(), model.buffers(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr(), name


class Counter(nn.Module):
    """A buffer that every call changes, in eval mode too, and a log beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.log = nn.Parameter(torch.randn(6, 6)), []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x @ self.w


class Logger(Counter):
    """A plain list that every call appends to."""

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(x.shape)
        return x @ self.w


@pytest.mark.parametrize("kind", [Counter, Logger])
def test_looking_at_a_model_does_not_call_it(kind: type[Counter]) -> None:
    model = kind()
    copied = adapt(model)
    assert (float(model.calls), model.log) == (0.0, [])
    assert (float(copied.calls), copied.log) == (0.0, [])
    copied(torch.randn(3, 6))
    assert (float(copied.calls), len(copied.log)) in ((1.0, 0), (0.0, 1))
    assert (float(model.calls), model.log) == (0.0, [])


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t], lambda t: {"k": (t,)}])
def test_tensors_with_a_history_are_cloned(wrap: Callable[[Tensor], object]) -> None:
    model = nn.Linear(6, 5)
    model.cached = wrap(model.weight * 2)
    copied = adapt(model)
    ours, theirs = (torch.utils._pytree.tree_leaves(m.cached)[0] for m in (copied, model))
    assert torch.equal(ours, theirs)
    assert ours.data_ptr() != theirs.data_ptr()
    assert not ours.requires_grad


def test_what_cannot_be_copied_is_told() -> None:
    model = nn.Linear(6, 5)
    model.lock = threading.Lock()
    with pytest.raises(RewriteError, match=r"Linear cannot be copied .*_thread\.lock.* inplace=True"):
        adapt(model)


def test_bound_forward_follows_the_copy() -> None:
    model, x = nn.Linear(6, 5), torch.randn(3, 6)
    model.forward = types.MethodType(lambda self, x: F.linear(x, self.weight) * 2, model)
    copied = adapt(model)
    same(copied(x), model(x))
    shake(copied)
    close(copied(x), F.linear(x, copied.weight) * 2)
    differ(copied(x), model(x))
    close(folded(copied)(x), copied(x))


def test_accelerate_hooks_follow_the_copy() -> None:
    class Double(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    model, x = mlp(6, 5, 4), torch.randn(3, 6)
    plain = model(x)
    add_hook_to_module(model[2], Double())
    copied = adapt(model)
    same(copied(x), model(x))
    close(model(x), plain * 2)
    shake(copied)
    differ(copied(x), model(x))
    close(folded(copied)(x), copied(x))


def closed(model: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, model.weight)


def closed_bound(model: nn.Linear) -> Callable[[Tensor], Tensor]:
    old = model.forward
    return lambda x: old(x) * 2


def closed_partial(model: nn.Linear) -> Callable[[Tensor], Tensor]:
    return functools.partial(lambda x, scale: F.linear(x, model.weight) * scale, scale=2)


def closed_container(model: nn.Linear) -> Callable[[Tensor], Tensor]:
    models = {"one": [model]}
    return lambda x: F.linear(x, models["one"][0].weight)


def closed_default(model: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor, *, model: nn.Linear = model) -> Tensor:
        return F.linear(x, model.weight)

    return forward


@pytest.mark.parametrize("close_over", [closed, closed_bound, closed_partial, closed_container, closed_default])
def test_forward_that_closes_over_the_source_is_refused(close_over: Callable[[nn.Linear], Callable[[Tensor], Tensor]]) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    model[0].forward = close_over(model[0])
    with pytest.raises(RewriteError, match=r"forward of a Linear was replaced .* inplace=True"):
        adapt(model, where="*")


def test_forward_that_closes_over_nothing_is_kept() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    model[0].forward = lambda x: x * 2
    same(adapt(model, where="*", checked=False)(x), x * 2)


def test_hooks_of_the_source_stay_on_the_source() -> None:
    model, x = mlp(6, 5, 4), torch.randn(3, 6)
    handle = model[0].register_forward_hook(lambda module, args, output: output * 2)
    copied = adapt(model)
    same(copied(x), model(x))
    handle.remove()
    assert not torch.equal(copied(x), model(x))


def test_own_parameters_in_both_modes() -> None:
    model, x = Own("at", 5, 6).train(), torch.randn(8, 6)
    copied = adapt(model)
    for mode in (True, False, True):
        same(outputs(copied.train(mode), x), outputs(model.train(mode), x))
    differ(outputs(copied.train(), x), outputs(copied.eval(), x))
