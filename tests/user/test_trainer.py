"""transformers' Trainer and accelerate on adapted models: evaluation, checkpoints, resuming, the best model at the end."""

import gc
import inspect
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from user.methods import METHODS, adapted, base, batch, fresh
from zoo import close, differ, outputs, same, shake, trainables

import sarac


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """accelerate collects garbage at every step of its life, which among all that tests have imported takes half a second."""
    gc.freeze()


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Tokens, their labels, and a column that no forward takes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = batch(8)[index]
        return {"input_ids": tokens, "labels": tokens, "row": torch.tensor(index)}


def trainer(model: Any, folder: Path, **options: Any) -> transformers.Trainer:
    given = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 3}
    arguments = transformers.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, **{**given, **options}
    )
    return transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


def require_equal(model: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_trains_what_trains_and_evaluates_it(tmp_path: Path, method: str) -> None:
    model = fresh(method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="no")
    start = run.evaluate()["eval_loss"]
    with torch.no_grad():
        tokens = batch(8)
        assert start == pytest.approx(base()(tokens, labels=tokens).loss.item(), rel=1e-5)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert start > losses[0] > losses[-1]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trainables(model)


@pytest.mark.parametrize(("method", "size"), [*((method, "one file") for method in METHODS), ("sara", "shards")])
def test_resumes_from_a_checkpoint(tmp_path: Path, method: str, size: str) -> None:
    """Two steps, then two more from the checkpoint, end where four steps end."""
    model = fresh(method)
    trainer(model, tmp_path / "one").train()
    checkpoint = tmp_path / "one" / "checkpoint-2"
    half = sarac.load(checkpoint)
    if size == "shards":
        half.save_pretrained(checkpoint, max_shard_size="8KB")
        assert not (checkpoint / "model.safetensors").exists()
    other = fresh(method)
    trainer(other, tmp_path / "two").train(resume_from_checkpoint=str(checkpoint))
    require_equal(other, model)
    require_equal(sarac.load(tmp_path / "one" / "checkpoint-4"), model)
    differ(outputs(half, batch()).logits, outputs(model.eval(), batch()).logits)


@pytest.mark.parametrize("method", ["sara"])
def test_checkpoint_is_no_trained_model_to_from_pretrained(tmp_path: Path, method: str) -> None:
    trainer(fresh(method), tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match=r"sarac\.load"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(RuntimeError, match="mismatched"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2", config=base().config)


@pytest.mark.parametrize(("method", "size"), [("sara", "one file"), ("mosara", "shards")])
def test_best_model_comes_back_at_the_end(tmp_path: Path, method: str, size: str) -> None:
    """Here the best is the first, that of the highest loss."""

    class Split(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            checkpoint = tmp_path / f"checkpoint-{state.global_step}"
            shutil.copytree(checkpoint, tmp_path / "kept" / checkpoint.name)
            if size == "shards":
                sarac.load(checkpoint).save_pretrained(checkpoint, max_shard_size="8KB")

    model = fresh(method)
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    run = trainer(model, tmp_path, save_steps=1, **best)
    run.add_callback(Split())
    run.train()
    kept = {name: sarac.load(tmp_path / "kept" / name) for name in ("checkpoint-1", "checkpoint-4")}
    assert Path(str(run.state.best_model_checkpoint)).name == "checkpoint-1"
    require_equal(model, kept["checkpoint-1"])
    differ(outputs(model.eval(), batch()).logits, outputs(kept["checkpoint-4"], batch()).logits)


@pytest.mark.parametrize(("method", "reentrant"), [("sara", False), ("factors", True), ("mosara", False), ("mosara", True)])
def test_gradient_checkpointing_trains_alike(tmp_path: Path, method: str, reentrant: bool) -> None:
    counts, models = [], []
    for checkpointing in (False, True):
        model, seen = fresh(method), list[int]()
        if reentrant:  # as for any frozen base: torch's reentrant form needs an input that requires gradients
            model.enable_input_require_grads()
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        options = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}} if checkpointing else {}
        trainer(model, tmp_path, max_steps=2, save_strategy="no", activation_checkpointing=checkpointing, **options).train()
        counts.append(len(seen))
        models.append(model)
    assert counts == [2, 4]
    for name in trainables(model):
        close(models[1].get_parameter(name), models[0].get_parameter(name))
    differ(outputs(model.eval(), batch()).logits, outputs(base(), batch()).logits)


def test_unused_columns_go_and_labels_stay(tmp_path: Path) -> None:
    model = adapted("sara")
    assert inspect.signature(model.forward) == inspect.signature(base().forward)
    for keep, columns in ((False, {"input_ids", "labels"}), (True, {"input_ids", "labels", "row"})):
        loader = trainer(model, tmp_path, remove_unused_columns=not keep).get_train_dataloader()
        assert set(next(iter(loader))) == columns


def prepared(model: nn.Module) -> tuple[accelerate.Accelerator, Any, Any]:
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=sarac.recommended_lr(model))
    return accelerator, *accelerator.prepare(model, optimizer)


def steps(accelerator: accelerate.Accelerator, model: Any, optimizer: Any, count: int) -> None:
    for _ in range(count):
        accelerator.backward(model(input_ids=batch(), labels=batch()).loss)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_accelerate_trains_saves_and_loads(tmp_path: Path, method: str) -> None:
    accelerator, model, optimizer = prepared(fresh(method))
    steps(accelerator, model, optimizer, 2)
    accelerator.save_state(str(tmp_path / "state"))
    half = outputs(model, batch()).logits
    steps(accelerator, model, optimizer, 2)
    inner = accelerator.unwrap_model(model)
    after = {name: tensor.clone() for name, tensor in inner.state_dict().items()}
    differ(outputs(model, batch()).logits, half)
    differ(half, outputs(base(), batch()).logits)
    shake(inner)
    accelerator.load_state(str(tmp_path / "state"))
    same(outputs(model, batch()).logits, half)
    steps(accelerator, model, optimizer, 2)
    assert all(torch.equal(tensor, after[name]) for name, tensor in inner.state_dict().items())
    accelerator.save_model(model, tmp_path / "model")
    other = adapted(method)
    other.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"), strict=False)
    require_equal(other, inner)
    accelerator.free_memory()


def test_accelerate_loads_the_folder_of_save_pretrained(tmp_path: Path) -> None:
    model = adapted("sara")
    model.save_pretrained(tmp_path)
    accelerator, other, _ = prepared(fresh("sara"))
    accelerator.unwrap_model(other).load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    require_equal(other, model)
    with pytest.raises(RuntimeError, match="size mismatch"):  # loud, where it does not go through load_state_dict
        accelerate.load_checkpoint_in_model(base(), tmp_path)
    accelerator.free_memory()
