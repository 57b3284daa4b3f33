"""Mo-SARA with one router for the weights that read one input: nothing that holds for adapters of their own is lost."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import close, differ, ids, llama, mlp, outputs, same, shake

import sarac
from sarac.ir.record import record_of
from sarac.ir.terms import observing

RULES = ("rank:3,router_scope=group", "rank:4,router_scope=group,bottleneck=2,router=topk:2; *.k_proj.weight=rank:2")


@pytest.fixture(scope="module", params=RULES)
def case(request: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A plain model, the same with shaken adapters, and inputs."""
    torch.manual_seed(0)
    base, x = llama(), ids()
    model = sarac.transform(base, request.param, method="mosara", example_inputs=(x,))
    same(outputs(model, x).logits, outputs(base, x).logits)
    shake(model)
    differ(outputs(model, x).logits, outputs(base, x).logits)
    return base, model, x


def attention(model: Any, layer: int = 0) -> Any:
    return model.model.layers[layer].self_attn


def require_shared(model: nn.Module) -> None:
    one = attention(model)
    for role in ("router", "router_in") if hasattr(one.q_proj, "sara_router_in") else ("router",):
        assert getattr(one.k_proj, f"sara_{role}") is getattr(one.v_proj, f"sara_{role}") is getattr(one.q_proj, f"sara_{role}")
        assert getattr(one.k_proj, f"sara_{role}") is not getattr(attention(model, 1).q_proj, f"sara_{role}")
    assert one.k_proj.sara_gate_v is one.q_proj.sara_v
    assert one.k_proj.sara_v is not one.q_proj.sara_v


def gates(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gates of every call by the attribute path of its shift."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    with observing(lambda shift, gates: found.__setitem__(names[id(shift)], gates.detach())):
        outputs(model, x)
    return found


def test_group_has_one_router_and_one_set_of_gates(case: Any) -> None:
    _, model, x = case
    require_shared(model)
    found = {name.removeprefix("model.layers.0.").removesuffix(".sara_shift"): g for name, g in gates(model, x).items()}
    assert torch.equal(found["self_attn.q_proj"], found["self_attn.k_proj"])
    assert torch.equal(found["self_attn.q_proj"], found["self_attn.v_proj"])
    assert torch.equal(found["mlp.gate_proj"], found["mlp.up_proj"])
    assert not torch.equal(found["self_attn.q_proj"], found["self_attn.o_proj"])
    counted = sum(record_of(model).plan.trainable.values())
    assert counted == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_shared_router_learns_from_every_member(case: Any) -> None:
    _, model, x = case
    model = copy.deepcopy(model)
    require_shared(model)
    one = attention(model)
    gradients = []
    for kept in (("q_proj", "k_proj"), ("q_proj",)):
        with torch.no_grad():
            for name in {"q_proj", "k_proj", "v_proj"} - set(kept):
                getattr(one, name).sara_shift.zero_()
        model.zero_grad()
        model(x, labels=x).loss.backward()
        gradients.append(one.q_proj.sara_router.grad.clone())
    assert gradients[1].abs().sum() > 0
    assert not torch.equal(*gradients)
    assert one.q_proj.sara_v.grad is None
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=sarac.recommended_lr(model))
    before = outputs(model, x).logits
    optimizer.step()
    require_shared(model)
    differ(outputs(model, x).logits, before)


def test_shared_router_survives_every_file(case: Any, tmp_path: Path) -> None:
    base, model, x = case
    expected = outputs(model, x).logits
    sarac.save(model, tmp_path / "model.pt")
    sarac.save_adapter(model, tmp_path / "a.safetensors")
    sarac.save_adapter(model, tmp_path / "factors.safetensors", factors=True)
    model.save_pretrained(tmp_path / "folder")
    found = [sarac.load(tmp_path / "model.pt"), sarac.load(tmp_path / "folder")]
    found += [sarac.load_adapter(base, tmp_path / f"{name}.safetensors") for name in ("a", "factors")]
    for again in found:
        same(outputs(again, x).logits, expected)
        require_shared(again)
        assert record_of(again).plan.sites == record_of(model).plan.sites
    sarac.load_adapter(shake(found[0]), tmp_path / "a.safetensors", name="second")
    same(outputs(found[0], x).logits, expected)
    sarac.use(found[0], "default")
    differ(outputs(found[0], x).logits, expected)
    require_shared(found[0])


def test_part_of_a_model_keeps_its_routers(case: Any, tmp_path: Path) -> None:
    _, model, x = case
    model.model.save_pretrained(tmp_path / "part")
    part = sarac.load(tmp_path / "part")
    same(outputs(part, x).last_hidden_state, outputs(model.model, x).last_hidden_state)
    assert part.layers[0].self_attn.k_proj.sara_router is part.layers[0].self_attn.q_proj.sara_router


class Pair(nn.Module):
    """Two layers that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = mlp(6, 5)[0], mlp(6, 7)[0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], -1)


def pair(x: Tensor) -> tuple[nn.Module, Any]:
    base = Pair().eval()
    return base, shake(sarac.transform(base, "rank:3,router_scope=group,sets=2", method="mosara", example_inputs=x))


def test_shared_router_is_exported_and_folded_by_its_mean(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    base, model = pair(x)
    assert sarac.export(model, tmp_path / "routed.onnx", (x,), merge=False).routed == ("one.weight", "two.weight")
    with pytest.warns(sarac.SaracWarning, match="fixes gates"):
        merged = sarac.fold(model, routing="mean", calibration=[(x,)])
    assert list(merged.state_dict()) == list(base.state_dict())
    differ(outputs(merged, x), outputs(base, x))
    with sarac.disabled(model):
        same(outputs(model, x), outputs(base, x))


def test_one_shared_router_is_that_of_its_first_member() -> None:
    """With factors of its own a member adds what its formula says, with the gates of the other."""
    x = torch.randn(4, 6)
    base, model = pair(x)
    one, two = model.one, model.two
    mixed = torch.softmax((x @ one.sara_v.T) @ one.sara_router.T, -1) @ two.sara_shift
    expected = base.two(x) + ((x @ two.sara_v.T) * mixed * two.sara_scale) @ two.sara_u.T
    close(outputs(model, x)[:, 5:], expected.detach())
    wrong = torch.softmax((x @ two.sara_v.T) @ one.sara_router.T, -1) @ two.sara_shift
    differ(outputs(model, x)[:, 5:], (base.two(x) + ((x @ two.sara_v.T) * wrong * two.sara_scale) @ two.sara_u.T).detach())
