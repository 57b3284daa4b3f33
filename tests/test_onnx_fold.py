"""An adapter folded into a file: the same as folding in torch and exporting, and nothing else in the file changes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner
from zoo import adapt, close, differ, gpt2, llama, mlp, shake

import sarac
from sarac.backends import formula
from sarac.backends.lift import Fixed, Made, Own, Weight, worked_out
from sarac.backends.onnx_file import read_metadata, write_metadata
from sarac.cli import app
from sarac.ir.errors import CheckFailed, CheckpointError, ExportError, NotFoldable

IDS = {"input_ids": torch.arange(12).reshape(2, 6)}


@dataclass
class Folding:
    """A base, its adapted model, and the files of both."""

    base: nn.Module
    adapted: nn.Module
    inputs: Any
    file: Path
    adapter: Path


def folding(
    folder: Path, model: nn.Module, inputs: Any, plan: Any = "threshold:0.6", factors: bool = False, **form: Any
) -> Folding:
    adapted = shake(sarac.transform(model, plan))
    sarac.save_adapter(adapted, folder / "a.safetensors", factors=factors)
    sarac.export(model, folder / "base.onnx", inputs, **form)
    return Folding(model, adapted, inputs, folder / "base.onnx", folder / "a.safetensors")


def initializers(path: Path) -> dict[str, Any]:
    return {name: value.const_value.numpy() for name, value in onnx_ir.load(path).graph.initializers.items()}


FORMS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "llama, repeated and fused": (lambda: llama(5), IDS, {"optimize": "ort", "dynamic": "static"}),
    "gpt2 for CUDA, in half": (
        lambda: gpt2(1),
        IDS,
        {"dtype": "fp16", "optimize": "ort", "external_data": "always", "dynamic": "static"},
    ),
    "mlp in half but for its end": (lambda: mlp(6, 9, 5), torch.randn(3, 6), {"dtype": "fp16", "keep_float32": ["2"]}),
    "mlp": (lambda: mlp(6, 9, 5), torch.randn(3, 6), {"optimize": "none"}),
}


@pytest.mark.parametrize("name", FORMS)
def test_folding_into_the_file_is_folding_and_exporting(name: str, tmp_path: Path) -> None:
    model, inputs, form = FORMS[name]
    some = folding(tmp_path, model(), inputs, factors="dtype" in form, **form)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    report = sarac.fold_onnx(some.file, some.adapter, tmp_path / "out.onnx")
    sarac.export(some.adapted, tmp_path / "merged.onnx", inputs, merge=True, **form)
    base, ours, theirs = (initializers(tmp_path / f"{file}.onnx") for file in ("base", "out", "merged"))
    touched = {key for key in base if not np.array_equal(base[key], ours[key])}
    assert ours.keys() == theirs.keys() == base.keys()
    assert {key for key in base if not np.array_equal(base[key], theirs[key])} == touched
    assert len(touched) == report.rewritten <= len(report.folded) == len(some.adapted._sarac_record.plan.sites)
    for key in touched:
        assert ours[key].dtype == theirs[key].dtype
        gate = torch.float16 if "dtype" in form else torch.float32  # the base in the file was rounded before
        close(*(torch.from_numpy(one[key].astype(np.float32)) for one in (ours, theirs)), gate)
        differ(*(torch.from_numpy(one[key].astype(np.float32)) for one in (ours, base)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before} == before
    sarac.verify(some.adapted, tmp_path / "out.onnx", inputs)
    with pytest.raises(CheckFailed):
        sarac.verify(shake(sarac.transform(some.base, "threshold:0.6")), tmp_path / "out.onnx", inputs)
    assert report.moved > 0
    for file, says in (("out", "does not say what its weights are made of"), ("merged", "has an adapter in it already")):
        with pytest.raises(ExportError, match=says):
            sarac.fold_onnx(tmp_path / f"{file}.onnx", some.adapter, tmp_path / "again.onnx")
    assert not (tmp_path / "again.onnx").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Folding:
    return folding(tmp_path_factory.mktemp("small"), mlp(6, 9, 5), torch.randn(3, 6))


def test_what_trained_whole_goes_in_too(small: Folding, tmp_path: Path) -> None:
    name = next(name for name, parameter in small.base.named_parameters() if parameter.dim() == 1)
    adapted = shake(sarac.transform(small.base, "threshold:0.6", also_train=[name]))
    with torch.no_grad():
        dict(adapted.named_parameters())[name].add_(1)
    sarac.save_adapter(adapted, tmp_path / "a.safetensors")
    sarac.fold_onnx(small.file, tmp_path / "a.safetensors", tmp_path / "out.onnx")
    sarac.verify(adapted, tmp_path / "out.onnx", small.inputs)


def test_a_stored_factor_is_taken_and_a_missing_one_recomputed(small: Folding, tmp_path: Path) -> None:
    sarac.save_adapter(small.adapted, tmp_path / "f.safetensors", factors=True)
    for number, adapter in enumerate((small.adapter, tmp_path / "f.safetensors")):
        sarac.fold_onnx(small.file, adapter, tmp_path / f"{number}.onnx")
    one, two, base = (initializers(path) for path in (tmp_path / "0.onnx", tmp_path / "1.onnx", small.file))
    for key in base:
        close(torch.tensor(one[key]), torch.tensor(two[key]))


def test_what_cannot_be_folded_gets_a_sentence(small: Folding, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"

    def refused(adapter: Path, error: type[Exception], says: str, file: Path = small.file) -> None:
        with pytest.raises(error, match=says):
            sarac.fold_onnx(file, adapter, out)
        assert not out.exists()

    torch.manual_seed(1)
    other = shake(adapt(mlp(6, 9, 5)))
    sarac.save_adapter(other, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", CheckpointError, "was trained on another base than .* Export its own base")
    routed = shake(sarac.transform(small.base, "threshold:0.6", method="mosara"))
    sarac.save_adapter(routed, tmp_path / "routed.safetensors")
    refused(tmp_path / "routed.safetensors", NotFoldable, "routes at .* fold its mean gates in torch")
    sarac.save_adapter(sarac.transform(small.base, "threshold:0.6"), tmp_path / "start.safetensors")
    refused(tmp_path / "start.safetensors", CheckFailed, "compute the same: the adapter .* is at its start")
    sarac.save_adapter(shake(adapt(llama(1))), tmp_path / "llama.safetensors")
    refused(tmp_path / "llama.safetensors", ExportError, "has no weight .* export of another model")
    (tmp_path / "plain.onnx").write_bytes(small.file.read_bytes())
    write_metadata(tmp_path / "plain.onnx", {formula.KEY: ""})
    refused(small.adapter, ExportError, "does not say what its weights are made of", tmp_path / "plain.onnx")
    refused(small.adapter, ExportError, "is a folder", tmp_path)


def test_a_rounded_base_needs_stored_factors(small: Folding, tmp_path: Path) -> None:
    sarac.export(small.base, tmp_path / "half.onnx", small.inputs, dtype="fp16")
    with pytest.raises(CheckpointError, match=r"rounded to float16, .* has no factors for .* Save it with factors=True"):
        sarac.fold_onnx(tmp_path / "half.onnx", small.adapter, tmp_path / "out.onnx")
    sarac.save_adapter(small.adapted, tmp_path / "f.safetensors", factors=True)
    sarac.fold_onnx(tmp_path / "half.onnx", tmp_path / "f.safetensors", tmp_path / "out.onnx")
    sarac.verify(small.adapted, tmp_path / "out.onnx", small.inputs)


def test_the_command(small: Folding, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["fold-onnx", str(small.file), str(small.adapter), str(tmp_path / "out.onnx")])
    assert result.exit_code == 0, result.output
    assert "weights folded" in result.output
    assert "sarac.plan" in read_metadata(tmp_path / "out.onnx")


ORDERS = st.permutations(range(2))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), ORDERS, ORDERS, st.integers(0, 1), st.booleans())
def test_what_was_turned_and_joined_comes_back(m: int, n: int, p: int, one: Any, two: Any, axis: int, cast: bool) -> None:
    shapes = {"a": [m, n], "b": [p, n]}
    weights: dict[str, Weight] = {"a": made("Transpose", Own("a"), perm=one), "b": made("Transpose", Own("b"), perm=one)}
    joined = made("Concat", *weights.values(), axis=list(one).index(0))
    whole = made("Transpose", made("Cast", joined, to=1) if cast else joined, perm=two)
    tensors = {name: torch.randn(*shape) for name, shape in shapes.items()}
    array = worked_out(whole, tensors.__getitem__)
    found = dict(formula.undone(whole, array, {name: tuple(shape) for name, shape in shapes.items()}))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(found[name], tensor.numpy())
    weights = {"w": whole, "a": Own("a"), "c": made("Add", Own("a"), Fixed(np.ones((m, n), np.float32)))}
    again, told = formula.read(formula.entry(weights, {name: tuple(shape) for name, shape in shapes.items()}))
    assert again == weights
    assert told == {name: tuple(shape) for name, shape in shapes.items()}
    assert not dict(formula.undone(again["c"], array, told))


def made(operator: str, *arguments: Weight, **attributes: Any) -> Made:
    encoded = tuple(onnx.helper.make_attribute(name, value).SerializeToString() for name, value in attributes.items())
    return Made(operator, encoded, arguments, 1, 0, 20)
