"""Exports that generate: a step over a cache, held against torch, whose tokens are those of transformers' generate."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner
from zoo import adapt, bert, close, differ, shake, t5

import sarac
from sarac.backends.decoding import Steps
from sarac.cli import app
from sarac.ir.errors import CheckFailed, ExportError, InputError

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 48, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 7,
}  # fmt: skip


def llama(**choice: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **choice}))


def one_llama() -> nn.Module:
    return llama(num_hidden_layers=1)


def windowed() -> nn.Module:
    """Every other layer sees six tokens back."""
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(head_dim=4, sliding_window=6, **SIZES))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=48, n_positions=128, eos_token_id=7)
    return transformers.GPT2LMHeadModel(config)


def prompts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(8, 48, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def told(model: nn.Module, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(("make", "method"), [(one_llama, "mosara"), (windowed, "sara"), (gpt2, "mosara")])
def test_generates_what_transformers_does(make: Any, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make().eval()
    model = shake(adapt(base, method=method))
    report = sarac.export(model, tmp_path / "m.onnx", task="generate")
    assert report.merged == (method == "sara")
    runtime, (ids, mask) = sarac.Runtime(tmp_path / "m.onnx"), prompts()
    for rows, count in ((3, 30), (1, 5), (3, 70), (3, 30)):
        found = runtime.generate(ids[:rows], count, attention_mask=mask[:rows])
        assert torch.equal(found, told(model, ids[:rows], mask[:rows], count))
    seen, whole = (runtime.generator.follow(ids, one, 2) for one in (mask, torch.ones_like(mask)))
    close(seen[[0, 2]], whole[[0, 2]])
    differ(seen[1], whole[1])  # what is padded is not read
    assert sarac.verify(model, tmp_path / "m.onnx").error < 1e-5
    with pytest.raises(CheckFailed):
        sarac.verify(base, tmp_path / "m.onnx")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(1)
    model, path = shake(adapt(llama(num_hidden_layers=1).eval())), tmp_path_factory.mktemp("served") / "m.onnx"
    sarac.export(model, path, task="generate", swappable="rowwise")
    return model, path


def test_every_row_generates_with_its_adapter(served: tuple[nn.Module, Path]) -> None:
    model, path = served
    runtime, (ids, mask), other = sarac.Runtime(path), prompts(), copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("sara_shift"):
                parameter.mul_(-1)
    for name, one in (("a", model), ("b", other)):
        values = {name: p for name, p in one.named_parameters() if name.endswith("sara_shift")}
        runtime.adapters.add(name, {key.replace(".sara", ".weight.sara"): p for key, p in values.items()})
    with sarac.disabled(model):
        wanted = {None: told(model, ids, mask, 12)}
    wanted |= {"a": told(model, ids, mask, 12), "b": told(other, ids, mask, 12)}
    assert not torch.equal(wanted["a"], wanted["b"])
    for name, expected in wanted.items():
        assert torch.equal(runtime.generate(ids, 12, attention_mask=mask, adapter=name), expected)
    mixed = runtime.generate(ids, 12, attention_mask=mask, adapter=["b", "a", None])
    for row, name in enumerate(("b", "a", None)):
        expected = wanted[name][row]
        assert torch.equal(mixed[row, : len(expected)], expected[: mixed.shape[1]])


def test_a_row_that_has_ended_is_filled_up_and_all_stop_where_the_last_ends(served: tuple[nn.Module, Path]) -> None:
    _, path = served
    runtime, (ids, mask) = sarac.Runtime(path), prompts()
    free = runtime.generate(ids, 40, attention_mask=mask, eos_token_id=())
    assert free.shape == (3, 49)
    end = int(free[0, 12])
    first = int((free[0, 9:] == end).int().argmax())
    ended = runtime.generate(ids[:1], 40, eos_token_id=end)
    assert torch.equal(ended, free[:1, : 10 + first])
    together = runtime.generate(ids, 40, attention_mask=mask, eos_token_id=[end])
    assert bool((together[0, 10 + first :] == 0).all())


def test_drawn_tokens_follow_their_seed_and_chances(served: tuple[nn.Module, Path]) -> None:
    _, path = served
    runtime, (ids, _) = sarac.Runtime(path), prompts()
    one, same, other = (runtime.generate(ids, 20, do_sample=True, seed=seed, eos_token_id=()) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    likeliest = runtime.generate(ids, 20, eos_token_id=())
    assert torch.equal(runtime.generate(ids, 20, do_sample=True, top_k=1, eos_token_id=()), likeliest)
    assert torch.equal(runtime.generate(ids, 20, do_sample=True, top_p=1e-6, temperature=2.0, eos_token_id=()), likeliest)


def test_what_does_not_fit_is_told(served: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, path = served
    runtime, (ids, mask) = sarac.Runtime(path), prompts()
    for given, said in (
        ({"input_ids": ids[0]}, "token ids of shape"),
        ({"input_ids": ids.float()}, "token ids of shape"),
        ({"input_ids": ids, "attention_mask": mask.flip(1)}, "pad prompts on their left"),
        ({"input_ids": ids, "max_new_tokens": 0}, "at least one token"),
        ({"input_ids": ids, "adapter": ["a"]}, "got 1 adapters for 3 rows|There is no adapter 'a'"),
    ):
        with pytest.raises(InputError, match=said):
            runtime.generate(**given)
    for model, choice, said in (
        (bert(), {}, "BertModel generates nothing"),
        (t5(), {}, "has an encoder"),
        (llama(), {"dynamic": "static"}, "leave dynamic='static' out"),
        (llama(), {"task": "speak"}, "task='speak' is not known"),
    ):
        with pytest.raises(ExportError, match=said):
            sarac.export(model.eval(), tmp_path / "no.onnx", **{"task": "generate", **choice})
    sarac.export(nn.Sequential(nn.Linear(3, 3)), tmp_path / "m.onnx", torch.randn(2, 3))
    with pytest.raises(InputError, match="keeps no cache"):
        sarac.Runtime(tmp_path / "m.onnx").generate(ids)


def test_a_mask_is_of_what_a_token_may_see() -> None:
    steps = Steps({"full": 0, "near": 3}, (), 0)
    seen = torch.tensor([[0, 1, 1, 1, 1, 0]])
    masks = steps.masks(seen, torch.tensor([1, 4]), torch.float32)
    assert (masks["full"] == 0).int()[0, 0].tolist() == [[0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]]
    assert (masks["near"] == 0).int()[0, 0].tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]]


def test_generation_from_the_command_line(tmp_path: Path) -> None:
    sarac.save(shake(adapt(llama(num_hidden_layers=1).eval())), tmp_path / "m.pt")
    done = CliRunner().invoke(app, ["export", "--task", "generate", str(tmp_path / "m.pt"), str(tmp_path / "m.onnx")])
    assert done.exit_code == 0, done.output
    assert sarac.Runtime(tmp_path / "m.onnx").generate(prompts()[0], 3).shape == (3, 12)
