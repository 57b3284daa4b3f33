"""What stays in float32 of a model in float16: exactly what has to, and what was asked for."""

import json
from fnmatch import fnmatch
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from zoo import close, differ, shake

import sarac
from sarac.backends.onnx_file import read_metadata
from sarac.backends.runtime import Runtime
from sarac.ir.errors import CheckFailed, ExportError
from sarac.ir.graph import ModelGraph
from sarac.ir.inputs import Inputs
from sarac.passes.fold import Fold


class Steep(nn.Module):
    """Values up to `height` between two products; what comes in and goes out is small."""

    def __init__(self, height: float) -> None:
        super().__init__()
        self.into, self.out, self.height = nn.Linear(8, 8), nn.Linear(8, 8), height

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x) * self.height) / self.height


class Close(nn.Module):
    """The difference of two large numbers that are close: float16 holds them, and loses what sets them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.line(x) + 4096) - 4096


def net(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), middle, nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 32)).eval()


def x() -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def dtypes(path: Path) -> dict[str, str]:
    """The dtype of each weight in a file, by the name of its module."""
    kinds = {entry.name: onnx.TensorProto.DataType.Name(entry.data_type) for entry in onnx.load(path).graph.initializer}
    return {name.rpartition(".")[0]: kind for name, kind in kinds.items() if name.endswith("weight")}


def half(model: nn.Module, path: Path, **options: object) -> sarac.ExportReport:
    return sarac.export(model, path, x(), dtype="fp16", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("middle", "kept"),
    [
        (Steep(1.0), ()),
        (Steep(1e6), ("2",)),  # what overflows lies between its parts: neither of them alone mends it
        (nn.Sequential(Steep(1.0), Steep(1e6)), ("2.1",)),
        (nn.Sequential(Steep(1e6), nn.Tanh(), Steep(1e6)), ("2.0", "2.2")),
        (Close(), ("2",)),
        (nn.Sequential(nn.Linear(8, 8), Close()), ("2.1",)),
    ],
)
def test_exactly_what_has_to_stays_in_float32(middle: nn.Module, kept: tuple[str, ...], tmp_path: Path) -> None:
    report = half(net(middle), tmp_path / "m.onnx")
    assert report.kept_float32 == kept
    assert json.loads(report.to_json())["kept_float32"] == list(kept)
    assert json.loads(read_metadata(tmp_path / "m.onnx").get("sarac.float32", "[]")) == list(kept)
    assert all((kind == "FLOAT") == name.startswith(tuple(kept) or "none") for name, kind in dtypes(tmp_path / "m.onnx").items())
    assert Runtime(tmp_path / "m.onnx").run(Inputs.of(x().half()))["output"].dtype == torch.float16


def test_a_weight_that_the_dtype_does_not_hold_stays_in_float32(tmp_path: Path) -> None:
    model = net(nn.Linear(8, 8))
    with torch.no_grad():
        model[4].weight[0, 0] = 1e5
    assert half(model, tmp_path / "m.onnx").kept_float32 == ("4",)
    assert dtypes(tmp_path / "m.onnx")["4"] == "FLOAT"


def test_adapted_and_merged_sites_stay_too(tmp_path: Path) -> None:
    model = shake(sarac.transform(net(Steep(1e6)), plan="rank:2"))
    for merge in (True, False):
        path = tmp_path / f"{merge}.onnx"
        assert half(model, path, merge=merge).kept_float32 == ("2",)
        assert {name for name, kind in dtypes(path).items() if kind == "FLOAT"} == {"2.into", "2.out"}
        assert sarac.verify(model, path, x()).error < 1e-2


@pytest.mark.parametrize("swappable", [True, "rowwise"])
def test_adapters_swap_into_what_stays(swappable: bool | str, tmp_path: Path) -> None:
    model, path = shake(sarac.transform(net(Steep(1e6)), plan="rank:2")), tmp_path / "m.onnx"
    assert half(model, path, swappable=swappable).kept_float32 == ("2",)  # checked with two adapters and none
    sarac.save_onnx_adapter(model, tmp_path / "a.onnx_adapter", dtype="fp16", rowwise=swappable == "rowwise")
    runtime = Runtime(path)
    runtime.adapters.add("a", tmp_path / "a.onnx_adapter")
    ours = runtime.run(Inputs.of(x().half()), adapter="a")["output"].float()
    close(ours, model(x()), torch.float16)
    differ(ours, runtime.run(Inputs.of(x().half()))["output"].float())


def test_what_is_asked_for_stays_beside_what_has_to(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert half(net(Steep(1e6)), path, keep_float32=["6", "0.weight"]).kept_float32 == ("0", "2", "6")
    assert {name for name, kind in dtypes(path).items() if kind == "FLOAT"} == {"0", "2.into", "2.out", "6"}
    assert half(net(Steep(1.0)), path, keep_float32="2.*").kept_float32 == ("2.into", "2.out")
    with pytest.raises(ExportError, match=r"keep_float32='2\.inn' matches no module and no weight\. Near names: 2\.into"):
        half(net(Steep(1.0)), path, keep_float32=["2.inn"])
    with pytest.raises(ExportError, match="has no meaning without dtype fp16 or bf16"):
        sarac.export(net(Steep(1.0)), path, x(), keep_float32=["2"])


def test_a_model_that_is_nearly_all_too_large_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), Steep(1e6), Steep(1e6), nn.Linear(8, 4)).eval()
    with pytest.raises(
        ExportError,
        match=r"In float16 Sequential overflows\. 1, 2 would have to stay in float32, 7\d% of its weights: export",
    ):
        half(model, tmp_path / "m.onnx")
    assert half(model, tmp_path / "m.onnx", keep_float32=["1", "2"]).kept_float32 == ("1", "2")


def test_outputs_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    class Far(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1e6

    with pytest.raises(ExportError, match=r"In float16 Far overflows\. What it gives, or computes between its modules, is where"):
        half(Far(6, 4).eval(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kept", "said"), [("*.out", "repeated: 6"), ("2.out", "whole: ")])
def test_layers_repeat_where_all_keep_the_same(kept: str, said: str, tmp_path: Path) -> None:
    model = nn.Sequential(*(Steep(1.0) for _ in range(6))).eval()
    report = sarac.export(model, tmp_path / "m.onnx", torch.randn(3, 8), dtype="fp16", keep_float32=[kept])
    assert report.layers.startswith(said)
    assert report.kept_float32 == tuple(name for name, _ in model.named_modules() if fnmatch(name, kept))
    assert {name for name, kind in dtypes(tmp_path / "m.onnx").items() if kind == "FLOAT"} == set(report.kept_float32)


def test_a_fold_that_overflows_says_so() -> None:
    model = sarac.transform(net(nn.Linear(8, 8)), plan="rank:2")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "shift" in name).fill_(1e6)
    graph = ModelGraph(model, {}, {})
    assert Fold()(graph).module[0].weight.max() > 1e5
    with pytest.raises(CheckFailed, match=r"0\.weight has values up to .*, and float16 ends at 6\.55e\+04: keep it in float32"):
        Fold(dtype=torch.float16)(graph)
