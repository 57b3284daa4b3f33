"""The smallest model of every timm family (a module of `timm.models`), with random weights."""

import importlib.util
import re
import sys
import types
import warnings
from functools import cache
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers
from benchmarks.tiny import CannotBuild, Tiny, liven
from torch import nn
from transformers.utils import import_utils

BATCH = 2
LARGEST = 60_000_000  # parameters
# How the makers name small models, the smallest first.
_SMALL = """
    test zepto atto femto pico nano micro xxs xxtiny xx_small xs xtiny x_small tiny ti mini s0 b0 s small lite 0 18 050 light
""".split()
_SHALLOW: list[dict[str, Any]] = [
    {"embed_dim": 64, "num_heads": 2, "depth": 2}, {"stages": (1, 1, 1, 1)}, {"depths": (1, 1, 1, 1)}, {"depths": (1, 1, 1)},
    {"layers": (1, 1, 1, 1)}, {"depth": 2}, {"num_blocks": 2}, {},
]  # fmt: skip
_SIZES = (64, 96, 128)


def _load() -> Any:
    """Import timm, which wants torchvision, which does not import beside a CPU build of torch until its own op is defined."""
    transformers.utils.is_torchvision_available()  # it asks once, and is to see what is really there
    if importlib.util.find_spec("torchvision") is not None:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    # Without any, timm needs one class of it, and names for the image transforms that nothing here calls.
    parts = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets") if not _KEPT else ()
    stubs = {f"torchvision{part}": _Stub(f"torchvision{part}") for part in parts}
    for stub in stubs.values():
        stub.__dict__["FrozenBatchNorm2d"] = type("FrozenBatchNorm2d", (nn.Module,), {})
    sys.modules.update(stubs)
    import timm

    for name in stubs:
        del sys.modules[name]
    # transformers asks for torchvision whenever it needs timm; its backbones only need timm itself.
    for module in (transformers.utils, import_utils):
        module.is_timm_available = lambda: True
    backends = import_utils.BACKENDS_MAPPING
    backends["timm"] = (lambda: True, *backends["timm"][1:])
    return timm


_KEPT: list[Any] = []


class _Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "models":
            raise AttributeError(name)
        return MagicMock()


@cache
def timm() -> Any:
    """timm, or None where it is not installed."""
    return _load() if importlib.util.find_spec("timm") else None


def names() -> list[str]:
    """Every family that timm has a model of."""
    return [name for name in sorted(timm().list_modules()) if timm().list_models(module=name)] if timm() else []


def build(name: str) -> Tiny:
    """The smallest model of a family that runs, cut where its constructor lets us; CannotBuild with the first error."""
    errors: list[str] = []
    for model_name in _smallest(name)[:3]:
        for cut in _SHALLOW:
            try:
                if _size(model_name, **cut) > LARGEST:
                    raise CannotBuild(f"{model_name} has more than {LARGEST / 1e6:.0f} M parameters")
                torch.manual_seed(0)
                model = timm().create_model(model_name, pretrained=False, num_classes=10, **cut).eval()
            except Exception as error:  # noqa: BLE001  its constructor takes no such argument
                errors.insert(0, f"{model_name}: {type(error).__name__}: {str(error)[:200]}")
                continue
            try:
                return Tiny(liven(model), _inputs(model), f"{model_name} {cut or ''}")
            except Exception as error:  # noqa: BLE001
                errors.append(f"{model_name}: {type(error).__name__}: {str(error)[:200]}")
    raise CannotBuild(errors[0])


def _smallest(family: str) -> list[str]:
    """The family's models by size, of those whose names sound smallest."""

    def rank(model: str) -> tuple[int, int]:
        parts = re.split(r"[_\.]", model)
        return min([i for i, word in enumerate(_SMALL) if word in parts or model.endswith(word)] or [len(_SMALL)]), len(model)

    return sorted(sorted(timm().list_models(module=family), key=rank)[:5], key=_size)


def _size(model: str, **cut: Any) -> int:
    """The number of parameters; 0 for a model that cannot be made without memory for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return sum(p.numel() for p in timm().create_model(model, pretrained=False, **cut).parameters())
        except (RuntimeError, NotImplementedError):  # it makes numbers while it is built
            return 0


def _inputs(model: Any) -> tuple[torch.Tensor]:
    channels, height, width = model.default_cfg.get("input_size", (3, 224, 224))
    errors = []
    for shape in (*((channels, size, size) for size in _SIZES if size < height), (channels, height, width)):
        torch.manual_seed(1)
        x = torch.randn(BATCH, *shape)
        try:
            with torch.no_grad():
                model(x)
            return (x,)
        except Exception as error:  # noqa: BLE001
            errors.append(error)
    raise errors[-1]
