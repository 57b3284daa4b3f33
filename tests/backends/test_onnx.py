"""ONNX files: equal to torch at unseen shapes and only to the model they were written from; read back; broken ones refused."""

import logging
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes
from zoo import TiedHead, bert, close, differ, gpt2, ids, llama, mlp, outputs, require_untouched, snapshot

from sarac.backends import exporting, formula
from sarac.backends import onnx as writer
from sarac.backends.onnx import Onnx
from sarac.backends.onnx_file import matmul_count, node_counts, read_metadata, write_metadata
from sarac.backends.pairing import paired
from sarac.backends.runtime import Runtime
from sarac.backends.unseen import dynamic_axes, unseen_inputs
from sarac.ir.errors import ExportError, InputError
from sarac.ir.inputs import Inputs, InputSpec
from sarac.ir.layers import evaluating


def own_metadata(path: Path) -> dict[str, str]:
    """The metadata without the words on layers, which test_stamp reads, and on weights, which test_onnx_fold reads."""
    return {key: value for key, value in read_metadata(path).items() if key not in (writer.LAYERS, formula.KEY)}


class Functional(nn.Module):
    """Linear work on parameters of its own, keyword arguments, a flag, and outputs of every form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, *, scale: Tensor, gate: bool = False, extra: None = None) -> dict[str, object]:
        y = F.linear(x, self.weight, self.bias)
        return {"y": y.sigmoid() if gate else y * scale, "parts": [y.relu(), x], "positive": y > 0, "x": x + 1, "no": extra}


class Normed(nn.Module):
    """What behaves otherwise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 4))
        self.layers[1].running_mean += torch.rand(12)
        self.train()
        self.layers[3].eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Stubborn(nn.Module):
    """A Python branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.sum()) > 0 else x


class Gathering(nn.Module):
    """Keyword arguments of any name: torch cannot capture their sizes as free."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        return self.inner(x) * more["scale"]


def text(rows: int, columns: int = 6) -> dict[str, Tensor]:
    tokens = ids(rows, columns)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    example: Callable[[], object]
    changed: str
    free: Mapping[str, int]


CASES = {
    "llama": Case(llama, lambda: text(1), "model.layers.1.mlp.up_proj.weight", {"input_ids": 2, "attention_mask": 2}),
    "bert": Case(lambda: bert(1), lambda: text(2), "encoder.layer.0.output.dense.bias", {"input_ids": 2, "attention_mask": 2}),
    "gpt2": Case(lambda: gpt2(1), lambda: (ids(2, 6),), "transformer.h.0.attn.c_attn.weight", {"input_ids": 2}),
    "tied": Case(lambda: TiedHead(16), lambda: ids(1, 6), "embed.weight", {"ids": 2}),
    "normed": Case(Normed, lambda: torch.randn(1, 8), "layers.0.weight", {"x": 1}),
    "mlp": Case(lambda: mlp(8, 6, 4), lambda: torch.randn(2, 3, 8), "2.bias", {"input": 2}),
    "functional": Case(
        Functional, lambda: {"x": torch.randn(2, 3, 8), "scale": torch.rand(6), "gate": False}, "weight", {"x": 2, "scale": 0}
    ),
}


class Written(NamedTuple):
    case: Case
    model: nn.Module
    inputs: Inputs
    before: dict[str, object]
    path: Path


def write(case: Case, path: Path) -> Written:
    torch.manual_seed(0)
    model, inputs = case.model(), Inputs.of(case.example())
    before = state(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert Onnx().write(model, inputs, path, {"plan": "λ"}) == (path,)
    assert not caught
    return Written(case, model, inputs, before, path)


def state(model: nn.Module) -> dict[str, object]:
    """The model as `snapshot` knows it, and its config."""
    config = getattr(model, "config", None)
    return {**snapshot(model), "config": config.to_dict() if config is not None else None}


def compared(model: nn.Module, inputs: Inputs, path: Path) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """ONNX Runtime's outputs beside torch's at two shapes that the capture did not see."""
    session = Runtime(path)
    with evaluating(model), torch.no_grad():
        unseen = unseen_inputs(InputSpec.of(inputs), session, inputs, model=model)
        return [paired(session.run(given), given.call(model)) for given in unseen]


def initializers(path: Path) -> dict[str, Tensor]:
    found = onnx.load(path).graph.initializer
    return {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in found}


# What holds of every written file


def equals_torch_at_unseen_shapes_and_not_a_changed_model(written: Written) -> None:
    for ours, theirs in compared(written.model, written.inputs, written.path):
        close(ours, theirs)
    parameter = written.model.get_parameter(written.case.changed)
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter += torch.randn_like(parameter) * 0.1
    for ours, theirs in compared(written.model, written.inputs, written.path):
        differ(ours, theirs)
    with torch.no_grad():
        parameter.copy_(kept)


def batch_and_length_are_free_and_the_rest_is_not(written: Written) -> None:
    session = Runtime(written.path)
    assert {name: len(symbols) for name, symbols in dynamic_axes(session).items()} == written.case.free
    assert read_metadata(written.path)["sarac.shapes"] == "dynamic"
    assert all(str(size) not in "0123456789" for symbols in dynamic_axes(session).values() for size in symbols)


def the_model_is_left_as_it_was(written: Written) -> None:
    before, config = dict(written.before), written.before["config"]
    assert before.pop("config") == config == state(written.model)["config"]
    require_untouched(written.model, before)


def weights_keep_their_names_and_are_stored_once(written: Written) -> None:
    stored, weights = initializers(written.path), dict(written.model.named_parameters(remove_duplicate=False))
    named = [id(weights[name]) for name in stored if name in weights]
    assert sorted(named) == sorted({id(weight) for weight in weights.values()}), "a tied weight has one name"
    for name in weights.keys() & stored.keys():
        assert any(torch.equal(stored[name], weight) for weight in (weights[name], weights[name].t()))
    others = [tensor for name, tensor in stored.items() if name not in weights and tensor.is_floating_point()]
    smallest = min(weight.numel() for weight in weights.values() if weight.dim() > 1)
    assert all(tensor.numel() < smallest for tensor in others), "no copies under other names"


def metadata_comes_back_and_can_be_added_and_replaced(written: Written) -> None:
    copy = written.path.with_name("copy.onnx")
    copy.write_bytes(written.path.read_bytes())
    assert own_metadata(copy) == {"plan": "λ", "sarac.shapes": "dynamic"}
    write_metadata(copy, {"error": "1e-7", "plan": "other"})
    write_metadata(copy, {"error": "2e-7"})
    assert own_metadata(copy) == {"plan": "other", "sarac.shapes": "dynamic", "error": "2e-7"}
    onnx.checker.check_model(str(copy))
    assert onnx.load(copy).graph == onnx.load(written.path).graph
    assert {file.name for file in copy.parent.iterdir()} == {"copy.onnx", written.path.name}
    one, two = onnx.load(copy), onnx.load(written.path)
    del one.metadata_props[:], two.metadata_props[:]
    assert one == two


def a_cache_is_left_out_though_the_model_returns_one(written: Written) -> None:
    with evaluating(written.model):
        called = outputs(written.model, *written.inputs.args, **written.inputs.kwargs)
    cached = isinstance(called, dict) and "past_key_values" in called
    assert cached == hasattr(written.model, "lm_head")
    if cached:
        assert Runtime(written.path).outputs == ("logits",)


def no_paths_of_this_machine_travel_along(written: Written) -> None:
    assert str(Path(torch.__file__).parent).encode() not in written.path.read_bytes()
    assert str(Path(__file__).parent).encode() not in written.path.read_bytes()


HOLDS = (
    equals_torch_at_unseen_shapes_and_not_a_changed_model,
    batch_and_length_are_free_and_the_rest_is_not,
    the_model_is_left_as_it_was,
    weights_keep_their_names_and_are_stored_once,
    metadata_comes_back_and_can_be_added_and_replaced,
    a_cache_is_left_out_though_the_model_returns_one,
    no_paths_of_this_machine_travel_along,
)


@pytest.mark.parametrize("name", CASES)
def test_a_written_file(name: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    written = write(CASES[name], tmp_path / "model.onnx")
    for holds in HOLDS:
        with subtests.test(holds.__name__):
            holds(written)


# Shapes


def test_a_model_that_cannot_be_captured_dynamically_is_static_and_says_so(tmp_path: Path) -> None:
    model, inputs = Gathering(), Inputs((torch.randn(1, 4),), {"scale": torch.randn(1, 4)})
    Onnx().write(model, inputs, tmp_path / "m.onnx", {})
    said = read_metadata(tmp_path / "m.onnx")["sarac.shapes"]
    assert said.startswith("static: Gathering cannot be exported to ONNX")
    assert Runtime(tmp_path / "m.onnx").shapes == {"x": (1, 4), "scale": (1, 4)}, "one row was given"
    for ours, theirs in compared(model, inputs, tmp_path / "m.onnx"):
        close(ours, theirs)


def test_static_shapes_on_request(tmp_path: Path) -> None:
    Onnx(dynamic="static").write(mlp(4, 3), Inputs((torch.randn(2, 4),)), tmp_path / "m.onnx", {})
    session = Runtime(tmp_path / "m.onnx")
    assert session.shapes == {"input": (2, 4)}
    assert read_metadata(session.path)["sarac.shapes"] == "static: as asked for"
    with pytest.raises(InputError, match="does not run on these inputs"):
        session.run(Inputs((torch.randn(3, 4),)))


def test_sizes_of_one_broadcast_and_stay(tmp_path: Path) -> None:
    inputs = Inputs((), {"x": torch.randn(2, 3, 8), "scale": torch.rand(2, 1, 1)})
    model = Functional()
    Onnx().write(model, inputs, tmp_path / "m.onnx", {})
    assert read_metadata(tmp_path / "m.onnx")["sarac.shapes"] == "dynamic"
    assert Runtime(tmp_path / "m.onnx").shapes["scale"][1:] == (1, 1)
    for ours, theirs in compared(model, inputs, tmp_path / "m.onnx"):
        close(ours, theirs)


def test_an_attempt_that_fails_leaves_no_marks_on_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs((), {"x": torch.randn(2, 3, 8), "scale": torch.rand(2, 1, 1)})
    monkeypatch.setattr(exporting, "_free", get_auto_dynamic_shapes)  # sizes of 1 too: torch fails to broadcast them
    Onnx().write(Functional(), inputs, tmp_path / "m.onnx", {})
    assert read_metadata(tmp_path / "m.onnx")["sarac.shapes"].startswith("static: Functional cannot be exported to ONNX")
    assert Runtime(tmp_path / "m.onnx").shapes == {"x": (2, 3, 8), "scale": (2, 1, 1)}


def test_the_operator_set_is_the_one_asked_for(tmp_path: Path, small: Path) -> None:
    Onnx(18).write(mlp(4, 3), Inputs((torch.randn(2, 4),)), tmp_path / "old.onnx", {})
    for path, opset in ((tmp_path / "old.onnx", 18), (small, 20)):
        assert [(entry.domain, entry.version) for entry in onnx.load(path).opset_import] == [("", opset)]


def test_half_precision_is_kept(tmp_path: Path) -> None:
    model, inputs = mlp(8, 6, 4).half(), Inputs((torch.randn(2, 8).half(),))
    Onnx().write(model, inputs, tmp_path / "m.onnx", {})
    assert {tensor.dtype for name, tensor in initializers(tmp_path / "m.onnx").items() if "." in name} == {torch.float16}
    for ours, theirs in compared(model, inputs, tmp_path / "m.onnx"):
        close(ours, theirs, torch.float16)


# Files


def test_large_weights_lie_beside_and_travel_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "LARGEST_FILE", 1000)
    (tmp_path / "made").mkdir()
    model, inputs = mlp(32, 32, 4), Inputs((torch.randn(2, 32),))
    files = Onnx().write(model, inputs, tmp_path / "made" / "m.onnx", {"a": "b"})
    assert [file.name for file in files] == ["m.onnx", "m.onnx.data"]
    assert files[0].stat().st_size < files[1].stat().st_size
    data = files[1].read_bytes()
    write_metadata(files[0], {"c": "d"})
    assert files[1].read_bytes() == data
    (tmp_path / "made").rename(tmp_path / "moved")
    assert own_metadata(tmp_path / "moved" / "m.onnx") == {"sarac.shapes": "dynamic", "a": "b", "c": "d"}
    for ours, theirs in compared(model, inputs, tmp_path / "moved" / "m.onnx"):
        close(ours, theirs)
    assert matmul_count(tmp_path / "moved" / "m.onnx") == 2
    (tmp_path / "moved" / "m.onnx.data").unlink()
    with pytest.raises(ExportError, match="cannot run on cpu"):
        Runtime(tmp_path / "moved" / "m.onnx")


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, bytes]:
    """One layer, and the file it was written to."""
    path, model = tmp_path_factory.mktemp("layer") / "m.onnx", mlp(4, 3)
    Onnx().write(model, Inputs((torch.randn(2, 4),)), path, {"a": "b"})
    return model, path.read_bytes()


@pytest.fixture
def small(tmp_path: Path, layer: tuple[nn.Module, bytes]) -> Path:
    (tmp_path / "m.onnx").write_bytes(layer[1])
    return tmp_path / "m.onnx"


def test_files_that_are_no_onnx_get_a_sentence(tmp_path: Path, small: Path) -> None:
    whole = small.read_bytes()
    broken = {
        "empty": b"",
        "text": b"hello, I am no model\n" * 10,
        "pickle": pickle.dumps({"weight": [1.0] * 50}),
        "zeros": bytes(100),
        **{f"cut {length}": whole[:length] for length in (1, 20, len(whole) // 2, len(whole) - 1)},
    }
    torch.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    broken["torch"] = (tmp_path / "model.pt").read_bytes()
    for name, content in broken.items():
        small.write_bytes(content)
        for read in (read_metadata, node_counts, matmul_count, lambda path: write_metadata(path, {"c": "d"})):
            with pytest.raises(ExportError, match=r"m\.onnx is truncated, or no ONNX file: .*Export it again"):
                read(small)
            assert small.read_bytes() == content, name
    small.write_bytes(whole.replace(b"\x22\x04Gemm", b"\x27\x04Gemm"))
    with pytest.raises(ExportError, match="is truncated, or no ONNX file"):
        node_counts(small)
    small.write_bytes(whole)
    assert own_metadata(small) == {"sarac.shapes": "dynamic", "a": "b"}


def test_files_that_cannot_be_opened_or_written_get_a_sentence(tmp_path: Path, small: Path) -> None:
    with pytest.raises(ExportError, match=r"none\.onnx: No such file or directory"):
        read_metadata(tmp_path / "none.onnx")
    with pytest.raises(ExportError, match="Is a directory"):
        read_metadata(tmp_path)
    with pytest.raises(ExportError, match=r"none/m\.onnx cannot be written: No such file or directory"):
        Onnx().write(mlp(4, 3), Inputs((torch.randn(2, 4),)), tmp_path / "none" / "m.onnx", {})
    long = small.rename(tmp_path / ("m" * 250 + ".onnx"))
    with pytest.raises(ExportError, match="File name too long"):
        write_metadata(long, {"c": "d"})
    assert own_metadata(long) == {"sarac.shapes": "dynamic", "a": "b"}


# Models and inputs that cannot be exported


def test_inputs_that_the_model_rejects_get_a_sentence(tmp_path: Path) -> None:
    model = Normed()
    before = state(model)
    with pytest.raises(InputError, match=r"Normed rejects the example inputs \(0: float32\[2, 7\]\)"):
        Onnx().write(model, Inputs((torch.randn(2, 7),)), tmp_path / "m.onnx", {})
    assert not list(tmp_path.iterdir())
    before.pop("config")
    require_untouched(model, before)


def test_a_model_that_cannot_be_captured_gets_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sentence = r"Stubborn cannot be exported to ONNX: .*data-dependent.*captured on \(0: float32\[2, 4\]\): look for Python"
    with pytest.raises(ExportError, match=sentence):
        Onnx().write(Stubborn(), Inputs((torch.randn(2, 4),)), tmp_path / "m.onnx", {})
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_exporting_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    Onnx().write(mlp(4, 3), Inputs((torch.randn(2, 4),)), tmp_path / "m.onnx", {})
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    caplog.clear()
    logging.getLogger("torch.onnx").error("logging works again")
    print("and so does printing")
    assert len(caplog.records) == 1
    assert capfd.readouterr().out == "and so does printing\n"


def test_outputs_that_are_inputs_or_each_other_keep_their_names(tmp_path: Path) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = torch.tanh(x)
            return {"x": x, "y": y, "again": y, "tanh": y + 1}

    inputs = Inputs((torch.randn(2, 4),))
    Onnx().write(Same(), inputs, tmp_path / "m.onnx", {})
    session = Runtime(tmp_path / "m.onnx")
    assert list(session.shapes) == ["x"]
    assert session.outputs == ("output.x", "y", "again", "tanh")
    for ours, theirs in compared(Same(), inputs, tmp_path / "m.onnx"):
        close(ours, theirs)


# Counts


def test_a_changed_weight_keeps_the_counts_and_another_layer_does_not(tmp_path: Path) -> None:
    def counted(model: nn.Module) -> Counter[str]:
        Onnx().write(model, Inputs((torch.randn(2, 8),)), tmp_path / "m.onnx", {})
        assert matmul_count(tmp_path / "m.onnx") == sum(isinstance(m, nn.Linear) for m in model.modules())
        return node_counts(tmp_path / "m.onnx")

    base = counted(mlp(8, 6, 4))
    assert base == counted(mlp(8, 6, 4))
    assert base != counted(mlp(8, 6, 6, 4))


def test_counts_hold_functions_and_nested_graphs(tmp_path: Path) -> None:
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "x"], ["z"])], "inner", [], [onnx.helper.make_tensor_value_info("z", 1, [2, 2])]
    )
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20, "own": 1]>
        outer (float[2, 2] x, bool c) => (float[2, 2] y) { a = Gemm(x, x)  b = own.twice(a)  y = Identity(b) }
        <domain: "own", opset_import: ["": 20]> twice (x) => (y) { m = MatMul(x, x)  y = Add(m, m) }"""
    )
    branch = onnx.helper.make_node("If", ["c"], ["b2"], then_branch=inner, else_branch=inner)
    model.graph.node.append(branch)
    onnx.save(model, tmp_path / "m.onnx")
    expected = {"Gemm": 1, "twice": 1, "Identity": 1, "If": 1, "MatMul": 3, "Add": 1}
    assert dict(node_counts(tmp_path / "m.onnx")) == expected
    assert matmul_count(tmp_path / "m.onnx") == 4
    del model.functions[:]
    onnx.save(model, tmp_path / "m.onnx")
    assert matmul_count(tmp_path / "m.onnx") == 3


def test_the_same_model_written_again_gives_the_same_file_and_another_does_not(
    small: Path, layer: tuple[nn.Module, bytes]
) -> None:
    model, content = layer
    inputs = Inputs((torch.randn(2, 4),))
    Onnx().write(model, inputs, small, {"a": "b"})
    assert small.read_bytes() == content
    with torch.no_grad():
        model[0].weight += 1
        Onnx().write(model, inputs, small, {"a": "b"})
        model[0].weight -= 1
    assert small.read_bytes() != content
