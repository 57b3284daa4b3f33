"""Folding into a file: an adapter into an ONNX export of its base, without the model and without exporting again."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sarac.backends.refold import Weights
from sarac.backends.runtime import Runtime
from sarac.checkpoint import SavedAdapter, base_hashes, read_adapter
from sarac.ir import check
from sarac.ir.adapters import Adapter
from sarac.ir.errors import CheckFailed, CheckpointError, ExportError, NotFoldable
from sarac.ir.graph import Folded, ModelGraph
from sarac.ir.inputs import Inputs
from sarac.ir.layout import Layout
from sarac.placing import aside, free_data, placed

KEY = "sarac.sites"  # the metadata entry with the weights of a plain model that adapters go to
_FREE, _STEPS = (2, 3, 5, 7), 2  # the free sizes of a trial run in turn, and its steps of generation


@dataclass(frozen=True)
class FoldedFile:
    """What was folded into which file: what became of each site's change, and how far the outputs of a trial moved."""

    path: Path
    files: tuple[Path, ...]
    folded: Mapping[str, Folded]
    rewritten: int
    moved: float
    seconds: float

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps({**asdict(self), "path": str(self.path), "files": [str(file) for file in self.files]})

    def sentence(self) -> str:
        """The report in one line."""
        worst = max(self.folded, key=lambda site: self.folded[site].surviving_delta)
        return (
            f"{self.path}: {len(self.folded)} weights folded, {self.rewritten} initializers rewritten in {self.seconds:.1f} s; "
            f"rounding lost at most {self.folded[worst].surviving_delta:.1e} of a delta, at {worst}; on trial inputs the "
            f"outputs moved by {self.moved:.1e} of their spread."
        )


def sites_entry(graph: ModelGraph, dtype: torch.dtype, inputs: Inputs) -> dict[str, str]:
    """The metadata by which an adapter finds its places in an export of a plain model whose own weights are in `dtype`.

    With the shapes of what it was captured on: a size that is free in the graph may have but one value that runs.
    """
    shapes = [list(tensor.shape) for _, tensor in (*check.leaves(inputs.args), *check.leaves(inputs.kwargs))]
    sites = {
        site.name: [site.names, [site.layout.out, site.layout.inner, site.layout.stack, site.layout.split]]
        for site in graph.sites.values()
    }
    found = {"dtype": str(dtype).removeprefix("torch."), "sites": sites, "shapes": shapes}
    return {KEY: json.dumps(found, separators=(",", ":"))}


def fold_onnx(base: str | Path, adapter: str | Path, out: str | Path, *, provider: str = "cpu") -> FoldedFile:
    """Fold an adapter file into an ONNX file that sarac exported from its base, and write the result to `out`.

    Weights are folded in float32 from those in the file and rounded once; the rest is copied. It needs the adapter's stored
    factors (save_adapter(..., factors=True)) or a base in its own precision; NotFoldable for a routed adapter,
    CheckpointError for another base, ExportError where a weight has no place in the file. Both files run once on `provider`.
    """
    started, target = time.perf_counter(), Path(out)
    weights, saved = Weights(Path(base)), read_adapter(adapter)
    places = _Places(weights, saved, str(adapter))
    changes, facts = places.changes(), places.facts
    entries = {"sarac.plan": saved.plan.to_json(), "sarac.base": saved.hashes["float32"], KEY: ""}
    entries["sarac.verification"] = json.dumps({"merged": True, "folded_into": Path(base).name, "comparisons": []})
    with aside(target) as folder:
        made, data = folder / target.name, free_data(target)
        rewritten = weights.write(made, data, changes, entries)
        moved = _moved(Path(base), made, provider, places.shapes)
        if not moved:
            raise CheckFailed(f"{base} and {target} compute the same: the adapter {adapter} is at its start. Train it first.")
        files = (made, made.with_name(data)) if made.with_name(data).exists() else (made,)
        there = placed(files, target)
    return FoldedFile(target, there, facts, rewritten, moved, time.perf_counter() - started)


class _Places:
    """The adapter's sites in a file, and their base: the one that it was trained on, else CheckpointError."""

    def __init__(self, weights: Weights, saved: SavedAdapter, where: str) -> None:
        self.weights, self.saved, self.where, self.facts = weights, saved, where, dict[str, Folded]()
        if "sarac.plan" in weights.metadata:
            raise ExportError(
                f"{weights.path} has an adapter in it already: fold into an export of the base (sarac export BASE base.onnx)."
            )
        found = json.loads(weights.metadata.get(KEY) or '{"dtype": "float32", "sites": {}}')
        self.shapes: list[list[int]] = found.get("shapes", [])
        self.dtype: torch.dtype = getattr(torch, found["dtype"])  # of the model itself, whatever the file's is
        self.layouts = {name: Layout(*map(_tuples, layout)) for name, (_, layout) in found["sites"].items()}
        self.names: dict[str, str] = {}
        for site, adapter in saved.plan.sites.items():
            if not adapter.foldable:
                raise NotFoldable(
                    f"{where} routes at {site}, which has no single weight to fold into: export the adapted model without "
                    "merging, or fold its mean gates in torch (sarac fold --routing mean) and export that."
                )
            names = found["sites"].get(site, [()])[0]
            held = [name for name in names if weights.holds(name)]
            if not held:
                raise ExportError(
                    f"{weights.path} has no weight {site}, which {where} adapts: it is an export of another model, or holds it "
                    "in another form. Export the adapter's own base."
                )
            self.names[site] = held[0]
        self._require_base()

    def changes(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What becomes of each tensor that changes, by the model's names."""
        changed: dict[str, Callable[[Tensor], Tensor]] = {
            self.names[site]: lambda weight, site=site, adapter=adapter: self._folded(weight, site, adapter)  # type: ignore[misc]
            for site, adapter in self.saved.plan.sites.items()
        }
        for name, tensor in self.saved.also_trained.items():
            if not self.weights.holds(name):
                if not tensor.is_floating_point():  # a counter of training, as BatchNorm's, is in no graph
                    continue
                raise ExportError(
                    f"{self.weights.path} has no place for {name}, which {self.where} trained whole: fold in torch and export "
                    "again (sarac export --merge)."
                )
            changed[name] = lambda weight, tensor=tensor: tensor.to(weight.dtype)  # type: ignore[misc]
        return changed

    def _folded(self, weight: Tensor, site: str, adapter: Adapter) -> Tensor:
        """The weight, as it is stored, with its change: as passes.fold computes it."""
        layout, wide = self.layouts[site], torch.promote_types(weight.dtype, torch.float32)
        matrix: Tensor = layout.matrix(weight)
        tensors = {role: tensor.to(wide) for role, tensor in self.saved.adapters[site].items()}
        if not {"u", "v"} <= set(tensors):
            made = adapter.init(matrix.to(self.dtype), torch.Generator().manual_seed(0), site)
            tensors = {**{role: tensor.to(wide) for role, tensor in made.items()}, **tensors}
        delta = layout.stored(adapter.delta(tensors), tuple(weight.shape))
        rounded: Tensor = (weight.to(wide) + delta).to(weight.dtype)
        lost = rounded.double() - weight.double() - delta.double()
        share = check.relative_norm(lost, delta) if float(delta.norm()) else 0.0
        self.facts[site] = Folded(check.relative_norm(delta, weight), share, "stored")
        return rounded

    def _require_base(self) -> None:
        """Refuse another base, and a rounded one where factors would have to be recomputed from it."""
        dtypes = {str(self.weights.tensor(name).dtype).removeprefix("torch.") for name in list(self.names.values())[:1]}
        found = base_hashes(_Lazily(self), tuple(dict.fromkeys(["float32", *dtypes & {"bfloat16", "float16"}])))
        if found["float32"] == self.saved.hashes["float32"]:
            return
        rounded = next((name for name in dtypes if name != "float32" and found.get(name) == self.saved.hashes.get(name)), None)
        if rounded is None:
            raise CheckpointError(
                f"{self.where} was trained on another base than {self.weights.path} has: the adapted weights' hash is "
                f"{self.saved.hashes['float32'][:12]}… there and {found['float32'][:12]}… here. Export its own base."
            )
        lost = next((site for site, roles in self.saved.adapters.items() if not {"u", "v"} <= set(roles)), None)
        if lost is not None:
            raise CheckpointError(
                f"{self.weights.path} holds the base rounded to {rounded}, and {self.where} has no factors for {lost}: "
                "recomputed from rounded weights they would be wrong by percents. Save it with factors=True (--factors), or "
                "export the base in its own precision."
            )


class _Lazily(Mapping[str, Tensor]):
    """The base weights (out, in) of an adapter's sites, each read from the file when it is asked for."""

    def __init__(self, places: _Places) -> None:
        self._places = places

    def __getitem__(self, site: str) -> Tensor:
        found: Tensor = self._places.layouts[site].matrix(self._places.weights.tensor(self._places.names[site]))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places.names)

    def __len__(self) -> int:
        return len(self._places.names)


def _moved(base: Path, made: Path, provider: str, shapes: list[list[int]]) -> float:
    """How far the outputs of the two files are apart on inputs of small whole numbers; CheckFailed where they are not finite."""
    both = [_tried(Runtime(path, provider), shapes) for path in (base, made)]
    check.require_finite(both[1], "The folded file's output")
    return check.difference(both[1], both[0]).error


def _tried(runtime: Runtime, shapes: list[list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if runtime.generates:
        ids = torch.randint(0, 2, (_FREE[0], _FREE[2]), generator=generator)
        return {"logits": runtime.generator.follow(ids.to(runtime.device), torch.ones_like(ids).to(runtime.device), _STEPS).cpu()}
    free = dict.fromkeys(size for shape in runtime.shapes.values() for size in shape if isinstance(size, str))
    sizes: dict[Any, int] = {name: _FREE[index % len(_FREE)] for index, name in enumerate(free)}
    given, wanted = {}, [[sizes.get(size, size) for size in shape] for shape in runtime.shapes.values()]
    known = shapes if [len(one) for one in shapes] == [len(one) for one in wanted] else wanted
    for name, shape in zip(runtime.shapes, known, strict=True):
        numbers = torch.randint(0, 2, shape, generator=generator)
        noise = torch.randn(numbers.shape, generator=generator)
        given[name] = (
            noise.to(runtime.dtypes[name]) if runtime.dtypes[name].is_floating_point else numbers.to(runtime.dtypes[name])
        )
    return runtime.run(Inputs((), given))


def _tuples(entry: Any) -> Any:
    return tuple(entry) if isinstance(entry, list) else entry
