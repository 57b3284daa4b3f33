"""Rules read from text, ranks that follow from them, and plans as JSON."""

import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarac.ir import adapters
from sarac.ir.adapters import INITS, SCOPES, TRAINS, MoSara, Sara
from sarac.ir.errors import PlanError
from sarac.ir.methods import METHODS, options
from sarac.ir.plan import _FACTS, _KEYS, Plan

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
        ('{"sarac_plan": 1, "sites": {"a": {"method": "lora", "rank": 3}}}', "unknown method 'lora': it is one of sara, mosara"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "sara"}}}', "a whole rank"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "sara", "rank": 2.5}}}', "a whole rank"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "sara", "rank": true}}}', "a whole rank"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "sara", "rank": 0}}}', "At a: .*rank=0"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "sara", "rank": 1, "sets": 2}}}', "At a: .*no option 'sets'"),
        ('{"sarac_plan": 1, "sites": {"a": {"method": "mosara", "rank": 1, "sets": null}}}', "At a: .*sets=None"),
        ('{"sarac_plan": 1, "also_train": "norm", "sites": {}}', "also_train"),
        ('{"sarac_plan": 1, "also_train": 3, "sites": {}}', "also_train"),
        ('{"sarac_plan": 2, "siblings": ["a"], "sites": {}}', "siblings"),
        ('{"sarac_plan": 2, "alsotrain": [], "sites": {}}', "'alsotrain' that means nothing. Near names: also_train"),
        ('{"sarac_plan": 2, "sites": {"a": {"method": "sara", "rnk": 3}}}', "'rnk' means nothing there. Near names: rank"),
        ('{"sarac_plan": 2, "sites": {"a": {"method": "sara", "rank": 1, "shap": []}}}', "At a: .*'shap'"),
        ('{"sarac_plan": 2, "sites": {"a": {"method": "sara", "rank": 1, "shape": [3]}}}', "shape of a is .out, in."),
        ('{"sarac_plan": 2, "sites": {"a": {"method": ["sara"], "rank": 1}}}', "entry for a needs a method"),
        ('{"sarac_plan": 2, "sites": {"a": {"method": "sara", "rank": 1}, "a": {}}}', "'a' stands twice"),
    ],
)
def test_faulty_plan_is_told_where(text: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        Plan.from_json(text)


def test_plan_of_the_first_format_is_read() -> None:
    old = '{"sarac_plan": 1, "rule": "rank:3", "base": "", "also_train": ["n"], "sites": {"a": {"method": "sara", "rank": 3}}}'
    assert Plan.from_json(old) == Plan({"a": Sara(3)}, "rank:3", ("n",))
    assert Plan.from_json(old.replace('"rank": 3', '"rank": 4')) != Plan({"a": Sara(3)}, "rank:3", ("n",))


def test_plan_tells_what_is_known_and_reads_of_it_what_holds() -> None:
    shapes = {"a": (4, 6), "b": (3, 5, 7)}
    plan = Plan(
        {"a": MoSara(2), "b": Sara(2, parts=(1, 2, 2))}, note="n", shapes=shapes, siblings=(("a", "b"),), hashes={"a": "ff"}
    )
    data = json.loads(plan.to_json())
    assert data["totals"] == {"sites": 2, "trainable": 2 * 5 * 2 + 5}
    assert data["sites"]["a"]["trainable"] == 20
    again = Plan.from_json(plan.to_json())
    assert (again.shapes, again.siblings, again.hashes, again.note) == (shapes, plan.siblings, {"a": "ff"}, "n")
    assert "trainable" not in json.loads(Plan({"a": Sara(1)}).to_json())["totals"]
    edited = plan.to_json().replace('"rank": 2', '"rank": 3')  # what follows from the rank is old then, and is not read
    assert Plan.from_json(edited).trainable["a"] == 30


def test_plan_for_a_weight_of_another_shape_is_refused() -> None:
    plan = Plan({"a": Sara(2)}, shapes={"a": (4, 6)})
    plan.require_fits({"a": (4, 6)})
    with pytest.raises(PlanError, match=r"made for a of shape \(4, 6\), and in the model it is \(4, 7\)"):
        plan.require_fits({"a": (4, 7)})
    Plan({"a": Sara(2)}).require_fits({"a": (4, 7)})


def test_shared_router_is_one_of_the_plan() -> None:
    owner, follower = MoSara(4, router_scope="group"), MoSara(2, router_scope="group", router_of="q")
    plan = Plan({"k": follower, "q": owner}, shapes={"q": (8, 6), "k": (3, 6)})
    assert plan.sites["k"].router_rank == 4 != follower.router_rank
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.trainable == {"q": 40, "k": 10}
    plan.require_fits({"q": (8, 6), "k": (3, 6)})
    with pytest.raises(PlanError, match="At k: router_of is 'q', which has another input"):
        replace(plan, shapes={}).require_fits({"q": (8, 7), "k": (3, 6)})
    for other, said in [
        ({"k": follower, "qq": owner}, "'q', which has no router of its own in this plan. Near names: qq"),
        ({"k": follower, "q": Sara(4)}, "no router of its own"),
        ({"k": follower, "q": replace(follower, router_of="k")}, "no router of its own"),
        ({"k": follower, "q": replace(owner, sets=3)}, "sets is 5, and 3 at q, whose router it shares"),
    ]:
        with pytest.raises(PlanError, match=said):
            Plan(other)
    with pytest.raises(PlanError, match="router_of=q is not possible"):
        MoSara(2, router_of="q")


# The schema of the file, by a reader of as much of JSON Schema as it says.

SCHEMA = json.loads((files("sarac") / "plan.schema.json").read_text(encoding="utf-8"))
KINDS: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int}
KNOWN = set(
    "$schema $defs $ref title description type required additionalProperties properties items anyOf enum minimum minItems "
    "maxItems pattern".split()
)


def faults(value: Any, rule: Any, at: str = "") -> list[str]:
    if "$ref" in rule:
        rule = {**rule, **SCHEMA["$defs"][rule["$ref"].rpartition("/")[2]]}
    assert set(rule) <= KNOWN
    if "anyOf" in rule:
        each = [faults(value, one, at) for one in rule["anyOf"]]
        return [] if [] in each else min(each, key=len)
    if "enum" in rule and value not in rule["enum"]:
        return [f"{at} is {value!r}"]
    kind = KINDS.get(rule.get("type", ""), object)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return [f"{at} is a {type(value).__name__}"]
    found = [f"{at} lacks {key}" for key in rule.get("required", ()) if key not in value]
    found += [f"{at} is below" for _ in "x" if kind is int and value < rule.get("minimum", value)]
    found += [f"{at} does not match" for _ in "x" if kind is str and not re.search(rule.get("pattern", ""), value)]
    if kind is list:
        found += [
            f"{at} is of {len(value)}" for _ in "x" if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", 9**9)
        ]
        found += [fault for i, item in enumerate(value) for fault in faults(item, rule["items"], f"{at}[{i}]")]
    if kind is dict:
        further = rule.get("additionalProperties", True)
        for key, item in value.items():
            inner = rule.get("properties", {}).get(key, further)
            found += [f"{at} has {key}"] if inner is False else faults(item, {} if inner is True else inner, f"{at}.{key}")
    return found


@given(PLANS, st.data())
def test_written_plan_is_of_the_schema(plan: Plan, data: st.DataObject) -> None:
    shapes = {
        name: data.draw(st.sampled_from([(5000, 4096), (2, 4096, 4096)])) for name in plan.sites if data.draw(st.booleans())
    }
    base, siblings = data.draw(st.sampled_from(["", "0" * 64])), (tuple(plan.sites),)
    written = json.loads(
        replace(plan, base=base, shapes=shapes, siblings=siblings, hashes=dict.fromkeys(plan.sites, "0a")).to_json()
    )
    assert faults(written, SCHEMA) == []
    assert faults({**written, "ruel": ""}, SCHEMA) == [" has ruel"]
    assert faults({**written, "sarac_plan": 3}, SCHEMA) == [".sarac_plan is 3"]
    for name, entry in written["sites"].items():
        for wrong in ({**entry, "rank": 0}, {**entry, "rank": []}, {**entry, "rnk": 1}, {"method": entry["method"]}):
            assert faults({**written, "sites": {name: wrong}}, SCHEMA) != []


def test_schema_knows_every_key_and_option() -> None:
    assert set(SCHEMA["properties"]) == set(_KEYS)
    for method in METHODS:
        known = SCHEMA["$defs"][method]["properties"]
        assert set(known) == {"method", "rank", *_FACTS, *options(method)}
    sara, mosara = (SCHEMA["$defs"][method]["properties"] for method in METHODS)
    assert (sara["train"]["enum"], sara["init"]["enum"]) == (list(TRAINS), list(INITS))
    assert mosara["router_scope"]["enum"] == list(SCOPES)
    assert all(re.search(mosara["router"]["pattern"], "topk:2" if name == "topk" else name) for name in adapters.ROUTERS)


def test_plan_for_another_model_is_refused() -> None:
    shapes = {"layers.0.q.weight": (4, 6), "layers.0.k.weight": (2, 6)}
    Plan({"layers.0.q.weight": Sara(4), "layers.0.k.weight": Sara(2)}).require_fits(shapes)
    with pytest.raises(PlanError, match=r"'layers\.0\.qq\.weight', which .* Near names: layers\.0\.q\.weight"):
        Plan({"layers.0.qq.weight": Sara(1)}).require_fits(shapes)
    with pytest.raises(PlanError, match=r"gives layers\.0\.k\.weight rank 3, above min\(out, in\) = 2 .* \(2, 6\): lower it"):
        Plan({"layers.0.k.weight": Sara(3)}).require_fits(shapes)
