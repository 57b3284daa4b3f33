"""Attention in fused graphs: causal masks are proven by working them out, and reshapes that undo each other are gone."""

from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import bert, close, differ, gpt2, llama

from sarac.backends.attention import unmasked
from sarac.backends.onnx import Onnx
from sarac.backends.onnx_file import node_counts
from sarac.backends.reshapes import Size, straightened
from sarac.backends.runtime import Runtime
from sarac.ir.inputs import Inputs

HEAD = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
MASK = """
    n = Shape <start = 1, end = 2> (q)
    length = Squeeze (n)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    places = Range (zero, length, one)
    row = Unsqueeze (places, one_axis)
    column = Unsqueeze (places, zero_axis)
    {hidden}
    none = Constant <value_float = 0.0> ()
    least = Constant <value_float = {least}> ()
    mask = Where (hidden, least, none)
    bias = Unsqueeze (mask, both_axes)
    o = com.microsoft.MultiHeadAttention <num_heads = 2> (q, q, q, , , bias)
"""
LATER = "hidden = Greater (column, row)"


def graph(hidden: str, least: str = "-10000.0", axes: str = "b,s,8") -> onnx_ir.Model:
    """Attention whose mask hides what `hidden` says of `row` and `column`."""
    constants = (
        "<int64[1] one_axis = {1}, int64[1] zero_axis = {0}, int64[2] both_axes = {0, 1}, int64 three = {3}, int64 far = {900}>"
    )
    text = f"{HEAD} g (float[{axes}] q) => (float[{axes}] o) {constants} {{{MASK.format(hidden=hidden, least=least)}}}"
    return onnx_ir.from_proto(onnx.parser.parse_model(text))


def told(program: onnx_ir.Model) -> bool:
    """Whether its attention is told that it looks back only, and given no mask."""
    unmasked(program)
    (node,) = (node for node in program.graph if node.op_type == "MultiHeadAttention")
    looks_back = node.attributes.get_int("unidirectional", 0) == 1
    assert node.inputs[5] is None or not looks_back
    return looks_back


def test_a_mask_is_what_it_comes_to() -> None:
    assert told(graph(LATER))
    assert told(graph("later = LessOrEqual (column, row)\n hidden = Not (later)"))
    assert told(graph(LATER, axes="2,7,8"))
    assert not told(graph("hidden = GreaterOrEqual (column, row)"))
    assert not told(graph("hidden = Less (column, row)"))
    assert not told(graph(LATER, least="-5.0"))


def test_a_mask_that_hides_nothing_goes() -> None:
    for hidden, gone in (("hidden = Less (column, zero)", True), ("hidden = Less (column, one)", False)):
        program = graph(hidden)
        assert not told(program)
        (node,) = (node for node in program.graph if node.op_type == "MultiHeadAttention")
        assert (node.inputs[5] is None) == gone


@pytest.mark.parametrize("limit", ["three", "far"])
def test_a_window_is_not_taken_for_a_causal_mask(limit: str) -> None:
    ago = f"ago = Sub (row, column)\n old = Greater (ago, {limit})\n later = Greater (column, row)\n hidden = Or (old, later)"
    assert not told(graph(ago))
    assert told(graph(ago, axes="2,7,8")) == (limit == "far")  # seven tokens have none 900 ago


def test_a_mask_of_values_is_kept() -> None:
    assert not told(
        graph(
            "some = ReduceMax <keepdims = 0> (q)\n any = Cast <to = 7> (some)\n at = Add (row, any)\n "
            "hidden = Greater (column, at)"
        )
    )


def test_sizes_are_products() -> None:
    two, b, s = Size(2), Size(1, ("b",)), Size(1, ("s",))
    assert b * s * two == two * s * b != b * s
    assert (b * s * two) // (s * two) == b
    assert (b * two) // Size(3) is (b * two) // s is None


def test_reshapes_that_come_back_are_gone() -> None:
    body = "four = Reshape (x, heads)\n three = Reshape (four, flat)\n o = Relu (three)"
    for last, kept in (("-1", False), ("8", False), ("4", None)):
        program = straight(f"<int64[4] heads = {{0, 0, 2, 4}}, int64[3] flat = {{0, 0, {last}}}>", body)
        (relu,) = (node for node in program.graph if node.op_type == "Relu")
        assert (relu.inputs[0] is not program.graph.inputs[0]) == (kept is None)
    turned = straight("<int64[3] other = {0, 4, -1}>", "y = Reshape (x, other)\n o = Relu (y)")
    assert [node.op_type for node in turned.graph] == ["Reshape", "Relu"]


def straight(constants: str, body: str) -> onnx_ir.Model:
    text = f"{HEAD} g (float[b,s,8] x) => (float[b,s,t] o) {constants} {{{body}}}"
    program = onnx_ir.from_proto(onnx.parser.parse_model(text))
    straightened(program)
    return program


IDS = torch.arange(24).reshape(2, 12) % 30


def mistral(window: int) -> nn.Module:
    config = transformers.MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=window, use_cache=False,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config)


@pytest.mark.parametrize(
    ("model", "given", "looks_back"),
    [
        (lambda: llama(1), {}, True),
        (lambda: llama(1), {"attention_mask": torch.ones_like(IDS)}, False),
        (lambda: gpt2(1), {}, True),
        (lambda: mistral(5), {}, False),
        (lambda: bert(1), {}, None),
    ],
    ids=["llama", "llama with a mask", "gpt2", "mistral", "bert"],
)
def test_models(model: Any, given: dict[str, Tensor], looks_back: bool | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = model().eval()
    Onnx(optimize="ort", provider="cuda").write(module, Inputs((), {"input_ids": IDS, **given}), tmp_path / "m.onnx", {})
    nodes = [node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "MultiHeadAttention"]
    attributes = [{one.name: one for one in node.attribute} for node in nodes]
    assert len(nodes) == 1
    assert {"unidirectional" in one for one in attributes} == {bool(looks_back)}
    assert {len(node.input) > 5 and node.input[5] != "" for node in nodes} == {looks_back is False}
    assert node_counts(tmp_path / "m.onnx")["Where"] == 0 or not looks_back
    runtime = Runtime(tmp_path / "m.onnx")
    for rows, columns in ((1, 5), (3, 15)):
        ids = torch.randint(0, 30, (rows, columns))
        some = {name: torch.ones_like(ids) for name in given}
        if some:
            some["attention_mask"][0, :2] = 0
        found = next(iter(runtime(input_ids=ids, **some).values()))
        wanted = next(iter(module(input_ids=ids, **some).values()))
        close(found[0, 2:], wanted[0, 2:])
        differ(found[0, 2:], next(iter(module(input_ids=ids.flip(1), **some).values()))[0, 2:])
