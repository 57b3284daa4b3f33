"""Weights at the ends of float64 and of what counts as zero: right ranks, and a word on what is left out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import llama

import sarac
from sarac.ir.gram import factors, spectrum


@pytest.mark.parametrize("size", [1e307, 1e200, 1.0, 1e-200, 1e-310])
def test_the_size_of_a_weight_does_not_change_its_ranks(size: float) -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).double()
    for share in (0.05, 0.3, 0.6, 0.9, 0.99):
        assert spectrum(weight * size).rank_at(share) == spectrum(weight).rank_at(share)
        assert spectrum(weight * size).rank_at_energy(share) == spectrum(weight).rank_at_energy(share)
    assert spectrum(weight * size).rank_at(0.6) != spectrum(weight * size).rank_at(0.9)


def test_a_denormal_model_is_analyzed_and_transformed() -> None:
    model = nn.Sequential(nn.Linear(8, 8).double(), nn.Linear(8, 4).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(8, 8).double() * 1e-310)
    assert sarac.analyze(model).rows()[0]["ranks"]["0.6"] >= 1
    u, s, v, _ = factors(model[0].weight.detach(), 8)
    assert bool(s[0] > 0)
    assert torch.allclose((u * s) @ v / s[0], model[0].weight.detach() / s[0], atol=1e-4)


def spiked(size: float, n: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    return torch.randn(n, n, generator=generator) / n**0.5 + size * torch.outer(u / u.norm(), v / v.norm())


def test_values_that_count_as_zero_are_told_of_where_they_are_much_of_the_sum() -> None:
    plain, much = spectrum(spiked(1.0)), spectrum(spiked(30_000.0))
    values = np.linalg.svd(spiked(30_000.0).double().numpy(), compute_uv=False)
    below = values[values <= much.floor].sum() / values.sum()
    assert below > 1e-3
    assert f"values that count as zero are {below:.2g} of its sum" in much.note
    assert plain.note == ""
    assert spectrum(torch.zeros(3, 4)).note == "it is zero"
    analysis = sarac.analyze(nn.Sequential(nn.Linear(256, 256)).requires_grad_(False))
    assert "count as zero" not in analysis.to_json()


def test_an_fp8_weight_is_measured_and_not_transformed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].weight = nn.Parameter(torch.randn(8, 8).to(torch.float8_e4m3fn), requires_grad=False)
    assert len(sarac.analyze(model).rows()) == 2
    with pytest.raises(sarac.RewriteError, match=r"0\.weight is stored as float8_e4m3fn.*\.to\(torch\.bfloat16\)"):
        sarac.transform(model)
    sarac.transform(model, where="1.weight")


def test_a_budget_holds_what_is_trained_whole() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    alone, both = sarac.plan(model, "budget:48"), sarac.plan(model, "budget:48", also_train="*.bias")
    assert sum(alone.trainable.values()) > sum(both.trainable.values())
    trained = sarac.transform(model, both)
    assert sum(p.numel() for p in trained.parameters() if p.requires_grad) <= 48
    with pytest.raises(sarac.PlanError, match="also_train alone take 32"):
        sarac.plan(model, "budget:33", also_train="*.bias")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "is not JSON"),
        (
            '{"sarac_plan": 2, "sites": {"a": {"method": "mosra", "rank": 3, "train": "factors"}}}',
            "'mosra': .* Near names: mosara",
        ),
        ('{"sarac_plan": 2, "sites": {"a": {"method": "sara", "rank": ' + "9" * 5000 + "}}}", "is not JSON"),
    ],
)
def test_plans_that_no_parser_takes(text: str, said: str) -> None:
    with pytest.raises(sarac.PlanError, match=said):
        sarac.Plan.from_json(text)


def test_further_wrong_words(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(sarac.PlanError, match="is no text in UTF-8"):
        sarac.Plan.load(tmp_path / "plan.json")
    model = nn.Sequential(nn.Linear(8, 8))
    for rule, said in (("threshold:0.6,min=²", "a whole number"), ("threshold:0.6,mim=3", "min")):
        with pytest.raises(sarac.PlanError, match=said):
            sarac.plan(model, rule)
    with pytest.raises(sarac.PlanError, match="A threshold is a share"):
        sarac.analyze(model, threshold="0.6")  # type: ignore[arg-type]
    with pytest.raises(sarac.PlanError, match="holds no weight to adapt"):
        sarac.transform(model, sarac.Plan({}))


def test_a_threshold_is_shown_as_it_was_given() -> None:
    analysis = sarac.analyze(nn.Sequential(nn.Linear(40, 40)), threshold=0.9000001)
    assert "0.9000001" in analysis.rows()[0]["ranks"]
    assert analysis.plan.rule == "threshold:0.9000001"


def test_a_shard_that_lies_about_a_shape(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    sarac.analyze(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    save_file({**tensors, name: tensors[name].T.contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(sarac.CheckpointError, match=rf"{name} of shape \(16, 24\), and the model of config.json has \(24, 16\)"):
        sarac.analyze(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    with pytest.raises(sarac.CheckpointError, match="header is no JSON"):
        sarac.analyze(tmp_path)
