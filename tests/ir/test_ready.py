"""What is remembered of a call holds for the very same tensors alone, unchanged."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from zoo import close, differ, shake

import sarac
from sarac.ir import calls, ready


def model(method: str = "sara", bias: bool = True) -> Any:
    torch.manual_seed(0)
    return shake(sarac.transform(nn.Linear(6, 5, bias=bias), "rank:3", method=method))


@pytest.fixture(autouse=True)
def empty() -> None:
    ready.forget()


def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a call is looked at; the list grows."""
    seen: list[int] = []
    real = calls.by_hand
    monkeypatch.setattr(calls, "by_hand", lambda *given: seen.append(1) or real(*given))
    return seen


def exact(layer: Any, x: Tensor) -> Tensor:
    """The output by autograd on the formula."""
    before = layer.sara_schedule
    layer.sara_schedule = "plain"
    try:
        return layer(x)
    finally:
        layer.sara_schedule = before


@pytest.mark.parametrize("method", ["sara", "mosara"])
def test_same_call_is_looked_at_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = model(method), looks(monkeypatch)
    for tokens in (4, 4, 7):
        x = torch.randn(tokens, 6)
        close(layer(x), exact(layer, x))
        assert len(seen) == 1
        with torch.no_grad():
            layer.sara_shift.add_(0.1)  # an optimiser's step


CHANGES: dict[str, Callable[[Any], Any]] = {
    "the base is written to": lambda layer: layer.weight_base.mul_(0.5),
    "a factor is written to": lambda layer: layer.sara_u.mul_(0.5),
    "the base is another one": lambda layer: layer._parameters.update(
        weight=nn.Parameter(torch.randn(5, 6), requires_grad=False)
    ),
    "a factor trains": lambda layer: layer.sara_v.requires_grad_(),
    "the bias is another one": lambda layer: layer._parameters.update(bias=nn.Parameter(torch.randn(5))),
    "the base trains": lambda layer: layer.weight_base.requires_grad_(),
    "the schedule is another one": lambda layer: sarac.schedule(layer, "two-sided"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_looked_at_again(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = model(), torch.randn(4, 6)
    layer(x)
    with torch.no_grad():
        CHANGES[change](layer)
    seen = looks(monkeypatch)
    found = layer(x)
    assert len(seen) == 1
    close(found, exact(layer, x))
    found.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_other_inputs_and_modes_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = model(), torch.randn(4, 6)
    expected = layer(x)
    seen = looks(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert len(seen) == 1
    with torch.no_grad():
        close(layer(x), expected)
    assert len(seen) == 2
    close(vmap(layer)(x[:, None])[:, 0], expected)
    assert len(seen) == 3
    close(layer(x), expected)
    assert len(seen) == 3
    wide = layer.double()
    close(wide(x.double()), expected.double())
    assert len(seen) == 4
    with pytest.raises(RuntimeError, match="dtype"):
        wide(x)


def test_what_is_gone_is_forgotten() -> None:
    layer = model()
    layer(torch.randn(4, 6))
    assert len(ready._known) == 1
    del layer
    gc.collect()
    assert not ready._known


def test_layers_do_not_answer_for_each_other() -> None:
    one, other, x = model(), model(bias=False), torch.randn(4, 6)
    for _ in range(2):
        close(one(x), exact(one, x))
        close(other(x), exact(other, x))
    differ(one(x), other(x))
