"""Graphs made small and fast: constants folded, repetitions merged, and the fusions of the runtime that will run them."""

from collections.abc import Callable
from typing import Any

import onnx_ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from sarac.backends.lift import Weight, cut

ROUNDS = 2  # what the first round removes lets the second fold more


def tidied(program: onnx_ir.Model, weights: dict[str, Weight]) -> None:
    """Constants folded, nodes over weights cut off, repetitions and leftovers removed.

    The exporters' optimiser builds an index of all nodes for every node, for a rule on slices, which takes longer than all
    the rest of an export. What its other rules gain, ONNX Runtime does itself when it loads.
    """
    passes.InlinePass()(program)
    for _ in range(ROUNDS):
        optimizer.fold_constants(program, onnx_shape_inference=True, should_fold=_quick)
        cut(program, weights)
        passes.RemoveUnusedNodesPass()(program)
        passes.CommonSubexpressionEliminationPass()(program)


def finished(program: onnx_ir.Model) -> None:
    """Constants as initializers, names that are unique, sizes that are numbers, and no path of this machine."""
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program)
    passes.OutputFixPass()(program)
    passes.NameFixPass()(program)
    passes.ClearMetadataAndDocStringPass()(program)
    for value in (*program.graph.inputs, *program.graph.outputs):
        if value.shape is not None:  # a size that the model fixes comes as a symbol named "8"
            value.shape = onnx_ir.Shape([int(str(size)) if str(size).isdigit() else size for size in value.shape])


def fused(program: onnx_ir.Model, weights: dict[str, Weight], provider: str) -> None:
    """ONNX Runtime's own operators for `provider`, "cpu" or "cuda": transformers' rules, its packing on weights as symbols."""
    from transformers.exporters import onnxruntime_fusions as fusions

    passes.InlinePass()(program)
    optimizer.optimize_ir(program, should_fold=_quick)  # the form that the rules know
    cut(program, weights)
    ours: dict[Any, Callable[[onnx_ir.Model], Any]] = {fusions._pack_sibling_matmuls: lambda model: packed(model, weights)}
    for step, providers in fusions._STEPS:
        if providers is None or provider in providers:
            ours.get(step, step)(program)
            cut(program, weights)


def packed(program: onnx_ir.Model, weights: dict[str, Weight]) -> None:
    """One product for those that read one input by weights `(in, out)` of one height: their weights joined, the output split."""
    graph = program.graph
    position = {node: index for index, node in enumerate(graph)}
    sources = dict.fromkeys(node.inputs[0] for node in graph if node.op_type == "MatMul")
    for source in sources:
        siblings = sorted({u for u, i in source.uses() if i == 0 and _product(u, weights)}, key=position.__getitem__)  # type: ignore[union-attr]
        if len(siblings) < 2 or len({(w.shape[0], w.dtype) for w in (s.inputs[1] for s in siblings)}) != 1:  # type: ignore[index, union-attr]
            continue
        matrices = [sibling.inputs[1] for sibling in siblings]
        widths = [int(matrix.shape[1]) for matrix in matrices]  # type: ignore[union-attr, index, arg-type]
        joined = onnx_ir.node("Concat", matrices, {"axis": 1})
        joined.outputs[0].shape = onnx_ir.Shape([matrices[0].shape[0], sum(widths)])  # type: ignore[union-attr, index]
        joined.outputs[0].dtype = matrices[0].dtype  # type: ignore[union-attr]
        product = onnx_ir.node("MatMul", [source, joined.outputs[0]])
        sizes = onnx_ir.node("Constant", [], {"value_ints": widths})
        split = onnx_ir.node("Split", [product.outputs[0], sizes.outputs[0]], {"axis": -1}, num_outputs=len(siblings))
        product.outputs[0].dtype = siblings[0].outputs[0].dtype
        if source.shape is not None:  # type: ignore[union-attr]
            product.outputs[0].shape = onnx_ir.Shape([*source.shape[:-1], sum(widths)])  # type: ignore[union-attr, index]
        graph.insert_before(siblings[0], [joined, product, sizes, split])
        for sibling, part in zip(siblings, split.outputs, strict=True):
            part.shape, part.type = sibling.outputs[0].shape, sibling.outputs[0].type
            onnx_ir.convenience.replace_all_uses_with(sibling.outputs[0], part, replace_graph_outputs=True)
            graph.remove(sibling, safe=True)


def _quick(node: onnx_ir.Node) -> bool | None:
    return False if node.op_type == "Resize" else None  # minutes in onnx's own implementation


def _product(node: onnx_ir.Node, weights: dict[str, Weight]) -> bool:
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return weight is not None and weight.name in weights and weight.shape is not None and len(weight.shape) == 2
