"""Graphs made small and fast: constants folded, repetitions merged, and the fusions of the runtime that will run them."""

from collections.abc import Callable
from typing import Any

import onnx_ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from sarac.backends.attention import unmasked
from sarac.backends.lift import Weight, cut
from sarac.backends.reshapes import straightened

ROUNDS = 2  # what the first round removes lets the second fold more


def tidied(program: onnx_ir.Model, weights: dict[str, Weight], rounds: int = ROUNDS) -> None:
    """Constants folded, nodes over weights cut off, repetitions and leftovers removed; no rounds: the second alone.

    The exporters' optimiser builds an index of all nodes for every node, for a rule on slices, which takes longer than all
    the rest of an export. What its other rules gain, ONNX Runtime does itself when it loads.
    """
    passes.InlinePass()(program)
    cut(program, weights)
    for _ in range(rounds):
        optimizer.fold_constants(program, onnx_shape_inference=True, should_fold=_quick)
        cut(program, weights)
        passes.RemoveUnusedNodesPass()(program)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program)
        passes.DeduplicateInitializersPass()(program)  # without it, what every layer works out of a constant stays in each
        passes.CommonSubexpressionEliminationPass()(program)


def finished(program: onnx_ir.Model) -> None:
    """Names that are unique, sizes that are numbers, and no path of this machine."""
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program)
    passes.OutputFixPass()(program)
    passes.NameFixPass()(program)
    passes.ClearMetadataAndDocStringPass()(program)
    for value in (*program.graph.inputs, *program.graph.outputs):
        if value.shape is not None:  # a size that the model fixes comes as a symbol named "8"
            value.shape = onnx_ir.Shape([int(str(size)) if str(size).isdigit() else size for size in value.shape])


def fused(program: onnx_ir.Model, weights: dict[str, Weight], provider: str, *, stepping: bool = False) -> None:
    """ONNX Runtime's own operators for `provider`, "cpu" or "cuda": transformers' rules, its packing on weights as symbols.

    `stepping`: the graph is a step of generation: masks let every row see something, and products of few rows are joined.
    Elsewhere on CUDA what splits them again would read and write more than one large product gains, 2.5 of 19 ms for Llama.
    """
    from transformers.exporters import onnxruntime_fusions as fusions  # seconds to import: only who fuses waits

    passes.InlinePass()(program)
    optimizer.optimize_ir(program, should_fold=_quick)  # the form that the rules know
    cut(program, weights)
    joins = stepping or provider != "cuda"
    ours: dict[Any, Callable[[onnx_ir.Model], Any]]
    ours = {fusions._pack_sibling_matmuls: lambda model: packed(model, weights) if joins else None}
    for step, providers in fusions._STEPS:
        if providers is None or provider in providers:
            ours.get(step, step)(program)  # type: ignore[no-untyped-call]
            cut(program, weights)
    # The rules fuse these a second time after they undid them.
    fusions._unfuse_mixed_dtype_skip_norms(program)
    unmasked(program, seeing=stepping)
    straightened(program)


def packed(program: onnx_ir.Model, weights: dict[str, Weight]) -> None:
    """One product for those that read one input by weights `(in, out)` of one height: their weights joined, the output split."""
    graph = program.graph
    position = {node: index for index, node in enumerate(graph)}
    for source in dict.fromkeys(node.inputs[0] for node in graph if node.op_type == "MatMul"):
        readers = {user for user, index in source.uses() if index == 0 and _product(user, weights)} if source else set()
        siblings = sorted(readers, key=position.__getitem__)
        matrices = [matrix for sibling in siblings if (matrix := sibling.inputs[1]) is not None]
        shapes = [tuple(matrix.shape or ()) for matrix in matrices]
        if source is None or len(siblings) < 2 or len({(m.dtype, s[0]) for m, s in zip(matrices, shapes, strict=True)}) != 1:
            continue
        joined = onnx_ir.node("Concat", matrices, {"axis": 1})
        sizes = onnx_ir.node("Constant", [], {"value_ints": [int(str(shape[1])) for shape in shapes]})
        product = onnx_ir.node("MatMul", [source, joined.outputs[0]])
        split = onnx_ir.node("Split", [product.outputs[0], sizes.outputs[0]], {"axis": -1}, num_outputs=len(siblings))
        total = sum(int(str(shape[1])) for shape in shapes)
        joined.outputs[0].shape, joined.outputs[0].type = onnx_ir.Shape([shapes[0][0], total]), matrices[0].type
        product.outputs[0].type = siblings[0].outputs[0].type
        product.outputs[0].shape = source.shape and onnx_ir.Shape([*source.shape[:-1], total])
        graph.insert_before(siblings[0], [joined, sizes, product, split])
        for sibling, part in zip(siblings, split.outputs, strict=True):
            part.shape, part.type = sibling.outputs[0].shape, sibling.outputs[0].type
            onnx_ir.convenience.replace_all_uses_with(sibling.outputs[0], part, replace_graph_outputs=True)
            graph.remove(sibling, safe=True)


def _quick(node: onnx_ir.Node) -> bool | None:
    return False if node.op_type == "Resize" else None  # minutes in onnx's own implementation


def _product(node: onnx_ir.Node, weights: dict[str, Weight]) -> bool:
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return weight is not None and weight.name in weights and weight.shape is not None and len(weight.shape) == 2
