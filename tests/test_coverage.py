"""A sample of what the coverage benchmark runs: 40 types of transformers, a few families of timm, and what it must refuse."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import coverage, families, judge, plain, tiny
from torch import Tensor, nn

import sarac
from sarac.ir.layers import adapted

# Chosen for their difference: encoders, decoders, encoder-decoders, experts, state spaces, vision, audio, several modalities.
TYPES = """
    bert albert deberta-v2 electra longformer big_bird xlnet mpnet gpt2 gptj llama gemma3_text gpt_neox bloom t5 bart longt5
    mixtral qwen3_moe deepseek_v3 gpt_oss mamba mamba2 jamba rwkv vit poolformer convnext segformer dpt vitdet dinov2 hiera
    wav2vec2 whisper vilt llava qwen3_vl git patchtst
""".split()
TIMM = "efficientnet mlp_mixer resnet vision_transformer".split()


def require_right(row: judge.Row) -> None:
    assert row.outcome == judge.RIGHT, f"{row.outcome}: {row.reason}"


@pytest.mark.parametrize("name", TYPES)
def test_transformers_type(name: str) -> None:
    row = coverage.run("transformers", name)
    require_right(row)
    assert row.sites > 0


@pytest.mark.parametrize("name", TIMM)
def test_timm_family(name: str) -> None:
    pytest.importorskip("timm")
    require_right(coverage.run("timm", name))


@pytest.mark.parametrize(
    "name", [name for name, case in plain.CASES.items() if case.refused or name in ("Linear", "half of it zeros")]
)
def test_plain_case(name: str) -> None:
    require_right(coverage.run("plain", name))


def test_every_type_and_family_is_a_case() -> None:
    known = coverage.cases()
    assert len(known) == len(set(known))
    assert {name for family, name in known if family == "transformers"} >= {"llama", "bert", "t5", "whisper"}
    assert coverage.cases(["plain:Linear", "ll?ma"]) == [("transformers", "llama"), ("plain", "Linear")]


def verdict(model: nn.Module, example: Any) -> judge.Row:
    return judge.judge(judge.Row("plain", "by hand"), model.eval(), example)


def pair() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))


def switched_off(*paths: str) -> Callable[..., nn.Module]:
    """`transform`, with the adapters of these modules then bypassed."""
    real = sarac.transform

    def transform(*args: Any, **options: Any) -> nn.Module:
        model = real(*args, **options)
        for path, _, state in adapted(model):
            state.enabled = path not in paths
        return model

    return transform


@pytest.mark.parametrize(
    ("paths", "said"), [(("0", "2"), "change nothing"), (("0",), "0.weight: its adapter has no effect"), (("2",), "2.weight")]
)
def test_adapter_without_effect_is_wrong(paths: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 6)
    require_right(verdict(pair(), x))
    monkeypatch.setattr(judge.sarac, "transform", switched_off(*paths))
    monkeypatch.setattr(judge.Judged, "folded", lambda self: None)
    row = verdict(pair(), x)
    assert row.outcome == judge.WRONG
    assert said in row.reason


def spoiled(model: nn.Module) -> nn.Module:
    """`fold`, with one number of the result changed."""
    merged = REAL_FOLD(model)
    merged.get_parameter("2.weight").data[0, 0] += 0.1
    return merged


REAL_FOLD = sarac.fold


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (spoiled, "folded outputs differ"),
        (lambda model: nn.Sequential(*REAL_FOLD(model), nn.Identity()), "changed classes"),
    ],
)
def test_fold_that_is_off_is_wrong(broken: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge.sarac, "fold", broken)
    row = verdict(pair(), torch.randn(3, 6))
    assert row.outcome == judge.WRONG
    assert said in row.reason


class Shifting(nn.Linear):
    """Gives something else at every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_model_that_is_not_itself_is_not_judged() -> None:
    row = verdict(Shifting(4, 4), torch.randn(2, 4))
    assert row.outcome == judge.UNUSABLE
    assert "two calls" in row.reason


@pytest.mark.parametrize(("rows", "share"), [("rr", 1.0), ("rf", 0.5), ("ru", 1.0), ("uu", 1.0), ("rrrw", 0.75), ("c", 0.0)])
def test_share_leaves_out_only_what_cannot_run(rows: str, share: float) -> None:
    outcomes = {"r": judge.RIGHT, "f": judge.REFUSED, "u": judge.UNUSABLE, "w": judge.WRONG, "c": judge.CRASHED}
    assert coverage.share([judge.Row("plain", str(i), outcomes[letter]) for i, letter in enumerate(rows)]) == share


def test_death_and_hang_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def fate(family: str, name: str, *_: Any) -> judge.Row:
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        while name == "hangs":
            pass
        return judge.Row(family, name, judge.RIGHT)

    monkeypatch.setattr(coverage, "run", fate)
    todo = [("plain", name) for name in ("dies", "hangs", "lives")]
    rows = {row.name: row for row in coverage.run_all(todo, 2, 2.0, onnx=False, build_only=False)}
    assert {name: row.outcome for name, row in rows.items()} == {
        "dies": judge.CRASHED, "hangs": judge.CRASHED, "lives": judge.RIGHT,
    }  # fmt: skip
    assert "no result after 2 s" in rows["hangs"].reason
    assert "died" in rows["dies"].reason


def test_command_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    monkeypatch.setattr(
        "sys.argv", ["coverage.py", "--only", "plain:Linear", "plain:LayerNorm alone", "-j", "1", "--out", str(out)]
    )
    coverage.main()
    assert [(row["name"], row["outcome"]) for row in json.loads(out.read_text())] == [
        ("Linear", judge.RIGHT), ("LayerNorm alone", judge.RIGHT),
    ]  # fmt: skip
    assert "100.0%" in capsys.readouterr().out


def test_tiny_models_are_tiny() -> None:
    built = tiny.build("llama")
    assert sum(p.numel() for p in built.model.parameters()) < 100_000
    with pytest.raises(tiny.CannotBuild):
        tiny.build("sam_mask_decoder")
    assert families.LARGEST >= tiny.LARGEST
