"""Exports with the engine genai: held against torch as ONNX files are, in logits and in tokens, or refused in a sentence."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from typer.testing import CliRunner
from zoo import adapt, close, folded, mlp, shake

import sarac
from sarac import CheckFailed, ExportError, InputError, NotFoldable, RewriteError, SaracWarning, serving
from sarac.backends import genai
from sarac.cli import app
from sarac.ir import check

END = 1


def llama(**options: Any) -> nn.Module:
    """Heads of 16, the least that the runtime's attention takes; weights so large that it does not repeat one word."""
    plain = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": END, "initializer_range": 0.3}
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=48, **{**plain, **options},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(3)
    return shake(adapt(llama()))


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """The folder of a tokenizer."""
    kept = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    kept.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the package: torch runs what was written, and `off` and `told` spoil what it gives."""
    made = SimpleNamespace(off=0.0, told=lambda ids, given: ids, seen=[], options={})

    def write(model: nn.Module, folder: Path, *, verify: Any, metadata: Any, **options: Any) -> tuple[Path, ...]:
        folder.mkdir()
        made.model, made.options = model, options
        verify(folder)
        return (folder,)

    def logits(folder: Path, ids: Tensor, provider: str) -> Tensor:
        made.seen.append(ids)
        found = made.model(ids).logits
        return found + made.off * found.std()

    def generate(folder: Path, ids: Tensor, count: int, provider: str) -> Tensor:
        plain = {"do_sample": False, "max_new_tokens": count}
        return made.told(made.model.generate(ids, attention_mask=torch.ones_like(ids), **plain), ids.shape[1])

    monkeypatch.setattr(genai, "known", lambda model: "")
    monkeypatch.setattr(genai, "special", lambda folder: (0, (END,)))
    monkeypatch.setattr(serving.onnx_file, "write_metadata", lambda path, entries: made.seen.append(entries))
    for name, stand_in in (("write", write), ("logits", logits), ("generate", generate)):
        monkeypatch.setattr(genai, name, torch.no_grad()(stand_in))
    return made


def export(model: nn.Module, folder: Path, **options: Any) -> sarac.ExportReport:
    return sarac.export(model, folder, engine="genai", **options)


def test_what_is_written_is_the_merged_model(engine: SimpleNamespace, trained: nn.Module, words: Path, tmp_path: Path) -> None:
    report = export(trained, tmp_path / "out", tokenizer=words)
    assert report.merged
    assert report.dtype == "float32"
    assert 0 < report.surviving_delta[1] < 1e-5
    assert [row.inputs for row in report.comparisons] == ["input_ids: int64[1, 19]", "input_ids: int64[3, 14]"]
    assert all(0 < row.onnx_error == row.merged_error < check.gate(torch.float32) for row in report.comparisons)
    assert engine.options["dtype"] == "fp32"
    assert engine.options["tokenizer"].vocab_size == 2
    noted = json.loads(engine.seen[-1]["sarac.verification"])
    assert (noted["merged"], len(noted["comparisons"])) == (True, 2)
    assert all(not (ids == 0).any() for ids in engine.seen[:-1])  # the id that the runtime takes for no text
    plain = export(llama(), tmp_path / "plain", tokenizer=words)
    assert (plain.merged, plain.error) == (False, 0.0)


def test_logits_that_are_off_fail(engine: SimpleNamespace, trained: nn.Module, words: Path, tmp_path: Path) -> None:
    gate = check.gate(torch.float32)
    engine.off = 2 * gate
    with pytest.raises(CheckFailed, match=r"differ at \['logits'\]"):
        export(trained, tmp_path / "out", tokenizer=words)
    engine.off = gate / 2
    assert gate / 4 < export(trained, tmp_path / "there", tokenizer=words).error < gate


def test_adapters_that_were_not_trained_fail(engine: SimpleNamespace, words: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"identical to the last bit.*train it first"):
        export(adapt(llama()), tmp_path / "out", tokenizer=words)


def test_a_folder_that_does_not_run_is_the_builders_fault(
    engine: SimpleNamespace, trained: nn.Module, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, ids: Tensor, provider: str) -> Tensor:
        raise InputError("cos_cache is too wide.")

    with monkeypatch.context() as patched:
        patched.setattr(genai, "logits", broken)
        with pytest.raises(ExportError, match=r"made of LlamaForCausalLM does not run: cos_cache is too wide\. .*engine onnx"):
            export(trained, tmp_path / "out", tokenizer=words)
    assert export(trained, tmp_path / "there", tokenizer=words)


@pytest.mark.parametrize("where", [0, 5])
def test_tokens_that_are_not_the_likeliest_fail(
    engine: SimpleNamespace, trained: nn.Module, words: Path, tmp_path: Path, where: int
) -> None:
    def another(ids: Tensor, given: int) -> Tensor:
        changed = ids.clone()
        changed[-1, given + where] = (changed[-1, given + where] + 7) % 38 + 2
        return changed

    engine.told = another
    with pytest.raises(CheckFailed, match=r"not the torch model's likeliest: one lies .* float32 allows 1e-05"):
        export(trained, tmp_path / "out", tokenizer=words)


def test_rows_that_end_early_fail_and_ended_ones_do_not(trained: nn.Module) -> None:
    model, ids = folded(trained), torch.randint(2, 40, (2, 5))
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    require = serving._require_likeliest
    require(model, found, 5, (END,), torch.float32)
    with pytest.raises(CheckFailed, match=r"stopped after 3 of 8 tokens, and not all rows had ended"):
        require(model, found[:, :8], 5, (END,), torch.float32)
    ends = tuple(found[:, 7].tolist())  # had both ended there, nothing were missing, and what follows were no matter
    require(model, found[:, :8], 5, ends, torch.float32)
    padded = torch.cat([found[:, :8], torch.zeros(2, 5, dtype=torch.long)], dim=1)
    require(model, padded, 5, ends, torch.float32)
    with pytest.raises(CheckFailed, match="likeliest"):
        require(model, padded, 5, (END,), torch.float32)


def test_a_coarse_model_is_held_against_its_own_numbers_in_full(
    engine: SimpleNamespace, trained: nn.Module, words: Path, tmp_path: Path
) -> None:
    """bfloat16 sums would be 1000 times further off than float32 allows."""
    model = trained.bfloat16()
    assert export(model, tmp_path / "out", tokenizer=words, dtype="fp32").error < check.gate(torch.float32)
    assert check.coarsest(model) == torch.bfloat16
    assert check.coarsest(engine.model) == torch.float32
    with pytest.raises(ExportError, match=r"bf16 for 'cpu' is nothing.*fp32 for cpu"):
        export(model, tmp_path / "other", tokenizer=words)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opset": 21}, "opset"),
        ({"merge": False, "smoke": True}, r"merge=False \(--routed\), smoke"),
        ({"dynamic": "static", "optimize": "none"}, "dynamic, optimize"),
        ({"external_data": "always"}, "external_data"),
        ({"example_inputs": torch.ones(1, 3, dtype=torch.long)}, r"example inputs \(--input\)"),
    ],
)
def test_options_of_the_other_engine_are_refused(
    engine: SimpleNamespace, trained: nn.Module, words: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ExportError, match=f"builds its own graph: leave out {said}\\."):
        export(trained, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert export(trained, tmp_path / "out", tokenizer=words, merge=True, opset=20)


def test_engines_and_tokenizers_are_checked(engine: SimpleNamespace, trained: nn.Module, words: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="engine='gena' is not known: give one of onnx, genai"):
        sarac.export(trained, tmp_path / "out", engine="gena")
    with pytest.raises(ExportError, match="tokenizer goes into a folder"):
        sarac.export(trained, tmp_path / "out", tokenizer=words)
    with pytest.raises(InputError, match=r"no readable tokenizer in .*nowhere"):
        export(trained, tmp_path / "out", tokenizer=tmp_path / "nowhere")
    with pytest.warns(SaracWarning, match="out gets no tokenizer, and generates from token ids alone"):
        export(trained, tmp_path / "out")
    assert engine.options["tokenizer"] is None


def test_what_cannot_be_merged_is_refused(engine: SimpleNamespace, words: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoldable, match=r"routed here: model\.layers\.0"):
        export(adapt(llama(), method="mosara"), tmp_path / "out", tokenizer=words)
    with pytest.raises(RewriteError, match="carries no adapters"):
        export(llama(), tmp_path / "out", tokenizer=words, merge=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ExportError, match="full holds other things than an earlier export"):
        export(shake(adapt(llama())), tmp_path / "full", tokenizer=words)
    assert not (tmp_path / "out").exists()


def test_without_the_package_it_is_named(trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: find(name, *more) if "genai" not in name else None)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(ExportError, match=r"not installed: pip install 'sarac\[genai\]'"):
        export(trained, tmp_path / "out")
    with pytest.raises(ExportError, match=r"has no genai_config.json: give a folder"):
        sarac.verify(trained, tmp_path)


# --- with the package -----------------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> None:
    pytest.importorskip("onnxruntime_genai")


def run(*given: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in given])


def test_the_command_line_writes_and_verifies(real: None, trained: nn.Module, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sarac.save(trained, tmp_path / "model.pt")
    assert run("export", "--engine", "genai", "--routed", tmp_path / "model.pt", out).exit_code == 1
    assert not out.exists()
    done = run("export", "--engine", "genai", "--tokenizer", words, "--json", tmp_path / "model.pt", out)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["merged"]
    assert {Path(name).name for name in told["files"]} > {"genai_config.json", "model.onnx", "tokenizer.json"}
    assert 0 < told["error"] < check.gate(torch.float32)
    assert run("verify", tmp_path / "model.pt", out).exit_code == 0
    assert run("verify", tmp_path / "model.pt", out, "--input", "input_ids:int64[2,4]").exit_code == 1
    close(genai.logits(out, torch.tensor([[5, 9, 2]])), folded(trained)(torch.tensor([[5, 9, 2]])).logits.detach())
    again = sarac.verify(folded(trained), out)
    assert again.merged
    assert sorted(map(str, again.files)) == sorted(told["files"])
    with pytest.raises(CheckFailed, match="another base"):
        sarac.verify(shake(adapt(llama())), out)
    with pytest.raises(CheckFailed, match=r"differ at \['logits'\]"):
        sarac.verify(llama(), out)


def test_models_that_the_builder_gets_wrong_are_not_left_behind(real: None, words: Path, tmp_path: Path) -> None:
    """It takes every layer with as many outputs as there are words for the head."""
    with pytest.raises(CheckFailed, match=r"differ at \['logits'\]"):
        export(llama(vocab_size=32), tmp_path / "out", tokenizer=words)
    with pytest.raises(ExportError, match=r"does not know Sequential: it takes .*LlamaForCausalLM.* the engine onnx"):
        export(mlp(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["words"]
