"""Files: bit-exact there and back for every kind of model, and a sentence for whatever does not fit or cannot be read."""

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import CALLS, Own, Shared, bert, close, differ, gpt2, ids, llama, mlp, outputs, same, shake, t5, trainables

import sarac
from sarac import CheckpointError, PlanError, RewriteError
from sarac.ir.inputs import Inputs, InputSpec
from sarac.ir.record import FOLDER_FILE, inputs_of, record_of
from sarac.recipe import from_factory

FACTORY = "zoo:mlp"
METHODS = {
    "values": {},
    "svd factors": {"plan": "rank:2,train=factors"},
    "random factors": {"plan": "rank:2,train=factors,init=random"},
    "routed": {"method": "mosara"},
    "bottleneck": {"plan": "rank:3,sets=2,bottleneck=2", "method": "mosara"},
}


def plain() -> nn.Sequential:
    return mlp(6, 8, 5)


def functional() -> nn.Sequential:
    return nn.Sequential(Own("at", 8, 6), nn.BatchNorm1d(8), Own("addmm_mT", 5, 8)).eval()


def root() -> nn.Module:
    """A module whose own parameter is adapted: its adapters have no path."""
    return Own("matmul", 5, 6).eval()


def factory_made() -> nn.Module:
    return from_factory("zoo:llama", {})


class Custom(transformers.LlamaForCausalLM):
    """A model class that transformers itself does not have."""


def custom() -> Custom:
    return Custom(llama().config).eval()


VECTORS = {"plain": plain, "functional": functional, "root": root}
TOKENS = {"llama": llama, "bert": bert, "gpt2": gpt2}
# What the file of each needs beside itself.
GIVEN: dict[str, Callable[[], Any]] = dict(VECTORS)


def call(name: str) -> Inputs:
    if name in VECTORS or name == "shared":
        return Inputs.of(torch.randn(3, 6))
    return Inputs.of({"input_ids": ids()})


def trained(model: nn.Module, **choice: Any) -> nn.Module:
    return shake(sarac.transform(model, **choice)).eval()


def result(model: nn.Module, inputs: Inputs) -> Any:
    return outputs(model, *inputs.args, **inputs.kwargs)


def stored(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def require_same_model(found: nn.Module, model: nn.Module) -> None:
    """Names, bits, dtypes, ties, flags, plan: all that a model is but its mode."""
    ours, theirs = stored(found), stored(model)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(ours[name], tensor), name
    ties = [{n for n, t in one.items() if t is one[name]} for one in (ours, theirs) for name in theirs]
    assert ties[: len(theirs)] == ties[len(theirs) :]
    assert [type(m).__name__ for m in found.modules()] == [type(m).__name__ for m in model.modules()]
    mine, its = record_of(found), record_of(model)
    assert (mine is None) == (its is None)
    if mine is not None and its is not None:
        assert mine.plan.sites == its.plan.sites
        assert mine.plan.also_train == its.plan.also_train
        assert mine.trained_before == its.trained_before


def round_trip(model: nn.Module, folder: Path, given: Any = None) -> nn.Module:
    sarac.save(model, folder / "model.pt")
    return sarac.load(folder / "model.pt", given)


# --- model.pt, there and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*VECTORS, "llama"])
def test_saved_model_comes_back_to_the_bit(name: str, method: str, tmp_path: Path) -> None:
    base = (VECTORS | TOKENS)[name]()
    model, inputs = trained(base, **METHODS[method]), call(name)
    found = round_trip(model, tmp_path, GIVEN.get(name, lambda: None)())
    require_same_model(found, model)
    same(result(found, inputs), result(model, inputs))
    differ(result(found, inputs), result(base, inputs))
    with sarac.disabled(found):
        same(result(found, inputs), result(base, inputs))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_transformers_come_back_by_their_recipe(name: str, tmp_path: Path) -> None:
    base, inputs = TOKENS[name](), call(name)
    model = trained(base)
    found = round_trip(model, tmp_path)
    assert type(found) is type(model)
    assert found.config.to_dict() == model.config.to_dict()
    require_same_model(found, model)
    same(result(found, inputs), result(model, inputs))


def test_generation_settings_travel(tmp_path: Path) -> None:
    model = trained(llama())
    model.generation_config.max_new_tokens = 3
    model.generation_config.pad_token_id = 2
    found = round_trip(model, tmp_path)
    assert found.generation_config.max_new_tokens == 3
    start = ids(1, 4)
    same(found.generate(start, do_sample=False), model.generate(start, do_sample=False))


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("adapt", [False, True])
def test_attention_that_was_chosen_travels(build: Callable[[], Any], adapt: bool, tmp_path: Path) -> None:
    model = build()
    model.set_attn_implementation("eager")
    model = trained(model) if adapt else model
    found = round_trip(model, tmp_path)
    assert found.config._attn_implementation == "eager"
    assert round_trip(build(), tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("adapt", [False, True])
def test_dtypes_travel_in_buffers_too(dtype: torch.dtype, adapt: bool, tmp_path: Path) -> None:
    # A cast reaches Llama's rotary frequencies, which no state dict has; rebuilt, they would be float32 again.
    model = llama().to(dtype)
    model = trained(model) if adapt else model
    found = round_trip(model, tmp_path)
    assert found.model.rotary_emb.inv_freq.dtype == dtype
    require_same_model(found, model)
    inputs = call("llama")
    same(result(found, inputs), result(model, inputs))


def test_tied_head_stays_tied(tmp_path: Path) -> None:
    model = trained(llama(), also_train="model.embed_tokens.weight")
    found = round_trip(model, tmp_path)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    require_same_model(found, model)
    adapted_tie = trained(llama(), where="lm_head.weight")
    again = round_trip(adapted_tie, tmp_path)
    require_same_model(again, adapted_tie)
    inputs = call("llama")
    same(result(again, inputs), result(adapted_tie, inputs))


def test_weight_of_two_modules_is_one_again(tmp_path: Path) -> None:
    model = trained(Shared(6))
    found = round_trip(model, tmp_path, Shared(6))
    require_same_model(found, model)
    assert found.first.sara_shift is found.second.sara_shift


def test_what_trained_whole_travels(tmp_path: Path) -> None:
    base = functional()
    model = trained(base, also_train=["1.*", "2.b"])
    assert {"1.weight", "1.bias", "2.b"} < trainables(model)
    found = round_trip(model, tmp_path, functional())
    require_same_model(found, model)
    assert not torch.equal(found.get_parameter("2.b"), base.get_parameter("2.b"))


@pytest.mark.parametrize("name", [*VECTORS, "llama"])
def test_plain_model_travels_with_its_flags(name: str, tmp_path: Path) -> None:
    model = (VECTORS | TOKENS)[name]()
    next(model.parameters()).requires_grad_(False)
    found = round_trip(model, tmp_path, GIVEN.get(name, lambda: None)())
    assert record_of(found) is None
    require_same_model(found, model)


def test_flags_from_before_the_surgery_come_back_at_the_fold(tmp_path: Path) -> None:
    base = plain()
    base[2].bias.requires_grad_(False)
    merged = sarac.fold(round_trip(trained(base), tmp_path, plain()))
    assert trainables(merged) == trainables(base) == {"0.weight", "0.bias", "2.weight"}


def test_running_statistics_travel(tmp_path: Path) -> None:
    model = sarac.transform(functional()).train()
    before = model[1].running_mean.clone()
    model(torch.randn(9, 6) + 3)
    found = round_trip(model, tmp_path, functional())
    assert not torch.equal(found[1].running_mean, before)
    assert torch.equal(found[1].running_mean, model[1].running_mean)
    assert int(found[1].num_batches_tracked) == 1


def test_file_holds_tensors_and_json_alone(tmp_path: Path) -> None:
    sarac.save(trained(llama()), tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    for entry in ("recipe", "plan", "flags"):
        json.loads(content[entry])
    assert json.loads(content["recipe"])["class"] == "LlamaForCausalLM"
    assert all(isinstance(t, Tensor) for t in content["base"].values())
    assert not any("sara" in name for name in content["base"])
    assert set(content["adapters"]) == set(json.loads(content["plan"])["sites"])


def test_saving_leaves_nothing_else(tmp_path: Path) -> None:
    sarac.save(plain(), tmp_path / "a.pt")
    sarac.save_adapter(trained(plain()), tmp_path / "b.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.safetensors"]


# --- recipes --------------------------------------------------------------------------------------------------------------


def test_factory_must_be_named_again(tmp_path: Path) -> None:
    model = trained(factory_made())
    sarac.save(model, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"zoo:llama.*must not run by itself"):
        sarac.load(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="zoo:llama"):
        sarac.load(tmp_path / "model.pt", model="zoo:bert")
    found = sarac.load(tmp_path / "model.pt", model="zoo:llama")
    require_same_model(found, model)


def test_recipe_outlives_surgery_and_files(tmp_path: Path) -> None:
    model = factory_made()
    for _ in range(2):
        model = sarac.fold(trained(model))
        sarac.save(model, tmp_path / "model.pt")
        model = sarac.load(tmp_path / "model.pt", model="zoo:llama")
    require_same_model(sarac.load(tmp_path / "model.pt", model="zoo:llama"), model)


def test_module_of_memory_must_be_given(tmp_path: Path) -> None:
    sarac.save(trained(plain()), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"built in memory.*load\(path, model=module\)"):
        sarac.load(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="does not fit Sequential"):
        sarac.load(tmp_path / "model.pt", model="zoo:mlp")


@pytest.mark.parametrize(
    ("other", "said"), [(mlp(6, 8), "2.bias"), (mlp(6, 9, 5), r"\(8,\)|\(8, 6\)"), (llama(), "names differ")]
)
def test_module_that_does_not_fit_is_refused(other: nn.Module, said: str, tmp_path: Path) -> None:
    sarac.save(trained(plain()), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=said):
        sarac.load(tmp_path / "model.pt", model=other)


def test_module_that_does_not_fit_is_not_touched(tmp_path: Path) -> None:
    sarac.save(trained(mlp(6, 8, 5)), tmp_path / "model.pt")
    other = mlp(6, 8, 4)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError):
        sarac.load(tmp_path / "model.pt", model=other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_class_that_transformers_does_not_have_is_given(tmp_path: Path) -> None:
    model = trained(custom())
    with pytest.raises(CheckpointError, match="built in memory"):
        round_trip(model, tmp_path)
    require_same_model(round_trip(model, tmp_path, custom()), model)


def test_model_that_was_changed_after_it_was_built_is_given(tmp_path: Path) -> None:
    model = llama()
    model.extra = nn.Linear(16, 16)
    with pytest.raises(CheckpointError, match=r"extra.*model=module"):
        round_trip(trained(model), tmp_path)


# --- going on -------------------------------------------------------------------------------------------------------------


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.ones(2, 6)).square().mean().backward()
    optimizer.step()


def test_loaded_model_goes_on_training_as_the_saved_one(tmp_path: Path) -> None:
    model = trained(plain())
    found = round_trip(model, tmp_path, plain())
    for one in (model, found):
        step(one)
    require_same_model(found, model)
    x = torch.randn(2, 6)
    differ(outputs(found, x), outputs(sarac.load(tmp_path / "model.pt", plain()), x))


def test_low_rate_is_told_after_loading_too(tmp_path: Path) -> None:
    found = round_trip(trained(plain()), tmp_path, plain())
    found(torch.ones(2, 6)).sum().backward()
    optimizer = torch.optim.SGD([p for p in found.parameters() if p.requires_grad], lr=1e-5)
    with pytest.warns(sarac.SaracWarning, match="recommended_lr"):
        optimizer.step()


@pytest.mark.parametrize("adapt", [False, True])
def test_loaded_model_exports_without_inputs(adapt: bool, tmp_path: Path) -> None:
    model = trained(plain()) if adapt else plain()
    sarac.save(model, tmp_path / "model.pt", example_inputs=torch.randn(2, 6))
    found = sarac.load(tmp_path / "model.pt", plain())
    report = sarac.export(found, tmp_path / "model.onnx")
    assert report.path.is_file()
    assert report.merged is adapt


@pytest.mark.parametrize("adapt", [False, True])
def test_input_spec_goes_through_every_step(adapt: bool, tmp_path: Path) -> None:
    spec = InputSpec.parse(["x:float32[3,6]"])
    model = trained(plain()) if adapt else plain()
    assert inputs_of(model) == ""
    sarac.save(model, tmp_path / "one.pt", example_inputs=spec)
    found = sarac.load(tmp_path / "one.pt", plain())
    sarac.save(found, tmp_path / "two.pt")
    again = sarac.load(tmp_path / "two.pt", plain())
    last = sarac.fold(again) if adapt else sarac.transform(again)
    assert InputSpec.from_json(inputs_of(last)) == spec


def test_transform_keeps_the_inputs_it_was_given() -> None:
    model = sarac.transform(plain(), example_inputs=torch.randn(4, 6))
    assert InputSpec.from_json(inputs_of(model)).tensors[0].shape == (4, 6)
    assert inputs_of(sarac.transform(plain())) == ""


# --- adapter files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_adapter_comes_back_to_the_bit(method: str, factors: bool, tmp_path: Path) -> None:
    base, x = functional(), torch.randn(4, 6)
    model = trained(base, also_train="1.weight", **METHODS[method])
    sarac.save_adapter(model, tmp_path / "a.safetensors", factors=factors)
    found = sarac.load_adapter(base, tmp_path / "a.safetensors").eval()
    require_same_model(found, model)
    same(outputs(found, x), outputs(model, x))
    differ(outputs(found, x), outputs(base, x))


@pytest.mark.parametrize("build", [llama, gpt2, lambda: llama().to(torch.bfloat16)])
@pytest.mark.parametrize("factors", [False, True])
def test_adapter_of_a_transformer(build: Callable[[], nn.Module], factors: bool, tmp_path: Path) -> None:
    base, inputs = build(), call("llama")
    model = trained(base, method="mosara", also_train="*norm*" if hasattr(base, "model") else "*ln_1*")
    sarac.save_adapter(model, tmp_path / "a.safetensors", factors=factors)
    found = sarac.load_adapter(base, tmp_path / "a.safetensors").eval()
    require_same_model(found, model)
    same(result(found, inputs), result(model, inputs))


def test_adapter_holds_what_trains_and_says_what_it_is(tmp_path: Path) -> None:
    model = trained(plain(), also_train="2.bias")
    sizes = []
    for factors in (False, True):
        path = tmp_path / f"{factors}.safetensors"
        sarac.save_adapter(model, path, factors=factors)
        sizes.append(set(load_file(path)))
    assert sizes[0] == {
        "0.weight.sara_shift",
        "0.weight.sara_scale",
        "2.weight.sara_shift",
        "2.weight.sara_scale",
        "also_train.2.bias",
    }
    assert sizes[1] - sizes[0] == {f"{i}.weight.sara_{role}" for i in (0, 2) for role in "uv"}
    with safe_open(tmp_path / "True.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["parametrisation"] == "relative"
    assert set(json.loads(metadata["base"])) == {"float32", "bfloat16", "float16"}
    assert sarac.Plan.from_json(metadata["plan"]).sites == record_of(model).plan.sites


def test_source_of_an_adapter_stays_plain(tmp_path: Path) -> None:
    base = plain()
    sarac.save_adapter(trained(base, also_train="2.bias"), tmp_path / "a.safetensors")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    sarac.load_adapter(base, tmp_path / "a.safetensors")
    assert trainables(base) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_other_base_is_refused_unless_forced(tmp_path: Path) -> None:
    base, x = plain(), torch.randn(3, 6)
    model = trained(base)
    sarac.save_adapter(model, tmp_path / "a.safetensors")
    other = plain()
    with pytest.raises(CheckpointError, match=r"another base.*force=True"):
        sarac.load_adapter(other, tmp_path / "a.safetensors")
    with pytest.warns(sarac.SaracWarning, match="by force"):
        found = sarac.load_adapter(other, tmp_path / "a.safetensors", force=True)
    differ(outputs(found, x), outputs(other, x))
    differ(outputs(found, x), outputs(model, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sarac.load_adapter(base, tmp_path / "a.safetensors", force=True)


def test_one_changed_number_makes_another_base(tmp_path: Path) -> None:
    base = plain()
    sarac.save_adapter(trained(base), tmp_path / "a.safetensors")
    with torch.no_grad():
        base[2].weight[0, 0] *= 1 + 1e-6
    with pytest.raises(CheckpointError, match="another base"):
        sarac.load_adapter(base, tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_cast_base_needs_the_factors(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, inputs = llama(), call("llama")
    model = trained(base, **METHODS[method])
    sarac.save_adapter(model, tmp_path / "without.safetensors")
    sarac.save_adapter(model, tmp_path / "with.safetensors", factors=True)
    cast = llama().to(dtype)
    cast.load_state_dict(base.state_dict())
    found = sarac.load_adapter(cast, tmp_path / "with.safetensors").eval()
    close(result(found, inputs).logits, result(model, inputs).logits, dtype)
    differ(result(found, inputs).logits.float(), result(cast, inputs).logits.float())
    assert found.model.layers[0].mlp.up_proj.sara_u.dtype == dtype
    if "factors" in method:  # they train: no file is without them
        same(result(sarac.load_adapter(cast, tmp_path / "without.safetensors").eval(), inputs), result(found, inputs))
        return
    with pytest.raises(CheckpointError, match=f"cast to {str(dtype)[6:]}.*factors=True"):
        sarac.load_adapter(cast, tmp_path / "without.safetensors")


def test_a_plain_model_has_no_adapter_to_save(tmp_path: Path) -> None:
    base = plain()
    sarac.save_adapter(trained(base), tmp_path / "a.safetensors")
    with pytest.raises(RewriteError, match="carries no adapters"):
        sarac.save_adapter(base, tmp_path / "b.safetensors")


def test_adapter_for_other_names_is_refused(tmp_path: Path) -> None:
    sarac.save_adapter(trained(plain()), tmp_path / "a.safetensors")
    with pytest.raises(PlanError, match=r"2\.weight"):
        sarac.load_adapter(mlp(6, 8), tmp_path / "a.safetensors", force=True)


def test_trained_head_of_another_size_is_refused(tmp_path: Path) -> None:
    # The adapted weights are the same, so the hash says nothing; a head of one row would even be broadcast.
    base = plain()
    sarac.save_adapter(trained(base, where="0.weight", also_train="2.*"), tmp_path / "a.safetensors")
    other = plain()
    other.load_state_dict(base.state_dict())
    other[2] = nn.Linear(8, 3)
    with pytest.raises(CheckpointError, match=r"2\.bias as \(5,\).*\(3,\)"):
        sarac.load_adapter(other, tmp_path / "a.safetensors")


# --- files that cannot be read --------------------------------------------------------------------------------------------


def test_pickled_module_is_refused_and_trusted_on_request(tmp_path: Path) -> None:
    model = plain()
    torch.save(model, tmp_path / "pickled.pt")
    with pytest.raises(CheckpointError, match=r"pickled.*trust_pickle=True.*--trust-pickle"):
        sarac.load(tmp_path / "pickled.pt")
    found = sarac.load(tmp_path / "pickled.pt", trust_pickle=True)
    require_same_model(found, model)
    assert not found.training


class Bomb:
    """An object that runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_opening_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"sarac": 1, "recipe": Bomb(mark)}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError):
        sarac.load(tmp_path / "bomb.pt")
    assert not mark.exists()
    with pytest.raises(CheckpointError):
        sarac.load(tmp_path / "bomb.pt", trust_pickle=True)
    assert mark.exists()


def test_trusting_a_model_of_ours_changes_nothing(tmp_path: Path) -> None:
    model = trained(plain())
    sarac.save(model, tmp_path / "model.pt")
    require_same_model(sarac.load(tmp_path / "model.pt", plain(), trust_pickle=True), model)


@pytest.mark.parametrize("trust", [False, True])
def test_pickle_that_holds_no_module_or_cannot_be_opened(trust: bool, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(plain().state_dict(), tmp_path / "state.pt")
    (tmp_path / "lost.pt").write_bytes(pickle.dumps(plain()).replace(b"Sequential", b"Seguential"))
    for name in ("list.pt", "state.pt", "lost.pt", "nowhere.pt"):
        with pytest.raises(CheckpointError, match=name):
            sarac.load(tmp_path / name, trust_pickle=trust)


def test_truncated_file_is_told_wherever_it_ends(tmp_path: Path) -> None:
    sarac.save(trained(plain()), tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    for share in (0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999):
        (tmp_path / "cut.pt").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            sarac.load(tmp_path / "cut.pt", plain())
    (tmp_path / "cut.pt").write_bytes(whole)
    assert record_of(sarac.load(tmp_path / "cut.pt", plain())) is not None


# Two found by chance: an opcode with nothing on its stack, and one without its four bytes.
NOISE = [b"", b"hello\n", b"\x80\x02.", b"\x80\x02X\x01", b"PK\x03\x04 no zip", b"0", b"\x80\x02h\x07.", bytes(range(256)), b"{}"]


@pytest.mark.parametrize("content", NOISE)
@pytest.mark.parametrize("trust", [False, True])
def test_noise_is_told(content: bytes, trust: bool, tmp_path: Path) -> None:
    (tmp_path / "noise.pt").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=r"noise\.pt"):
            sarac.load(tmp_path / "noise.pt", trust_pickle=trust)
        with pytest.raises(CheckpointError, match=r"noise\.pt"):
            sarac.load_adapter(plain(), tmp_path / "noise.pt")


def tampered(path: Path, **entries: Any) -> Path:
    content = torch.load(path, weights_only=True)
    content = {name: value for name, value in {**content, **entries}.items() if value is not None}
    torch.save(content, path.with_name("tampered.pt"))
    return path.with_name("tampered.pt")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"plan": None}, "plan"),
        ({"base": None}, "base"),
        ({"sarac": 99}, "format 99"),
        ({"sarac": None}, "no model.pt of sarac's"),
        ({"parametrisation": "absolute"}, "absolute"),
        ({"recipe": "{"}, "damaged"),
        ({"recipe": 5}, "damaged"),
        ({"plan": "{}"}, "plan"),
        ({"adapters": {}}, r"0\.weight"),
        ({"base": {}}, "lacks"),
    ],
)
def test_damaged_model_is_told(entries: dict[str, Any], said: str, tmp_path: Path) -> None:
    sarac.save(trained(plain()), tmp_path / "model.pt")
    with pytest.raises(sarac.SaracError, match=said):
        sarac.load(tampered(tmp_path / "model.pt", **entries), plain())
    assert record_of(sarac.load(tampered(tmp_path / "model.pt"), plain())) is not None


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> Path:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path.with_name("tampered.safetensors"), metadata=metadata)
    return path.with_name("tampered.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, metadata: metadata.clear(), "no adapter of sarac's"),
        (lambda tensors, metadata: metadata.pop("base"), "damaged"),
        (lambda tensors, metadata: metadata.update(base="{"), "damaged"),
        (lambda tensors, metadata: metadata.update(sarac_adapter="99"), "format 99"),
        (lambda tensors, metadata: metadata.update(parametrisation="absolute"), "absolute"),
        # It would load as an adapter that has learned nothing.
        (lambda tensors, metadata: tensors.pop("0.weight.sara_shift"), r"lacks the shift of 0\.weight"),
        (lambda tensors, metadata: tensors.pop("0.weight.sara_scale"), r"lacks the scale of 0\.weight"),
        (lambda tensors, metadata: tensors.update({"0.weight.sara_shift": torch.zeros(1)}), r"another shift.*0\.weight"),
    ],
)
def test_damaged_adapter_is_told(change: Callable[[Any, Any], Any], said: str, tmp_path: Path) -> None:
    base = plain()
    sarac.save_adapter(trained(base), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=said):
        sarac.load_adapter(base, rewritten(tmp_path / "a.safetensors", change))
    sarac.load_adapter(base, rewritten(tmp_path / "a.safetensors", lambda tensors, metadata: None))


def test_truncated_missing_and_foreign_adapters_are_told(tmp_path: Path) -> None:
    base = plain()
    sarac.save_adapter(trained(base), tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            sarac.load_adapter(base, tmp_path / "cut.safetensors")
    for other in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="not a readable adapter"):
            sarac.load_adapter(base, other)


# --- paths that cannot be written -----------------------------------------------------------------------------------------

SAVERS: dict[str, Callable[[nn.Module, Path], None]] = {"model": sarac.save, "adapter": sarac.save_adapter}


@pytest.mark.parametrize("saver", SAVERS)
def test_unwritable_path_leaves_nothing(saver: str, tmp_path: Path) -> None:
    model = trained(plain())
    with pytest.raises(CheckpointError, match="cannot be written"):
        SAVERS[saver](model, tmp_path / "nowhere" / "x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        SAVERS[saver](model, tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert list((tmp_path / "folder").iterdir()) == []


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")


@pytest.mark.parametrize("saver", SAVERS)
def test_write_that_fails_keeps_the_old_file(saver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(plain())
    SAVERS[saver](model, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    monkeypatch.setattr("torch.save", full_disk)
    monkeypatch.setattr("sarac.checkpoint.save_file", full_disk)
    with pytest.raises(CheckpointError, match="cannot be written: PytorchStreamWriter"):
        SAVERS[saver](shake(model), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# --- folders of save_pretrained -------------------------------------------------------------------------------------------


@pytest.fixture(params=["sara", "mosara"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    model = trained(llama(), method=request.param, also_train="model.norm.weight")
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "folder")
    return model, tmp_path / "folder"


def test_folder_of_an_adapted_model_comes_back_to_the_bit(folder: tuple[Any, Path]) -> None:
    model, path = folder
    found, inputs = sarac.load(path), call("llama")
    same(result(found, inputs), result(model, inputs))
    differ(result(found, inputs).logits, result(llama(), inputs).logits)
    assert trainables(found) == trainables(model)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.generation_config.max_new_tokens == 3
    assert record_of(found).plan.sites == record_of(model).plan.sites


@pytest.mark.parametrize("kind", [transformers.LlamaForCausalLM, transformers.AutoModel, transformers.AutoModelForCausalLM])
def test_folder_of_an_adapted_model_never_opens_as_its_base(folder: tuple[Any, Path], kind: Any) -> None:
    with pytest.raises(Exception, match=r"sarac\.load\(FOLDER\)"):
        kind.from_pretrained(folder[1])


def test_folded_folder_opens_with_transformers(folder: tuple[Any, Path], tmp_path: Path) -> None:
    model = trained(llama())
    merged = sarac.fold(model)
    merged.save_pretrained(tmp_path / "merged")
    found, inputs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), call("llama")
    same(result(found, inputs), result(merged, inputs))
    assert not (tmp_path / "merged" / FOLDER_FILE).exists()
    same(result(sarac.load(tmp_path / "merged"), inputs), result(merged, inputs))


def test_folded_model_may_be_saved_over_the_adapted_one(tmp_path: Path) -> None:
    model, inputs = trained(llama()), call("llama")
    merged = sarac.fold(model)
    model.save_pretrained(tmp_path)
    merged.save_pretrained(tmp_path)
    same(result(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), inputs), result(merged, inputs))
    same(result(sarac.load(tmp_path), inputs), result(merged, inputs))


def test_shards_and_half_precision(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = trained(opened)
    model.save_pretrained(tmp_path / "folder", max_shard_size="8KB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    require_same_model(sarac.load(tmp_path / "folder"), model)


def test_folder_of_a_class_that_transformers_does_not_have_needs_the_model(tmp_path: Path) -> None:
    model, inputs = trained(custom()), call("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="Custom"):
        sarac.load(tmp_path)
    same(result(sarac.load(tmp_path, custom()), inputs), result(model, inputs))


def test_encoder_decoder_folder(tmp_path: Path) -> None:
    model = trained(t5())
    model.save_pretrained(tmp_path)
    inputs = Inputs.of({"input_ids": ids(), "decoder_input_ids": ids()})
    same(result(sarac.load(tmp_path), inputs), result(model, inputs))


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", FOLDER_FILE])
def test_damaged_folder_is_told(damage: str, tmp_path: Path) -> None:
    trained(llama()).save_pretrained(tmp_path)
    whole = (tmp_path / damage).read_bytes()
    (tmp_path / damage).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(sarac.SaracError):
        sarac.load(tmp_path)
    (tmp_path / damage).write_bytes(whole)
    assert record_of(sarac.load(tmp_path)) is not None


def test_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="opens neither"):
        sarac.load(tmp_path)


def test_every_call_form_of_the_zoo_travels(tmp_path: Path) -> None:
    for name in CALLS:
        model = trained(Own(name, 6, 6).eval())
        found = round_trip(model, tmp_path, Own(name, 6, 6))
        x = torch.randn(3, 6)
        same(outputs(found, x), outputs(model, x))
