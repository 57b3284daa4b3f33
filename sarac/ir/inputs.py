"""What a model is called with: example inputs in one form, and the spec that a file keeps instead of them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sarac.ir.errors import InputError, SaracError

_SPEC = re.compile(r"(?P<name>[A-Za-z_]\w*):(?P<dtype>\w+)\[(?P<shape>[\d,\s]*)\](?:<(?P<high>[1-9]\d*))?")


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one forward call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Any) -> "Inputs":
        """Example inputs as people give them: a tensor, a tuple or list of arguments, a mapping of keyword arguments."""
        if isinstance(example, Inputs):
            return example
        if isinstance(example, Mapping):
            return cls((), dict(example))
        if isinstance(example, tuple | list):
            return cls(tuple(example), {})
        if isinstance(example, Tensor):
            return cls((example,), {})
        raise InputError(
            f"Example inputs of type {type(example).__name__} are not understood: give a tensor, a tuple of "
            "arguments, or a dict of keyword arguments."
        )

    def call(self, module: nn.Module) -> Any:
        """The module's outputs for these inputs; an input that the module rejects is an InputError that says why."""
        try:
            return module(*self.args, **self.kwargs)
        except SaracError:
            raise
        except Exception as error:  # a model may raise anything
            raise InputError(
                f"{type(module).__name__} rejects the example inputs ({self.describe()}): "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} "
                "Give inputs that model(*args, **kwargs) accepts."
            ) from error

    def describe(self) -> str:
        """The inputs' names, dtypes and shapes in one line."""
        parts = [f"{index}: {_show(value)}" for index, value in enumerate(self.args)]
        return ", ".join(parts + [f"{name}: {_show(value)}" for name, value in self.kwargs.items()]) or "none"

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same inputs with `change` applied to every tensor at the top level."""
        return self.changed(lambda value: change(value) if isinstance(value, Tensor) else value)

    def changed(self, change: Callable[[Any], Any]) -> "Inputs":
        """The same inputs with `change` applied to every value at the top level."""
        return Inputs(tuple(map(change, self.args)), {name: change(value) for name, value in self.kwargs.items()})

    def to(self, device: torch.device) -> "Inputs":
        """The same inputs on `device`."""
        return self.map(lambda value: value.to(device))


@dataclass(frozen=True)
class TensorSpec:
    """One input tensor: its name ("" for a positional one), dtype and shape; integers are drawn below `high`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    high: int | None = None

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """A random tensor of this dtype and the given shape."""
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            return torch.randn(tuple(shape), generator=generator, device="cpu").to(dtype)
        if self.high is None:  # a mask, or an index of unknown range: ones are right for the one, in range for most
            return torch.ones(tuple(shape), dtype=dtype, device="cpu")
        return torch.randint(0, self.high, tuple(shape), generator=generator, device="cpu").to(dtype)


@dataclass(frozen=True)
class InputSpec:
    """The description of a model's inputs that a checkpoint keeps, so that exporting needs no example inputs."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "InputSpec":
        """From `name:dtype[sizes]` texts such as `x:float32[2,16]` or `input_ids:int64[2,16]<49152` (values below)."""
        specs = []
        for text in texts:
            match = _SPEC.fullmatch(text.strip())
            if match is None or not isinstance(getattr(torch, match["dtype"], None), torch.dtype):
                raise InputError(
                    f"The input spec {text!r} is not understood: write name:dtype[sizes], for example "
                    "x:float32[2,16], or input_ids:int64[2,16]<49152 for integers below 49152."
                )
            shape = tuple(int(size) for size in match["shape"].split(",") if size.strip())
            specs.append(TensorSpec(match["name"], match["dtype"], shape, int(match["high"]) if match["high"] else None))
        return cls(tuple(specs))

    @classmethod
    def of(cls, inputs: Inputs) -> "InputSpec":
        """From example inputs; only tensors at the top level are kept, and integers stay below their present maximum."""
        named = [("", value) for value in inputs.args] + list(inputs.kwargs.items())
        return cls(tuple(_spec(name, value) for name, value in named if isinstance(value, Tensor)))

    def sample(self, shapes: Mapping[int, Sequence[int]] | None = None, seed: int = 0) -> Inputs:
        """Random inputs of these shapes, or of `shapes[index]` where one is given for a tensor's index."""
        generator = torch.Generator().manual_seed(seed)
        chosen = shapes or {}
        values = [spec.sample(chosen.get(i, spec.shape), generator) for i, spec in enumerate(self.tensors)]
        args = tuple(value for spec, value in zip(self.tensors, values, strict=True) if not spec.name)
        return Inputs(args, {spec.name: value for spec, value in zip(self.tensors, values, strict=True) if spec.name})

    def to_json(self) -> str:
        """The spec as JSON text."""
        return json.dumps([[s.name, s.dtype, list(s.shape), s.high] for s in self.tensors])

    @classmethod
    def from_json(cls, text: str) -> "InputSpec":
        """The spec that `to_json` wrote."""
        rows = json.loads(text)
        return cls(tuple(TensorSpec(name, dtype, tuple(shape), high) for name, dtype, shape, high in rows))


def _spec(name: str, value: Tensor) -> TensorSpec:
    dtype = str(value.dtype).removeprefix("torch.")
    integral = not value.dtype.is_floating_point and value.dtype != torch.bool and value.numel() > 0
    top = int(value.max()) if integral else 0
    return TensorSpec(name, dtype, tuple(value.shape), top + 1 if top > 1 else None)


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__
