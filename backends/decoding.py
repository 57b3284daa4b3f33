"""One step of generation as a graph: prompts and single tokens alike, over caches of keys and values of a fixed length.

Keys and values are scattered into buffers that the caller owns, so that a runtime may bind one buffer as input and output, and
nothing is copied or grown; what a row may see comes as a mask, so that nothing in the graph depends on sizes alone.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from sarac.ir.errors import ExportError
from sarac.ir.inputs import Inputs

KEY = "sarac.generation"  # the metadata entry with what a runtime needs to know to generate
_KINDS = ("full_attention", "sliding_attention")
_ROWS, _COLUMNS, _ROOM = 2, 3, 9  # of the inputs that a step is captured on


class _Buffer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, (rows, room, heads · width), as transformers' attention asks a cache for them.

    Attention's kernels read this layout as it is, and new ones are scattered into it as projections give them.
    """

    is_sliding, is_compileable = False, True

    def __init__(self, keys: Tensor, values: Tensor, places: "_Places") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized, self.places = True, places
        self.keys: Tensor = keys
        self.values: Tensor = values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are given."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put new ones at their positions; gives all."""
        self.keys, keys = self._put(self.keys, key_states)
        self.values, values = self._put(self.values, value_states)
        return keys, values

    def _put(self, buffer: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """The buffer with new states (rows, heads, columns, width), and all as such."""
        heads, width = int(states.shape[1]), int(states.shape[3])  # of the model, and never free
        flat = states.transpose(1, 2).flatten(2).to(buffer.dtype)
        buffer = buffer.scatter(1, self.places.of(heads * width), flat)
        return buffer, buffer.view(*buffer.shape[:2], heads, width).transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Its room, from the first position on."""
        return self.keys.shape[1], 0

    def get_seq_length(self) -> int:
        """Nothing: masks and positions are given."""
        return 0

    def get_max_length(self) -> int:
        """Its room."""
        return self.keys.shape[1]


class _Places:
    """Where new keys and values go: made of the inputs alone, so that all layers read one and none another's."""

    def __init__(self, input_ids: Tensor, positions: Tensor) -> None:
        self.shape: tuple[Any, Any] = (input_ids.shape[0], input_ids.shape[1])
        self.positions, self.made = positions.view(1, -1, 1), dict[int, Tensor]()

    def of(self, width: int) -> Tensor:
        """The index along the room for every new number of a buffer of this width."""
        if width not in self.made:
            self.made[width] = self.positions.expand(*self.shape, width)
        return self.made[width]


@dataclass(frozen=True)
class Steps:
    """How a causal language model generates: the window of each mask that it reads (0 for none), by the mask's name."""

    windows: dict[str, int]
    eos: tuple[int, ...]
    pad: int

    @classmethod
    def of(cls, model: nn.Module) -> "Steps":
        """From a model of transformers'; ExportError for one that does not generate token after token from a cache."""
        if not isinstance(model, transformers.PreTrainedModel) or not model.can_generate():
            raise ExportError(f'{type(model).__name__} generates nothing: export it without task (task="forward").')
        config = model.config.get_text_config(decoder=True)
        if model.config.is_encoder_decoder:
            raise ExportError(
                f'{type(model).__name__} has an encoder, whose output a decoder reads beside its cache: task="generate" knows '
                'decoders alone. Export it with task="forward".'
            )
        window = getattr(config, "sliding_window", None) or 0
        kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or [_KINDS[bool(window)]]))
        if odd := [kind for kind in kinds if kind not in _KINDS]:
            raise ExportError(
                f'{type(model).__name__} has layers of {odd[0]}, which keep no keys and values: use task="forward".'
            )
        windows = {kind: window if kind == _KINDS[1] else 0 for kind in kinds}
        names = (
            {"attention_mask": windows[kinds[0]]} if len(kinds) == 1 else {f"attention_mask.{k}": w for k, w in windows.items()}
        )
        chosen: Any = model.generation_config
        eos, pad = getattr(chosen, "eos_token_id", None), getattr(chosen, "pad_token_id", None)
        ends = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
        return cls(names, ends, int((ends or (0,))[0] if pad is None else pad))

    @classmethod
    def read(cls, metadata: dict[str, str]) -> "Steps | None":
        """From an exported file's metadata; None for one that does not generate."""
        found = json.loads(metadata.get(KEY, "null"))
        return found and cls(found["windows"], tuple(found["eos"]), found["pad"])

    def entry(self) -> dict[str, str]:
        """The metadata that `read` reads."""
        return {KEY: json.dumps({"windows": self.windows, "eos": self.eos, "pad": self.pad})}

    def masks(self, seen: Tensor, positions: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """What each new token may see, added to its scores, (rows, 1, columns, room); `seen`, (rows, room): where tokens are."""
        room = torch.arange(seen.shape[1], device=seen.device)
        found = {}
        for name, window in self.windows.items():
            allowed = room <= positions[:, None]
            if window:
                allowed &= room > positions[:, None] - window
            # Padding sees itself: a row that saw nothing could come to NaN, and so would all that its keys are weighed into.
            allowed = (allowed & seen.bool()[:, None, None]) | (room == positions[:, None])
            found[name] = torch.zeros(allowed.shape, dtype=dtype, device=seen.device).masked_fill(
                ~allowed, torch.finfo(dtype).min
            )
        return found

    def inputs(self, model: Any) -> Inputs:
        """Inputs to capture a step on: as many caches as the model has layers now."""
        device, dtype = model.device, model.dtype
        ids = torch.zeros(_ROWS, _COLUMNS, dtype=torch.int64, device=device)
        with torch.no_grad():
            cache: Any = transformers.DynamicCache(config=model.config)
            type(model).forward(model, input_ids=ids, past_key_values=cache, use_cache=True)
        positions = torch.arange(4, 4 + _COLUMNS, device=device)
        masks = self.masks(torch.ones(_ROWS, _ROOM, device=device), positions, dtype)
        mask: Any = masks["attention_mask"] if len(masks) == 1 else {k.partition(".")[2]: m for k, m in masks.items()}
        past = [{"key": _room(layer.keys), "value": _room(layer.values)} for layer in cache.layers]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.expand(_ROWS, -1).contiguous()}
        return Inputs.of({**given, "cache_position": positions, "past_key_values": past})


def _room(states: Tensor) -> Tensor:
    return states.new_zeros(states.shape[0], _ROOM, states.shape[1] * states.shape[3])


@contextlib.contextmanager
def stepping(model: nn.Module) -> Iterator[None]:
    """The model with a forward that is one step: its logits behind the last column, and the caches."""
    before = vars(model).get("forward")
    whole = model.forward

    def forward(
        input_ids: Tensor, attention_mask: Any, position_ids: Tensor, cache_position: Tensor, past_key_values: list[Any]
    ) -> dict[str, Any]:
        places = _Places(input_ids, cache_position)
        layers: list[Any] = [_Buffer(one["key"], one["value"], places) for one in past_key_values]
        cache = transformers.Cache(layers=layers)
        found = whole(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return {"logits": found.logits, "present": [{"key": layer.keys, "value": layer.values} for layer in layers]}

    try:
        vars(model)["forward"] = forward
        yield
    finally:
        vars(model).pop("forward", None)
        if before is not None:
            vars(model)["forward"] = before
