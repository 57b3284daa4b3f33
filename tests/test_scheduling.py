"""Schedules as people see and set them, what the machine's rates are measured for, and both on the command line."""

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import train
from torch import nn
from typer.testing import CliRunner
from user.methods import batch
from zoo import VOCABULARY, close, differ, llama, mlp, outputs, shake

import sarac
from sarac.cli import app
from sarac.ir import materialised
from sarac.ir.calls import AUTO, PINNED
from sarac.ir.cost import Rates, forget_rates, keep_rates, rates_of

CHOICES = ("auto", "two-sided", "right", "left", "materialised", "rebuilt", "plain")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own: rates that were measured elsewhere choose otherwise."""
    monkeypatch.setenv("SARAC_CACHE", str(tmp_path / "cache"))
    forget_rates()
    yield tmp_path / "cache"
    forget_rates()


def asked(model: nn.Module) -> set[str]:
    return {module.__dict__["sara_schedule"] for module in model.modules() if "sara_schedule" in module.__dict__}


def losses(model: nn.Module, steps: int = 6) -> list[float]:
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=2e-2)
    found = []
    for step in range(steps):
        words = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(step))
        loss = model(words, labels=words).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def adapted_alike(method: str, plan: str = "threshold:0.6") -> nn.Module:
    torch.manual_seed(0)
    return sarac.transform(llama(), plan, method=method)


@functools.cache
def losses_of_the_formula(method: str, plan: str) -> list[float]:
    return losses(set_to("plain", adapted_alike(method, plan)))


@pytest.mark.parametrize(
    ("choice", "method", "plan"),
    [*itertools.product(CHOICES, ("sara", "mosara"), ("threshold:0.6",)), (AUTO, "sara", "rank:3,train=factors")],
)
def test_training_is_the_same_step_by_step(choice: str, method: str, plan: str) -> None:
    found = losses(set_to(choice, adapted_alike(method, plan)))
    assert found == pytest.approx(losses_of_the_formula(method, plan), rel=1e-5)
    assert found != pytest.approx(losses_of_the_formula(method, "rank:1"), rel=1e-5)


def set_to(choice: str, model: nn.Module) -> nn.Module:
    sarac.schedule(model, choice)
    return model


@pytest.mark.parametrize("choice", CHOICES)
def test_checkpointing_and_folding_know_no_schedule(choice: str) -> None:
    model = set_to(choice, shake(sarac.transform(llama())))
    merged = outputs(sarac.fold(model), batch()).logits
    model.activation_checkpointing_enable()
    model.train()
    out = model(batch(), labels=batch())
    close(out.logits, merged)
    out.loss.backward()
    found = [one.grad.clone() for one in model.parameters() if one.requires_grad]
    model.zero_grad()
    model.activation_checkpointing_disable()
    sarac.schedule(model, "plain")
    model(batch(), labels=batch()).loss.backward()
    close(torch.cat(found).double(), torch.cat([one.grad for one in model.parameters() if one.requires_grad]).double())


def test_choice_is_set_by_glob_and_shown() -> None:
    model = sarac.transform(llama())
    assert asked(model) == {AUTO}
    found = sarac.schedule(model, {"*": "right", "*mlp*": "left", "*.down_proj.weight": "auto"})
    by_site = {one.site: one for one in found.sites}
    assert by_site["model.layers.0.self_attn.q_proj.weight"].schedule == "right"
    assert by_site["model.layers.1.mlp.up_proj.weight"].schedule == "left"
    assert by_site["model.layers.1.mlp.down_proj.weight"].asked == "auto"
    assert "model.layers.*.mlp.up_proj.weight" in str(found)
    document = json.loads(found.to_json())
    assert document["tokens"] == 8192
    assert document["ratio"] > 1.0
    assert not document["measured"]
    assert "sarac tune" in str(found)
    assert sarac.schedule(model).sites == found.sites  # looking changes nothing


def test_what_cannot_be_is_a_sentence() -> None:
    model = sarac.transform(llama(), "rank:2,train=factors")
    with pytest.raises(sarac.PlanError, match=r"The schedule 'rigth' for '\*' is unknown. Near names: right"):
        sarac.schedule(model, "rigth")
    with pytest.raises(sarac.PlanError, match=r"The glob '\*.nothing' matches no adapted weight"):
        sarac.schedule(model, {"*.nothing": "right"})
    with pytest.raises(sarac.PlanError, match=r"q_proj.weight cannot run right: its factors train. Leave it auto."):
        sarac.schedule(model, {"model.layers.0.self_attn.q_proj.weight": "right"})
    with pytest.raises(sarac.RewriteError, match="carries no adapters"):
        sarac.schedule(llama())
    shown = sarac.schedule(model, "right")
    assert {one.schedule for one in shown.sites} == {"two-sided"}
    assert asked(model) == {AUTO + PINNED}
    assert "its factors train" in str(shown)


def test_what_was_loaded_over_the_base_is_looked_at() -> None:
    model, other = sarac.transform(mlp(6, 5), "rank:2"), sarac.transform(mlp(6, 5), "rank:2")
    assert asked(model) == {AUTO}
    model.load_state_dict({"0.weight": torch.randn(5, 6)}, strict=False)
    assert asked(model) == {AUTO + PINNED}
    model.load_state_dict(other.state_dict())
    assert asked(model) == {AUTO}


@pytest.mark.parametrize("choice", ["right", "left", "materialised", "rebuilt"])
def test_a_choice_is_looked_at_too_before_compiled_code_runs_by_it(choice: str) -> None:
    base = nn.Sequential(nn.Linear(5, 6, bias=False))
    model, x = set_to(choice, shake(sarac.transform(base, "rank:3"))), torch.randn(4, 5, requires_grad=True)
    model.load_state_dict({"0.weight": torch.randn(6, 5)}, strict=False)
    assert asked(model) == {choice + PINNED}
    assert {one.schedule for one in sarac.schedule(model).sites} == {"two-sided"}
    found = compiled_products(model, x)
    model[0].__dict__["sara_schedule"] = choice  # as it would run, were it not looked at
    unseen = compiled_products(model, x)
    expected = products(set_to("plain", model), x)
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    assert not all(torch.allclose(one, other, rtol=1e-2) for one, other in zip(unseen, expected, strict=True))


def compiled_products(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    torch._dynamo.reset()
    return products(torch.compile(model, backend="aot_eager"), x)


def products(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model gives, and the gradient of its shifts."""
    model.zero_grad()
    found = model(x)
    found.square().sum().backward()
    return found.detach(), next(p.grad for p in model.parameters() if p.requires_grad).clone()


def test_a_wider_dtype_is_looked_at_before_compiled_code_runs_in_it() -> None:
    model = shake(sarac.transform(mlp(64, 48).bfloat16(), "rank:20"))
    assert asked(model) == {AUTO}
    assert asked(model.float()) == {AUTO + PINNED}  # to a float32's digits they are no singular vectors
    assert asked(model.bfloat16()) == {AUTO}


def test_what_plain_costs_is_not_predicted() -> None:
    model = sarac.transform(mlp(6, 5), "rank:2")
    assert sarac.schedule(model, "plain").ratio is None
    assert "all together –" in str(sarac.schedule(model))
    assert sarac.schedule(model, "auto").ratio > 1.0


def test_folding_leaves_nothing_of_it() -> None:
    model = sarac.fold(set_to("right", sarac.transform(mlp(6, 5))))
    assert asked(model) == set()


def test_analysis_shows_the_choice() -> None:
    analysis = sarac.analyze(llama())
    found = analysis.schedules(4096)
    assert [one.site for one in found.sites] == [site.name for site in analysis.sites]
    assert {one.rank for one in found.sites} == set(analysis.ranks().values())
    wide = {one.site: one.schedule for one in analysis.schedules(2).sites}
    assert wide["model.layers.0.mlp.gate_proj.weight"] == "right"
    assert wide["model.layers.0.mlp.down_proj.weight"] == "left"


def test_tune_measures_and_keeps(kept: Path) -> None:
    seen: list[str] = []
    found = sarac.tune("cpu", dtypes=["float32"], check=False, progress=seen.append)
    rates = found.rates["float32"]
    assert 0 < rates.launch < 1e-2
    assert [size for size, _ in rates.products] == sorted(size for size, _ in rates.products)
    assert all(rate > 0 for _, rate in (*rates.rows, *rates.products))
    assert seen
    assert found.path == str(kept / "tune.json")
    assert rates_of("cpu", "float32") == rates
    assert sarac.schedule(sarac.transform(mlp(6, 5))).measured
    with pytest.raises(sarac.InputError, match="There is no device mps here to measure"):
        sarac.tune("mps")
    with pytest.raises(sarac.InputError, match="they are for float32, bfloat16 and float64"):
        sarac.tune("cpu", dtypes=["float16"])


def test_command_line(monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    monkeypatch.setattr("sarac.tuning._CALLS", {"cpu": [(8, 24, 16, 4)]})
    monkeypatch.setattr("sarac.tuning.SIZES", (1, 16))
    runner = CliRunner()
    done = runner.invoke(app, ["tune", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert {one["schedule"] for one in document["compared"]} == {"right", "left", "materialised", "rebuilt", "two-sided"}
    assert all(one["predicted"] > 0 and one["measured"] > 0 for one in document["compared"])
    assert "predicted / measured" in runner.invoke(app, ["tune"]).stdout
    done = runner.invoke(app, ["analyze", "zoo:llama", "--tokens", "64", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["schedules"]["tokens"] == 64
    done = runner.invoke(app, ["analyze", "zoo:llama", "--tokens", "64"])
    assert "Calls of 64 tokens in float32 on cpu" in done.stdout
    assert "schedules" not in json.loads(runner.invoke(app, ["analyze", "zoo:llama", "--json"]).stdout)


def test_benchmark_runs_at_its_smallest() -> None:
    names = {"floor", "peft lora r=8 narrow", "sara rank:32", "sara threshold:0.6 materialised", "mosara threshold:0.5 topk:2"}
    known = [name for name in train.ways(schedules=True, width=256) if name in names]
    assert set(known) == names
    works = [train.Work("llama", way, "eager", "cpu", True, None, None) for way in known]
    rows = train.compared(list(train.measure(works)))
    assert [row["way"] for row in rows] == known
    assert all(row["ms"] > 0 for row in rows)
    assert rows[0]["ms / floor"] == 1.0 != rows[1]["ms / floor"]
    assert rows[0]["trains"] == 0 < rows[1]["trains"]
    assert train.table(rows).row_count == len(names)


def test_accumulation_makes_each_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = materialised._made
    monkeypatch.setattr(materialised, "_made", lambda *given: made.append(1) or real(*given))
    model = set_to("materialised", shake(sarac.transform(mlp(6, 5), "rank:3")))
    shift, x = model.get_parameter("0.sara_shift"), torch.randn(4, 6)
    expected = model(x)
    assert len(made) == 1
    with sarac.accumulating():
        for _ in range(3):
            found = model(x)
            found.square().sum().backward()
        assert len(made) == 2
        close(found, expected)
        with torch.no_grad():
            shift.add_(0.5)
        later = model(x)
        assert len(made) == 3
    differ(later, expected)
    model(x)
    assert len(made) == 4
    total = shift.grad.clone()
    model.zero_grad()
    with torch.no_grad():
        shift.sub_(0.5)
    (3 * model(x).square().sum()).backward()
    close(total, shift.grad)


class Both(nn.Module):
    """One weight read both ways: two calls with one shift, whose weights are not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.w) @ self.w.T


def test_accumulation_holds_a_weight_for_each_way_it_is_read_and_dtype() -> None:
    model, x = shake(sarac.transform(Both(), "rank:3")), torch.randn(4, 6)
    model.__dict__["w_sara_schedule"] = "materialised"
    expected = model(x)
    with sarac.accumulating():
        close(model(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        close(model(x), expected)
        with torch.no_grad():
            model.w_base.mul_(0.5)
        differ(model(x), expected)


def test_what_is_measured_elsewhere_is_asked_for_by_name(kept: Path) -> None:
    assert sarac.tune("cpu", dtypes=["float32"], check=False, keep=False).path == ""
    assert not (kept / "tune.json").exists()
    slow = Rates(1.0, 1e9, ((1, 1e9),), ((1, 1e9),))
    keep_rates(kept, "a device", {"float32": slow})
    model = sarac.transform(llama())
    there, here = sarac.schedule(model, device="a device"), sarac.schedule(model)
    assert (there.measured, here.measured) == (True, False)
    assert there.sites[0].floor > 1e3 > here.sites[0].floor  # two launches of a second each
