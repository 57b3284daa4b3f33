"""Export and verify: what fails a check leaves nothing, what is wrong gets a sentence, and a model stays as it was."""

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Own, adapt, close, differ, mlp, outputs, shake

import sarac
from sarac import CheckFailed, ExportError, InputError, NotFoldable, RewriteError
from sarac.backends.onnx import Onnx
from sarac.backends.onnx_file import matmul_count, node_counts, read_metadata
from sarac.backends.runtime import Runtime
from sarac.ir import check
from sarac.ir.inputs import Inputs, InputSpec
from sarac.ir.layers import adapted
from sarac.ir.record import record_of

OLD = b"what stood here before"


def plain() -> nn.Sequential:
    return mlp(6, 8, 5)


def trained(model: nn.Module, **choice: Any) -> nn.Module:
    return shake(sarac.transform(model, **choice)).eval()


def x(rows: int = 3) -> Tensor:
    return torch.randn(rows, 6)


def mixed() -> sarac.Plan:
    return sarac.Plan({"0.weight": sarac.Sara(3), "2.weight": sarac.MoSara(2)})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A path at which an old file stands."""
    path = tmp_path / "model.onnx"
    path.write_bytes(OLD)
    return path


def require_untouched(target: Path) -> None:
    assert target.read_bytes() == OLD
    assert [path.name for path in target.parent.iterdir()] == [target.name]


# --- nothing is left where a check fails ----------------------------------------------------------------------------------


class ModeOfExport(nn.Module):
    """One that computes something else where it is captured: what a wrong exporter would do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * 1.01 if torch.compiler.is_compiling() else y


class SizeOfExport(nn.Module):
    """One whose graph is right at the captured shape alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        size = 3.0 if torch.compiler.is_compiling() else float(x.shape[0])
        return self.layer(x) / size


class Overflow(nn.Module):
    """One whose outputs are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(self.layer(x) * 0)


@pytest.mark.parametrize("adapt_it", [True, False])
@pytest.mark.parametrize(
    ("build", "said"),
    [(ModeOfExport, "The ONNX model"), (SizeOfExport, "The ONNX model"), (Overflow, "NaN or Inf")],
)
def test_failed_check_leaves_nothing(build: Callable[[], nn.Module], said: str, adapt_it: bool, target: Path) -> None:
    model = trained(build()) if adapt_it else build()
    with pytest.raises(CheckFailed, match=said):
        sarac.export(model, target, x())
    require_untouched(target)


def test_right_model_replaces_the_old_file(target: Path) -> None:
    report = sarac.export(trained(plain()), target, x())
    assert target.read_bytes() != OLD
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert report.path == target
    assert report.files == (target,)


@pytest.mark.parametrize("role", ["shift", "u"])
def test_nan_in_a_trained_adapter_is_refused(role: str, target: Path) -> None:
    model = trained(plain(), plan="rank:2,train=factors")
    model.get_parameter(f"2.sara_{role}").data.flatten()[0] = float("nan")
    with pytest.raises(CheckFailed, match="NaN or Inf"):
        sarac.export(model, target, x())
    require_untouched(target)


def test_nan_in_a_plain_weight_is_refused(target: Path) -> None:
    model = plain()
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(CheckFailed, match="NaN or Inf"):
        sarac.export(model, target, x())
    require_untouched(target)


@pytest.mark.parametrize(("choice", "merge"), [({}, None), ({}, True), ({}, False), ({"method": "mosara"}, None)])
def test_untrained_model_is_refused(choice: dict[str, Any], merge: bool | None, target: Path) -> None:
    with pytest.raises(CheckFailed, match="train it first"):
        sarac.export(sarac.transform(plain(), **choice), target, x(), merge=merge)
    require_untouched(target)


def test_delta_that_the_merge_rounds_away_is_refused(target: Path) -> None:
    model = trained(plain().half(), plan="rank:1")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(1e-6)
    with pytest.raises(CheckFailed, match="too small for its dtype"):
        sarac.export(model, target, x().half())
    require_untouched(target)


def test_half_precision_exports(tmp_path: Path) -> None:
    model = trained(plain().half())
    report = sarac.export(model, tmp_path / "half.onnx", x().half())
    assert report.error <= check.gate(torch.float16)
    assert Runtime(report.path).dtypes == {"input": torch.float16}


def test_fold_that_is_wrong_is_caught(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sarac.Sara.delta
    monkeypatch.setattr(sarac.Sara, "delta", lambda self, tensors: right(self, tensors) * 1.01)
    with pytest.raises(CheckFailed, match="merged"):
        sarac.export(trained(plain()), target, x())
    require_untouched(target)


def test_runtime_that_fails_leaves_nothing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Runtime, *_: object) -> dict[str, Tensor]:
        raise InputError("it does not run")

    monkeypatch.setattr(Runtime, "run", fail)
    with pytest.raises(InputError):
        sarac.export(trained(plain()), target, x())
    require_untouched(target)


def test_interrupt_leaves_nothing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sarac.backends.onnx_file.write_metadata", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sarac.export(trained(plain()), target, x())
    require_untouched(target)


def test_path_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sarac.backends.onnx.Onnx.write", lambda *_: pytest.fail("it exported first"))
    (tmp_path / "folder").mkdir()
    for path, said in [("nowhere/model.onnx", "cannot be written"), ("folder", "is a folder")]:
        with pytest.raises(ExportError, match=said):
            sarac.export(trained(plain()), tmp_path / path, x())
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.parametrize("fails", [False, True])
def test_weights_beside_the_file_are_put_in_place_with_it(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sarac.backends.onnx.LARGEST_FILE", 16)
    model = trained(plain())
    if fails:
        model[0].sara_shift.data.fill_(float("nan"))
        with pytest.raises(CheckFailed):
            sarac.export(model, tmp_path / "m.onnx", x())
        assert list(tmp_path.iterdir()) == []
        return
    report = sarac.export(model, tmp_path / "m.onnx", x())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert [file.name for file in report.files] == ["m.onnx", "m.onnx.data"]
    assert sarac.verify(model, tmp_path / "m.onnx", x()).error <= check.gate(torch.float32)


@pytest.mark.parametrize("killed", [False, True])
def test_weights_of_the_old_export_stay_until_the_new_one_stands(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, path = trained(plain()), trained(plain()), tmp_path / "m.onnx"
    sarac.export(first, path, x(), external_data="always")
    if killed:
        replace = Path.replace

        def kill(file: Path, place: Path) -> Path:
            if place == path:
                raise KeyboardInterrupt
            return replace(file, place)

        monkeypatch.setattr(Path, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            sarac.export(second, path, x(), external_data="always")
        monkeypatch.undo()
        assert sarac.verify(first, path, x()).error <= check.gate(torch.float32)
    sarac.export(second, path, x(), external_data="always")
    assert len(list(tmp_path.iterdir())) == 2  # what was killed is gone too
    assert sarac.verify(second, path, x()).error <= check.gate(torch.float32)
    with pytest.raises(CheckFailed):
        sarac.verify(first, path, x())


# --- dtypes, sizes, optimisation ------------------------------------------------------------------------------------------


def test_half_precision_is_rounded_once_and_held_to_its_own_gate(tmp_path: Path) -> None:
    model = trained(plain())
    report = sarac.export(model, tmp_path / "m.onnx", x(), dtype="fp16")
    assert (report.dtype, report.merged) == ("float16", True)
    assert check.gate(torch.float32) < report.error <= check.gate(torch.float16)
    wanted = sarac.fold(model)[0].weight.half()
    stored = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(tmp_path / "m.onnx").graph.initializer}
    held = next(torch.tensor(value) for value in stored.values() if value.shape in ((6, 8), (8, 6)))
    assert torch.equal(held if held.shape == wanted.shape else held.T, wanted)
    assert not torch.equal(wanted, model.state_dict()["0.weight"].half())
    assert sarac.verify(model, tmp_path / "m.onnx", x()).error == report.error
    assert model[0].weight.dtype == torch.float32


def test_folding_from_bfloat16_into_half_loses_nothing_between(tmp_path: Path) -> None:
    model = trained(plain().bfloat16())
    sarac.export(model, tmp_path / "m.onnx", x().bfloat16(), dtype="fp16")
    folded = next(p for n, p in sarac.fold(copy.deepcopy(model).float()).named_parameters() if n == "0.weight")
    stored = [onnx.numpy_helper.to_array(w) for w in onnx.load(tmp_path / "m.onnx").graph.initializer]
    held = next(torch.tensor(value) for value in stored if value.shape in ((6, 8), (8, 6)))
    held = held if held.shape == folded.shape else held.T
    assert torch.equal(held, folded.half())
    assert not torch.equal(held, folded.bfloat16().half())


def test_values_that_a_dtype_does_not_hold_get_a_sentence(target: Path) -> None:
    model = plain()
    model[2].weight.data[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"2\.weight has values up to 1e\+06, and float16 ends at 6\.55e\+04\. What it gives"):
        sarac.export(model, target, x(), dtype="fp16")
    require_untouched(target)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"dtype": "fp8"}, "dtype='fp8' is not known: give one of fp32, fp16, bf16"),
        ({"dtype": "bf16"}, "no bfloat16 arithmetic on CPUs"),
        ({"optimize": "all"}, "optimize='all' is not known"),
        ({"external_data": "yes"}, "external_data='yes' is not known"),
        ({"dynamic": "most"}, "dynamic='most' is not understood"),
        ({"dynamic": "z[batch,6]"}, "dynamic names 'z', which is no input"),
        ({"dynamic": "input[batch]"}, "dynamic names 1 sizes of input"),
    ],
)
def test_options_that_do_not_exist_get_a_sentence(choice: dict[str, str], said: str, target: Path) -> None:
    with pytest.raises(ExportError, match=re.escape(said)):
        sarac.export(plain(), target, x(), **choice)
    require_untouched(target)


@pytest.mark.parametrize(
    ("dynamic", "sizes"),
    [("auto", (True, True)), ("static", (False, False)), ("input[n,l,6]", (True, True)), ("input[n,4,6]", (True, False))],
)
def test_the_sizes_that_stay_free(dynamic: str, sizes: tuple[bool, bool], tmp_path: Path) -> None:
    sarac.export(mlp(6, 5), tmp_path / "m.onnx", torch.randn(3, 4, 6), dynamic=dynamic)
    shape = Runtime(tmp_path / "m.onnx").shapes["input"]
    assert tuple(isinstance(size, str) for size in shape) == (*sizes, False)


class Turned(nn.Module):
    """Heads turned and scaled by a table: constants to fold, and shapes to follow."""

    def forward(self, x: Tensor) -> Tensor:
        turned = x.view(*x.shape[:-1], 2, 4).transpose(1, 2).reshape(x.shape[0], -1)
        return F.gelu(turned * torch.arange(8) * 2)


def test_levels_of_optimisation_give_other_graphs_and_the_same_numbers(tmp_path: Path) -> None:
    model, counts = nn.Sequential(nn.Linear(8, 8), Turned(), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)).eval(), {}
    inputs = Inputs.of(torch.randn(3, 8))
    for level in ("none", "basic", "ort"):
        form = Onnx(optimize=level, provider="cuda")
        form.write(model, inputs, tmp_path / f"{level}.onnx", {})
        counts[level] = sum(node_counts(tmp_path / f"{level}.onnx").values())
        close(Runtime(tmp_path / f"{level}.onnx").run(inputs)["output"], inputs.call(model))
    assert counts["none"] > counts["basic"] > counts["ort"]


def test_smoke_stops_before_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = shake(sarac.transform(nn.Sequential(*(nn.Linear(6, 6) for _ in range(6))))).eval(), torch.randn(3, 6)
    report = sarac.export(model, tmp_path / "m.onnx", x, smoke=True)
    assert report.seconds["smoke"] > 0
    assert report.layers.startswith("repeated: 6 of ")
    monkeypatch.setattr("sarac.emit.hold", lambda *_: (_ for _ in ()).throw(CheckFailed("of three layers")))
    monkeypatch.setattr("sarac.emit.free_data", lambda *_: pytest.fail("it went on"))
    with pytest.raises(CheckFailed, match="of three layers"):
        sarac.export(model, tmp_path / "other.onnx", x, smoke=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_an_opset_that_breaks_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(sarac.SaracWarning, match="opset 23 has a RotaryEmbedding"):
        sarac.export(plain(), tmp_path / "m.onnx", x(), opset=23)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sarac.SaracWarning)
        sarac.export(plain(), tmp_path / "m.onnx", x(), opset=22)


# --- merging and routing --------------------------------------------------------------------------------------------------


def test_merging_a_routed_model_is_refused_with_both_ways_out(target: Path) -> None:
    with pytest.raises(NotFoldable, match=r"0\.weight, 2\.weight.*merge=False.*routing=\"mean\""):
        sarac.export(trained(plain(), method="mosara"), target, x(), merge=True)
    require_untouched(target)


def test_mixed_plan_merges_what_folds_and_routes_the_rest(tmp_path: Path) -> None:
    base, inputs = plain(), x()
    model = trained(base, plan=mixed())
    counts = {}
    for merge in (None, False):
        report = sarac.export(model, tmp_path / f"{merge}.onnx", inputs, merge=merge)
        found = Runtime(report.path).run(Inputs.of(inputs))
        close(list(found.values()), [outputs(model, inputs)])
        differ(list(found.values()), [outputs(base, inputs)])
        assert not report.merged
        counts[merge] = matmul_count(report.path)
        assert report.routed == (("2.weight",) if merge is None else ("0.weight", "2.weight"))
        assert list(report.folded) == (["0.weight"] if merge is None else [])
    sarac.export(base, tmp_path / "base.onnx", inputs)
    assert matmul_count(tmp_path / "base.onnx") < counts[None] < counts[False]
    with pytest.raises(NotFoldable, match=r"routed here: 2\.weight\."):
        sarac.export(model, tmp_path / "no.onnx", inputs, merge=True)


def test_sara_that_is_not_merged_has_its_subgraph(tmp_path: Path) -> None:
    model, inputs = trained(plain()), x()
    merged = sarac.export(model, tmp_path / "merged.onnx", inputs, merge=True)
    routed = sarac.export(model, tmp_path / "adapters.onnx", inputs, merge=False)
    assert (merged.merged, routed.merged) == (True, False)
    assert merged.routed == ()
    assert matmul_count(routed.path) == matmul_count(merged.path) + 4
    assert merged.surviving_delta[0] in ("0.weight", "2.weight")
    assert routed.surviving_delta == ("", 0.0)


def test_plain_model_is_exported_and_cannot_be_merged(tmp_path: Path) -> None:
    model, inputs = plain(), x()
    report = sarac.export(model, tmp_path / "m.onnx", inputs)
    close(list(Runtime(report.path).run(Inputs.of(inputs)).values()), [outputs(model, inputs)])
    differ(list(Runtime(report.path).run(Inputs.of(x())).values()), [outputs(model, inputs)])
    assert "sarac.plan" not in read_metadata(report.path)
    assert not report.merged
    for merge in (True, False):
        with pytest.raises(RewriteError, match="nothing to merge"):
            sarac.export(model, tmp_path / "no.onnx", inputs, merge=merge)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_opset_is_chosen(tmp_path: Path) -> None:
    for opset, given in [(20, {}), (18, {"opset": 18})]:
        report = sarac.export(plain(), tmp_path / "m.onnx", x(), **given)
        assert [entry.version for entry in onnx.load(report.path).opset_import if not entry.domain] == [opset]


def test_file_says_what_it_is(tmp_path: Path) -> None:
    model = trained(plain())
    report = sarac.export(model, tmp_path / "m.onnx", x())
    found = read_metadata(report.path)
    assert sarac.Plan.from_json(found["sarac.plan"]).sites == record_of(model).plan.sites
    assert set(json.loads(found["sarac.versions"])) == {"sarac", "torch", "transformers"}
    verification = json.loads(found["sarac.verification"])
    assert verification["merged"] is True
    assert max(row["onnx_max_error"] for row in verification["comparisons"]) == report.max_error
    assert len(found["sarac.base"]) == 64
    read = json.loads(report.to_json())
    assert read["error"] == report.error <= check.gate(torch.float32)
    assert read["surviving_delta"]["worst_site"] == report.surviving_delta[0]


# --- inputs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "said"),
    [(None, r"--input x:float32\[2,16\]"), (torch.randn(3, 7), r"rejects.*\[3, 7\]"), ("text", "str"), ((), "rejects")],
)
def test_inputs_that_do_not_serve_are_told(example: Any, said: str, target: Path) -> None:
    with pytest.raises(InputError, match=said):
        sarac.export(trained(plain()), target, example)
    require_untouched(target)


def test_spec_serves_as_inputs(tmp_path: Path) -> None:
    report = sarac.export(trained(plain()), tmp_path / "m.onnx", InputSpec.parse(["input:float32[2,6]"]))
    assert Runtime(report.path).describe().startswith("input: float32[")


def test_inputs_of_the_transform_serve(tmp_path: Path) -> None:
    model = shake(sarac.transform(plain(), example_inputs=x())).eval()
    for one in (model, sarac.fold(model)):
        assert sarac.export(one, tmp_path / "m.onnx").path.is_file()


def test_batch_of_one_does_not_fix_the_batch(tmp_path: Path) -> None:
    model = trained(plain())
    report = sarac.export(model, tmp_path / "m.onnx", x(1))
    inputs = x(7)
    close(list(Runtime(report.path).run(Inputs.of(inputs)).values()), [outputs(model, inputs)])
    assert len({comparison.inputs for comparison in report.comparisons}) == 2


def test_shapes_of_the_comparisons_were_not_captured(tmp_path: Path) -> None:
    report = sarac.export(trained(plain()), tmp_path / "m.onnx", x(3))
    assert len({comparison.inputs for comparison in report.comparisons}) >= 2
    assert not any("[3, 6]" in comparison.inputs for comparison in report.comparisons)


def test_modes_and_statistics_are_left_alone(tmp_path: Path) -> None:
    base = nn.Sequential(Own("at", 8, 6), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    model = shake(sarac.transform(base)).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    report = sarac.export(model, tmp_path / "m.onnx", x())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert all(state.enabled for _, _, state in adapted(model))
    inputs = x()
    found = list(Runtime(report.path).run(Inputs.of(inputs)).values())
    differ(found, [outputs(model, inputs)])  # dropout is on
    close(found, [outputs(model.eval(), inputs)])
    assert node_counts(report.path)["Dropout"] == 0


# --- verify ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module, Path]:
    """A base, its trained form, and that form's file."""
    torch.manual_seed(5)
    base = plain()
    model = trained(base)
    return base, model, sarac.export(model, tmp_path_factory.mktemp("verify") / "m.onnx", x()).path


def test_file_verifies_against_its_model_and_its_folded_model(exported: tuple[nn.Module, nn.Module, Path]) -> None:
    _, model, path = exported
    before = path.read_bytes()
    for one in (model, sarac.fold(model)):
        report = sarac.verify(one, path, x())
        assert report.merged
        assert report.error <= check.gate(torch.float32)
        assert len(report.comparisons) >= 2
    assert path.read_bytes() == before


def test_tampered_weight_fails(exported: tuple[nn.Module, nn.Module, Path], tmp_path: Path) -> None:
    _, model, path = exported
    file = onnx.load(path)
    weight = next(t for t in file.graph.initializer if len(t.dims) == 2)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 0.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(file, tmp_path / "tampered.onnx")
    with pytest.raises(CheckFailed, match="The ONNX model and the adapted torch model differ"):
        sarac.verify(model, tmp_path / "tampered.onnx", x())


def test_other_models_fail(exported: tuple[nn.Module, nn.Module, Path]) -> None:
    base, model, path = exported
    with pytest.raises(CheckFailed, match="another base"):
        sarac.verify(trained(plain()), path, x())
    with pytest.raises(CheckFailed, match="differ"):
        sarac.verify(base, path, x())
    with pytest.raises(CheckFailed, match="differ"):
        sarac.verify(shake(adapt(base)).eval(), path, x())
    # The same adapted weights, and another bias.
    other = sarac.fold(model)
    other[2].bias.data += 0.1
    with pytest.raises(CheckFailed, match="differ"):
        sarac.verify(other, path, x())


def test_file_that_cannot_be_verified_is_told(exported: tuple[nn.Module, nn.Module, Path], tmp_path: Path) -> None:
    _, model, path = exported
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:300])
    for name in ("cut.onnx", "nowhere.onnx"):
        with pytest.raises(ExportError, match=name):
            sarac.verify(model, tmp_path / name, x())
    with pytest.raises(InputError):
        sarac.verify(model, path)


def test_a_coarse_model_is_exported_in_a_finer_dtype(tmp_path: Path) -> None:
    model = shake(adapt(mlp(6, 8, 5).eval().bfloat16()))
    report = sarac.export(model, tmp_path / "m.onnx", torch.randn(3, 6).bfloat16(), dtype="fp32")
    assert report.dtype == "float32"
    assert report.error < 1e-5
