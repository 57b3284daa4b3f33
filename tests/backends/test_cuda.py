"""ONNX Runtime on a GPU: what the CPU computes, in order with torch's work, as a CUDA graph too. Skipped without a GPU."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor
from zoo import adapt, close, differ, llama, mlp, outputs, same, shake

import sarac
from sarac import doctor
from sarac.backends.onnx import Onnx
from sarac.backends.placement import Placement
from sarac.backends.runtime import Runtime
from sarac.ir.errors import ExportError, SaracWarning
from sarac.ir.inputs import Inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

HEAD = '<ir_version: 10, opset_import: ["": 20]>'
FREE = "free (float[n, 64] x, int64[n] rows) => (float[n, 64] y, bool[n] odd, float[k, 64] twice, int64[2] size)"
FREE += " { a = MatMul(x, w) y = Gather(a, rows) one = Constant<value_int=1>() bit = BitwiseAnd(rows, one) odd = Cast<to=9>(bit)"
FREE += " twice = Concat<axis=0>(y, y) size = Shape(x) }"
FIXED = "fixed (float[256, 64] x) => (float[256, 64] y) { a = MatMul(x, w) b = MatMul(a, w) y = Relu(b) }"
HOSTED = "hosted (float[64, 64] x) => (float[64, 64] y) { a = MatMul(x, w) e = Det(a) y = Add(a, e) }"  # no kernel for Det


@pytest.fixture
def saved(tmp_path: Path):
    def saver(graph: str) -> Path:
        model = onnx.parser.parse_model(f"{HEAD} {graph}")
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight.numpy(), "w"))
        onnx.save(model, tmp_path / "g.onnx")
        return tmp_path / "g.onnx"

    return saver


def given(seed: int = 0, n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 64, generator=generator), torch.randperm(n, generator=generator)


@pytest.mark.filterwarnings("ignore::sarac.ir.errors.SaracWarning")
def test_a_gpu_computes_what_the_cpu_does(saved) -> None:
    path = saved(FREE)
    on_gpu, on_cpu = Runtime(path, "cuda"), Runtime(path)
    for seed, n in ((0, 16), (1, 3), (2, 0)):
        x, rows = given(seed, n)
        expected = on_cpu(x, rows)
        for inputs in ((x, rows), (x.cuda(), rows.cuda()), (x.cuda().t().contiguous().t(), rows)):
            found = on_gpu(*inputs)
            assert {tensor.device for tensor in found.values()} == {on_gpu.device}
            close({name: tensor.cpu() for name, tensor in found.items()}, expected)
        close(on_gpu.run(Inputs((x, rows))), expected)
    differ(on_gpu(*given(0))["y"].cpu(), on_cpu(*given(1))["y"])


@pytest.mark.parametrize("graph", [True, False])
def test_runs_keep_their_place_in_torchs_stream(saved, graph: bool) -> None:
    """Inputs are written just before each run and overwritten just after, with no synchronisation in between."""
    runtime, cpu = Runtime(saved(FIXED), "cuda", cuda_graph=graph), Runtime(saved(FIXED))
    xs = [torch.randn(256, 64) for _ in range(8)]
    big, x = torch.randn(4096, 4096, device="cuda"), torch.empty(256, 64, device="cuda")
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        with torch.cuda.stream(stream):
            on_device = [value.cuda() for value in xs]
            stream.synchronize()
            found = []
            for value in on_device:
                for _ in range(4):
                    big = (big @ big).clamp(-1, 1)  # keeps the stream busy, so that a run out of order reads what is old
                x.copy_(value + 0 * big[0, 0])
                y = runtime(x)["y"]
                x.fill_(float("nan"))
                found.append(y * 2)
            del y
            stream.synchronize()
        for tensor, value in zip(found, xs, strict=True):
            close(tensor.cpu(), 2 * cpu(value)["y"])
    differ(found[0].cpu(), found[1].cpu())


def test_buffers_on_the_gpu_are_written(saved) -> None:
    for graph in (True, False):
        runtime = Runtime(saved(FIXED), "cuda", cuda_graph=graph)
        x, buffer = torch.randn(256, 64, device="cuda"), torch.zeros(256, 64, device="cuda")
        assert runtime(x, out={"y": buffer})["y"] is buffer
        same(buffer, runtime(x)["y"])
        differ(buffer, runtime(2 * x)["y"])


def test_a_cuda_graph_where_there_can_be_one(saved) -> None:
    assert "with CUDA graphs" in repr(Runtime(saved(FIXED), "cuda"))
    assert "with CUDA graphs" not in repr(Runtime(saved(FIXED), "cuda", cuda_graph=False))


@pytest.mark.parametrize("insisted", [True, None])
def test_shapes_that_come_back_are_replayed(insisted: bool | None, tmp_path: Path) -> None:
    model = llama(3).eval()
    inputs = Inputs((), {"input_ids": torch.randint(8, 32, (2, 9))})
    Onnx(optimize="ort", provider="cuda").write(model, inputs, tmp_path / "m.onnx", {})
    runtime, plain = Runtime(tmp_path / "m.onnx", "cuda", cuda_graph=insisted), Runtime(tmp_path / "m.onnx")
    for _ in range(5):
        for shape in ((1, 7), (3, 11), (2, 9)):
            ids = torch.randint(8, 32, shape)
            found = runtime(ids.cuda())["logits"].cpu()
            close(found, plain(ids)["logits"])
            differ(found, plain(ids.flip(1))["logits"])
    assert len(runtime._graphs._made) == 3


def test_a_float_that_computes_on_the_cpu_is_named(saved, recwarn) -> None:
    assert Runtime(saved(FIXED), "cuda").placement == Placement()
    assert not [entry for entry in recwarn if entry.category is SaracWarning]
    with pytest.warns(SaracWarning, match=r"1 x Det\) and \d+ copies"):
        Runtime(saved(HOSTED), "cuda")
    with pytest.raises(ExportError, match=r"cannot run as a CUDA graph: .*1 x Det"):
        Runtime(saved(HOSTED), "cuda", cuda_graph=True)


def test_no_such_gpu_gets_a_sentence(saved) -> None:
    with pytest.raises(ExportError, match=r"There is no GPU 99: torch sees \d"):
        Runtime(saved(FIXED), "cuda", device_id=99)


def test_the_doctor_finds_cuda() -> None:
    found = doctor.diagnose()
    assert found.providers["CUDAExecutionProvider"] == "ok"
    assert found.toolkits["driver"] is not None
    # Two packages of ONNX Runtime over each other are a fault of the machine, and told.
    assert [fault for fault, _ in found.faults if "installed over each other" not in fault] == []


@pytest.mark.parametrize("dynamic", ["auto", "static"])
@pytest.mark.parametrize("method", ["sara", "mosara"])
@pytest.mark.filterwarnings("ignore::sarac.ir.errors.SaracWarning")
def test_adapters_swap_in_on_a_gpu_and_in_its_graphs(tmp_path: Path, method: str, dynamic: str) -> None:
    base = mlp(16, 32, 8).eval()
    adapted = [shake(adapt(base, method=method, seed=seed)) for seed in range(2)]
    x = torch.randn(4, 16)
    choice = {"swappable": "rowwise", "provider": "cuda", "dynamic": dynamic}
    report = sarac.export(adapted[0], tmp_path / "m.onnx", x, **choice)
    assert report.error < 1e-5
    runtime = Runtime(tmp_path / "m.onnx", "cuda")
    assert "with CUDA graphs" in repr(runtime)
    for index, model in enumerate(adapted):
        sarac.save_onnx_adapter(model, tmp_path / f"{index}.onnx_adapter")
        runtime.adapters.add(f"{index}", tmp_path / f"{index}.onnx_adapter")
    wanted = {"0": outputs(adapted[0], x), "1": outputs(adapted[1], x), None: outputs(base, x)}
    for _ in range(3):
        for name in wanted:
            close(next(iter(runtime(x.cuda(), adapter=name).values())).cpu(), wanted[name])
            differ(wanted[name], wanted["1" if name == "0" else "0"])
    chosen = ["1", None, "0", "1"]
    mixed = next(iter(runtime(x.cuda(), adapter=chosen).values())).cpu()
    close(mixed, torch.stack([wanted[name][row] for row, name in enumerate(chosen)]))


@pytest.mark.filterwarnings("ignore::sarac.ir.errors.SaracWarning")
def test_a_gpu_generates_what_the_cpu_does(tmp_path: Path) -> None:
    model = shake(adapt(llama(5).eval()))
    for provider in ("cpu", "cuda"):
        sarac.export(model, tmp_path / f"{provider}.onnx", task="generate", provider=provider, swappable="rowwise")
    runtimes = {provider: Runtime(tmp_path / f"{provider}.onnx", provider) for provider in ("cpu", "cuda")}
    ids = torch.randint(8, 32, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    values = {name: 0.2 * torch.randn(shape) for name, shape in runtimes["cpu"].adapters.shapes.items()}
    for runtime in runtimes.values():
        runtime.adapters.add("one", values)
    for adapter in (None, "one", ["one", None, "one"], None):
        for count in (5, 40, 5):
            found = [one.generate(ids, count, attention_mask=mask, adapter=adapter, eos_token_id=()) for one in runtimes.values()]
            assert torch.equal(*found)
    one, none = (runtimes["cuda"].generator.follow(ids.cuda(), mask.cuda(), 2, adapter) for adapter in ("one", None))
    differ(one.cpu(), none.cpu())
