"""The front end: every linear weight is found, told how it is used, and whatever is not adapted has a reason."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import (
    TRANSFORMERS,
    Own,
    Shared,
    TiedHead,
    Twice,
    adapt,
    bert,
    close,
    differ,
    folded,
    ids,
    llama,
    mlp,
    require_untouched,
    same,
    shake,
    snapshot,
)

import sarac
from sarac.ir.errors import SaracWarning, TraceError
from sarac.ir.graph import ModelGraph
from sarac.ir.inputs import Inputs
from sarac.trace import trace

LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
FOUND = {
    "llama": {f"model.layers.{i}.{'self_attn' if n[1] == '_' else 'mlp'}.{n}.weight" for i in range(2) for n in LINEAR},
    "gpt2": {f"transformer.h.{i}.{n}.weight" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    "bert": {"pooler.dense.weight"}
    | {
        f"encoder.layer.{i}.{n}.weight"
        for i in range(2)
        for n in (
            *(f"attention.self.{part}" for part in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        )
    },
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_linear_weight_of_a_transformer_is_found(family: str) -> None:
    model = TRANSFORMERS[family]()
    graph = trace(model)
    assert {name for name, site in graph.sites.items() if site.default} == FOUND[family]
    for name in FOUND[family]:
        site = graph.sites[name]
        assert (site.form, site.transposed, len(site.uses)) == ("call", family == "gpt2", 1)
        stored = tuple(model.get_parameter(name).shape)
        assert site.shape == (stored[::-1] if family == "gpt2" else stored)
        assert site.dtype == torch.float32


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_parameter_is_a_site_or_has_a_reason(family: str) -> None:
    model = TRANSFORMERS[family]()
    for traced in (trace(model), trace(adapt(model, where="*0*"))):
        require_complete(traced)


def require_complete(graph: ModelGraph) -> None:
    sites = {name for site in graph.sites.values() for name in site.names}
    own = {n for n, _ in graph.module.named_parameters() if "sara_" in n.rpartition(".")[2]}
    for name, parameter in graph.module.named_parameters():
        if parameter.ndim >= 2 and name not in own:
            assert (name in sites) != (name in graph.skipped), name
    assert all(graph.skipped.values())
    assert all(site.reason for site in graph.sites.values() if not site.default or site.form != "call")


class Odd(nn.Module):
    """Parameters in many uses that are no plain linear call, some of them no linear use at all."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("used", "unused", "sliced", "cast", "added", "looked_up"):
            self.register_parameter(name, nn.Parameter(torch.randn(6, 6)))
        self.experts = nn.Parameter(torch.randn(2, 6, 6))
        self.conv = nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.looked_up[x.argmax(-1)]
        y = F.linear(x @ self.used, self.sliced[:3]) @ self.sliced[3:, :].mT.mT
        return torch.einsum("ti,eio->to", y @ self.cast.to(x.dtype) + self.added.sum(), self.experts)


def test_what_is_not_adapted_has_a_reason() -> None:
    graph = trace(Odd())
    forms = {"used": "call", "sliced": "weight", "cast": "weight", "experts": "weight", "conv.weight": "call"}
    forms |= {"looked_up": "weight", "unused": "weight"}
    assert {name: site.form for name, site in graph.sites.items()} == forms
    assert "computed from it" in graph.sites["sliced"].reason
    assert [name for name, site in graph.sites.items() if not site.default] == ["unused", "looked_up"]
    assert graph.sites["unused"].reason == "Odd's forward does not read it itself"
    assert graph.sites["looked_up"].reason == "rows of it are looked up"
    for name, reason in {"added": "add"}.items():
        assert reason in graph.skipped[name]
    require_complete(graph)
    require_complete(trace(adapt(Odd(), where="used", checked=False)))


class Branches(nn.Module):
    """Control flow on values: fx cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.inner = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.w) if x.sum() > 0 else self.inner(x)


def test_module_that_cannot_be_traced_is_no_error() -> None:
    model, x = Branches(), torch.randn(3, 6)
    graph = trace(model)
    assert graph.sites["inner.weight"].form == "call"
    site = graph.sites["w"]
    assert (site.form, site.default) == ("weight", True)  # its source multiplies with it
    assert site.reason.startswith("Branches cannot be traced (TraceError")
    adapted = shake(adapt(model))
    for sign in (1, -1):
        x = x.abs() * sign
        close(adapted(x), folded(adapted)(x))
    assert not torch.equal(adapted(x), model(x))
    assert not torch.equal(adapted(x.abs()), model(x.abs()))


FROZEN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "writes": (lambda m, x: (setattr(m, "last", 1), x @ m.w)[1], "assigns last"),
    "odd attribute": (lambda m, x: x @ m.w * m.table["a"], "reads the attribute table of type dict"),
    "own tensors": (lambda m, x: x @ m.w + torch.arange(6), "makes tensors of its own"),
}


@pytest.mark.parametrize(("forward", "said"), FROZEN.values(), ids=FROZEN)
def test_trace_that_would_freeze_something_takes_the_weight_form(forward: Callable[..., Tensor], said: str) -> None:
    kind = type("Freezes", (nn.Module,), {"forward": lambda self, x: forward(self, x)})
    model = kind()
    model.w, model.table = nn.Parameter(torch.randn(6, 6)), {"a": 2.0}
    site = trace(model).sites["w"]
    assert (site.form, site.default) == ("weight", True)
    assert said in site.reason
    adapted, x = shake(adapt(model)), torch.randn(3, 6)
    before = adapted(x)
    close(before, folded(adapted)(x))
    adapted.table["a"] = 5.0
    assert torch.equal(adapted(x), before) == (said != FROZEN["odd attribute"][1])


def test_optional_arguments_take_the_weight_form() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return x @ self.w if bias is None else x @ self.w + bias

    site = trace(Optional()).sites["w"]
    assert (site.form, site.reason) == ("weight", "Optional keeps its forward: forward has a branch or a loop")
    Optional.forward = lambda self, x, scale=2.0: x @ self.w * scale
    assert trace(Optional()).sites["w"].reason == "Optional keeps its forward: it takes optional arguments"


def test_two_modes_are_two_graphs_only_where_they_differ() -> None:
    assert list(trace(nn.Linear(6, 5)).regions[""].graphs()) == ["both"]
    assert list(trace(Own("at", 5, 6)).regions[""].graphs()) == ["train", "eval"]


def test_shared_and_repeated_use_is_one_site() -> None:
    twice = trace(Twice(5, 6)).sites
    assert [(site.name, len(site.uses), site.form) for site in twice.values()] == [("w", 2, "call")]
    shared = trace(Shared(4)).sites
    assert [(site.names, len(site.uses)) for site in shared.values()] == [(("first.weight", "second.weight"), 2)]
    tied = trace(TiedHead(8)).sites
    assert tied["embed.weight"].names == ("embed.weight", "head.weight")


@pytest.mark.parametrize("build", [llama, lambda: mlp(6, 5, 4), lambda: Own("at", 5, 6).train(), Odd, Branches])
def test_model_is_only_read(build: Callable[[], nn.Module]) -> None:
    model = build()
    model.train()
    next(iter(model.children()), model).eval()
    before = snapshot(model)
    trace(model)
    require_untouched(model, before)


class Logs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.log, self.cache = nn.Parameter(torch.randn(6, 6)), [], {}

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1)
        self.cache["last"] = x
        return x @ self.w


def test_containers_of_the_model_are_only_read() -> None:
    model = Logs()
    trace(model)
    assert (model.log, model.cache) == ([], {})


@pytest.mark.parametrize("thing", [3, torch.ones(2), "model", torch.nn.functional.relu, nn.Linear])
def test_what_is_no_module_is_told(thing: object) -> None:
    with pytest.raises(TraceError, match=rf"traces a torch\.nn\.Module, not {type(thing).__name__}: give the model itself"):
        trace(thing)


def test_lazy_and_empty_models_have_no_sites() -> None:
    for model in (nn.LazyLinear(3), nn.ReLU(), nn.Sequential()):
        assert not trace(model).sites


def test_adapted_model_shows_its_sites() -> None:
    model = adapt(mlp(6, 5, 4), where="0.weight")
    graph = trace(model)
    assert {name: site.reason for name, site in graph.sites.items()} == {"0.weight": "adapted", "2.weight": ""}
    assert graph.sites["0.weight"].shape == (5, 6)
    assert not any("sara" in name for name in (*graph.sites, *graph.skipped))


# With example inputs: the whole model.


def test_siblings_calls_and_flops_of_the_whole_model() -> None:
    graph = trace(llama(), {"input_ids": ids(2, 5)})
    layer = "model.layers.0."
    whole = graph.whole
    assert whole is not None
    assert tuple(f"{layer}self_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj")) in whole.siblings
    assert tuple(f"{layer}mlp.{n}.weight" for n in ("gate_proj", "up_proj")) in whole.siblings
    assert len(whole.siblings) == 4
    embedding = "model.embed_tokens.weight"  # the tied head is the same weight
    assert {name: count for name, count in whole.calls.items() if count != 1} == {embedding: 2}
    assert whole.flops[embedding] == 2 * 10 * 16 * 32
    assert [whole.depths[f"{layer}{n}.weight"] for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")] == [1, 2, 3]
    assert set(whole.calls) == set(graph.sites)
    assert whole.flops[f"{layer}self_attn.q_proj.weight"] == 2 * 10 * 16 * 16
    assert whole.flops[f"{layer}self_attn.k_proj.weight"] == 2 * 10 * 16 * 8
    assert whole.flow.has_edge(f"{layer}mlp.up_proj.weight", f"{layer}mlp.down_proj.weight")
    assert not whole.flow.has_edge(f"{layer}mlp.down_proj.weight", f"{layer}mlp.up_proj.weight")


def test_repeated_calls_are_counted() -> None:
    whole = trace(Shared(4), torch.ones(3, 4)).whole
    assert dict(whole.calls) == {"first.weight": 3}
    assert whole.flops["first.weight"] == 3 * 2 * 3 * 4 * 4
    plain = trace(mlp(6, 5, 4), torch.ones(3, 6)).whole
    assert dict(plain.calls) == {"0.weight": 1, "2.weight": 1}
    assert list(plain.flow.edges) == [("0.weight", "2.weight")]


def test_example_inputs_are_kept_and_modes_restored() -> None:
    model = mlp(6, 5, 4).train()
    graph = trace(model, (torch.ones(3, 6),))
    assert isinstance(graph.example_inputs, Inputs)
    assert all(module.training for module in model.modules())
    assert trace(model).whole is None


class Hides(nn.Module):
    """Its parts show nothing of what it does with them: the whole model does."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.never, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm((3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.plain(x), self.norm.weight.T[:, :3] @ self.norm.weight) + self.plain.weight.sum()


def test_whole_model_is_held_against_its_modules() -> None:
    x = torch.randn(2, 3, 6)
    with pytest.warns(SaracWarning) as told:
        graph = trace(Hides(), x)
    said = " ".join(str(warning.message) for warning in told)
    assert "norm.weight feeds a linear operation of the whole model, and its module did not show it" in said
    assert "These example inputs never reach never.weight (1 sites)" in said
    assert "plain.weight" not in said
    assert graph.sites["plain.weight"].others == ("add",)
    assert graph.whole.calls["plain.weight"] == 1
    assert "never.weight" not in graph.whole.calls
    assert trace(Hides()).sites["plain.weight"].others == ()


def test_agreement_is_silent(recwarn: pytest.WarningsRecorder) -> None:
    for model, inputs in ((llama(), ids()), (mlp(6, 5, 4), torch.ones(3, 6)), (TiedHead(8), ids()), (bert(), ids())):
        trace(model, inputs)
    assert not [warning for warning in recwarn if issubclass(warning.category, SaracWarning)]


FLOPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6), 2 * 3 * 6 * 5),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7), 2 * 2 * 6 * 25 * 2 * 9),
    "packed attention": (lambda: _Attends(), (2, 3, 8), 2 * 6 * 24 * 8),
}


class _Attends(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(("build", "shape", "flops"), FLOPS.values(), ids=FLOPS)
def test_flops_of_one_weight(build: Callable[[], nn.Module], shape: tuple[int, ...], flops: int) -> None:
    graph = trace(build(), torch.randn(shape))
    name = next(iter(graph.sites))
    assert graph.whole.flops[name] == flops


class Leaves(nn.Linear):
    """It leaves torch when it is captured."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise NotImplementedError("not here")
        return super().forward(x)


def test_what_cannot_be_exported_is_told() -> None:
    with pytest.warns(SaracWarning, match=r"torch\.export cannot capture Leaves .*float32\[3, 6\].* without its dataflow"):
        graph = trace(Leaves(6, 5), torch.ones(3, 6))
    assert graph.whole is None
    assert graph.sites == trace(Leaves(6, 5)).sites


class Doubles(nn.Linear):
    """Whose call does more than its forward."""

    def __call__(self, *args: Tensor) -> Tensor:
        return 2 * super().__call__(*args)


class Named(nn.Module):
    """Which knows its weight by another name too."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 6))

    def __getattr__(self, name: str) -> Tensor:
        return super().__getattr__("w" if name == "kernel" else name)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel)


@pytest.mark.parametrize("build", [lambda: nn.Linear(6, 5), lambda: Doubles(6, 5), Named])
def test_modules_with_ways_of_their_own_are_traced_by_them(build: Callable[[], nn.Module]) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = build(), nn.Parameter(torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.inner(x), self.last)

    call, base, x = nn.Module.__call__, Holds(), torch.randn(3, 6)
    expected = base(x)
    model = sarac.transform(base, where="*")
    same(model(x), expected)
    assert set(trace(base).sites) == {"last", *(f"inner.{name}" for name, p in base.inner.named_parameters() if p.dim() > 1)}
    shake(model)
    differ(model(x), expected)
    close(sarac.fold(model)(x), model(x))
    assert nn.Module.__call__ is call
