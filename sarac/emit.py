"""Emitting: fold or route, write ONNX aside, hold it against torch at shapes it has not seen, then put it in place."""

import copy
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import nn

from sarac.backends import onnx, onnx_file, runtime, unseen
from sarac.checkpoint import adapted_weights, base_hashes
from sarac.ir import check
from sarac.ir.errors import CheckFailed, ExportError, InputError, RewriteError
from sarac.ir.graph import Folded, ModelGraph
from sarac.ir.inputs import Inputs, InputSpec
from sarac.ir.layers import adapted, evaluating
from sarac.ir.pipeline import run
from sarac.ir.record import __version__, record_of, require_whole
from sarac.passes.fold import Fold
from sarac.surgery import disabled
from sarac.text import input_spec
from sarac.trace import trace

_OPSETS = range(18, 26)  # what the exporters underneath can write
_UNTRAINED = "Its adapters are at their start, or too small for its dtype: train it first, or export the base model itself."


@dataclass(frozen=True)
class Comparison:
    """One set of inputs: the ONNX model against the adapted torch model, and the merged torch model against it."""

    inputs: str
    onnx_error: float
    onnx_max_error: float
    merged_error: float
    merged_max_error: float


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was held against torch; errors are rms over standard deviation, and largest absolute."""

    path: Path
    files: tuple[Path, ...]
    merged: bool
    routed: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    folded: Mapping[str, Folded] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest relative error of the ONNX model against the adapted torch model."""
        return max(comparison.onnx_error for comparison in self.comparisons)

    @property
    def max_error(self) -> float:
        """The largest absolute error of the ONNX model against the adapted torch model."""
        return max(comparison.onnx_max_error for comparison in self.comparisons)

    @property
    def surviving_delta(self) -> tuple[str, float]:
        """The site whose delta lost the largest share to rounding, and that share; ("", 0) where nothing was folded."""
        worst = max(self.folded, key=lambda site: self.folded[site].surviving_delta, default="")
        return (worst, self.folded[worst].surviving_delta) if worst else ("", 0.0)

    def to_json(self) -> str:
        """The report as JSON text."""
        site, share = self.surviving_delta
        return json.dumps(
            {
                "path": str(self.path),
                "files": [str(file) for file in self.files],
                "merged": self.merged,
                "routed": list(self.routed),
                "error": self.error,
                "max_error": self.max_error,
                "surviving_delta": {"worst_site": site, "lost": share},
                "comparisons": [asdict(comparison) for comparison in self.comparisons],
                "seconds": dict(self.seconds),
            },
            indent=1,
        )

    def table(self) -> Table:
        """The comparisons as a rich table."""
        kind = "merged" if self.merged else "adapters in the graph" if self.routed else "as it is"
        table = Table(title=f"{self.path.name}: {kind}", title_justify="left")
        table.add_column("inputs")
        for heading in ("ONNX error", "largest", "merged error", "largest"):
            table.add_column(heading, justify="right")
        for row in self.comparisons:
            figures = (row.onnx_error, row.onnx_max_error, row.merged_error, row.merged_max_error)
            table.add_row(row.inputs, *(f"{figure:.2e}" for figure in figures))
        return table


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any = None,
    *,
    merge: bool | None = None,
    opset: int = 20,
    provider: str = "cpu",
) -> ExportReport:
    """Write `model` as ONNX, verified: a failed check raises CheckFailed and leaves nothing at `path`.

    `merge` True folds every adapter (NotFoldable where one is routed), False writes all adapters as subgraphs, None folds what
    folds and routes the rest. Without example inputs the model's input spec serves.
    """
    target = Path(path)
    if opset not in _OPSETS:
        raise ExportError(
            f"opset {opset} is not possible: it is one of {_OPSETS.start} to {_OPSETS.stop - 1}; 20 is the default."
        )
    inputs, spec = _inputs(model, example_inputs)
    started = time.perf_counter()
    graph = _folded(model, merge)
    plan, routed = record_of(model), tuple(slot.site for _, _, s in adapted(graph.module) for slot in s.slots.values())
    with _aside(target) as folder:
        files = onnx.Onnx(opset).write(graph.module, inputs, folder / target.name, _metadata(model))
        exported = time.perf_counter()
        session = runtime.Runtime(folder / target.name, provider)
        comparisons = _compare(model, graph.module, session, spec, inputs)
        del session
        seconds = {"export": exported - started, "verify": time.perf_counter() - exported}
        merged = plan is not None and not routed
        verification = {
            "merged": merged,
            "comparisons": [asdict(row) for row in comparisons],
            "surviving_delta": {site: facts.surviving_delta for site, facts in graph.folded.items()},
        }
        onnx_file.write_metadata(folder / target.name, {"sarac.verification": json.dumps(verification)})
        placed = tuple(_place(file, target.parent / file.name) for file in reversed(files))
    return ExportReport(target, placed[::-1], merged, routed, comparisons, graph.folded, seconds)


def verify(model: nn.Module, path: str | Path, example_inputs: Any = None, *, provider: str = "cpu") -> ExportReport:
    """Hold an exported file against `model` again, at shapes that its capture did not see; CheckFailed if they differ."""
    target = Path(path)
    inputs, spec = _inputs(model, example_inputs)
    metadata = onnx_file.read_metadata(target)
    weights = adapted_weights(model)
    base = base_hashes(weights)["float32"] if weights else ""
    # A plain model may be this very one, folded: its outputs tell.
    if weights and metadata.get("sarac.base", "") != base:
        raise CheckFailed(f"{target} was exported from another base than this model's. Export the model again.")
    started = time.perf_counter()
    comparisons = _compare(model, model, runtime.Runtime(target, provider), spec, inputs)
    merged = bool(json.loads(metadata.get("sarac.verification", "{}")).get("merged"))
    seconds = {"verify": time.perf_counter() - started}
    return ExportReport(target, (target,), merged, (), comparisons, seconds=seconds)


def _folded(model: nn.Module, merge: bool | None) -> ModelGraph:
    graph = ModelGraph(model, trace(model).sites, {})
    require_whole(model, "export")
    if record_of(model) is None:
        if merge is not None:
            raise RewriteError(f"{type(model).__name__} carries no adapters: there is nothing to merge. Leave `merge` out.")
        return graph
    return graph if merge is False else run(graph, Fold(partial=merge is None), check=False)


def _compare(
    model: nn.Module, emitted: nn.Module, session: runtime.Runtime, spec: InputSpec, captured: Inputs
) -> tuple[Comparison, ...]:
    """The comparisons at unseen shapes, every one within its gate; CheckFailed at the first that is not."""
    dtype = check.coarsest(model)
    rows = []
    with torch.no_grad(), evaluating(model), evaluating(emitted):
        others = unseen.unseen_inputs(spec, session, captured, model=model)
        references = _references(model, dtype, others) if emitted is not model else [None] * len(others)
        for inputs, reference in zip(others, references, strict=True):
            unmerged, merged = inputs.call(model), inputs.call(emitted)
            check.require_finite(merged, "The torch model's output")
            between = check.require_close(merged, unmerged, dtype, "The merged and the adapted torch model")
            if reference is not None:
                check.require_merge_keeps(merged, unmerged, reference, dtype)
            ours, theirs = runtime.paired(session.run(inputs), unmerged)
            check.require_finite(ours, "The ONNX model's output")
            found = check.require_close(ours, theirs, dtype, "The ONNX model and the adapted torch model")
            if record_of(model) is not None:
                with disabled(model):
                    check.require_different(
                        ours, runtime.paired(ours, inputs.call(model))[1], "The outputs and the base's", _UNTRAINED
                    )
                    check.require_different(merged, inputs.call(model), "The merged model's outputs and the base's", _UNTRAINED)
            errors = (found.error, found.max_error, between.error, between.max_error)
            rows.append(Comparison(inputs.describe(), *errors))
    return tuple(rows)


def _references(model: nn.Module, dtype: torch.dtype, unseen: Sequence[Inputs]) -> list[Any]:
    """What the adapted model gives in the next wider dtype, by which a merge is judged; the wide copy is gone afterwards."""
    if dtype == torch.float64 or not any(True for _ in adapted(model)):
        return [None] * len(unseen)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    wider = copy.deepcopy(model).to(wide)
    widened = [inputs.map(lambda tensor: tensor.to(wide) if tensor.is_floating_point() else tensor) for inputs in unseen]
    return [inputs.call(wider) for inputs in widened]


def _inputs(model: nn.Module, example: Any) -> tuple[Inputs, InputSpec]:
    """The inputs to capture on and their spec: given ones, those of the model's input spec, or transformers' token ids."""
    if example is not None and not isinstance(example, InputSpec):
        inputs = Inputs.of(example)
        return inputs, InputSpec.of(inputs)
    kept = example or input_spec(model)
    if kept is None:
        raise InputError(
            f"{type(model).__name__} comes without a description of its inputs: give example_inputs, or on the command line "
            "--input name:dtype[sizes], for example --input x:float32[2,16]."
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return kept.sample().to(device), kept


def _metadata(model: nn.Module) -> dict[str, str]:
    """What an exported file says of itself: the plan with its ranks, the base's hash, the versions."""
    versions = {"sarac": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    record, weights = record_of(model), adapted_weights(model)
    entries = {"sarac.versions": json.dumps(versions)}
    if record is not None:
        entries |= {"sarac.plan": record.plan.to_json(), "sarac.base": base_hashes(weights)["float32"]}
    return entries


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A folder beside the target, gone afterwards."""
    if target.is_dir():
        raise ExportError(f"{target} is a folder: name a file in it, for example {target / 'model.onnx'}.")
    try:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror}. Choose a folder that exists and is yours.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place(file: Path, target: Path) -> Path:
    try:
        return file.replace(target)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror}.") from error
