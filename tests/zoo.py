"""Small models of every kind that the foundation promises to handle, and the few steps that nearly every test takes."""

import importlib.util
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from sarac.ir import check
from sarac.ir.layers import adapted
from sarac.ir.pipeline import run
from sarac.passes.choose import Choose
from sarac.passes.fold import Fold
from sarac.passes.rewrite import Rewrite
from sarac.trace import trace

VOCABULARY = 32
_LIBRARIES: list[torch.library.Library] = []  # an operator lives as long as the library that defined it


def torchvision_operator() -> None:
    """Define the operator without which an installed torchvision does not import beside torch's CPU build."""
    if importlib.util.find_spec("torchvision") is not None and not hasattr(torch.ops.torchvision, "nms"):
        _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
        _LIBRARIES[-1].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def adapt(model: nn.Module, plan: Any = "threshold:0.6", *, checked: bool = True, seed: int = 0, **choice: Any) -> nn.Module:
    """The adapted model, by the passes themselves."""
    return run(trace(model), Choose(plan, **choice), Rewrite(seed), check=checked).module


def folded(model: nn.Module, *, checked: bool = True) -> nn.Module:
    """The plain model again."""
    return run(trace(model), Fold(), check=checked).module


def shake(model: nn.Module) -> nn.Module:
    """Move all that trains to where training might have left it: each shift by a quarter to three quarters."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.rand(parameter.shape) * 0.5 + 0.25
            noise *= torch.randint(0, 2, parameter.shape) * 2 - 1
            size = 1.0 if name.endswith(("shift", "router", "router_in")) else 0.2
            parameter.data += (noise * size).to(parameter)
    return model


def trainables(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def roles(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The full names of every adapter's tensors that train, by site."""
    found = {}
    for path, _, state in adapted(model):
        for slot in state.slots.values():
            prefix = f"{path}." if path else ""
            found[slot.site] = tuple(prefix + slot.attribute(role) for role in slot.adapter.trainable)
    return found


def seed(number: int) -> None:
    """As torch.manual_seed, which formats the stack for every kind of device that is not in use."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def outputs(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the model gives in its present mode, from a fixed seed."""
    seed(7)
    with torch.no_grad():
        return model(*args, **kwargs)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that surgery on a copy must leave alone."""
    state: dict[str, Any] = {"modes": [(type(m), m.training, sorted(vars(m))) for m in model.modules()]}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        state[name] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.detach().clone())
    return state


def require_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, now in after.items():
        assert now[:-1] == before[name][:-1], name
        assert torch.equal(now[-1], before[name][-1]) if isinstance(now[-1], Tensor) else now[-1] == before[name][-1], name


def same(actual: Any, expected: Any) -> None:
    check.require_identical(actual, expected, "two outputs")


def close(actual: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    check.require_close(actual, expected, dtype, "two outputs")


def differ(actual: Any, expected: Any) -> None:
    """Further apart than any rounding at float32 explains."""
    assert check.difference(actual, expected).error > 10 * check.gate(torch.float32)


class Call(NamedTuple):
    """One way to write a linear operation on a parameter of one's own."""

    compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    transposed: bool  # the parameter is stored as (in, out)
    form: str = "call"


CALLS = {
    "linear": Call(lambda x, w, b: F.linear(x, w, b), False),
    "linear_by_name": Call(lambda x, w, b: F.linear(input=x, weight=w, bias=b), False),
    "linear_flipped": Call(lambda x, w, b: F.linear(x, w.t(), b), True),
    "at": Call(lambda x, w, b: x @ w, True),
    "at_T": Call(lambda x, w, b: x @ w.T, False),
    "at_T_T": Call(lambda x, w, b: x @ w.T.mT, True),
    "matmul": Call(lambda x, w, b: torch.matmul(x, w) + b, True),
    "matmul_t": Call(lambda x, w, b: torch.matmul(x, torch.t(w)), False),
    "matmul_method": Call(lambda x, w, b: x.matmul(w), True),
    "mm": Call(lambda x, w, b: torch.mm(x, w), True),
    "mm_transpose": Call(lambda x, w, b: x.mm(w.transpose(0, 1)), False),
    "permute": Call(lambda x, w, b: x @ w.permute(1, 0), False),
    "swapaxes": Call(lambda x, w, b: x @ torch.swapaxes(w, -1, -2), False),
    "addmm": Call(lambda x, w, b: torch.addmm(b, x, w), True),
    "addmm_mT": Call(lambda x, w, b: torch.addmm(b, x, w.mT), False),
    "addmm_method": Call(lambda x, w, b: b.addmm(x, w), True),
    "left": Call(lambda x, w, b: (w @ x.mT).mT, False),
    "left_t": Call(lambda x, w, b: torch.matmul(w.t(), x.mT).mT + b, True),
    "matmul_by_name": Call(lambda x, w, b: torch.matmul(input=x, other=w) + b, True),
    "linalg_matmul": Call(lambda x, w, b: torch.linalg.matmul(x, w), True),
    "addmm_left": Call(lambda x, w, b: torch.addmm(b[:, None], w, x.mT).mT, False, "weight"),
    "einsum": Call(lambda x, w, b: torch.einsum("ti,oi->to", x, w), False),
    "einsum_rest": Call(lambda x, w, b: torch.einsum("io,...i->...o", w, x) + b, True),
    "sliced": Call(lambda x, w, b: F.linear(x, torch.cat([w[:2], w[2:]]), b), False, "weight"),
    "chunks": Call(lambda x, w, b: torch.cat([x @ part for part in w.split(2, 1)], -1), True, "weight"),
    "scaled": Call(lambda x, w, b: F.linear(x, w * 0.5, b), False, "weight"),
    "cast": Call(lambda x, w, b: F.linear(x, w.to(x.dtype), b), False, "weight"),
    "addmm_scaled": Call(lambda x, w, b: torch.addmm(b, x, w.t(), alpha=0.5), False, "weight"),
}


class Own(nn.Module):
    """A linear operation on a parameter of one's own, then a dropout that only training has."""

    def __init__(self, call: str, out: int, inner: int) -> None:
        super().__init__()
        self.compute = CALLS[call].compute
        self.w = nn.Parameter(torch.randn(*((inner, out) if CALLS[call].transposed else (out, inner))) / inner**0.5)
        self.b = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.compute(x, self.w, self.b)
        return F.dropout(torch.tanh(y), 0.25, self.training)


class Twice(nn.Module):
    """One weight used twice in one forward, in both layouts."""

    def __init__(self, out: int, inner: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(out, inner) / inner**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.w)) @ self.w


class Shared(nn.Module):
    """One weight in two modules, the second called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedHead(nn.Module):
    """An embedding whose weight is the output head's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(ids))))


def mlp(*widths: int, between: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers with something between them."""

    def layers() -> Iterator[nn.Module]:
        for inner, out in pairwise(widths):
            yield nn.Linear(inner, out)
            yield between()

    return nn.Sequential(*list(layers())[:-1])


def small() -> nn.Module:
    """A factory of the least that has layers."""
    return mlp(6, 8, 5).eval()


def ids(rows: int = 2, columns: int = 5) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, columns))


def llama(layers: int = 2) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert(layers: int = 2) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2
    )
    return transformers.BertModel(config).eval()


def gpt2(layers: int = 2) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=layers, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config).eval()


TRANSFORMERS = {"llama": llama, "bert": bert, "gpt2": gpt2}
