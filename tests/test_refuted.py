"""Cases that a review refuted once: each is a sentence of the promises, held to for good."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import adapt, close, folded, llama, mlp, shake

import sarac


class Chained(nn.Module):
    """One linear node feeds the next directly, on two weights or on one."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        self.once = once

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ (self.a if self.once else self.b)


@pytest.mark.parametrize("once", [True, False])
def test_linear_node_that_feeds_the_next_is_read_adapted(once: bool) -> None:
    model, x = Chained(once), torch.randn(3, 6)
    adapted = shake(adapt(model, "rank:4"))
    second = adapted.a if once else adapted.b
    close(adapted(x), x @ (adapted.a + 0) @ (second + 0))
    close(folded(adapted)(x), adapted(x))
    assert not torch.allclose(adapted(x), model(x))


def test_wrapper_or_part_is_never_saved_without_its_adapters(tmp_path) -> None:
    adapted = shake(sarac.transform(llama()))
    for other, place in ((nn.Sequential(adapted), r"`\.0`"), (adapted.model, "whole model")):
        for act in (
            lambda m: sarac.save(m, tmp_path / "m.pt"),
            lambda m: sarac.save_adapter(m, tmp_path / "a.safetensors"),
            lambda m: sarac.export(m, tmp_path / "m.onnx", torch.ones(2, 4, dtype=torch.int64)),
        ):
            with pytest.raises(sarac.RewriteError, match=place):
                act(other)
    assert list(tmp_path.iterdir()) == []
    sarac.save(adapted, tmp_path / "m.pt")


def test_folder_of_a_part_opens_with_load(tmp_path) -> None:
    adapted, ids = shake(sarac.transform(llama())), torch.ones(2, 4, dtype=torch.int64)
    adapted.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"sarac\.load"):
        transformers.LlamaModel.from_pretrained(tmp_path)
    again = sarac.load(tmp_path)
    assert torch.equal(again(ids)[0], adapted.model(ids)[0])
    with sarac.disabled(adapted):
        assert not torch.equal(again(ids)[0], adapted.model(ids)[0])


def test_options_that_would_do_nothing_are_refused(tmp_path) -> None:
    model = shake(sarac.transform(mlp(6, 5)))
    with pytest.raises(sarac.ExportError, match="opset 9 is not possible"):
        sarac.export(model, tmp_path / "m.onnx", torch.ones(2, 6), opset=9)
    with pytest.raises(sarac.PlanError, match="names its methods itself"):
        sarac.transform(mlp(6, 5), sarac.Plan({"0.weight": sarac.Sara(2)}), method="mosara")
    with pytest.raises(sarac.InputError, match='go with routing="mean"'):
        sarac.fold(model, calibration=[torch.ones(2, 6)])
    with pytest.raises(sarac.PlanError, match="'min' stands twice"):
        sarac.transform(mlp(6, 5), "rank:4,min=2,min=3")


def test_adapted_weight_cannot_be_taken_away() -> None:
    model = sarac.transform(mlp(6, 5))
    with pytest.raises(sarac.WeightError, match=r"0\.weight is adapted and cannot be taken off"):
        del model[0].weight
    del model[0].bias
    assert not hasattr(model[0], "bias")


VECTORS = {
    "@": lambda x, w: w @ x,
    "mv": lambda x, w: torch.mv(w, x),
    "addmv": lambda x, w: torch.addmv(torch.ones(5), w, x),
    "right": lambda x, w: x @ w.T,
    "linear": lambda x, w: torch.nn.functional.linear(x, w),
}


class Vector(nn.Module):
    """A matrix that meets one vector."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w, self.how = nn.Parameter(torch.randn(5, 6)), how

    def forward(self, x: Tensor) -> Tensor:
        return VECTORS[self.how](x, self.w)


@pytest.mark.parametrize("how", VECTORS)
def test_one_vector_is_an_input_too(how: str) -> None:
    base, x = Vector(how), torch.randn(6)
    model = shake(sarac.transform(base, example_inputs=x))
    close(folded(model)(x), model(x))
    assert not torch.allclose(model(x), base(x))
    close(model(x) - base(x), (model.w - base.w) @ x)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return transformers.ViTModel(config).eval()


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("where", [None, "*experts*", "*attention*", "*attn*"])
@pytest.mark.parametrize("build", [vit, mixtral])
def test_folder_of_a_model_that_is_saved_under_other_names(build, where, tmp_path) -> None:
    """transformers writes these models in the names of an older format, which neither the marks nor sarac.load knew."""
    base = build()
    names = list(sarac.trace(base).sites)
    if where and not any(where.strip("*") in name for name in names):
        pytest.skip("it has no such weight")
    model = shake(sarac.transform(base, where=where))
    x = torch.randn(2, 3, 8, 8) if build is vit else torch.ones(2, 4, dtype=torch.int64)
    model.save_pretrained(tmp_path / "adapted")
    again = sarac.load(tmp_path / "adapted")
    assert torch.equal(again(x)[0], model(x)[0])
    assert not torch.equal(again(x)[0], base(x)[0])
    for choice in ({}, {"config": base.config}):
        with pytest.raises((ValueError, RuntimeError)):
            type(base).from_pretrained(tmp_path / "adapted", **choice)
    merged = folded(model)
    merged.save_pretrained(tmp_path / "merged")
    close(type(base).from_pretrained(tmp_path / "merged").eval()(x)[0], model(x)[0])


def test_folding_where_the_adapters_are_switched_off_is_told(tmp_path) -> None:
    model = shake(sarac.transform(mlp(6, 5)))
    with sarac.disabled(model):
        for act in (lambda: sarac.fold(model), lambda: sarac.export(model, tmp_path / "m.onnx", torch.ones(2, 6))):
            with pytest.raises(sarac.RewriteError, match=r"switched off here \(sarac\.disabled\)"):
                act()
    sarac.fold(model)
