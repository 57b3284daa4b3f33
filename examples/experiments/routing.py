"""What the routers of a Mo-SARA model do: entropy, use of the sets, and whether different inputs take different ones."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench import slots
from experiments.training import answers, autocast
from sarac.ir.terms import observing

ROWS, SHUFFLES = 24, 500


@torch.no_grad()
def gates_by_row(model: nn.Module, inner: Any, ids: Tensor, bounds: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean gates over each row's answer tokens (rows, sites, sets), and the mean entropy of a token's gates (sites,)."""
    sites = {id(tensors["shift"]): number for number, (_, _, tensors) in enumerate(slots(model))}
    at, _, inside = answers(ids, bounds, width)
    weights = inside.double() / inside.sum(1, keepdim=True)
    means: dict[int, Tensor] = {}
    entropies: dict[int, Tensor] = {}

    def note(shift: Tensor, gates: Tensor) -> None:
        taken = gates.reshape(*ids.shape, -1).double().gather(1, at.unsqueeze(-1).expand(-1, -1, gates.shape[-1]))
        share = taken / taken.sum(-1, keepdim=True).clamp_min(1e-12)  # top-k's gates do not sum to 1
        means[sites[id(shift)]] = torch.einsum("rt,rts->rs", weights, share)
        entropies[sites[id(shift)]] = (-torch.xlogy(share, share).sum(-1) * weights).sum(1).mean()

    with observing(note), autocast(ids.device):
        inner.model(input_ids=ids, use_cache=False)
    known = sorted(means)
    return torch.stack([means[i] for i in known], 1).cpu(), torch.stack([entropies[i] for i in known]).cpu()


def entropy(shares: Tensor) -> Tensor:
    """−Σ p log p over the last dimension, in nats."""
    return -torch.xlogy(shares, shares).sum(-1)


def between(rows: Tensor, groups: Tensor) -> Tensor:
    """The mean squared distance of the groups' means from the mean of all, over sites and sets; rows (rows, sites, sets)."""
    flat, count = rows.flatten(1), int(groups.max()) + 1
    members = torch.nn.functional.one_hot(groups, count).double()
    means = (members.T @ flat) / members.sum(0).unsqueeze(1)
    return ((means - flat.mean(0)) ** 2 * members.sum(0).unsqueeze(1)).sum() / len(flat)


def permutation(rows: Tensor, groups: Tensor, shuffles: int = SHUFFLES) -> tuple[float, float, float]:
    """The distance between tasks, its mean where tasks are dealt to rows by chance, and the share of such that reach it."""
    generator = torch.Generator().manual_seed(0)
    seen = float(between(rows, groups))
    chance = [float(between(rows, groups[torch.randperm(len(groups), generator=generator)])) for _ in range(shuffles)]
    reached = sum(one >= seen * (1 - 1e-12) for one in chance)
    return seen, sum(chance) / shuffles, (reached + 1) / (shuffles + 1)


def figures(model: nn.Module, inner: Any, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """All that study 5 asks of a routed model, over test rows of several tasks; {} where nothing is routed."""
    routed = [adapter for _, adapter, _ in slots(model) if not adapter.foldable]
    if not routed:
        return {}
    model.eval()
    device = next(model.parameters()).device
    rows, token_entropy, groups = [], [], []
    for number, task in enumerate(tasks.values()):
        part = {key: value[:ROWS].to(device).long() for key, value in task["test"].items()}
        found, mean = gates_by_row(model, inner, part["ids"], part["bounds"], task["width"])
        rows.append(found)
        token_entropy.append(mean)
        groups += [number] * len(found)
    model.train()
    together, labels = torch.cat(rows), torch.tensor(groups)
    use, most = together.mean(0), math.log(routed[0].sets)
    seen, chance, p_value = permutation(together, labels)
    tokens = torch.stack(token_entropy).mean(0)
    return {
        "entropy": float(tokens.mean() / most), "use": use.mean(0).tolist(),
        "information": float(((entropy(use) - tokens) / most).mean()),  # nats that an input tells of its set, of log(sets)
        "dead": float((use < 1 / (10 * use.shape[1])).double().mean()),
        "entropy_by_site": [round(float(one), 4) for one in tokens / most],
        "use_by_task": {name: part.mean((0, 1)).tolist() for name, part in zip(tasks, rows, strict=True)},
        "between_tasks": seen, "between_by_chance": chance, "p": p_value, "rows": len(together),
    }  # fmt: skip
