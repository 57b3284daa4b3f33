"""Plain modules, torch's own and hand-written spellings: what sarac must adapt, and what it must refuse and why."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.judge import REFUSED, RIGHT, WRONG, Row, judge
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo import CALLS, Own, Shared, TiedHead, Twice

ROWS, TOKENS, WIDTH, OUT, EXPERTS, IDS = 2, 5, 12, 8, 4, 32
ALL = {"where": "*"}


@dataclass(frozen=True)
class Plain:
    """One case: the module, what it is called with, how it is transformed, and the words of its refusal if it has one."""

    make: Callable[[], nn.Module]
    example: Callable[[], Any]
    refused: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    train: bool = False
    sites: int = 0  # at least so many, where it is known


def run(row: Row, onnx: bool = False) -> Row:
    """Judge one case; a refusal is right where it is what is expected, for the reason that is expected."""
    case = CASES[row.name]
    torch.manual_seed(0)
    row = judge(row, case.make().train(case.train), case.example(), case.options, onnx)
    if case.refused and row.outcome == REFUSED and case.refused in row.reason:
        row.outcome = RIGHT
    elif case.refused and row.outcome == RIGHT:
        row.outcome, row.reason = WRONG, f"adapted, but to be refused with {case.refused!r}"
    elif row.outcome == RIGHT and row.sites < case.sites:
        row.outcome, row.reason = REFUSED, f"{row.sites} sites instead of {case.sites} or more"
    return row


def x(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def tokens() -> Tensor:
    return torch.randint(0, IDS, (ROWS, TOKENS))


def three() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with the batch first."""
    return tuple(torch.randn(ROWS, TOKENS, WIDTH) for _ in range(3))  # type: ignore[return-value]


def two() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, TOKENS, WIDTH), torch.randn(ROWS, TOKENS, WIDTH)


flat, sequence = x(ROWS, WIDTH), x(ROWS, TOKENS, WIDTH)


class Weighted(nn.Module):
    """A forward given as a function of the input and parameters of these shapes."""

    def __init__(self, compute: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.compute = compute
        for name, shape in zip("wvu", shapes, strict=False):
            self.register_parameter(name, nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, *self._read())

    def _read(self) -> list[Tensor]:
        return [getattr(self, name) for name in "wvu" if name in self._parameters]


class Property(nn.Module):
    """A weight that is read through a property, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(OUT, WIDTH))

    @property
    def weight(self) -> Tensor:
        return self.raw * 0.25

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Scaled(nn.Module):
    """A weight times a learned scale of its rows: equalised learning rates, DoRA, weight standardisation are of this kind."""

    def __init__(self, standardised: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, WIDTH))
        self.scale = nn.Parameter(torch.rand(OUT, 1) + 0.5)
        self.standardised = standardised

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.standardised:
            weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
        return F.linear(x, weight * self.scale)


class Experts(nn.Module):
    """Experts of shape (E, out, in), applied in one of the ways that models do it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, OUT, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, OUT) / OUT**0.5)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)  # (rows, experts)
        match self.how:
            case "loop":
                parts = [F.linear(torch.tanh(F.linear(x, self.up[i])), self.down[i]) for i in range(EXPERTS)]
                return sum(part * gates[:, i, None] for i, part in enumerate(parts))
            case "chosen":  # each expert sees its own rows
                y, best = torch.zeros_like(x), gates.argmax(-1)
                for i in range(EXPERTS):
                    rows = torch.where(best == i)[0]
                    y[rows] = F.linear(torch.tanh(F.linear(x[rows], self.up[i])), self.down[i]) * gates[rows, i, None]
                return y
            case "bmm":
                h = torch.tanh(torch.bmm(x.expand(EXPERTS, *x.shape), self.up.mT))
                return (torch.bmm(h, self.down.transpose(1, 2)) * gates.T[..., None]).sum(0)
            case "baddbmm":
                h = torch.tanh(torch.baddbmm(torch.zeros(1), x.expand(EXPERTS, *x.shape), self.up.mT))
                return (torch.baddbmm(torch.zeros(1), h, self.down.mT) * gates.T[..., None]).sum(0)
            case "matmul":
                h = torch.tanh(x @ self.up.mT)
                return ((h @ self.down.mT) * gates.T[..., None]).sum(0)
            case "einsum":
                h = torch.tanh(torch.einsum("bi,eoi->beo", x, self.up))
                return torch.einsum("beo,eio,be->bi", h, self.down, gates)
            case "token":  # every token reads its expert's matrix
                best = gates.argmax(-1)
                h = torch.tanh(torch.bmm(self.up[best], x[..., None]))
                return torch.bmm(self.down[best], h).squeeze(-1) * gates.amax(-1, keepdim=True)
            case _:
                raise ValueError(self.how)


class Fused(nn.Module):
    """One matrix for query, key and value, taken apart in one of the ways that models do it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / WIDTH**0.5)
        self.k = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        w = self.qkv
        match self.how:
            case "output chunk":
                return F.linear(x, w).chunk(3, -1)
            case "weight chunk":
                return tuple(F.linear(x, part) for part in w.chunk(3))
            case "weight split":
                return tuple(F.linear(x, part) for part in w.split(WIDTH, 0))
            case "weight slice":
                return tuple(F.linear(x, w[i * WIDTH : (i + 1) * WIDTH]) for i in range(3))
            case "weight view":
                return tuple(F.linear(x, w.view(3, WIDTH, WIDTH)[i]) for i in range(3))
            case "weight unbind":
                return tuple(x @ part.T for part in w.reshape(3, WIDTH, WIDTH).unbind(0))
            case "concatenated":
                return F.linear(x, torch.cat([w[:WIDTH], self.k, w[2 * WIDTH :]])).chunk(3, -1)
            case _:
                raise ValueError(self.how)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return F.scaled_dot_product_attention(q, k, v)


class Called(nn.Module):
    """A module called in a way of one's own."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *args: Any) -> Any:
        return self.call(self.inner, *args)


class Recurrent(nn.Module):
    """A cell over time."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Stacked(nn.Module):
    """Weights in a ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5) for _ in range(2)])
        self.named = nn.ParameterDict({"last": nn.Parameter(torch.randn(WIDTH, OUT) / WIDTH**0.5)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.several:
            x = torch.tanh(x @ weight)
        return x @ self.named["last"]


class Branching(nn.Module):
    """A forward that looks at numbers, which no trace of it can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(OUT, WIDTH))
        self.two = nn.Parameter(torch.randn(OUT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.one) if float(x.sum()) > 0 else x @ self.two.T


class LowRank(nn.Module):
    """A product of two weights, computed before it meets the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(OUT, 4)), nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.left @ self.right)


class Hyper(nn.Module):
    """A convolution's kernel used once as such and once, flattened, as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT).mT + F.linear(x, self.conv.weight.squeeze(-1))


def _layers() -> Iterator[tuple[str, Plain]]:
    yield "Linear", Plain(lambda: nn.Linear(WIDTH, OUT), flat)
    yield "Linear, no bias", Plain(lambda: nn.Linear(WIDTH, OUT, bias=False), sequence)
    yield "Linear, bfloat16", Plain(lambda: nn.Linear(WIDTH, OUT, dtype=torch.bfloat16), lambda: flat().bfloat16())
    yield "Linear, float16", Plain(lambda: nn.Linear(WIDTH, OUT, dtype=torch.float16), lambda: flat().half())
    yield "Linear, float64", Plain(lambda: nn.Linear(WIDTH, OUT, dtype=torch.float64), lambda: flat().double())
    yield "Linear, one row", Plain(lambda: nn.Linear(WIDTH, 1), flat)
    yield "Linear, lazy", Plain(_lazy, flat)
    yield "Bilinear", Plain(lambda: nn.Bilinear(WIDTH, OUT, 4), lambda: (flat(), x(ROWS, OUT)()))
    for n, conv in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1):
        image, name = x(ROWS, 4, *[7] * n), conv.__name__
        yield name, _conv(conv, image)
        yield f"{name}, stride", _conv(conv, image, stride=2, padding=1)
        yield f"{name}, dilation", _conv(conv, image, dilation=2)
        yield f"{name}, groups", _conv(conv, image, groups=2)
        yield f"{name}, depthwise", Plain(lambda conv=conv: conv(4, 8, 3, groups=4), image)
        yield f"{name}, 1x1", Plain(lambda conv=conv: conv(4, 6, 1), image)
        yield f"{name}, same", _conv(conv, image, padding="same")
        for mode in ("reflect", "replicate", "circular"):
            yield f"{name}, {mode}", _conv(conv, image, padding=1, padding_mode=mode)
    for n, conv in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1):
        image = x(ROWS, 4, *[5] * n)
        yield conv.__name__, _conv(conv, image)
        yield f"{conv.__name__}, stride", _conv(conv, image, stride=2, output_padding=1)
        yield f"{conv.__name__}, groups", _conv(conv, image, groups=2)
    yield "Conv2d, unbatched", _conv(nn.Conv2d, x(4, 7, 7))
    yield "Conv2d, rectangular", Plain(lambda: nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(1, 0)), x(ROWS, 4, 7, 7))
    yield "Embedding", Plain(lambda: nn.Embedding(IDS, WIDTH), tokens, options=ALL)
    yield "Embedding, padding", Plain(lambda: nn.Embedding(IDS, WIDTH, padding_idx=0), tokens, options=ALL)
    yield "Embedding, max_norm", Plain(lambda: nn.Embedding(IDS, WIDTH, max_norm=1.0), tokens, "max_norm", options=ALL)
    yield "EmbeddingBag", Plain(lambda: nn.EmbeddingBag(IDS, WIDTH), tokens, options=ALL)
    yield "EmbeddingBag, sum", Plain(lambda: nn.EmbeddingBag(IDS, WIDTH, mode="sum"), tokens, options=ALL)
    yield "Embedding alone, by default", Plain(lambda: nn.Embedding(IDS, WIDTH), tokens, "`where`")
    yield "LayerNorm alone", Plain(lambda: nn.LayerNorm(WIDTH), flat, "no linear weight")


def _lazy() -> nn.Module:
    module = nn.LazyLinear(OUT)
    module(flat())
    return module


def _conv(conv: Any, image: Callable[[], Tensor], **options: Any) -> Plain:
    return Plain(lambda: conv(4, 6, 3, **options), image)


def _attention() -> Iterator[tuple[str, Plain]]:
    mha = nn.MultiheadAttention
    ways: dict[str, dict[str, Any]] = {
        "packed": {}, "no bias": {"bias": False}, "kdim and vdim": {"kdim": WIDTH, "vdim": WIDTH},
        "bias_kv": {"add_bias_kv": True}, "zero attention": {"add_zero_attn": True},
    }  # fmt: skip
    for name, options in ways.items():
        yield f"MultiheadAttention, {name}", Plain(lambda o=options: mha(WIDTH, 2, batch_first=True, **o), three)
    yield "MultiheadAttention, sequence first", Plain(lambda: mha(WIDTH, 2), three)
    yield (
        "MultiheadAttention, other kdim",
        Plain(
            lambda: mha(WIDTH, 2, kdim=6, vdim=8, batch_first=True),
            lambda: (sequence(), x(ROWS, TOKENS, 6)(), x(ROWS, TOKENS, 8)()),
        ),
    )
    yield (
        "MultiheadAttention, self",
        Plain(lambda: Called(mha(WIDTH, 2, batch_first=True), lambda m, y: m(y, y, y, need_weights=False)[0]), sequence),
    )
    wide = {"dim_feedforward": 16, "batch_first": True}
    layer = nn.TransformerEncoderLayer
    for train in (False, True):
        mode = "train" if train else "eval"
        yield (
            f"TransformerEncoderLayer, {mode}",
            Plain(lambda: nn.TransformerEncoderLayer(WIDTH, 2, **wide), sequence, train=train),
        )
        yield f"TransformerDecoderLayer, {mode}", Plain(lambda: nn.TransformerDecoderLayer(WIDTH, 2, **wide), two, train=train)
        yield f"Transformer, {mode}", Plain(lambda: nn.Transformer(WIDTH, 2, 1, 1, **wide), two, train=train)
        yield f"TransformerEncoder, {mode}", Plain(
            lambda: nn.TransformerEncoder(layer(WIDTH, 2, norm_first=True, **wide), 2, enable_nested_tensor=False),
            sequence, train=train,
        )  # fmt: skip


def _recurrent() -> Iterator[tuple[str, Plain]]:
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        name = kind.__name__
        yield name, Plain(lambda k=kind: k(WIDTH, OUT), sequence)
        yield f"{name}, two layers", Plain(lambda k=kind: k(WIDTH, OUT, 2, batch_first=True), sequence)
        yield f"{name}, bidirectional", Plain(lambda k=kind: k(WIDTH, OUT, bidirectional=True), sequence)
        yield f"{name}, train", Plain(lambda k=kind: k(WIDTH, OUT), sequence, train=True)
    yield "LSTM, proj_size", Plain(lambda: nn.LSTM(WIDTH, OUT, proj_size=4), sequence)
    for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        yield cell.__name__, Plain(lambda c=cell: Recurrent(c(WIDTH, OUT)), sequence)


def _normed() -> Iterator[tuple[str, Plain]]:
    def linear() -> nn.Linear:
        return nn.Linear(WIDTH, OUT)

    yield "weight_norm, old", Plain(lambda: nn.utils.weight_norm(linear()), flat)
    yield "weight_norm, parametrized", Plain(lambda: parametrizations.weight_norm(linear()), flat)
    yield "weight_norm, old, Conv1d", Plain(lambda: nn.utils.weight_norm(nn.Conv1d(4, 6, 3)), x(ROWS, 4, 7))
    yield "weight_norm, parametrized, Conv1d", Plain(lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), x(ROWS, 4, 7))
    yield "spectral_norm, old", Plain(lambda: nn.utils.spectral_norm(linear()), flat)
    yield "spectral_norm, parametrized", Plain(lambda: parametrizations.spectral_norm(linear()), flat)
    yield "orthogonal", Plain(lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)), flat, "cannot be traced")


def _spellings() -> Iterator[tuple[str, Plain]]:
    for call in CALLS:
        yield f"own: {call}", Plain(lambda c=call: Own(c, OUT, WIDTH), flat)
    ways: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], Callable[[], Any]]] = {
        "bmm": (lambda y, w: torch.bmm(y, w), ((TOKENS, WIDTH, OUT),), x(TOKENS, ROWS, WIDTH)),
        "bmm, transposed": (lambda y, w: torch.bmm(y, w.transpose(1, 2)), ((TOKENS, OUT, WIDTH),), x(TOKENS, ROWS, WIDTH)),
        "bmm, from the left": (lambda y, w: torch.bmm(w, y), ((TOKENS, OUT, WIDTH),), x(TOKENS, WIDTH, ROWS)),
        "baddbmm": (lambda y, w: torch.baddbmm(y.new_ones(1), y, w), ((TOKENS, WIDTH, OUT),), x(TOKENS, ROWS, WIDTH)),
        "matmul, three dimensions": (lambda y, w: y @ w, ((TOKENS, WIDTH, OUT),), x(TOKENS, ROWS, WIDTH)),
        "einsum oi": (lambda y, w: torch.einsum("bi,oi->bo", y, w), ((OUT, WIDTH),), flat),
        "einsum io": (lambda y, w: torch.einsum("bti,io->bto", y, w), ((WIDTH, OUT),), sequence),
        "einsum, weight first": (lambda y, w: torch.einsum("oi,bi->bo", w, y), ((OUT, WIDTH),), flat),
        "einsum, ellipsis": (lambda y, w: torch.einsum("...i,oi->...o", y, w), ((OUT, WIDTH),), sequence),
        "einsum, no arrow": (lambda y, w: torch.einsum("bi,ij", y, w), ((WIDTH, OUT),), flat),
        "einsum, heads out": (lambda y, w: torch.einsum("btd,dhk->bthk", y, w), ((WIDTH, 2, 4),), sequence),
        "einsum, heads in": (lambda y, w: torch.einsum("bthk,hkd->btd", y, w), ((3, 4, OUT),), x(ROWS, TOKENS, 3, 4)),
        "einsum, per head": (lambda y, w: torch.einsum("bthi,hio->btho", y, w), ((3, 4, OUT),), x(ROWS, TOKENS, 3, 4)),
        "einsum, to a scalar": (lambda y, w: torch.einsum("bi,oi->b", y, w), ((OUT, WIDTH),), flat),
        "einsum, two weights": (lambda y, w, v: torch.einsum("bi,ij,jk->bk", y, w, v), ((WIDTH, 6), (6, OUT)), flat),
        "tensordot": (lambda y, w: torch.tensordot(y, w, dims=1), ((WIDTH, OUT),), sequence),
        "inner": (lambda y, w: torch.inner(y, w), ((OUT, WIDTH),), sequence),
        "mv": (lambda y, w: torch.mv(w, y), ((OUT, WIDTH),), x(WIDTH)),
        "chain_matmul": (lambda y, w, v: torch.linalg.multi_dot([y, w, v]), ((WIDTH, 6), (6, OUT)), flat),
        "scaled": (lambda y, w: F.linear(y, w * 0.5), ((OUT, WIDTH),), flat),
        "cast": (lambda y, w: F.linear(y, w.to(y.dtype)), ((OUT, WIDTH),), flat),
        "contiguous": (lambda y, w: F.linear(y, w.t().contiguous()), ((WIDTH, OUT),), flat),
        "viewed": (lambda y, w: F.linear(y, w.view(OUT, WIDTH)), ((OUT, 3, 4),), flat),
        "flattened kernel": (lambda y, w: F.linear(y, w.flatten(1)), ((OUT, 3, 2, 2),), flat),
        "conv1d": (lambda y, w: F.conv1d(y.mT, w, padding=1).mT, ((OUT, WIDTH, 3),), sequence),
        "conv2d": (lambda y, w: F.conv2d(y[:, None], w, padding=1), ((4, 1, 3, 3),), sequence),
        "masked": (lambda y, w: F.linear(y, w.tril()), ((WIDTH, WIDTH),), flat),
        "elementwise only": (lambda y, w: y * w, ((ROWS, WIDTH),), flat),
        "broadcast sum": (lambda y, w: (y[:, None] * w).sum(-1), ((OUT, WIDTH),), flat),
        "indexed rows": (lambda y, w: F.linear(y, w[torch.tensor([0, 2, 4])]), ((OUT, WIDTH),), flat),
        "two in a row": (lambda y, w, v: F.linear(torch.tanh(F.linear(y, w)), v), ((6, WIDTH), (OUT, 6)), flat),
        "also its norm": (lambda y, w: F.linear(y, w) + w.norm(), ((OUT, WIDTH),), flat),
        "cosine": (lambda y, w: F.linear(F.normalize(y), F.normalize(w)), ((OUT, WIDTH),), flat),
        "cdist": (lambda y, w: torch.cdist(y, w), ((OUT, WIDTH),), flat),
        "F.embedding": (lambda y, w: F.embedding(y, w), ((IDS, WIDTH),), tokens),
        "indexed by ids": (lambda y, w: w[y], ((IDS, WIDTH),), tokens),
    }  # fmt: skip
    opt_in = {"F.embedding": ALL, "indexed by ids": ALL}
    refused = {"elementwise only": "linear", "cdist": "linear", "broadcast sum": "linear"}
    for name, (compute, shapes, example) in ways.items():
        make = lambda c=compute, s=shapes: Weighted(c, *s)  # noqa: E731
        yield f"own: {name}", Plain(make, example, refused.get(name, ""), opt_in.get(name, {}))
    for how in ("loop", "chosen", "bmm", "baddbmm", "matmul", "einsum", "token"):
        yield f"experts: {how}", Plain(lambda h=how: Experts(h), x(6, WIDTH), sites=3)
    for how in ("output chunk", "weight chunk", "weight split", "weight slice", "weight view", "weight unbind", "concatenated"):
        yield f"fused qkv: {how}", Plain(lambda h=how: Fused(h), sequence)


def _wholes() -> Iterator[tuple[str, Plain]]:
    yield "property", Plain(Property, flat)
    yield "scaled rows", Plain(Scaled, flat)
    yield "standardised", Plain(lambda: Scaled(True), flat)
    yield "used twice", Plain(lambda: Twice(OUT, WIDTH), flat)
    yield "shared by two modules", Plain(lambda: Shared(WIDTH), flat)
    yield "tied head", Plain(lambda: TiedHead(WIDTH), tokens)
    yield "tied head, everything", Plain(lambda: TiedHead(WIDTH), tokens, options=ALL)
    yield "ParameterList and ParameterDict", Plain(Stacked, flat)
    yield "branching on numbers", Plain(Branching, flat)
    yield "product of weights", Plain(LowRank, flat)
    yield "kernel as a matrix", Plain(Hyper, sequence)
    yield (
        "weight read from outside",
        Plain(lambda: Called(nn.Linear(WIDTH, OUT), lambda m, y: F.linear(y, m.weight, m.bias)), flat),
    )
    yield "weight read from outside, transposed", Plain(lambda: Called(nn.Linear(WIDTH, OUT), lambda m, y: y @ m.weight.T), flat)
    yield (
        "checkpointed",
        Plain(
            lambda: Called(nn.Linear(WIDTH, OUT), lambda m, y: torch.utils.checkpoint.checkpoint(m, y, use_reentrant=False)), flat
        ),
    )
    yield "hooked", Plain(_hooked, flat)
    yield "scripted", Plain(lambda: torch.jit.script(nn.Sequential(nn.Linear(WIDTH, OUT))), flat, "script")
    yield "compiled", Plain(lambda: nn.Sequential(torch.compile(nn.Linear(WIDTH, OUT), backend="eager")), flat, "OptimizedModule")
    yield "frozen", Plain(lambda: nn.Linear(WIDTH, OUT).requires_grad_(False), flat)
    yield "half of it zeros", Plain(_zeros, flat)


def _hooked() -> nn.Module:
    module = nn.Linear(WIDTH, OUT)
    module.register_forward_hook(lambda _, __, y: torch.tanh(y))
    return nn.Sequential(module)


def _zeros() -> nn.Module:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUT))
    nn.init.zeros_(module[1].weight)
    return module


CASES: dict[str, Plain] = {
    name: case for part in (_layers, _attention, _recurrent, _normed, _spellings, _wholes) for name, case in part()
}
