"""Law 2: the effective weight is the truth. Every rule of DESIGN section 4, each seen to break otherwise."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from zoo import Own, adapt, close, differ, folded, mlp, outputs, same, shake, t5, trainables

import sarac.ir.layers
import sarac.ir.weight
from sarac.ir.errors import NotFoldable, PlanError, RewriteError, WeightError
from sarac.ir.layers import adapted
from sarac.ir.pipeline import run
from sarac.passes.choose import Choose
from sarac.passes.rewrite import Rewrite
from sarac.trace import trace


@pytest.fixture
def layer() -> nn.Linear:
    """An adapted linear layer away from its start."""
    return shake(adapt(nn.Linear(6, 5)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 6)


def truth(layer: nn.Module) -> Tensor:
    """W + U diag(δ s) V from the stored tensors, by hand."""
    u, v, values = layer.sara_u, layer.sara_v, layer.sara_shift * layer.sara_scale
    return layer._parameters["weight"] + u @ torch.diag(values) @ v


# What reading gives.


def test_weight_is_the_effective_one(layer: nn.Linear, x: Tensor) -> None:
    close(layer.weight + 0, truth(layer))
    close(F.linear(x, layer.weight, layer.bias), layer(x))
    differ(layer.weight, layer.weight_base)
    assert layer.weight_base is layer._parameters["weight"]


READERS: list[Callable[[Tensor], Any]] = [
    lambda w: w.T,
    lambda w: w.t(),
    lambda w: w.detach().clone(),
    lambda w: w.data + 0,
    lambda w: w[1:, 2],
    lambda w: torch.cat([w, w]),
    lambda w: torch.stack((w, torch.zeros_like(w))),
    lambda w: [row * 1 for row in w],
    lambda w: w.float() @ torch.ones(6),
    lambda w: torch.ones(2, 5) @ w,
    lambda w: torch.einsum("oi,i->o", w, torch.ones(6)),
    lambda w: w.square().sum(),
    lambda w: w.norm(),
    lambda w: torch.linalg.svdvals(w),
    lambda w: torch.zeros(5, 6).add_(w),
    lambda w: torch.zeros(5, 6).copy_(w),
    lambda w: torch.add(w, 1.0, out=torch.empty(5, 6)),
    lambda w: torch.tensor(w.tolist()),
    lambda w: torch.from_numpy(w.detach().numpy()),
    lambda w: w.to(torch.float64),
    lambda w: w.reshape(-1).view(6, 5),
    lambda w: copy.deepcopy(w),
    lambda w: w == w.detach(),
    lambda w: torch.allclose(w, w) * torch.ones(1),
]


@pytest.mark.parametrize("read", READERS)
def test_whoever_computes_with_it_computes_with_the_truth(read: Callable[[Tensor], Any], layer: nn.Linear) -> None:
    with torch.no_grad():
        close(read(layer.weight), read(truth(layer)))


def test_most_readers_would_notice_the_base(layer: nn.Linear) -> None:
    """The partner of the test above: reading the base gives something else."""
    seen = 0
    with torch.no_grad():
        for read in READERS[:-2]:
            differ(read(layer.weight), read(layer.weight_base))
            seen += 1
    assert seen == 22


FREE: list[Callable[[Tensor], Any]] = [
    lambda w: w.dtype,
    lambda w: w.device,
    lambda w: w.shape,
    lambda w: w.size(0),
    lambda w: w.ndim,
    lambda w: w.dim(),
    lambda w: w.numel(),
    lambda w: len(w),
    lambda w: w.stride(),
    lambda w: w.is_contiguous(),
    lambda w: w.element_size(),
    lambda w: w.is_floating_point(),
    lambda w: w.is_cuda,
    lambda w: w.is_meta,
    lambda w: w.layout,
    lambda w: w.nbytes,
    lambda w: w.data.dtype,
    lambda w: w.detach().shape,
]


@pytest.mark.parametrize("fact", FREE)
def test_facts_cost_nothing(fact: Callable[[Tensor], Any], layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Linear(6, 5)
    made: list[int] = []
    real = sarac.ir.weight.effective
    monkeypatch.setattr(sarac.ir.weight, "effective", lambda *args: made.append(1) or real(*args))
    assert fact(layer.weight) == fact(plain.weight)
    assert not made
    layer.weight.sum()
    assert made


def test_hasattr_isinstance_and_truth_of_place(layer: nn.Linear) -> None:
    assert hasattr(layer, "weight")
    assert not hasattr(layer, "weights")
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer.weight, Tensor)
    assert torch.is_tensor(layer.weight)
    assert (type(layer).__name__, type(layer).__module__) == ("Linear", "torch.nn.modules.linear")
    assert (layer.in_features, layer.out_features) == (6, 5)
    assert repr(layer).startswith("Linear(in_features=6, out_features=5, bias=True, weight: sara rank ")


def test_state_dict_and_parameters_hold_the_base(layer: nn.Linear) -> None:
    own = {"sara_u", "sara_v", "sara_scale", "sara_shift"}
    assert set(layer.state_dict()) == {"weight", "bias"} | own
    assert torch.equal(layer.state_dict()["weight"], layer.weight_base)
    assert dict(layer.named_parameters())["weight"] is layer.weight_base
    assert not dict(layer.named_buffers())
    assert all(isinstance(layer._parameters[name], nn.Parameter) and layer._parameters[name].is_contiguous() for name in own)


def test_gradients_reach_the_adapter_through_the_weight(layer: nn.Linear, x: Tensor) -> None:
    assert layer.weight.requires_grad
    F.linear(x, layer.weight, layer.bias).square().sum().backward()
    through_weight, layer.sara_shift.grad = layer.sara_shift.grad, None
    layer(x).square().sum().backward()
    close(through_weight, layer.sara_shift.grad)
    assert (layer.sara_shift.grad != 0).all()
    assert layer.weight_base.grad is None


def test_nothing_flows_where_nothing_trains(layer: nn.Linear) -> None:
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert not layer.weight.sum().requires_grad
    assert not layer.weight.detach().sum().requires_grad
    assert not layer.weight.data.sum().requires_grad


def test_reading_never_falls_back_to_the_base(layer: nn.Linear) -> None:
    """An AttributeError in the getter would let nn.Module hand out the base in silence."""
    del layer._parameters["sara_shift"]
    with pytest.raises(WeightError, match=r"weight has lost its adapter's shift: transform the model again"):
        layer.weight.sum()
    with pytest.raises((WeightError, AttributeError)):
        layer(torch.ones(6))


def test_getter_never_raises_an_attribute_error(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: nn.Module, param: str) -> Tensor:
        raise AttributeError("a fault inside")

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    close(layer.weight, truth(layer))
    monkeypatch.setattr(sarac.ir.layers, "effective", broken)
    with pytest.raises(WeightError, match="a fault inside"):
        layer.weight  # noqa: B018


def test_disabled_layer_reads_as_its_base(layer: nn.Linear, x: Tensor) -> None:
    on = layer(x)
    layer.__dict__["_sara"].enabled = False
    assert layer.weight is layer.weight_base
    same(layer(x), F.linear(x, layer.weight_base, layer.bias))
    differ(on, layer(x))


# What writing does.

WRITES: list[tuple[str, Callable[[nn.Module], Any]]] = [
    ("iadd", lambda m: m.weight.__iadd__(1)),
    ("mul_", lambda m: m.weight.mul_(2)),
    ("data.mul_", lambda m: m.weight.data.mul_(2)),
    ("detach().zero_", lambda m: m.weight.detach().zero_()),
    ("setitem", lambda m: m.weight.__setitem__(0, 1.0)),
    ("data setitem", lambda m: m.weight.data.__setitem__(0, 1.0)),
    ("data =", lambda m: setattr(m.weight, "data", torch.zeros(5, 6))),
    ("requires_grad =", lambda m: setattr(m.weight, "requires_grad", False)),
    ("grad =", lambda m: setattr(m.weight, "grad", torch.zeros(5, 6))),
    ("requires_grad_", lambda m: m.weight.requires_grad_(False)),
    ("init", lambda m: nn.init.xavier_uniform_(m.weight)),
    ("out", lambda m: torch.add(torch.ones(5, 6), 1, out=m.weight)),
    ("out of two", lambda m: torch.linalg.qr(torch.ones(5, 6), mode="reduced", out=(m.weight, torch.empty(5, 6)))),
    ("foreach", lambda m: torch._foreach_add_([m.weight], 1.0)),
    ("data_ptr", lambda m: m.weight.data_ptr()),
    ("storage", lambda m: m.weight.untyped_storage()),
    ("share_memory_", lambda m: m.weight.share_memory_()),
    ("register_hook", lambda m: m.weight.register_hook(lambda grad: grad)),
    ("retain_grad", lambda m: m.weight.retain_grad()),
    ("set_", lambda m: m.weight.set_(torch.zeros(5, 6))),
    ("pickle", lambda m: pickle.dumps(m.weight)),
    ("copy", lambda m: copy.copy(m.weight)),
    ("parameter", lambda m: nn.Parameter(m.weight)),
]


@pytest.mark.parametrize(("write"), [w for _, w in WRITES], ids=[name for name, _ in WRITES])
def test_writing_raises_a_sentence(write: Callable[[nn.Module], Any], layer: nn.Linear) -> None:
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad(), pytest.raises(WeightError, match=r"weight is adapted") as raised:
        write(layer)
    assert "weight_base" in str(raised.value)
    assert "sarac.fold" in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_assigning_raises_a_sentence(layer: nn.Linear) -> None:
    with pytest.raises(WeightError, match=r"weight is adapted and cannot be assigned: .* Fold the model first"):
        layer.weight = nn.Parameter(torch.zeros(5, 6))
    layer.bias = nn.Parameter(torch.ones(5))
    assert layer.bias.sum() == 5


def test_base_can_be_written_by_its_own_name(layer: nn.Linear, x: Tensor) -> None:
    before = layer(x).detach()
    with torch.no_grad():
        layer.weight_base.zero_()
    differ(layer(x), before)
    close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_optimiser_does_not_take_the_handle(layer: nn.Linear) -> None:
    """Nothing would ever train, and nobody would tell."""
    with pytest.raises((ValueError, WeightError)):
        torch.optim.SGD([layer.weight], lr=1.0)
    torch.optim.SGD([layer.sara_shift], lr=1.0)


def test_module_that_has_the_adapters_names_is_refused() -> None:
    taken = nn.Linear(3, 3)
    taken.register_buffer("sara_shift", torch.zeros(3))
    with pytest.raises(RewriteError, match=r"weight: its module already has an attribute 'sara_shift'; rename it"):
        adapt(taken)


class TwoWeights(nn.Module):
    """Its second parameter has the name under which the first's base would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.w_base = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + torch.tanh(x) @ self.w_base


def test_module_that_has_the_bases_name_is_refused_or_right() -> None:
    model, x = TwoWeights(), torch.randn(3, 4)
    try:
        changed = adapt(model, where="w", checked=False)
    except RewriteError as error:
        assert "'w_base'" in str(error)  # noqa: PT017  both ways are right; a wrong output is not
    else:
        same(changed(x), model(x))


# Copying, saving, calling functionally.


def test_deepcopy_is_independent(layer: nn.Linear, x: Tensor) -> None:
    twin = copy.deepcopy(layer)
    same(twin(x), layer(x))
    assert type(twin) is type(layer)
    assert twin.__dict__["_sara"] is not layer.__dict__["_sara"]
    with torch.no_grad():
        twin.sara_shift.add_(1.0)
    differ(twin(x), layer(x))
    close(twin.weight + 0, truth(twin))
    twin.__dict__["_sara"].enabled = False
    differ(twin(x), layer(x))
    close(layer.weight + 0, truth(layer))


def test_shallow_copy_works_as_for_any_module(layer: nn.Linear, x: Tensor) -> None:
    """torch.fx and functional tools copy modules shallowly; that is not pickling."""
    twin = copy.copy(layer)
    same(twin(x), layer(x))
    assert twin.sara_shift is layer.sara_shift


def test_deepcopy_of_a_model_keeps_ties() -> None:
    model = shake(adapt(nn.ModuleDict({"a": (a := nn.Linear(4, 4)), "b": nn.Sequential(a)})))
    twin = copy.deepcopy(model)
    assert twin["a"] is twin["b"][0]
    assert twin["a"].sara_shift is not model["a"].sara_shift


def test_pickling_is_refused_with_the_way_out(layer: nn.Linear, tmp_path: Path) -> None:
    for save in (pickle.dumps, lambda m: torch.save(m, tmp_path / "m.pt")):
        with pytest.raises(WeightError, match=r"Linear cannot be pickled: .* sarac\.save"):
            save(nn.Sequential(layer))
    pickle.dumps(folded(layer))


def test_state_dict_moves_between_adapted_models(layer: nn.Linear, x: Tensor) -> None:
    other = adapt(nn.Linear(6, 5), f"rank:{layer.sara_shift.numel()}")
    differ(other(x), layer(x))
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    same(other(x), layer(x))
    close(other.weight + 0, layer.weight + 0)


def test_functional_call_takes_other_tensors(layer: nn.Linear, x: Tensor) -> None:
    given = {name: torch.randn_like(tensor) for name, tensor in layer.named_parameters()}
    out = functional_call(layer, given, (x,))
    weight = given["weight"] + given["sara_u"] * (given["sara_shift"] * given["sara_scale"]) @ given["sara_v"]
    close(out, F.linear(x, weight, given["bias"]))
    differ(out, layer(x))


@pytest.mark.parametrize("call", ["at", "left"])
def test_functional_gradients_are_autograds(call: str) -> None:
    model, x = shake(adapt(Own(call, 5, 6).eval())), torch.randn(4, 6)
    given = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(lambda p: functional_call(model, p, (x,)).square().sum())(given)
    model(x).square().sum().backward()
    close(found["w_sara_shift"], model.w_sara_shift.grad)
    assert (found["w_sara_shift"] != 0).all()


def test_moving_to_another_dtype_moves_everything(layer: nn.Linear, x: Tensor) -> None:
    expected = layer(x)
    layer.double()
    assert layer.weight.dtype == layer.sara_u.dtype == torch.float64
    close(layer(x.double()), expected)
    close(layer.weight + 0, truth(layer), torch.float64)
    layer.bfloat16()
    close(layer(x.bfloat16()), expected, torch.bfloat16)


# Those who read other modules' weights.


@pytest.fixture(params=["sara", "factors", "uniform"])
def choice(request: pytest.FixtureRequest) -> dict[str, str]:
    return {
        "sara": {"plan": "threshold:0.6"},
        "factors": {"plan": "rank:2,train=factors"},
        "uniform": {"plan": "rank:4,router=uniform", "method": "mosara"},
    }[request.param]


@pytest.mark.parametrize("where", [None, "*linear*", "*in_proj*", "*out_proj*"])
def test_transformer_encoder_computes_alike_in_both_modes(where: str | None, choice: dict[str, str]) -> None:
    """PEFT's LoRA computes the base here in eval mode: the fused kernel takes the weights themselves."""
    block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    base, x = nn.TransformerEncoder(block, 2, enable_nested_tensor=False), torch.randn(2, 3, 16)
    model = shake(adapt(base, where=where, **choice))
    trained = outputs(model.train(), x)
    close(outputs(model.eval(), x), trained)
    close(outputs(folded(model).eval(), x), trained)
    differ(outputs(base.eval(), x), trained)


def test_transformer_encoder_passes_the_whole_check() -> None:
    """The base takes the fused kernel, the adapted model cannot: the check must not take that for a difference."""
    base = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    model = run(trace(base, x), Choose(), Rewrite()).module
    close(outputs(model, x), outputs(base, x))


def test_multihead_attention_reads_its_output_projection() -> None:
    base, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    model = shake(adapt(base, where="out_proj.weight"))
    out = model(x, x, x)[0]
    close(folded(model)(x, x, x)[0], out)
    differ(base(x, x, x)[0], out)
    out.square().sum().backward()
    assert (model.out_proj.sara_shift.grad != 0).all()


def test_routed_weight_that_is_read_raises_not_foldable() -> None:
    base, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    with pytest.raises(PlanError, match=r"out_proj\.weight cannot carry a routed adapter, .*: its MultiheadAttention reads"):
        adapt(base, where="out_proj.weight", method="mosara", checked=False)
    model = adapt(base.out_proj, method="mosara", checked=False)
    assert hasattr(model, "weight")
    assert model.weight.dtype == torch.float32
    with pytest.raises(NotFoldable, match=r"weight: A routed Mo-SARA .*Call the layer itself.*merge=False.*routing"):
        model.weight + 0
    same(model(x), base.out_proj(x))
    base.out_proj = shake(model)  # its own path serves where it is but multiplied with
    same(F.linear(x, model.weight, model.bias), model(x))
    same(x @ model.weight.T + model.bias, model(x))
    differ(model(x), F.linear(x, model.weight_base, model.bias))


class CastsToWeight(nn.Module):
    """As T5's feed-forward does: it asks its child's weight for the dtype at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.wi(x))
        if isinstance(self.wo.weight, Tensor) and h.dtype != self.wo.weight.dtype:
            h = h.to(self.wo.weight.dtype)
        return self.wo(h)


@pytest.mark.parametrize("method", ["sara", "mosara"])
def test_reading_the_dtype_costs_no_product(method: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    base = CastsToWeight()
    model = adapt(base, method=method)
    monkeypatch.setattr(sarac.ir.weight, "effective", None)
    same(model(x), base(x))
    shake(model)
    differ(model(x), base(x))


def test_t5_of_transformers() -> None:
    base = t5()
    model, inputs = adapt(base), {"input_ids": torch.tensor([[2, 3, 4]]), "decoder_input_ids": torch.tensor([[2, 5]])}
    same(outputs(model, **inputs).logits, outputs(base, **inputs).logits)
    shake(model)
    close(outputs(folded(model), **inputs).logits, outputs(model, **inputs).logits)
    differ(outputs(base, **inputs).logits, outputs(model, **inputs).logits)


# Sharded parameters.


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp_does_not_adopt_the_product_as_the_base(mesh: Any, x: Tensor) -> None:
    """Away from λ = 0, where it shows."""
    model = shake(adapt(mlp(6, 5, 4)))
    base, expected = model[0].weight_base.detach().clone(), outputs(model, x)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model[0].weight, DTensor)
    assert model[0].weight is model[0]._parameters["weight"]
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        close(outputs(model, x), expected)
        model(x).square().sum().backward()
        assert torch.equal(model[0]._parameters["weight"].full_tensor(), base)
    optimiser.step()
    differ(outputs(model, x), expected)
    assert torch.equal(model[0]._parameters["weight"].full_tensor(), base)


# Compilers.


class Packed(nn.Module):
    """Weight form: it reads its own parameter in a way that no linear node explains, and its child's."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.child = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (self.w @ torch.tanh(self.child(x)).T).T + F.linear(x, self.child.weight)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "sara": (lambda: mlp(6, 5, 6), {}),
    "mosara": (lambda: mlp(6, 5, 6), {"method": "mosara"}),
    "hard": (lambda: mlp(6, 5, 6), {"method": "mosara", "plan": "rank:3,router=hard"}),
    "own": (lambda: Own("at", 6, 6).eval(), {}),
    "weight": (Packed, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_compiles_as_one_graph(name: str, x: Tensor) -> None:
    build, choice = MODELS[name]
    model = shake(adapt(build(), **choice))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        expected = outputs(model, x)
        out = compiled(x)
        close(out, expected)
        optimiser.zero_grad()
        out.square().sum().backward()
        optimiser.step()
        differ(outputs(model, x), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_exports(name: str, x: Tensor) -> None:
    build, choice = MODELS[name]
    base = build()
    model = shake(adapt(base, **choice))
    program = torch.export.export(model, (x,), strict=False)
    close(program.module()(x), outputs(model, x))
    differ(program.module()(x), outputs(base, x))


def test_traces_with_jit(x: Tensor) -> None:
    model = shake(adapt(Packed()))
    traced = torch.jit.trace(model, x)
    other = torch.randn(2, 6)
    close(traced(other), model(other))


def test_gradient_checkpointing_gives_the_same_gradients(x: Tensor) -> None:
    model = shake(adapt(mlp(6, 5, 4)))
    grads = []
    for use_checkpoint in (False, True):
        model.zero_grad()
        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if use_checkpoint else model(x)
        out.square().sum().backward()
        grads.append(model[0].sara_shift.grad.clone())
    assert torch.equal(*grads)


def test_threads_share_a_layer(layer: nn.Linear, x: Tensor) -> None:
    expected, found = layer(x), []
    threads = [threading.Thread(target=lambda: found.append(F.linear(x, layer.weight, layer.bias))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for out in found:
        close(out, expected)


def test_adapted_finds_every_carrier() -> None:
    model = adapt(mlp(6, 5, 4), where="0.weight")
    assert [(path, [slot.site for slot in state.slots.values()]) for path, _, state in adapted(model)] == [("0", ["0.weight"])]
    assert not list(adapted(mlp(6, 5, 4)))
    assert trainables(model) == {"0.sara_shift"}


def test_one_module_carries_two_adapters() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.w) @ self.v

    base, x = Pair(), torch.randn(5, 6)
    model = adapt(base)
    assert trainables(model) == {"w_sara_shift", "v_sara_shift"}
    same(model(x), base(x))
    shake(model)
    close(torch.tanh(x @ model.w) @ model.v, model(x))
    differ(torch.tanh(x @ model.w) @ model.v_base, model(x))
