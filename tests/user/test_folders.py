"""Folders of save_pretrained: sarac.load and Trainer restore them, from_pretrained never takes them for a trained model."""

import copy
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from user.methods import METHODS, adapted, batch
from zoo import bert, differ, llama, outputs, same, shake

import sarac
from sarac.ir.record import FOLDER_MARK, weight_files

SIZES = {"one file": {}, "shards": {"max_shard_size": "8KB"}}


trained = functools.cache(lambda method="sara": adapted(method).eval())  # the tests here read it only


@functools.cache
def merged() -> Any:
    return sarac.fold(trained())


def plain_config(folder: Path) -> Any:
    """The folder's own config without sarac's mark, as somebody has it who built the model himself."""
    config = transformers.AutoConfig.from_pretrained(folder)
    vars(config).pop(FOLDER_MARK, None)
    return config


@pytest.fixture(params=SIZES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("all") / "folder"
    trained().save_pretrained(place, **SIZES[request.param])
    return place


WAYS: dict[str, Callable[[Path], Any]] = {
    "class": lambda f: transformers.LlamaForCausalLM.from_pretrained(f, config=plain_config(f)),
    "auto": lambda f: transformers.AutoModelForCausalLM.from_pretrained(f, config=plain_config(f)),
    "auto base": lambda f: transformers.AutoModel.from_pretrained(f, config=plain_config(f)),
    "base class": lambda f: transformers.LlamaModel.from_pretrained(f, config=plain_config(f), local_files_only=True),
    "other head": lambda f: transformers.LlamaForSequenceClassification.from_pretrained(f, config=plain_config(f)),
    "subfolder": lambda f: transformers.LlamaForCausalLM.from_pretrained(f.parent, subfolder=f.name, config=plain_config(f)),
    "dtype": lambda f: transformers.LlamaForCausalLM.from_pretrained(f, config=plain_config(f), dtype=torch.bfloat16),
    "device map": lambda f: transformers.LlamaForCausalLM.from_pretrained(f, config=plain_config(f), device_map="cpu"),
    "disk": lambda f: outputs(
        transformers.LlamaForCausalLM.from_pretrained(
            f, config=plain_config(f), device_map={"": "disk"}, offload_folder=f.parent / "offload"
        ),
        batch(),
    ),
    "state dict": lambda f: transformers.LlamaForCausalLM.from_pretrained(
        None, config=plain_config(f), state_dict={k: v for file in weight_files(f) for k, v in load_file(file).items()}
    ),
    "load_state_dict": lambda f: [llama().load_state_dict(load_file(file), strict=False) for file in weight_files(f)],
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_around_the_mark_opens_the_base(folder: Path, way: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|ize|shape"):
        WAYS[way](folder)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_ways_open_the_folded_model(tmp_path: Path, way: str) -> None:
    merged().save_pretrained(tmp_path / "all" / "folder")
    assert WAYS[way](tmp_path / "all" / "folder") is not None


def test_mark_says_what_to_do(folder: Path) -> None:
    for place in ({}, {"subfolder": folder.name}):
        with pytest.raises(ValueError, match=r"sarac\.load\(FOLDER\).*sarac\.fold"):
            transformers.AutoModel.from_pretrained(folder.parent if place else folder, **place)


def test_whoever_ignores_sizes_gets_no_base_either(folder: Path) -> None:
    found, info = transformers.LlamaForCausalLM.from_pretrained(
        folder, config=plain_config(folder), ignore_mismatched_sizes=True, output_loading_info=True
    )
    adapted = sarac.load(folder)
    name = "model.layers.0.mlp.up_proj"
    assert {f"{name}.weight"} < {entry[0] for entry in info["mismatched_keys"]}
    differ(found.get_submodule(name).weight, adapted.get_submodule(name).weight_base)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_sarac_load_restores_it(tmp_path: Path, method: str, size: str) -> None:
    model = trained(method)
    model.save_pretrained(tmp_path, **SIZES[size])
    assert (len(weight_files(tmp_path)) > 1) == (size == "shards")
    found = sarac.load(tmp_path)
    same(outputs(found, batch()), outputs(model, batch()))
    with sarac.disabled(model):
        differ(outputs(found, batch()).logits, outputs(model, batch()).logits)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_weights_lie_flat_in_the_file_alone(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    stored, own = load_file(tmp_path / "model.safetensors"), model.state_dict()
    flat = {name for name, tensor in stored.items() if tensor.shape != own[name].shape}
    assert flat == set(model._sarac_record.plan.sites)
    assert all(torch.equal(tensor, own[name].reshape(tensor.shape)) for name, tensor in stored.items())
    other = shake(copy.deepcopy(model))
    other.model.layers[0].mlp.up_proj.weight_base.data.mul_(2)
    assert not torch.equal(other.model.layers[0].mlp.up_proj.weight_base, own["model.layers.0.mlp.up_proj.weight"])
    other.load_state_dict(stored, strict=False)
    same(outputs(other, batch()), outputs(model, batch()))


def test_square_weight_of_one_number_still_is_refused(tmp_path: Path) -> None:
    """Its flat form has as many numbers, and still another shape."""
    config = transformers.BertConfig(vocab_size=4, hidden_size=1, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1)
    sarac.transform(transformers.BertModel(config)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        transformers.BertModel.from_pretrained(tmp_path, config=config)
    assert sarac.load(tmp_path) is not None


@pytest.mark.parametrize("first", SIZES)
@pytest.mark.parametrize("then", SIZES)
@pytest.mark.parametrize("build", [trained, merged])
def test_save_over_another_save_leaves_nothing_of_it(tmp_path: Path, first: str, then: str, build: Callable[[], Any]) -> None:
    model = trained("factors")
    build().save_pretrained(tmp_path, **SIZES[first])
    model.save_pretrained(tmp_path, **SIZES[then])
    same(outputs(sarac.load(tmp_path), batch()), outputs(model, batch()))


def test_process_that_does_not_write_leaves_the_folder_alone(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "a")
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    trained("factors").save_pretrained(tmp_path / "a", is_main_process=False)
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before
    trained("factors").save_pretrained(tmp_path / "a", True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} != before


def test_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sarac.RewriteError, match="no variant: save into another folder"):
        trained().save_pretrained(tmp_path, variant="fp16")


@pytest.mark.parametrize("push", ["save_pretrained", "push_to_hub"])
def test_what_is_uploaded_is_marked(tmp_path: Path, push: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()

    class Hub:
        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Repository", (), {"repo_id": name})

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub)
    for place in ("transformers.utils.hub", "transformers.modeling_utils"):
        card = type("Card", (), {"save": lambda self, path: None})
        monkeypatch.setattr(f"{place}.create_and_tag_model_card", lambda *_, card=card, **__: card())
    seen = []

    def upload(self: Any, working_dir: Any, repo_id: str, *_: Any, **options: Any) -> None:
        shutil.copytree(working_dir, tmp_path / "hub")
        seen.append((repo_id, options.get("commit_message")))

    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    if push == "push_to_hub":
        model.push_to_hub("somebody/folder", commit_message="trained")
    else:
        model.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="somebody/folder", commit_message="trained")
        same(outputs(sarac.load(tmp_path / "folder"), batch()), outputs(model, batch()))
    assert seen == [("somebody/folder", "trained")]
    same(outputs(sarac.load(tmp_path / "hub"), batch()), outputs(model, batch()))
    with pytest.raises(RuntimeError, match="mismatched"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hub", config=plain_config(tmp_path / "hub"))


def test_folded_folder_is_like_any_other(tmp_path: Path) -> None:
    base = bert()
    model = shake(sarac.transform(base))
    plain = sarac.fold(model)
    plain.save_pretrained(tmp_path / "merged")
    found = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    same(outputs(found, batch()), outputs(plain, batch()))
    differ(outputs(found, batch())[0], outputs(base, batch())[0])
    base.save_pretrained(tmp_path / "base")
    assert {f.name for f in (tmp_path / "merged").iterdir()} == {f.name for f in (tmp_path / "base").iterdir()}
