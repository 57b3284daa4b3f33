"""The norm of all gradients as backward leaves them: a Trainer's callbacks see them only after they were clipped."""

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sarac.ir.sharded import is_sharded


class Unclipped:
    """Norms of the gradients of one step, taken by hooks as each is complete; the last of accumulated ones counts."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._norms: dict[int, Tensor | None] = {}

    def begin(self, model: nn.Module) -> None:
        """Look at the backward of a step from now on."""
        self._open.close()
        self._norms = {}
        for one in model.parameters():
            if one.requires_grad:
                hook = one.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]  # torch's own
                self._open.callback(hook.remove)

    def end(self, scaler: Any) -> float | None:
        """The norm, without a float16 loss scaler's factor; None where it is not known. Of DDP's it is this process's own."""
        self._open.close()
        norms, self._norms = list(self._norms.values()), {}
        known = [one for one in norms if one is not None]
        if not known or len(known) < len(norms):
            return None
        norm = math.hypot(*(float(one) for one in known))
        if scaler is None:
            return norm
        return norm / float(scaler.get_scale()) if math.isfinite(norm) else None  # the scaler leaves such a step out

    def _take(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is not None:  # no number is fetched here: the device would be waited for at every tensor
            whole = not is_sharded(grad)  # a part's norm is not the gradient's, and hooks are no place to gather
            self._norms[id(parameter)] = torch.linalg.vector_norm(grad.detach(), dtype=torch.float32) if whole else None
