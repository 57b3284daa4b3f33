"""DDP and FSDP2 in two gloo processes, from adapters away from zero, against one process; and DataParallel's replicas."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import replicate
from user import two_processes
from user.methods import METHODS, adapted, base, batch
from user.two_processes import encoder, train
from zoo import close, differ, mlp, outputs, same, shake, trainables

import sarac

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What both processes saw, and the folder that they wrote to."""
    folder = tmp_path_factory.mktemp("two")
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", two_processes.__file__, str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    one, two = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2))
    return one, two, folder


def seen(found: Any, name: str) -> tuple[Any, Any]:
    """What both processes saw in one check; its traceback where it failed."""
    for result in found[:2]:
        assert not isinstance(result[name], str), result[name]
    return found[0][name], found[1][name]


def alone(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Logits before each step, state before and after, of one process over the whole batch."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return train(model, batch()), before, dict(model.state_dict())


def require_as_alone(
    logits: list[Tensor], state: dict[str, Tensor], model: nn.Module, dtype: torch.dtype = torch.float32
) -> None:
    """Equal outputs before both steps, equal adapters after them, and a base that did not move by a bit."""
    expected, before, after = alone(model)
    trained = trainables(model)
    for actual, wanted in zip(logits, expected, strict=True):
        close(actual, wanted, dtype)
    differ(expected[0], expected[1])
    assert trained
    assert state.keys() == after.keys()
    for name, tensor in state.items():
        if name in trained:
            close(tensor, after[name], dtype)
            assert not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name


# --- DDP ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_ddp_is_as_one_process(found: Any, method: str) -> None:
    one, two = seen(found, f"ddp {method}")
    logits = [torch.cat(parts) for parts in zip(one["logits"], two["logits"], strict=True)]
    for result in (one, two):
        require_as_alone(logits, result["state"], adapted(method))


@pytest.mark.parametrize("method", METHODS)
def test_ddp_sends_no_factors_at_every_step(found: Any, method: str) -> None:
    """Buffers are sent each step, which is counted; parameters are not."""
    for result in seen(found, f"ddp {method}"):
        assert result["parameters sent"] == []
        assert result["sent"] > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_adapter_file_holds_what_was_trained(found: Any, kind: str, method: str) -> None:
    one, _ = seen(found, f"{kind} {method}")
    loaded = sarac.load_adapter(base(), found[2] / f"{kind}-{method}.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, one["state"][name]), name
    start = adapted(method)
    differ(outputs(loaded, batch()).logits, outputs(start, batch()).logits)


# --- FSDP2 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_fsdp_is_as_one_process(found: Any, method: str) -> None:
    one, two = seen(found, f"fsdp {method}")
    logits = [torch.cat(parts) for parts in zip(one["logits"], two["logits"], strict=True)]
    require_as_alone(logits, one["state"], adapted(method))
    for name, tensor in adapted(method).state_dict().items():
        assert torch.equal(one["before"][name], tensor), name


@pytest.mark.parametrize("method", METHODS)
def test_fsdp_shards_everything_the_factors_too(found: Any, method: str) -> None:
    one, two = seen(found, f"fsdp {method}")
    assert one["types"] == {"DTensor"}
    assert one["size"] + two["size"] == sum(p.numel() for p in adapted(method).parameters())
    assert 0.4 < one["size"] / (one["size"] + two["size"]) < 0.6


@pytest.mark.parametrize("method", METHODS)
def test_sharded_model_is_disabled_for_a_while(found: Any, method: str) -> None:
    parts = seen(found, f"fsdp {method}")
    plain = outputs(base(), batch()).logits
    close(torch.cat([part["disabled"] for part in parts]), plain)
    differ(torch.cat([part["logits"][0] for part in parts]), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["model.pt", "folder"])
def test_sharded_model_is_written_whole(found: Any, method: str, form: str) -> None:
    one, _ = seen(found, f"fsdp {method}")
    loaded = sarac.load(found[2] / (f"fsdp-{method}.pt" if form == "model.pt" else f"fsdp-{method}"))
    assert type(loaded) is type(base())
    assert loaded.state_dict().keys() == one["state"].keys()
    assert all(torch.equal(tensor, one["state"][name]) for name, tensor in loaded.state_dict().items())
    merged = method != "mosara" and sarac.fold(loaded)
    if merged:
        close(outputs(merged, batch()).logits, outputs(loaded, batch()).logits)
    differ(outputs(loaded, batch()).logits, outputs(adapted(method), batch()).logits)


def test_fsdp_trains_float32_shifts_on_a_bfloat16_base(found: Any) -> None:
    one, two = seen(found, "half_base")
    logits = [torch.cat(parts) for parts in zip(one["logits"], two["logits"], strict=True)]
    model = adapted("sara", dtype=torch.bfloat16)
    assert {one["state"][name].dtype for name in trainables(model)} == {torch.float32}
    assert one["state"]["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    require_as_alone(logits, one["state"], model, torch.bfloat16)


@pytest.mark.parametrize(("name", "method"), [("half_compute", "sara"), ("half_factors", "factors")])
def test_mixed_precision_keeps_float32_shards(found: Any, name: str, method: str) -> None:
    """The way for factors of a half-precision model too: FSDP2 takes one stored dtype of what trains in a group."""
    one, two = seen(found, name)
    if name == "half_factors":
        assert "uniform original parameter dtype" in one["said"]
    assert {tensor.dtype for tensor in one["state"].values()} == {torch.float32}
    logits, model = torch.cat([one["logits"][0], two["logits"][0]]), adapted(method)
    expected, before, _ = alone(model)
    close(logits, expected[0], torch.bfloat16)
    assert not torch.equal(logits.float(), expected[0])
    for tensor_name, tensor in one["state"].items():
        assert torch.equal(tensor, before[tensor_name]) == (tensor_name not in trainables(model)), tensor_name


def test_weights_that_others_read_are_effective_under_fsdp(found: Any) -> None:
    one, two = seen(found, "weight_form")
    model, x = encoder(), torch.linspace(-1, 1, 4 * 3 * 16).reshape(4, 3, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = model(x)
    (out * x).mean().backward()
    close(torch.cat([one["out"], two["out"]]), out)
    close(torch.cat([one["eval"], two["eval"]]), out)
    assert one["grads"].keys() == trainables(model)
    for name, gradient in one["grads"].items():
        close(gradient, model.get_parameter(name).grad)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one["state"].items())
    with sarac.disabled(model):
        differ(out, model(x))


def test_what_a_shard_cannot_do_is_said(found: Any) -> None:
    said, _ = seen(found, "refusals")
    for name in ("fold", "transform", "transform in place", "export"):
        assert said[name].startswith("RewriteError: model.embed_tokens.weight of this FSDPLlamaForCausalLM is sharded"), said
        assert "transform a model before fully_shard" in said[name]
        assert "sarac.save" in said[name]


# --- Trainer in two processes ---------------------------------------------------------------------------------------------


def test_trainer_resumes_in_two_processes(found: Any) -> None:
    for result in seen(found, "trainer"):
        once, again = result["once"], result["again"]
        assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())
    start, trained = adapted("sara").state_dict(), trainables(adapted("sara"))
    assert {name for name, tensor in start.items() if not torch.equal(tensor, once[name])} == trained
    last = sarac.load(found[2] / "trainer" / "checkpoint-4").state_dict()
    assert all(torch.equal(tensor, once[name]) for name, tensor in last.items())
    half = sarac.load(found[2] / "trainer" / "checkpoint-2").state_dict()
    assert not all(torch.equal(tensor, once[name]) for name, tensor in half.items())


# --- DataParallel ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, "encoder"])
def test_replicas_of_data_parallel_compute_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nn.DataParallel does with two GPUs, with a broadcast that stays on the CPU."""
    place = sys.modules["torch.nn.parallel.replicate"]  # the package has a function of this name
    copies = lambda tensors, devices, detach=False: [[tensor.clone() for tensor in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(place, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(place, "_get_device_index", lambda device, optional: device)
    model, x = (encoder(), torch.randn(4, 3, 16)) if name == "encoder" else (adapted(name), batch())
    first = lambda model: getattr(out := model(x), "logits", out)  # noqa: E731
    expected = first(model)
    with sarac.disabled(model):
        differ(expected, first(model))
    expected.square().mean().backward()
    wanted = {name: model.get_parameter(name).grad.clone() for name in trainables(model)}
    model.zero_grad()
    found = [first(replica) for replica in replicate(model, [0, 1])]
    for out in found:
        same(out, expected)
    sum(out.square().mean() / 2 for out in found).backward()
    for name, gradient in wanted.items():
        close(model.get_parameter(name).grad, gradient)
        assert gradient.any()


def test_replica_alone_takes_other_tensors() -> None:
    model = shake(sarac.transform(mlp(6, 5, 4)))
    with pytest.raises(sarac.WeightError, match=r"0\.weight is adapted and cannot be assigned"):
        model[0].register_parameter("weight", nn.Parameter(torch.zeros(5, 6)))
    with pytest.raises(sarac.WeightError, match=r"0\.weight is adapted and cannot be assigned"):
        model[0].weight = torch.zeros(5, 6)
    model[0].register_parameter("other", nn.Parameter(torch.zeros(2)))
    assert "0.other" in model.state_dict()
