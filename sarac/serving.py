"""Serving: the folder that onnxruntime-genai generates from, held against torch before it is put in place."""

import copy
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sarac import text
from sarac.backends import genai, onnx_file
from sarac.ir import check
from sarac.ir.errors import CheckFailed, ExportError, InputError, SaracWarning
from sarac.ir.graph import ModelGraph
from sarac.ir.inputs import Inputs
from sarac.ir.layers import evaluating
from sarac.ir.record import record_of
from sarac.proof import Comparison, ExportReport, hold, noted

ENGINES = ("onnx", "genai")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "merge": (None, True), "opset": (20,), "dynamic": ("auto",), "external_data": ("auto",), "smoke": (False,),
    "swappable": (False,), "task": ("forward", "generate"), "keep_float32": ((),),
}  # fmt: skip
_SAID = {"merge": "merge=False (--routed)", "example_inputs": "example inputs (--input)"}
_SHAPES = ((1, 19), (3, 14))  # rows and tokens of the inputs that a folder is held against
_MORE = 8  # tokens that it generates behind each


def require(engine: str, tokenizer: Any = None, **options: Any) -> None:
    """Raise ExportError for an engine that is none, and for an option, given with another value than its default, that has
    no meaning for it.
    """
    if engine not in ENGINES:
        raise ExportError(f"engine={engine!r} is not known: give one of {', '.join(ENGINES)}.")
    if engine == "onnx" and tokenizer is not None:
        raise ExportError('tokenizer goes into a folder that generates text: leave it out, or give engine="genai".')
    odd = [name for name, value in options.items() if repr(value) not in map(repr, _PLAIN.get(name, (None,)))]  # 1 is not True
    if engine == "genai" and odd:
        leave = ", ".join(_SAID.get(name, name) for name in odd)
        raise ExportError(f"The engine genai takes the merged model and builds its own graph: leave out {leave}.")


def widened(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model, or, where it is coarser than `dtype`, a float32 copy: a fine file is not to be held against coarse sums."""
    coarse = check.gate(check.coarsest(model)) > check.gate(dtype)
    return copy.deepcopy(model).float() if coarse else model


def export(
    model: nn.Module,
    graph: ModelGraph,
    folder: Path,
    *,
    dtype: str,
    provider: str,
    tokenizer: str | Path | None,
    metadata: Mapping[str, str],
) -> ExportReport:
    """Write the merged module of `graph` as a folder; CheckFailed, and nothing written, where it differs from `model`."""
    merged, words = record_of(model) is not None, _words(model, folder, tokenizer)
    found: list[tuple[Comparison, ...]] = []
    times = [time.perf_counter()]

    def verified(made: Path) -> None:
        times.append(time.perf_counter())
        try:
            found.append(compare(model, graph.module, made, provider, getattr(torch, metadata["sarac.dtype"])))
        except InputError as error:
            raise ExportError(
                f"What onnxruntime-genai's builder made of {type(model).__name__} does not run: {error} Export it with the "
                "engine onnx."
            ) from error
        onnx_file.write_metadata(made / genai.GRAPH, noted(merged, found[0], graph.folded))
        times.append(time.perf_counter())

    files = genai.write(graph.module, folder, dtype=dtype, provider=provider, tokenizer=words, metadata=metadata, verify=verified)
    seconds = {"export": times[1] - times[0], "verify": times[2] - times[1]}
    return ExportReport(folder, files, merged, (), found[0], graph.folded, seconds, metadata["sarac.dtype"])


def compare(
    model: nn.Module, emitted: nn.Module, folder: Path, provider: str, dtype: torch.dtype | None
) -> tuple[Comparison, ...]:
    """A folder's logits, and the tokens that it generates, against torch, each within its gate; CheckFailed if one is not."""
    config: Any = model.config
    padding, ends = genai.special(folder)
    device = next(parameter.device for parameter in model.parameters())
    room = getattr(config, "max_position_embeddings", None) or 64
    words = torch.tensor([word for word in range(config.vocab_size) if word != padding])
    draw = torch.Generator().manual_seed(0)
    unseen = []
    for rows, columns in _SHAPES:
        picked = torch.randint(len(words), (rows, min(columns, room - _MORE)), generator=draw)
        unseen.append(Inputs((), {"input_ids": words[picked].to(device)}))

    def run(inputs: Inputs) -> dict[str, Tensor]:
        return {"logits": genai.logits(folder, inputs.kwargs["input_ids"], provider)}

    comparisons = hold(model, ModelGraph(emitted, {}, {}), run, unseen, dtype)
    for inputs in unseen:
        told = genai.generate(folder, inputs.kwargs["input_ids"], _MORE, provider)
        _require_likeliest(model, told, inputs.kwargs["input_ids"].shape[1], ends, dtype or check.coarsest(model))
    return comparisons


def _require_likeliest(model: nn.Module, told: Tensor, given: int, ends: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise CheckFailed unless every token behind the `given` ones is the likeliest of torch, up to where its row ends.

    Of two that are equally likely within the gate of the dtype either may be told.
    """
    device = next(parameter.device for parameter in model.parameters())
    with torch.no_grad(), evaluating(model):
        logits = Inputs((), {"input_ids": told[:, :-1].to(device)}).call(model).logits[:, given - 1 :].double().cpu()
    chosen = told[:, given:]
    ended = torch.isin(chosen, torch.tensor(ends)).cumsum(1)
    live = (ended == 0) | ((ended == 1) & torch.isin(chosen, torch.tensor(ends)))
    behind = (logits.amax(-1) - logits.gather(-1, chosen[..., None]).squeeze(-1))[live] / logits.std(correction=0)
    if chosen.shape[1] < _MORE and not bool(ended[:, -1:].all()):
        raise CheckFailed(f"onnxruntime-genai stopped after {chosen.shape[1]} of {_MORE} tokens, and not all rows had ended.")
    if not float(behind.max()) <= check.gate(dtype):
        raise CheckFailed(
            f"onnxruntime-genai generates tokens that are not the torch model's likeliest: one lies {float(behind.max()):.3g} of "
            f"the logits' spread below; {str(dtype).removeprefix('torch.')} allows {check.gate(dtype):.0e}."
        )


def _words(model: nn.Module, folder: Path, tokenizer: str | Path | None) -> Any:
    """The tokenizer in the folder given, or in the model's own; without one in the latter, None and a warning."""
    try:
        return text.tokenizer_of(model, None if tokenizer is None else str(tokenizer))
    except InputError as error:
        if tokenizer is not None:
            raise
        warnings.warn(f"{folder.name} gets no tokenizer, and generates from token ids alone: {error}", SaracWarning, stacklevel=4)
        return None
