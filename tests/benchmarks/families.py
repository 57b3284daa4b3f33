"""The smallest model of every timm family (a module of `timm.models`), with random weights."""

import copy
import importlib
import importlib.util
import math
import re
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import transformers
from benchmarks.tiny import CannotBuild, Tiny, lively, liven
from torch import nn
from transformers.utils import import_utils
from zoo import torchvision_operator

from sarac.ir.graph import Site

BATCH = 2
LARGEST = 90_000_000  # parameters
HEAVY, LIGHT = 25_000_000, 100_000  # of a model of more parameters than that only the weights up to this are adapted
# How the makers name small models, the smallest first.
_SMALL = """
    test zepto atto femto pico nano micro xxs xxtiny xx_small xs xtiny x_small tiny ti mini s0 b0 s small lite 002 0 18 050 light
""".split()
_FOUR = (1, 1, 1, 1)
# Arguments of a constructor, in the order in which they are tried; what the registered function gives is overridden.
_SHALLOW: list[dict[str, Any]] = [
    {"embed_dim": 64, "num_heads": 2, "depth": 2}, {"stages": _FOUR}, {"depths": _FOUR, "embed_dim": 32}, {"depths": _FOUR},
    {"depths": (1, 1, 1)}, {"layers": _FOUR}, {"depth": 2, "dim": 64}, {"depth": 2}, {"num_blocks": 2}, {},
]  # fmt: skip


def _quarter(cfg: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a selecsls with a quarter of its channels, but for those that the stem gives."""
    features = [tuple(n // 4 if n > 32 else n for n in row[:4]) + row[4:] for row in cfg["features"]]
    head = [(*(n // 4 for n in row[:2]), *row[2:]) for row in cfg["head"]]
    return {**cfg, "features": features, "head": head, "num_features": cfg["num_features"] // 4}


# Families in which none of these has an effect. A function gets what the registered one gives.
_ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilenetv5": ("mobilenetv5_base", {"round_chs_fn": lambda rounded: partial(rounded, multiplier=0.125)}),
    "mvitv2": ("mvitv2_tiny", {"model_cfg": lambda cfg: replace(cfg, depths=_FOUR, embed_dim=(32, 64, 128, 256))}),
    "nasnet": ("nasnetalarge", {"stem_size": 8, "num_features": 384}),
    "selecsls": ("selecsls42", {"model_cfg": _quarter}),
    "vgg": ("vgg11", {"model_cfg": [16, "M", 16, "M", 32, "M", 32, "M"], "mlp_ratio": 0.05}),
    "xception_aligned": ("xception41p", {"block_cfg": [
        {"in_chs": 64, "out_chs": 64, "stride": 2}, {"in_chs": 64, "out_chs": 96, "stride": 2},
        {"in_chs": 96, "out_chs": (96, 128, 128), "no_skip": True, "stride": 1},
    ]}),
}  # fmt: skip
_SIZES = (64, 96, 128)


def _load() -> Any:
    """Import timm, which wants torchvision, which does not import beside a CPU build of torch until its own op is defined."""
    transformers.utils.is_torchvision_available()  # it asks once, and is to see what is really there
    torchvision_operator()
    there = importlib.util.find_spec("torchvision") is not None
    # Without any, timm needs one class of it, and names for the image transforms that nothing here calls.
    parts = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets") if not there else ()
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
    odd = _ODD.get(name)
    for model_name in [odd[0]] if odd else _smallest(name)[:3]:
        for cut in [odd[1]] if odd else _SHALLOW:
            try:
                with _overridden(name, cut):
                    if (size := _size(model_name)) > LARGEST:
                        raise CannotBuild(f"{model_name} has more than {LARGEST / 1e6:.0f} M parameters")
                    torch.manual_seed(0)
                    model = timm().create_model(model_name, pretrained=False, num_classes=10).eval()
            except Exception as error:  # noqa: BLE001  its constructor takes no such argument
                errors.insert(0, f"{model_name}: {type(error).__name__}: {str(error)[:200]}")
                continue
            try:
                options = {"where": _light} if size > HEAVY else {}
                rule = ", ".join([model_name, *cut, *([f"weights up to {LIGHT} numbers"] if options else [])])
                inputs = _inputs(liven(model))
                return Tiny(model, inputs, rule + lively(model, inputs), options)
            except Exception as error:  # noqa: BLE001
                errors.append(f"{model_name}: {type(error).__name__}: {str(error)[:200]}")
    raise CannotBuild(errors[0])


def _light(site: Site) -> bool:
    return site.default and math.prod(site.full_shape) <= LIGHT


@contextmanager
def _overridden(family: str, cut: Mapping[str, Any]) -> Iterator[None]:
    """Let this family's constructors have these arguments, whatever its registered functions give."""
    module = importlib.import_module(f"timm.models.{family}")
    real = getattr(module, "build_model_with_cfg", None)
    if real is None or not cut:
        yield
        return

    def build_with_cut(*args: Any, **given: Any) -> Any:
        made = {name: item(given[name]) if callable(item) else copy.deepcopy(item) for name, item in cut.items()}
        return real(*args, **{**given, **made})

    with patch.object(module, "build_model_with_cfg", build_with_cut):
        yield


def _smallest(family: str) -> list[str]:
    """The family's models by size, of those whose names sound smallest."""

    def rank(model: str) -> tuple[int, int]:
        parts = re.split(r"[_\.]", model)
        return min([i for i, word in enumerate(_SMALL) if word in parts or model.endswith(word)] or [len(_SMALL)]), len(model)

    return sorted(sorted(timm().list_models(module=family), key=rank)[:5], key=_size)


def _size(model: str) -> int:
    """The number of parameters; 0 for a model that cannot be made without memory for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return sum(p.numel() for p in timm().create_model(model, pretrained=False).parameters())
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
