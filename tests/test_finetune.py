"""Text as data, and training on it: what becomes a token, what is learnt of it, and that learning is what happened."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from zoo import TiedHead, llama, outputs, same, t5, trainables

import sarac
from sarac import finetune, text
from sarac.finetune import IGNORED, Options
from sarac.ir.errors import CheckFailed, InputError, PlanError
from sarac.ir.record import keep_inputs

LETTERS = [chr(97 + index) for index in range(26)]
LENGTH = 16


def tokenizer(**special: str) -> Any:
    """A word for each letter: "a" is 3."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", "<pad>", *LETTERS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = special or {"eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


def alphabet(start: int, length: int = 12) -> str:
    return " ".join(LETTERS[(start + index) % 26] for index in range(length))


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@contextlib.contextmanager
def silent(title: str, total: int) -> Iterator[Callable[[str], None]]:
    yield lambda note: None


def small() -> LlamaForCausalLM:
    """Large enough to learn the alphabet."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def rows(tmp_path: Path) -> text.Rows:
    path = written(tmp_path / "rows.jsonl", *({"text": alphabet(start)} for start in range(26)))
    return text.read_rows(path, tokenizer(), LENGTH, 32)


def trained(model: nn.Module, rows: text.Rows, **options: Any) -> finetune.Outcome:
    return finetune.finetune(model, rows, rows, Options(**{"steps": 25, "lr": 0.5, "batch_size": 13, **options}), silent)


# What becomes of a row.


def test_text_is_learnt_whole_and_a_completion_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", {"text": "a b c"}, {"prompt": "a b", "completion": "c d"}, "", {"text": "b"})
    first, second, third = text.read_rows(path, tokenizer(), LENGTH, 32).items
    assert first == {"input_ids": [3, 4, 5, 1], "labels": [3, 4, 5, 1]}
    assert second == {"input_ids": [3, 4, 5, 6, 1], "labels": [IGNORED, IGNORED, 5, 6, 1]}
    assert third == {"input_ids": [4, 1], "labels": [4, 1]}


def test_a_row_ends_once_and_only_where_the_tokenizer_knows_an_end(tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", {"text": "a b <eos>"}, {"text": "a b"})
    assert [row["input_ids"] for row in text.read_rows(path, tokenizer(), LENGTH, 32).items] == [[3, 4, 1], [3, 4, 1]]
    endless = tokenizer(pad_token="<pad>")
    assert text.read_rows(path, endless, LENGTH, 32).items[1]["input_ids"] == [3, 4]


def test_rows_without_anything_to_learn_are_counted(tmp_path: Path) -> None:
    data = [{"text": alphabet(0)}, {"prompt": alphabet(0), "completion": "a"}, {"text": ""}]
    path = written(tmp_path / "data.jsonl", *data)
    short, long = (text.read_rows(path, tokenizer(), length, 32) for length in (8, 20))
    assert (len(short.items), short.left_out) == (1, 2)
    assert len(short.items[0]["labels"]) == 8
    assert (len(long.items), long.left_out) == (2, 1)


@pytest.mark.parametrize(
    ("lines", "place", "what"),
    [
        ([{"text": "a"}, {"txt": "a"}], "line 2", "'txt'"),
        ([{"prompt": "a"}], "line 1", "'prompt'"),
        ([{"text": 3}], "line 1", "'text' is of type int"),
        ([{"prompt": "a", "completion": None}], "line 1", "'completion' is of type NoneType"),
        ([{"text": "a"}, "", "{not json"], "line 3", "no JSON"),
        (["[1, 2]"], "line 1", "a JSON list"),
        ([{}], "line 1", "no keys"),
        ([], "data.jsonl", "empty"),
        (["", " "], "data.jsonl", "empty"),
        ([{"text": ""}], "data.jsonl", "anything to learn"),
    ],
)
def test_a_row_that_is_none_is_named_by_its_line(tmp_path: Path, lines: list[Any], place: str, what: str) -> None:
    path = written(tmp_path / "data.jsonl", *lines)
    with pytest.raises(InputError) as caught:
        text.read_rows(path, tokenizer(), LENGTH, 32)
    assert place in str(caught.value)
    assert what in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        text.read_rows(path, tokenizer(), LENGTH, 32)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", {"text": "a z"})
    assert text.read_rows(path, tokenizer(), LENGTH, 29).items
    with pytest.raises(InputError, match=r"line 1.*id 28.*knows 28"):
        text.read_rows(path, tokenizer(), LENGTH, 28)


def test_the_tokenizer_comes_from_the_models_folder_or_a_given_one(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(InputError, match="--tokenizer"):
        text.tokenizer_of(model)
    tokenizer().save_pretrained(tmp_path)
    assert text.tokenizer_of(model, str(tmp_path))("a b").input_ids == [3, 4]
    model.config._name_or_path = str(tmp_path)
    assert text.tokenizer_of(model)("a b").input_ids == [3, 4]
    with pytest.raises(InputError, match="no readable tokenizer"):
        text.tokenizer_of(model, str(tmp_path / "gone"))


def test_calibration_rows_are_calls(tmp_path: Path) -> None:
    path = written(tmp_path / "calls.jsonl", {"text": "a b"}, {"x": [[1, 2]], "mask": [1]})
    model = llama()
    first, second = text.read_inputs(path, model, tokenizer)
    assert first.kwargs["input_ids"].tolist() == [[3, 4, 1]]
    assert first.kwargs["attention_mask"].tolist() == [[1, 1, 1]]
    assert second.kwargs["x"].dtype == torch.int64
    keep_inputs(model, '[["x", "float32", [1, 2], null]]')
    assert text.read_inputs(path, model, tokenizer)[1].kwargs["x"].dtype == torch.float32


def test_a_calibration_row_that_is_no_call_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "calls.jsonl", {"x": [[1.0, 2.0]]}, {"x": [[1.0], [2.0, 3.0]]})
    with pytest.raises(InputError, match="line 2"):
        text.read_inputs(path, llama(), tokenizer)


# What is learnt.


def test_the_loss_is_the_models_own_and_padding_has_no_part_in_it() -> None:
    model = small()
    items = [{"input_ids": row, "labels": row} for row in ([3, 4, 5, 6, 1], [7, 8, 1])]
    batch = finetune._collate(items, mask=True)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    ours = finetune._losses(model, batch).mean()
    torch.testing.assert_close(ours, model(**batch).loss)
    alone = torch.cat([finetune._losses(model, finetune._collate([item], mask=True)) for item in items])
    torch.testing.assert_close(ours, alone.mean())
    learnt = {**batch, "labels": batch["input_ids"]}  # the padding learnt as well
    assert abs(finetune._losses(model, learnt).mean().item() - ours.item()) > 1e-3


def test_training_learns_moves_the_adapters_and_nothing_else(rows: text.Rows) -> None:
    model = small()
    adapted = sarac.transform(model, "threshold:1,train=factors")
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    outcome = trained(adapted, rows, lr=0.05)
    assert outcome.eval_loss is not None
    assert outcome.eval_loss[1] < outcome.eval_loss[0] - 0.3
    assert outcome.train_loss[1] < outcome.train_loss[0] - 0.3
    assert (outcome.steps, outcome.rows) == (25, 26)
    moved = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trainables(adapted)
    assert outcome.facts()["eval_perplexity"][1] == pytest.approx(math.exp(outcome.eval_loss[1]))


def test_the_same_seed_learns_the_same_and_another_does_not(rows: text.Rows) -> None:
    model = small()
    token = torch.tensor([[3, 4, 5]])
    first, again, other = (sarac.transform(model) for _ in range(3))
    for adapted, seed in ((first, 1), (again, 1), (other, 2)):
        trained(adapted, rows, steps=3, seed=seed)
    same(outputs(first, token).logits, outputs(again, token).logits)
    assert not torch.equal(outputs(first, token).logits, outputs(other, token).logits)


def test_the_rate_is_the_recommended_one_and_whole_parameters_get_their_own(rows: text.Rows) -> None:
    adapted = sarac.transform(small(), also_train="*norm*")
    assert trained(adapted, rows, steps=1, lr=None).learning_rate == sarac.recommended_lr(adapted)
    adapters, whole = finetune._optimizer(adapted, 0.5).param_groups
    assert (adapters["lr"], whole["lr"]) == (0.5, finetune.WHOLE_LR)
    assert len(adapters["params"]) == 7
    assert len(whole["params"]) == 3
    assert len(finetune._optimizer(sarac.transform(small()), 0.5).param_groups) == 1


def test_epochs_count_where_no_steps_are_given(rows: text.Rows) -> None:
    adapted = sarac.transform(small())
    assert trained(adapted, rows, steps=None, epochs=1.5).steps == 3
    assert trained(adapted, rows, steps=4, epochs=1.5).steps == 4


def test_a_loss_that_is_not_finite_stops_it(rows: text.Rows) -> None:
    with pytest.raises(CheckFailed, match="at step"):
        trained(sarac.transform(small()), rows, lr=1e20)


def test_every_step_is_told_and_nothing_is_printed(rows: text.Rows, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    titles: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def meter(title: str, total: int) -> Iterator[Callable[[str], None]]:
        titles.append((title, total))
        yield told.append

    finetune.finetune(sarac.transform(small()), rows, rows, Options(steps=4, batch_size=13), meter)
    assert titles == [("Evaluating before", 2), ("Training", 4), ("Evaluating after", 2)]
    assert len(told) == 8
    assert capfd.readouterr().out == ""


class Plain(nn.Module):
    """A language model of nobody's: ids in, logits out, no mask; each token is predicted from the one before."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(32, width), nn.Linear(width, width), nn.Linear(width, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.inner(self.embed(input_ids))))
        return found


def test_a_module_of_ones_own_trains_as_well(rows: text.Rows) -> None:
    adapted = sarac.transform(Plain(), "threshold:1", where="*.weight")
    assert not text.takes_mask(adapted)
    assert [tensor.name for tensor in text.token_spec(adapted, 32).tensors] == ["input_ids"]
    outcome = trained(adapted, rows)
    assert outcome.eval_loss is not None
    assert outcome.eval_loss[1] < outcome.eval_loss[0] - 0.1


def test_a_model_that_gives_no_logits_is_refused(rows: text.Rows) -> None:
    headless = Plain()
    headless.head = nn.Flatten()  # type: ignore[assignment]
    with pytest.raises(InputError, match="no logits"):
        trained(sarac.transform(headless), rows)


def test_only_what_generates_text_is_a_language_model() -> None:
    for model in (small(), TiedHead(8)):
        finetune.require_language_model(model)
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    for other in (BertModel(config), t5()):
        with pytest.raises(InputError, match="token by token"):
            finetune.require_language_model(other)


def test_a_plain_model_is_transformed_and_an_adapted_one_kept() -> None:
    model = small()
    adapted = finetune.with_adapters(model, "rank:2", "mosara", ["*.q_proj.weight"], 0)
    assert {name.rpartition(".")[0] for name in trainables(adapted)} == {"model.layers.0.self_attn.q_proj"}
    assert finetune.with_adapters(adapted, None, None, None, 0) is adapted
    for asked in (("rank:2", None, None), (None, "sara", None), (None, None, ["*"])):
        with pytest.raises(PlanError, match="already"):
            finetune.with_adapters(adapted, *asked, 0)


def test_the_spec_bounds_the_ids_by_the_vocabulary() -> None:
    model = small()
    words = tokenizer()
    assert text.vocabulary_of(model, words) == 32
    assert text.vocabulary_of(Plain(), words) == len(words) == 29
    ids, mask = text.token_spec(model, 32).tensors
    assert (ids.name, ids.high, mask.name, mask.high) == ("input_ids", 32, "attention_mask", None)
    drawn = text.token_spec(model, 32).sample().kwargs["input_ids"]
    assert int(drawn.max()) < 32
    assert F.one_hot(drawn, 32).sum() == drawn.numel()
