"""What tests/user/test_distributed.py runs in two gloo processes: `python two_processes.py RANK FOLDER` writes FOLDER/RANK.pt."""

import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from user.methods import METHODS, adapted, batch
from zoo import llama, shake

import sarac

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def encoder() -> nn.Module:
    """A layer whose packed weight and whose children's weights are read, not called."""
    torch.manual_seed(0)
    return shake(sarac.transform(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)))


def train(model: nn.Module, tokens: Tensor, steps: int = 2) -> list[Tensor]:
    """The logits before each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    seen = []
    for _ in range(steps):
        out = model(input_ids=tokens, labels=tokens)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(out.logits.detach().clone())
    return seen


def mine(tokens: Tensor) -> Tensor:
    return tokens.chunk(dist.get_world_size())[dist.get_rank()]


def whole(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in get_model_state_dict(model, options=WHOLE).items()}


def shard(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def ddp(method: str, folder: Path) -> dict[str, Any]:
    model = adapted(method)
    wrapped = DistributedDataParallel(model)
    sent: list[int] = []
    original = dist._broadcast_coalesced

    def counted(group: Any, tensors: list[Tensor], *rest: Any) -> Any:
        sent.extend(tensor.data_ptr() for tensor in tensors)
        return original(group, tensors, *rest)

    dist._broadcast_coalesced = counted
    try:
        logits = train(wrapped, mine(batch()))
    finally:
        dist._broadcast_coalesced = original
    factors = {name: p.data_ptr() for name, p in model.named_parameters()}
    again = [name for name, pointer in factors.items() if pointer in sent]
    if dist.get_rank() == 0:
        sarac.save_adapter(model, folder / f"ddp-{method}.safetensors")
    return {"logits": logits, "state": dict(model.state_dict()), "sent": len(sent), "parameters sent": again}


def fsdp(method: str, folder: Path) -> dict[str, Any]:
    model = shard(adapted(method))
    before = whole(model)
    logits = train(model, mine(batch()))
    found = {"logits": logits, "before": before, "state": whole(model)}
    with sarac.disabled(model), torch.no_grad():
        found["disabled"] = model(mine(batch())).logits
    sarac.save_adapter(model, folder / f"fsdp-{method}.safetensors")
    sarac.save(model, folder / f"fsdp-{method}.pt")
    state = get_model_state_dict(model, options=WHOLE)
    model.save_pretrained(folder / f"fsdp-{method}", state_dict=state, is_main_process=dist.get_rank() == 0)
    local = {name: type(p).__name__ for name, p in model.named_parameters()}
    return found | {"types": set(local.values()), "size": sum(p.to_local().numel() for p in model.parameters())}


def half_base(folder: Path) -> dict[str, Any]:
    model = shard(adapted("sara", dtype=torch.bfloat16))
    logits = train(model, mine(batch()))
    return {"logits": logits, "state": whole(model)}


def half_compute(folder: Path) -> dict[str, Any]:
    model = shard(adapted("sara"), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    logits = train(model, mine(batch()))
    return {"logits": logits, "state": whole(model)}


def half_factors(folder: Path) -> dict[str, Any]:
    """FSDP2 takes one dtype of what trains in a group: factors of half precision and δ of float32 are two."""
    model = shard(adapted("factors", dtype=torch.bfloat16))
    try:
        model(mine(batch()))
        said = ""
    except AssertionError as error:
        said = str(error)
    model = shard(adapted("factors"), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    return {"said": said, "logits": train(model, mine(batch())), "state": whole(model)}


def weight_form(folder: Path) -> dict[str, Any]:
    model, x = encoder(), torch.linspace(-1, 1, 4 * 3 * 16).reshape(4, 3, 16)
    fully_shard(model)
    out = model(mine(x))
    (out * mine(x)).mean().backward()  # of a norm's output the mean square says nothing
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        return {"out": out.detach(), "grads": grads, "eval": model.eval()(mine(x)), "state": whole(model)}


def refusals(folder: Path) -> dict[str, str]:
    model, plain, said = shard(adapted("sara")), shard(llama()), {}
    for name, act in {
        "fold": lambda: sarac.fold(model),
        "transform": lambda: sarac.transform(plain, "rank:3"),
        "transform in place": lambda: sarac.transform(plain, "rank:3", inplace=True),
        "analyze": lambda: sarac.analyze(plain),
        "export": lambda: sarac.export(model, folder / "m.onnx", batch()),
    }.items():
        try:
            said[name] = f"no error: {act()}"
        except sarac.SaracError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": batch()[index % 4], "labels": batch()[index % 4]}


def trainer(folder: Path) -> dict[str, Any]:
    """transformers' Trainer in two processes: two steps, then two more from the checkpoint, end where four steps end."""

    def run(name: str, **options: Any) -> Any:
        model = adapted("sara")
        arguments = transformers.TrainingArguments(
            str(folder / name), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, ddp_backend="gloo", disable_tqdm=True, seed=3,
        )  # fmt: skip
        engine = transformers.Trainer(model, arguments, train_dataset=Rows())
        engine.train(**options)
        assert isinstance(engine.model_wrapped, DistributedDataParallel)
        return model.state_dict()

    once = run("trainer")
    again = run("resumed", resume_from_checkpoint=str(folder / "trainer" / "checkpoint-2"))
    return {"once": once, "again": again}


def checks() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    for method in METHODS:
        yield f"ddp {method}", lambda folder, method=method: ddp(method, folder)
        yield f"fsdp {method}", lambda folder, method=method: fsdp(method, folder)
    for check in (half_base, half_compute, half_factors, weight_form, refusals, trainer):
        yield check.__name__, check


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage again and again
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, check in checks():
        try:
            found[name] = check(folder)
        except Exception:  # noqa: BLE001  it is told by the tests of this check
            found[name] = traceback.format_exc()
        dist.barrier()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
