"""Weights that are more than a matrix in a layer: stacks of experts, packed, tied, dispatched, quantised, cast."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import VOCABULARY, bert, close, differ, ids, llama, mlp, outputs, same, shake, t5, torchvision_operator

import sarac
from sarac.ir import weight
from sarac.ir.gram import spectrum
from sarac.ir.layers import adapted

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 4,
}  # fmt: skip


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).eval()


def gpt_oss() -> nn.Module:
    """Experts stored as (experts, in, out)."""
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, head_dim=8)).eval()


MOE = {"mixtral": mixtral, "gpt_oss": gpt_oss}
WAYS = ("eager", "batched_mm", "grouped_mm")


def stacks(model: nn.Module) -> list[sarac.Site]:
    return [site for site in sarac.trace(model).sites.values() if site.parts]


@pytest.mark.parametrize("build", MOE.values(), ids=MOE)
def test_every_expert_has_a_spectrum_and_a_rank_of_its_own(build: Callable[[], nn.Module]) -> None:
    model = build()
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():  # the first expert has one direction that has nearly all of it, the second two
        for i, rank in enumerate((1, 2)):
            u, s, v = torch.linalg.svd(experts.down_proj[i], full_matrices=False)
            experts.down_proj[i] = (u * torch.where(torch.arange(len(s)) < rank, 1.0, 1e-3)) @ v
    found = {site.name: site for site in stacks(model)}
    name = "model.layers.0.mlp.experts.down_proj"
    assert set(found) == {f"model.layers.{i}.mlp.experts.{n}_proj" for i in (0, 1) for n in ("gate_up", "down")}
    assert (found[name].parts, found[name].shape) == (4, (16, 24))
    assert (experts.down_proj.shape[1:] == (16, 24)) is (build is mixtral)
    adapter = sarac.transform(model).model.layers[0].mlp.experts.__dict__["_sara"].slots["down_proj"].adapter
    turned = experts.down_proj if build is mixtral else experts.down_proj.mT
    assert adapter.parts == tuple(spectrum(matrix).rank_at(0.6) for matrix in turned)
    assert adapter.parts[:2] == (1, 2)
    assert adapter.rank == max(adapter.parts) > 2


@pytest.mark.parametrize("plan", ["threshold:0.6", "threshold:0.6,train=factors"])
@pytest.mark.parametrize("build", MOE.values(), ids=MOE)
def test_padding_of_ragged_ranks_never_moves(build: Callable[[], nn.Module], plan: str) -> None:
    model = build()
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        u, s, v = torch.linalg.svd(experts.down_proj[1], full_matrices=False)
        experts.down_proj[1] = u[:, :1] * s[:1] @ v[:1]
    model = sarac.transform(model, plan, where="*down_proj")
    experts = model.model.layers[0].mlp.experts
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids(4, 8), labels=ids(4, 8)).loss.backward()
        optimizer.step()
    assert experts.down_proj_sara_shift[1, :1].abs().min() > 0
    for padding in (
        experts.down_proj_sara_shift[1, 1:], experts.down_proj_sara_u[1, :, 1:], experts.down_proj_sara_v[1, 1:]
    ):  # fmt: skip
        assert padding.numel() > 0
        assert not padding.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", MOE.values(), ids=MOE)
def test_experts_are_materialised_once_a_forward(
    build: Callable[[], nn.Module], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build()
    model, batch = shake(sarac.transform(base)), ids(3, 9)
    for one in (base, model):
        one.set_experts_implementation(way)
    differ(outputs(model, batch).logits, outputs(base, batch).logits)
    close(outputs(sarac.fold(model), batch).logits, outputs(model, batch).logits)
    made: Counter[tuple[int, str]] = Counter()
    compute = weight.effective
    monkeypatch.setattr(weight, "effective", lambda module, param: made.update([(id(module), param)]) or compute(module, param))
    outputs(model, batch)
    assert set(made.values()) == {1}
    assert len(made) == 4
    model(batch).logits.square().sum().backward()
    assert set(made.values()) == {2}


def test_plan_of_one_rank_serves_every_matrix_of_a_stack() -> None:
    model, name = mixtral(), "model.layers.1.mlp.experts.gate_up_proj"
    adapted_model = sarac.transform(model, sarac.Plan({name: sarac.Sara(3)}))
    (state,) = (state for _, _, state in adapted(adapted_model))
    assert state.slots["gate_up_proj"].adapter.parts == (3, 3, 3, 3)
    plan = sarac.Plan({name: sarac.Sara(3, parts=(1, 3, 2, 3))})
    assert sarac.Plan.from_json(plan.to_json()) == plan
    assert '"rank": [1, 3, 2, 3]' in plan.to_json()
    with pytest.raises(sarac.PlanError, match=r"gives model.* 3 ranks, and it is 4 matrices of shape \(48, 16\)"):
        sarac.transform(model, sarac.Plan({name: sarac.Sara(3, parts=(1, 3, 2))}))
    with pytest.raises(sarac.PlanError, match="the largest is the rank"):
        sarac.Sara(3, parts=(1, 2))


def test_budget_counts_every_expert() -> None:
    model = sarac.transform(mixtral(), "budget:150")
    assert 100 < sum(int((p != 0).sum()) for n, p in model.named_parameters() if n.endswith("scale")) <= 150


def test_packed_projection_has_factors_for_query_key_and_value() -> None:
    base = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        base.in_proj_weight[8:16] = torch.outer(torch.randn(8), torch.randn(8))  # the key's has one direction
    model = sarac.transform(base, "threshold:0.9")
    assert model.in_proj_weight_sara_u.shape[0] == 3
    ranks = (model.in_proj_weight_sara_scale != 0).sum(1).tolist()
    assert ranks == [spectrum(part).rank_at(0.9) for part in base.in_proj_weight.chunk(3)]
    assert ranks[1] == 1 < min(ranks[0], ranks[2])


# Models that something else has laid hands on.


def first(output: Any) -> Tensor:
    return next(tensor for tensor in output.values() if isinstance(tensor, Tensor))


def dispatched(build: Callable[[], nn.Module]) -> nn.Module:
    return accelerate.dispatch_model(build(), {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("method", ["sara", "mosara"])
@pytest.mark.parametrize("build", [llama, bert, t5, mixtral])
def test_dispatched_model_computes_with_its_adapters(build: Callable[[], nn.Module], method: str) -> None:
    torch.manual_seed(0)
    base, batch = dispatched(build), {"input_ids": ids(2, 5)}
    if build is t5:
        batch["decoder_input_ids"] = ids(2, 5)
    assert "forward" in vars(next(m for m in base.modules() if isinstance(m, nn.Linear)))
    # the very module that a hook holds on to is the one that is adapted
    model = shake(sarac.transform(base, method=method, example_inputs=batch))
    moved = first(outputs(model, **batch))
    differ(moved, first(outputs(base, **batch)))
    if method == "sara":
        merged = sarac.fold(model)
        close(first(outputs(merged, **batch)), moved)
        bare = accelerate.hooks.remove_hook_from_submodules(merged) or merged
        close(first(outputs(bare, **batch)), moved)
    accelerate.hooks.remove_hook_from_submodules(model)
    same(first(outputs(model, **batch)), moved)


def test_dispatched_linear_uses_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    base = accelerate.hooks.add_hook_to_module(nn.Linear(6, 5), accelerate.hooks.AlignDevicesHook("cpu"))
    model, x = shake(sarac.transform(base)), torch.randn(3, 6)
    expected = outputs(model, x)
    monkeypatch.setattr("sarac.ir.weight.effective", None)
    same(outputs(model, x), expected)
    differ(expected, outputs(base, x))


def test_offloaded_weights_are_told() -> None:
    with pytest.raises(sarac.SpectrumError, match=r"q_proj\.weight lies on the meta device .*without offloading them"):
        sarac.transform(accelerate.cpu_offload(llama(), execution_device="cpu"))


def quantised(build: Callable[[], nn.Module]) -> nn.Module:
    torchvision_operator()
    torchao = pytest.importorskip("torchao.quantization")
    model = build()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["sara", "mosara"])
def test_quantised_base_stays_quantised(method: str, dtype: torch.dtype, tmp_path) -> None:
    base, x = quantised(lambda: mlp(32, 24, 16).to(dtype)), torch.randn(3, 32).to(dtype)
    kind = type(base[0].weight)
    model = sarac.transform(base, method=method)
    same(outputs(model, x), outputs(base, x))
    shake(model)
    assert type(model[0].weight_base) is kind
    assert model[0].weight_base.requires_grad is False
    # of the de-quantised weight, and not of the one before
    assert model[0].sara_scale.dtype == torch.float32
    found = spectrum(base[0].weight.dequantize()).values[: model[0].sara_scale.numel()]
    close(model[0].sara_scale.double(), found, torch.float32)
    differ(outputs(model, x).float(), outputs(base, x).float())
    if method == "sara":
        merged, report = sarac.fold(model, report=True)
        assert {facts.base for facts in report.sites.values()} == {f"de-quantised {kind.__name__}"}
        assert type(merged[0].weight) is nn.Parameter
        close(outputs(merged, x), outputs(model, x), dtype)
    sarac.save_adapter(model, tmp_path / "a.safetensors")
    same(outputs(sarac.load_adapter(base, tmp_path / "a.safetensors"), x), outputs(model, x))
    plain = sarac.transform(mlp(6, 5))
    assert {facts.base for facts in sarac.fold(shake(plain), report=True)[1].sites.values()} == {"stored"}


@pytest.mark.parametrize("method", ["sara", "mosara"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_goes_through_adapters(dtype: torch.dtype, method: str) -> None:
    torch.manual_seed(0)
    base, batch = llama(), ids(2, 6)
    model = shake(sarac.transform(base.to(dtype), method=method))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = outputs(model, batch).logits, outputs(base, batch).logits
        differ(ours.float(), theirs.float())
        if method == "sara":
            close(outputs(sarac.fold(model), batch).logits, ours, torch.bfloat16)
        model(batch).logits.float().square().sum().backward()
    shifts = [p for n, p in model.named_parameters() if n.endswith("shift")]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in shifts)


def test_effective_weight_keeps_its_precision_under_autocast() -> None:
    model = shake(sarac.transform(nn.Linear(64, 64)))
    exact = model.weight + 0
    with torch.autocast("cpu", torch.bfloat16):
        same(model.weight + 0, exact)
        assert not torch.equal((model.sara_u @ model.sara_v).float(), model.sara_u.double() @ model.sara_v.double())


# Tied weights.


def test_tied_head_stays_tied_to_the_end(tmp_path) -> None:
    base, batch = llama(), ids(2, 6)
    model = shake(sarac.transform(base, where="*"))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding._parameters["weight"] is head._parameters["weight"]
    assert embedding.sara_shift is head.sara_shift
    merged = sarac.fold(model)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    close(outputs(merged, batch).logits, outputs(model, batch).logits)
    differ(outputs(merged, batch).logits, outputs(base, batch).logits)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    same(outputs(again, batch).logits, outputs(merged, batch).logits)
    assert not torch.equal(again.lm_head.weight, base.lm_head.weight)
    model.save_pretrained(tmp_path / "adapted")
    back = sarac.load(tmp_path / "adapted")
    assert back.get_input_embeddings().sara_shift is back.get_output_embeddings().sara_shift
    same(outputs(back, batch).logits, outputs(model, batch).logits)


def test_tied_weight_gathers_the_gradient_of_both_uses() -> None:
    base = llama()
    model, batch = shake(sarac.transform(base, where="*embed*")), ids(2, 6)
    both = _gradient(model, batch)
    parts = []
    for freed in ("get_input_embeddings", "get_output_embeddings"):
        alone = copy.deepcopy(model)
        module = getattr(alone, freed)()
        module.sara_shift = nn.Parameter(module.sara_shift.detach().clone(), requires_grad=False)
        parts.append(_gradient(alone, batch, skip=freed))
    close(parts[0] + parts[1], both)
    differ(parts[0], both)
    differ(parts[1], both)


def _gradient(model: nn.Module, batch: Tensor, skip: str = "") -> Tensor:
    model.zero_grad()
    model(batch, labels=batch).loss.backward()
    owner: Any = model.get_input_embeddings() if skip != "get_input_embeddings" else model.get_output_embeddings()
    return owner.sara_shift.grad.clone()


def test_frozen_and_trainable_mixtures_come_back() -> None:
    base = mlp(6, 5, 4, 3)
    base[0].requires_grad_(False)
    base[2].bias.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    model = shake(sarac.transform(base, also_train="4.bias"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {*(f"{i}.sara_shift" for i in (0, 2, 4)), "4.bias"}
    merged = sarac.fold(model)
    assert {name: parameter.requires_grad for name, parameter in merged.named_parameters()} == flags
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == flags


@pytest.mark.parametrize("choice", [{"plan": "rank:3,train=factors,init=random"}, {"method": "mosara"}])
def test_default_device_of_torch_is_not_the_model_s(choice: dict[str, Any]) -> None:
    base, x = mlp(6, 5, 4), torch.randn(3, 6)
    with torch.device("meta"):
        assert torch.ones(1).is_meta
        model = sarac.transform(base, example_inputs=x, **choice)
    same(outputs(model, x), outputs(base, x))
    differ(outputs(shake(model), x), outputs(base, x))
