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
