"""onnxruntime-genai's folders: equal to torch and only to the model they came from, whole or not there, refused in sentences."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from zoo import adapt, close, differ, folded, gpt2, mlp, outputs, require_untouched, shake, snapshot

from sarac.backends import genai
from sarac.backends.onnx_file import read_metadata
from sarac.backends.providers import providers
from sarac.ir.errors import CheckFailed, ExportError, InputError

PROMPT = torch.tensor([[7, 3, 22, 9], [30, 5, 14, 2], [8, 8, 31, 17]])
FILES = ["genai_config.json", "model.onnx", "model.onnx.data"]
SOURCE = 'if config.architectures[0] == "LlamaForCausalLM": ...\nelif config.architectures[0] == "MistralForCausalLM": ...\n'
# What the builder is called with, and what it leaves behind; in place of {} a test puts what it does besides.
BUILDER = """
import json, shutil, sys
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
made = Path(words["-o"])
{}
made.mkdir()
(made / "genai_config.json").write_text(json.dumps({{"model": {{"decoder": {{}}}}, "words": words}}))
shutil.copy({!r}, made / "model.onnx")
for name in ("config.json", "tokenizer.json"):
    shutil.copy(Path(words["-i"]) / name, made / name)
"""


def llama(**options: Any) -> nn.Module:
    """Heads of 16, the least that the runtime's attention takes; weights so large that it does not repeat one word."""
    plain = {"max_position_embeddings": 48, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3}
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        **{**plain, **options},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def ids(rows: int, columns: int, words: int = 40) -> Tensor:
    """Token ids without the two that begin, end and pad: where those stand the runtime reads no text."""
    return torch.randint(2, words, (rows, columns))


def greedy(model: Any, tokens: Tensor, count: int) -> Tensor:
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count)


def write(model: nn.Module, folder: Path, **options: Any) -> tuple[Path, ...]:
    plain = {"dtype": "fp32", "provider": "cpu", "tokenizer": None, "metadata": {}}
    return genai.write(model, folder, **{**plain, **options})


@pytest.fixture(scope="module")
def real() -> None:
    pytest.importorskip("onnxruntime_genai")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """One that ends after a few tokens, in one row of PROMPT."""
    torch.manual_seed(3)
    model: Any = shake(adapt(llama()))
    end = int(greedy(folded(model), PROMPT, 6)[1, -1])
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    return model


@pytest.fixture(scope="module")
def exported(real: None, trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model with a tokenizer, written once for the tests that only read."""
    there = tmp_path_factory.mktemp("genai")
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    files = write(folded(trained), there / "out", tokenizer=words, metadata={"sarac.plan": "π"})
    assert [file.name for file in files] == [*FILES, "tokenizer.json", "tokenizer_config.json"]
    assert all(file.is_file() for file in files)
    assert sorted(path.name for path in there.iterdir()) == ["out"]
    return there / "out"


def faked(place: Path, besides: str = "", operator: str = "Identity") -> None:
    """A package in the form of onnxruntime-genai whose builder copies, and does something besides."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], domain="" if operator == "Identity" else "x")], "g", [x], [y]
    )
    onnx.save(helper.make_model(graph), place / "copied.onnx")
    package = place / "onnxruntime_genai" / "models"
    package.mkdir(parents=True, exist_ok=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "builder.py").write_text(f"'''\n{SOURCE}'''\n" + BUILDER.format(besides, str(place / "copied.onnx")))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the package is a fake one; gives the folder that it lies in."""
    place, find = tmp_path / "packages", importlib.util.find_spec
    place.mkdir()
    faked(place)
    init = place / "onnxruntime_genai" / "__init__.py"
    spec = ModuleSpec("onnxruntime_genai", None, origin=str(init))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: spec if name == spec.name else find(name, *more))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]))
    return place


def test_logits_are_those_of_the_merged_model(exported: Path, trained: nn.Module) -> None:
    merged = folded(trained)
    for tokens in (ids(1, 3), ids(3, 17)):
        found = genai.logits(exported, tokens)
        assert found.shape == (*tokens.shape, 40)
        close(found, outputs(merged, tokens).logits)
        differ(found, outputs(folded(adapt(llama())), tokens).logits)


def test_tokens_are_the_likeliest_up_to_the_end(exported: Path, trained: nn.Module) -> None:
    merged = folded(trained)
    found = genai.generate(exported, PROMPT, 12)
    assert torch.equal(found, greedy(merged, PROMPT, 12))
    assert not torch.equal(found, greedy(llama(), PROMPT, 12))
    assert genai.generate(exported, PROMPT, 2).shape == (3, 6)
    padding, (end,) = genai.special(exported)
    assert (padding, end) == (0, trained.config.eos_token_id)
    for rows in (PROMPT, PROMPT[1:2]):  # one row alone ends before its room does
        ended = genai.generate(exported, rows, 9)
        assert torch.equal(ended, greedy(merged, rows, 9))
    assert ended.shape[1] < 4 + 9
    assert int(ended[0, -1]) == end


def test_half_precision_is_rounded_once(real: None, trained: nn.Module, tmp_path: Path) -> None:
    """What is written for a GPU runs on the CPU too, and says there what it is."""
    merged, tokens = folded(trained), ids(2, 9)
    files = write(merged, tmp_path / "out", dtype="fp16", provider="cuda")
    assert [file.name for file in files] == FILES  # of the tokenizer that the builder needed nothing is left
    found, expected = genai.logits(tmp_path / "out", tokens), outputs(merged, tokens).logits
    assert found.dtype == torch.float16
    close(found, expected, torch.float16)
    differ(found, expected)


def test_metadata_is_in_the_graph(exported: Path, fake: Path, tmp_path: Path) -> None:
    assert read_metadata(exported / "model.onnx")["sarac.plan"] == "π"
    write(llama(), tmp_path / "out")
    assert read_metadata(tmp_path / "out" / "model.onnx") == {}


def windowed(name: str) -> nn.Module:
    left_out = ("model_type", "architectures", "rope_parameters")
    options = {name: value for name, value in llama().config.to_dict().items() if name not in left_out}
    options |= {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1}
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options)).eval()


def test_a_window_that_the_builder_forgets_is_refused(fake: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"sliding window of 12 tokens of MistralForCausalLM.*config.sliding_window"):
        write(windowed("Mistral"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    free = windowed("Mistral")
    free.config.sliding_window = None
    assert write(free, tmp_path / "out")


def test_a_window_that_the_builder_knows_is_kept(real: None, tmp_path: Path) -> None:
    kept = windowed("Qwen2")
    assert kept.config.layer_types == ["full_attention", "sliding_attention"]
    write(kept, tmp_path / "out")
    for tokens in (ids(2, 5), ids(2, 30)):
        close(genai.logits(tmp_path / "out", tokens), outputs(kept, tokens).logits)


def test_ids_that_do_not_fit_are_refused(exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"shape \(1, 2\), from 3 to 99.*out of data bounds"):
        genai.logits(exported, torch.tensor([[3, 99]]))
    with pytest.raises(InputError, match=r"room for 44 more: max_length \(49\).*48"):
        genai.generate(exported, ids(1, 5), 44)
    assert genai.generate(exported, ids(1, 5), 43).shape[1] <= 48
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_is_not_there_is_an_error(exported: Path) -> None:
    if providers().get("CUDAExecutionProvider") == "ok":
        close(genai.logits(exported, ids(2, 5), "cuda"), genai.logits(exported, ids(2, 5)))
        return
    with pytest.raises(ExportError, match=r"cannot run on cuda here: .*sarac doctor"):
        genai.logits(exported, ids(2, 5), "cuda")


def test_the_builder_knows_more_than_one_model(real: None) -> None:
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM"} < set(genai.architectures())
    assert genai.known(llama()) == ""


@pytest.mark.parametrize("call", ["known", "write", "architectures", "logits"])
def test_a_missing_package_is_named(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "genai_config.json").touch()
    calls = {
        "write": lambda: write(llama(), tmp_path / "out"),
        "architectures": genai.architectures,
        "logits": lambda: genai.logits(tmp_path / "earlier", ids(1, 2)),
    }
    if call == "known":
        assert "pip install 'sarac[genai]'" in genai.known(llama())
        return
    with pytest.raises(ExportError, match=r"pip install 'sarac\[genai\]'"):
        calls[call]()
    assert not (tmp_path / "out").exists()


def test_models_that_the_builder_does_not_know_are_named(fake: Path, tmp_path: Path) -> None:
    assert genai.known(llama()) == ""
    for model in (gpt2(), mlp()):
        said = genai.known(model)
        assert said.startswith(
            f"onnxruntime-genai does not know {type(model).__name__}: it takes LlamaForCausalLM, MistralForCausalLM."
        )
        with pytest.raises(ExportError, match=r"does not know"):
            write(model, tmp_path / "out")
    lookalike = type("LlamaForCausalLM", (nn.Module,), {})()  # the class's name alone does not do
    assert "does not know" in genai.known(lookalike)


@pytest.mark.parametrize(
    ("dtype", "provider"), [("fp16", "cpu"), ("bf16", "cpu"), ("fp32", "cuda"), ("int4", "cpu"), ("fp32", "rocm")]
)
def test_pairs_that_do_not_run_are_refused(fake: Path, tmp_path: Path, dtype: str, provider: str) -> None:
    with pytest.raises(ExportError, match=f"{dtype} for '{provider}'.*fp32 for cpu, fp16 or bf16 for cuda"):
        write(llama(), tmp_path / "out", dtype=dtype, provider=provider)
    for known_provider, dtypes in genai.PRECISIONS.items():
        for known_dtype in dtypes:
            write(llama(), tmp_path / known_dtype, dtype=known_dtype, provider=known_provider)
            words = json.loads((tmp_path / known_dtype / "genai_config.json").read_text())["words"]
            assert (words["-p"], words["-e"]) == (known_dtype, known_provider)


def test_adapters_must_be_folded_first(fake: Path, trained: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"LlamaForCausalLM carries adapters.*fold it first"):
        write(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert write(folded(trained), tmp_path / "out")


def test_the_model_is_left_alone(fake: Path, tmp_path: Path) -> None:
    model = llama()
    model.config.note = "kept"
    before, config = snapshot(model), dict(vars(model.config))
    write(model, tmp_path / "out")
    require_untouched(model, before)
    assert vars(model.config) == config
    assert '"LlamaForCausalLM"' in (tmp_path / "out" / "config.json").read_text()  # which the builder needs, and was saved


def test_nothing_is_printed(fake: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    faked(fake, "print('loud'); print('loud', file=sys.stderr)")
    write(llama(), tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_the_builder_is_offline_and_elsewhere(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    faked(fake, "import os; assert os.environ['HF_HUB_OFFLINE'] == '1' and Path.cwd() == Path(words['-i'])")
    assert write(llama(), tmp_path / "out")
    faked(fake, "import os; assert os.environ['HF_HUB_OFFLINE'] == '0'")
    with pytest.raises(ExportError, match="AssertionError"):
        write(llama(), tmp_path / "out")


@pytest.mark.parametrize(
    ("besides", "reason"),
    [
        ("raise KeyError('rope_type')", r"KeyError: 'rope_type'\."),
        ("sys.exit(3)", r"It said nothing\."),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9; 9 means that memory ran out"),
    ],
)
def test_a_builder_that_fails_leaves_the_earlier_folder(fake: Path, tmp_path: Path, besides: str, reason: str) -> None:
    write(llama(), tmp_path / "out", metadata={"number": "1"})
    faked(fake, besides)
    with pytest.raises(ExportError, match=rf"builder failed on LlamaForCausalLM \(fp32, cpu\): .*{reason}"):
        write(llama(), tmp_path / "out", metadata={"number": "2"})
    assert read_metadata(tmp_path / "out" / "model.onnx") == {"number": "1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packages"]


def test_what_the_builder_quantised_is_refused(fake: Path, tmp_path: Path) -> None:
    faked(fake, operator="QMoE")
    with pytest.raises(ExportError, match="quantised form alone: it wrote QMoE where fp32 was asked for"):
        write(llama(), tmp_path / "out")
    faked(fake, operator="MoE")
    assert write(llama(), tmp_path / "out")


@pytest.mark.parametrize("swapping", [True, False])
def test_a_folder_takes_the_place_of_an_earlier_one(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapping: bool
) -> None:
    real_swap, seen = genai._swapped, []

    def swapped(one: Path, other: Path) -> bool:
        seen.append(read_metadata(other / "model.onnx"))
        done = swapping and real_swap(one, other)
        seen.append(read_metadata(other / "model.onnx"))
        return done

    monkeypatch.setattr(genai, "_swapped", swapped)
    (tmp_path / "out").mkdir()  # an empty one is none
    for number in "123":
        write(llama(), tmp_path / "out", metadata={"number": number})
        assert read_metadata(tmp_path / "out" / "model.onnx") == {"number": number}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packages"]
    numbers = [found["number"] for found in seen]
    assert numbers == (["1", "2", "2", "3"] if swapping and genai._swap() else ["1", "1", "2", "2"])


def test_killed_while_it_is_put_in_place(fake: Path, tmp_path: Path) -> None:
    """A process that dies on either side of the one step leaves one whole folder or the other at the path."""
    if genai._swap() is None:
        pytest.skip("this system has no such step")
    for number in "12":
        write(llama(), tmp_path / number, metadata={"number": number})
    code = """
import os, signal, sys
from pathlib import Path
from sarac.backends import genai
swapped, made, target = genai._swapped, Path(sys.argv[1]), Path(sys.argv[2])
for step in ("before", "after"):
    def dying(one, other):
        assert step == "before" or swapped(one, other)
        os.kill(os.getpid(), signal.SIGKILL)
    genai._swapped = dying
    if not (child := os.fork()):
        genai._place(made, target)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print((target / "model.onnx").read_bytes().count(b"number\\x12\\x011"), len(os.listdir(target)))
"""
    run = [sys.executable, "-c", code, tmp_path / "2", tmp_path / "1"]
    done = subprocess.run(run, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["1 3", "0 3", ""]
    assert read_metadata(tmp_path / "1" / "model.onnx") == {"number": "2"}


def test_a_check_that_fails_leaves_the_earlier_folder(fake: Path, tmp_path: Path) -> None:
    shown = SimpleNamespace(files=[])

    def look(folder: Path) -> None:
        shown.files = sorted(path.name for path in folder.iterdir())
        raise CheckFailed("no")

    write(llama(), tmp_path / "out", metadata={"number": "1"})
    with pytest.raises(CheckFailed):
        write(llama(), tmp_path / "out", metadata={"number": "2"}, verify=look)
    assert shown.files == ["config.json", "genai_config.json", "model.onnx"]
    assert read_metadata(tmp_path / "out" / "model.onnx") == {"number": "1"}


def test_other_things_are_not_replaced(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    with pytest.raises(ExportError, match="file is a file: name a folder"):
        write(llama(), tmp_path / "file")
    with pytest.raises(ExportError, match="folder holds other things than an earlier export"):
        write(llama(), tmp_path / "folder")
    with pytest.raises(ExportError, match="cannot be written: No such file or directory"):
        write(llama(), tmp_path / "none" / "out")
    assert [(tmp_path / name).read_text() for name in ("file", "folder/file")] == ["mine", "mine"]
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    write(llama(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_a_folder_that_is_none_is_named(fake: Path) -> None:
    with pytest.raises(ExportError, match=r"packages has no genai_config.json"):
        genai.logits(fake, ids(1, 2))
