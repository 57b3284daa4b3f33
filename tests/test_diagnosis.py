"""Diagnosis and Monitor: healthy models have no finding, every planted fault its own, and looking changes nothing."""

import itertools
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from user.methods import METHODS, adapted, base, fresh
from user.methods import batch as tokens
from user.test_trainer import trainer
from zoo import CALLS, Own, Shared, TiedHead, close, ids, mlp, require_untouched, shake, snapshot

import sarac
from sarac import faults
from sarac.diagnosis import Diagnosis
from sarac.findings import Setting, findings
from sarac.ir.gates import slots
from sarac.unclipped import Unclipped

Model = Any


def words(rows: int = 12) -> dict[str, Tensor]:
    found = tokens(rows)
    return {"input_ids": found, "labels": found}


def names(found: Diagnosis) -> list[str]:
    return [one.name for one in found.findings]


def square(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


def trained(model: Model, steps: int = 12, **inputs: Tensor) -> Model:
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=sarac.recommended_lr(model))
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# A random router leaves some of many sets without tokens, which a finding then says.
ROUTERS = {
    router: {"plan": f"threshold:0.6,sets=2,router={router}", "method": "mosara"} for router in ("topk:1", "hard", "uniform")
}
HEALTHY: dict[str, dict[str, Any]] = {**METHODS, **ROUTERS, "random": {"plan": "rank:3,train=factors,init=random"}}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_model_has_no_finding(name: str) -> None:
    model = sarac.transform(base(), **HEALTHY[name])
    assert names(sarac.diagnose(model, words())) == []
    assert names(sarac.diagnose(trained(model, **words()), words())) == []
    found = sarac.diagnose(shake(model), words())
    assert names(found) == []
    assert "Nothing was found" in str(found)


def plain(plan: str = "rank:8", *widths: int, method: str = "sara", dtype: torch.dtype = torch.float32) -> Model:
    return shake(sarac.transform(mlp(*(widths or (24, 20, 16))).to(dtype), plan, method=method))


def shift(model: Model, index: int = 0) -> Tensor:
    module, slot = list(slots(model))[index]
    return slot.tensors(module)["shift"].data


def nan(model: Model) -> None:
    shift(model)[1] = math.nan


def other(model: Model) -> None:
    for one in (model[0], model[2]):
        nn.init.normal_(one._parameters["weight"], std=0.2)


def scaled(model: Model) -> None:
    next(slots(model))[0].sara_scale.mul_(3.0)


def still(model: Model) -> None:
    shift(model)[2:] = 0.0


def far(model: Model) -> None:
    shift(model)[:4] = -1.5


def grown(model: Model) -> None:
    next(slots(model))[0].sara_u.data.mul_(40.0)


def unmoved(model: Model) -> None:
    for index in (0, 1):
        shift(model, index).mul_(1e-4)


def small(model: Model) -> None:
    for index in (0, 1):
        shift(model, index).mul_(2e-3)


def stuck(model: Model) -> None:
    shift(model).zero_()


def frozen(model: Model) -> None:
    next(slots(model))[0].sara_shift.requires_grad_(False)


def unseen(model: Model) -> None:
    model[1] = nn.Threshold(math.inf, 0.5)  # in place of the activation: the loss depends on what follows alone


def floor(model: Model) -> Model:
    linear = nn.Linear(20, 16)
    linear.weight.data = torch.randn(16, 4) @ torch.randn(4, 20)
    return shake(sarac.transform(nn.Sequential(linear), "rank:6"))


PLANTED: dict[str, tuple[Callable[[], Model], Callable[[Model], Any], str, str]] = {
    # the sound model, what is planted, the finding's kind, what its sentence says
    "not finite": (plain, nan, "0.weight", r"\(1 site\): δ holds NaN or Inf\. Go back .* gradients of 1 more follow"),
    "foreign": (plain, other, "0.weight", r"\(2 sites\): U, s and V are not singular .*off by up to \d+%"),
    "scale": (lambda: plain("rank:4,train=factors"), scaled, "0.weight", r"is up to \d\d?\.?\d* times all of the weight's"),
    "floored": (lambda: plain("rank:4"), floor, "0.weight", r"up to 2 of the k directions"),
    "full rank": (plain, lambda _: plain("threshold:1.0"), "0.weight", r"k is up to 100% .* forgotten\. Where the task alone"),
    "low rank": (plain, lambda _: plain("rank:1", 96, 96), "0.weight", r"as little as \d\.\d% of Σ s²"),
    "still": (plain, still, "0.weight", r"up to 75% of the shifts did not move"),
    "far": (plain, far, "0.weight", r"up to 50% of the directions are turned round .* was above the recommended 0\.01, lower it"),
    "start": (
        lambda: sarac.transform(mlp(24, 20, 16), "rank:4,train=factors,init=random"),
        grown,
        "0.weight",
        r"up to [345]\d(\.\d)? long before",
    ),
    "swamped": (lambda: plain("rank:4,train=factors"), grown, "0.weight", r"up to \d\d(\.\d)? times as large as its weight"),
    "unmoved": (plain, unmoved, "0.weight", r"beyond \d\.\de-05, .* recommended rate 0\.01"),
    "rounded": (lambda: plain(dtype=torch.bfloat16), small, "0.weight", r"merged into bfloat16, up to \d\d% .* float32"),
    "coarse": (
        lambda: plain(dtype=torch.bfloat16),
        nn.Module.bfloat16,
        "0.weight",
        r"\(δ\) is bfloat16, .* under 0\.20%",
    ),
    "stuck": (plain, stuck, "0.weight", r"beyond 0\.0e\+00 while other weights' reach 0\.\d+"),
    "frozen": (plain, frozen, "0.weight", r"requires_grad is False for what the plan trains \(δ\)"),
    "vanishing": (plain, unseen, "0.weight", r"hardly a gradient arrives \(norm 0\.0e\+00\)"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found_and_no_other(fault: str) -> None:
    make, plant, kind, said = PLANTED[fault]
    model = make()
    x = torch.randn(64, 24, dtype=next(model.parameters()).dtype)
    assert names(sarac.diagnose(model, x, loss=square)) == []
    model = plant(model) or model
    x = torch.randn(64, next(slots(model))[0].in_features, dtype=x.dtype)
    found = sarac.diagnose(model, x, loss=square)
    assert names(found) == [fault]
    assert kind in found.findings[0].sites
    assert kind in found.findings[0].text
    assert re.search(said, found.findings[0].text), found.findings[0].text
    assert found.findings[0].text in " ".join(str(found).split()) or fault in found.to_json()


PARTS: list[tuple[str, str, tuple[str, ...], str]] = [
    # a plan, its method, the roles that do not train, how they are called
    ("rank:5,sets=4", "mosara", ("router",), "the router"),
    ("rank:5,sets=4,bottleneck=2", "mosara", ("router", "router_in"), "the router, the router's bottleneck"),
    ("rank:5,sets=4", "mosara", ("shift",), "δ"),
    ("rank:5,train=factors", "sara", ("u", "v"), "U, V"),
    ("rank:5,train=factors", "sara", ("shift",), "δ"),
]


@pytest.mark.parametrize(("plan", "method", "roles", "said"), PARTS)
def test_frozen_part_is_named(plan: str, method: str, roles: tuple[str, ...], said: str) -> None:
    model = plain(plan, 12, 10, method=method)
    assert names(sarac.diagnose(model, facing(), loss=square)) == []
    module, slot = next(slots(model))
    for role in roles:
        slot.tensors(module)[role].requires_grad_(False)
    (found,) = sarac.diagnose(model, facing(), loss=square).findings
    assert (found.name, found.value, found.sites) == ("frozen", float(len(roles)), ("0.weight",))
    assert f"({said})" in found.text


def test_router_that_another_site_has_is_not_judged_where_it_is_borrowed() -> None:
    model = shake(sarac.transform(base(), "threshold:0.6,sets=2,router_scope=group", method="mosara", example_inputs=words()))
    assert names(sarac.diagnose(model, words())) == []
    for module, slot in slots(model):
        if "router" in slot.adapter.trainable:
            slot.tensors(module)["router"].requires_grad_(False)
    (found,) = sarac.diagnose(model, words()).findings
    owners = {slot.site for _, slot in slots(model) if "router" in slot.adapter.trainable}
    assert 0 < len(owners) < len(list(slots(model)))
    assert (found.name, f"({len(owners)} sites)" in found.text) == ("frozen", True)


@pytest.mark.parametrize(("plan", "method", "roles", "said"), PARTS)
def test_part_that_the_optimiser_lacks_is_named(plan: str, method: str, roles: tuple[str, ...], said: str) -> None:
    model, x = plain(plan, 12, 10, method=method), facing()
    module, slot = next(slots(model))
    lacking = {id(slot.tensors(module)[role]) for role in roles}
    whole = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    part = torch.optim.Adam([p for p in model.parameters() if p.requires_grad and id(p) not in lacking], lr=1e-2)
    rest = torch.optim.Adam([p for p in model.parameters() if id(p) in lacking], lr=1e-2)
    other = torch.optim.Adam(nn.Linear(3, 3).parameters())  # knows nothing of adapters: nor does the Monitor of theirs
    monitor = sarac.Monitor(every=1, batch=x)
    square(model(x)).backward()
    for step, sound in enumerate((whole, [part, rest], None, other)):
        assert names(monitor.step(model, step, optimizer=sound)) == []  # type: ignore[arg-type]
    with pytest.warns(sarac.SaracWarning, match="left out"):
        found = monitor.step(model, 4, optimizer=part)
    assert found is not None
    assert [(one.name, one.sites) for one in found.findings] == [("left out", ("0.weight",))]
    assert f"lacks what the plan trains here ({said})" in found.findings[0].text
    assert names(monitor.finish(model, 5)) == ["left out"]


def test_trainer_whose_optimiser_lacks_a_part(tmp_path: Path) -> None:
    model = fresh("mosara")
    run = trainer(model, tmp_path, save_strategy="no", max_steps=2)
    given = [one for name, one in model.named_parameters() if one.requires_grad and "router" not in name]
    run.optimizer = torch.optim.Adam(given, lr=1e-2)
    run.add_callback(sarac.Monitor(every=1))
    with pytest.warns(sarac.SaracWarning, match=r"At step 0, left out: .*\(the router\)"):
        run.train()


@pytest.mark.parametrize(
    ("plan", "method", "roles"),
    [("rank:5,train=factors", "sara", "U, δ, V"), ("rank:5,sets=4", "mosara", "δ, the router")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_trains_in_half_of_float32_is_named(plan: str, method: str, roles: str, dtype: torch.dtype) -> None:
    model = plain(plan, 12, 10, method=method)
    before = sarac.diagnose(model, facing(), loss=square)
    assert (names(before), before.sites[0].dtypes) == ([], ("float32",) * len(before.sites[0].trains))
    model.to(dtype)
    (found,) = sarac.diagnose(model, facing().to(dtype), loss=square).findings
    assert (found.name, found.value) == ("coarse", torch.finfo(dtype).eps / 4.0)
    assert f"({roles}) is {str(dtype)[6:]}" in found.text
    for parameter in model.parameters():  # as its sentence says
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    assert "coarse" not in names(sarac.diagnose(model, facing().to(dtype), loss=square))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (square, []),
        (lambda y: 1e7 * y.square().sum(), ["exploding"]),
        (lambda y: square(y) * math.nan, ["not finite"]),
    ],
)
def test_gradients_that_explode(loss: Callable[[Tensor], Tensor], expected: list[str]) -> None:
    assert names(sarac.diagnose(plain(), torch.randn(64, 24), loss=loss)) == expected


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 10), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


def test_weight_that_the_loss_does_not_see() -> None:
    model, x = shake(sarac.transform(Heads(), "rank:4")), torch.randn(9, 12)
    assert names(sarac.diagnose(model, x, loss=lambda out: square(out[0] + out[1]))) == []
    found = sarac.diagnose(model, x, loss=lambda out: square(out[0]))
    assert [(one.name, one.sites) for one in found.findings] == [("vanishing", ("two.weight",))]
    assert found.rows()[1]["kept"] > 0  # it was called


def test_memory_is_told_beyond_what_there_is() -> None:
    model, x = plain(), torch.randn(32, 24)
    sarac.schedule(model, "two-sided")
    found = sarac.diagnose(model, x, loss=square)
    need = found.totals["factors"] + found.totals["kept"]
    assert found.totals["factors"] == 4 * 8 * (24 + 20 + 1 + 20 + 16 + 1)
    assert found.totals["kept"] == 4 * 32 * (8 + 8)  # tokens x k, as sarac.schedule has it
    assert names(sarac.diagnose(model, x, loss=square, memory=need)) == []
    tight = sarac.diagnose(model, x, loss=square, memory=need - 1)
    assert names(tight) == ["memory"]
    assert "lower the threshold" in tight.findings[0].text
    wide = sarac.diagnose(model, torch.randn(900, 24), loss=square, memory=need)
    assert "gradient checkpointing or fewer tokens" in wide.findings[0].text
    sarac.schedule(model, "materialised")
    assert 'sarac.schedule(model, "right")' in sarac.diagnose(model, x, loss=square, memory=1).findings[0].text


DIRECTION = torch.randn(12, generator=torch.Generator().manual_seed(0))


def facing(rows: int = 80) -> Tensor:
    """Inputs that all have something of one direction, and something of their own."""
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(rows, 12, generator=generator)
    return DIRECTION + 0.5 * (own - own @ DIRECTION[:, None] * DIRECTION / DIRECTION.square().sum())


def towards(model: Model, row: int, size: float) -> None:
    module, slot = next(slots(model))
    tensors = slot.tensors(module)
    seen = tensors["v"] @ DIRECTION
    tensors["router"].data[row] = size * seen / seen.square().sum()


def alike(model: Model) -> None:
    shift(model)[:] = shift(model)[0].clone()


def router_of(model: Model) -> dict[str, Tensor]:
    module, slot = next(slots(model))
    return {role: tensor.data for role, tensor in slot.tensors(module).items() if role.startswith("router")}


def zero(model: Model) -> None:
    for tensor in router_of(model).values():
        tensor.zero_()


def half_dead(model: Model) -> None:
    for row in (2, 3):
        towards(model, row, -40.0)


ROUTING: dict[str, tuple[str, Callable[[Model], None], str]] = {
    "collapsed": ("", lambda model: towards(model, 2, 40.0), r"one set up to \d+\.\d% of all gates"),
    "dead sets": ("", half_dead, r"up to 2 sets, half of a weight's or more, get none"),
    "alike": ("", alike, r"cosine of up to 1\.0000, .* sets=1 does the same for less"),
    "idle router": (",bottleneck=2", zero, r"entropy 1\.0000 of log\(sets\)"),
    "blind router": ("", zero, r"the same whatever the input"),
}


@pytest.mark.parametrize("fault", ROUTING)
def test_planted_fault_of_a_router_is_found_and_no_other(fault: str) -> None:
    options, plant, said = ROUTING[fault]
    model = shake(sarac.transform(nn.Sequential(nn.Linear(12, 10)), f"rank:5,sets=4{options}", method="mosara"))
    for tensor in router_of(model).values():
        tensor *= 0.3
    assert names(sarac.diagnose(model, facing(), loss=square)) == []
    plant(model)
    assert names(sarac.diagnose(model, facing(20), loss=square)) == []  # too few tokens to tell
    found = sarac.diagnose(model, facing(), loss=square)
    assert names(found) == [fault]
    assert re.search(said, found.findings[0].text), found.findings[0].text


def test_no_sentence_sends_to_the_hard_router() -> None:
    rules = [one for group in vars(faults).values() if isinstance(group, tuple) for one in group if isinstance(one, faults.Rule)]
    assert len(rules) >= 10
    assert [one.name for one in rules if "router=hard" in one.text] == []
    # What one finding recommends is not what another one is of.
    routers = [one.text for one in faults.ROUTER]
    assert [text for text in routers if re.search(r"router=(soft|topk|hard)|also soft", text)] == []


def test_untrained_router_is_no_fault() -> None:
    """Before the shifts move the router has no gradient, and soon after sets are alike: neither says anything."""
    model = sarac.transform(nn.Sequential(nn.Linear(12, 10)), "rank:5,sets=4", method="mosara")
    zero(model)
    assert names(sarac.diagnose(model, facing(), loss=square)) == []
    for size in (0.01, 0.05, 0.09):
        shift(model)[:] = size
        assert names(sarac.diagnose(model, facing(), loss=square)) == []
    shift(model)[:] = 0.11
    assert names(sarac.diagnose(model, facing(), loss=square)) == ["alike"]


@pytest.mark.parametrize(
    ("use", "likeness", "name"),
    [
        ((0.4, 0.3, 0.3, 0.0, 0.0), 0.5, ""),
        ((0.6, 0.4, 0.0, 0.0, 0.0), 0.5, "dead sets"),
        ((0.6, 0.4, 1e-5, 1e-5, 1e-5), 0.5, "dead sets"),
        ((0.6, 0.34, 0.02, 0.02, 0.02), 0.5, ""),
        ((0.996, 0.001, 0.001, 0.001, 0.001), 0.5, "collapsed"),
        ((0.2,) * 5, 0.9995, "alike"),
        ((0.2,) * 5, 0.995, ""),
    ],
)
def test_young_router_is_not_judged(use: tuple[float, ...], likeness: float, name: str) -> None:
    """Random ones leave sets without tokens, and sets start out alike: after ten steps at the recommended rate that is told."""
    (one, *_) = sarac.diagnose(adapted("mosara"), words()).sites
    assert one.gates is not None
    seen = replace(one, gates=replace(one.gates, use=use), likeness=likeness)
    for moved in (0.03, 0.09):
        assert findings([replace(seen, moved=moved)], Setting()) == ()
    assert [found.name for found in findings([replace(seen, moved=0.11)], Setting())] == ([name] if name else [])


def test_set_without_tokens_here_and_there_is_no_fault() -> None:
    model = shake(sarac.transform(nn.Sequential(nn.Linear(12, 10)), "rank:5,sets=4", method="mosara"))
    for tensor in router_of(model).values():
        tensor *= 0.3
    towards(model, 2, -40.0)
    found = sarac.diagnose(model, facing(), loss=square)
    assert names(found) == []
    assert found.sites[0].gates is not None
    assert found.sites[0].gates.use[2] < 1e-3


class Normed(nn.Module):
    """What a forward in training mode moves: running statistics, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_looking_changes_nothing(training: bool, copied: bool) -> None:
    model = shake(sarac.transform(Normed(), "rank:4", method="mosara")).train(training)
    if not copied:  # a forward that cannot be copied
        inner = model.body.forward
        model.body.forward = lambda x: inner(x)
    x = torch.randn(9, 12)
    square(model(x)).backward()
    before, grads = snapshot(model), {name: one.grad for name, one in model.named_parameters()}
    values = {name: None if one is None else one.clone() for name, one in grads.items()}
    state = torch.get_rng_state()
    found = sarac.diagnose(model, x, loss=square)
    assert found.sites[0].gates is not None
    assert (found.sites[0].lost is None) == (not copied)  # folding works on a copy
    require_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    for name, one in model.named_parameters():
        assert one.grad is grads[name]
        assert one.grad is None or torch.equal(one.grad, values[name])  # type: ignore[arg-type]
    square(model(x)).backward()  # as it would have been
    if training:
        with pytest.raises(AssertionError):
            require_untouched(model, before)  # it is no model that nothing changes


@pytest.mark.parametrize("method", METHODS)
def test_figures_are_those_of_a_backward_and_of_a_fold(method: str) -> None:
    model = adapted(method, dtype=torch.float64)
    found = sarac.diagnose(model, words())
    loss = model(**words()).loss
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    assert found.tokens == 72
    for (module, slot), one in zip(slots(model), found.sites, strict=True):
        own = [slot.tensors(module)[role].grad for role in slot.adapter.trainable]
        norm = torch.cat([grad.reshape(-1) for grad in own if grad is not None]).norm()
        assert one.grad == pytest.approx(float(norm), rel=1e-9)
        assert one.grad != pytest.approx(2.0 * float(norm), rel=1e-3)
    given: Any = {"routing": "mean", "calibration": [words()]} if method == "mosara" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sarac.SaracWarning)  # of the mean gates
        _, report = sarac.fold(model, report=True, **given)
    assert {one.site: one.lost for one in found.sites} == pytest.approx(
        {site: one.surviving_delta for site, one in report.sites.items()}, rel=1e-6
    )
    if method != "mosara":
        deltas = {site: one.relative_delta for site, one in report.sites.items()}
        assert {one.site: one.delta for one in found.sites} == pytest.approx(deltas, rel=1e-6)
    assert {one.site: one.kept for one in found.sites} == {one.site: one.kept for one in sarac.schedule(model, tokens=72).sites}


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "a stack": (lambda: nn.Sequential(encoder()), lambda: torch.randn(3, 5, 8), {}),
    "a sliced weight": (lambda: Own("sliced", 6, 8), lambda: torch.randn(3, 8), {}),
    "a weight from the left": (lambda: Own("left", 6, 8), lambda: torch.randn(3, 8), {}),
    "a convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), lambda: torch.randn(2, 3, 6, 6), {}),
    "a tied embedding": (lambda: TiedHead(8), ids, {"where": "*embed*"}),
    "one weight for two modules": (lambda: Shared(8), lambda: torch.randn(3, 8), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_weight(form: str) -> None:
    make, inputs, options = FORMS[form]
    model = shake(sarac.transform(make(), "rank:2", **options))
    found = sarac.diagnose(model, (inputs(),), loss=square)
    assert names(found) == []
    assert {one.site for one in found.sites} == {slot.site for _, slot in slots(model)}
    assert all(one.grad and one.delta and one.lost is not None and one.kept for one in found.sites)
    stacks = {one.site: one for one in found.sites if len(one.shape) == 3}
    assert all(one.kept == one.base for one in stacks.values())  # its effective weight
    assert CALLS["sliced"].form == "weight"
    if form == "a sliced weight":
        assert found.sites[0].kept == found.sites[0].base
    if form == "a convolution":
        assert found.tokens == 2 * 4 * 4
        assert found.sites[0].kept == 4 * found.tokens * 2


@pytest.mark.parametrize("method", METHODS)
def test_autocast_and_compiled_models(method: str) -> None:
    model = adapted(method)
    plainly = sarac.diagnose(model, words())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sarac.diagnose(model, words())
    assert found.loss != plainly.loss
    assert found.loss == pytest.approx(plainly.loss, rel=2e-2)
    unrouted = [one.delta for one in found.sites if one.gates is None]
    assert unrouted == [one.delta for one in plainly.sites if one.gates is None]
    assert sarac.diagnose(torch.compile(model), words()).to_json() == plainly.to_json()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(12, 12), nn.Linear(12, 8), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.second, self.first(x), use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def test_checkpointing_is_seen_through() -> None:
    model = fresh("mosara")
    before = sarac.diagnose(shake(model), words())
    model.activation_checkpointing_enable()
    model.train()
    assert sarac.diagnose(model, words()).to_json() == before.to_json()
    ways = {way: sarac.transform(Checkpointed(way), "rank:3", method="mosara") for way in (False, True)}
    assert names(sarac.diagnose(ways[False], torch.randn(9, 12), loss=square)) == []
    with pytest.raises(sarac.InputError, match="use_reentrant=False"):
        sarac.diagnose(ways[True], torch.randn(9, 12), loss=square)


def test_what_cannot_be_diagnosed_is_a_sentence() -> None:
    model, x = plain(), torch.randn(9, 24)
    with pytest.raises(sarac.RewriteError, match="carries no adapters"):
        sarac.diagnose(mlp(4, 3), x)
    with pytest.raises(sarac.InputError, match=r"gives a tensor of shape \(9, 16\) and no scalar loss .* give loss="):
        sarac.diagnose(model, x)
    with pytest.raises(sarac.InputError, match="put labels into the batch"):
        sarac.diagnose(fresh("sara"), {"input_ids": tokens()})
    with sarac.disabled(model), pytest.raises(sarac.RewriteError, match="switched off here"):
        sarac.diagnose(model, x, loss=square)


def test_diagnosis_shows_itself(tmp_path: Path) -> None:
    found = sarac.diagnose(adapted("mosara"), words())
    document = json.loads(found.to_json())
    assert document["sites"] == found.rows()
    assert document["totals"] == found.totals
    row = document["sites"][0]
    assert len(row["use"]) == 5
    assert row["kind"] == "model.layers.*.self_attn.q_proj.weight"
    assert row["delta"] == found.sites[0].delta
    text = str(found)
    assert "LlamaForCausalLM: 14 adapted weights, 72 tokens, loss" in text
    assert "entropy" in text
    assert "entropy" not in str(sarac.diagnose(adapted("sara"), words()))
    assert found.table(by_site=True).row_count == 14 > found.table().row_count
    found.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 1000
    with pytest.raises(sarac.CheckpointError, match="cannot be written"):
        found.plot(tmp_path / "nowhere" / "layers.png")
    broken = adapted("sara")
    nan(broken)
    assert json.loads(sarac.diagnose(broken, words()).to_json())["sites"][0]["delta"] is None


def test_rules_know_how_training_goes() -> None:
    sites = sarac.diagnose(fresh("sara"), words()).sites
    assert findings(sites, Setting()) == ()
    assert findings(sites, Setting(steps=5)) == ()  # of a warm-up
    (found,) = findings(sites, Setting(steps=10))
    assert (found.name, "all parameters that require gradients" in found.text) == ("unmoved", True)
    (found,) = findings(sites, Setting(steps=10, rate=5e-5))
    assert "the optimiser's is 5e-05. Give it sarac.recommended_lr(model)" in found.text
    assert [one.name for one in findings(sites, Setting(norm=1e4))] == ["exploding"]
    assert findings(sites, Setting(norm=10.0)) == ()


def monitored(model: Model, folder: Path, monitor: sarac.Monitor, **options: Any) -> transformers.Trainer:
    run = trainer(model, folder, **{"save_strategy": "no", "max_steps": 6, **options})
    run.add_callback(monitor)
    run.train()
    return run


@pytest.mark.parametrize("method", METHODS)
def test_monitor_records_a_training_run(tmp_path: Path, method: str) -> None:
    monitor = sarac.Monitor(every=2, file=tmp_path / "log.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("error", sarac.SaracWarning)
        run = monitored(fresh(method), tmp_path, monitor)
    model = run.model
    assert [one.step for one in monitor.history] == [0, 2, 4, 6]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == json.loads(monitor.to_json())["records"]
    moved = [sum(one.moved for one in record.sites) for record in monitor.history]
    assert moved[0] == 0.0 < moved[1] < moved[2] < moved[3]
    assert all(one.grad for record in monitor.history[:3] for one in record.sites)
    assert all(one.grad is None for one in monitor.history[-1].sites)
    assert all((one.gates is not None) == (method == "mosara") for record in monitor.history[:3] for one in record.sites)
    assert {one.tokens for one in monitor.history[0].sites} == {2 * 6}
    assert [one.lost is None for one in monitor.history[2].sites] == [True] * 14
    last = sarac.diagnose(model, words())
    assert [one.moved for one in monitor.history[-1].sites] == [one.moved for one in last.sites]
    if method != "mosara":
        assert [one.lost for one in monitor.history[-1].sites] == [one.lost for one in last.sites]
    monitor.plot(tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 1000
    assert "at step 6" in str(monitor)
    assert not any(module._forward_hooks for module in model.modules())


def test_monitor_does_not_change_training(tmp_path: Path) -> None:
    plainly, watched, other = fresh("mosara"), fresh("mosara"), fresh("mosara")
    trainer(plainly, tmp_path, save_strategy="no").train()
    monitored(watched, tmp_path, sarac.Monitor(every=3, batch=words()), max_steps=4)
    monitored(other, tmp_path, sarac.Monitor(every=3), max_steps=4)  # routed calls as their formula stands: other last bits
    state = plainly.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in watched.state_dict().items())
    close(shift(other), shift(plainly))
    assert not torch.equal(shift(watched), shift(fresh("mosara")))


def test_monitor_sees_the_gradients_before_the_optimiser_does(tmp_path: Path) -> None:
    monitor, model = sarac.Monitor(every=1), fresh("sara")
    monitored(model, tmp_path, monitor, max_steps=1, max_grad_norm=1e-3, gradient_accumulation_steps=2)
    norm = math.hypot(*(one.grad or 0.0 for one in monitor.history[0].sites))
    assert norm == pytest.approx(1e-3, rel=1e-3)  # as the Trainer clips them
    monitored(fresh("sara"), tmp_path, other := sarac.Monitor(every=1), max_steps=1, max_grad_norm=1e3)
    assert math.hypot(*(one.grad or 0.0 for one in other.history[0].sites)) > 2e-3


def louder(run: transformers.Trainer, factor: float) -> None:
    """A loss that is so many times what it should be, and a Trainer that logs as seldom as by default."""
    inner: Any = run.compute_loss
    run.compute_loss = lambda *args, **given: inner(*args, **given) * factor  # type: ignore[method-assign, assignment]
    run.args.logging_steps = 500


@pytest.mark.parametrize(
    ("method", "options"), [("sara", {"gradient_accumulation_steps": 2}), *((method, {}) for method in METHODS)]
)
def test_gradients_that_explode_are_found_though_the_trainer_clips_them(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    found = {}
    for factor in (1.0, 1e6):
        run = trainer(fresh(method), tmp_path, save_strategy="no", max_steps=10, max_grad_norm=1.0, **options)
        louder(run, factor)
        run.add_callback(monitor := sarac.Monitor(every=5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sarac.SaracWarning)
            run.train()
        found[factor] = ["exploding" in names(one) for one in monitor.history[:-1]]
        assert all(one.notes == () for one in monitor.history)
        assert not any(one._post_accumulate_grad_hooks for one in run.model.parameters())
    assert found == {1.0: [False] * 2, 1e6: [True] * 2}


def test_norm_before_clipping_is_the_trainers_own(tmp_path: Path) -> None:
    monitor, model = sarac.Monitor(every=1), fresh("sara")
    seen = []
    record = monitor._record
    monitor._record = lambda *args, **given: (seen.append(monitor._clipped), record(*args, **given))[1]  # type: ignore[method-assign, func-returns-value]
    run = monitored(model, tmp_path, monitor, max_steps=4, max_grad_norm=1e-3, gradient_accumulation_steps=2)
    logged = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    assert seen[:4] == pytest.approx(logged, rel=1e-5)


class Scaler:
    def get_scale(self) -> float:
        return 2.0**16


def test_norm_of_scaled_gradients_is_that_of_the_loss() -> None:
    model, x = plain(), torch.randn(9, 24)
    found = []
    for scale in (1.0, 2.0**16):
        unclipped = Unclipped()
        unclipped.begin(model)
        (square(model(x)) * scale).backward()
        found.append(unclipped.end(Scaler() if scale > 1.0 else None))
        model.zero_grad()
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0] == pytest.approx(
        math.hypot(*(one.grad or 0.0 for one in sarac.diagnose(model, x, loss=square).sites)), rel=1e-5
    )
    assert Unclipped().end(None) is None


@pytest.mark.parametrize(("clip", "logs", "said"), [(1.0, False, True), (1.0, True, False), (0.0, False, False)])
def test_norm_that_cannot_be_known_is_said(tmp_path: Path, clip: float, logs: bool, said: bool) -> None:
    run = trainer(fresh("sara"), tmp_path, save_strategy="no", max_steps=4, max_grad_norm=clip)
    run.args.logging_steps = 1 if logs else 500
    run.add_callback(monitor := sarac.Monitor(every=2))
    monitor._unclipped.begin = lambda model: None  # type: ignore[method-assign]  # as in a compiled or a sharded model
    run.train()
    notes = [one.notes for one in monitor.history]
    assert notes[0] == notes[1] or logs
    assert bool(notes[1]) == said
    assert notes[-1] == ()  # at the end there is no gradient
    if said:
        assert "clipped to 1, and what their norm was before is not known" in notes[1][0]
        assert "logging_steps=2" in " ".join(str(monitor.history[1]).split())
        assert json.loads(monitor.to_json())["records"][1]["notes"] == list(notes[1])


def test_monitor_warns_once_of_each_finding(tmp_path: Path) -> None:
    monitor = sarac.Monitor(every=4)
    with pytest.warns(sarac.SaracWarning) as seen:
        monitored(fresh("sara"), tmp_path, monitor, max_steps=24, learning_rate=1e-6)
    ours = [str(one.message) for one in seen if "unmoved" in str(one.message)]
    assert len(ours) == 1
    assert "At step 12, unmoved" in ours[0]
    assert "the optimiser's is 1e-06" in ours[0]
    assert list(monitor.findings) == ["unmoved"]
    assert [bool(one.findings) for one in monitor.history] == [False, False, False, True, True, True, True]


def steps(rate: Callable[[int], float], count: int, start: int = 0, begin: float | None = None) -> sarac.Monitor:
    """A long run's records: the shifts have moved, however slowly; the rate is that of the schedule at each step."""
    model, monitor = plain("rank:8,train=factors"), sarac.Monitor(every=5)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1.0)
    square(model(torch.randn(9, 24))).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sarac.SaracWarning)
        for step in range(start, start + count):
            optimizer.param_groups[0]["lr"] = rate(step)
            if begin is not None:
                optimizer.param_groups[0]["initial_lr"] = begin
            monitor.step(model, step, optimizer=optimizer)
        monitor.finish(model, start + count)
    return monitor


WANTED = sarac.recommended_lr(plain("rank:8,train=factors"))
RATES: dict[str, tuple[Callable[[int], float], dict[str, Any], bool]] = {
    # the rate by step, further options, whether it is far too low
    "low": (lambda step: WANTED / 101, {}, True),
    "low in a loop that counts from 1": (lambda step: WANTED / 101, {"start": 1}, True),
    "just enough": (lambda step: WANTED / 99, {}, False),
    "a warm-up": (lambda step: WANTED * step / 4000, {}, False),
    "a warm-up to too little": (lambda step: min(WANTED * step / 4000, WANTED / 400), {}, True),
    "a rate that has fallen": (lambda step: WANTED * 0.5**step, {}, False),
    "resumed where it has fallen": (lambda step: WANTED / 1000, {"start": 900, "begin": WANTED}, False),
    "a schedule that starts high and asks for little": (lambda step: WANTED / 1000, {"begin": WANTED}, True),
}


@pytest.mark.parametrize("name", RATES)
def test_rate_that_is_far_too_low_for_however_long_a_run(name: str) -> None:
    rate, options, low = RATES[name]
    monitor = steps(rate, 30, **options)
    assert list(monitor.findings) == (["slow"] if low else [])
    if not low:
        return
    found = monitor.findings["slow"]
    highest = max(rate(step) for step in range(30))
    assert f"{highest:g} at most so far" in found.text
    assert f"recommended {WANTED:g}" in found.text
    assert found.value == highest
    first = [bool(one.findings) for one in monitor.history].index(True)
    assert 10 <= (monitor.history[first].step or 0) <= 25
    assert names(monitor.history[-1]) == ["slow"]


def test_rate_of_one_part_that_is_far_too_low() -> None:
    model = plain("rank:8", method="mosara")
    square(model(torch.randn(60, 24))).backward()
    router = [one for name, one in model.named_parameters() if "router" in name]
    others = [one for name, one in model.named_parameters() if "shift" in name]
    optimizer = torch.optim.Adam([{"params": router, "lr": 5e-5}, {"params": others, "lr": 1e-2}])
    monitor = sarac.Monitor(every=10, batch=torch.randn(60, 24))
    assert names(monitor.step(model, 0, optimizer=optimizer)) == []  # type: ignore[arg-type]
    with pytest.warns(sarac.SaracWarning, match=r"slow: .*\(the router\)"):
        monitor.step(model, 10, optimizer=optimizer)


def test_monitor_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    model, monitor = plain(method="mosara"), sarac.Monitor(every=2, file=tmp_path / "log.jsonl")
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    seen = []
    for step in range(5):
        square(model(torch.randn(60, 24))).backward()
        seen.append(monitor.step(model, step, optimizer=optimizer))
        optimizer.step()
        optimizer.zero_grad()
    assert [one is not None for one in seen] == [True, False, True, False, True]
    assert [one.sites[0].gates is not None for one in monitor.history] == [False, True, True]
    found = monitor.finish(model, 5)
    assert found.sites[0].lost is not None
    assert [one.step for one in monitor.history] == [0, 2, 4, 5]
    assert not any(module._forward_hooks for module in model.modules())
    shift(model)[:] = 9.0
    with pytest.warns(sarac.SaracWarning, match=r"At step 6, swamped: 0\.weight \(1 site\)"):
        monitor.step(model, 6)
    sarac.Monitor(file=tmp_path / "log.jsonl", batch=torch.randn(60, 24)).step(plain(method="mosara"), 0)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


# Frozen factors that are no longer singular vectors are another finding.
BREAKING: list[tuple[str, str, str, str]] = [
    ("rank:5,sets=4", "shift", "δ", "last good checkpoint"),
    ("rank:5,sets=4", "router", "the router", "last good checkpoint"),
    ("rank:5,sets=4", "u", "U", "transform the model anew"),
    ("rank:5,sets=4", "scale", "s", "transform the model anew"),
    ("rank:5,sets=4", "weight", "the base weight", "transform the model anew"),
    ("rank:5,train=factors", "v", "V", "last good checkpoint"),
]


@pytest.mark.parametrize(("plan", "role", "said", "advice"), BREAKING)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_site_that_is_broken_is_named_and_not_those_that_it_breaks(
    plan: str, role: str, said: str, advice: str, value: float
) -> None:
    model = plain(plan, method="mosara" if "sets" in plan else "sara")
    module, slot = list(slots(model))[1]
    tensor = module._parameters["weight"] if role == "weight" else slot.tensors(module)[role]
    tensor.data.reshape(-1)[0] = value  # type: ignore[union-attr]
    found = sarac.diagnose(model, torch.randn(64, 24), loss=square)
    assert not any(one.finite for one in found.sites)
    assert [(one.name, one.sites) for one in found.findings if one.name == "not finite"] == [("not finite", ("2.weight",))]
    assert f"(1 site): {said} holds NaN or Inf." in found.findings[0].text
    assert advice in found.findings[0].text
    assert ("checkpoint" in found.findings[0].text) == ("checkpoint" in advice)
    json.loads(found.to_json(), parse_constant=pytest.fail)


SWAMPING: dict[str, Callable[[Model], Any]] = {
    "a start far away": lambda model: shift(model).fill_(40.0),
    "a scale": lambda model: next(slots(model))[0].sara_scale.mul_(100.0),
    "a factor": grown,
}


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        *itertools.product(["rank:4,train=factors", "rank:4,train=factors,init=random"], SWAMPING),
        *(("rank:8", what) for what in SWAMPING if what != "a factor"),
    ],
)
def test_change_that_swamps_its_weight(plan: str, what: str) -> None:
    """Of every method, and without the advice to leave out weights that it lets no gradient reach."""
    model, x = plain(plan), torch.randn(64, 24)
    assert names(sarac.diagnose(model, x, loss=square)) == []
    SWAMPING[what](model)
    found = {one.name: one for one in sarac.diagnose(model, x * 1e-3, loss=square).findings}
    assert found["swamped"].sites == ("0.weight",)
    assert found["swamped"].value > 4.0
    assert "vanishing" not in found


def test_gradients_that_a_swamped_weight_stops_are_not_told() -> None:
    model, x = plain(), torch.randn(64, 24)
    model[1] = nn.Softmax(-1)
    assert names(sarac.diagnose(model, x, loss=square)) == []
    shift(model)[:] = 1e4
    assert names(sarac.diagnose(model, x, loss=square)) == ["swamped"]


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (0.1, r"Lower the learning rate of 0\.1, which is 10 times the recommended 0\.01"),
        (0.01, r"of 0\.01 is not above the recommended 0\.01: train for fewer steps"),
        (None, r"If the learning rate was above the recommended 0\.01, lower it; else train for fewer steps"),
    ],
)
@pytest.mark.parametrize(("size", "name"), [(-1.5, "far"), (-9.0, "swamped")])
def test_rate_is_advised_only_where_it_is_lower(rate: float | None, said: str, size: float, name: str) -> None:
    model, monitor, x = plain(), sarac.Monitor(every=1), torch.randn(9, 24)
    square(model(x)).backward()
    shift(model)[:] = size
    groups = [one for one in model.parameters() if one.requires_grad]
    with pytest.warns(sarac.SaracWarning, match=f"{name}: .*{said}"):
        monitor.step(model, 1, optimizer=torch.optim.Adam(groups, lr=rate) if rate else None)
    if rate:  # what the last record knows of the rate is still known at the end
        assert re.search(said, monitor.finish(model, 2).findings[0].text)


def test_few_directions_that_are_turned_round_are_good_training() -> None:
    model, x = plain(), torch.randn(64, 24)
    shift(model)[:3] = -1.5
    shift(model)[3:] = 1.5
    assert names(sarac.diagnose(model, x, loss=square)) == []
    one = sarac.diagnose(model, x, loss=square).sites[0]
    assert (one.turned, one.beyond) == (0.375, 1.0)


@pytest.mark.parametrize("plan", ["rank:4", "rank:4,train=factors", "rank:4,train=factors,init=random", "rank:4,sets=2"])
def test_scale_that_is_all_zero_is_no_crash(plan: str) -> None:
    model = plain(plan, method="mosara" if "sets" in plan else "sara")
    for module, _ in slots(model):
        module.sara_scale.zero_()
    found = sarac.diagnose(model, torch.randn(64, 24), loss=square)
    assert [(one.delta, one.moved, one.largest, one.still) for one in found.sites] == [(0.0,) * 4] * 2
    assert json.loads(found.to_json())["sites"][0]["beyond"] == 0.0


def test_monitor_knows_what_gradients_were_before_they_were_clipped() -> None:
    model, monitor = plain(), sarac.Monitor(every=1)
    square(model(torch.randn(9, 24))).backward()
    monitor.on_log(None, None, None, {"loss": 1.0, "grad_norm": 2.0})
    assert monitor.step(model, 0).findings == ()  # type: ignore[union-attr]
    monitor.on_log(None, None, None, {"grad_norm": 5e4})
    with pytest.warns(sarac.SaracWarning, match=r"exploding: .* norm over all sites is 5e\+04"):
        monitor.step(nn.DataParallel(model), 1)
    monitor.on_epoch_end(None, None, None, model=model)  # events that it has no use for


@pytest.mark.parametrize("every", [0, -2, 1.5, 2.0, True, "5", None, math.nan])
def test_monitor_refuses_what_is_no_number_of_steps(every: Any) -> None:
    with pytest.raises(sarac.InputError, match=rf"every={every!r} is no number of steps: give a whole one, 1 or more\."):
        sarac.Monitor(every=every)
    assert sarac.Monitor(every=torch.tensor(3).numpy()[()]).every == 3


@pytest.mark.parametrize("memory", [-1, -0.5, math.nan, "1 GB", True])
def test_memory_that_is_no_number_of_bytes_is_refused(memory: Any) -> None:
    said = rf"memory={memory!r} is no number of bytes: give 0 or more, or leave it out"
    with pytest.raises(sarac.InputError, match=said):
        sarac.Monitor(memory=memory)
    with pytest.raises(sarac.InputError, match=said):
        sarac.diagnose(plain(), torch.randn(9, 24), loss=square, memory=memory)
    assert names(sarac.diagnose(plain(), torch.randn(9, 24), loss=square, memory=math.inf)) == []
    assert names(sarac.diagnose(plain(), torch.randn(9, 24), loss=square, memory=0)) == ["memory"]


def test_monitor_says_what_it_cannot_do(tmp_path: Path) -> None:
    monitor = sarac.Monitor(file=tmp_path / "nowhere" / "log.jsonl")
    with pytest.raises(sarac.InputError, match="Nothing was recorded yet"):
        monitor.plot()
    assert "Nothing was recorded yet" in str(monitor)
    with pytest.raises(sarac.RewriteError, match="carries no adapters"):
        monitor.step(mlp(4, 3), 0)
    with pytest.raises(sarac.CheckpointError, match=r"log\.jsonl cannot be written"):
        monitor.step(plain(), 0)
    with pytest.raises(AttributeError, match="has no 'nothing'"):
        monitor.nothing  # noqa: B018
