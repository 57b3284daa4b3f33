"""Capturing: a torch module as an ONNX graph, by transformers' own exporter where it is theirs, else by torch's."""

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir
import torch
import transformers
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from torch.onnx import _flags
from torch.utils import _pytree as pytree

from sarac.backends.pairing import named_leaves
from sarac.ir.errors import ExportError, InputError, near
from sarac.ir.inputs import Inputs

Sizes = dict[str, Any]  # by input, what stays free by axis
_SIZES = re.compile(r"(\w+)\[([^\]]*)\]")
_ATTENTION = "_attn_implementation"  # of a transformers config
_TRACEABLE = ("eager", "sdpa")  # its values that an exporter can follow


def captured(model: nn.Module, inputs: Inputs, opset: int, free: Sizes | None) -> onnx_ir.Model:
    """The graph as it was captured, without any optimisation; ExportError where the model cannot be captured.

    `free`: the sizes that stay free by input and axis; empty for all that can, None for none.
    """
    found: Any
    signature = inspect.signature(model.forward)
    # Capturing marks the sizes of the very tensors it is given, also for the attempts that follow.
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (inputs.args, dict(inputs.kwargs)))
    try:
        if isinstance(model, transformers.PreTrainedModel):
            # Two seconds to import: only who exports waits for it.
            from transformers.exporters.configs import OnnxConfig
            from transformers.exporters.exporter_onnx import OnnxExporter

            given = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
            shapes = free or None
            config = OnnxConfig(dynamic=free is not None, dynamic_shapes=shapes, opset_version=opset, optimize=False)
            program: onnx_ir.Model = OnnxExporter().export(model, given, config).program  # type: ignore[no-untyped-call]
            return _called(program, free or {})
        bound = dict(signature.bind(*args, **kwargs).arguments)
        found = torch.onnx.export(
            model,
            args if kwargs else (*args, {}),  # a dict in the last place would be taken for the keyword arguments
            kwargs=kwargs,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=free or (free if free is None else pytree.tree_map(_free, bound)),
            optimize=False,
        )
        return _called(_named(found.model, inputs, model), free or {})
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX: {_cause(error)} It was captured on ({inputs.describe()}): "
            f"{_advice(free or {})}"
        ) from error


def _advice(free: Sizes) -> str:
    fixed = ", ".join(name for name, axes in free.items() if axes is None)
    if fixed:
        return f"`dynamic` names no sizes of {fixed}, which are fixed so: name them as well."
    return "look for Python that depends on tensor values, or for inputs beyond tensors, and export a module without."


def named_sizes(text: str, model: nn.Module, inputs: Inputs) -> Sizes:
    """Free sizes from text such as "x[batch,length,8] mask[batch,length]": words are free, and equal ones are one size."""
    text = str(text)
    bound = dict(inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments)
    given = {name: sizes.split(",") for name, sizes in _SIZES.findall(text)}
    if not given or _SIZES.sub("", text).strip(" ,;"):
        raise ExportError(f'dynamic={text!r} is not understood: write "auto", "static", or sizes as in "x[batch,length,8]".')
    free = {word.strip() for words in given.values() for word in words if not word.strip().isdigit()}
    odd = next((word for word in free if not word.isidentifier()), None)
    if odd is not None:
        raise ExportError(f"dynamic={text!r} has the size {odd!r}: a free size is a word, such as batch; another is its number.")
    dims, sizes = {word: torch.export.Dim(word) for word in free}, Sizes()
    for name, value in bound.items():
        axes = [word.strip() for word in given.pop(name, [])]
        if axes and (not isinstance(value, Tensor) or len(axes) != value.dim()):
            raise ExportError(f"dynamic names {len(axes)} sizes of {name}, which is {getattr(value, 'shape', type(value))}.")
        for axis, word in enumerate(axes):
            if word.isdigit() and int(word) != value.shape[axis]:
                raise ExportError(f"dynamic has {word} for size {axis} of {name}, which is {value.shape[axis]} there.")
        sizes[name] = {axis: dims[word] for axis, word in enumerate(axes) if word in dims} or None
    if given:
        raise ExportError(f"dynamic names {next(iter(given))!r}, which is no input. {near(next(iter(given)), bound)}")
    return sizes


@contextlib.contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """Exporters without prints and notices; the model in eval mode, without cache, gradients, untraceable attention."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    changes: list[tuple[Any, str, Any]] = [
        *((module, "training", False) for module in model.modules()),
        *((config, "use_cache", False) for config in configs if getattr(config, "use_cache", None)),
        *((c, _ATTENTION, "sdpa") for c in configs if (getattr(c, _ATTENTION, None) or "sdpa") not in _TRACEABLE),
        # Left on, sizes that the model fixes (a Linear's input) would stand in the graph as free ones.
        (_flags, "PREFER_DEFERRED_RUNTIME_ASSERTS_OVER_GUARDS", False),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    own_forward, logged = "forward" in vars(model), logging.root.manager.disable
    try:
        logging.disable(max(logged, logging.ERROR))
        for owner, name, value in changes:
            setattr(owner, name, value)
        void = io.StringIO()
        with contextlib.redirect_stdout(void), contextlib.redirect_stderr(void), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        logging.disable(logged)
        if not own_forward:  # transformers' exporter leaves the bound method there, and copies of the model would call it
            vars(model).pop("forward", None)


def two_rows(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs with a second row where all have one and the model takes two: a batch of 1 is captured as a constant."""
    rows = {t.shape[0] for t in (*inputs.args, *inputs.kwargs.values()) if isinstance(t, Tensor) and t.dim()}
    if rows == {1}:
        wide = inputs.map(lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t)
        with contextlib.suppress(InputError):
            wide.call(model)
            return wide
    inputs.call(model)
    return inputs


def _free(value: Any) -> dict[int, Any] | None:
    """The free sizes of an input: all but those of 1, which broadcast."""
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes as auto

    sizes = auto(value) if isinstance(value, Tensor) else None
    return sizes and {axis: size for axis, size in sizes.items() if value.shape[axis] != 1}


def _called(program: onnx_ir.Model, free: Sizes) -> onnx_ir.Model:
    """The graph with its free sizes called as they were asked for; ExportError for one that the model fixes."""
    words: dict[Any, str] = {}
    for value in program.graph.inputs:
        for axis, dim in (free.get(str(value.name)) or {}).items():
            found = value.shape[axis] if value.shape is not None else None
            if isinstance(found, int):
                raise ExportError(
                    f"dynamic has the free size {dim.__name__!r} of {value.name}, which the model fixes at {found}: write that."
                )
            words[getattr(found, "value", None)] = dim.__name__
    every = (*program.graph.inputs, *program.graph.outputs, *(out for node in program.graph.all_nodes() for out in node.outputs))
    for value in every if words else ():
        for axis, found in enumerate(value.shape or ()):
            if value.shape is not None and not isinstance(found, int) and found.value in words:
                value.shape[axis] = words[found.value]
    return program


def _named(program: onnx_ir.Model, inputs: Inputs, model: nn.Module) -> onnx_ir.Model:
    """The graph with its outputs called by their paths in what the model returns, as transformers' exporter does."""
    names, taken = list(named_leaves(inputs.call(model))), [value.name for value in program.graph.inputs]
    passes.OutputFixPass()(program)  # an output that is an input, or another output, gets a value of its own
    outputs = [f"output.{name}" if name in taken else name for name in names]
    ends = (*program.graph.inputs, *program.graph.outputs)
    if len(ends) == len(taken) + len(outputs):
        for value, name in zip(ends, (*taken, *outputs), strict=True):
            value.name = name
    return program


def _cause(error: BaseException) -> str:
    """The first line of what an error came from: the exporters wrap it in reports of many pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}."
