"""The main job on every kind of model by every method: transform, train, fold, export, verify; merged or routed.

Each file is written once and looked at from all sides in one test: an export takes seconds, and workers share no fixture.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import VOCABULARY, Own, close, differ, mlp, outputs

import sarac
from sarac.backends.onnx import Onnx
from sarac.backends.onnx_file import matmul_count, read_metadata
from sarac.backends.pairing import paired
from sarac.backends.runtime import Runtime
from sarac.checkpoint import adapted_weights, base_hashes
from sarac.ir import check
from sarac.ir.inputs import Inputs
from sarac.ir.record import __version__, record_of

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, **SIZES, num_key_value_heads=1, bos_token_id=0, eos_token_id=1)
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **SIZES)).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).eval()


class Again(nn.Module):
    """One weight used twice in one forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(torch.tanh(x @ self.w.T), self.w.T)


def functional() -> nn.Module:
    """Linear calls on parameters of one's own in four forms."""
    return nn.Sequential(Own("at", 8, 6), Again(8), Own("addmm_mT", 8, 8), Own("linear", 5, 8)).eval()


def plain() -> nn.Module:
    return nn.Sequential(mlp(6, 8, 8), nn.LayerNorm(8), nn.Linear(8, 5, bias=False)).eval()


def tokens(rows: int, columns: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (rows, columns))}


def masked(rows: int, columns: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, columns, dtype=torch.int64)
    mask[-1, columns - 2 :] = 0
    return {**tokens(rows, columns), "attention_mask": mask}


def vectors(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, 6)


@dataclass(frozen=True)
class Kind:
    """A model, and how to make inputs of a size for it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]
    merged: tuple[str, ...]  # the methods by which it is exported merged: seconds each, and the graphs are the same


KINDS = {
    "llama": Kind(llama, tokens, ()),  # merged it is the plain graph, which test_onnx writes and test_cli merged
    "bert": Kind(bert, masked, ()),
    "gpt2": Kind(gpt2, tokens, ("values",)),
    "functional": Kind(functional, vectors, ("values", "svd factors")),
    "plain": Kind(plain, vectors, ("values", "random factors")),
}
METHODS = {
    "values": {"plan": "threshold:0.6"},
    "svd factors": {"plan": "rank:3,train=factors"},
    "random factors": {"plan": "rank:3,train=factors,init=random"},
    "routed": {"plan": "threshold:0.6", "method": "mosara"},
}


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def train(model: nn.Module, inputs: Inputs, steps: int = 4) -> nn.Module:
    """A real training loop, at the recommended rate times ten: the models are tiny and the steps few."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=10 * sarac.recommended_lr(model))
    model.train()
    for _ in range(steps):
        found = first(inputs.call(model))
        loss = (found - torch.linspace(-1, 1, found.numel()).reshape(found.shape)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def result(model: nn.Module, inputs: Inputs) -> Any:
    return outputs(model, *inputs.args, **inputs.kwargs)


@dataclass(frozen=True)
class Case:
    """A base, its trained form, the file of that, and how many matrix products the base's file has."""

    kind: Kind
    base: nn.Module
    model: nn.Module
    report: sarac.ExportReport
    base_count: int

    def inputs(self, rows: int, columns: int) -> Inputs:
        return Inputs.of(self.kind.inputs(rows, columns))

    def uses(self) -> int:
        """How many linear calls are adapted: a weight used twice has two."""
        sites = sarac.trace(self.base).sites
        return sum(use.mode != "train" for name in record_of(self.model).plan.sites for use in sites[name].uses)


def transformed(name: str, method: str) -> tuple[nn.Module, nn.Module]:
    """The base and its trained form."""
    torch.manual_seed(11)
    kind = KINDS[name]
    base = kind.build()
    model = sarac.transform(base, **METHODS[method])
    return base, train(model, Inputs.of(kind.inputs(4, 6)))


def computes_what_torch_does_at_shapes_it_has_not_seen(case: Case) -> None:
    session = Runtime(case.report.path)
    for size in [(1, 1), (1, 9), (5, 4), (3, 7)]:
        inputs = case.inputs(*size)
        ours, theirs = paired(session.run(inputs), result(case.model, inputs))
        check.require_finite(ours, "the file")
        close(ours, theirs)
        differ(ours, paired(ours, result(case.base, inputs))[1])


def is_within_the_gate_and_says_what_was_done(case: Case) -> None:
    report, plan = case.report, record_of(case.model).plan
    routed = not all(adapter.foldable for adapter in plan.sites.values())
    assert report.merged is not routed
    assert set(report.routed) == (set(plan.sites) if routed else set())
    assert set(report.folded) == (set() if routed else set(plan.sites))
    assert len({row.inputs for row in report.comparisons}) >= 2
    assert 0.0 < report.error <= check.gate(torch.float32)
    assert report.max_error > 0.0


def has_the_products_of_the_base_where_merged_and_more_where_routed(case: Case) -> None:
    count, uses = matmul_count(case.report.path), case.uses()
    if case.report.merged:
        assert count == case.base_count
    else:  # V, the router, the mixing of the sets, and U
        assert count == case.base_count + 4 * uses


def has_its_metadata(case: Case) -> None:
    found, record = read_metadata(case.report.path), record_of(case.model)
    plan = sarac.Plan.from_json(found["sarac.plan"])
    assert plan.sites == record.plan.sites
    assert plan.rule == record.plan.rule != ""
    assert found["sarac.base"] == base_hashes(adapted_weights(case.model))["float32"]
    versions = json.loads(found["sarac.versions"])
    assert versions == {"sarac": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    verification = json.loads(found["sarac.verification"])
    assert verification["merged"] is case.report.merged
    rows = [(row["inputs"], row["onnx_error"]) for row in verification["comparisons"]]
    assert rows == [(row.inputs, row.onnx_error) for row in case.report.comparisons]
    assert found["sarac.shapes"] == "dynamic"


def is_of_opset_20(case: Case) -> None:
    file = onnx.load(case.report.path)
    onnx.checker.check_model(file)
    assert {entry.domain: entry.version for entry in file.opset_import}[""] == 20


def verifies_and_the_bases_does_not(case: Case) -> None:
    inputs = case.kind.inputs(2, 5)
    assert sarac.verify(case.model, case.report.path, inputs).merged is case.report.merged
    with pytest.raises(sarac.CheckFailed):
        sarac.verify(case.base, case.report.path, inputs)


FILE = [
    computes_what_torch_does_at_shapes_it_has_not_seen,
    is_within_the_gate_and_says_what_was_done,
    has_the_products_of_the_base_where_merged_and_more_where_routed,
    has_its_metadata,
    is_of_opset_20,
    verifies_and_the_bases_does_not,
]


def base_count(base: nn.Module, inputs: Inputs, path: Path) -> int:
    Onnx(dynamic="static").write(base, inputs, path, {})  # its products are the same, and there sooner
    return matmul_count(path)


@pytest.mark.parametrize("name", KINDS)
def test_main_job(name: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    kind, count = KINDS[name], 0
    for method in (*kind.merged, "routed"):
        base, model = transformed(name, method)
        count = count or base_count(base, Inputs.of(kind.inputs(2, 5)), tmp_path / "base.onnx")
        report = sarac.export(model, tmp_path / f"{method}.onnx", kind.inputs(2, 5))
        for look in FILE:
            with subtests.test(method, file=look.__name__):
                look(Case(kind, base, model, report, count))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", KINDS)
def test_fold_keeps_what_was_learned(name: str, method: str) -> None:
    base, model = transformed(name, method)
    if method == "routed":
        with pytest.raises(sarac.NotFoldable):
            sarac.fold(model)
        return
    merged, report = sarac.fold(model, report=True)
    assert set(report.sites) == set(record_of(model).plan.sites)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    for size in [(1, 1), (3, 7)]:
        inputs = Inputs.of(KINDS[name].inputs(*size))
        close(result(merged, inputs), result(model, inputs))
        differ(first(result(merged, inputs)), first(result(base, inputs)))


@pytest.mark.parametrize("name", KINDS)
def test_routed_model_folds_by_its_mean_gates(name: str) -> None:
    base, model = transformed(name, "routed")
    inputs = Inputs.of(KINDS[name].inputs(8, 6))
    with pytest.warns(sarac.SaracWarning, match="relative output error"):
        merged, report = sarac.fold(model, routing="mean", calibration=[inputs], report=True)
    ours, theirs, before = (first(result(one, inputs)) for one in (merged, model, base))
    found = check.difference(ours, theirs).error
    assert 0.0 < found < check.difference(before, theirs).error
    assert found <= report.approximation * (1 + 1e-6)
