"""Adapters that swap in: exported once, every adapter equal to its folded model, and to no other."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner
from zoo import adapt, close, differ, folded, ids, llama, mlp, outputs, same, shake

import sarac
from sarac.backends.adapter_file import read_adapter
from sarac.backends.onnx_file import node_counts
from sarac.cli import app
from sarac.ir.errors import CheckFailed, CheckpointError, ExportError, InputError
from sarac.recipe import from_factory


class Picture(nn.Module):
    """Convolutions, whose products have four axes, and a head that reads rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).mean((2, 3)))


class Flat(nn.Module):
    """What takes the rows of a batch for one long row, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).view(x.shape).tanh()


MODELS = {
    "mlp": (lambda: mlp(6, 8, 5), lambda rows: torch.randn(rows, 6)),
    "picture": (Picture, lambda rows: torch.randn(rows, 3, 6, 6)),
    "llama": (lambda: llama(1), lambda rows: ids(rows)),
}


def tenants(model: nn.Module, count: int, **choice: object) -> list[nn.Module]:
    """The same base with trained adapters, each otherwise."""
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(shake(adapt(model, **choice)))
    return found


def first(found: dict[str, Tensor]) -> Tensor:
    return next(iter(found.values()))


# Llama's graph with a shift alone is that of test_generating, row by row too.
@pytest.mark.parametrize(("name", "method"), [*((name, "mosara") for name in MODELS), ("mlp", "sara"), ("picture", "sara")])
def test_adapters_swap_in_one_at_a_time_and_row_by_row(name: str, method: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    base = make().eval()
    one, two = tenants(base, 2, method=method)
    report = sarac.export(one, tmp_path / "m.onnx", inputs(2), swappable="rowwise")
    assert (report.swappable, report.merged, len(report.comparisons)) == ("rowwise", False, 8)
    sarac.save_onnx_adapter(two, tmp_path / "two.onnx_adapter")
    sarac.save_adapter(one, tmp_path / "one.safetensors")
    runtime = sarac.Runtime(tmp_path / "m.onnx")
    runtime.adapters.add("one", tmp_path / "one.safetensors")
    runtime.adapters.add("two", tmp_path / "two.onnx_adapter")
    x = inputs(5)
    wanted = {"one": outputs(one, x), "two": outputs(two, x), None: outputs(base, x)}
    wanted = {tenant: getattr(found, "logits", found) for tenant, found in wanted.items()}
    for tenant in ("one", "two", None, "two"):
        runtime.use(tenant)
        close(first(runtime(x)), wanted[tenant])
        differ(first(runtime(x, adapter="one" if tenant != "one" else None)), wanted[tenant])
    if method == "sara":
        close(first(runtime(x, adapter="one")), getattr(outputs(folded(one), x), "logits", outputs(folded(one), x)))
    chosen = ["two", None, "one", "one", "two"]
    mixed = first(runtime(x, adapter=chosen))
    close(mixed, torch.stack([wanted[tenant][row] for row, tenant in enumerate(chosen)]))
    differ(mixed, first(runtime(x, adapter=chosen[::-1])))


def test_a_graph_for_one_adapter_at_a_time_serves_onnx_runtime_alone(tmp_path: Path) -> None:
    base = mlp(6, 8, 5).eval()
    one, two = tenants(base, 2)
    sarac.export(base and one, tmp_path / "m.onnx", torch.randn(2, 6), swappable=True)
    sarac.save_onnx_adapter(two, tmp_path / "two.onnx_adapter")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_overridable_initializers()] == ["0.weight.sara_shift", "2.weight.sara_shift"]
    options, adapter, x = onnxruntime.RunOptions(), onnxruntime.LoraAdapter(), torch.randn(3, 6)
    adapter.Load(str(tmp_path / "two.onnx_adapter"))
    options.add_active_adapter(adapter)
    feeds = {session.get_inputs()[0].name: x.numpy()}
    close(torch.from_numpy(session.run(None, feeds, options)[0]), outputs(two, x))
    close(torch.from_numpy(session.run(None, feeds)[0]), outputs(base, x))
    differ(outputs(two, x), outputs(base, x))
    runtime = sarac.Runtime(tmp_path / "m.onnx")
    runtime.adapters.add("two", tmp_path / "two.onnx_adapter")
    close(first(runtime(x, adapter="two")), outputs(two, x))
    with pytest.raises(InputError, match="takes one adapter for a batch, and got 3"):
        runtime(x, adapter=["two", None, "two"])


def test_untrained_adapters_are_exported_for_those_to_come(tmp_path: Path) -> None:
    base = mlp(6, 8, 5).eval()
    sarac.export(adapt(base), tmp_path / "m.onnx", torch.randn(2, 6), swappable=True)
    runtime, x = sarac.Runtime(tmp_path / "m.onnx"), torch.randn(3, 6)
    close(first(runtime(x)), outputs(base, x))
    [later] = tenants(base, 1)
    sarac.save_onnx_adapter(later, tmp_path / "later.onnx_adapter", dtype="fp16")
    runtime.adapters.add("later", tmp_path / "later.onnx_adapter")
    close(first(runtime(x, adapter="later")), outputs(later, x), torch.float16)
    differ(first(runtime(x, adapter="later")), first(runtime(x)))
    assert sarac.verify(adapt(base), tmp_path / "m.onnx", torch.randn(2, 6)).error < 1e-5


def test_half_precision_holds_what_its_projections_would_not(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(64, 16)).eval()
    with torch.no_grad():
        base[0].weight.mul_(1e-3)
    one, two = tenants(base, 2)
    x = torch.full((2, 64), 3e4)
    sarac.export(one, tmp_path / "m.onnx", x, swappable=True, dtype="fp16")
    assert node_counts(tmp_path / "m.onnx")["Cast"] == 0
    factor = one.get_parameter("0.sara_v")
    x = 3e4 * factor[:1].sign()
    assert float((x @ factor.T).max()) > torch.finfo(torch.float16).max
    runtime = sarac.Runtime(tmp_path / "m.onnx", floats=torch.float32)
    runtime.adapters.add("two", {"0.weight.sara_shift": two.get_parameter("0.sara_shift")})
    close(first(runtime(x)).float(), outputs(base, x), torch.float16)
    close(first(runtime(x, adapter="two")).float(), outputs(two, x), torch.float16)
    differ(outputs(two, x), outputs(base, x))


def test_a_shared_router_is_one_input(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.q(x) * self.k(x).sigmoid())

    model, x = Attention().eval(), torch.randn(2, 3, 8)
    model = shake(sarac.transform(model, "threshold:0.5,router_scope=group", method="mosara", example_inputs=x))
    sarac.export(model, tmp_path / "m.onnx", x, swappable="rowwise")
    names = sarac.Runtime(tmp_path / "m.onnx").adapters.shapes
    routers = [name for name in names if name.endswith("sara_router")]
    assert len(routers) < sum(name.endswith("sara_shift") for name in names)
    assert "k.weight.sara_router" not in routers


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "m.onnx"
    torch.manual_seed(0)
    sarac.export(adapt(mlp(6, 8, 5).eval()), path, torch.randn(2, 6), swappable="rowwise")
    return path


def shifts(served: Path, value: float) -> dict[str, Tensor]:
    return {name: torch.full(shape, value) for name, shape in sarac.Runtime(served).adapters.shapes.items()}


def test_a_store_grows_forgets_and_keeps_what_it_has(served: Path) -> None:
    runtime, x = sarac.Runtime(served), torch.randn(1, 6)
    for index in range(20):
        runtime.adapters.add(f"t{index}", shifts(served, index / 10))
    assert len(runtime.adapters) == 20
    assert "t7" in runtime.adapters
    assert None not in runtime.adapters
    third = first(runtime(x, adapter="t3"))
    runtime.use("t5")
    runtime.adapters.remove("t5")
    same(first(runtime(x)), first(runtime(x, adapter=None)))
    runtime.adapters.add("new", shifts(served, 0.5))
    same(first(runtime(x, adapter="t3")), third)
    differ(first(runtime(x, adapter="new")), third)
    before = first(runtime(x, adapter="new"))
    runtime.adapters.add("new", shifts(served, 0.9))
    differ(first(runtime(x, adapter="new")), before)
    runtime.adapters.reserve(100)
    size = runtime.adapters.nbytes
    for index in range(70):
        runtime.adapters.add(f"u{index}", shifts(served, 0.1))
    assert runtime.adapters.nbytes == size
    same(first(runtime(x, adapter="t3")), third)
    with pytest.raises(InputError, match="There is no adapter 't5' here"):
        runtime.adapters.remove("t5")
    with pytest.raises(InputError, match="There is no adapter 'gone' here"):
        runtime.use("gone")
    with pytest.raises(InputError, match="got 2 adapters for 1 rows"):
        runtime(x, adapter=["t3", "t4"])


def test_the_adapter_of_another_base_or_plan_is_refused(served: Path, tmp_path: Path) -> None:
    adapters = sarac.Runtime(served).adapters
    torch.manual_seed(5)
    stranger = shake(adapt(mlp(6, 8, 5).eval()))
    for write, name in ((sarac.save_onnx_adapter, "s.onnx_adapter"), (sarac.save_adapter, "s.safetensors")):
        write(stranger, tmp_path / name)
        with pytest.raises(CheckpointError, match="another base"):
            adapters.add("s", tmp_path / name)
    fitting = shifts(served, 0.1)
    name = next(iter(fitting))
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        adapters.add("s", {key: value for key, value in fitting.items() if key != name})
    with pytest.raises(CheckpointError, match="another plan"):
        adapters.add("s", {**fitting, name: torch.ones(1)})
    with pytest.raises(CheckpointError, match="does not take"):
        adapters.add("s", {**fitting, "other.weight.sara_shift": torch.ones(1)})
    with pytest.raises(CheckpointError, match="NaN"):
        adapters.add("s", {**fitting, name: fitting[name] * float("nan")})
    (tmp_path / "broken.onnx_adapter").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no readable adapter file"):
        adapters.add("s", tmp_path / "broken.onnx_adapter")
    with pytest.raises(CheckpointError, match="There is no adapter file"):
        adapters.add("s", tmp_path / "none.onnx_adapter")
    torch.manual_seed(0)
    whole = shake(adapt(mlp(6, 8, 5).eval(), "threshold:0.6,train=factors"))
    sarac.save_adapter(whole, tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match=r"trained the factors of 0\.weight"):
        adapters.add("s", tmp_path / "whole.safetensors")
    assert len(adapters) == 0


def test_what_cannot_be_swapped_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base, x, path = mlp(6, 8, 5).eval(), torch.randn(2, 6), tmp_path / "m.onnx"
    for model, choice, said in (
        (base, {}, "carries no adapters"),
        (adapt(base, "threshold:0.6,train=factors"), {}, r"the factors of 0\.weight train"),
        (adapt(base, also_train="*bias"), {}, r"0\.bias trains whole"),
        (adapt(base), {"merge": True}, "merge or swappable"),
        (adapt(base), {"swappable": "columns"}, "swappable='columns' is not known"),
    ):
        with pytest.raises(ExportError, match=said):
            sarac.export(model, path, x, **{"swappable": True, **choice})
    flat = shake(adapt(Flat().eval()))
    with pytest.raises(CheckFailed, match="reshapes its rows"):
        sarac.export(flat, path, torch.randn(3, 4, 6), swappable="rowwise")
    assert not list(tmp_path.iterdir())
    sarac.export(flat, path, torch.randn(3, 4, 6), swappable=True)
    sarac.export(shake(adapt(base)), tmp_path / "merged.onnx", x)
    runtime = sarac.Runtime(tmp_path / "merged.onnx")
    with pytest.raises(InputError, match="takes no adapters"):
        runtime.adapters.add("one", {})
    with pytest.raises(InputError, match="takes no adapters"):
        runtime(x, adapter="one")


def test_a_swap_on_the_command_line(tmp_path: Path) -> None:
    model, given = shake(adapt(from_factory("zoo:small", {}))), ["--model", "zoo:small"]
    sarac.save(model, tmp_path / "m.pt", example_inputs=torch.randn(2, 6))
    for word, kind in (("--swappable", "whole"), ("--swappable=rowwise", "rowwise")):
        done = CliRunner().invoke(app, ["export", word, str(tmp_path / "m.pt"), str(tmp_path / "m.onnx"), "--json", *given])
        assert done.exit_code == 0
        assert f'"swappable": "{kind}"' in done.output
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "m.pt"), str(tmp_path / "m.onnx_adapter"), *given])
    assert done.exit_code == 0
    assert "an ONNX Runtime adapter" in done.output
    found, _, version = read_adapter(tmp_path / "m.onnx_adapter")
    assert version > 0
    assert all(name.endswith("sara_shift") for name in found)
