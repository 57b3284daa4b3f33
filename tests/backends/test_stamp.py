"""Equal layers: optimised once and repeated, the same numbers as the whole; layers that differ are exported whole."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import bert, close, differ, gpt2, llama

from sarac.backends import onnx as writer
from sarac.backends.onnx import LAYERS, Onnx
from sarac.backends.onnx_file import node_counts, read_metadata
from sarac.backends.pairing import paired
from sarac.backends.runtime import Runtime
from sarac.backends.stack import shortened, stack_of
from sarac.ir.inputs import Inputs

IDS = Inputs((), {"input_ids": torch.arange(24).reshape(2, 12) % 50})
ROWS = Inputs((torch.randn(3, 8),))


class Layers(nn.Module):
    """Layers in a list, with what `change` does to them."""

    def __init__(self, change: Callable[[nn.ModuleList], object] = len, count: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)) for _ in range(count))
        self.last = nn.Linear(8, 3)
        change(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


class Collecting(Layers):
    """What follows reads every layer."""

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for layer in self.layers:
            x = x + layer(x)
            seen.append(x)
        return torch.cat(seen, 1)


class Listing(Layers):
    """Every layer gives an output."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        seen = {}
        for number, layer in enumerate(self.layers):
            x = x + layer(x)
            seen[f"state.{number}"] = x * 2
        return seen


class Returning(Layers):
    """Every layer reads the first one's output."""

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.layers[0](self.first(x))
        for layer in list(self.layers)[1:]:
            x = x + layer(self.weigh(first) - x)
        return self.last(x)

    def weigh(self, first: Tensor) -> Tensor:
        return first * 2


class Starting(Returning):
    """The second layer reads one thing twice, the others two."""

    def weigh(self, first: Tensor) -> Tensor:
        return first


def alternating(layers: nn.ModuleList) -> None:
    for layer in list(layers)[1::2]:
        layer[1] = nn.Tanh()


MODELS = {
    "layers": (Layers, ROWS, "repeated: 6 of layers"),
    "a sequence": (
        lambda: nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(7))),
        ROWS,
        "repeated: 7 of ",
    ),
    "with a period": (lambda: Layers(alternating, 10), ROWS, "repeated: 10 of layers"),
    "the first read by all": (Returning, ROWS, "whole: Sub"),
    "a second layer of its own": (Starting, ROWS, "whole: Sub"),
    "an output each": (Listing, ROWS, "repeated: 6 of layers"),
    "one layer wider inside": (
        lambda: Layers(lambda layers: setattr(layers[3][1], "approximate", "tanh")),
        ROWS,
        "whole: there are no equal",
    ),
    "another epsilon": (lambda: Layers(lambda layers: setattr(layers[4][2], "eps", 0.5)), ROWS, "whole: there are no equal"),
    "all read at the end": (Collecting, ROWS, "whole: Concat"),
    "four layers": (lambda: Layers(count=4), ROWS, "whole: there are no equal"),
    "bert": (lambda: bert(layers=5), IDS, "repeated: 5 of encoder.layer"),
    "llama": (lambda: llama(layers=5), IDS, "repeated: 5 of model.layers"),
    "gpt2": (lambda: gpt2(layers=5), IDS, "repeated: 5 of transformer.h"),
}


FUSED = ("bert", "llama")  # llama's numbers are looked at where it is compared with the whole
FIXED = ("gpt2",)  # sizes, which are half the work: others here have free ones, and GPT-2 in test_flow


@pytest.mark.parametrize(
    ("name", "optimize"), [*((name, "basic") for name in MODELS if name not in FUSED), ("layers", "ort"), ("bert", "ort")]
)
def test_repeated_or_whole_the_numbers_are_the_models(name: str, optimize: str, tmp_path: Path) -> None:
    build, inputs, said = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    form = Onnx(optimize=optimize, provider="cuda", dynamic="static" if name in FIXED else "auto")
    form.write(model, inputs, tmp_path / "m.onnx", {})
    assert read_metadata(tmp_path / "m.onnx")[LAYERS].startswith(said)
    require_numbers(tmp_path / "m.onnx", model, inputs)


def require_numbers(path: Path, model: nn.Module, inputs: Inputs) -> None:
    with torch.no_grad():
        found = Runtime(path).run(inputs)
        close(*paired(found, inputs.call(model)))
        parameter = [p for n, p in model.named_parameters() if ".3." in f".{n}" and p.dim() == 2][-1]
        parameter += torch.randn_like(parameter)  # of a layer that stands in the file as a copy
        differ(*paired(found, inputs.call(model)))


@pytest.mark.parametrize(("name", "optimize", "sizes"), [("layers", "basic", "auto"), ("llama", "ort", "static")])
def test_repeating_gives_the_graph_of_the_whole(
    name: str, optimize: str, sizes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama with fixed sizes, which are a third of the work: above BERT has free ones here, and Llama in test_attention."""
    build, inputs, said = MODELS[name]
    torch.manual_seed(0)
    model, form = build().eval(), Onnx(optimize=optimize, provider="cuda", dynamic=sizes)
    form.write(model, inputs, tmp_path / "repeated.onnx", {})
    monkeypatch.setattr(writer, "stack_of", lambda _: None)
    form.write(model, inputs, tmp_path / "whole.onnx", {})
    one, two = (onnx.load(tmp_path / f"{kind}.onnx").graph for kind in ("repeated", "whole"))
    assert node_counts(tmp_path / "repeated.onnx") == node_counts(tmp_path / "whole.onnx")
    large = [{i.name: i.raw_data for i in graph.initializer if len(i.raw_data) > 64} for graph in (one, two)]
    assert sorted(large[0].values()) == sorted(large[1].values())
    assert {name for name in large[0] if name.endswith(".weight")} == {name for name in large[1] if name.endswith(".weight")}
    assert read_metadata(tmp_path / "repeated.onnx")[LAYERS].startswith(said)
    require_numbers(tmp_path / "repeated.onnx", model, inputs)


def test_the_outputs_of_every_layer_stand_under_their_names(tmp_path: Path) -> None:
    model = Listing().eval()
    Onnx().write(model, ROWS, tmp_path / "m.onnx", {})
    with torch.no_grad():
        found, wanted = Runtime(tmp_path / "m.onnx").run(ROWS), ROWS.call(model)
    assert {name.replace("_", ".") for name in found} == {name.replace("_", ".") for name in wanted}
    for name, value in wanted.items():
        close(found[name], value)
    differ(found["state.4"], wanted["state.3"])


def test_a_model_is_whole_again_after_it_was_shortened() -> None:
    model = llama(layers=6)
    stack = stack_of(model)
    assert stack is not None
    seen = []
    with contextlib.suppress(RuntimeError), shortened(model, stack):
        seen += [len(model.model.layers), model.config.num_hidden_layers]
        raise RuntimeError("stopped")
    assert seen == [3, 3]
    assert (len(model.model.layers), model.config.num_hidden_layers) == (6, 6)
    assert [name for name, _ in model.model.layers.named_children()] == list("012345")


def test_weights_that_are_more_than_turned(tmp_path: Path) -> None:
    """Gemma adds one to the scales of its norms: what the graph reads is worked out for each layer."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.GemmaConfig(**sizes, num_hidden_layers=5, vocab_size=60, max_position_embeddings=32)
    model = transformers.GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        Onnx(dynamic="static").write(model, IDS, tmp_path / "m.onnx", {})  # weights know no sizes of inputs
        assert read_metadata(tmp_path / "m.onnx")[LAYERS].startswith("repeated: 5")
        found = Runtime(tmp_path / "m.onnx").run(IDS)["logits"]
        close(found, IDS.call(model).logits)
        model.model.layers[3].input_layernorm.weight += 0.5
        differ(found, IDS.call(model).logits)
