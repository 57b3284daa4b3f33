"""The cost model: what it counts, what it chooses, and where its rates come from."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from sarac.ir.cost import LARGEST, NAMES, Call, Rates, forget_rates, keep_rates, rates_of, rates_or_counts, schedule_at
from sarac.ir.errors import SaracError

FAST = Rates(0.0, math.inf, ((1, 1e12),), ((1, 1e12),))  # operations alone, as where nothing was measured


def test_counts_are_those_of_the_products() -> None:
    t, m, n, k = 8192, 2048, 5632, 614
    call = Call(t, m, n, k)
    assert call.floor(FAST) * 1e12 == pytest.approx(4 * t * m * n)
    assert call.seconds("two-sided", FAST) * 1e12 == pytest.approx(4 * t * k * (m + n))
    assert call.seconds("right", FAST) * 1e12 == pytest.approx(8 * t * k * n)
    assert call.seconds("left", FAST) * 1e12 == pytest.approx(8 * t * k * m)
    assert call.seconds("materialised", FAST) * 1e12 == pytest.approx(4 * t * k * m + 2 * k * m * n)
    assert call.seconds("rebuilt", FAST) * 1e12 == pytest.approx(4 * t * k * m + 4 * k * m * n)


@pytest.mark.parametrize(
    ("call", "best"),
    [
        (Call(8192, 2048, 2048, 614), "rebuilt"),  # with its projection and factors more than half an input
        (Call(16384, 2048, 2048, 614), "materialised"),
        (Call(64, 2048, 2048, 614), "right"),  # a weight is dear for so few tokens
        (Call(64, 512, 2048, 154), "left"),
        (Call(64, 2048, 512, 154), "right"),
        (Call(8192, 2048, 2048, 614, routed=True), "right"),
        (Call(8192, 512, 2048, 154, routed=True), "left"),
        (Call(8192, 512, 2048, 154, routed=True, biased=True), "two-sided"),
    ],
)
def test_choice_follows_the_operations(call: Call, best: str) -> None:
    assert call.best(FAST) == best
    assert schedule_at(call.tokens, call.steps(FAST)) == best


def test_bias_rules_out_what_is_taken_from_outputs() -> None:
    call = Call(8192, 2048, 5632, 614)
    biased, t, k = replace(call, biased=True), 8192, 614
    assert set(call.choices) - set(biased.choices) == {"left"}
    more = biased.seconds("materialised", FAST) - call.seconds("materialised", FAST)
    assert more * 1e12 == pytest.approx(2 * t * k * (5632 - 2048))  # V x on the larger side
    tall = Call(8192, 5632, 2048, 614)
    assert replace(tall, biased=True).seconds("materialised", FAST) == tall.seconds("materialised", FAST)


def test_factors_that_train_take_their_products_and_keep_the_input() -> None:
    call = Call(512, 2048, 1024, 32)
    trains = replace(call, factors=True)
    assert trains.choices == ("two-sided",)
    assert trains.kept("two-sided") - call.kept("two-sided") == 512 * 1024 * 2
    more = trains.seconds("two-sided", FAST) - call.seconds("two-sided", FAST)
    assert more * 1e12 == pytest.approx(2 * 512 * 32 * (2048 + 1024))


def test_scores_of_sets_are_kept() -> None:
    call = Call(512, 2048, 1024, 32, routed=True)
    assert replace(call, sets=5).kept("right") - call.kept("right") == 4 * 512 * 5


def test_steps_cover_all_numbers_of_tokens() -> None:
    steps = Call(1, 2048, 2048, 614).steps(FAST)
    limits = [limit for limit, _ in steps]
    assert limits == sorted(set(limits))
    assert limits[-1] == LARGEST
    assert [name for _, name in steps] == [
        "right",
        "rebuilt",
        "materialised",
    ]  # dear for few tokens, and large to keep
    assert schedule_at(10 * LARGEST, steps) == steps[-1][1]
    assert schedule_at(1, steps) == steps[0][1]


def test_weight_that_is_more_than_half_an_input_is_not_kept() -> None:
    few = Call(3000, 4096, 4096, 300)
    assert few.kept("materialised") + few.stored > few.tokens * few.inner // 2 * few.size
    assert min(NAMES, key=lambda name: few.seconds(name, FAST)) == "materialised" != few.best(FAST)
    assert replace(few, tokens=12000).best(FAST) == "materialised"
    assert few.kept("rebuilt") == few.kept("right") == 3000 * 300 * 2


def test_compiled_call_may_keep_more() -> None:
    edge = Call(10000, 4096, 4096, 300)
    assert edge.best(FAST) != replace(edge, compiled=True).best(FAST) == "materialised"
    assert replace(edge, tokens=3000, compiled=True).best(FAST) != "materialised"


def test_launches_and_bytes_count() -> None:
    call, slow = Call(64, 256, 256, 16), Rates(1e-3, 1e9, ((1, 1e12),), ((1, 1e12),))
    assert call.seconds("rebuilt", slow) == pytest.approx(call.seconds("materialised", slow) + 3e-3, rel=0.1)  # kernels more
    assert slow.product(64, 256, 16, 2) == pytest.approx(1e-3 + (64 * 256 + 256 * 16 + 64 * 16) * 2 / 1e9)


def test_rates_are_kept_by_device_and_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SARAC_CACHE", str(tmp_path))
    forget_rates()
    assert rates_of("a device", "float32") is None
    assert rates_or_counts("a device", "float32") == FAST
    one, other = Rates(1e-6, 1e11, ((1, 1e9), (64, 1e12)), ((8, 2e9),)), Rates(2e-6, 1e11, ((1, 1e9),), ((8, 2e9),))
    keep_rates(tmp_path, "a device", {"float32": one})
    keep_rates(tmp_path, "a device", {"bfloat16": other})
    assert (rates_of("a device", "float32"), rates_of("a device", "bfloat16")) == (one, other)
    assert rates_of("another", "float32") is None
    (tmp_path / "tune.json").write_text("{")
    forget_rates()
    with pytest.raises(SaracError, match="delete it, then run `sarac tune`"):
        rates_of("a device", "float32")
    monkeypatch.setenv("SARAC_CACHE", "off")
    forget_rates()
    assert rates_of("a device", "float32") is None
    forget_rates()


def test_rate_between_two_is_between_them() -> None:
    rates = Rates(0.0, math.inf, ((1, 1e12),), ((8, 1e9), (32, 4e9)))
    assert 2 * 1e6 * 64 * 16 / rates.product(10**6, 64, 16, 4) == pytest.approx(2e9)
    assert 2 * 1e6 * 64 * 4 / rates.product(10**6, 64, 4, 4) == pytest.approx(1e9)  # below the first, the first's


def test_weight_is_kept_for_the_fewest_tokens_of_a_range_or_for_none() -> None:
    for rank in range(300, 560, 20):
        call = Call(8192, 2048, 2048, rank)
        assert schedule_at(8192, call.steps(FAST)) != "materialised" or call.fits, rank
    assert not Call(8192, 2048, 2048, 400).fits
    assert replace(Call(8192, 2048, 2048, 400), tokens=12288).fits  # in the middle of the range it would be
