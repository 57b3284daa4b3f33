"""The laws over random trees of modules, built by hypothesis out of every spelling of a linear weight."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.plain import WIDTH, Experts, Fused, LowRank, Stacked, Weighted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo import CALLS, Own, Shared, Twice, close, outputs, require_untouched, shake, snapshot

import sarac
from sarac.ir import check

W = WIDTH


class Rows(nn.Module):
    """A module of rows (n, W), over the tokens of a sequence."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, W)).reshape(*x.shape[:-1], -1)


class Channels(nn.Module):
    """A convolution over the tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT).mT


class First(nn.Module):
    """What a module gives first, called with the same input several times over."""

    def __init__(self, inner: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*[x] * self.times)[0]


class Looked(nn.Module):
    """An embedding of what the largest of each row is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(x.detach().argmax(-1))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.LayerNorm(W)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Again(nn.Module):
    """One module called twice, its weight read from outside in between."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(torch.tanh(self.inner(x)))), self.last.weight.T) + self.last(x)


class Meets(nn.Module):
    """Two branches that meet."""

    def __init__(self, one: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.one(x)) * torch.sigmoid(self.two(x))


LEAVES: dict[str, Callable[[], nn.Module]] = {
    **{f"own: {name}": lambda n=name: Rows(Own(n, W, W)) for name in CALLS},
    "linear": lambda: nn.Linear(W, W),
    "twice": lambda: Rows(Twice(8, W)),
    "shared": lambda: Shared(W),
    "conv": lambda: Channels(nn.Conv1d(W, W, 3, padding=1)),
    "conv, grouped": lambda: Channels(nn.Conv1d(W, W, 3, padding=2, dilation=2, groups=3)),
    "conv, circular": lambda: Channels(nn.Conv1d(W, W, 3, padding=1, padding_mode="circular")),
    "conv, transposed": lambda: Channels(nn.ConvTranspose1d(W, W, 3, padding=1)),
    "embedding": Looked,
    "attention": lambda: First(nn.MultiheadAttention(W, 2, batch_first=True), 3),
    "encoder": lambda: nn.TransformerEncoderLayer(W, 2, 16, dropout=0.0, batch_first=True),
    "lstm": lambda: First(nn.LSTM(W, W, batch_first=True)),
    "gru": lambda: First(nn.GRU(W, W // 2, bidirectional=True, batch_first=True)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(W, W)),
    "weight_norm, old": lambda: torch.nn.utils.weight_norm(nn.Linear(W, W)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(W, W)),
    "experts: einsum": lambda: Rows(Experts("einsum")),
    "experts: bmm": lambda: Rows(Experts("bmm")),
    "experts: matmul": lambda: Rows(Experts("matmul")),
    "heads": lambda: Weighted(
        lambda x, w, v: torch.einsum("bshk,hkd->bsd", torch.einsum("bsd,dhk->bshk", x, w), v), (W, 2, 6), (2, 6, W)
    ),
    "fused": lambda: Fused("weight split"),
    "concatenated": lambda: Fused("concatenated"),
    "product": lambda: nn.Sequential(LowRank(), nn.Linear(8, W)),
    "kept apart": lambda: nn.Sequential(Stacked(), nn.Linear(8, W)),
    "standardised": lambda: Weighted(lambda x, w: F.linear(x, w / w.std(1, keepdim=True)), (W, W)),
}


def grow(children: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    chain: Callable[[Sequence[nn.Module]], nn.Module] = lambda parts: nn.Sequential(*parts)  # noqa: E731
    return st.one_of(
        st.lists(children, min_size=2, max_size=3).map(chain),
        children.map(Residual),
        children.map(Again),
        st.builds(Meets, children, children),
    )


def leaf(name: str) -> nn.Module:
    torch.manual_seed(len(name))
    return LEAVES[name]()


TREES = st.recursive(st.sampled_from(list(LEAVES)).map(leaf), grow, max_leaves=4)
PLANS = st.sampled_from(["threshold:0.6", "energy:0.8", "rank:2,train=factors", "threshold:0.3,train=factors,init=random"])
X = torch.randn(2, 5, W, generator=torch.Generator().manual_seed(0), device="cpu")


def quietly(act: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sarac.SaracWarning)
        return act()


@settings(max_examples=40)
@given(TREES, PLANS, st.booleans())
def test_random_trees(tree: nn.Module, plan: str, training: bool) -> None:
    # float64: what is compared is the surgery, and not how a random model amplifies rounding. A spectral norm in training moves
    # its buffers at every call, so that no two calls give the same.
    training = training and not any(name.endswith("_u") for name, _ in tree.named_buffers())
    tree, x = tree.double().train(training), X.to(torch.get_default_device()).double()
    before, expected = snapshot(tree), outputs(tree, x)
    model = quietly(lambda: sarac.transform(tree, plan, where="*"))
    close(outputs(model, x), expected, torch.float64)
    shake(model)
    moved = outputs(model, x)
    assert check.difference(moved, expected).error > 1e-6
    require_untouched(tree, before)
    folded = quietly(lambda: sarac.fold(model))
    close(outputs(folded, x), moved, torch.float64)
    assert list(folded.state_dict()) == list(tree.state_dict())
    assert [type(module) for module in folded.modules()] == [type(module) for module in tree.modules()]
    with sarac.disabled(model):
        close(outputs(model, x), expected, torch.float64)
    with TemporaryDirectory() as folder:
        sarac.save_adapter(model, Path(folder) / "a.safetensors")
        close(outputs(sarac.load_adapter(tree, Path(folder) / "a.safetensors"), x), moved, torch.float64)


@settings(max_examples=20)
@given(TREES)
def test_random_trees_with_routed_adapters(tree: nn.Module) -> None:
    tree, x = tree.double().eval(), X.to(torch.get_default_device()).double()
    routable = [s.name for s in sarac.trace(tree).sites.values() if s.form == "call" and not s.others]
    if not routable:
        return
    expected = outputs(tree, x)
    model = quietly(lambda: sarac.transform(tree, "threshold:0.5,sets=3", method="mosara", where=routable))
    close(outputs(model, x), expected, torch.float64)
    shake(model)
    assert check.difference(outputs(model, x), expected).error > 1e-6
    folded = quietly(lambda: sarac.fold(model, routing="mean", calibration=[(x,)]))
    assert list(folded.state_dict()) == list(tree.state_dict())
    with sarac.disabled(model):
        close(outputs(model, x), expected, torch.float64)
