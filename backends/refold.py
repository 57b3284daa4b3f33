"""Weights of an exported file by the model's names: read back, and written anew where they change, one at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from sarac.backends import formula, onnx_file
from sarac.backends.lift import Weight, names, worked_out
from sarac.ir.errors import ExportError


class Weights:
    """An exported file whose initializers are known by the model's tensors; ExportError for one that does not say."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise ExportError(f"{path} is a folder: fold into the .onnx file of an export by ONNX (engine='onnx').")
        self.path, self.metadata = path, onnx_file.read_metadata(path)
        self._made, self.shapes = formula.read(self.metadata)
        if not self._made:
            raise ExportError(
                f"{path} does not say what its weights are made of: it is no export of a plain model by sarac, or has adapters "
                "in it already. Export the base model itself (sarac export BASE base.onnx)."
            )
        self._program = onnx_ir.load(path)
        self._graph = self._program.graph
        self._holding: dict[str, list[str]] = {}
        for initializer, weight in self._made.items():
            for name in names(weight):
                self._holding.setdefault(name, []).append(initializer)

    def holds(self, name: str) -> bool:
        """Whether a tensor of the model's is in the file, as it is or within something else."""
        return name in self._holding

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model's as the file has it; ExportError where it is not to be had from what the file holds."""
        for initializer in self._holding.get(name, ()):
            for found, array in formula.undone(self._made[initializer], self._array(initializer), self.shapes):
                if found == name:
                    return _tensor(array)
        where = f"worked into {self._holding[name][0]}" if self.holds(name) else "not in it"
        raise ExportError(
            f"{self.path} has no place for {name}, which is {where}: fold in torch and export again (sarac export --merge)."
        )

    def write(self, path: Path, data: str, changed: Mapping[str, Callable[[Tensor], Tensor]], metadata: Mapping[str, str]) -> int:
        """Write the file with these tensors changed, its weights beside it in `data` if they were beside; gives how many
        initializers that touched. A tensor is changed when what it stands in is written, and not kept.
        """
        touched = [one for one, weight in self._made.items() if any(name in changed for name in names(weight))]
        beside = any(isinstance(v.const_value, onnx_ir.ExternalTensor) for v in self._graph.initializers.values())
        for initializer in touched:
            value = self._graph.initializers[initializer]
            old, shape = value.const_value, value.shape
            assert old is not None
            assert shape is not None
            value.const_value = onnx_ir.LazyTensor(
                lambda weight=self._made[initializer], old=old: self._changed(weight, old, changed),  # type: ignore[misc]
                dtype=old.dtype, shape=shape, name=initializer,
            )  # fmt: skip
        self._program.metadata_props.pop(formula.KEY, None)
        self._program.metadata_props.update(metadata)
        try:
            onnx_ir.save(self._program, path, external_data=data if beside else None)
        except OSError as error:
            raise ExportError(f"{path} cannot be written: {error.strerror or error}. Choose a folder with room.") from error
        return len(touched)

    def _changed(self, weight: Weight, old: Any, changed: Mapping[str, Callable[[Tensor], Tensor]]) -> Any:
        there = dict(formula.undone(weight, old.numpy(), self.shapes))

        def value(name: str) -> Tensor:
            tensor = _tensor(there[name]) if name in there else self.tensor(name)
            return changed[name](tensor) if name in changed else tensor

        return onnx_ir.tensor(np.ascontiguousarray(worked_out(weight, value)).astype(old.dtype.numpy(), copy=False))

    def _array(self, initializer: str) -> Any:
        value = self._graph.initializers[initializer].const_value
        assert value is not None
        return value.numpy()


def _tensor(array: Any) -> Tensor:
    """A numpy array as a torch tensor of its own; bfloat16 is known to neither by the other's name."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
