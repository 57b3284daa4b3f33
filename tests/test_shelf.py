"""Several adapters for one model: loaded and swapped in place, and none of them lost on the way."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from zoo import TRANSFORMERS, Shared, close, differ, ids, mlp, outputs, same, shake, trainables

import sarac
from sarac.checkpoint import read_model, write_model
from sarac.ir.record import shelf_of

METHODS: dict[str, dict[str, Any]] = {
    "sara": {},
    "factors": {"plan": "rank:2,train=factors"},
    "random": {"plan": "rank:2,train=factors,init=random"},
    "mosara": {"method": "mosara"},
    "bottleneck": {"plan": "rank:3,router=topk:2,bottleneck=2", "method": "mosara"},
    "whole": {"also_train": "*bias"},
}


class Pair:
    """A base, the files of two adapters of one plan on it, and what each gives for `x`."""

    def __init__(self, folder: Path, base: nn.Module | None = None, *, factors: bool = False, **choice: Any) -> None:
        self.base, self.x = base or mlp(6, 8, 4), torch.randn(5, 6).to(next((base or mlp(1, 1)).parameters()).dtype)
        self.folder = folder
        made = {name: shake(sarac.transform(self.base, **choice)) for name in "ab"}
        for name, adapted in made.items():
            sarac.save_adapter(adapted, folder / name, factors=factors)
        self.expected = {name: outputs(model, self.x) for name, model in {**made, "base": self.base}.items()}

    def loaded(self) -> nn.Module:
        """Both by name, b live."""
        model = sarac.load_adapter(self.base, self.folder / "a", name="a")
        assert sarac.load_adapter(model, self.folder / "b", name="b") is model
        return model

    def check(self, model: nn.Module, name: str) -> None:
        """The model gives to the last bit what this adapter does, and not what the others do."""
        found = outputs(model, self.x)
        same(found, self.expected[name])
        for other in self.expected.keys() - {name}:
            differ(found.float(), self.expected[other].float())


def identity(model: nn.Module) -> list[Any]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, id(t), t.data_ptr(), t.requires_grad, t.dtype, t.device) for name, t in named]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_swapped_in_place_to_the_last_bit(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pair = Pair(tmp_path, mlp(6, 8, 4).to(dtype), **METHODS[method])
    model = sarac.load_adapter(pair.base, tmp_path / "a", name="a")
    assert sarac.adapters(model) == ("a",)
    before, names = identity(model), set(model.state_dict())
    assert sarac.load_adapter(model, tmp_path / "b", name="b") is model
    assert sarac.adapters(model) == ("b", "a")
    for name in "babba":
        sarac.use(model, name)
        pair.check(model, name)
        assert sarac.adapters(model)[0] == name
        assert identity(model) == before
    assert set(model.state_dict()) == names
    with sarac.disabled(model):
        if method != "whole":
            same(outputs(model, pair.x), pair.expected["base"])


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_real_model_takes_a_second_adapter(kind: str, tmp_path: Path) -> None:
    base, token = TRANSFORMERS[kind](), ids()
    adapted = [shake(sarac.transform(base)) for _ in range(2)]
    expected = [outputs(model, token)[0] for model in adapted]
    sarac.save_adapter(adapted[1], tmp_path / "b")
    model = sarac.load_adapter(adapted[0], tmp_path / "b", name="b")
    same(outputs(model, token)[0], expected[1])
    assert sarac.adapters(model) == ("b", "default")
    sarac.use(model, "default")
    same(outputs(model, token)[0], expected[0])
    differ(*expected)


def test_two_modules_of_one_weight_are_swapped_together(tmp_path: Path) -> None:
    pair = Pair(tmp_path, Shared(6))
    model = pair.loaded()
    pair.check(model, "b")
    sarac.use(model, "a")
    pair.check(model, "a")


def test_what_is_trained_meanwhile_is_kept(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    model = pair.loaded()
    trained = outputs(shake(model), pair.x)
    differ(trained, pair.expected["b"])
    sarac.use(model, "a")
    pair.check(model, "a")
    sarac.use(model, "b")
    same(outputs(model, pair.x), trained)


def test_without_a_name_the_live_one_is_replaced(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    model = pair.loaded()
    sarac.load_adapter(model, tmp_path / "a")
    assert sarac.adapters(model) == ("b", "a")
    pair.check(model, "a")
    sarac.load_adapter(model, tmp_path / "b", name="a")  # one that waits, and comes alive by it
    assert sarac.adapters(model) == ("a", "b")
    pair.check(model, "b")
    sarac.use(model, "b")
    pair.check(model, "a")


@pytest.mark.parametrize("method", ["sara", "factors", "mosara", "whole"])
def test_a_compiled_model_is_swapped_without_compiling_again(method: str, tmp_path: Path) -> None:
    pair = Pair(tmp_path, **METHODS[method])
    model = sarac.load_adapter(pair.base, tmp_path / "a", name="a")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    close(outputs(compiled, pair.x), pair.expected["a"])
    assert counter.frame_count == 1
    sarac.load_adapter(model, tmp_path / "b", name="b")
    for name in "bab":
        sarac.use(model, name)
        close(outputs(compiled, pair.x), pair.expected[name])
    assert counter.frame_count == 1
    compiled(torch.randn(9, 6))
    assert counter.frame_count == 2  # another shape is another graph: the counter counts


def test_an_optimiser_goes_on_with_the_adapter_that_is_live(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    model = pair.loaded()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=sarac.recommended_lr(model))

    def step() -> None:
        model(pair.x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    sarac.use(model, "a")
    pair.check(model, "a")
    step()
    differ(outputs(model, pair.x), pair.expected["a"])
    after = outputs(model, pair.x)
    sarac.use(model, "b")
    differ(outputs(model, pair.x), pair.expected["b"])
    sarac.use(model, "a")
    same(outputs(model, pair.x), after)


def test_copies_have_their_own_shelf_and_folding_forgets_it(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    model = pair.loaded()
    copied = copy.deepcopy(model)
    merged = sarac.fold(model)
    close(outputs(merged, pair.x), pair.expected["b"])
    assert "_sarac_shelf" not in merged.__dict__
    shake(model)
    sarac.use(model, "a")
    assert sarac.adapters(copied) == ("b", "a")
    pair.check(copied, "b")
    sarac.use(copied, "a")
    pair.check(copied, "a")
    sarac.use(copied, "b")
    pair.check(copied, "b")


# Files.


@pytest.mark.parametrize("method", METHODS)
def test_a_model_pt_has_all_adapters(method: str, tmp_path: Path) -> None:
    pair = Pair(tmp_path, **METHODS[method])
    sarac.save(pair.loaded(), tmp_path / "model.pt")
    found = sarac.load(tmp_path / "model.pt", pair.base)
    assert sarac.adapters(found) == ("b", "a")
    for name in "aba":
        sarac.use(found, name)
        pair.check(found, name)


def test_one_adapter_without_a_name_leaves_no_shelf_in_the_file(tmp_path: Path) -> None:
    base = mlp(6, 8, 4)
    model = sarac.transform(base)
    sarac.save(model, tmp_path / "one.pt")
    assert not read_model(tmp_path / "one.pt").shelf
    assert sarac.adapters(sarac.load(tmp_path / "one.pt", base)) == ("default",)
    sarac.save_adapter(model, tmp_path / "a")
    sarac.save(sarac.load_adapter(base, tmp_path / "a", name="mine"), tmp_path / "named.pt")
    assert sarac.adapters(sarac.load(tmp_path / "named.pt", base)) == ("mine",)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda shelf: shelf["others"]["a"].pop("trained"), "damaged shelf"),
        (lambda shelf: shelf["others"]["a"]["trained"].pop("0.weight"), r"shift of 0\.weight is missing there"),
        (lambda shelf: shelf["others"]["a"]["trained"]["2.weight"].update(shift=torch.ones(1)), r"shift of 2\.weight is \(1,\)"),
        (lambda shelf: shelf["others"]["a"].update(frozen=3), "damaged shelf"),
        (lambda shelf: shelf["others"]["a"].update(further={"0.bias": torch.ones(8)}), r"0\.bias of also_train"),
    ],
)
def test_a_damaged_shelf_is_a_sentence(damage: Any, said: str, tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    sarac.save(pair.loaded(), tmp_path / "model.pt")
    saved = read_model(tmp_path / "model.pt")
    damage(saved.shelf)
    write_model(tmp_path / "bad.pt", saved)
    with pytest.raises(sarac.CheckpointError, match=said):
        sarac.load(tmp_path / "bad.pt", pair.base)


@pytest.mark.parametrize("method", METHODS)
def test_any_adapter_is_saved_alone(method: str, tmp_path: Path) -> None:
    pair = Pair(tmp_path, **METHODS[method])
    model = pair.loaded()
    sarac.save_adapter(model, tmp_path / "live")
    sarac.save_adapter(model, tmp_path / "waiting", name="a")
    pair.check(model, "b")
    pair.check(sarac.load_adapter(pair.base, tmp_path / "waiting"), "a")
    pair.check(sarac.load_adapter(pair.base, tmp_path / "live"), "b")
    with pytest.raises(sarac.RewriteError, match="no adapter 'c'"):
        sarac.save_adapter(model, tmp_path / "x", name="c")


def test_a_folder_of_save_pretrained_says_what_stays_behind(tmp_path: Path) -> None:
    base: Any = TRANSFORMERS["llama"]()
    model: Any = shake(sarac.transform(base))
    sarac.save_adapter(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", sarac.SaracWarning)
        model.save_pretrained(tmp_path / "one")
    sarac.load_adapter(model, tmp_path / "a", name="b")
    with pytest.warns(sarac.SaracWarning, match=r"live adapter 'b' alone, not default"):
        model.save_pretrained(tmp_path / "two")
    assert sarac.adapters(sarac.load(tmp_path / "two")) == ("default",)


# Factors that are not those in the model.


def turned(base: nn.Module, x: Tensor, seed: int) -> tuple[nn.Module, Tensor]:
    """An adapter whose frozen factors are of its own: the first two directions of each site change places."""
    torch.manual_seed(seed)
    model = shake(sarac.transform(base, "rank:3"))
    for layer in (model[0], model[2]):
        for tensor in (layer.sara_u.T, layer.sara_v, layer.sara_scale):
            tensor.data[[0, 1]] = tensor.data[[1, 0]].clone()
    return model, outputs(model, x)


@pytest.mark.parametrize("through_file", [False, True])
def test_frozen_factors_of_a_file_come_and_go_with_it(through_file: bool, tmp_path: Path) -> None:
    pair = Pair(tmp_path, plan="rank:3")
    for seed, name in enumerate("cd"):
        other, pair.expected[name] = turned(pair.base, pair.x, seed)
        sarac.save_adapter(other, tmp_path / name, factors=True)
    model = pair.loaded()
    assert shelf_of(model).others["a"].frozen is shelf_of(model).live  # nothing is stored twice
    before = identity(model)
    for name in "cd":
        sarac.load_adapter(model, tmp_path / name, name=name)
        pair.check(model, name)
        assert shelf_of(model).live.tensors is None  # the parameters hold it
    assert identity(model) == before
    if through_file:
        sarac.save(model, tmp_path / "model.pt")
        model = sarac.load(tmp_path / "model.pt", pair.base)
    for name in "acbdabcad":
        sarac.use(model, name)
        pair.check(model, name)
    sarac.save_adapter(model, tmp_path / "c again", factors=True, name="c")
    pair.check(sarac.load_adapter(pair.base, tmp_path / "c again"), "c")


def test_a_cast_base_takes_files_with_factors(tmp_path: Path) -> None:
    pair = Pair(tmp_path, factors=True)
    cast = copy.deepcopy(pair.base).to(torch.bfloat16)
    model = sarac.load_adapter(cast, tmp_path / "a", name="a")
    expected = outputs(model, pair.x.bfloat16())
    sarac.load_adapter(model, tmp_path / "b", name="b")
    assert shelf_of(model).others["a"].frozen is shelf_of(model).live
    close(outputs(model, pair.x.bfloat16()).float(), pair.expected["b"], torch.bfloat16)
    sarac.use(model, "a")
    same(outputs(model, pair.x.bfloat16()), expected)


# Refused.


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"plan": "rank:2"}, {"plan": "rank:3"}, r"0\.weight has rank=3 there and rank=2 here"),
        ({"plan": "rank:2"}, {"plan": "rank:2", "where": "2.*"}, r"0\.weight has no adapter there and method=sara, rank=2, "),
        ({"plan": "rank:2", "where": "2.*"}, {"plan": "rank:2"}, r"0\.weight has method=sara, rank=2, .* there and no adapter"),
        ({"plan": "rank:2"}, {"plan": "rank:2", "method": "mosara"}, "method=mosara, sets=5, .* there and method=sara"),
        ({"plan": "rank:2"}, {"plan": "rank:2,train=factors"}, "train=factors there and train=singular_values here"),
        ({}, {"also_train": "0.bias"}, r"0\.bias is trained whole there and not here"),
        ({"also_train": "0.bias"}, {}, r"0\.bias is trained whole here and not there"),
    ],
)
def test_another_plan_is_refused_by_its_first_difference(first: Any, second: Any, said: str, tmp_path: Path) -> None:
    base = mlp(6, 8, 4)
    model, x = shake(sarac.transform(base, **first)), torch.randn(3, 6)
    before = outputs(model, x)
    sarac.save_adapter(shake(sarac.transform(base, **second)), tmp_path / "b")
    with pytest.raises(sarac.CheckpointError, match=said):
        sarac.load_adapter(model, tmp_path / "b", name="b")
    assert sarac.adapters(model) == ("default",)
    same(outputs(model, x), before)


def test_another_base_is_refused_unless_forced(tmp_path: Path) -> None:
    pair = Pair(tmp_path, plan="rank:2")
    model = sarac.transform(mlp(6, 8, 4), "rank:2")
    with pytest.raises(sarac.CheckpointError, match="trained on another base"):
        sarac.load_adapter(model, tmp_path / "a", name="a")
    assert sarac.adapters(model) == ("default",)
    with pytest.warns(sarac.SaracWarning, match="by force"):
        sarac.load_adapter(model, tmp_path / "a", name="a", force=True)
    assert sarac.adapters(model) == ("a", "default")
    assert pair.base is not model


def test_unknown_names_and_other_models_get_a_sentence(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    model = pair.loaded()
    sarac.load_adapter(model, tmp_path / "a", name="poet")
    with pytest.raises(sarac.RewriteError, match=r"no adapter 'poets'\. Near names: poet\..*name='poets'"):
        sarac.use(model, "poets")
    assert sarac.adapters(model) == ("poet", "a", "b")
    for call in (sarac.adapters, lambda plain: sarac.use(plain, "a")):
        with pytest.raises(sarac.RewriteError, match="carries no adapters: transform it first"):
            call(pair.base)
        with pytest.raises(sarac.RewriteError, match=r"the adapted model in it, `\._orig_mod`"):
            call(torch.compile(model, backend="eager"))
    with pytest.raises(sarac.RewriteError, match=r"the adapted model in it, `\.0`"):
        sarac.load_adapter(nn.Sequential(model), tmp_path / "a", name="c")


def test_a_plain_model_has_nothing_to_switch_off(tmp_path: Path) -> None:
    with pytest.raises(sarac.RewriteError, match="carries no adapters to switch off"), sarac.disabled(mlp(6, 4)):
        pass
    pair = Pair(tmp_path)
    with sarac.disabled(nn.Sequential(model := pair.loaded())):
        same(outputs(model, pair.x), pair.expected["base"])
    pair.check(model, "b")


def test_a_state_dict_is_that_of_the_live_one(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    model = pair.loaded()
    state = copy.deepcopy(model.state_dict())
    sarac.use(model, "a")
    model.load_state_dict(state)
    pair.check(model, "b")
    assert trainables(model) == {"0.sara_shift", "2.sara_shift"}
