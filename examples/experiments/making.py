"""From a spec to a model that trains, by sarac or by PEFT."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sarac
from experiments.bench import SHUFFLED, Bench, slots
from experiments.methods import METHODS, Method
from experiments.spec import Spec
from experiments.training import Trainable

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ORTHOGONAL = 0.5  # AdaLoRA's weight of its penalty, PEFT's default


def program_key(spec: Spec) -> tuple[Any, ...]:
    """Specs with the same key can share one trainable model and its captured step."""
    drawn = METHODS[spec.method].random or SHUFFLED in spec.plan
    steps = spec.steps if spec.method == "adalora" else 0  # its budget follows the number of steps
    return spec.model, spec.method, spec.plan, spec.task, spec.batch, spec.kind, spec.seed if drawn else 0, steps


def make(spec: Spec, bench: Bench) -> Trainable:
    """The trainable model of a spec over the bench's base."""
    method = METHODS[spec.method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method.family == "sarac":
            return _sarac(spec, method, bench)
        base = copy.deepcopy(bench.base)
        if method.family == "full":
            base.requires_grad_(True)
            return Trainable(base, base, lambda: base)
        base.requires_grad_(False)
        return _peft(spec, base) if method.family == "peft" else Trainable(base, base, lambda: base)


def _sarac(spec: Spec, method: Method, bench: Bench) -> Trainable:
    model = bench.adapted(spec.plan, method.options, method.method, spec.seed, spec.seed)
    kind, _, value = method.note.partition("=")
    if kind == "scale":  # a scale of 1 makes the shift λ itself
        for _, _, tensors in slots(model):
            tensors["scale"].data.fill_(float(value))
    if kind == "schedule":
        sarac.schedule(model, value)
    ranks = [adapter.rank for _, adapter, _ in slots(model)]
    routed = not all(adapter.foldable for _, adapter, _ in slots(model))

    def merge() -> nn.Module:
        return model if routed else sarac.fold(model)

    return Trainable(model, model, merge, about={"rank_sum": sum(ranks), "rank_max": max(ranks)})


def _settings(plan: str) -> tuple[dict[str, int], list[str]]:
    """`r=1,on=q_proj+v_proj` as numbers and the modules that are meant."""
    pairs = dict(part.split("=") for part in plan.split(",") if part)
    on = pairs.pop("on", "+".join(LINEAR)).split("+")
    return {name: int(value) for name, value in pairs.items()}, on


def _peft(spec: Spec, base: nn.Module) -> Trainable:
    import peft

    numbers, on = _settings(spec.plan)
    r = numbers.get("r", 8)
    torch.manual_seed(spec.seed)
    if spec.method in ("lora", "pissa"):
        start: Any = "pissa_niter_16" if spec.method == "pissa" else True
        alpha = r if spec.method == "pissa" else 2 * r  # PiSSA's factors hold the weight's own values: a scale of 1
        config: Any = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=on, init_lora_weights=start)
    elif spec.method == "adalora":
        config = peft.AdaLoraConfig(
            init_r=r * 3 // 2, target_r=r, lora_alpha=2 * r, target_modules=on, total_step=spec.steps, deltaT=5,
            tinit=spec.steps // 10, tfinal=spec.steps // 3,
        )  # fmt: skip
    elif spec.method == "ia3":
        config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    else:
        config = peft.VeraConfig(r=r, target_modules=on, vera_dropout=0.0)
    model: Any = peft.get_peft_model(base, config)
    adaptive = _adalora(model) if spec.method == "adalora" else {}
    return Trainable(model, model.get_base_model(), lambda: model.merge_and_unload(), **adaptive)


def _adalora(model: Any) -> dict[str, Callable[..., Any]]:
    """What AdaLoRA adds to a step: PEFT computes the penalty in a forward that this harness does not take."""
    matrices = [(name, p) for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
    eyes = {size: torch.eye(size, device=p.device) for _, p in matrices for size in (min(p.shape),)}
    allocator = model.base_model.rankallocator

    def penalty() -> Tensor:
        total = [
            torch.linalg.matrix_norm((p @ p.T if "lora_A" in name else p.T @ p) - eyes[min(p.shape)]) for name, p in matrices
        ]
        return ORTHOGONAL * torch.stack(total).mean()

    def reset() -> None:
        allocator.reset_ipt()

    return {"penalty": penalty, "after_step": lambda step: model.base_model.update_and_allocate(step), "reset": reset}
