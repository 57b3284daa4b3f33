"""Rules read from text, the ranks that follow from them, and what holds for every spectrum."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sarac.ir.adapters import MoSara, Sara
from sarac.ir.errors import PlanError
from sarac.ir.gram import spectrum
from sarac.ir.methods import trainable_count
from sarac.ir.rule import Override, Rule
from sarac.ir.spectrum import Spectrum


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


def test_budget_in_percent_is_taken_of_the_model() -> None:
    found = spectra(4, 9)
    half: dict[str, Any] = Rule.parse("budget:50%").decide(found, cost, 16).ranks
    assert half == Rule.parse("budget:8").decide(found, cost, 0).ranks
    assert half != Rule.parse("budget:100%").decide(found, cost, 16).ranks


# Laws: what holds for all spectra, methods and options.

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=5)
SEEDS, SHARES = st.integers(0, 99), st.floats(0.01, 1.0)
EDGES = st.sampled_from(["", ",multiple=2", ",multiple=4", ",min=3", ",max=5", ",min=2,max=9,multiple=3"])


def routed(name: str, rank: int) -> int:
    return trainable_count(MoSara(rank, sets=3), (99, 99))


def narrow(name: str, rank: int) -> int:
    return trainable_count(MoSara(rank, bottleneck=2), (99, 99))


COSTS = st.sampled_from([cost, routed, narrow])
Cost = Callable[[str, int], int]


def spent(ranks: Mapping[str, int], cost: Cost) -> int:
    return sum(cost(name, rank) for name, rank in ranks.items())


def twin(found: dict[str, Spectrum]) -> dict[str, Spectrum]:
    """With equal ones, whose ranks change at the same share."""
    return {**found, **{f"{name} again": one for name, one in found.items()}}


@given(SIZES, SEEDS, st.integers(1, 200), EDGES, COSTS)
def test_budget_is_the_largest_threshold_that_fits(sizes: list[int], seed: int, budget: int, edges: str, cost: Cost) -> None:
    found, plain = twin(spectra(*sizes, seed=seed)), Rule.parse(f"threshold:1{edges}")
    # k changes behind a share that the first k values reach, so these are all the totals that a threshold can have
    behind = sorted({min(1.0, float(share) + 1e-9) for one in found.values() for share in one.shares()} | {1e-9})
    totals = {t: spent(Rule.parse(f"threshold:{t:.17f}{edges}").decide(found, cost, 0).ranks, cost) for t in behind if t > 0}
    fitting = [total for total in totals.values() if total <= budget]
    rule = Rule.parse(f"budget:{budget}{edges}")
    if not fitting:
        with pytest.raises(PlanError, match="fits nothing"):
            rule.decide(found, cost, 0)
        return
    decided = rule.decide(found, cost, 0)
    assert spent(decided.ranks, cost) == max(fitting)
    threshold = decided.note.partition(";")[0]
    assert Rule.parse(threshold + edges).decide(found, cost, 0).ranks == decided.ranks
    assert decided.note.endswith(f"; {budget - max(fitting):,} of {budget:,} numbers left over")
    assert plain.decide(found, cost, 0).ranks == decided.ranks or max(totals.values()) > budget


@given(SIZES, SEEDS, SHARES, EDGES, COSTS)
def test_uniform_is_the_largest_rank_within_what_it_is_like(
    sizes: list[int], seed: int, share: float, edges: str, cost: Cost
) -> None:
    found = spectra(*sizes, seed=seed)
    like = spent(Rule.parse(f"threshold:{share:.4f}{edges}").decide(found, cost, 0).ranks, cost)
    decided = Rule.parse(f"uniform:like=threshold:{share:.4f}{edges}").decide(found, cost, 0)
    fixed = [spent(Rule.parse(f"rank:{k}{edges}").decide(found, cost, 0).ranks, cost) for k in range(1, max(sizes) + 1)]
    assert spent(decided.ranks, cost) == max(total for total in fixed if total <= like)
    whole = {rank for name, rank in decided.ranks.items() if rank < found[name].full_rank}
    assert len(whole) <= 1
    assert f"; {like - spent(decided.ranks, cost):,} of the {like:,} numbers of threshold" in decided.note


@given(SIZES, SEEDS, SHARES, st.integers(1, 6), st.integers(1, 9))
def test_multiple_divides_every_rank_but_a_full_one(sizes: list[int], seed: int, share: float, step: int, low: int) -> None:
    found = spectra(*sizes, seed=seed)
    plain = Rule.parse(f"threshold:{share:.4f},min={low}").decide(found, cost, 0).ranks
    ranks = Rule.parse(f"threshold:{share:.4f},min={low},multiple={step}").decide(found, cost, 0).ranks
    for name, one in found.items():
        assert ranks[name] % step == 0 or ranks[name] == one.full_rank
        assert plain[name] <= ranks[name] < plain[name] + step
    capped = Rule.parse(f"threshold:1,max={step * 2 - 1},multiple={step}").decide(found, cost, 0).ranks
    assert all(rank == min(step, found[name].full_rank) or found[name].numerical_rank < step for name, rank in capped.items())


@given(SIZES, SEEDS, st.lists(SHARES, min_size=2, max_size=5), EDGES, st.sampled_from(["threshold", "energy"]))
def test_ranks_grow_with_the_share(sizes: list[int], seed: int, shares: list[float], edges: str, kind: str) -> None:
    found = spectra(*sizes, seed=seed)
    steps = [Rule.parse(f"{kind}:{share:.6f}{edges}").decide(found, cost, 0).ranks for share in sorted(shares)]
    assert all(one[name] <= other[name] for one, other in pairwise(steps) for name in found)
    assume(not edges and max(sizes) > 1)
    most, least = (Rule.parse(f"{kind}:{share}").decide(found, cost, 0).ranks for share in (1.0, 0.01))
    assert most != least


def test_rules_beyond_a_share_are_told() -> None:
    found = spectra(4, 9)
    decided = Rule.parse("uniform:like=rank:5").decide(found, cost, 0)
    assert (decided.ranks, decided.note) == ({"w0": 4, "w1": 5}, "rank 5 everywhere; 0 of the 9 numbers of rank:5 left over")
    like = spent(Rule.parse("budget:9").decide(found, cost, 0).ranks, cost)
    assert spent(Rule.parse("uniform:like=budget:50%").decide(found, cost, 18).ranks, cost) <= like
    assert Rule.parse("uniform:like=budget:1").like == Rule("budget", 1.0) != Rule.parse("uniform:like=budget:2").like
    assert Rule.parse("threshold:0.5").decide(found, cost, 0).note == ""


def test_percent_is_not_rounded_away() -> None:
    found = spectra(40)  # int(29 / 100 * 100) is 28
    assert Rule.parse("budget:29%").decide(found, cost, 100).ranks == Rule.parse("budget:29").decide(found, cost, 0).ranks
    assert Rule.parse("budget:29").decide(found, cost, 0).ranks != Rule.parse("budget:28").decide(found, cost, 0).ranks


def test_budget_counts_what_others_spent() -> None:
    found, rule = spectra(4, 9), Rule.parse("budget:10")
    assert rule.decide(found, cost, 0, spent=4).ranks == Rule.parse("budget:6").decide(found, cost, 0).ranks
    assert rule.decide(found, cost, 0, spent=4).ranks != rule.decide(found, cost, 0).ranks
    with pytest.raises(
        PlanError, match=r"the least that this plan trains is 11\. Overrides and also_train alone take 9\. Give that much"
    ):
        rule.decide(found, cost, 0, spent=9)


def test_budget_asks_for_no_second_measurement() -> None:
    """Bounded values leave k undecided at their own shares; the threshold that is found lies off them."""

    def never(reason: str) -> Spectrum:
        raise AssertionError(reason)

    values = [torch.rand(50, dtype=torch.float64).sort(descending=True).values for _ in range(4)]
    exact = {f"w{i}": Spectrum(each, 1e-12) for i, each in enumerate(values)}
    bounded = {f"w{i}": Spectrum(each, 1e-12, errors=each * 1e-11, refine=never) for i, each in enumerate(values)}
    with pytest.raises(AssertionError, match="within the error"):
        bounded["w0"].rank_at(float(bounded["w0"].shares()[7]))
    for budget in (10, 57, 111):
        rule = Rule.parse(f"budget:{budget}")
        assert rule.decide(bounded, cost, 0) == rule.decide(exact, cost, 0)


# Overrides.


def test_override_is_read_behind_semicolons() -> None:
    rule = Rule.parse(
        "threshold:0.6,min=4,multiple=2,train=factors; *.a = rank:8 ;*.b=none;*.c=energy:0.5,max=8,method=mosara,sets=2;"
    )
    assert rule.overrides == (
        Override("*.a", Rule("rank", 8.0, multiple=2, options={"train": "factors"})),
        Override("*.b", None),
        Override("*.c", Rule("energy", 0.5, high=8, multiple=2, options={"sets": "2"}), "mosara"),
    )
    assert (rule.low, rule.multiple) == (4, 2)
    assert [rule.governing([name]) for name in ("x.a", "x.b", "x.d")] == [0, 1, None]
    assert Rule.parse("rank:1; *=rank:2; x.*=rank:3").governing(["x.a"]) == 1
    assert Rule.parse("rank:1; x.*=rank:3; *=rank:2").governing(["x.a"]) == 1
    assert Rule.parse("rank:1; x.*=rank:3; y.*=rank:2").governing(["x.a", "z.a"]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank:2; *.a", "'\\*\\.a' is not understood: write GLOB=RULE"),
        ("rank:2; *.a=", "write GLOB=RULE"),
        ("rank:2; =rank:3", "write GLOB=RULE"),
        ("rank:2; *.a=rank:0", "at least 1"),
        ("rank:2; *.a=nothing", "'nothing' is not understood"),
        ("rank:2; *.a=rank:2,method=lora", "'lora' in the override .* is unknown"),
        ("uniform:like=", "uniform:like="),
        ("uniform:like=share:1", "share:1"),
        ("uniform:0.5", "uniform:0.5"),
        ("uniform:like=threshold:2", r"\(0, 1\]"),
        ("rank:2,multiple=0", "multiple=0 is not possible"),
        ("rank:2,multiple=x", "multiple=x is not possible"),
        ("rank:2,max=7,multiple=8", "leave no rank.*rounded to multiples of 8"),
        ("rank:2,min=9,max=15,multiple=8", "leave no rank"),
    ],
)
def test_faulty_override_and_shape_are_told(text: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        Rule.parse(text)
