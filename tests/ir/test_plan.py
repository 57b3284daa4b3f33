"""Rules read from text, ranks that follow from them, and plans as JSON."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sarac.ir.adapters import MoSara, Sara
from sarac.ir.errors import PlanError
from sarac.ir.gram import spectrum
from sarac.ir.methods import trainable_count
from sarac.ir.plan import Plan
from sarac.ir.rule import Rule
from sarac.ir.spectrum import Spectrum

RANKS = st.integers(1, 4096)
SARAS = st.builds(Sara, RANKS) | st.builds(Sara, RANKS, st.just("factors"), st.sampled_from(["svd", "random"]))
ROUTERS = st.sampled_from(["soft", "topk:1", "topk:2", "hard", "uniform"])
MOSARAS = st.builds(MoSara, RANKS, st.integers(2, 9), ROUTERS, st.integers(0, 8)) | st.builds(MoSara, RANKS, st.just(1))
NAMES = st.text(min_size=1, max_size=20)
PLANS = st.builds(Plan, st.dictionaries(NAMES, SARAS | MOSARAS, max_size=5), NAMES, st.lists(NAMES).map(tuple), NAMES)


@given(PLANS)
def test_plan_survives_json(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert list(again.sites) == list(plan.sites)
    assert not plan.diff(again)
    assert again.to_json() == plan.to_json()


@given(PLANS, st.data())
def test_plan_that_was_edited_is_another(plan: Plan, data: st.DataObject) -> None:
    name = data.draw(NAMES)
    edited = replace(plan, sites={**plan.sites, name: replace(plan.sites.get(name, Sara(1)), rank=5000)})
    assert Plan.from_json(edited.to_json()) == edited != plan
    assert plan.diff(edited) == {name: (plan.sites.get(name), edited.sites[name])}
    assert edited.diff(plan) == {name: (edited.sites[name], plan.sites.get(name))}


def test_plan_survives_a_file(tmp_path: Path) -> None:
    plan = Plan({"a.weight": Sara(3), "ü": MoSara(2)}, "rank:3", ("norm.*",), "b4se")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(PlanError, match=r"none\.json cannot be read: No such file"):
        Plan.load(tmp_path / "none.json")


def test_plan_can_be_edited_by_hand() -> None:
    data = json.loads(Plan({"a": Sara(3)}).to_json())
    data["sites"]["a"] = {"method": "mosara", "rank": 2}
    assert Plan.from_json(json.dumps(data)).sites == {"a": MoSara(2)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "no plan of this version"),
        ('{"sites": {}}', '"sarac_plan": 2'),
        ('{"sarac_plan": 3, "sites": {}}', '"sarac_plan": 2'),
        ('{"sarac_plan": 1, "sites": []}', '"sites"'),
        ('{"sarac_plan": 1, "sites": {"a": 3}}', "entry for a needs a method"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "lora", "rank": 3}}}', "sara, mosara"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "sara"}}}', "a whole rank"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "sara", "rank": 2.5}}}', "a whole rank"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "sara", "rank": true}}}', "a whole rank"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "sara", "rank": 0}}}', "At a: .*rank=0"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "sara", "rank": 1, "sets": 2}}}', "At a: .*no option 'sets'"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "mosara", "rank": 1, "sets": null}}}', "At a: .*sets=None"),
        ('{"sarac_plan": 1, "also_train": "norm", "sites": {}}', "also_train"),
        ('{"sarac_plan": 1, "also_train": 3, "sites": {}}', "also_train"),
    ],
)
def test_faulty_plan_is_told_where(text: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        Plan.from_json(text)


def test_plan_for_another_model_is_refused() -> None:
    shapes = {"layers.0.q.weight": (4, 6), "layers.0.k.weight": (2, 6)}
    Plan({"layers.0.q.weight": Sara(4), "layers.0.k.weight": Sara(2)}).require_fits(shapes)
    with pytest.raises(PlanError, match=r"'layers\.0\.qq\.weight', which .* Near names: layers\.0\.q\.weight"):
        Plan({"layers.0.qq.weight": Sara(1)}).require_fits(shapes)
    with pytest.raises(PlanError, match=r"gives layers\.0\.k\.weight rank 3, above min\(out, in\) = 2 .* \(2, 6\): lower it"):
        Plan({"layers.0.k.weight": Sara(3)}).require_fits(shapes)


# Rules.


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("threshold:0.6", Rule("threshold", 0.6)),
        ("energy:1", Rule("energy", 1.0)),
        ("threshold:1e-3", Rule("threshold", 1e-3)),
        ("rank:16,min=2,max=8", Rule("rank", 16.0, low=2, high=8)),
        ("budget:0.5%", Rule("budget", 0.5, percent=True)),
        ("budget:100000, sets=3 ,router=topk:2", Rule("budget", 1e5, options={"sets": "3", "router": "topk:2"})),
    ],
)
def test_rule_is_read(text: str, rule: Rule) -> None:
    assert Rule.parse(text) == rule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("threshold:0", r"\(0, 1\]; 0\.0 is not"),
        ("threshold:1.5", r"\(0, 1\]; 1\.5 is not"),
        ("threshold:1e400", r"\(0, 1\]; inf is not"),
        ("energy:2", r"\(0, 1\]; 2\.0 is not"),
        ("threshold:-0.5", "threshold:-0.5"),
        ("threshold:nan", "threshold:nan"),
        ("threshold:", "threshold:0.6"),
        ("threshold:0.6.1", "0.6.1"),
        ("threshold:50%", "threshold:50%"),
        ("share:0.5", "share:0.5"),
        ("0.6", "write threshold:0.6"),
        ("rank:0", "at least 1"),
        ("rank:2.5", "whole number"),
        ("rank:1e400", "whole number|not a number"),
        ("budget:0", "above 0"),
        ("budget:1e400", "budget"),
        ("rank:4,min", "'min'"),
        ("rank:4,min=", "'min='"),
        ("rank:4,min=a", "min=a is not possible"),
        ("rank:4,min=0", "min is at least 1"),
        ("rank:4,min=5,max=3", "max at least min"),
    ],
)
def test_faulty_rule_is_told(text: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        Rule.parse(text)


def spectra(*sizes: int, seed: int = 0) -> dict[str, Spectrum]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": spectrum(torch.randn(n, n + 2, generator=generator)) for i, n in enumerate(sizes)}


def cost(name: str, rank: int) -> int:
    return trainable_count(Sara(rank), (99, 99))


def test_ranks_follow_the_rule() -> None:
    found = spectra(4, 9)
    by_share = {name: s.rank_at(0.5) for name, s in found.items()}
    by_energy = {name: s.rank_at_energy(0.5) for name, s in found.items()}
    assert Rule.parse("threshold:0.5").decide(found, cost, 0).ranks == by_share
    assert Rule.parse("energy:0.5").decide(found, cost, 0).ranks == by_energy != by_share
    assert Rule.parse("rank:6").decide(found, cost, 0).ranks == {"w0": 4, "w1": 6}
    assert Rule.parse("threshold:1,max=3").decide(found, cost, 0).ranks == {"w0": 3, "w1": 3}
    assert Rule.parse("rank:1,min=6").decide(found, cost, 0).ranks == {"w0": 4, "w1": 6}


def test_rank_above_every_weight_is_refused() -> None:
    with pytest.raises(PlanError, match=r"rank:10 is above min\(out, in\) of every weight; the largest is 9"):
        Rule.parse("rank:10").decide(spectra(4, 9), cost, 0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99), st.integers(1, 40))
def test_budget_is_kept_and_used_up(sizes: list[int], seed: int, budget: int) -> None:
    found = spectra(*sizes, seed=seed)
    rule = Rule.parse(f"budget:{budget}")
    if budget < len(sizes):
        with pytest.raises(PlanError, match=rf"budget of {budget} numbers fits nothing: .* is {len(sizes)}\."):
            rule.decide(found, cost, 0)
        return
    ranks = rule.decide(found, cost, 0).ranks
    assert sum(ranks.values()) <= budget
    shares = sorted({float(share) for s in found.values() for share in s.shares()})
    fitting = [
        plan for share in shares if sum((plan := {n: s.rank_at(min(share, 1.0)) for n, s in found.items()}).values()) <= budget
    ]
    assert ranks == fitting[-1]


def test_budget_in_percent_is_taken_of_the_model() -> None:
    found = spectra(4, 9)
    half: dict[str, Any] = Rule.parse("budget:50%").decide(found, cost, 16).ranks
    assert half == Rule.parse("budget:8").decide(found, cost, 0).ranks
    assert half != Rule.parse("budget:100%").decide(found, cost, 16).ranks
