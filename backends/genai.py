"""Folders of onnxruntime-genai: a merged transformers model through its model builder, and run by its generator.

The builder reads a folder of save_pretrained and knows models by the name of their class. It works in a process of its own: it
prints, and it puts modules called `builders` and `quantization` on the import path.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from sarac.backends import onnx_file
from sarac.backends.providers import providers
from sarac.ir.errors import ExportError, InputError
from sarac.ir.layers import adapted

GRAPH, CONFIG = "model.onnx", "genai_config.json"  # what the builder calls them
PRECISIONS = {"cpu": ("fp32",), "cuda": ("fp16", "bf16")}  # what it writes others in does not load, or does not run
_PACKAGE = "onnxruntime_genai"
_MISSING = (
    "onnxruntime-genai is not installed: pip install 'sarac[genai]', which is onnxruntime-genai-cuda beside onnxruntime-gpu and "
    "onnxruntime-genai beside onnxruntime. The other one of the two brings the other runtime, and breaks both."
)
_NAMED = re.compile(r'config\.architectures\[0\] == "(\w+ForCausalLM)"')
_QUANTISED = {"QMoE", "MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_QUIET = json.dumps({"model": {"decoder": {"session_options": {"log_severity_level": 4}}}})
_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "min_length": 0, "no_repeat_ngram_size": 0}
_STAND_IN = ("tokenizer.json", "tokenizer_config.json")  # the files of a tokenizer that is none
_HERE, _SWAP = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux; macOS calls the second RENAME_SWAP


def known(model: nn.Module) -> str:
    """Why the installed builder does not take a model of this class, as a sentence; "" if it does."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return _MISSING
    name, names = type(model).__name__, architectures()
    if isinstance(model, transformers.PreTrainedModel) and name in names:
        return ""
    return f"onnxruntime-genai does not know {name}: it takes {', '.join(names)}. Export it with the engine onnx."


def architectures() -> tuple[str, ...]:
    """The classes of causal language models that the installed builder knows by name; ExportError where there is none."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ExportError(_MISSING)
    try:
        text = (Path(spec.origin).parent / "models" / "builder.py").read_text(encoding="utf-8")
    except OSError as error:
        raise ExportError(f"This onnxruntime-genai comes without a builder ({error.strerror}): install 0.18 or later.") from error
    return tuple(dict.fromkeys(_NAMED.findall(text)))


def write(
    model: nn.Module,
    folder: Path,
    *,
    dtype: str,
    provider: str,
    tokenizer: Any,
    metadata: Mapping[str, str],
    verify: Callable[[Path], None] | None = None,
) -> tuple[Path, ...]:
    """Write a merged model and transformers' tokenizer, or None, as a folder that onnxruntime_genai generates from; the files.

    It is made aside, shown to `verify`, which may raise, and then put in place whole; an earlier one there is replaced.
    """
    target = folder.resolve()
    require(model, target, dtype, provider)
    if any(True for _ in adapted(model)):
        raise ExportError(
            f"{type(model).__name__} carries adapters, which onnxruntime-genai has no operators for: fold it first."
        )
    with _aside(target) as work:
        source, made = work / "source", work / "made"
        _save(model, source, tokenizer)
        _build(type(model).__name__, source, made, dtype, provider)
        _require_faithful(model, made, dtype)
        shutil.rmtree(source)
        for name in _STAND_IN if tokenizer is None else ():
            (made / name).unlink(missing_ok=True)
        onnx_file.write_metadata(made / GRAPH, metadata)
        if verify is not None:
            verify(made)
        _place(made, target)
    return tuple(sorted(folder / path.name for path in target.iterdir()))


def require(model: nn.Module, folder: Path, dtype: str, provider: str) -> None:
    """Raise ExportError where the model, the dtype, the provider or the folder cannot be: before the work, not after it."""
    if reason := known(model):
        raise ExportError(reason)
    if dtype not in PRECISIONS.get(provider, ()):
        raise ExportError(
            f"{dtype} for {provider!r} is nothing that onnxruntime-genai runs: it is fp32 for cpu, fp16 or bf16 for cuda."
        )
    if folder.exists() and not (folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))):
        what = "holds other things than an earlier export" if folder.is_dir() else "is a file"
        raise ExportError(f"{folder} {what}: name a folder that is not there yet.")


def require_provider(provider: str) -> None:
    """Raise ExportError where ONNX Runtime does not start on the provider here: onnxruntime-genai would not say why."""
    state = providers().get("CUDAExecutionProvider", "it is not listed.") if provider == "cuda" else "ok"
    if state != "ok":
        raise ExportError(f"onnxruntime-genai cannot run on {provider} here: {state} `sarac doctor` says what is missing.")


def graph(folder: Path) -> Path:
    """The ONNX file in a folder; ExportError where the folder is none that onnxruntime_genai generates from."""
    if not (folder / CONFIG).is_file():
        raise ExportError(f"{folder} has no {CONFIG}: give a folder that was exported with the engine genai.")
    return folder / GRAPH


def special(folder: Path) -> tuple[int, tuple[int, ...]]:
    """The id that pads a row, which its runtime takes for no text wherever it stands, and the ids that end one."""
    padding, ends = (_config(folder)[name] for name in ("pad_token_id", "eos_token_id"))
    return int(padding), tuple(ends) if isinstance(ends, list) else (ends,)


def logits(folder: Path, input_ids: Tensor, provider: str = "cpu") -> Tensor:
    """The logits (rows, columns, vocabulary), on the CPU, of token ids (rows, columns); InputError where they do not fit."""
    with _generator(folder, input_ids, 1, provider) as generator:
        return torch.from_numpy(generator.get_output("logits"))


def generate(folder: Path, input_ids: Tensor, max_new_tokens: int, provider: str = "cpu") -> Tensor:
    """The likeliest token after the other, up to so many, behind token ids (rows, columns); InputError if they do not fit."""
    tokens = list(input_ids.cpu().long().T)
    with _generator(folder, input_ids, max_new_tokens, provider) as generator:
        while len(tokens) < input_ids.shape[1] + max_new_tokens and not generator.is_done():
            generator.generate_next_token()
            tokens.append(torch.from_numpy(generator.get_next_tokens()).long())  # of one row, its sequence lacks the end
    return torch.stack(tokens, dim=1)


@contextlib.contextmanager
def _generator(folder: Path, input_ids: Tensor, more: int, provider: str) -> Iterator[Any]:
    """A generator that has read the ids, with room for `more`."""
    genai, model = _opened(folder, provider)
    rows, columns = input_ids.shape
    room = max(columns + more, _window(folder).get("window_size", 0))  # its cache is no smaller than a window
    try:
        params = genai.GeneratorParams(model)
        params.set_search_options(batch_size=rows, max_length=room, **_GREEDY)
        generator = genai.Generator(model, params)
        generator.append_tokens(input_ids.int().cpu().numpy())
        yield generator
    except RuntimeError as error:
        raise InputError(
            f"{folder} does not run on token ids of shape ({rows}, {columns}), from {int(input_ids.min())} to "
            f"{int(input_ids.max())}, with room for {more} more: {_line(str(error))}"
        ) from error


def _opened(folder: Path, provider: str) -> tuple[Any, Any]:
    graph(folder)
    require_provider(provider)
    try:
        genai: Any = importlib.import_module(_PACKAGE)
        config = genai.Config(str(folder))
        config.overlay(_QUIET)
        config.clear_providers()
        if provider != "cpu":
            config.append_provider(provider)
        return genai, genai.Model(config)
    except ModuleNotFoundError as error:
        raise ExportError(_MISSING) from error
    except (ImportError, RuntimeError) as error:
        raise ExportError(
            f"onnxruntime-genai cannot run {folder} on {provider}: {_line(str(error))} Export it again, or run it on another."
        ) from error


def _save(model: Any, source: Path, tokenizer: Any) -> None:
    """The folder that the builder reads: the model's, and a tokenizer, without which it does not start."""
    before = dict(vars(model.config))  # saving notes the class and the dtype there
    if tokenizer is None:
        empty = Tokenizer(models.WordLevel({"?": 0}, "?"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=empty)  # type: ignore[no-untyped-call]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar
            model.save_pretrained(source)
            tokenizer.save_pretrained(source)
    except Exception as error:
        raise ExportError(f"{type(model).__name__} cannot be written for onnxruntime-genai: {_line(str(error))}") from error
    finally:
        vars(model.config).clear()
        vars(model.config).update(before)


def _build(name: str, source: Path, made: Path, dtype: str, provider: str) -> None:
    options = {"-i": source, "-o": made, "-p": dtype, "-e": provider, "-c": source / "cache", "--extra_options": "hf_token=false"}
    done = subprocess.run(
        [sys.executable, "-m", f"{_PACKAGE}.models.builder", *(str(word) for pair in options.items() for word in pair)],
        cwd=source,  # what lies in the user's folder could be taken for the builder's modules
        env={**os.environ, **_OFFLINE},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = [line for line in done.stdout.splitlines() if line.strip()]
        killed = f"It was killed by signal {-done.returncode}; 9 means that memory ran out."
        reason = killed if done.returncode < 0 else _line(said[-1]) if said else "It said nothing."
        raise ExportError(f"onnxruntime-genai's builder failed on {name} ({dtype}, {provider}): {reason}")


def _require_faithful(model: Any, made: Path, dtype: str) -> None:
    """Refuse what the builder is seen to have made otherwise: experts that it quantised, windows that it forgot."""
    name, config = type(model).__name__, model.config
    if found := sorted(_QUANTISED & onnx_file.node_counts(made / GRAPH).keys()):
        raise ExportError(
            f"onnxruntime-genai's builder knows {name} in quantised form alone: it wrote {', '.join(found)} where {dtype} was "
            "asked for. Export it with the engine onnx."
        )
    room = getattr(config, "max_position_embeddings", 0)
    window = getattr(config, "sliding_window", None) or room
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    layers = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
    if window < room and layers != _window(made).get("layers", []):
        raise ExportError(
            f"onnxruntime-genai's builder forgot the sliding window of {window} tokens of {name}: longer texts would come out "
            "otherwise. Export it with the engine onnx, or set config.sliding_window to None if it was trained without."
        )


def _window(folder: Path) -> dict[str, Any]:
    return dict(_config(folder)["decoder"].get("sliding_window", {}))


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"])


@contextlib.contextmanager
def _aside(target: Path) -> Iterator[Path]:
    try:
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror}. Choose a folder that exists and is yours.") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _place(made: Path, target: Path) -> None:
    """Put one folder where another is, or none: in one step, so that there never is none, where the system has such a step."""
    try:
        if (target / CONFIG).is_file():
            if _swapped(made, target):
                return
            target.rename(made.with_name("earlier"))
        made.rename(target)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror}.") from error


def _swapped(one: Path, other: Path) -> bool:
    """Whether two folders have changed places, in one step."""
    paths, swap = (os.fsencode(one), os.fsencode(other)), _swap()
    return swap is not None and swap(*paths) == 0


@functools.cache
def _swap() -> Callable[[bytes, bytes], int] | None:
    library: Any = None if os.name == "nt" else ctypes.CDLL(None)
    if hasattr(library, "renameat2"):  # since glibc 2.28
        return lambda one, other: int(library.renameat2(_HERE, one, _HERE, other, _SWAP))
    if hasattr(library, "renamex_np"):
        return lambda one, other: int(library.renamex_np(one, other, _SWAP))
    return None


def _line(text: str) -> str:
    """The first line of a message, as a sentence."""
    return (text.strip().splitlines() or ["no message"])[0].rstrip(".") + "."
