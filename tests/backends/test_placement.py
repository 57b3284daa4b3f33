"""What computes on the CPU beside a GPU, and how often data goes between the two."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest

from sarac.backends import onnx_file, runtime
from sarac.backends.placement import Placement, computing, copies, placement
from sarac.backends.providers import Start
from sarac.backends.runtime import Runtime
from sarac.ir.errors import SaracWarning

LOG = """[W:onnxruntime:, transformer_memcpy.cc:111 ApplyImpl] 12 Memcpy nodes are added to the graph main_graph for
CUDAExecutionProvider. It might have negative impact on performance (including unable to run CUDA graph).
[W:onnxruntime:, transformer_memcpy.cc:111 ApplyImpl] 2 Memcpy nodes are added to the graph sub_graph1 for
[W:onnxruntime:, session_state.cc:1280 VerifyEachNodeIsAssignedToAnEp] Some nodes were not assigned to the"""

GRAPH = """<ir_version: 10, opset_import: ["": 20]>
g (float[n, 4] x, int64[1] i) => (float[n, 4] y, int64[2] sum, float[2] product)
<int64[2] size, float[2] real, float[n, 4] ordered, int64[n, 4] places>
{ size = Shape(x) sum = Add(size, i) real = Cast<to=1>(size) product = Mul(real, real)
  k = Constant<value_ints=[4]>() ordered, places = TopK(x, k) y = Neg(ordered) }"""


def saved(path: Path) -> Path:
    model = onnx.parser.parse_model(GRAPH)
    for node in model.graph.node:
        node.name = f"{node.op_type}_of_{node.output[0]}"
    onnx.save(model, path)
    return path


def node(kind: str, name: str = "") -> SimpleNamespace:
    return SimpleNamespace(op_type=kind, name=name)


def test_copies_are_counted_in_all_graphs() -> None:
    assert copies(LOG) == 14
    assert copies(LOG.partition("2 Memcpy")[0]) == 0
    assert copies("") == 0


def test_arithmetic_on_sizes_is_meant_for_the_cpu(tmp_path: Path) -> None:
    types = onnx_file.output_types(saved(tmp_path / "g.onnx"))
    assert types["Shape_of_size"] == types["Add_of_sum"] == (onnx.TensorProto.INT64,)
    assert types["Mul_of_product"] == (onnx.TensorProto.FLOAT,)
    assert types["TopK_of_ordered"] == (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)
    assert types["Constant_of_k"] == (0,), "the file does not tell"
    found = computing([node(name.partition("_")[0], name) for name in types], types)
    assert found == Counter(Cast=1, Mul=1, TopK=1, Neg=1)
    assert computing([node("Add", "unknown"), node("Add"), node("LSTM"), node("ArgMax", "ints")], {"ints": (7,)}) == Counter(
        LSTM=1, ArgMax=1
    )


def test_placement_is_read_off_a_session(tmp_path: Path) -> None:
    path, options = saved(tmp_path / "g.onnx"), onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert placement(Start(session, log=LOG), path) == Placement(), "on the CPU, all is where it should be"
    beside = SimpleNamespace(
        get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        get_provider_graph_assignment_info=session.get_provider_graph_assignment_info,
    )
    found = placement(Start(beside, log=LOG), path)
    assert found == Placement(14, Counter(Cast=1, Mul=1, TopK=1, Neg=1))
    assert str(found).startswith("4 nodes compute on the CPU (1 x ")
    assert str(found).endswith(" and 14 copies go between host and device (Memcpy)")
    assert str(Placement()) == ""


def test_who_opens_such_a_file_is_warned(tmp_path: Path, monkeypatch, recwarn) -> None:
    path = saved(tmp_path / "g.onnx")
    Runtime(path)
    assert not recwarn.list
    monkeypatch.setattr(runtime, "placement", lambda start, path: Placement(3, Counter(LSTM=2, NonZero=1)))
    with pytest.warns(SaracWarning, match=r"3 nodes compute on the CPU \(2 x LSTM, 1 x NonZero\) and 3 copies go") as caught:
        Runtime(path)
    assert caught[0].filename == __file__
