"""What the initializers of a file are made of, as text in its metadata: which tensors of the model, turned and joined how."""

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx

from sarac.backends.lift import Fixed, Made, Own, Weight, names

KEY = "sarac.weights"  # the metadata entry
Shapes = Mapping[str, tuple[int, ...]]
_SAME = ("Cast", "Identity")  # operators that leave every number where it is
_MOVED = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")  # that change the shape alone


def entry(weights: Mapping[str, Weight], shapes: Shapes) -> dict[str, str]:
    """The metadata that `read` reads: the weights by initializer, and the shapes of the tensors that they are made of."""
    used = sorted({name for weight in weights.values() for name in names(weight)})
    made = {name: None if weight == Own(name) else _written(weight) for name, weight in weights.items()}
    return {KEY: json.dumps({"made": made, "shapes": {name: shapes[name] for name in used}}, separators=(",", ":"))}


def read(metadata: Mapping[str, str]) -> tuple[dict[str, Weight], dict[str, tuple[int, ...]]]:
    """The weights by initializer and the shapes of their tensors; both empty for a file that does not say."""
    found = json.loads(metadata.get(KEY) or '{"made": {}, "shapes": {}}')
    weights = {name: Own(name) if made is None else _read(made) for name, made in found["made"].items()}
    return weights, {name: tuple(shape) for name, shape in found["shapes"].items()}


def undone(weight: Weight | None, array: Any, shapes: Shapes) -> Iterator[tuple[str, Any]]:
    """The model's tensors that an initializer's values show as they are: those that were turned, joined or cast alone."""
    if isinstance(weight, Own):
        yield weight.name, array
    elif isinstance(weight, Made) and weight.operator == "Concat":
        parts = [_shape(part, shapes) for part in weight.arguments]
        axis = _attribute(weight, "axis", 0)
        if all(part is not None for part in parts):
            ends = np.cumsum([part[axis] for part in parts if part is not None])[:-1]
            for part, piece in zip(weight.arguments, np.split(array, ends, axis), strict=True):
                yield from undone(part, piece, shapes)
    elif isinstance(weight, Made):
        source = weight.arguments[0]
        shape = _shape(source, shapes)
        if weight.operator == "Transpose":
            order = _attribute(weight, "perm", tuple(reversed(range(array.ndim))))
            yield from undone(source, array.transpose(np.argsort(order)), shapes)
        elif weight.operator in (*_SAME, *_MOVED) and shape is not None:
            yield from undone(source, array.reshape(shape), shapes)


def _shape(weight: Weight | None, shapes: Shapes) -> tuple[int, ...] | None:
    """The shape of what undoing can go through; None for the rest."""
    if isinstance(weight, Own):
        return shapes[weight.name]
    if isinstance(weight, Fixed):
        return tuple(weight.value.shape)
    if weight is None or weight.operator not in ("Transpose", "Concat", *_SAME):
        return None
    parts = [_shape(part, shapes) for part in weight.arguments]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if weight.operator == "Transpose":
        return tuple(known[0][axis] for axis in _attribute(weight, "perm", tuple(reversed(range(len(known[0]))))))
    if weight.operator == "Concat":
        axis = _attribute(weight, "axis", 0) % len(known[0])
        return (*known[0][:axis], sum(part[axis] for part in known), *known[0][axis + 1 :])
    return known[0]


def _attribute(made: Made, name: str, otherwise: Any) -> Any:
    for encoded in made.attributes:
        attribute = onnx.AttributeProto.FromString(encoded)
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return otherwise


def _written(weight: Weight | None) -> Any:
    if weight is None:
        return None
    if isinstance(weight, Own):
        return weight.name
    if isinstance(weight, Fixed):
        return {"constant": _text(onnx.numpy_helper.from_array(np.asarray(weight.value)).SerializeToString())}
    return {
        "operator": weight.operator,
        "attributes": [_text(attribute) for attribute in weight.attributes],
        "of": [_written(argument) for argument in weight.arguments],
        "output": [weight.index, weight.outputs],
        "opset": weight.opset,
    }


def _read(found: Any) -> Any:
    if found is None or isinstance(found, str):
        return found and Own(found)
    if "constant" in found:
        return Fixed(onnx.numpy_helper.to_array(onnx.TensorProto.FromString(base64.b64decode(found["constant"]))))
    attributes = tuple(base64.b64decode(attribute) for attribute in found["attributes"])
    index, outputs = found["output"]
    return Made(found["operator"], attributes, tuple(map(_read, found["of"])), outputs, index, found["opset"])


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
