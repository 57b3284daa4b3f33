"""The small chains of operations that every method shares, compiled: the norm, the rotation, the gate, the loss.

A step of a small model on a fast GPU is thousands of kernels that each wait for the one before. What sarac and PEFT put into the
model stays as it is, and the chains compute what they did, up to rounding. `install` proves them on this device first; where one
cannot be compiled, all stay as they were, and the lines of results say so. Within `chains()` the models take them: generated
texts do not, whose lengths would be compiled one by one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama

Chain = Callable[..., Any]
SILU = (nn.SiLU, type(ACT2FN["silu"]))
# Rows and tokens of a row that the chains are proven on: as in a step where kernels are chosen by their size, few elsewhere.
PROVEN = {"cuda": (16, 256), "cpu": (3, 40)}
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest number
VARIANTS = 64  # of a chain: gradients or none, of which of its inputs, a batch as long as its rows


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The root mean square norm of x (tokens, width), as LlamaRMSNorm."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q and k (rows, heads, length, width) with their positions, in the dtype that attention takes them to anyway."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos + llama.rotate_half(q) * sin).to(dtype), (k * cos + llama.rotate_half(k) * sin).to(dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up (tokens, width)."""
    return F.silu(gate) * up


def losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """The nll of each token (tokens,), in float32, from logits (tokens, vocabulary)."""
    return F.cross_entropy(logits.float(), wanted, reduction="none")


CHAINS: dict[str, Chain] = {"norm": norm, "turned": turned, "gated": gated, "losses": losses}
# The dimensions of each argument whose sizes change.
FREE: dict[str, tuple[tuple[int, ...], ...]] = {
    "norm": ((0,),), "turned": ((0, 2), (0, 2), (0, 1), (0, 1)), "gated": ((0,), (0,)), "losses": ((0,), (0,)),
}  # fmt: skip
_taken: dict[str, Chain] = {}  # those that are compiled
_failed: list[str] = []
_within: list[None] = []  # one for every `chains()` that is open


def why_not() -> str:
    """Why the chains are not compiled; "" where they are."""
    return _failed[0] if _failed else "" if _taken else "not asked for"


@contextmanager
def chains() -> Iterator[None]:
    """Let the models take the compiled chains for a while."""
    _within.append(None)
    try:
        yield
    finally:
        _within.pop()


def take(name: str, *args: Any) -> Any:
    """A chain on these arguments: compiled where that is so, as it is written elsewhere."""
    found = _taken.get(name)
    if found is None or not _within:
        return CHAINS[name](*args)
    for tensor, free in zip(args, FREE[name], strict=False):
        torch._dynamo.maybe_mark_dynamic(tensor, [dim for dim in free if tensor.shape[dim] > 1])
    try:
        return found(*args)
    except torch._dynamo.exc.TorchDynamoException as error:
        _give_up(error)
        return CHAINS[name](*args)


def _give_up(error: Exception) -> None:
    _failed.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    _taken.clear()


def install(config: Any, device: torch.device, backend: str = "inductor", only: Sequence[str] = tuple(CHAINS)) -> str:
    """Compile the chains, prove them, let Llamas take them; why not, or "". They stay for the life of the process.

    `only`: the chains that are compiled. Rows and lengths may change without another compilation; what trains may not.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._inductor.config.compile_threads = 1  # its workers are slower to start than these few kernels to compile
    _failed.clear()
    _taken.update({name: torch.compile(CHAINS[name], backend=backend, fullgraph=True) for name in only})
    try:
        for name in only:
            prove(name, config, device)
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises, the models run as they are
        _give_up(error)
        return why_not()
    _patch()
    return why_not()


def remove() -> None:
    """Leave the chains as they are written."""
    _taken.clear()
    _failed.clear()


def prove(name: str, config: Any, device: torch.device) -> None:
    """Run a compiled chain forward, backward and without gradients; raise unless it computes what the plain one does."""
    cuda = device.type == "cuda"
    given = samples(config, device, torch.bfloat16 if cuda else torch.float32)[name]
    outcomes = []
    for chain in (CHAINS[name], lambda *args: take(name, *args)):
        inputs = [one.detach().requires_grad_() if isinstance(one, Tensor) and one.requires_grad else one for one in given]
        within = torch.autocast("cuda", torch.bfloat16) if cuda and name != "losses" else nullcontext()
        with chains(), within:
            made = chain(*inputs)
            with torch.no_grad():
                plain = chain(*(one.detach() if isinstance(one, Tensor) and one.requires_grad else one for one in inputs))
        outputs = made if isinstance(made, tuple) else (made,)
        sum((one.float() * torch.linspace(-1, 1, one.numel(), device=device).view_as(one)).sum() for one in outputs).backward()
        again = plain if isinstance(plain, tuple) else (plain,)
        outcomes.append([*outputs, *again, *(one.grad for one in inputs if isinstance(one, Tensor) and one.requires_grad)])
    for wanted, found in zip(*outcomes, strict=True):
        error, size = (wanted - found).abs().max().item(), wanted.abs().max().item()
        if not error <= NEAR[wanted.dtype] * size:
            raise ValueError(f"The compiled chain '{name}' is off by {error:.2g} of {size:.2g} on {device}: it is not taken.")
    if why_not():
        raise RuntimeError(why_not())


def samples(config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments for every chain, of the model's sizes and as its modules give them; `dtype`: what its products run in."""
    rows, length = PROVEN[device.type]
    draw, tokens = torch.Generator().manual_seed(0), rows * length
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def some(*shape: int, to: torch.dtype = dtype, trains: bool = True) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, to).requires_grad_(trains)

    def heads(count: int) -> Tensor:
        return some(rows, length, count, width, trains=False).transpose(1, 2).requires_grad_()

    angles = [some(1, length, width, to=torch.float32, trains=False) for _ in range(2)]
    wanted = torch.randint(config.vocab_size, (tokens,), generator=draw).to(device)
    weight = nn.Parameter(some(config.hidden_size, to=torch.float32, trains=False), requires_grad=False)
    return {
        "norm": (some(tokens, config.hidden_size, to=torch.float32), weight, config.rms_norm_eps),
        "turned": (heads(config.num_attention_heads), heads(config.num_key_value_heads), *angles, dtype),
        "gated": (some(tokens, config.intermediate_size), some(tokens, config.intermediate_size)),
        "losses": (some(tokens, config.vocab_size), wanted),
    }


def _patch() -> None:
    """Have transformers' Llama ask for the chains; elsewhere than within `chains()` it runs its own lines."""
    if getattr(llama.LlamaMLP.forward, "asks", False):
        return
    normed, rotated, gate = llama.LlamaRMSNorm.forward, llama.apply_rotary_pos_emb, llama.LlamaMLP.forward

    def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _on():
            return normed(self, hidden_states)
        flat = hidden_states.flatten(0, -2)
        found: Tensor = take("norm", flat, self.weight, self.variance_epsilon)
        return found.view_as(hidden_states)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if not _on() or unsqueeze_dim != 1:
            return rotated(q, k, cos, sin, unsqueeze_dim)
        kind = q.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.promote_types(q.dtype, cos.dtype)
        return take("turned", q, k, cos, sin, dtype)

    def mlp_forward(self: Any, x: Tensor) -> Any:
        if not _on() or not isinstance(self.act_fn, SILU):
            return gate(self, x)
        opened, up = self.gate_proj(x), self.up_proj(x)
        found: Tensor = take("gated", opened.flatten(0, -2), up.flatten(0, -2))
        return self.down_proj(found.view_as(up))

    mlp_forward.asks = True  # type: ignore[attr-defined]
    llama.LlamaRMSNorm.forward, llama.LlamaMLP.forward = norm_forward, mlp_forward  # type: ignore[method-assign,assignment]
    llama.apply_rotary_pos_emb = rotate


def _on() -> bool:
    return bool(_taken and _within)
