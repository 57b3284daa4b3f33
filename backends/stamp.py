"""The optimised graph of three equal groups of layers as the graph of many: the middle one repeated, with its own weights.

A group is one layer, or as many as repeat; it is called a layer here. Nodes belong to the last layer whose weights
they depend on. The nodes of the second layer are matched one by one with those of the
third: same operators, attributes and constants, weights one layer on. What the second reads of the first must stand where
the third reads the second; then copies of the second, each reading the one before, are what the exporter would have
written for the layers between. Where anything does not match there is no graph, and the model is exported whole.
"""

import re
from collections.abc import Iterator, MutableSequence

import onnx_ir
from onnx_ir import Graph, Model, Node, Value

from sarac.backends.lift import Fixed, Weight, names, renamed
from sarac.backends.stack import KEPT, Stack

_NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)")  # as in past_key_values.1.key


class Unlike(Exception):
    """The layers of the optimised graph are not alike; why."""


class _Match:
    """The middle layer's values and nodes, each with its counterpart one layer on."""

    def __init__(self, graph: Graph, weights: dict[str, Weight], stack: Stack) -> None:
        self.stack, self.weights, self.graph = stack, weights, graph
        self.ports = {str(value.name): value for value in (*graph.inputs, *graph.outputs)}
        nested = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
        if any(attribute.type in nested for node in graph for attribute in node.attributes.values()):
            raise Unlike("a node has a graph of its own")
        self.by_weight = {weights[name]: v for v in graph.inputs if (name := str(v.name)) in weights}
        self.sizes = {size for value in graph.inputs for size in _sizes(value)}
        self.level = self._levels()
        self.nodes = [[node for node in graph if self._level(node) == level] for level in range(KEPT)]
        self.values: dict[Value, Value] = {}  # from the second layer, or what it reads of the first, to one layer on
        self.found: dict[Node, Node] = {}
        for node in self.nodes[1]:
            self._pair(node)
        self.nodes[1] = list(self.found)
        self._require_chain()

    def _levels(self) -> dict[Value, int]:
        """The last layer whose weights a value depends on, -1 for what depends on none."""
        level, inputs = {value: self._own_level(value) for value in self.graph.inputs}, set(self.graph.inputs)
        for node in self.graph:
            own = max((level.get(value, -1) for value in node.inputs if value is not None), default=-1)
            if node.op_type == "Shape" and node.inputs[0] in inputs:  # one of a row stands for the sizes of all
                own = -1
            level.update(dict.fromkeys(node.outputs, own))
        return level

    def _level(self, node: Node) -> int:
        return max(self.level[value] for value in node.outputs)

    def _own_level(self, value: Value) -> int:
        weight = self.weights.get(str(value.name))
        if weight is not None:
            layers = {self.stack.group(name) for name in names(weight)} - {-1}
            if len(layers) > 1:
                raise Unlike(f"{value.name} is made of the weights of several layers")
            return layers.pop() if layers else -1
        own = self.stack.group(str(value.name))
        return own if own >= 0 else next((layer for layer in range(KEPT) if self._numbered(str(value.name), layer)), -1)

    def _numbered(self, name: str, layer: int) -> bool:
        """Whether an input or output is one of a row, one a layer, and this layer's."""
        return any(
            int(found[0]) // self.stack.period == layer
            and all(_put(name, found, other) in self.ports for other in range(KEPT * self.stack.period))
            for found in _NUMBER.finditer(name)
        )

    def _pair(self, node: Node) -> None:
        candidates = [other for other in self._candidates(node) if other not in self.found.values() and self._fits(node, other)]
        if not candidates and all(self.level.get(value, -1) < 1 for value in node.inputs if value is not None):
            self.level.update(dict.fromkeys(node.outputs, 0))  # of the first layer, for all that follow
            return
        if not candidates:
            raise Unlike(f"{node.op_type} {node.outputs[0].name} has no counterpart in the next layer")
        other = candidates[0]
        self.found[node] = other
        for one, two in zip((*node.inputs, *node.outputs), (*other.inputs, *other.outputs), strict=True):
            if one is not None and two is not None and (one is not two or self.level.get(one, -1) >= 0):
                self.values[one] = two

    def _candidates(self, node: Node) -> list[Node]:
        """The users of the counterpart of any input: the shortest such list."""
        lists = []
        for index, value in enumerate(node.inputs):
            two = None if value is None else self._counterpart(value)
            if two is not None and self.level.get(value, -1) >= 0:  # type: ignore[arg-type]
                lists.append([user for user, at in two.uses() if at == index])
        return min(lists, key=len) if lists else list(self.nodes[2])

    def _fits(self, node: Node, other: Node) -> bool:
        kinds = [(n.domain, n.op_type, n.overload, len(n.inputs), len(n.outputs), _attributes(n)) for n in (node, other)]
        if kinds[0] != kinds[1] or self._level(other) != 2:
            return False
        return all(self._reads(one, two) for one, two in zip(node.inputs, other.inputs, strict=True))

    def _reads(self, one: Value | None, two: Value | None) -> bool:
        if one is None or two is None:
            return one is two
        known = self._counterpart(one)
        if known is not None:
            return known is two
        if one is two or _equal(one, two):
            return self.level.get(one, -1) < 1
        # Of the first layer or before it, met for the first time: in its place stands what the second gives.
        return one.producer() is not None and self.level.get(one, -1) < 1 and self.level.get(two) == 1

    def _counterpart(self, value: Value) -> Value | None:
        if value in self.values:
            return self.values[value]
        if self.level.get(value, -1) < 0 or value.producer() is not None:
            return None
        weight = self.weights.get(str(value.name))
        if weight is None:
            return next((self.ports[name] for name in self.moves(str(value.name), 1) if name in self.ports), None)
        return self.by_weight.get(renamed(weight, lambda name: self.stack.moved(name, 1)))

    def moves(self, name: str, step: int) -> Iterator[str]:
        """What an input or output may be called so many layers on: by its place in the stack, or with a number raised."""
        if self.stack.group(name) >= 0:
            yield self.stack.moved(name, step)
        else:
            for found in _NUMBER.finditer(name):
                yield _put(name, found, int(found[0]) + step * self.stack.period)

    def _require_chain(self) -> None:
        """What the third layer reads of the second must be what the second's copies will give."""
        for one, two in self.values.items():
            if self.level[one] < 1 and one.producer() is not None and two is not one and two.producer() not in self.found:
                raise Unlike(f"{two.name} is no output of the second layer")
        for node in set(self.nodes[2]) - set(self.found.values()):
            if any(self.level.get(value) in (0, 1) for value in node.inputs if value is not None):
                raise Unlike(f"{node.op_type} {node.outputs[0].name} reads several layers")


def stamped(program: Model, weights: dict[str, Weight], stack: Stack) -> None:
    """Make the graph of the first three layers that of all of them, in place; Unlike where they do not repeat."""
    graph, more = program.graph, stack.groups - KEPT
    match = _Match(graph, weights, stack)
    rows = _rows(match)
    for value in (*graph.inputs, *graph.outputs):  # the third layer is the last one from here on
        name = str(value.name)
        if name in weights and match.level[value] == 2:
            weights[stack.moved(name, more)] = renamed(weights.pop(name), lambda one: stack.moved(one, more))
            value.name = stack.moved(name, more)
        elif name in rows:
            value.name = rows[name]
    copy: dict[Value, Value] = {}
    for step in range(1, more + 1):
        copy = _copied(match, copy, step)
    for node in match.nodes[2]:
        for index, read in enumerate(node.inputs):
            if read in copy:
                node.replace_input_with(index, copy[read])
    graph.sort()
    for ports in (graph.inputs, graph.outputs):
        _in_order(ports, weights)


def _in_order(ports: MutableSequence[Value], weights: dict[str, Weight]) -> None:
    """Let inputs or outputs that come one a layer stand in the order of the layers."""
    places = [index for index, value in enumerate(ports) if _NUMBER.search(str(value.name)) and value.name not in weights]
    found = sorted((ports[index] for index in places), key=lambda value: [int(n) for n in _NUMBER.findall(str(value.name))])
    rest = dict(zip(places, found, strict=True))
    values = [rest.get(index, value) for index, value in enumerate(ports)]
    ports.clear()
    ports.extend(values)


def _copied(match: _Match, before: dict[Value, Value], step: int) -> dict[Value, Value]:
    """One more copy of the second layer, which reads the copy `before`: its values by those of the second layer."""
    copy: dict[Value, Value] = {}
    for node in match.nodes[1]:
        inputs = []
        for value in node.inputs:
            if value is None or match.level.get(value, -1) < 1:
                counterpart = value and match.values.get(value, value)
                inputs.append(value if counterpart in (value, None) else before.get(counterpart, counterpart))
            else:
                if value not in copy:
                    copy[value] = _port(match, value, step)
                inputs.append(copy[value])
        attributes = list(node.attributes.values())
        new = Node(node.domain, node.op_type, inputs, attributes, overload=node.overload, num_outputs=len(node.outputs))
        for one, two in zip(node.outputs, new.outputs, strict=True):
            two.name, two.type = f"{one.name}.{step}", one.type
            two.shape = one.shape if _sizes(one) <= match.sizes else None  # what depends on values is another size in a copy
            copy[one] = two
            if one.is_graph_output():
                two.name = next(match.moves(str(one.name), step))
                match.graph.outputs.append(two)
        match.graph.append(new)
    return copy


def _port(match: _Match, value: Value, step: int) -> Value:
    """The weight or input that a copy reads in the place of the second layer's."""
    name, weight = str(value.name), match.weights.get(str(value.name))
    moved = match.stack.moved(name, step)
    if weight is None:
        moved = next(match.moves(name, step))
    elif moved == name:
        moved = f"{name}.{step}"
    new = Value(name=moved, shape=value.shape, type=value.type)
    if weight is not None:
        match.weights[moved] = renamed(weight, lambda one: match.stack.moved(one, step))
    match.graph.inputs.append(new)
    return new


def _rows(match: _Match) -> dict[str, str]:
    """New names of inputs and outputs that come one a layer: those after the second layer's move up."""
    period, moved = match.stack.period, {}
    more = (match.stack.groups - KEPT) * period
    for value in (*match.graph.inputs, *match.graph.outputs):
        name = str(value.name)
        if match.level.get(value) != 1 or name in match.weights:
            continue
        if match.stack.group(name) >= 0:
            moved[match.stack.moved(name, 1)] = match.stack.moved(name, 1 + match.stack.groups - KEPT)
            continue
        here = next((f for f in _NUMBER.finditer(name) if _put(name, f, int(f[0]) + period) in match.ports), None)
        if here is None:
            raise Unlike(f"{name} is an input or output of one layer alone")
        for number in range(int(here[0]) + period, int(here[0]) + 1 + KEPT * period):
            if _put(name, here, number) in match.ports:
                moved[_put(name, here, number)] = _put(name, here, number + more)
    return moved


def _sizes(value: Value) -> set[str]:
    return {str(size) for size in value.shape or () if not isinstance(size, int)}


def _put(name: str, found: re.Match[str], number: int) -> str:
    return f"{name[: found.start()]}{number}{name[found.end() :]}"


def _equal(one: Value, two: Value) -> bool:
    if one.const_value is None or two.const_value is None:
        return False
    return Fixed(one.const_value.numpy()) == Fixed(two.const_value.numpy())


def _attributes(node: Node) -> list[bytes]:
    return sorted(bytes(onnx_ir.to_proto(attribute).SerializeToString()) for attribute in node.attributes.values())
