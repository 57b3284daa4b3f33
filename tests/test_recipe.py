"""What a file remembers of where its model came from, and what opening it may do."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from zoo import ids, llama, mlp, outputs, same, shake

import sarac
from sarac import CheckpointError
from sarac.recipe import from_factory, from_timm, open_model, rebuild, recipe_of


def vision(width: int = 6, pretrained: bool = False) -> nn.Module:
    model = mlp(width, 8, 3)
    if pretrained:
        model[0].weight.data.fill_(1.0)
    return model.eval()


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for timm, and the calls that it gets."""
    calls: list[dict[str, Any]] = []

    def create_model(model_name: str, **arguments: Any) -> nn.Module:
        calls.append({"model_name": model_name, **arguments})
        if model_name != "vit_tiny":
            raise RuntimeError(f"Unknown model ({model_name})")
        return vision(**arguments)

    module = ModuleType("timm")
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return calls


def test_timm_model_is_rebuilt_without_a_download(timm: list[dict[str, Any]], tmp_path: Path) -> None:
    base = open_model("timm:vit_tiny", {"width": 5, "pretrained": True})
    assert recipe_of(base) == {"kind": "timm", "name": "vit_tiny", "arguments": {"width": 5, "pretrained": False}}
    model = shake(sarac.transform(base)).eval()
    sarac.save(model, tmp_path / "model.pt")
    found, x = sarac.load(tmp_path / "model.pt"), torch.randn(2, 5)
    assert [call["pretrained"] for call in timm] == [True, False]
    same(outputs(found, x), outputs(model, x))
    assert not torch.equal(found[0].weight_base, rebuild(recipe_of(base))[0].weight)


def test_timm_that_does_not_serve_is_told(timm: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, arguments in [("vit_huge", {}), ("vit_tiny", {"depth": 3})]:
        with pytest.raises(CheckpointError, match=f"timm:{name} cannot be built"):
            from_timm(name, arguments)
    monkeypatch.setitem(sys.modules, "timm", None)  # as where it is not installed
    with pytest.raises(CheckpointError, match=r"timm:vit_tiny needs timm.*Install timm"):
        from_timm("vit_tiny", {})


def test_factory_gets_its_arguments_again(tmp_path: Path) -> None:
    base = open_model("zoo:TiedHead", {"width": 6})
    assert recipe_of(base) == {"kind": "factory", "target": "zoo:TiedHead", "arguments": {"width": 6}}
    sarac.save(base, tmp_path / "model.pt")
    found = sarac.load(tmp_path / "model.pt", model="zoo:TiedHead")
    batch = ids()
    same(outputs(found, batch), outputs(base, batch))
    assert found.inner.weight.shape == (6, 6)


@pytest.mark.parametrize(
    ("target", "arguments", "said"),
    [
        ("nowhere.at_all:build", {}, r"nowhere\.at_all"),
        ("zoo:nothing", {}, "nothing"),
        ("zoo:", {}, "package.module:function"),
        (":llama", {}, "package.module:function"),
        ("zoo:llama", {"width": 5}, "cannot be built.*width"),
        ("zoo:ids", {}, "gives a Tensor"),
        ("zoo:VOCABULARY", {}, "zoo:VOCABULARY"),
        ("torch.nn:Linear", {"in_features": -1, "out_features": 2}, "cannot be built"),
    ],
)
def test_factory_that_does_not_serve_is_told(target: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_model(target, arguments)


@pytest.mark.parametrize("name", ["no/such/folder", "nonsense", ""])
def test_name_that_opens_nothing_is_told(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither as a transformers folder.*model\.pt"):
        open_model(name)


def test_folder_opens_as_the_class_that_wrote_it(tmp_path: Path) -> None:
    model, batch = llama(), ids()
    model.save_pretrained(tmp_path)
    found = open_model(str(tmp_path))
    assert type(found) is transformers.LlamaForCausalLM
    same(outputs(found, batch), outputs(model, batch))
    assert next(open_model(str(tmp_path), {"dtype": torch.bfloat16}).parameters()).dtype == torch.bfloat16


class Own(transformers.LlamaForCausalLM):
    """One that transformers does not have."""


class LlamaModel(transformers.LlamaForCausalLM):
    """One that transformers has another of."""


@pytest.mark.parametrize("kind", [Own, LlamaModel])
def test_class_of_ones_own_is_no_transformers_recipe(kind: Any) -> None:
    config = llama().config
    assert recipe_of(kind(config))["kind"] == "memory"
    assert recipe_of(kind(config))["class"].endswith(f"test_recipe.{kind.__name__}")
    assert recipe_of(transformers.LlamaForCausalLM(config))["kind"] == "transformers"


@pytest.mark.parametrize("name", ["Trainer", "AutoModel", "PreTrainedModel", "LlamaConfig", "pipeline", "no_such", "__name__"])
def test_file_cannot_name_what_is_no_model(name: str) -> None:
    with pytest.raises(CheckpointError, match="no model class"):
        rebuild({"kind": "transformers", "class": name, "config": {}})


def test_kind_of_recipe_that_is_unknown_is_told() -> None:
    with pytest.raises(CheckpointError, match="no recipe"):
        rebuild({"kind": "spell"})


def test_recipe_is_no_attribute_of_the_state() -> None:
    model = from_factory("zoo:TiedHead", {"width": 6})
    assert list(model.state_dict()) == ["embed.weight", "inner.weight", "inner.bias", "head.weight"]
    assert recipe_of(sarac.transform(model)) == recipe_of(model)
    assert recipe_of(nn.Linear(2, 2)) == {"kind": "memory", "class": "torch.nn.modules.linear.Linear"}
    assert recipe_of(sarac.transform(nn.Linear(4, 4))) == recipe_of(nn.Linear(4, 4))
