"""Folders of safetensors: the same numbers as the model, one weight at a time, and a sentence for every file that lies."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from typer.testing import CliRunner
from zoo import TRANSFORMERS, VOCABULARY, llama, t5

import sarac
from sarac.cli import app
from sarac.folders import Folder, _blocks
from sarac.ir.errors import CheckpointError, PlanError
from sarac.ir.gram import spectrum

INDEX = "model.safetensors.index.json"


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def plain(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return folder


# What is read.


@pytest.mark.parametrize("kind", [*TRANSFORMERS, "t5"])
def test_a_folder_gives_what_its_model_gives(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = {**TRANSFORMERS, "t5": t5}[kind]()
    folder = saved(model, tmp_path / kind)
    whole, read = sarac.analyze(model), sarac.analyze(str(folder))
    assert read.title == f"{kind}, as {type(model).__name__}"
    assert read.graph is None
    assert [(site.name, site.full_shape, site.form) for site in read.sites] == [
        (site.name, site.full_shape, site.form) for site in whole.sites
    ]
    for site in whole.sites:
        assert torch.equal(read.spectrum(site.name).values, whole.spectrum(site.name).values)
    assert read.left_out == whole.left_out
    first = whole.sites[0].name
    model.get_parameter(first).data *= 2.0
    assert not torch.equal(sarac.analyze(model).spectrum(first).values, read.spectrum(first).values)


def test_shards_with_an_index_and_a_single_file_are_the_same_model(tmp_path: Path) -> None:
    model = llama()
    single, many = saved(model, tmp_path / "one"), saved(model, tmp_path / "many", max_shard_size="6KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    assert (many / INDEX).is_file()
    one, two, file = (sarac.analyze(path) for path in (single, many, single / "model.safetensors"))
    assert one.ranks() == two.ranks() == file.ranks()
    assert one.parameters == two.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert file.title == "model.safetensors, by names and shapes (no config.json says of which model)"
    assert sarac.analyze(many, threshold=0.3).ranks() != two.ranks()


def test_the_command_says_the_same_and_takes_where(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "llama")
    result = CliRunner().invoke(app, ["analyze", str(folder), "--where", "*q_proj*", "--json"])
    assert {row["site"]: row["rank"] for row in json.loads(result.stdout)["sites"]} == sarac.analyze(
        folder, where="*q_proj*"
    ).ranks()
    assert len(json.loads(result.stdout)["sites"]) == 2
    with pytest.raises(PlanError, match=r"'\*q_prj\*' in `where` matches no weight"):
        sarac.analyze(folder, where="*q_prj*")


def test_experts_stored_one_by_one_are_found_by_name(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".experts." not in name}
    split = {f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight": torch.randn(24, 16) for i in range(2) for j in (1, 2)}
    folder = plain(tmp_path / "mixtral", {name: tensor.contiguous() for name, tensor in {**state, **split}.items()})
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    analysis = sarac.analyze(folder)
    assert analysis.title == "mixtral, as MixtralForCausalLM, 4 weights by names and shapes"
    for name, tensor in split.items():
        assert torch.equal(analysis.spectrum(name).values, spectrum(tensor).values)
    assert all(
        "does not hold it under this name" in why for name, why in analysis.left_out.items() if name.endswith("gate_up_proj")
    )
    assert any(name.endswith("gate_up_proj") for name in analysis.left_out)


def test_without_a_config_shape_and_name_decide(tmp_path: Path) -> None:
    tensors = {
        "tok_embeddings.weight": torch.randn(9, 4), "layers.0.wq.weight": torch.randn(6, 4), "output.weight": torch.randn(9, 4),
        "layers.0.wq.bias": torch.randn(6), "conv.weight": torch.randn(5, 3, 2, 2), "experts.w1": torch.randn(3, 20, 18),
        "wave.conv1.weight": torch.randn(5, 4, 3), "relative_position_bias_table": torch.randn(7, 3),
        "gate.weight": torch.randn(1, 4), "position_ids": torch.zeros(2, 3, dtype=torch.int64),
    }  # fmt: skip
    analysis = sarac.analyze(plain(tmp_path / "some", tensors))
    assert {site.name: site.full_shape for site in analysis.sites} == {
        "layers.0.wq.weight": (6, 4), "conv.weight": (5, 12), "experts.w1": (3, 20, 18), "wave.conv1.weight": (5, 12),
    }  # fmt: skip
    assert torch.equal(analysis.spectrum("conv.weight").values, spectrum(tensors["conv.weight"].flatten(1)).values)
    assert analysis.left_out == {
        "tok_embeddings.weight": "an embedding, by its name", "output.weight": "the output head, by its name",
        "gate.weight": "a vector in the shape of a matrix", "position_ids": "no weight of a layer, by its name",
        "relative_position_bias_table": "no weight of a layer, by its name",
    }  # fmt: skip
    assert len(sarac.analyze(tmp_path / "some", where="*").sites) == 7


def test_config_of_nobodys_model_is_told_and_names_decide(tmp_path: Path) -> None:
    folder = plain(tmp_path / "odd", {"a.weight": torch.randn(4, 5)})
    (folder / "config.json").write_text('{"model_type": "nobody"}')
    analysis = sarac.analyze(folder)
    assert analysis.title.startswith("odd, by names and shapes (")
    assert "config.json builds no model" in analysis.title
    assert list(analysis.ranks()) == ["a.weight"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_counts_by_its_values_and_its_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    stored, scale = torch.randn(260, 130).to(dtype), torch.rand(3, 2) + 0.5
    wide = stored.float() * scale.repeat_interleave(128, 0)[:260].repeat_interleave(128, 1)[:, :130]
    folder = plain(tmp_path / "fp8", {"a.weight": stored, "b.weight": stored.clone(), "b.weight_scale_inv": scale})
    analysis = sarac.analyze(folder)
    assert torch.equal(analysis.spectrum("a.weight").values, spectrum(stored).values)
    assert torch.equal(analysis.spectrum("b.weight").values, spectrum(wide).values)
    assert not torch.allclose(analysis.spectrum("a.weight").values, analysis.spectrum("b.weight").values)
    assert {site.dtype for site in analysis.sites} == {dtype}
    assert analysis.left_out == {"b.weight_scale_inv": "no weight of a layer, by its name"}


def test_int8_counts_with_scales_that_are_known(tmp_path: Path) -> None:
    stored = torch.randint(-127, 128, (6, 5), dtype=torch.int8)
    rows, columns = torch.rand(6) + 0.5, torch.rand(1, 5)
    tensors = {
        "a.weight": stored, "a.SCB": rows, "b.weight": stored.clone(), "b.weight_scale": rows[:, None].clone(),
        "c.weight": stored.clone(), "c.weight_scale": torch.tensor(0.25), "d.weight": stored.clone(),
        "e.weight": stored.clone(), "e.weight_scale": columns, "f.qweight": stored.int(), "g.weight": stored.to(torch.uint8),
    }  # fmt: skip
    analysis = sarac.analyze(plain(tmp_path / "int8", tensors))
    expected = {
        "a.weight": stored * rows[:, None] / 127.0, "b.weight": stored * rows[:, None], "c.weight": stored * 0.25,
        "e.weight": stored * columns,
    }  # fmt: skip
    assert {site.name for site in analysis.sites} == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(analysis.spectrum(name).values, spectrum(weight).values, rtol=1e-6, atol=0.0)
    assert analysis.left_out["d.weight"] == "it is stored as int8, without scales that sarac knows"
    assert {"f.qweight", "g.weight"} <= set(analysis.left_out)


@pytest.mark.parametrize(
    ("shape", "scale", "sizes"),
    [
        ((260, 130), (3, 2), (128, 128)),
        ((6, 5), (6,), (1, 5)),
        ((6, 4), (3, 2), (2, 2)),
        ((6, 4), (), (128, 128)),
        ((6, 4), (4, 2), ()),
    ],
)
def test_blocks_of_scales(shape: tuple[int, ...], scale: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    assert _blocks(shape, scale) == sizes


def test_adapted_folders_and_other_models_are_opened_as_before(tmp_path: Path) -> None:
    model = llama()
    adapted = sarac.transform(model)
    folder = saved(adapted, tmp_path / "adapted")
    assert Folder.at(folder) is None
    assert sarac.analyze(folder).graph is not None
    sarac.save(model, tmp_path / "model.pt")
    assert sarac.analyze(tmp_path / "model.pt").ranks() == sarac.analyze(model).ranks()
    assert Folder.at("timm:resnet18") is None


def test_weights_are_read_when_their_turn_comes(tmp_path: Path) -> None:
    folder = plain(tmp_path / "two", {"a.weight": torch.randn(4, 5), "b.weight": torch.randn(5, 6)})
    read = Folder.at(folder)
    assert read is not None
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read at a\.weight: No such file"):
        read.analyze(0.6, None)


MEMORY = """
import sys, torch, sarac
from safetensors.torch import load_file
torch.set_num_threads(1)
def peak():  # what getrusage says is the parent's too
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
sarac.analyze(sys.argv[1], where="first.weight", cache=False)
before = peak()
sarac.analyze(sys.argv[1], cache=False)
print(peak() - before)
held = load_file(sys.argv[1] + "/one.safetensors") | load_file(sys.argv[1] + "/two.safetensors")
held = {name: tensor.clone() for name, tensor in held.items()}
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells it")
def test_peak_memory_is_of_the_largest_matrix_whatever_the_size(tmp_path: Path) -> None:
    rows, columns = 128, 48_000
    largest = rows * columns * 8
    for file in ("one", "two"):
        weights = {f"{file}.{i}.weight": torch.rand(rows, columns) for i in range(6)}
        plain(tmp_path, weights | ({"first.weight": torch.rand(9, 7)} if file == "one" else {}), f"{file}.safetensors")

    alone = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is gone: it would be, were it larger
    words = [sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path)]
    each, whole = map(int, subprocess.run(words, env=alone, check=True, capture_output=True, text=True).stdout.split())
    assert each < 4 * largest < 0.9 * whole


# What is refused.


def header(path: Path, change: Callable[[dict[str, Any]], Any], body: int | None = None) -> None:
    """Write a file's header anew, and of its values only so many bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    content = json.loads(data[8 : 8 + length])
    content = change(content) or content
    text = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :][:body])


def put(name: str, **facts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[name].update(facts)


LIES = {
    "has a.weight at bytes 0 to 8,000 of 160": put("a.weight", data_offsets=[0, 8000], shape=[40, 50]),
    "has a.weight as F32 of shape [4, 50], 800 bytes, and gives it 80": put("a.weight", shape=[4, 50]),
    "has a.weight as F64 of shape [4, 5], 160 bytes, and gives it 80": put("a.weight", dtype="F64"),
    "has a.weight of shape [-4, -5] at 0 to 80, which is no place": put("a.weight", shape=[-4, -5]),
    "has a.weight of shape [4, 5] at -80 to 0, which is no place": put("a.weight", data_offsets=[-80, 0]),
    "has a.weight at bytes 80 to 0 of 160: outside the file": put("a.weight", data_offsets=[80, 0]),
    "has a.weight of shape [4.0, 5] at": put("a.weight", shape=[4.0, 5]),
    "has b.weight and a.weight in the same bytes": put("b.weight", data_offsets=[40, 120]),
    "holds a.weight as 'Q3', a dtype that sarac does not know": put("a.weight", dtype="Q3"),
    "holds a.weight as [], a dtype that sarac does not know": put("a.weight", dtype=[]),
    "does not say where a.weight lies": lambda content: {**content, "a.weight": {"dtype": "F32"}},
    "its header is a JSON list": lambda content: [1],
}


def two(folder: Path) -> Path:
    return plain(folder, {"a.weight": torch.randn(4, 5), "b.weight": torch.randn(4, 5)}) / "model.safetensors"


@pytest.mark.parametrize("said", LIES)
def test_header_that_lies_is_told(said: str, tmp_path: Path) -> None:
    path = two(tmp_path / "lies")
    header(path, lambda content: None)
    assert len(sarac.analyze(path).sites) == 2
    header(path, LIES[said])
    with pytest.raises(CheckpointError) as told:
        sarac.analyze(path.parent)
    assert said in str(told.value)
    assert str(told.value).startswith(f"{path} ")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-8], "has b.weight at bytes 80 to 160 of 152: outside the file"),
        (lambda data: data[:40], "it has 40 bytes, and a header of"),
        (lambda data: data[:3], "it has 3 bytes"),
        (lambda data: b"", "it has 0 bytes"),
        (lambda data: b"\xff" * 64, "and a header of 18,446,744,073,709,551,615"),
        (lambda data: data[:8] + b"?" * (len(data) - 8), "its header is no JSON"),
    ],
)
def test_truncated_or_foreign_file_is_told(damage: Callable[[bytes], bytes], said: str, tmp_path: Path) -> None:
    path = two(tmp_path / "cut")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError) as told:
        sarac.analyze(path.parent)
    assert said in str(told.value)


def test_file_that_becomes_shorter_meanwhile_is_told(tmp_path: Path) -> None:
    path = two(tmp_path / "shrinks")
    read = Folder.at(path)
    assert read is not None
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"ends within b\.weight, 1 bytes too early"):
        read.analyze(0.6, None)


def index(folder: Path, places: Any) -> None:
    (folder / INDEX).write_text(json.dumps(places))


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (
            {"weight_map": {"a.weight": "gone.safetensors"}},
            "gone.safetensors is missing, which model.safetensors.index",
        ),
        ({"weight_map": {"c.weight": "model.safetensors"}}, "has c.weight in model.safetensors, which lacks it"),
        ({"weight_map": {"a.weight": "../cut.safetensors"}}, "has a.weight in '../cut.safetensors', outside the folder"),
        ({"weight_map": {"a.weight": 3}}, "is no index of safetensors"),
        ({"weights": {}}, "is no index of safetensors"),
        ([], "is no index of safetensors"),
    ],
)
def test_index_that_lies_is_told(places: Any, said: str, tmp_path: Path) -> None:
    path = two(tmp_path / "indexed")
    index(path.parent, {"weight_map": {"a.weight": path.name}})
    assert list(sarac.analyze(path.parent).ranks()) == ["a.weight"]
    index(path.parent, places)
    with pytest.raises(CheckpointError) as told:
        sarac.analyze(path.parent)
    assert said in str(told.value)


def test_tensor_in_two_files_without_an_index_is_told(tmp_path: Path) -> None:
    two(tmp_path / "copies").rename(tmp_path / "copies/a.safetensors")
    plain(tmp_path / "copies", {"a.weight": torch.randn(4, 5)}, "b.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors and b\.safetensors of .* both hold a\.weight"):
        sarac.analyze(tmp_path / "copies")


def test_folders_without_weights_are_told(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="is empty: name a folder"):
        sarac.analyze(empty)
    (empty / "notes.txt").write_text("nothing")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors and no config\.json"):
        sarac.analyze(empty)
    torch.save({}, empty / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin and no safetensors: it is a pickle"):
        sarac.analyze(empty)
    with pytest.raises(PlanError, match=r"holds no linear weight\. x\.bias: no weight of a layer, by its name\."):
        sarac.analyze(plain(tmp_path / "biases", {"x.bias": torch.ones(2, 2)}))


def test_adapters_alone_are_told(tmp_path: Path) -> None:
    adapted = sarac.transform(llama())
    sarac.save_adapter(adapted, tmp_path / "sara.safetensors")
    with pytest.raises(CheckpointError, match=r"holds adapters of sarac's alone: name the model"):
        sarac.analyze(tmp_path / "sara.safetensors")
    sarac.backends.peft.save(adapted, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="holds PEFT adapters alone: name the model"):
        sarac.analyze(tmp_path / "lora")


def test_nan_in_a_file_is_told_with_its_name(tmp_path: Path) -> None:
    folder = plain(tmp_path / "nan", {"a.weight": torch.full((3, 4), torch.nan), "b.weight": torch.randn(3, 5)})
    with pytest.raises(sarac.SpectrumError, match=r"a\.weight contains NaN"):
        sarac.analyze(folder)
    assert len(sarac.analyze(folder, where="b.*").sites) == 1


def test_refinement_reads_the_file_again(tmp_path: Path) -> None:
    weight = torch.randn(20, 30)
    found = sarac.analyze(plain(tmp_path / "fine", {"a.weight": weight})).spectrum("a.weight")
    assert found.refine is not None
    exact = found.refine("asked")
    assert (exact.how, exact.note) == ("svd", "asked")
    torch.testing.assert_close(exact.values, torch.linalg.svdvals(weight.double()))
    (tmp_path / "fine/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read at a\.weight"):
        found.refine("asked")
