"""PEFT folders: stock PEFT loads what is written with equal outputs, and what PEFT wrote is read back whole."""

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo import Shared, TiedHead, bert, close, differ, gpt2, ids, llama, mlp, outputs, shake, t5

import sarac
from sarac.backends.peft import lost
from sarac.ir import check
from sarac.ir.layers import adapted as adapted_modules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def trained(model: nn.Module, plan: str = "threshold:0.6", method: str = "sara", **choice: Any) -> nn.Module:
    return shake(sarac.transform(model, plan, method=method, **choice))


def stock(model: nn.Module, folder: Path) -> nn.Module:
    """What stock PEFT makes of a folder, on a copy of `model`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out, which it mends by itself
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def theirs(model: nn.Module, **chosen: Any) -> nn.Module:
    """PEFT's own adapted form of a copy of `model`, away from where it starts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{"init_lora_weights": False, **chosen})).eval()


def config(folder: Path, **change: Any) -> dict[str, Any]:
    """The folder's config, changed on disk first."""
    found = {**json.loads((folder / CONFIG).read_text()), **change}
    (folder / CONFIG).write_text(json.dumps(found))
    return found


def same_model(folder: Path, model: nn.Module, adapted: nn.Module, *args: Any, dtype: torch.dtype = torch.float32) -> None:
    """Stock PEFT's outputs are the adapted model's, and not the base's."""
    base, expected = outputs(model, *args), outputs(adapted, *args)
    found = outputs(stock(model, folder), *args)
    values = [next(tensor for _, tensor in check.leaves(each)) for each in (found, expected, base)]
    close(*values[:2], dtype)
    assert check.difference(values[0], values[2]).error > 2 * check.gate(dtype)


# Written.


class Mixed(nn.Module):
    """A Conv1D between two Linears, one named like the end of another that is not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 8), "more": nn.ModuleDict({"block": nn.ModuleDict({"fc": mlp(8, 8)})})})
        self.conv = Conv1D(8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block["more"]["block"]["fc"](torch.tanh(self.block["fc"](x)))
        return self.last(torch.tanh(self.conv(h)))


@pytest.mark.parametrize("layout", ["padded", "pattern"])
@pytest.mark.parametrize("build", [llama, gpt2, bert])
@pytest.mark.parametrize(
    ("plan", "method"),
    [
        ("threshold:0.6", "sara"),
        ("threshold:0.3,train=factors,init=random", "sara"),
        ("threshold:0.4,router=uniform", "mosara"),
        ("rank:2,sets=1", "mosara"),
    ],
)
def test_stock_peft_loads_it_with_equal_outputs(build: Any, plan: str, method: str, layout: str, tmp_path: Path) -> None:
    model = build()
    adapted = trained(model, plan, method)
    report = sarac.backends.peft.save(adapted, tmp_path / "lora", layout=layout)
    assert set(report.errors.values()) == {0.0}
    same_model(tmp_path / "lora", model, adapted, ids())


def test_the_layouts_say_the_scale_in_their_own_ways(tmp_path: Path) -> None:
    adapted = trained(llama())
    padded = sarac.backends.peft.save(adapted, tmp_path / "a")
    pattern = sarac.backends.peft.save(adapted, tmp_path / "b", layout="pattern")
    one, two = config(tmp_path / "a"), config(tmp_path / "b")
    assert padded == pattern
    assert one["r"] == one["lora_alpha"] == two["r"] == two["lora_alpha"] == padded.rank
    assert one["rank_pattern"] == one["alpha_pattern"] == {}
    assert two["rank_pattern"] == two["alpha_pattern"] != {}
    assert all(re.fullmatch(r"\^.*\$", key) for key in two["rank_pattern"])
    ranks = [{t.shape[0] for n, t in load_file(tmp_path / x / WEIGHTS).items() if "lora_A" in n} for x in "ab"]
    assert ranks[0] == {padded.rank}
    assert ranks[1] == {*two["rank_pattern"].values(), padded.rank}


def test_a_pattern_that_is_not_anchored_would_hit_another_module(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.inner = nn.Linear(6, 6), nn.ModuleDict({"fc": nn.Linear(6, 6), "up": nn.Linear(6, 6)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["up"](torch.tanh(self.inner["fc"](torch.tanh(self.fc(x)))))

    model, x = Nested(), torch.randn(3, 6)
    plan = sarac.Plan({"fc.weight": sarac.Sara(2), "inner.fc.weight": sarac.Sara(3), "inner.up.weight": sarac.Sara(4)})
    adapted = shake(sarac.transform(model, plan))
    sarac.backends.peft.save(adapted, tmp_path, layout="pattern")
    same_model(tmp_path, model, adapted, x)
    loose = {key.strip("^$"): rank for key, rank in config(tmp_path)["rank_pattern"].items()}
    config(tmp_path, rank_pattern=loose, alpha_pattern=loose)
    with pytest.raises(RuntimeError, match="size mismatch"):
        stock(model, tmp_path)


@pytest.mark.parametrize("layout", ["padded", "pattern"])
def test_linear_and_conv1d_in_one_model_and_names_that_end_alike(layout: str, tmp_path: Path) -> None:
    model, x = Mixed(), torch.randn(3, 6)
    adapted = trained(model, where=["block.fc.weight", "conv.weight", "last.weight"])
    sarac.backends.peft.save(adapted, tmp_path, layout=layout)
    same_model(tmp_path, model, adapted, x)
    assert config(tmp_path)["target_modules"] == r"block\.fc|conv|last"
    config(tmp_path, target_modules=["block.fc", "conv", "last"])  # PEFT takes block.fc for the end of a name too
    with pytest.raises(ValueError, match="not supported"):
        stock(model, tmp_path)


class Pooled(nn.Module):
    """A convolution with a linear layer behind it."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.last = conv, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.conv(x)).flatten(2).mean(2))


class Words(nn.Module):
    """An embedding with a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(32, 8, padding_idx=3), nn.Linear(8, 4)

    def forward(self, token: Tensor) -> Tensor:
        return self.last(torch.tanh(self.embed(token)))


KINDS: dict[str, Any] = {
    "conv1d": lambda: (Pooled(nn.Conv1d(3, 6, 3)), torch.randn(2, 3, 8)),
    "conv2d": lambda: (Pooled(nn.Conv2d(3, 6, (3, 2), padding=1, stride=2)), torch.randn(2, 3, 8, 8)),
    "same": lambda: (Pooled(nn.Conv2d(3, 6, 3, padding="same")), torch.randn(2, 3, 8, 8)),
    "1x1": lambda: (Pooled(nn.Conv2d(3, 6, 1)), torch.randn(2, 3, 8, 8)),
    "conv3d": lambda: (Pooled(nn.Conv3d(3, 6, (3, 2, 1))), torch.randn(2, 3, 8, 5, 4)),
    "embedding": lambda: (Words(), ids()),
    "tied": lambda: (TiedHead(8), ids()),
}


def sites(model: nn.Module) -> list[str]:
    return list(sarac.trace(model).sites)


@pytest.mark.parametrize("layout", ["padded", "pattern"])
@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_and_embeddings_go_both_ways(kind: str, layout: str, tmp_path: Path) -> None:
    model, x = KINDS[kind]()
    plan = sarac.Plan({name: sarac.Sara(3 if "last" in name else 2) for name in sites(model)})
    adapted = shake(sarac.transform(model, plan))
    sarac.backends.peft.save(adapted, tmp_path, layout=layout)
    same_model(tmp_path, model, adapted, x)
    again = sarac.backends.peft.load(model, tmp_path)
    close(outputs(again, x), outputs(adapted, x))
    cut = sarac.backends.peft.save(adapted, tmp_path, layout=layout, max_rank=1)
    assert lost(adapted, tmp_path) == pytest.approx(cut.errors, abs=1e-5)
    assert min(cut.errors.values()) > 0.01


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tied"])
def test_convolutions_and_embeddings_that_peft_wrote_are_read(kind: str, tmp_path: Path) -> None:
    model, x = KINDS[kind]()
    made = theirs(
        model, r=2, lora_alpha=5, use_rslora=True, target_modules=[name.removesuffix(".weight") for name in sites(model)]
    )
    made.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = sarac.backends.peft.load(model, tmp_path)
    close(outputs(ours, x), outputs(made, x))
    differ(outputs(ours, x), outputs(model, x))


def test_a_lora_beside_a_convolution_that_reflects_is_none_of_its_weight(tmp_path: Path) -> None:
    model = Pooled(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"))
    theirs(model, r=2, target_modules=["conv"]).save_pretrained(tmp_path)
    with pytest.raises(sarac.CheckpointError, match="conv, which convolves with padding_mode=reflect"):
        sarac.backends.peft.load(model, tmp_path)


def test_a_head_that_peft_tied_to_its_embedding_is_read(tmp_path: Path) -> None:
    model, token = llama(), ids()
    chosen = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    made = theirs(model, r=2, lora_alpha=7, **chosen)
    made.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = sarac.backends.peft.load(model, tmp_path)
    close(outputs(ours, token).logits, outputs(made, token).logits)
    differ(outputs(ours, token).logits, outputs(model, token).logits)


@pytest.mark.parametrize("layout", ["padded", "pattern"])
def test_a_weight_of_two_modules_goes_to_both_and_back(layout: str, tmp_path: Path) -> None:
    model, x = Shared(6), torch.randn(3, 6)
    adapted = trained(model)
    report = sarac.backends.peft.save(adapted, tmp_path, layout=layout)
    assert list(report.errors) == ["first.weight"]
    same_model(tmp_path, model, adapted, x)
    close(outputs(sarac.backends.peft.load(model, tmp_path), x), outputs(adapted, x))
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if "second" not in name}, tmp_path / WEIGHTS)
    with pytest.raises(sarac.CheckpointError, match=r"adapts first alone, whose weight is also second\.weight"):
        sarac.backends.peft.load(model, tmp_path)


def test_half_precision_models_keep_float32_factors(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    adapted = trained(model)
    sarac.backends.peft.save(adapted, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    same_model(tmp_path, model, adapted, ids(), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("build", "auto", "task"),
    [
        (llama, peft.AutoPeftModelForCausalLM, "CAUSAL_LM"),
        (gpt2, peft.AutoPeftModelForCausalLM, "CAUSAL_LM"),
        (t5, peft.AutoPeftModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
        (bert, peft.AutoPeftModelForFeatureExtraction, "FEATURE_EXTRACTION"),
    ],
)
def test_peft_finds_the_base_and_the_task_by_itself(build: Any, auto: Any, task: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    opener = {t5: transformers.AutoModelForSeq2SeqLM, bert: transformers.AutoModel}.get(build, transformers.AutoModelForCausalLM)
    adapted = trained(opener.from_pretrained(tmp_path / "base"))
    sarac.backends.peft.save(adapted, tmp_path / "lora")
    assert config(tmp_path / "lora")["task_type"] == task
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = auto.from_pretrained(tmp_path / "lora").eval()
    token = ids()
    inputs = {"input_ids": token, **({"decoder_input_ids": token} if build is t5 else {})}
    first = [outputs(each, **inputs)[0] for each in (found, adapted, opener.from_pretrained(tmp_path / "base"))]
    close(first[0], first[1])
    differ(first[0], first[2])


def test_a_classifier_gets_no_task_since_peft_would_ask_for_its_head(tmp_path: Path) -> None:
    model = transformers.LlamaForSequenceClassification(llama().config).eval()
    model.config.pad_token_id = 0
    adapted = trained(model)
    sarac.backends.peft.save(adapted, tmp_path)
    assert config(tmp_path)["task_type"] is None
    same_model(tmp_path, model, adapted, ids())
    config(tmp_path, task_type="SEQ_CLS")
    with pytest.raises(KeyError):
        stock(model, tmp_path)


@pytest.mark.parametrize("layout", ["padded", "pattern"])
def test_many_modules_and_transformers_own_loader(layout: str, tmp_path: Path) -> None:
    """From 20 modules on PEFT shortens the list of names, and transformers loads a folder without a PeftModel around."""
    deep = llama().config
    deep.num_hidden_layers = 4
    model, token = transformers.LlamaForCausalLM(deep).eval(), ids()
    adapted = trained(model, where=lambda site: site.default and ".2.self_attn" not in site.name)
    sarac.backends.peft.save(adapted, tmp_path, layout=layout)
    assert len(config(tmp_path)["target_modules"]) > 20
    same_model(tmp_path, model, adapted, token)
    own = copy.deepcopy(model)
    own.load_adapter(tmp_path)
    close(outputs(own, token).logits, outputs(adapted, token).logits)
    own.save_pretrained(tmp_path / "again")
    close(outputs(sarac.backends.peft.load(model, tmp_path / "again"), token).logits, outputs(adapted, token).logits)
    differ(outputs(adapted, token).logits, outputs(model, token).logits)


# Truncated.


@pytest.mark.parametrize("layout", ["padded", "pattern"])
def test_max_rank_keeps_the_best_approximation_and_says_what_it_lost(layout: str, tmp_path: Path) -> None:
    model = mlp(12, 16, 10, 3)
    adapted = trained(model, "threshold:0.9")
    before = {
        path: (layer.weight - layer.weight_base).detach().double() for path, layer in adapted.named_children() if path in "024"
    }
    report = sarac.backends.peft.save(adapted, tmp_path, layout=layout, max_rank=3)
    assert report.rank == 3
    stock_model, x = stock(model, tmp_path), torch.randn(4, 12)
    for path, delta in before.items():
        layer = stock_model.get_submodule(f"base_model.model.{path}")
        values = torch.linalg.svdvals(delta)
        left = float((delta - layer.get_delta_weight("default").double()).norm())
        assert left == pytest.approx(float(values[3:].norm()), abs=1e-5)  # Eckart and Young: none is nearer
        assert report.errors[f"{path}.weight"] == pytest.approx(left / float(values.norm()), abs=1e-5)
        assert lost(adapted, tmp_path)[f"{path}.weight"] == pytest.approx(report.errors[f"{path}.weight"], abs=1e-5)
    assert report.worst == max(report.errors.items(), key=lambda item: item[1])
    assert report.worst[1] > 0.01
    assert report.errors["4.weight"] == 0.0  # of rank 3 at most
    differ(outputs(stock_model, x), outputs(adapted, x))
    whole = sarac.backends.peft.save(adapted, tmp_path, layout=layout, max_rank=99)
    assert whole.worst[1] == 0.0
    same_model(tmp_path, model, adapted, x)


def test_an_untrained_adapter_is_written_as_the_no_op_that_it_is(tmp_path: Path) -> None:
    model, x = mlp(6, 8, 4), torch.randn(3, 6)
    adapted = sarac.transform(model, "rank:3")
    assert sarac.backends.peft.save(adapted, tmp_path, max_rank=2).worst[1] == 0.0
    close(outputs(stock(model, tmp_path), x), outputs(model, x))
    close(outputs(sarac.backends.peft.load(model, tmp_path), x), outputs(model, x))


def test_lost_sees_another_adapter_and_a_missing_module(tmp_path: Path) -> None:
    model = mlp(6, 8, 4)
    adapted = trained(model)
    sarac.backends.peft.save(adapted, tmp_path)
    assert max(lost(adapted, tmp_path).values()) < 1e-6
    assert min(lost(trained(model), tmp_path).values()) > 0.1
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if ".0." not in name}, tmp_path / WEIGHTS)
    found = lost(adapted, tmp_path)
    assert found["0.weight"] == pytest.approx(1.0)
    assert found["2.weight"] < 1e-6


# Read.

LORAS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "regex": {"target_modules": r".*\.0\..*(up|down)_proj"},
    "all": {"target_modules": "all-linear"},
    "without": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "layers": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "ranks": {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2}, "alpha_pattern": {r"^model.*\.q_proj$": 11}},
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", LORAS)
def test_what_peft_wrote_is_read(kind: str, rslora: bool, tmp_path: Path) -> None:
    model, token = llama(), ids()
    made = theirs(model, r=3, lora_alpha=5, use_rslora=rslora, **LORAS[kind])
    made.save_pretrained(tmp_path)
    ours = sarac.backends.peft.load(model, tmp_path)
    assert type(ours) is type(model)
    close(outputs(ours, token).logits, outputs(made, token).logits)
    differ(outputs(ours, token).logits, outputs(model, token).logits)
    close(outputs(sarac.fold(ours), token).logits, outputs(made, token).logits)


@pytest.mark.parametrize("layout", ["padded", "pattern"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_from_peft_to_sarac_and_back(build: Any, layout: str, tmp_path: Path) -> None:
    model, token = build(), ids()
    targets = {"q_proj": 2, "down_proj": 4} if build is llama else {"c_attn": 2, "c_proj": 4}
    made = theirs(model, r=3, lora_alpha=5, target_modules=[*targets], rank_pattern=targets)
    made.save_pretrained(tmp_path / "first")
    sarac.backends.peft.save(sarac.backends.peft.load(model, tmp_path / "first"), tmp_path / "second", layout=layout)
    close(outputs(stock(model, tmp_path / "second"), token).logits, outputs(made, token).logits)
    differ(outputs(made, token).logits, outputs(model, token).logits)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_round_trip_keeps_the_model(build: Any, tmp_path: Path) -> None:
    model, token = build(), ids()
    adapted = trained(model)
    sarac.backends.peft.save(adapted, tmp_path)
    again = sarac.backends.peft.load(model, tmp_path)
    close(outputs(again, token).logits, outputs(adapted, token).logits)
    differ(outputs(again, token).logits, outputs(model, token).logits)


def test_an_adapter_of_another_name_lies_in_its_own_folder(tmp_path: Path) -> None:
    model, token = llama(), ids()
    made = theirs(model, r=3, target_modules=["q_proj"])
    made.add_adapter("poet", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    made.set_adapter("poet")
    made.save_pretrained(tmp_path, selected_adapters=["poet"])
    with pytest.raises(sarac.CheckpointError, match="Name an adapter's own folder: poet"):
        sarac.backends.peft.load(model, tmp_path)
    ours = sarac.backends.peft.load(model, tmp_path / "poet")
    close(outputs(ours, token).logits, outputs(made, token).logits)
    made.set_adapter("default")
    differ(outputs(ours, token).logits, outputs(made, token).logits)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
)
def test_the_names_of_wrappers_and_adapters_are_seen_through(rename: Any, tmp_path: Path) -> None:
    model, token = llama(), ids()
    adapted = trained(model)
    sarac.backends.peft.save(adapted, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    close(outputs(sarac.backends.peft.load(model, tmp_path), token).logits, outputs(adapted, token).logits)
    save_file({**tensors, **{name.replace(".weight", ".b.weight"): t.clone() for name, t in tensors.items()}}, tmp_path / WEIGHTS)
    with pytest.raises(sarac.CheckpointError, match="twice, for two adapters"):
        sarac.backends.peft.load(model, tmp_path)


def test_an_old_bin_is_read_without_running_code(tmp_path: Path) -> None:
    model, token = llama(), ids()
    adapted = trained(model)
    sarac.backends.peft.save(adapted, tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    close(outputs(sarac.backends.peft.load(model, tmp_path), token).logits, outputs(adapted, token).logits)
    torch.save({"code": sarac.load}, tmp_path / "adapter_model.bin")
    with pytest.raises(sarac.CheckpointError, match="no readable PEFT folder"):
        sarac.backends.peft.load(model, tmp_path)


@pytest.mark.parametrize("chosen", [{"r": 16}, {"r": 3, "init_lora_weights": True}])
def test_loras_of_more_rank_than_the_weight_and_of_none(chosen: dict[str, Any], tmp_path: Path) -> None:
    model, x = mlp(6, 8, 4), torch.randn(3, 6)
    made = theirs(model, target_modules=["0", "2"], **chosen)
    made.save_pretrained(tmp_path)
    ours = sarac.backends.peft.load(model, tmp_path)
    close(outputs(ours, x), outputs(made, x))
    ranks = [slot.adapter.rank for _, _, state in adapted_modules(ours) for slot in state.slots.values()]
    assert ranks == ([6, 4] if chosen["r"] == 16 else [1, 1])
    assert check.difference(outputs(ours, x), outputs(model, x)).identical == (chosen["r"] == 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_go_both_ways(dtype: torch.dtype, tmp_path: Path) -> None:
    model, token = llama().to(dtype), ids()
    made = theirs(model, r=3, target_modules="all-linear")
    made.save_pretrained(tmp_path / "first")
    ours = sarac.backends.peft.load(model, tmp_path / "first")
    close(outputs(ours, token).logits, outputs(made, token).logits, dtype)
    sarac.backends.peft.save(ours, tmp_path / "second")
    same_model(tmp_path / "second", model, ours, token, dtype=dtype)


def test_half_precision_loras_are_scaled_in_float32(tmp_path: Path) -> None:
    model = mlp(6, 8, 4)
    made = theirs(model, r=3, lora_alpha=7, target_modules=["0", "2"]).to(torch.bfloat16)
    made.save_pretrained(tmp_path)
    ours = sarac.backends.peft.load(model, tmp_path)
    for path in "02":
        layer = made.get_submodule(f"base_model.model.{path}")
        product = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * (7 / 3)
        close(ours.get_submodule(path).weight - model.get_submodule(path).weight, product)


# Refused.


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Twin(nn.Module):
    """One module at two places, of which PEFT replaces the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1).eval()


@pytest.mark.parametrize(
    ("build", "where", "said"),
    [
        (Own, None, r"w in a Own is not the weight of a linear layer, a convolution or an embedding"),
        (
            lambda: Pooled(nn.Conv1d(3, 6, 3, dilation=2)),
            None,
            r"convolves with dilation=\(2,\), which PEFT's LoRA of it leaves out",
        ),
        (lambda: Pooled(nn.Conv2d(3, 6, 3, groups=3)), None, "convolves with groups=3"),
        (lambda: Pooled(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")), None, "convolves with padding_mode=reflect"),
        (Twin, None, r"a\.weight in a Linear belongs to a module that stands at a and b"),
        (lambda: nn.Linear(4, 4), None, "weight in a Linear belongs to a model that is that layer itself"),
        (encoder, "*linear1*", r"linear1\.weight in a Linear is read by the TransformerEncoderLayer around it"),
        (encoder, "*out_proj*", "is read by the MultiheadAttention around it"),
    ],
)
def test_what_peft_would_compute_otherwise_is_refused(build: Any, where: str | None, said: str, tmp_path: Path) -> None:
    with pytest.raises(sarac.RewriteError, match=said):
        sarac.backends.peft.save(sarac.transform(build(), where=where), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["out_proj"], ["self_attn"]])
def test_peft_ignores_its_own_lora_where_another_module_reads_the_weight(targets: list[str]) -> None:
    """Why such a folder is not written; where this fails, PEFT has learnt it."""
    model, x = encoder(), torch.randn(2, 3, 8)
    close(outputs(theirs(model, r=2, target_modules=targets), x), outputs(model, x))


def test_what_a_lora_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sarac.NotFoldable, match=r"q_proj\.weight is routed"):
        sarac.backends.peft.save(trained(llama(), method="mosara"), tmp_path)
    with pytest.raises(sarac.RewriteError, match=r"norm\.weight was trained whole"):
        sarac.backends.peft.save(sarac.transform(llama(), also_train="*.norm.weight"), tmp_path)
    with pytest.raises(sarac.RewriteError, match="carries no adapters"):
        sarac.backends.peft.save(llama(), tmp_path)
    adapted = sarac.transform(mlp(6, 4, 4))
    with pytest.raises(sarac.RewriteError, match=r"save the adapted model in it, `\._orig_mod`"):
        sarac.backends.peft.save(torch.compile(adapted, backend="eager"), tmp_path)
    with pytest.raises(sarac.RewriteError, match="layout='wide' is unknown"):
        sarac.backends.peft.save(adapted, tmp_path, layout="wide")
    with pytest.raises(sarac.RewriteError, match="max_rank=0"):
        sarac.backends.peft.save(adapted, tmp_path, max_rank=0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(sarac.CheckpointError, match="cannot be written"):
        sarac.backends.peft.save(adapted, tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "holds a IA3 adapter"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights too"),
    ],
)
def test_foreign_folders_get_a_sentence(change: dict[str, object], said: str, tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(sarac.CheckpointError, match="no readable PEFT folder"):
        sarac.backends.peft.load(model, tmp_path)
    sarac.backends.peft.save(trained(model), tmp_path)
    plain = {"bias": "none", "use_dora": False, "modules_to_save": None, "init_lora_weights": "gaussian", "layer_replication": []}
    config(tmp_path, **plain)
    sarac.backends.peft.load(model, tmp_path)
    config(tmp_path, **change)
    with pytest.raises(sarac.CheckpointError, match=said):
        sarac.backends.peft.load(model, tmp_path)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens alone, whose weight is also lm_head\.weight"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias=True"),
        ({"target_modules": ["lm_head"]}, r"adapts lm_head alone, whose weight is also model\.embed_tokens\.weight"),
    ],
)
def test_loras_of_other_things_are_refused(chosen: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs(model, r=2, **chosen).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(sarac.CheckpointError, match=said):
        sarac.backends.peft.load(model, tmp_path)


def test_lora_of_another_model_is_refused(tmp_path: Path) -> None:
    sarac.backends.peft.save(trained(gpt2()), tmp_path)
    with pytest.raises(sarac.PlanError, match="does not have as a linear site"):
        sarac.backends.peft.load(llama(), tmp_path)


def test_tied_weight_that_peft_would_merge_twice_is_told(tmp_path: Path) -> None:
    base, batch = llama(), ids()
    model = shake(sarac.transform(base, where="*embed*"))
    with pytest.warns(sarac.SaracWarning, match="merge_and_unload adds the change twice"):
        sarac.backends.peft.save(model, tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    close(outputs(theirs, batch).logits, outputs(model, batch).logits)
    differ(outputs(theirs.merge_and_unload(), batch).logits, outputs(model, batch).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sarac.SaracWarning)
        sarac.backends.peft.save(shake(sarac.transform(base)), tmp_path / "other")
