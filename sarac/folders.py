"""What of a folder's weights is linear, and their analysis without the model: read one at a time, never all of them.

Where config.json names a transformers model, that is built without values and traced, and its sites are those of the files
where names and shapes agree. What the files hold besides, or without such a config, is judged by its shape and name.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sarac.ir.cache import store
from sarac.ir.errors import CheckpointError, PlanError
from sarac.ir.graph import ModelGraph, Site
from sarac.ir.layout import MATRIX, Layout, kernel, matrices
from sarac.ir.measure import Weight, measure
from sarac.ir.record import FOLDER_FILE
from sarac.passes.choose import Where, chosen_sites
from sarac.recipe import described
from sarac.report import Analysis
from sarac.shards import Entry, entries, found, metadata, require_weights
from sarac.trace import trace

# Names that say of what a module would have told, as models mostly give them.
_HEAD = re.compile(r"^(lm_head|classifier|score|qa_outputs|embed_out|head|output)\b")
_EMBEDDING = re.compile(r"embed|\bwte\b|\bwpe\b|(?:^|\.)shared\.weight$")
_NO_WEIGHT = re.compile(
    r"bias|mask|index|table|freq|running_|scale|zero|absmax|quant|cache|token$|pos_embed|codebook|lora_|sara_"
)
_SCALES = ("weight_scale", "weight_scale_inv", "SCB")  # of llm-compressor, of DeepSeek in blocks, of bitsandbytes for each row
_BLOCK = 128  # the side of a block of which a file does not say it
_NARROW = 16  # up to how many numbers a last dimension is a kernel's and no matrix's


@dataclass(frozen=True)
class Folder:
    """The linear weights in a folder's files, or in one file, and what is not one: nothing is read yet."""

    path: Path
    title: str
    parameters: int
    weights: Mapping[str, Weight]
    graph: ModelGraph = field(repr=False)  # of no module: its sites, and what was left out

    @classmethod
    def at(cls, source: str | Path) -> "Folder | None":
        """What lies at this path; None where a model is to be opened for it. What cannot be read is a CheckpointError."""
        path = Path(source)
        if not found(path) or (path / FOLDER_FILE).is_file():
            require_weights(path)
            return None
        _require_model(path)
        held, model, why = entries(path), None, "no config.json says of which model"
        if (path / "config.json").is_file():
            try:
                model = described(path)
            except CheckpointError as error:
                why = str(error)
        seen = None if model is None else trace(model)
        return _of(path, held, seen, why)

    def chosen(self, where: Where) -> dict[str, Site]:
        """The weights that `where` takes."""
        if not self.graph.sites:
            first = next((f" {name}: {why}." for name, why in self.graph.skipped.items()), "")
            raise PlanError(f"{self.path} holds no linear weight.{first} Name a folder with a model's weights.")
        return chosen_sites(self.graph, where)

    def analyze(
        self, threshold: float, where: Where, progress: Callable[[str], None] | None = None, distributed: bool = False
    ) -> Analysis:
        """Measure what `where` takes, reading one weight after the other."""
        chosen = self.chosen(where)
        weights = [self.weights[name] for name in chosen]
        spectra = measure(weights, cache=store(), progress=progress, distributed=distributed)
        sites = tuple(replace(site, spectrum=spectra[name]) for name, site in chosen.items())
        others = {name: site for name, site in self.graph.sites.items() if name not in chosen}
        reasons = {name: site.reason or "`where` leaves it out" for name, site in others.items()}
        return Analysis(sites, threshold, self.title, self.parameters, {**reasons, **self.graph.skipped})


def _require_model(path: Path) -> None:
    """Refuse what holds adapters alone."""
    if path.is_file() and "sarac_adapter" in metadata(path):
        raise CheckpointError(f"{path} holds adapters of sarac's alone: name the model that they are for.")
    if path.is_dir() and (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds PEFT adapters alone: name the model that they are for.")


def _of(path: Path, held: Mapping[str, Entry], seen: ModelGraph | None, why: str) -> Folder:
    sites: dict[str, Site] = {}
    weights: dict[str, Weight] = {}
    skipped: dict[str, str] = {}
    known, taken = dict(_known(held, seen)) if seen is not None else {}, set[str]()
    for certain, entry, names in known.values():
        taken |= names
        _take(certain, entry, held, sites, weights, skipped)
    missing = [site.name for site in seen.sites.values() if site.name not in known] if seen is not None else []
    others = [entry for name, entry in held.items() if name not in taken and len(entry.shape) >= 2]
    reasons = dict(_reasons(held, seen)) if seen is not None else {}
    for entry in others:
        guess = None if entry.name in reasons else _supposed(entry)
        if guess is None:
            skipped[entry.name] = reasons.get(entry.name, "no weight of a layer, by its name")
        else:
            _take(guess, entry, held, sites, weights, skipped)
    skipped |= {name: f"{path.name} does not hold it under this name" for name in missing if name not in sites}
    order = dict.fromkeys([*(seen.sites if seen is not None else ()), *held])
    sites = {name: sites[name] for name in order if name in sites}
    parameters = sum(entry.size for entry in held.values() if _numbers(entry) and not _NO_WEIGHT.search(entry.name))
    title = _title(path, seen, len([name for name in sites if name not in known]), why)
    return Folder(path, title, parameters, weights, ModelGraph(nn.Module(), sites, {}, skipped))


def _title(path: Path, seen: ModelGraph | None, guessed: int, why: str) -> str:
    name = path.resolve().name
    if seen is None:
        return f"{name}, by names and shapes ({why})"
    rest = f", {guessed} weights by names and shapes" if guessed else ""
    return f"{name}, as {type(seen.module).__name__}{rest}"


def _known(held: Mapping[str, Entry], seen: ModelGraph) -> Iterator[tuple[str, tuple[Site, Entry, set[str]]]]:
    """The sites of the model whose weight the files hold, in its shape, under any of its names."""
    for site in seen.sites.values():
        stored = seen.module.get_parameter(site.name).shape
        names = {name for alias in site.names for name in _spellings(alias, seen.module)}
        present = [name for name in names if name in held and held[name].shape == tuple(stored)]
        if present:
            yield site.name, (site, held[min(present)], set(present))
        else:
            _require_no_lie(site, stored, [held[name] for name in sorted(names) if name in held])


def _require_no_lie(site: Site, stored: torch.Size, entries: list[Entry]) -> None:
    """Refuse plain numbers under a weight's name in another shape; packed ones have a shape of their own."""
    for entry in entries:
        if entry.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16) and len(entry.shape) == len(stored):
            raise CheckpointError(
                f"{entry.file} has {entry.name} of shape {tuple(entry.shape)}, and the model of config.json has {tuple(stored)}: "
                "the two are not of one model. Fetch the model's files again."
            )


def _reasons(held: Mapping[str, Entry], seen: ModelGraph) -> Iterator[tuple[str, str]]:
    for name, why in seen.skipped.items():
        yield from ((spelt, why) for spelt in _spellings(name, seen.module) if spelt in held)


def _spellings(name: str, model: nn.Module) -> tuple[str, str, str]:
    """A parameter's name, and as it stands in a file of the model with or without its head."""
    prefix = getattr(model, "base_model_prefix", "")
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


def _supposed(entry: Entry) -> Site | None:
    """The site that a tensor is by its shape and name; None where it is no weight."""
    if _NO_WEIGHT.search(entry.name.rpartition(".")[2]) or not _numbers(entry) or entry.size == 0:
        return None
    layout = _layout(entry)
    parts, out, inner = layout.sizes(entry.shape)
    reason = "the output head, by its name" if _HEAD.search(entry.name) else ""
    if not reason and len(entry.shape) == 2 and _EMBEDDING.search(entry.name):
        reason = "an embedding, by its name"
    if not reason and min(out, inner) == 1:
        reason = "a vector in the shape of a matrix"
    return Site(entry.name, (entry.name,), (out, inner), entry.dtype, "weight", layout, parts, reason=reason, default=not reason)


def _layout(entry: Entry) -> Layout:
    dims = len(entry.shape)
    if dims == 2:
        return MATRIX
    narrow = dims > 3 or entry.shape[-1] <= _NARROW or "conv" in entry.name
    return kernel(dims) if narrow else matrices(dims)


def _take(
    site: Site,
    entry: Entry,
    held: Mapping[str, Entry],
    sites: dict[str, Site],
    weights: dict[str, Weight],
    skipped: dict[str, str],
) -> None:
    """Note a site with how its values are read, or why it has none."""
    scale, small = _scale(entry, held), entry.dtype.itemsize == 1
    if not _numbers(entry) or (scale is None and not entry.dtype.is_floating_point):
        skipped[site.name] = f"it is stored as {str(entry.dtype).removeprefix('torch.')}, without scales that sarac knows"
        return
    dtype = torch.float32 if scale is not None and small else entry.dtype
    sites[site.name] = replace(site, dtype=entry.dtype)
    weights[site.name] = Weight(site.name, site.full_shape, dtype, partial(_values, site.layout, entry, scale))


def _numbers(entry: Entry) -> bool:
    """Whether a tensor's values are those of a weight, or can be with their scales."""
    wide = entry.dtype.is_floating_point and entry.dtype != torch.float8_e8m0fnu
    return wide or entry.dtype == torch.int8


def _scale(entry: Entry, held: Mapping[str, Entry]) -> Entry | None:
    """The scales of a tensor of one byte a value: of all of it, of each row, or of each block."""
    if entry.dtype.itemsize != 1 or len(entry.shape) != 2:
        return None
    beside = (held.get(f"{entry.name.removesuffix('weight')}{name}") for name in _SCALES)
    return next((one for one in beside if one is not None and _blocks(entry.shape, one.shape)), None)


def _blocks(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    """How many rows and columns one scale is for; () where that is not known."""
    counts = (*scale, 1) if len(scale) == 1 else scale or (1, 1)
    if len(counts) != 2 or 0 in counts:
        return ()
    if all(-(-size // _BLOCK) == count for size, count in zip(shape, counts, strict=True)):
        return (_BLOCK, _BLOCK)
    even = all(size % count == 0 for size, count in zip(shape, counts, strict=True))
    return (shape[0] // counts[0], shape[1] // counts[1]) if even else ()


def _values(layout: Layout, entry: Entry, scale: Entry | None) -> Tensor:
    """A weight as (out, in) or (parts, out, in)."""
    values = entry.read()
    if scale is not None:
        values = values.float()
        factors = scale.read().float().reshape((*scale.shape, 1) if len(scale.shape) == 1 else scale.shape or (1, 1))
        factors = factors / 127.0 if scale.name.endswith("SCB") else factors
        rows, columns = _blocks(entry.shape, scale.shape)
        for start in range(0, len(values), rows):  # a block of rows at a time: of a large weight there is no room for two
            wide = factors[start // rows].repeat_interleave(columns)[: values.shape[1]]
            values[start : start + rows] *= wide
    matrix: Tensor = layout.matrix(values)
    return matrix
