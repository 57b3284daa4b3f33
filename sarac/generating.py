"""Texts on which an export that generates is held against torch: token by token over its cache, and whole."""

from typing import Any

import torch
from torch import Tensor, nn

from sarac.backends.runtime import Runtime
from sarac.backends.tenants import Chosen
from sarac.ir.inputs import Inputs

_SHAPES = ((1, 13), (3, 22))  # rows and tokens; of the last ones each is a step of its own
_MORE = 6


def texts(model: nn.Module) -> list[Inputs]:
    """Random texts as a causal language model takes them whole, one row of them shorter and padded on its left.

    Where layers see a window of tokens, a text is longer than it, up to what the model takes.
    """
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    window = getattr(config, "sliding_window", None) or 0
    most = getattr(config, "max_position_embeddings", None) or 2**20
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    found = []
    for rows, columns in _SHAPES:
        columns = min(max(columns, window + 8 if window < 512 else columns), most)
        ids = torch.randint(0, config.vocab_size, (rows, columns), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:2, : columns // 4] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        found.append(Inputs((), {**{name: tensor.to(device) for name, tensor in given.items()}, "logits_to_keep": _MORE + 1}))
    return found


def stepped(session: Runtime, inputs: Inputs, adapter: Chosen = None) -> dict[str, Tensor]:
    """The logits of such a text by the session, the last tokens one after the other."""
    ids, mask = (inputs.kwargs[name].to(session.device) for name in ("input_ids", "attention_mask"))
    return {"logits": session.generator.follow(ids, mask, _MORE, adapter).cpu()}
