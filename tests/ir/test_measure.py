"""Measuring for a rule: one decomposition a weight gives its values and its vectors, and no more than the rule asks for."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zoo import llama, mlp

import sarac
from sarac.ir import cache, measure
from sarac.ir.record import record_of


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The decompositions on the CPU, by their names."""
    seen: list[str] = []
    for library, name in [(np.linalg, "eigh"), (np.linalg, "eigvalsh"), (torch.linalg, "svd"), (torch.linalg, "svdvals")]:
        inner = getattr(library, name)

        def counted(*args: Any, name: str = name, inner: Any = inner, **kwargs: Any) -> Any:
            seen.append(name)
            return inner(*args, **kwargs)

        monkeypatch.setattr(library, name, counted)
    return seen


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: adapter.rank for name, adapter in record_of(model).plan.sites.items()}


@pytest.mark.parametrize("plan", ["threshold:0.6", "energy:0.9,multiple=4", "rank:3", "threshold:0.3; *.q_proj.weight=rank:2"])
def test_a_rule_that_decides_alone_decomposes_each_weight_once(plan: str, decomposed: list[str]) -> None:
    model = llama()
    adapted = sarac.transform(model, plan)
    assert decomposed == ["eigh"] * len(ranks(adapted))
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, model(ids).logits)


def test_values_alone_are_measured_where_no_vectors_are_needed(decomposed: list[str]) -> None:
    sarac.analyze(mlp(6, 8, 5))
    random = sarac.transform(mlp(6, 8, 5), "rank:2,train=factors,init=random")
    assert set(decomposed) == {"eigvalsh"}
    assert ranks(random) == {"0.weight": 2, "2.weight": 2}


def test_a_rule_over_all_weights_decomposes_for_the_vectors_again(decomposed: list[str]) -> None:
    sarac.transform(mlp(6, 8, 5), "budget:8")
    assert decomposed.count("eigh") == 2
    assert 1 <= decomposed.count("eigvalsh") <= 2  # equal small shapes go together


def test_the_kept_vectors_are_those_of_a_plan_that_has_none(decomposed: list[str]) -> None:
    model = llama()
    kept = sarac.transform(model, "threshold:0.5")
    again = sarac.transform(model, record_of(kept).plan)
    for (name, one), (_, other) in zip(kept.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    torch.manual_seed(1)
    other = sarac.transform(llama(), record_of(kept).plan)
    assert any(not torch.equal(a, b) for a, b in zip(kept.parameters(), other.parameters(), strict=True))


def test_a_stack_keeps_the_vectors_of_each_matrix(decomposed: list[str]) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("ebi,eoi->ebo", x, self.w)

    model, x = Experts(), torch.randn(3, 4, 5)
    adapted = sarac.transform(model, "threshold:0.6")
    assert decomposed == ["eigh"]
    assert torch.equal(adapted(x), model(x))
    again = sarac.transform(model, record_of(adapted).plan)
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kept", [False, True])
def test_a_small_share_is_certified_and_decomposes_nothing(
    kept: bool, decomposed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("SARAC_CACHE", str(tmp_path) if kept else "off")
    monkeypatch.setattr(measure, "worthwhile", lambda weight, share: share <= 0.06)
    model = mlp(130, 140, 120)
    adapted = sarac.transform(model, "threshold:0.05")
    assert decomposed == []
    assert sum(path.name.endswith(".safetensors") for path in tmp_path.iterdir()) == (4 if kept else 0)
    again = sarac.transform(model, "threshold:0.05")
    assert decomposed == []
    x = torch.randn(2, 130)
    assert torch.equal(adapted(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), again.parameters(), strict=True))
    monkeypatch.setattr(measure, "worthwhile", lambda weight, share: False)
    with cache.switched(False):
        exact = sarac.transform(model, "threshold:0.05")
    assert ranks(exact) == ranks(adapted)
    factors = {name: one.detach() for name, one in adapted.named_parameters() if one.ndim == 2}
    assert len(factors) == 2 + 4
    for name, one in factors.items():
        other = exact.state_dict()[name]
        assert float((one - other).norm()) <= 1e-4 * float(other.norm()), name
    assert set(decomposed) == {"eigh"}


def test_a_rank_that_is_shaped_further_is_not_certified(decomposed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "worthwhile", lambda weight, share: True)
    sarac.transform(mlp(130, 140), "threshold:0.05,multiple=8")
    assert decomposed == ["eigh"]
