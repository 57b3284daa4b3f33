"""Fold: plain weights, original classes, names and flags; untouched tensors stay shared; what rounding lost is told."""

import pytest
import torch
from torch import nn
from zoo import adapt, close, differ, folded, gpt2, ids, mlp, outputs, require_untouched, same, shake, snapshot, trainables

from sarac.ir.errors import CheckFailed, NotFoldable, RewriteError
from sarac.ir.graph import Folded, ModelGraph
from sarac.ir.pipeline import run
from sarac.passes.fold import Fold
from sarac.trace import trace


def fold(model: nn.Module, **options: object) -> ModelGraph:
    return run(trace(model), Fold(**options))


def test_classes_names_and_flags_come_back() -> None:
    model = mlp(6, 5, 4)
    model[2].weight.requires_grad_(False)
    merged = fold(shake(adapt(model))).module
    assert [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
    assert list(merged.state_dict()) == list(model.state_dict())
    assert trainables(merged) == trainables(model) == {"0.weight", "0.bias", "2.bias"}
    assert str(merged) == str(model)
    assert [sorted(vars(m)) for m in merged.modules()] == [sorted(vars(m)) for m in model.modules()]
    merged.load_state_dict(model.state_dict())
    same(merged(torch.ones(2, 6)), model(torch.ones(2, 6)))


def test_untouched_tensors_stay_shared_and_others_do_not() -> None:
    model = mlp(6, 5, 4)
    merged = fold(shake(adapt(model, where="0.weight"))).module
    shared = {name for name, p in merged.named_parameters() if p.data_ptr() == model.get_parameter(name).data_ptr()}
    assert shared == {"0.bias", "2.weight", "2.bias"}


def test_adapted_model_goes_on_as_it_was() -> None:
    model, x = shake(adapt(mlp(6, 5, 4))), torch.randn(3, 6)
    before, expected = snapshot(model), outputs(model, x)
    merged = fold(model).module
    require_untouched(model, before)
    merged[0].weight.data.zero_()
    same(outputs(model, x), expected)


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_merged_weight_is_the_sum_rounded_once(name: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        model = shake(adapt(mlp(6, 5, 4).to(dtype)))
        layer = model[int(name[0])]
        u, v, values = layer.sara_u.double(), layer.sara_v.double(), (layer.sara_shift * layer.sara_scale).double()
        exact = layer.weight_base.double() + u @ torch.diag(values) @ v
        merged = fold(model, precision=torch.float64).module.get_parameter(name)
        assert merged.dtype == dtype
        close(merged.double(), exact, torch.float64 if dtype == torch.float64 else dtype)
        if dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(merged, exact.to(dtype))


def test_fold_of_nothing_learned_is_the_base() -> None:
    model = mlp(6, 5, 4)
    graph = fold(adapt(model))
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in graph.module.named_parameters())
    assert graph.folded == {"0.weight": Folded(0.0, 0.0), "2.weight": Folded(0.0, 0.0)}


def test_lost_delta_is_reported() -> None:
    lost = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = adapt(nn.Linear(64, 64).to(dtype), "rank:64")
        model.sara_shift.data.fill_(1e-3)
        facts = fold(model).folded["weight"]
        assert abs(facts.relative_delta - 1e-3) < 1e-4
        base, delta = model.weight_base.double(), model.weight_base.double() * 1e-3
        by_hand = ((base + delta).to(dtype).double() - base - delta).norm() / delta.norm()
        assert abs(facts.surviving_delta - float(by_hand)) < 0.1 * float(by_hand) + 1e-3
        lost[dtype] = facts.surviving_delta
    assert lost[torch.float32] < 1e-3
    assert 0.5 < lost[torch.bfloat16] < 1.5


def test_plain_model_cannot_be_folded() -> None:
    for model in (mlp(6, 5), folded(adapt(mlp(6, 5)))):
        with pytest.raises(RewriteError, match=r"Sequential carries no adapters: there is nothing to fold\. Transform it first"):
            fold(model)


def test_routed_model_names_the_sites_and_both_ways_out() -> None:
    model = adapt(mlp(6, 5, 5, 5, 4), method="mosara")
    with pytest.raises(NotFoldable, match=r"routed here: 0\.weight, 2\.weight, 4\.weight and 1 more") as refused:
        fold(model)
    assert "merge=False" in str(refused.value)
    assert 'routing="mean"' in str(refused.value)
    for plan in ("rank:2,router=uniform", "rank:2,sets=1"):
        fold(adapt(mlp(6, 5), plan, method="mosara"))


def test_fixed_gates_fold_a_routed_site() -> None:
    model, x = shake(adapt(mlp(6, 5), "rank:3,sets=2", method="mosara")), torch.randn(9, 6)
    gates = torch.tensor([0.25, 0.75])
    merged = run(trace(model), Fold(gates={"0.weight": gates}), check=False).module
    layer = model[0]
    values = (gates @ layer.sara_shift) * layer.sara_scale
    close(merged[0].weight, layer.weight_base + layer.sara_u @ torch.diag(values) @ layer.sara_v)
    differ(merged(x), model(x))
    with pytest.raises(RewriteError, match=r"gates for '0\.wait', which is no adapted site\. Near names: 0\.weight"):
        run(trace(model), Fold(gates={"0.wait": gates}), check=False)


def test_check_holds_the_fold_to_the_adapted_model() -> None:
    model = shake(adapt(mlp(6, 5), "rank:3,sets=2", method="mosara"))
    with pytest.raises(CheckFailed, match="before and after Fold differ"):
        run(trace(model), Fold(gates={"0.weight": torch.tensor([5.0, -5.0])}))


def test_buffers_and_modes_survive() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).train()
    model_adapted = shake(adapt(model))
    model_adapted(torch.randn(8, 6))
    merged = fold(model_adapted).module
    assert torch.equal(merged[1].running_mean, model_adapted[1].running_mean)
    assert merged[1].running_mean.data_ptr() != model_adapted[1].running_mean.data_ptr()
    assert merged.training
    assert not torch.equal(merged[1].running_mean, model[1].running_mean)


def test_parameter_trained_whole_stays_as_trained() -> None:
    model = mlp(6, 5, 4)
    model_adapted = shake(adapt(model, also_train="*.bias"))
    merged = fold(model_adapted).module
    assert torch.equal(merged[0].bias, model_adapted[0].bias)
    assert not torch.equal(merged[0].bias, model[0].bias)
    merged[0].bias.data.zero_()
    assert (model_adapted[0].bias != 0).any()


def test_transposed_weights_of_gpt2_come_back_as_they_lay() -> None:
    model, tokens = gpt2(), ids()
    model_adapted = shake(adapt(model))
    merged = fold(model_adapted).module
    for name, p in merged.named_parameters():
        assert (p.shape, p.stride(), p.is_contiguous()) == (
            model.get_parameter(name).shape,
            model.get_parameter(name).stride(),
            True,
        )
    close(outputs(merged, tokens).logits, outputs(model_adapted, tokens).logits)
    differ(outputs(model, tokens).logits, outputs(model_adapted, tokens).logits)
    assert merged.generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, 7)
