"""Every method on tiny models of real classes, trained as if: the same in every test and every process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo import VOCABULARY, llama, shake

import sarac

METHODS: dict[str, dict[str, Any]] = {
    "sara": {},
    "factors": {"plan": "rank:3,train=factors"},
    "mosara": {"method": "mosara"},
}
FOLDABLE = ("sara", "factors")


def base(build: Callable[[], Any] = llama, dtype: torch.dtype = torch.float32) -> Any:
    """The plain model, frozen: torch's matmul takes another path, of other last bits, for weights that require gradients.

    Its linear weights are larger than at transformers' start, where the embeddings alone choose the next token.
    """
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings():
            nn.init.normal_(module.weight, std=0.25)
    return model.to(dtype).requires_grad_(False)


def fresh(method: str, build: Callable[[], Any] = llama, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The adapted model at its start, where it computes what the base does."""
    return sarac.transform(base(build, dtype), **METHODS[method], **options)


def adapted(method: str, build: Callable[[], Any] = llama, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The adapted model away from its start, as after training."""
    return shake(fresh(method, build, dtype, **options))


def batch(rows: int = 4, columns: int = 6) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(5))
