"""What people call on a model: transform, fold, disabled, recommended_lr, analyze, and the training loops around them."""

import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR
from zoo import Own, TiedHead, adapt, bert, close, differ, gpt2, ids, llama, mlp, outputs, roles, same, shake, trainables

import sarac
from sarac import InputError, NotFoldable, PlanError, RewriteError, SaracWarning
from sarac.ir import check
from sarac.ir.adapters import LR_FACTORS_RANDOM, LR_FACTORS_SVD, LR_SHIFT
from sarac.ir.graph import fact
from sarac.ir.inputs import Inputs
from sarac.ir.layers import adapted
from sarac.ir.record import record_of
from sarac.passes.analyze import Analyze
from sarac.passes.choose import Choose
from sarac.passes.rewrite import Rewrite
from sarac.surgery import mean_gates


def plain() -> nn.Sequential:
    return mlp(6, 8, 5)


def trained(model: nn.Module, **choice: Any) -> nn.Module:
    return shake(sarac.transform(model, **choice)).eval()


# --- transform ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, bert, gpt2, plain])
def test_model_keeps_its_class_methods_and_signature(build: Callable[[], nn.Module]) -> None:
    base = build()
    model = sarac.transform(base)
    assert type(model) is type(base)
    for name in ("forward", "generate", "state_dict", "to"):
        if hasattr(base, name):
            assert inspect.signature(getattr(model, name)) == inspect.signature(getattr(base, name)), name
    assert {n for n, _ in base.named_parameters()} < {n for n, _ in model.named_parameters()}
    assert [n for n, _ in model.named_modules()] == [n for n, _ in base.named_modules()]


def test_signature_of_a_rewritten_forward_is_kept() -> None:
    base = Own("at", 5, 6)
    model = sarac.transform(base)
    assert isinstance(model, Own)
    assert inspect.signature(model.forward) == inspect.signature(base.forward)


def test_transform_is_an_exact_no_op_until_trained() -> None:
    base, batch = llama(), ids()
    model = sarac.transform(base)
    same(outputs(model, batch), outputs(base, batch))
    differ(outputs(shake(model), batch).logits, outputs(base, batch).logits)


def test_in_place_is_the_model_itself() -> None:
    base = plain()
    assert sarac.transform(base, inplace=True) is base
    assert trainables(base) == {"0.sara_shift", "2.sara_shift"}
    assert sarac.transform(other := plain()) is not other


def test_seed_matters_where_something_is_random() -> None:
    base = plain()
    one, again, other = (sarac.transform(base, method="mosara", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one[0].sara_router, again[0].sara_router)
    assert not torch.equal(one[0].sara_router, other[0].sara_router)


def test_plan_may_be_a_file_or_a_value(tmp_path: Path) -> None:
    base = plain()
    plan = sarac.Plan({"2.weight": sarac.Sara(rank=2)})
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert record_of(sarac.transform(base, plan=given)).plan.sites == plan.sites
    with pytest.raises(PlanError, match="cannot be read"):
        sarac.transform(base, plan="nowhere.json")


@pytest.mark.parametrize("rule", ["threshold:0", "threshold:1.5", "threshold:nan", "threshold:-1"])
def test_threshold_outside_its_range_is_told_at_once(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sarac.passes.analyze.measure", lambda *_, **__: pytest.fail("it measured first"))
    with pytest.raises(sarac.SaracError, match=rule.partition(":")[2]):
        sarac.transform(plain(), plan=rule)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named(number: float) -> None:
    base = plain()
    base[2].weight.data[1, 1] = number
    with pytest.raises(sarac.SaracError, match=r"2\.weight"):
        sarac.transform(base)
    sarac.transform(base, where="0.weight")


@pytest.mark.parametrize(
    ("build", "choice", "said"),
    [
        (plain, {"where": "1.weight"}, r"0\.weight"),
        (plain, {"also_train": "nothing*"}, "also_train"),
        (plain, {"method": "lora"}, "mosara"),
        (lambda: nn.LayerNorm(4), {}, "no linear weight"),
        (lambda: nn.Sequential(nn.Linear(3, 3, device="meta")), {}, "meta"),
        (lambda: adapt(plain()), {}, "already transformed"),
        (lambda: adapt(plain(), method="mosara"), {}, "already transformed"),
        (plain, {"plan": sarac.Plan({"9.weight": sarac.Sara(1)})}, r"9\.weight"),
        (plain, {"plan": sarac.Plan({"0.weight": sarac.Sara(7)})}, "rank 7"),
        (plain, {"example_inputs": torch.randn(2, 7)}, r"rejects.*\[2, 7\]"),
    ],
)
def test_bad_input_gets_a_sentence(build: Callable[[], nn.Module], choice: dict[str, Any], said: str) -> None:
    with pytest.raises(sarac.SaracError, match=said):
        sarac.transform(build(), **choice)


def test_zero_and_tiny_weights() -> None:
    model = mlp(6, 1, 1)
    model[0].weight.data.zero_()
    with pytest.warns(SaracWarning, match=r"0\.weight is all zeros"):
        assert set(record_of(sarac.transform(model)).plan.sites) == {"2.weight"}
    with pytest.raises(PlanError, match=r"0\.weight is all zeros"):
        sarac.transform(model, where="0.weight")


def broken(self: Any, x: Any, weight: Any, bias: Any, tensors: Any, *_: Any) -> Any:
    return x @ weight.mT + tensors["shift"].sum() + 1.0


def test_example_inputs_check_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    base, batch = llama(), ids()
    model = sarac.transform(base, example_inputs={"input_ids": batch})
    same(outputs(model, batch), outputs(base, batch))
    # A rewrite that breaks the model is caught on them.
    monkeypatch.setattr(
        "sarac.ir.adapters.Sara.linear", lambda self, x, w, b, tensors, *_: x @ w.mT + tensors["shift"].sum() + 1.0
    )
    with pytest.raises(sarac.CheckFailed, match="Rewrite"):
        sarac.transform(base, example_inputs={"input_ids": batch})


# --- training -------------------------------------------------------------------------------------------------------------


def fit(model: nn.Module, steps: int = 3, lr: float | None = None) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr or sarac.recommended_lr(model))
    x, y = torch.linspace(-1, 1, 24).reshape(4, 6), torch.ones(4, 5)
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("choice", [{}, {"method": "mosara"}, {"plan": "rank:3,train=factors,init=random"}])
def test_training_learns_and_moves_nothing_but_adapters(choice: dict[str, Any]) -> None:
    model = sarac.transform(plain(), **choice)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = fit(model, 8)
    assert losses[-1] < losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trainables(model) == {name for names in roles(model).values() for name in names}


def test_also_train_is_trained_and_kept_through_the_fold() -> None:
    base = plain()
    model = sarac.transform(base, where="0.weight", also_train=["2.*"])
    assert trainables(model) == {"0.sara_shift", "2.weight", "2.bias"}
    fit(model)
    merged = sarac.fold(model)
    assert torch.equal(merged[2].weight, model[2].weight)
    assert not torch.equal(merged[2].weight, base[2].weight)
    x = torch.randn(3, 6)
    close(outputs(merged, x), outputs(model, x))
    differ(outputs(merged, x), outputs(base, x))
    fit(model)
    assert not torch.equal(merged[2].weight, model[2].weight)


def test_tied_embedding_that_trains_whole_stays_tied() -> None:
    base = TiedHead(8)
    model = sarac.transform(base, where="inner.weight", also_train="embed.weight")
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.data_ptr() != base.embed.weight.data_ptr()
    assert sarac.fold(shake(model)).head.weight.requires_grad


@pytest.mark.parametrize("choice", [{}, {"inplace": True}])
def test_flags_come_back_at_the_fold(choice: dict[str, Any]) -> None:
    base = plain()
    base[0].weight.requires_grad_(False)
    base[2].bias.requires_grad_(False)
    flags = trainables(base)
    merged = sarac.fold(sarac.transform(base, **choice))
    assert trainables(merged) == flags == {"0.bias", "2.weight"}


# --- learning rates -------------------------------------------------------------------------------------------------------

RATES = {
    "values": ({}, LR_SHIFT),
    "svd factors": ({"plan": "rank:2,train=factors"}, LR_FACTORS_SVD),
    "random factors": ({"plan": "rank:2,train=factors,init=random"}, LR_FACTORS_RANDOM),
    "routed": ({"method": "mosara"}, LR_SHIFT),
}


@pytest.mark.parametrize("method", RATES)
def test_recommended_rate_is_the_methods(method: str) -> None:
    choice, rate = RATES[method]
    assert sarac.recommended_lr(sarac.transform(plain(), **choice)) == rate
    with pytest.raises(RewriteError, match="carries no adapters"):
        sarac.recommended_lr(plain())


def test_recommended_rate_of_mixed_methods_is_the_lowest() -> None:
    plan = sarac.Plan({"0.weight": sarac.Sara(2), "2.weight": sarac.Sara(2, train="factors")})
    assert sarac.recommended_lr(sarac.transform(plain(), plan=plan)) == min(LR_SHIFT, LR_FACTORS_SVD)


def told(model: nn.Module, rate: float | Tensor, schedule: Callable[[Any], Any] | None = None, steps: int = 3) -> int:
    """How many warnings about the rate a few steps with it draw."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    scheduler = schedule(optimizer) if schedule else None
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return sum(issubclass(warning.category, SaracWarning) for warning in found)


@pytest.mark.parametrize("method", RATES)
def test_rate_ten_times_too_low_is_told_once_an_optimiser(method: str) -> None:
    model = sarac.transform(plain(), **RATES[method][0])
    rate = sarac.recommended_lr(model)
    assert told(model, rate) == 0
    assert told(model, rate / 9) == 0
    assert told(model, rate / 10) == 1
    assert told(model, torch.tensor(rate / 100)) == 1
    assert told(model, 0.0) == 1


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda step: step / 100),
        lambda o: LinearLR(o, 1e-3, total_iters=100),
        lambda o: OneCycleLR(o, LR_SHIFT, total_steps=100),  # it begins at a 25th of its peak
        lambda o: transformers.get_cosine_schedule_with_warmup(o, 10, 100),
    ],
)
def test_warm_up_is_not_told(schedule: Callable[[Any], Any]) -> None:
    model = sarac.transform(plain())
    assert told(model, LR_SHIFT, schedule) == 0
    assert told(model, LR_SHIFT / 100, lambda o: LambdaLR(o, lambda step: 1.0)) == 1


def test_other_models_and_groups_are_left_alone() -> None:
    model = sarac.transform(plain(), where="0.weight", also_train="2.*")
    assert told(plain(), 1e-6) == 0
    adapters = [p for n, p in model.named_parameters() if "sara" in n and p.requires_grad]
    whole = [model[2].weight, model[2].bias]
    groups = [{"params": adapters, "lr": 1e-2}, {"params": whole, "lr": 0.0}]
    optimizer = torch.optim.SGD(groups)
    model(torch.ones(2, 6)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SaracWarning)
        optimizer.step()


def test_low_rate_is_told_for_a_copy_too() -> None:
    # nn.Parameter's deepcopy drops what stands in its __dict__.
    assert told(copy.deepcopy(sarac.transform(plain())), 1e-5) == 1


def test_low_rate_is_told_in_place_too() -> None:
    assert told(sarac.transform(plain(), inplace=True), 1e-5) == 1


# --- disabled -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sara", "mosara"])
def test_disabled_is_the_base_for_a_while(method: str) -> None:
    base, batch = llama(), ids()
    model = trained(base, method=method)
    before = outputs(model, batch)
    with sarac.disabled(model):
        same(outputs(model, batch), outputs(base, batch))
        with sarac.disabled(model):
            pass
        same(outputs(model, batch), outputs(base, batch))
    same(outputs(model, batch), before)
    differ(before.logits, outputs(base, batch).logits)


def test_disabled_ends_with_an_error_too() -> None:
    base, x = plain(), torch.randn(2, 6)
    model = trained(base)
    before = outputs(model, x)
    with pytest.raises(ZeroDivisionError), sarac.disabled(model):
        raise ZeroDivisionError
    same(outputs(model, x), before)
    differ(before, outputs(base, x))


# --- fold -----------------------------------------------------------------------------------------------------------------


def test_fold_reports_every_site() -> None:
    model = trained(plain().to(torch.bfloat16))
    _, report = sarac.fold(model, report=True)
    assert list(report.sites) == ["0.weight", "2.weight"]
    assert report.approximation == 0.0
    name, share = report.worst
    assert share == max(site.surviving_delta for site in report.sites.values()) == report.sites[name].surviving_delta
    assert 0.0 < share < 0.2
    delta = model[0].weight.detach().float() - model[0].weight_base.float()
    assert abs(report.sites["0.weight"].relative_delta - check.relative_norm(delta, model[0].weight_base)) < 0.05
    assert isinstance(sarac.fold(model), nn.Sequential)


def test_delta_that_rounding_eats_is_reported() -> None:
    model = sarac.transform(plain().to(torch.bfloat16))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(1e-4)
    assert sarac.fold(model, report=True)[1].worst[1] > 0.9


def test_folding_twice_is_refused() -> None:
    merged = sarac.fold(trained(plain()))
    with pytest.raises(RewriteError, match="nothing to fold"):
        sarac.fold(merged)
    assert sarac.fold(trained(merged)) is not None


def test_folded_model_is_plain_again() -> None:
    base = llama()
    merged = sarac.fold(trained(base))
    assert type(merged) is type(base)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert "save_pretrained" not in vars(merged)
    assert record_of(merged) is None


def test_routed_model_is_refused_with_both_ways_out() -> None:
    model = trained(plain(), method="mosara")
    with pytest.raises(NotFoldable, match=r"0\.weight.*merge=False.*routing=\"mean\""):
        sarac.fold(model)


def test_mean_gates_are_the_mean_of_the_gates() -> None:
    model, batches = trained(plain(), method="mosara"), [torch.randn(5, 6), torch.randn(2, 6)]
    found = mean_gates(model, [Inputs.of(batch) for batch in batches])
    slot = {s.site: s for _, _, state in adapted(model) for s in state.slots.values()}["0.weight"]
    tensors = slot.tensors(model[0])
    expected = slot.adapter.gates(torch.cat(batches) @ tensors["v"].T, tensors).mean(0)
    assert set(found) == {"0.weight", "2.weight"}
    close(found["0.weight"], expected)
    close(found["0.weight"].sum(), torch.tensor(1.0))
    differ(found["0.weight"], mean_gates(model, [Inputs.of(batches[0] * 9)])["0.weight"])


def test_fold_by_mean_gates_reports_its_error() -> None:
    base, batch = plain(), torch.randn(64, 6)
    model = trained(base, method="mosara").train()
    with pytest.warns(SaracWarning, match=r"relative output error"):
        merged, report = sarac.fold(model, routing="mean", calibration=[batch], report=True)
    assert model.training
    found = check.difference(outputs(merged, batch), outputs(model, batch)).error
    assert report.approximation == pytest.approx(found, rel=1e-3)
    assert check.gate(torch.float32) < found < check.difference(outputs(base, batch), outputs(model, batch)).error
    assert not any(True for _ in adapted(merged))


def test_mean_gates_of_equal_gates_are_exact() -> None:
    base, batch = plain(), torch.randn(8, 6)
    model = trained(base, method="mosara")
    for name, parameter in model.named_parameters():
        if name.endswith("router"):
            parameter.data.zero_()
    with pytest.warns(SaracWarning):
        merged, report = sarac.fold(model, routing="mean", calibration=(b for b in [batch]), report=True)
    close(outputs(merged, batch), outputs(model, batch))
    differ(outputs(merged, batch), outputs(base, batch))
    assert report.approximation <= check.gate(torch.float32)


def test_mean_of_nothing_routed_needs_no_warning() -> None:
    model, batch = trained(plain()), torch.randn(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SaracWarning)
        merged = sarac.fold(model, routing="mean", calibration=[batch])
    close(outputs(merged, batch), outputs(model, batch))


class Optional(nn.Module):
    """A module whose second layer some inputs never reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if x.shape[0] > 1 else y


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        (plain, {"routing": "mean"}, "calibration"),
        (plain, {"routing": "mean", "calibration": []}, "calibration"),
        (plain, {"routing": "median", "calibration": [torch.randn(2, 6)]}, "median"),
        (plain, {"routing": "mean", "calibration": [torch.randn(2, 7)]}, "rejects"),
        (plain, {"routing": "mean", "calibration": ["text"]}, "str"),
        (Optional, {"routing": "mean", "calibration": [torch.randn(1, 6)]}, r"never reach second\.weight"),
    ],
)
def test_calibration_that_cannot_serve_is_told(build: Callable[[], nn.Module], options: dict[str, Any], said: str) -> None:
    with pytest.raises((InputError, RewriteError), match=said):
        sarac.fold(trained(build(), method="mosara"), **options)


def test_calibration_that_reaches_every_site_serves() -> None:
    with pytest.warns(SaracWarning, match="relative output error"):
        sarac.fold(trained(Optional(), method="mosara"), routing="mean", calibration=[torch.randn(2, 6)])


# --- the passes by hand ---------------------------------------------------------------------------------------------------


def test_graph_carries_the_threshold_rank_on_its_nodes() -> None:
    base = nn.Sequential(Own("at", 8, 6), nn.Tanh(), nn.Linear(8, 5))
    before = sarac.trace(base)
    graph = sarac.run(before, Analyze(0.5), Choose("threshold:0.5"), Rewrite())
    assert isinstance(graph, sarac.ModelGraph)
    for name, adapter in graph.plan.sites.items():
        nodes = list(sarac.run(before, Analyze(0.5)).nodes(before.sites[name]))
        assert nodes
        for node in nodes:
            assert fact(node)["site"] == name
            assert fact(node)["rank"] == adapter.rank
            assert fact(node)["threshold"] == 0.5
    assert all(fact(node) is None for region in before.regions.values() for node in region.train.nodes)
    x = torch.randn(3, 6)
    same(outputs(graph.module.eval(), x), outputs(base.eval(), x))


def test_checks_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sarac.ir.adapters.Sara.linear", lambda self, x, w, b, tensors, *_: x @ w.mT + tensors["shift"].sum() + 1.0
    )
    steps = (Choose("rank:2"), Rewrite())
    with pytest.raises(sarac.CheckFailed):
        sarac.run(sarac.trace(plain()), *steps)
    assert sarac.run(sarac.trace(plain()), *steps, check=False).plan is not None


def test_disabled_gives_what_trains_whole_its_base_values_too(tmp_path: Path) -> None:
    base, batch = llama(), ids()
    model = shake(sarac.transform(base, also_train=["*norm*", "lm_head.weight"]))
    sarac.save(model, tmp_path / "m.pt")
    sarac.save_adapter(model, tmp_path / "a.safetensors")
    inplace = llama()
    inplace.load_state_dict(base.state_dict())
    moved = outputs(model, batch).logits
    others = (
        sarac.load(tmp_path / "m.pt"),
        sarac.load_adapter(base, tmp_path / "a.safetensors"),
        sarac.load_adapter(inplace, tmp_path / "a.safetensors"),
        copy.deepcopy(model),
    )
    for one in (model, *others):
        with sarac.disabled(one), sarac.disabled(one):
            same(outputs(one, batch).logits, outputs(base, batch).logits)
        same(outputs(one, batch).logits, moved)
    differ(moved, outputs(base, batch).logits)


def test_disabled_says_what_a_folder_does_not_know(tmp_path: Path) -> None:
    model = shake(sarac.transform(llama(), also_train="model.norm.weight"))
    model.save_pretrained(tmp_path)
    said = r"base values of model\.norm\.weight \(1 parameters\) are not at hand"
    with pytest.warns(SaracWarning, match=said), sarac.disabled(sarac.load(tmp_path)):
        pass
