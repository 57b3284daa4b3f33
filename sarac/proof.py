"""Proofs: an exported file held against torch at shapes that its capture did not see, and what came out of it."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from sarac.backends.mixed import typed
from sarac.backends.pairing import paired
from sarac.ir import check
from sarac.ir.errors import InputError
from sarac.ir.graph import Folded, ModelGraph
from sarac.ir.inputs import Inputs
from sarac.ir.layers import adapted, evaluating
from sarac.ir.record import record_of
from sarac.ir.standing import Standing, widened
from sarac.surgery import disabled

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
    dtype: str = "float32"
    kept_float32: tuple[str, ...] = ()
    layers: str = ""
    swappable: str = ""

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
                "dtype": self.dtype,
                "kept_float32": list(self.kept_float32),
                "layers": self.layers,
                "bytes": sum(file.stat().st_size for file in self.files if file.exists()),
                "routed": list(self.routed),
                "swappable": self.swappable,
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
        kind = {"whole": "adapters swap in", "rowwise": "each row takes its own adapter"}.get(self.swappable, kind)
        shown = ", ".join(self.kept_float32[:3]) + (f" and {len(self.kept_float32) - 3} more" if self.kept_float32[3:] else "")
        kind += f"; {shown} in float32" if shown else ""
        table = Table(title=f"{self.path.name}: {kind}", title_justify="left")
        table.add_column("inputs")
        for heading in ("ONNX error", "largest", "merged error", "largest"):
            table.add_column(heading, justify="right")
        for row in self.comparisons:
            figures = (row.onnx_error, row.onnx_max_error, row.merged_error, row.merged_max_error)
            table.add_row(row.inputs, *(f"{figure:.2e}" for figure in figures))
        return table


def hold(
    model: nn.Module,
    graph: ModelGraph,
    run: Callable[[Inputs], Mapping[str, Tensor]],
    unseen: Sequence[Inputs],
    dtype: torch.dtype | None = None,
) -> tuple[Comparison, ...]:
    """What `run` gives for inputs, against torch: the comparisons, every one within its gate; CheckFailed at the first beyond.

    `graph` holds what was emitted of `model`, its folded weights made anew for every call that reads them. A file in another
    `dtype` than the model's is held to the gate of that dtype; the emitted weights then are rounded to it, and torch computes
    with them in the model's own.
    """
    own, emitted = check.coarsest(model), graph.module
    wanted, rows = dtype or own, []
    made = {name: functools.partial(_made, make, own) for name, make in graph.waiting.items()}
    with torch.no_grad(), evaluating(model), evaluating(emitted), typed(emitted, None if wanted == own else own):
        for inputs in unseen:
            unmerged = inputs.call(model)
            reference = _wider(model, own, inputs) if emitted is not model and wanted == own else None
            rounding = functools.partial(rounding_of, model, inputs, unmerged) if wanted == own else None
            with Standing(made):
                merged = inputs.call(emitted)
            check.require_finite(merged, "The torch model's output")
            between = check.require_close(merged, unmerged, wanted, "The merged and the adapted torch model", rounding)
            if reference is not None:
                check.require_merge_keeps(merged, unmerged, reference, own)
            ours, theirs = paired(run(inputs), unmerged)
            check.require_finite(ours, "The ONNX model's output")
            found = check.require_close(ours, theirs, wanted, "The ONNX model and the adapted torch model", rounding)
            if record_of(model) is not None:
                with disabled(model):
                    plain = inputs.call(model)
                    check.require_different(merged, plain, "The merged model's outputs and the base's", _UNTRAINED)
                    base = paired(ours, plain)[1]
                    check.require_nearer(ours, theirs, base, "The outputs", "the adapted model's", "the base's", _UNTRAINED)
            errors = (found.error, found.max_error, between.error, between.max_error)
            rows.append(Comparison(inputs.describe(), *errors))
    return tuple(rows)


def rounding_of(model: nn.Module, inputs: Inputs, outputs: Any) -> float:
    """How far these outputs of `model` lie from what the next wider dtype gives; 0 where there is none."""
    reference = _wider(model, check.coarsest(model), inputs, plain=True)
    return 0.0 if reference is None else check.difference(outputs, reference).error


def noted(merged: bool, comparisons: tuple[Comparison, ...], folded: Mapping[str, Folded]) -> dict[str, str]:
    """What an exported file says of the checks that it passed, as its metadata."""
    surviving = {site: facts.surviving_delta for site, facts in folded.items()}
    checked = {"merged": merged, "comparisons": [asdict(row) for row in comparisons], "surviving_delta": surviving}
    return {"sarac.verification": json.dumps(checked)}


def _made(make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return make().detach().to(dtype)


def _wider(model: nn.Module, dtype: torch.dtype, inputs: Inputs, plain: bool = False) -> Any:
    """What the adapted (or `plain`) model gives in the next wider dtype, to judge rounding by; None where there is none."""
    if dtype == torch.float64 or not (plain or any(True for _ in adapted(model))):
        return None
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    try:
        with widened(model, wide):
            return inputs.map(lambda tensor: tensor.to(wide) if tensor.is_floating_point() else tensor).call(model)
    except InputError:  # as a recurrent layer, which asks for its weights' own dtype
        return None
