"""Siblings project their input together once they were seen; nothing else ever takes such a projection."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from zoo import close, differ, shake

import sarac
from sarac.ir import siblings
from sarac.ir.siblings import projected


@pytest.fixture(autouse=True)
def unseen() -> None:
    siblings._groups.clear()
    siblings._seen.ready, siblings._seen.x = {}, lambda: None


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


def three() -> list[Tensor]:
    return [torch.randn(rank, 6) for rank in (2, 3, 4)]


def seen(x: Tensor, vs: list[Tensor]) -> list[tuple[int, ...]]:
    """Project by each, and look at the results; the sizes of the products."""
    with Products() as mode:
        found = [projected(x, v) for v in vs]
    for one, v in zip(found, vs, strict=True):
        close(one, x.reshape(-1, 6) @ v.mT)
    return mode.sizes


def test_siblings_take_one_product_from_the_second_time_on() -> None:
    vs, apart = three(), [(5, 2), (5, 3), (5, 4)]
    assert seen(torch.randn(5, 6), vs) == apart
    assert seen(torch.randn(5, 6), vs) == [(5, 9)]
    assert seen(torch.randn(1, 5, 6), vs) == [(5, 9)]
    x = torch.randn(5, 6)
    assert seen(x, vs[:1]) == [(5, 9)]  # nobody takes the rest
    assert seen(torch.randn(5, 6), vs[:1]) == [(5, 2)]  # and so they are siblings no more
    assert seen(torch.randn(5, 6), vs) == apart
    assert seen(torch.randn(5, 6), vs[1:]) == apart[1:]  # another first one


def test_input_that_was_written_to_is_another() -> None:
    vs, x = three(), torch.randn(5, 6)
    seen(torch.randn(5, 6), vs)
    first = projected(x, vs[0])
    x.mul_(2.0)
    close(projected(x, vs[1]), x @ vs[1].mT)
    close(first, x @ vs[0].mT / 2)
    close(projected(x.clone(), vs[2]), x @ vs[2].mT)


def test_wide_ones_and_other_dtypes_stay_apart() -> None:
    wide = [torch.randn(siblings.WIDEST + 1, 6), torch.randn(siblings.WIDEST + 1, 6)]
    sizes = [(5, siblings.WIDEST + 1)] * 2
    assert seen(torch.randn(5, 6), wide) == sizes
    assert seen(torch.randn(5, 6), wide) == sizes
    x, vs = (
        torch.randn(5, 6, dtype=torch.float64),
        [torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)],
    )
    seen(x, vs)
    vs[1].data = torch.randn(3, 6, dtype=torch.float64)
    assert seen(x.clone(), vs) == [(5, 5)]


def test_nothing_is_held_of_what_is_gone() -> None:
    vs = three()
    seen(torch.randn(5, 6), vs)
    seen(torch.randn(5, 6), vs)
    assert len(siblings._groups) == 1
    vs.clear()
    gc.collect()
    assert not siblings._groups
    assert siblings._seen.x() is None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x))


@pytest.mark.parametrize("method", ["sara", "mosara"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_each_alone(method: str, checkpointed: bool) -> None:
    torch.manual_seed(0)
    model = shake(sarac.transform(nn.Sequential(Attention(), Attention()), "rank:3", method=method)).double()
    sarac.schedule(model, "right")
    trained = [one for one in model.parameters() if one.requires_grad]
    for _ in range(3):  # learnt in the first, joint from then on
        x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        with Products() as mode:
            found = torch.autograd.grad(y.square().sum(), [x, *trained])
        assert not checkpointed or (4, 6) in mode.sizes
        sarac.schedule(model, "plain")
        expected = torch.autograd.grad(model(x).square().sum(), [x, *trained])
        sarac.schedule(model, "right")
        close(list(found), list(expected), torch.float64)
        differ(found[0], found[0] * 1.01)
