"""The command line: every command on a tiny Llama folder and on a factory's model, and every sentence for wrong input."""

import copy
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner
from zoo import bert, close, differ, ids, llama, mlp, outputs, same, shake, trainables

import sarac
from sarac import storage, terminal
from sarac.backends import lora
from sarac.cli import app
from sarac.ir.plan import Plan
from sarac.ir.record import record_of
from sarac.recipe import open_model

COMMANDS = "analyze plan transform finetune diagnose fold export verify fold-onnx convert cache doctor".split()
FACTORIES = """
import torch
from torch import nn

def net(width=8, fill=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))
    if fill is not None:
        nn.init.constant_(model[0].weight, fill)
    return model

def nan():
    return net(fill=float("nan"))

def zero():
    return nn.Sequential(nn.Linear(6, 4)).requires_grad_(False).apply(lambda m: isinstance(m, nn.Linear) and m.weight.zero_())

def norm():
    return nn.LayerNorm(4)

def meta():
    with torch.device("meta"):
        return net()

def number():
    return 3

def broken():
    raise KeyError("nobody expects this")
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with models and data of every kind; tests write elsewhere."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "climodels.py").write_text(FACTORIES)
    letters = [chr(97 + index) for index in range(26)]
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", *letters])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(folder / "llama")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "llama")
    lines = [json.dumps({"text": " ".join((letters + letters)[start : start + 10])}) for start in range(26)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    adapted = shake(sarac.transform(model))
    sarac.save(adapted, folder / "sara.pt")
    sarac.save_adapter(adapted, folder / "sara.safetensors")
    sarac.backends.peft.save(adapted, folder / "lora")
    sarac.save(shake(sarac.transform(model, method="mosara")), folder / "mosara.pt")
    torch.save(mlp(6, 4), folder / "pickled.pt")
    torch.save({"weight": torch.ones(2)}, folder / "foreign.pt")
    (folder / "truncated.pt").write_bytes((folder / "sara.pt").read_bytes()[:9000])
    (folder / "text.pt").write_text("hello, this is no model")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("climodels", None)


def run(*words: Any, status: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.stderr
    return result


def told(*words: Any) -> Any:
    """The one JSON document on stdout."""
    return json.loads(run(*words, "--json").stdout)


def refused(status: int, *words: Any) -> str:
    """The sentence on stderr, nothing on stdout."""
    result = run(*words, status=status)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return str(result.stderr)


# Help.


def unexplained(command: Any) -> list[str]:
    """What of a command has no help."""
    return [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example_that_it_takes(name: str) -> None:
    command: Any = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command = command.commands["make"] if name == "plan" else command
    assert command.help.endswith(".")
    assert unexplained(command) == []
    shown = run(name, "--help").stdout
    assert "Example: sarac" in shown
    assert "name:dtype[sizes]" in shown or "--input" not in shown  # brackets are no markup
    program, called, *words = shlex.split(command.epilog.removeprefix("Example: "))
    assert (program, called) == ("sarac", name)
    assert {word for word in words if word.startswith("--")} <= {o for p in command.params for o in p.opts}
    assert len(command.epilog) < 78


def test_an_option_without_help_is_seen() -> None:
    bare = typer.Typer()

    @bare.command()
    def only(depth: int = 3, width: Annotated[int, typer.Option(help="How wide.")] = 3) -> None: ...

    assert unexplained(typer.main.get_command(bare)) == ["depth"]


def test_the_commands_and_the_version_are_listed() -> None:
    listed = run("--help").stdout
    assert [name for name in COMMANDS if f"\n  {name} " not in listed] == []
    assert "..." not in listed.partition("Commands:")[2]  # no summary is cut off
    assert run("--version").stdout == f"sarac {sarac.__version__}\n"


# The commands.


def test_analyze_shows_what_the_library_measures(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "llama")
    half, most = (told("analyze", work / "llama", "--threshold", share) for share in (0.5, 0.9))
    assert {row["site"]: row["rank"] for row in half["sites"]} == sarac.analyze(model, threshold=0.5).ranks()
    assert most["trainable"] > half["trainable"]
    assert "flops" not in half["sites"][0]
    seen = told("analyze", work / "llama", "--where", "*q_proj*", "--input", "input_ids:int64[2,5]")
    assert [(row["calls"], row["flops"]) for row in seen["sites"]] == [(1, 2 * 10 * 16 * 16)] * 2
    monkeypatch.setenv("COLUMNS", "130")
    shown = run("analyze", work / "llama", "--plot", tmp_path / "k.png")
    assert "14 linear sites" in shown.stdout
    assert "that are left out" in shown.stdout
    assert "the output head" in shown.stdout
    assert "model.layers.*.mlp.down_proj.weight" in shown.stdout
    assert "model.layers.1.mlp.down_proj.weight" in shown.stderr
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")
    by_site = run("analyze", work / "llama", "--sites", "--where", "*.0.mlp.*").stdout
    assert "model.layers.0.mlp.up_proj.weight" in by_site
    assert "`where` leaves it out" in by_site
    assert "model.layers.1.mlp.up_proj.weight" in by_site
    assert "the output head" in by_site


def test_transform_computes_the_same_and_its_plan_does_it_again(work: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(work / "llama")
    first, plan, second = tmp_path / "a.pt", tmp_path / "plan.json", tmp_path / "b.pt"
    words = ("--plan", "rank:3", "--where", "*.mlp.*", "--also-train", "*norm*", "--seed", 5)
    facts = told("transform", work / "llama", "--out", first, "--plan-out", plan, *words)
    adapted = sarac.load(first)
    token = ids()
    same(outputs(adapted, token).logits, outputs(base, token).logits)
    assert (facts["sites"], facts["trainable"]) == (6, 6 * 3 + 5 * 16)
    assert facts["parameters"] == sum(parameter.numel() for parameter in base.parameters())
    again = told("transform", work / "llama", "--out", second, "--plan", plan)
    assert again["trainable"] == facts["trainable"]
    record = record_of(sarac.load(second))
    assert record is not None
    assert record.plan.sites == Plan.load(plan).sites
    other = told("transform", work / "llama", "--out", second, "--plan", "rank:2")
    assert (other["sites"], other["trainable"]) == (14, 28)


def test_the_seed_makes_the_routers(work: Path, tmp_path: Path) -> None:
    def router(name: str, seed: int) -> torch.Tensor:
        out = tmp_path / name
        run("transform", work / "llama", "--out", out, "--method", "mosara", "--where", "*.0.mlp.up*", "--seed", seed)
        model = sarac.load(out)
        return dict(model.named_parameters())[next(name for name in trainables(model) if "router" in name)]

    assert torch.equal(router("a", 1), router("b", 1))
    assert not torch.equal(router("c", 2), router("b", 1))


def test_finetune_learns_keeps_its_base_and_goes_on(work: Path, tmp_path: Path) -> None:
    out, further = tmp_path / "trained.pt", tmp_path / "further.pt"
    words = ("--data", work / "data.jsonl", "--eval-data", work / "data.jsonl", "--batch-size", 13, "--steps", 30)
    first = run("finetune", work / "llama", "--out", out, "--plan", "threshold:1", "--lr", 0.5, *words, "--json")
    facts = json.loads(first.stdout)
    assert facts["eval_loss"][1] < facts["eval_loss"][0] - 0.1
    assert (facts["sites"], facts["steps"], facts["rows"], facts["length"]) == (14, 30, 26, 32)
    assert "Training: 30/30 loss" in first.stderr
    base, adapted = transformers.AutoModelForCausalLM.from_pretrained(work / "llama"), sarac.load(out)
    token = ids()
    differ(outputs(adapted, token).logits, outputs(base, token).logits)
    with sarac.disabled(adapted):
        same(outputs(adapted, token).logits, outputs(base, token).logits)
    more = told("finetune", out, "--out", further, "--lr", 0.1, *words)
    assert more["eval_loss"][0] == pytest.approx(facts["eval_loss"][1], rel=1e-5)
    assert more["eval_loss"][1] < more["eval_loss"][0]
    assert "already" in refused(2, "finetune", out, "--out", further, "--plan", "rank:2", *words)


def test_diagnose_tells_how_a_finetuned_model_does(work: Path, tmp_path: Path) -> None:
    model, words = tmp_path / "tuned.pt", ("--data", work / "data.jsonl")
    run("finetune", work / "llama", "--out", model, "--plan", "threshold:0.6", *words)
    found = told("diagnose", model, *words, "--batch-size", 4)
    assert all(site["grad"] > 0 and site["moved"] > 0 for site in found["sites"])
    assert 0 < found["tokens"] <= 4 * 256
    assert "max |δ|" in run("diagnose", model, *words, "--plot", tmp_path / "sites.png").stdout
    assert (tmp_path / "sites.png").exists()
    assert "carries no adapters" in refused(1, "diagnose", work / "llama", *words)


def test_a_finetuned_model_exports_without_inputs_and_verifies(work: Path, tmp_path: Path) -> None:
    model, onnx = tmp_path / "trained.pt", tmp_path / "out.onnx"
    run("finetune", work / "llama", "--data", work / "data.jsonl", "--out", model, "--epochs", 1, "--lr", 0.1)
    report = told("export", "--merge", model, onnx)
    assert report["merged"]
    assert report["error"] < 1e-5
    assert all(row["merged_error"] < 1e-5 for row in report["comparisons"])
    assert "verified" in run("verify", model, onnx).stdout
    assert "differ" in refused(1, "verify", work / "sara.pt", onnx)


def test_fold_writes_the_adapted_model_as_a_plain_folder(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert "rounding lost at most" in run("fold", work / "sara.pt", "--out", out).stdout
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    base = transformers.AutoModelForCausalLM.from_pretrained(work / "llama")
    token = ids()
    close(outputs(merged, token).logits, outputs(sarac.load(work / "sara.pt"), token).logits)
    differ(outputs(merged, token).logits, outputs(base, token).logits)
    assert transformers.AutoTokenizer.from_pretrained(out)("a b").input_ids == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_fold_leaves_a_full_folder_alone(work: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "no empty folder" in refused(1, "fold", work / "sara.pt", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_routed_model_is_merged_by_its_mean_alone(work: Path, tmp_path: Path) -> None:
    onnx, folder = tmp_path / "out.onnx", tmp_path / "merged"
    for command in (("export", "--merge", work / "mosara.pt", onnx), ("fold", work / "mosara.pt", "--out", folder)):
        sentence = refused(1, *command)
        assert "model.layers.0.mlp.down_proj.weight" in sentence
        assert "without --merge" in sentence
        assert "--routing mean --calibration" in sentence
    assert list(tmp_path.iterdir()) == []
    mean = ("--routing", "mean", "--calibration", work / "data.jsonl")
    folded = run("fold", work / "mosara.pt", "--out", folder, *mean, "--json")
    assert json.loads(folded.stdout)["approximation"] > 0.0
    assert "Warning: fold(routing=" in folded.stderr
    assert "UserWarning" not in folded.stderr
    assert "go together" in refused(2, "fold", work / "mosara.pt", "--out", tmp_path / "x", *mean[:2])
    assert "leave one" in refused(2, "export", "--routed", work / "mosara.pt", onnx, *mean)


def test_a_routed_model_exports_as_its_subgraph(work: Path, tmp_path: Path) -> None:
    model, onnx = tmp_path / "net.pt", tmp_path / "out.onnx"
    words = ("--out", model, "--input", "input:float32[2,6]", "--method", "mosara")
    run("transform", "climodels:net", *words)
    sarac.save(shake(sarac.load(model, "climodels:net")), model)
    report = told("export", model, onnx, "--model", "climodels:net")
    assert not report["merged"]
    assert report["routed"] == ["0.weight", "2.weight"]
    assert report["error"] < 1e-5
    before = onnx.read_bytes()  # what is there stays where nothing better comes
    assert "routed here: 0.weight" in refused(1, "export", "--merge", model, onnx, "--model", "climodels:net")
    assert onnx.read_bytes() == before


def test_a_factorys_model_goes_all_the_way(work: Path, tmp_path: Path) -> None:
    model, onnx, plain = tmp_path / "net.pt", tmp_path / "net.onnx", tmp_path / "plain.pt"
    source = ("climodels:net", "--args", '{"width": 12}')
    run("transform", *source, "--out", model, "--input", "input:float32[2,6]", "--plan", "threshold:1")
    named = ("--model", "climodels:net")
    assert "--model climodels:net" in refused(1, "export", model, onnx)
    assert "identical to the last bit" in refused(1, "export", model, onnx, *named)  # nothing is trained yet
    assert not onnx.exists()
    sarac.save(shake(sarac.load(model, "climodels:net")), model)
    assert told("export", model, onnx, *named)["merged"]
    assert told("verify", model, onnx, *named)["error"] < 1e-5
    assert told("fold", model, "--out", plain, *named)["sites"] == 2
    x = torch.randn(3, 6)
    close(outputs(sarac.load(plain, "climodels:net"), x), outputs(sarac.load(model, "climodels:net"), x))
    assert "goes into a file" in refused(2, "fold", model, "--out", tmp_path / "folder", *named)


def test_a_folder_of_save_pretrained_opens_with_its_adapters(work: Path, tmp_path: Path) -> None:
    adapted: Any = sarac.load(work / "sara.pt")
    adapted.save_pretrained(tmp_path / "adapted")
    run("fold", tmp_path / "adapted", "--out", tmp_path / "merged", "--tokenizer", work / "llama")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    token = ids()
    close(outputs(merged, token).logits, outputs(adapted, token).logits)
    assert "no readable tokenizer" in refused(1, "fold", work / "sara.pt", "--out", tmp_path / "x", "--tokenizer", tmp_path)
    assert not (tmp_path / "x").exists()
    assert "gets no tokenizer" in run("fold", tmp_path / "adapted", "--out", tmp_path / "bare").stderr


def test_a_pickle_opens_for_those_who_trust_it(work: Path) -> None:
    assert "--trust-pickle" in refused(1, "analyze", work / "pickled.pt")
    assert told("analyze", work / "pickled.pt", "--trust-pickle")["sites"][0]["shape"] == [4, 6]


@pytest.mark.parametrize("source", ["sara.pt", "sara.safetensors", "lora"])
@pytest.mark.parametrize("target", ["out.pt", "out.safetensors", "out"])
def test_convert_keeps_the_model_from_every_form_to_every_other(source: str, target: str, work: Path, tmp_path: Path) -> None:
    base, token = transformers.AutoModelForCausalLM.from_pretrained(work / "llama"), ids()
    under = ("--base", work / "llama") if source.endswith("safetensors") else ()  # a PEFT folder names its base itself
    facts = told("convert", work / source, tmp_path / target, *under)
    assert (facts["form"], facts["sites"]) == ({"out.pt": "model", "out": "peft"}.get(target, "adapter"), 14)
    reads = {"model": lambda: sarac.load(tmp_path / target), "adapter": lambda: sarac.load_adapter(base, tmp_path / target)}
    found = reads.get(facts["form"], lambda: sarac.backends.peft.load(base, tmp_path / target))()
    close(outputs(found, token).logits, outputs(sarac.load(work / "sara.pt"), token).logits)
    differ(outputs(found, token).logits, outputs(base, token).logits)
    assert [path.name for path in tmp_path.iterdir()] == [target]


def test_convert_tells_the_layout_the_rank_and_what_it_cut_off(work: Path, tmp_path: Path) -> None:
    whole = told("convert", work / "sara.pt", tmp_path / "a", "--layout", "pattern")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert config["r"] == whole["rank"] > 3
    assert set(whole["truncation"].values()) == {0.0}
    cut = told("convert", work / "sara.pt", tmp_path / "b", "--max-rank", 3)
    assert cut["rank"] == 3
    assert max(cut["truncation"].values()) > 0.01
    assert "cut off at most" in run("convert", work / "lora", tmp_path / "c", "--max-rank", 3).stdout
    assert "cut off" not in run("convert", work / "sara.pt", tmp_path / "d").stdout


def test_convert_takes_any_of_several_adapters_and_says_which(work: Path, tmp_path: Path) -> None:
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(work / "llama")
    model, token = sarac.load_adapter(base, work / "sara.safetensors", name="first"), ids()
    sarac.save_adapter(shake(sarac.transform(base)), tmp_path / "second.safetensors")
    sarac.load_adapter(model, tmp_path / "second.safetensors", name="second")
    sarac.save(model, tmp_path / "both.pt")
    assert "of 'second' alone, not first, with" in run("convert", tmp_path / "both.pt", tmp_path / "live").stdout
    assert told("convert", tmp_path / "both.pt", tmp_path / "other", "--adapter", "first")["adapters"] == ["first", "second"]
    assert "alone" not in run("convert", tmp_path / "both.pt", tmp_path / "again.pt").stdout
    assert sarac.adapters(sarac.load(tmp_path / "again.pt")) == ("second", "first")
    live, other = (outputs(sarac.backends.peft.load(base, tmp_path / name), token).logits for name in ("live", "other"))
    close(live, outputs(model, token).logits)
    close(other, outputs(sarac.load(work / "sara.pt"), token).logits)
    differ(live, other)
    assert "Near names: first" in refused(1, "convert", tmp_path / "both.pt", tmp_path / "x", "--adapter", "fist")


def test_convert_takes_a_factorys_model_and_forces_only_when_asked(work: Path, tmp_path: Path) -> None:
    adapted = shake(sarac.transform(open_model("climodels:net", {"width": 12})))
    sarac.save_adapter(adapted, tmp_path / "a.safetensors")
    base = ("--base", "climodels:net", "--args", '{"width": 12}')
    run("convert", tmp_path / "a.safetensors", tmp_path / "lora", *base)
    assert "name the model under them" in refused(2, "convert", tmp_path / "lora", tmp_path / "net.pt")
    run("convert", tmp_path / "lora", tmp_path / "net.pt", *base)
    x = torch.randn(3, 6)
    close(outputs(sarac.load(tmp_path / "net.pt", "climodels:net"), x), outputs(adapted, x))
    other = ("--base", "climodels:net", "--args", '{"width": 12, "fill": 0.5}')
    assert "--force" in refused(1, "convert", tmp_path / "a.safetensors", tmp_path / "other", *other)
    assert not (tmp_path / "other").exists()
    assert "by force" in run("convert", tmp_path / "a.safetensors", tmp_path / "other", "--force", *other).stderr


def test_convert_leaves_nothing_that_reads_back_otherwise(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = lora.write
    damaged = lambda folder, config, *rest: written(folder, {**config, "lora_alpha": config["r"] * 1.01}, *rest)  # noqa: E731
    monkeypatch.setattr(lora, "write", damaged)
    assert "reads back 0.01 of its norm away" in refused(1, "convert", work / "sara.pt", tmp_path / "lora")
    monkeypatch.setattr(storage, "save", lambda model, path: sarac.save(shake(copy.deepcopy(model)), path))
    assert "must be bit-exact" in refused(1, "convert", work / "sara.pt", tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    run("convert", work / "sara.pt", tmp_path / "lora")


# Wrong use and wrong data.

WRONG = [
    # exit status, the words, what the sentence says
    (2, "analyze climodels:net --threshold 1.5", "(0, 1]"),
    (2, "transform climodels:net --plan threshold:0 --out OUT/x.pt", "(0, 1]"),
    (2, "transform climodels:net --plan thresh:0.5 --out OUT/x.pt", "'thresh:0.5' is not understood"),
    (2, "transform climodels:net --plan OUT/gone.json --out OUT/x.pt", "cannot be read"),
    (2, "transform climodels:net --plan WORK/unknown.json --out OUT/x.pt", "'0.wait'"),
    (2, "transform climodels:net --plan WORK/high.json --out OUT/x.pt", "rank 99"),
    (2, "transform climodels:net --where 0.wei --out OUT/x.pt", "Near names: 0.weight"),
    (2, "transform climodels:net --method lora --out OUT/x.pt", "'sara', 'mosara'"),
    (2, "transform climodels:net --input x:float99[2] --out OUT/x.pt", "float99"),
    (2, "transform climodels:zero --out OUT/x.pt", "all zeros"),
    (2, "analyze climodels:norm", "no linear weight"),
    (2, "analyze climodels:net --args [1]", "a JSON list"),
    (2, "analyze climodels:net --args {", "no JSON"),
    (2, "analyze WORK/sara.pt --args {}", "leave it out"),
    (2, "analyze WORK/llama --model climodels:net", "it goes with a model.pt"),
    (2, "finetune WORK/llama --data OUT/gone.jsonl --out OUT/x.pt", "does not exist"),
    (2, "finetune WORK/llama --data WORK/data.jsonl --out OUT/x.pt --steps 1 --epochs 1", "one of the two"),
    (2, "finetune WORK/llama --data WORK/data.jsonl --out OUT/x.pt --steps 0", "steps"),
    (2, "finetune WORK/llama --data WORK/data.jsonl --out OUT/x.pt --epochs 0", "epochs"),
    (2, "export WORK/sara.pt", "'ONNX'"),
    (2, "convert WORK/sara.safetensors OUT/lora", "name the model under them"),
    (2, "convert WORK/nobase OUT/lora", "names nobody/knows, which is no folder here"),
    (2, "convert WORK/sara.pt OUT/lora --base WORK/llama", "--base: it goes with a PEFT folder or an adapter file"),
    (2, "convert WORK/lora OUT/x.pt --force", "--force: it goes with an adapter file"),
    (2, "convert WORK/lora OUT/x.pt --layout pattern", "--layout: it goes into a PEFT folder"),
    (2, "convert WORK/lora OUT/x.safetensors --max-rank 4", "--max-rank: it goes into a PEFT folder"),
    (2, "convert WORK/lora OUT/x --max-rank 0", "--max-rank"),
    (2, "convert WORK/lora OUT/x --layout wide", "'padded', 'pattern'"),
    (2, "convert WORK/lora OUT/x.pt --base WORK/bert", "does not have as a linear site"),
    (2, "nothing", "No such command"),
    (1, "convert WORK/llama OUT/lora", "carries no adapters"),
    (1, "convert WORK/mosara.pt OUT/lora", "is routed"),
    (1, "convert WORK/sara.pt WORK", "no empty folder"),
    (1, "convert WORK/sara.pt OUT/gone/lora", "cannot be written"),
    (1, "convert WORK/sara.pt OUT/gone/x.pt", "cannot be written"),
    (1, "convert WORK/lora OUT/x.pt --base WORK/sara.pt", "already transformed"),
    (1, "convert OUT/gone.safetensors OUT/x.pt --base WORK/llama", "not a readable adapter file"),
    (1, "analyze climodels:nan", "0.weight contains NaN"),
    (1, "transform climodels:nan --out OUT/x.pt", "0.weight contains NaN"),
    (1, "transform climodels:meta --out OUT/x.pt", "meta device"),
    (1, "transform climodels:net --input input:float32[2,9] --out OUT/x.pt", "rejects the example inputs"),
    (1, 'transform climodels:net --args {"depth":2} --out OUT/x.pt', "depth"),
    (1, "transform WORK/sara.pt --out OUT/x.pt", "already transformed"),
    (1, "transform climodels:net --out OUT/gone/x.pt", "cannot be written"),
    (1, "transform climodels:net --out OUT", "is a folder"),
    (1, "analyze climodels:net --plot OUT/k.docx", "plot cannot be written"),
    (1, "analyze climodels:number", "not a torch.nn.Module"),
    (1, "analyze climodels:gone", "cannot be imported"),
    (1, "analyze OUT/nowhere", "opens neither"),
    (1, "analyze OUT/gone.pt", "is not a file"),
    (1, "fold WORK/llama --out OUT/merged", "carries no adapters"),
    (1, "fold WORK/truncated.pt --out OUT/merged", "truncated"),
    (1, "fold WORK/foreign.pt --out OUT/merged", "no model.pt of sarac's"),
    (1, "fold WORK/text.pt --out OUT/merged", "text.pt"),
    (1, "fold WORK/sara.pt --out OUT/gone/merged", "cannot be written"),
    (1, "finetune WORK/llama --data WORK/odd.jsonl --out OUT/x.pt", "odd.jsonl, line 2"),
    (1, "finetune WORK/llama --data WORK/data.jsonl --out OUT/x.pt --lr 1e20", "The loss is"),
    (1, "finetune WORK/bert --data WORK/data.jsonl --out OUT/x.pt", "token by token"),
    (1, "export WORK/sara.pt OUT/gone/x.onnx", "cannot be written"),
    (1, "verify WORK/sara.pt WORK/data.jsonl", "no ONNX file"),
    (1, "verify WORK/sara.pt OUT/gone.onnx", "gone.onnx"),
]


@pytest.mark.parametrize(("status", "words", "said"), WRONG)
def test_what_is_wrong_is_a_sentence_and_leaves_nothing(status: int, words: str, said: str, work: Path, tmp_path: Path) -> None:
    plan = {"sarac_plan": 1, "sites": {"0.wait": {"method": "sara", "rank": 1}}}
    (work / "unknown.json").write_text(json.dumps(plan))
    (work / "high.json").write_text(json.dumps({**plan, "sites": {"0.weight": {"method": "sara", "rank": 99}}}))
    (work / "odd.jsonl").write_text('{"text": "a b"}\n{"txt": "a"}\n')
    (work / "nobase").mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "nobody/knows"}
    (work / "nobase" / "adapter_config.json").write_text(json.dumps(config))
    if "bert" in words:
        bert().save_pretrained(work / "bert")
    before = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    sentence = refused(status, *(word.replace("WORK", str(work)).replace("OUT", str(tmp_path)) for word in words.split()))
    assert said in sentence
    assert "Error: " in sentence
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == before


def test_what_nobody_expects_keeps_its_traceback(work: Path) -> None:
    with pytest.raises(KeyError, match="nobody expects this"):
        CliRunner().invoke(app, ["analyze", "climodels:broken"], catch_exceptions=False)


# The doctor.


def test_the_doctor_says_what_runs_here() -> None:
    found = told("doctor")
    assert found["versions"]["torch"] == torch.__version__
    assert found["providers"]["CPUExecutionProvider"] == "ok"
    shown = run("doctor").stdout
    assert "CPUExecutionProvider" in shown
    assert "CUDA versions" in shown
    assert set(found["toolkits"]) == {"onnxruntime", "torch", "driver"}
    assert "Nothing is missing" in shown or ": pip " in shown


# The terminal.


def test_a_bar_is_drawn_for_eyes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(terminal_there: bool) -> str:
        file = io.StringIO()
        monkeypatch.setattr(terminal, "_ERR", Console(file=file, force_terminal=terminal_there, width=80))
        with terminal.meter("Measuring", 200) as step:
            for index in range(200):
                step(f"layers[{index}].weight")
        return file.getvalue()

    assert "━" in drawn(True)
    lines = drawn(False).splitlines()
    assert len(lines) == 10
    assert lines[-1] == "Measuring: 200/200 layers[199].weight"


def test_a_narrow_terminal_cuts_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        table = Table("weight", title="numbers")
        table.add_column("parameters", justify="right")
        table.add_row("model.layers.*.self_attn.q_proj.weight", "106,168,320")
        monkeypatch.setattr(sys, "stdout", file := io.StringIO())
        terminal.show(False, "", table)
        return file.getvalue()

    assert "model.layers.*.self_attn.q_proj.weight │ 106,168,320" in shown(80)
    narrow = shown(30)
    assert "106,168,320" in narrow
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 30


# The console script.


def script(work: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    program = Path(sys.executable).with_name("sarac")
    return subprocess.run([str(program), *words], cwd=work, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def test_the_script_finds_a_factory_where_it_is_called_and_prints_json_alone(work: Path) -> None:
    done = script(work, "analyze", "climodels:net", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["sites"]) == 2
    assert "Measuring" in done.stderr


def test_the_script_fails_with_a_sentence(work: Path) -> None:
    done = script(work, "analyze", "climodels:nan", "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Error: 0.weight contains NaN")
    assert "Traceback" not in done.stderr


def test_the_cache_is_shown_cleared_and_left_out(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told("cache") == {"folder": None, "entries": 0, "bytes": 0}
    kept = tmp_path / "kept"
    monkeypatch.setenv("SARAC_CACHE", str(kept))
    run("analyze", work / "llama", "--no-cache")
    run("transform", work / "llama", "--out", tmp_path / "none.pt", "--no-cache")
    assert told("cache")["entries"] == 0
    assert not kept.exists()
    run("analyze", work / "llama")
    analysed = told("cache")
    assert (analysed["folder"], analysed["entries"], analysed["limit"]) == (str(kept), 14, 10**10)
    assert analysed["bytes"] == sum(path.stat().st_size for path in kept.iterdir())
    run("transform", work / "llama", "--out", tmp_path / "kept.pt")
    assert told("cache")["entries"] == 28  # spectra and vectors
    assert f"{kept}: 28 entries" in run("cache").stdout
    assert "28 entries, " in (cleared := run("cache", "--clear").stdout)
    assert " MB removed." in cleared
    assert told("cache")["entries"] == 0
    none, cached = (sarac.load(tmp_path / f"{name}.pt").state_dict() for name in ("none", "kept"))
    assert all(torch.equal(tensor, cached[name]) for name, tensor in none.items())
