"""Siblings project their input together where the dataflow is known; nothing else ever takes such a projection."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from zoo import close, differ, same, shake

import sarac
from sarac.ir.siblings import WIDEST, Siblings


class Products(TorchDispatchMode):
    """The sizes of the results of products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.sizes.append(tuple(out.shape))
        return out


def group(*ranks: int) -> tuple[Siblings, list[nn.Parameter]]:
    modules = [nn.Module() for _ in ranks]
    for module, rank in zip(modules, ranks, strict=True):
        module.register_parameter("v", nn.Parameter(torch.randn(rank, 6), requires_grad=False))
    return Siblings([(module, "v") for module in modules]), [module.v for module in modules]


def sizes(siblings: Siblings, x: Tensor, vs: list[nn.Parameter]) -> list[tuple[int, ...]]:
    """Project by each, and look at the results; the sizes of the products."""
    with Products() as mode:
        found = [siblings.project(x, v) for v in vs]
    for one, v in zip(found, vs, strict=True):
        close(one, v @ x.reshape(-1, 6).mT)
    return mode.sizes


def test_one_product_for_all_whoever_comes_first() -> None:
    siblings, vs = group(2, 3, 4)
    assert sizes(siblings, torch.randn(5, 6), vs) == [(9, 5)]
    assert sizes(siblings, torch.randn(1, 5, 6), vs[::-1]) == [(9, 5)]
    assert sizes(siblings, torch.randn(5, 6), [nn.Parameter(torch.randn(2, 6))]) == [(2, 5)]  # none of them


def test_who_does_not_come_is_left_out() -> None:
    siblings, vs = group(2, 3, 4)
    assert sizes(siblings, torch.randn(5, 6), vs[:2]) == [(9, 5)]
    assert sizes(siblings, torch.randn(5, 6), vs[:2]) == [(5, 5)]
    assert sizes(siblings, torch.randn(5, 6), vs) == [(5, 5), (4, 5)]
    assert sizes(siblings, torch.randn(5, 6), vs[:1]) == [(5, 5)]
    assert sizes(siblings, torch.randn(5, 6), vs[:1]) == [(2, 5)]


def test_input_that_was_written_to_is_another() -> None:
    siblings, vs = group(2, 3)
    x = torch.randn(5, 6)
    first = siblings.project(x, vs[0])
    x.mul_(2.0)
    close(siblings.project(x, vs[1]), vs[1] @ x.mT)
    close(first, vs[0] @ x.mT / 2)


def test_wide_ones_and_other_dtypes_stay_apart() -> None:
    siblings, vs = group(WIDEST + 1, 2, 3)
    assert sizes(siblings, torch.randn(5, 6), vs) == [(WIDEST + 1, 5), (5, 5)]
    siblings, vs = group(2, 3)
    vs[1].data = vs[1].data.double()
    assert siblings.project(torch.randn(5, 6), vs[0]).shape == (2, 5)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x))


def trained(method: str = "sara", known: bool = True) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(Attention(), Attention()).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    model = shake(sarac.transform(base, "rank:3", method=method, example_inputs=x if known else None))
    sarac.schedule(model, "right")
    return model


def step(model: nn.Module, x: Tensor, checkpointed: bool = False) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    leaves = [x.detach().requires_grad_(), *(one for one in model.parameters() if one.requires_grad)]
    with Products() as mode:
        y = checkpoint(model, leaves[0], use_reentrant=False) if checkpointed else model(leaves[0])
        found = torch.autograd.grad(y.square().sum(), leaves)
    return [y.detach(), *found], mode.sizes


@pytest.mark.parametrize("method", ["sara", "mosara"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_is_that_of_each_alone(method: str, checkpointed: bool) -> None:
    joint, apart, x = trained(method), trained(method, known=False), torch.randn(4, 8, dtype=torch.float64)
    for _ in range(2):
        found, seen = step(joint, x, checkpointed)
        expected, other = step(apart, x, checkpointed)
        assert (6, 4) in seen
        assert (6, 4) not in other
        close(found, expected, torch.float64)
        differ(found[0], expected[0] * 1.01)
    if method == "sara":
        sarac.schedule(joint, {"*": "right", "*.k.weight": "left"})  # k needs no V any more
        step(joint, x)
        assert (6, 4) not in step(joint, x)[1]


def test_what_is_joint_is_so_from_the_first_call_in_copies_too() -> None:
    model, x = trained(), torch.randn(4, 8, dtype=torch.float64)
    copied = copy.deepcopy(model)
    assert copied[0].q.__dict__["sara_siblings"] is copied[0].k.__dict__["sara_siblings"]
    assert copied[0].q.__dict__["sara_siblings"] is not model[0].q.__dict__["sara_siblings"]
    (first, seen), (again, also) = step(model, x), step(copied, x)
    assert seen == also == step(model, x)[1]
    same(again, first)
    merged = sarac.fold(model)
    assert not any("sara_siblings" in module.__dict__ for module in merged.modules())


def test_autocast_gives_each_call_an_input_of_its_own() -> None:
    model, x = trained().float(), torch.randn(4, 8)
    assert (6, 4) in step(model, x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert (6, 4) not in step(model, x)[1]
