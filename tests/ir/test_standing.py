"""Other weights than a model holds, made for each call: the same numbers as a copy of the model that holds them."""

import copy

import pytest
import torch
from torch import nn
from zoo import adapt, bert, close, differ, gpt2, llama, mlp, outputs, same, shake

from sarac.ir import check
from sarac.ir.standing import Standing, widened

IDS = torch.arange(12).reshape(2, 6)
MODELS = {"mlp": (lambda: mlp(6, 9, 5), torch.randn(3, 6)), "llama": (llama, IDS), "gpt2": (gpt2, IDS), "bert": (bert, IDS)}


@pytest.mark.parametrize("name", MODELS)
def test_a_widened_model_computes_as_its_wide_copy(name: str) -> None:
    make, given = MODELS[name]
    model = shake(adapt(make())).eval()
    before = {key: (id(value), value.dtype) for key, value in model.state_dict(keep_vars=True).items()}
    wide = outputs(copy.deepcopy(model).double(), given.double() if given.is_floating_point() else given)
    with widened(model, torch.float64):
        found = outputs(model, given.double() if given.is_floating_point() else given)
    narrow = outputs(model, given)
    error, usual = (check.difference(one, wide).error for one in (found, narrow))
    assert error < usual, "a norm computes in float32 in any dtype, and bounds how near"
    assert {tensor.dtype for _, tensor in check.leaves(found) if tensor.is_floating_point()} == {torch.float64}
    assert {key: (id(value), value.dtype) for key, value in model.state_dict(keep_vars=True).items()} == before


@pytest.mark.parametrize("name", MODELS)
def test_weights_stand_for_others(name: str) -> None:
    make, given = MODELS[name]
    model = make().eval()
    other = copy.deepcopy(model)
    made, asked = {}, []
    for (key, own), its in zip(model.named_parameters(), other.parameters(), strict=True):
        if own.dim() == 2:
            its.data += 0.1 * torch.randn_like(its)
            made[id(own)] = lambda key=key, its=its: (asked.append(key), its.detach())[1]
    plain = outputs(model, given)
    with Standing(made):
        found = outputs(model, given)
        count = len(asked)
        assert next(iter(model.parameters())).shape == next(iter(other.parameters())).shape
        assert len(asked) == count, "a shape is no value"
    same(found, outputs(other, given))
    differ(found, plain)
    close(outputs(model, given), plain)


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(2, 3, dtype=torch.float32)
        total += x
        torch.add(total, x, out=total)
        return total.mul_(2)


def test_what_is_written_in_place_is_written() -> None:
    x = torch.randn(2, 3)
    with widened(InPlace(), torch.float64):
        same(InPlace()(x.double()), 4 * x)
