"""Generating text from an exported step: keys and values stay where they are, and each token is one run over bound memory.

On a GPU the step for one token is captured as a CUDA graph for each number of rows and room; prompts run beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sarac.backends.binding import Lane, Port, bind, taken
from sarac.backends.decoding import Steps
from sarac.backends.graphs import NONE, settings
from sarac.backends.tenants import Adapters, Chosen
from sarac.ir.errors import InputError

STEP = 64  # tokens by which the room of a cache is rounded up: one CUDA graph serves many lengths
_KEPT = 4  # caches that stay, by rows and room
_LOOK = 16  # tokens between two looks whether all rows have ended: each waits for the GPU
Choose = Callable[[Tensor, Tensor], Tensor]  # the next tokens (rows,) from the ids so far and the logits (rows, words)


@dataclass
class _Cache:
    """Keys and values for so many rows and so much room, and one step over them, bound for good."""

    past: dict[str, Tensor]
    given: dict[str, Tensor]
    logits: Tensor
    binding: Any
    settings: Any
    adapters: Any


class Generator:
    """What a session of an exported step generates with; `graphs` where it may capture CUDA graphs."""

    def __init__(
        self, session: Any, lane: Lane, inputs: Mapping[str, Port], outputs: Mapping[str, Port], adapters: Adapters, steps: Steps
    ) -> None:
        self._session, self._lane, self._inputs, self._outputs = session, lane, inputs, outputs
        self._adapters, self._steps = adapters, steps
        self._caches: dict[tuple[int, int], _Cache] = {}
        self._made = 0

    def __call__(
        self, ids: Tensor, seen: Tensor, count: int, ends: Sequence[int] | None, choose: Choose, adapter: Chosen
    ) -> Tensor:
        """The ids (rows, columns) with up to `count` tokens behind them, until every row has met one of `ends`."""
        rows, columns = ids.shape
        cache = self._cache(rows, -(-(columns + count) // STEP) * STEP)
        self._adapters.fill(cache.adapters, adapter)
        stops = torch.tensor([*(self._steps.eos if ends is None else ends)], dtype=ids.dtype, device=ids.device)
        logits = self._prompt(cache, ids, seen, adapter)
        done = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        for step in range(count):
            token = choose(ids, logits[:, -1]).masked_fill(done, self._steps.pad)
            ids, done = torch.cat((ids, token[:, None]), 1), done | torch.isin(token, stops)
            if step + 1 == count or (step % _LOOK == _LOOK - 1 and bool(done.all())):
                break
            logits = self._step(cache, token, columns + step)
        return _ended(ids, columns, stops)

    def follow(self, ids: Tensor, seen: Tensor, count: int, adapter: Chosen = None) -> Tensor:
        """The logits (rows, count + 1, words) behind all but the last `count` tokens, and behind each of these in its turn."""
        found: list[Tensor] = []
        given = ids.shape[1] - count

        def told(so_far: Tensor, logits: Tensor) -> Tensor:
            found.append(logits.clone())  # the next step writes into the same memory
            return ids[:, min(so_far.shape[1], ids.shape[1] - 1)]

        self(ids[:, :given], seen[:, :given], count + 1, (), told, adapter)
        return torch.stack(found, 1)

    def _prompt(self, cache: _Cache, ids: Tensor, seen: Tensor, adapter: Chosen) -> Tensor:
        """Fill the cache with a prompt; gives the logits behind its last column."""
        rows, columns = ids.shape
        room = next(iter(cache.past.values())).shape[1]
        there = torch.zeros(rows, room, dtype=ids.dtype, device=ids.device)
        there[:, :columns] = seen
        positions = torch.arange(columns, device=ids.device)
        places = (seen.cumsum(1) - 1).clamp(min=0)
        given = {"input_ids": ids, "position_ids": places, "cache_position": positions}
        given |= self._steps.masks(there, positions, self._mask_dtype())
        for name, mask in self._steps.masks(there, positions[-1:], self._mask_dtype()).items():
            cache.given[name].copy_(mask)
        cache.given["position_ids"].copy_(places[:, -1:])
        for tensor in cache.past.values():
            tensor.zero_()  # what another text left could be infinite, and masked it still would spoil a product
        binding = self._session.io_binding()
        held: list[Any] = [bind(binding.bind_input, self._inputs[name], t.contiguous()) for name, t in given.items()]
        held.append(attached := self._adapters.attached(self._session, binding, rows))
        self._adapters.fill(attached, adapter)
        binding.bind_output("logits", ids.device.type, ids.device.index or 0)  # outputs come in the order of binding
        self._bind_past(binding, cache.past)
        with self._lane.ordered():
            self._session.run_with_iobinding(binding, settings(NONE, wait=self._lane.on_host))
        del held
        return taken(self._outputs["logits"], binding.get_outputs()[0]).float()

    def _step(self, cache: _Cache, token: Tensor, position: int) -> Tensor:
        """One more token of each row; gives the logits behind it."""
        given = cache.given
        given["input_ids"].copy_(token[:, None])
        given["cache_position"].fill_(position)
        given["position_ids"].add_(1)
        for name, window in self._steps.windows.items():
            given[name][..., position] = 0
            if 0 < window <= position:
                given[name][..., position - window] = torch.finfo(given[name].dtype).min
        with self._lane.ordered():
            self._session.run_with_iobinding(cache.binding, cache.settings)
        return cache.logits.float()

    def _cache(self, rows: int, room: int) -> _Cache:
        if (rows, room) not in self._caches:
            while len(self._caches) >= _KEPT:
                self._caches.pop(next(iter(self._caches)))
            self._made += 1
            self._caches[rows, room] = self._allocated(rows, room)
        return self._caches[rows, room]

    def _allocated(self, rows: int, room: int) -> _Cache:
        past, given, binding = {}, {}, self._session.io_binding()
        for name, port in self._inputs.items():
            if name.startswith("past_key_values"):
                past[name] = _zeros(port, (rows, room, int(port.shape[2])))
            else:
                shape = (rows, 1, 1, room) if len(port.shape) == 4 else (rows, 1) if len(port.shape) == 2 else (1,)
                given[name] = _zeros(port, shape)
                bind(binding.bind_input, port, given[name])
        self._bind_past(binding, past)
        port = self._outputs["logits"]
        logits = _zeros(port, (rows, 1, int(port.shape[2])))
        bind(binding.bind_output, port, logits)
        attached = self._adapters.attached(self._session, binding, rows)
        return _Cache(past, given, logits, binding, settings(str(self._made), wait=self._lane.on_host), attached)

    def _bind_past(self, binding: Any, past: Mapping[str, Tensor]) -> None:
        """The same memory as input and as output: a step writes its own keys and values into it, and copies nothing."""
        for name, tensor in past.items():
            bind(binding.bind_input, self._inputs[name], tensor)
            bind(binding.bind_output, self._outputs[name.replace("past_key_values", "present")], tensor)

    @property
    def words(self) -> int:
        """How many tokens the model knows."""
        return int(self._outputs["logits"].shape[2])

    def _mask_dtype(self) -> torch.dtype:
        return next(port.dtype for name, port in self._inputs.items() if name in self._steps.windows)


def token_ids(given: Any) -> Tensor:
    """Token ids, of any whole dtype or as lists, as a graph takes them: int64 of shape (rows, columns); else InputError."""
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"input_ids are token ids of shape (rows, columns), and not a {type(given).__name__}: {error}"
        ) from error
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"input_ids are token ids of shape (rows, columns), and not {ids.dtype} of shape {tuple(ids.shape)}.")
    return ids.to(torch.int64)


def require(ids: Tensor, seen: Tensor, count: int, words: int) -> None:
    """Raise InputError for what cannot be gone on with: no such token, padding behind a text, a mask of another shape."""
    low, high = (int(one) for one in ids.aminmax())
    if low < 0 or high >= words:
        raise InputError(f"input_ids has the id {low if low < 0 else high}, and the model's {words} tokens are 0 to {words - 1}.")
    if seen.shape != ids.shape or not bool(seen[:, -1].all()):
        raise InputError(
            "The attention mask is of the ids' shape, and ones in its last column: pad prompts on their left, where no text "
            'follows (tokenizer.padding_side = "left").'
        )
    if count < 1:
        raise InputError(f"max_new_tokens={count}: at least one token is generated.")


def chooser(do_sample: bool, temperature: float, top_k: int, top_p: float, seed: int | None) -> Choose:
    """The likeliest token, or one that is drawn, as transformers' own processors of logits shape the chances."""
    for name, value, holds, rule in (
        ("temperature", temperature, temperature > 0.0, "above 0 (do_sample=False takes the likeliest token)"),
        ("top_k", top_k, top_k >= 0, "at least 1, or 0 for all"),
        ("top_p", top_p, 0.0 < top_p <= 1.0, "above 0 and at most 1"),
    ):
        if not holds:
            raise InputError(f"{name}={value} is not possible: it is {rule}.")
    if not do_sample:
        return lambda _, logits: logits.argmax(-1)
    from transformers.generation import logits_process as shaping  # seconds to import: only who draws waits

    steps: list[Any] = [shaping.TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    steps += [shaping.TopKLogitsWarper(top_k)] if top_k else []
    steps += [shaping.TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    generators: dict[torch.device, torch.Generator] = {}

    def drawn(ids: Tensor, logits: Tensor) -> Tensor:
        for step in steps:
            logits = step(ids, logits)
        if seed is not None and logits.device not in generators:
            generators[logits.device] = torch.Generator(logits.device).manual_seed(seed)
        return torch.multinomial(logits.softmax(-1), 1, generator=generators.get(logits.device))[:, 0]

    return drawn


def _ended(ids: Tensor, columns: int, stops: Tensor) -> Tensor:
    """The ids up to the column in which the last row ends."""
    ends = torch.isin(ids[:, columns:], stops)
    last = torch.where(ends.any(1), ends.int().argmax(1) + 1, ends.shape[1]).max()
    return ids[:, : columns + int(last)]


def _zeros(port: Port, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=port.dtype, device=port.device)
