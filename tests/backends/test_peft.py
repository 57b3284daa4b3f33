"""PEFT folders: stock PEFT loads what is written with equal outputs, and what PEFT wrote is read back whole."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import sarac
from sarac.ir import check


def llama(tie: bool = True) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)).eval()


def trained(model: nn.Module, plan: str = "threshold:0.6", method: str = "sara") -> nn.Module:
    adapted = sarac.transform(model, plan, method=method)
    for name, parameter in adapted.named_parameters():
        if name.endswith("shift"):
            parameter.data.normal_(std=0.3)
    return adapted


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize(
    ("plan", "method"),
    [("threshold:0.6", "sara"), ("rank:3,train=factors", "sara"), ("rank:4,router=uniform", "mosara")],
)
def test_stock_peft_loads_it_with_equal_outputs(build, plan: str, method: str, tmp_path: Path) -> None:
    model, ids = build(), torch.randint(0, 32, (2, 7))
    adapted = trained(model, plan, method)
    sarac.backends.peft.save(adapted, tmp_path / "lora")
    expected, base = logits(adapted, ids), logits(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    check.require_close(logits(theirs, ids), expected, torch.float32, "PEFT's model and the adapted one")
    assert check.difference(expected, base).error > check.gate(torch.float32)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_wrote_is_read(build, rslora: bool, tmp_path: Path) -> None:
    model, ids = build(), torch.randint(0, 32, (2, 7))
    targets = ["q_proj", "down_proj"] if build is llama else ["c_attn"]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, use_rslora=rslora, alpha_pattern={targets[0]: 7}
    )
    base = logits(model, ids)
    theirs = peft.get_peft_model(build(), config).eval()
    theirs.get_base_model().load_state_dict(model.state_dict(), strict=False)
    for name, tensor in model.state_dict().items():
        path, _, param = name.rpartition(".")
        owner = theirs.get_base_model().get_submodule(path)
        getattr(getattr(owner, "base_layer", owner), param).data.copy_(tensor)
    theirs.save_pretrained(tmp_path)
    ours = sarac.backends.peft.load(model, tmp_path)
    check.require_close(logits(ours, ids), logits(theirs, ids), torch.float32, "the model read and PEFT's")
    assert check.difference(logits(ours, ids), base).error > check.gate(torch.float32)
    assert type(ours) is type(model)
    check.require_close(logits(sarac.fold(ours), ids), logits(theirs, ids), torch.float32, "the folded model and PEFT's")


def test_round_trip_keeps_the_model(tmp_path: Path) -> None:
    model, ids = llama(), torch.randint(0, 32, (2, 7))
    adapted = trained(model)
    sarac.backends.peft.save(adapted, tmp_path)
    again = sarac.backends.peft.load(model, tmp_path)
    check.require_close(logits(again, ids), logits(adapted, ids), torch.float32, "the model read back and the one written")
    assert check.difference(logits(again, ids), logits(model, ids)).error > check.gate(torch.float32)


def test_what_a_lora_cannot_hold_is_refused(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    with pytest.raises(sarac.NotFoldable, match=r"q_proj\.weight is routed"):
        sarac.backends.peft.save(trained(llama(), method="mosara"), tmp_path)
    with pytest.raises(sarac.RewriteError, match=r"w belongs to a Own, .*nn\.Linear and Conv1D"):
        sarac.backends.peft.save(sarac.transform(Own()), tmp_path)
    with pytest.raises(sarac.RewriteError, match=r"norm\.weight was trained whole"):
        sarac.backends.peft.save(sarac.transform(llama(), also_train="*.norm.weight"), tmp_path)
    with pytest.raises(sarac.RewriteError, match="carries no adapters"):
        sarac.backends.peft.save(llama(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "holds a IA3 adapter"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
    ],
)
def test_foreign_folders_get_a_sentence(change: dict[str, object], said: str, tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(sarac.CheckpointError, match="no readable PEFT folder"):
        sarac.backends.peft.load(model, tmp_path)
    sarac.backends.peft.save(trained(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(sarac.CheckpointError, match=said):
        sarac.backends.peft.load(model, tmp_path)


def test_lora_of_another_model_is_refused(tmp_path: Path) -> None:
    sarac.backends.peft.save(trained(gpt2()), tmp_path)
    with pytest.raises(sarac.PlanError, match="does not have as a linear site"):
        sarac.backends.peft.load(llama(), tmp_path)
