"""Fine-tuning on text: transformers' Trainer trains what an adapted model lets train, losses are taken before and after.

The loss is computed here, over the labelled tokens alone: padding and prompts cost no memory, a plain module that gives
logits serves as well as a transformers one, and what is reported are means over tokens, not over batches.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from sarac.ir.errors import CheckFailed, InputError, PlanError
from sarac.ir.layers import adapted, evaluating
from sarac.ir.record import record_of
from sarac.surgery import recommended_lr, transform
from sarac.text import IGNORED, Rows, takes_mask

WHOLE_LR = 5e-5  # parameters that train whole move at most at Trainer's own rate: the adapters' one would wreck them
Step = Callable[[str], None]  # called once a step with what to say of it
Meter = Callable[[str, int], AbstractContextManager[Step]]  # from a title and the number of steps


@dataclass(frozen=True)
class Options:
    """How to train: without `steps` for `epochs`, without `lr` at the rate that the adapters recommend."""

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    lr: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What training did. Losses are in nats per token: of the first and last tenth of the steps, and on the evaluation data."""

    steps: int
    rows: int
    left_out: int
    learning_rate: float
    train_loss: tuple[float, float]
    eval_loss: tuple[float, float] | None
    seconds: float

    def facts(self) -> dict[str, Any]:
        """The outcome as a program would read it."""
        perplexity = [math.exp(loss) for loss in self.eval_loss] if self.eval_loss else None
        return {**asdict(self), "eval_perplexity": perplexity}

    def table(self) -> Table:
        """The losses before and after as a rich table."""
        heading = f"{self.steps} steps on {self.rows} rows at rate {self.learning_rate:g}, {self.seconds:.0f} s"
        table = Table("", title=heading, title_justify="left")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        table.add_row("training loss per token, first and last tenth", *(f"{loss:.3f}" for loss in self.train_loss))
        if self.eval_loss is not None:
            table.add_row("loss per token on the evaluation data", *(f"{loss:.3f}" for loss in self.eval_loss))
            table.add_row("perplexity on it", *(f"{math.exp(loss):.2f}" for loss in self.eval_loss))
        return table


def finetune(model: nn.Module, rows: Rows, evaluation: Rows | None, options: Options, meter: Meter) -> Outcome:
    """Train what `model` lets train on `rows`, in place; a loss that is no longer finite is a CheckFailed."""
    started = time.perf_counter()
    rate = recommended_lr(model) if options.lr is None else options.lr
    if torch.cuda.is_available():
        model.cuda()  # Trainer would do it, but after the first evaluation
    before = None if evaluation is None else _mean_loss(model, evaluation, options.batch_size, meter, "Evaluating before")
    losses = _train(model, rows, options, rate, meter)
    after = None if evaluation is None else _mean_loss(model, evaluation, options.batch_size, meter, "Evaluating after")
    tenth = max(1, len(losses) // 10)
    return Outcome(
        steps=len(losses),
        rows=len(rows.items),
        left_out=rows.left_out,
        learning_rate=rate,
        train_loss=(sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth),
        eval_loss=None if before is None or after is None else (before, after),
        seconds=time.perf_counter() - started,
    )


def require_language_model(model: nn.Module) -> None:
    """InputError for a transformers model that does not generate text token by token."""
    config = getattr(model, "config", None)
    if isinstance(model, PreTrainedModel) and (not model.can_generate() or getattr(config, "is_encoder_decoder", False)):
        raise InputError(
            f"{type(model).__name__} does not generate text token by token, which is what finetune trains: open a causal "
            "language model, or train the transformed model in a loop or a Trainer of your own."
        )


def with_adapters(model: nn.Module, plan: str | None, method: str | None, where: list[str] | None, seed: int) -> nn.Module:
    """The model itself if it has adapters, for which nothing else may be asked then; else transformed."""
    if not any(True for _ in adapted(model)):
        return transform(model, plan or "threshold:0.6", method=method or "sara", where=where, seed=seed)
    if plan is not None or method is not None or where is not None:
        raise PlanError("The model has its adapters already: leave --plan, --method and --where out, or start from its base.")
    return model


def _collate(items: Sequence[dict[str, list[int]]], mask: bool) -> dict[str, Tensor]:
    """Rows as a batch (rows, longest), filled up on the right; the fill is masked and has no label."""
    longest = max(len(item["labels"]) for item in items)
    fills = {"input_ids": 0, "labels": IGNORED, **({"attention_mask": 0} if mask else {})}
    rows = [{**item, "attention_mask": [1] * len(item["labels"])} for item in items]
    return {name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows]) for name, fill in fills.items()}


def batch_of(model: nn.Module, rows: Rows, size: int) -> dict[str, Tensor]:
    """The first rows as a batch of the model's, with their labels."""
    return _collate(rows.items[:size], takes_mask(model))


def _losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    outputs = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    return token_losses(model, outputs, batch["labels"])


def token_losses(model: nn.Module, outputs: Any, labels: Tensor) -> Tensor:
    """The negative log-likelihood of every labelled token, in nats, one number each."""
    logits, labels = getattr(outputs, "logits", outputs), labels.to(next(model.parameters()).device)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise InputError(
            f"{type(model).__name__} gives no logits of shape (batch, length, vocabulary) for token ids, which is what "
            "finetune trains: open a language model, or train the transformed model in a loop of your own."
        )
    wanted = labels[:, 1:]
    keep = wanted != IGNORED
    return F.cross_entropy(logits[:, :-1][keep].float(), wanted[keep], reduction="none")


def _mean_loss(model: nn.Module, rows: Rows, size: int, meter: Meter, title: str) -> float:
    """The mean loss over all labelled tokens, in nats, in eval mode."""
    batches = [rows.items[start : start + size] for start in range(0, len(rows.items), size)]
    device, total, count = next(model.parameters()).device, 0.0, 0
    with torch.no_grad(), evaluating(model), meter(title, len(batches)) as step:
        for batch in batches:
            found = _losses(model, {name: t.to(device) for name, t in _collate(batch, takes_mask(model)).items()})
            total, count = total + float(found.double().sum()), count + found.numel()
            step(f"loss {total / count:.3f}")
    return total / count


class _Trainer(Trainer):
    """Trainer with this module's loss."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return _losses(model, inputs).mean()


class _Watch(TrainerCallback):
    """Passes every step's loss on, and stops at the first that is not finite."""

    def __init__(self, step: Step, rate: float) -> None:
        self.step, self.rate = step, rate
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            if not math.isfinite(self.losses[-1]):
                raise CheckFailed(
                    f"The loss is {self.losses[-1]} at step {state.global_step}: train at a rate below {self.rate:g}."
                )
            self.step(f"loss {self.losses[-1]:.3f}")


def _optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    record = record_of(model)
    whole = set(record.plan.also_train) if record else set()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in named if name not in whole], "lr": rate},
        {"params": [parameter for name, parameter in named if name in whole], "lr": min(rate, WHOLE_LR)},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def _train(model: nn.Module, rows: Rows, options: Options, rate: float, meter: Meter) -> list[float]:
    """Run the Trainer; the loss of every step."""
    mask, epoch = takes_mask(model), math.ceil(len(rows.items) / options.batch_size)
    with tempfile.TemporaryDirectory() as folder, meter("Training", options.steps or math.ceil(epoch * options.epochs)) as step:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps or -1,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            seed=options.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would show the last finite loss in place of NaN
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel replicates modules by rules that no adapter can keep
        watch = _Watch(step, rate)
        trainer = _Trainer(
            model,
            arguments,
            data_collator=lambda items: _collate(items, mask),
            train_dataset=rows.items,
            optimizers=(_optimizer(model, rate), None),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)  # it prints on stdout, where the command's result goes
        trainer.train()
    return watch.losses
