"""What a bundle's ONNX graph may hold, checked before any backend sees it.

A graph is a program that arrives with a bundle: it can name files to read, hold sub-graphs, call kernels that nobody
looked at, or ask for more memory than there is. Here its bytes are read as protobuf, without the onnx package, and held
to what the exporter writes: fields, operators, functions, names, sizes. Whatever else there is refuses the bundle.

The messages that are read do not contain themselves, so depth is bounded; counts and bytes are bounded by the manifest.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any, NoReturn

from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.images.geometry import grid_size
from facetrt.kernels.errors import BundleError

OPERATORS = frozenset(
    {"Add", "Cast", "Concat", "Constant", "Conv", "Div", "Erf", "Expand", "Gather", "GatherND", "LayerNormalization"}
    | {"MatMul", "Mul", "Neg", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze"}
    | {"Sub", "Tanh", "Transpose", "Unsqueeze"}
)
"""Operators of the standard domain that the exporter writes, in graphs and in the bodies of its functions."""

FUNCTIONS = frozenset({("com.microsoft", "MultiHeadAttention")})
"""Domain and name of the functions that the exporter writes; their bodies are made of :data:`OPERATORS` alone."""

OPSETS = range(17, 25)
IR_VERSIONS = range(8, 14)
DOMAIN_VERSION = 1  # of the functions' domains

FLOAT, UINT8, INT64 = 1, 2, 7  # onnx.TensorProto.DataType
ELEMENT_BYTES = {FLOAT: 4, UINT8: 1, 6: 4, INT64: 8, 9: 1, 10: 2, 16: 2}  # int32, bool, float16, bfloat16 as well
TYPED_DATA = {"float_data": {FLOAT}, "int32_data": {6, 9, 10, 16, UINT8}, "int64_data": {INT64}}
ATTRIBUTE_VALUES = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints"}  # by onnx.AttributeProto.AttributeType

MAX_NAME = 512  # bytes
MAX_ATTRIBUTE = 1 << 16  # no axis, permutation, padding or number of heads is larger
MAX_CONSTANT = 4096  # elements of a tensor that is no weight
MAX_BODY_NODES = 64
MAX_RANK = 8


@dataclass(frozen=True)
class Limits:
    """What an architecture explains, with room: ViT-S/8 has 300 nodes and 22 million weights."""

    nodes: int
    elements: int
    largest: int

    @property
    def fields(self) -> int:
        """How many protobuf fields may be read, of all messages together."""
        return 200 * self.nodes

    @property
    def overhead(self) -> int:
        """Bytes beside the tensors: names, types, the exporter's notes."""
        return (1 << 20) + (16 << 10) * self.nodes

    @staticmethod
    def of(manifest: Manifest) -> Limits:
        """An MLP may be of three matrices of four times the width (SwiGLU), and their first two in one."""
        model, outputs = manifest.architecture, len(manifest.outputs)
        table = math.prod(_grid(manifest) or (1, 1)) * model.dim * (1 if manifest.rotation is None else 2)
        patches = 3 * model.patch**2 * model.dim
        block = 20 * model.dim**2 + 64 * model.dim
        return Limits(
            nodes=256 + 128 * model.depth + 32 * outputs,
            elements=table + patches + model.depth * block + 256 * model.dim + (1 << 16),
            largest=max(table, patches, 8 * model.dim**2, MAX_CONSTANT),
        )


def check_graph(data: bytes, manifest: Manifest) -> None:
    """Raise :class:`BundleError` unless ``data`` is a graph that the exporter could have written for this manifest."""
    limits = Limits.of(manifest)
    model = _Reader(data, limits.fields).message("Model", 0, len(data))
    graph = model.get("graph")
    if graph is None:
        _refuse("holds no graph")
    nodes, weights = graph.get("node", []), graph.get("initializer", [])
    if len(nodes) > limits.nodes:
        _refuse(f"has {len(nodes):,} nodes; at most {limits.nodes:,} are explained by the manifest's architecture")
    _check_versions(model, manifest)
    functions = _check_functions(model)
    _check_sizes(len(data), weights, limits)
    _check_edges(graph, manifest)
    _check_nodes(nodes, functions, manifest)
    _check_names(graph, {name for weight in weights if (name := weight.get("name", ""))})
    integers = {weight["name"]: _integers(weight, data) for weight in weights if weight["data_type"] == INT64}
    _check_expansions(nodes, integers, limits)


def _refuse(what: str) -> NoReturn:
    raise BundleError(f"the encoder's graph {what}; export the bundle again, and open none that you do not trust")


# ---------------------------------------------------------------------------------------------------- reading protobuf
class _Kind(StrEnum):
    INT = auto()
    INTS = auto()
    FLOAT = auto()
    FLOATS = auto()
    BYTES = auto()
    TEXT = auto()
    REFUSED = auto()  # a field that the exporter never writes


@dataclass(frozen=True)
class _Field:
    name: str
    kind: _Kind | str  # a string is the name of a message
    many: bool = False


def _message(single: str = "", many: str = "", refused: str = "") -> dict[int, _Field]:
    """Fields by number, from ``number:name:kind`` each; what is listed nowhere is refused without a name."""
    fields = {}
    for text, repeated in ((single, False), (many, True)):
        for entry in text.split():
            number, name, kind = entry.split(":")
            fields[int(number)] = _Field(name, _Kind(kind) if kind in set(_Kind) else kind, repeated)
    for entry in refused.split():
        number, name = entry.split(":")
        fields[int(number)] = _Field(name, _Kind.REFUSED)
    return fields


MESSAGES: Mapping[str, dict[int, _Field]] = {
    "Model": _message(
        "1:ir_version:int 2:producer_name:text 3:producer_version:text 4:domain:text 5:model_version:int "
        "6:doc_string:text 7:graph:Graph",
        "8:opset_import:OperatorSet 14:metadata_props:Entry 25:functions:Function",
        "20:training_info 26:configuration",
    ),
    "Graph": _message(
        "2:name:text 10:doc_string:text",
        "1:node:Node 5:initializer:Tensor 11:input:ValueInfo 12:output:ValueInfo 13:value_info:ValueInfo "
        "16:metadata_props:Entry",
        "14:quantization_annotation 15:sparse_initializer",
    ),
    "Node": _message(
        "3:name:text 4:op_type:text 6:doc_string:text 7:domain:text",
        "1:input:text 2:output:text 5:attribute:Attribute 9:metadata_props:Entry",
        "8:overload 10:device_configurations",
    ),
    "Attribute": _message(
        "1:name:text 2:f:float 3:i:int 4:s:bytes 5:t:Tensor 7:floats:floats 8:ints:ints 13:doc_string:text 20:type:int",
        "",
        "6:g 9:strings 10:tensors 11:graphs 14:tp 15:type_protos 21:ref_attr_name 22:sparse_tensor 23:sparse_tensors",
    ),
    "Tensor": _message(
        "1:dims:ints 2:data_type:int 4:float_data:floats 5:int32_data:ints 7:int64_data:ints 8:name:text "
        "9:raw_data:bytes 12:doc_string:text 14:data_location:int",
        "16:metadata_props:Entry",
        "3:segment 6:string_data 10:double_data 11:uint64_data 13:external_data",
    ),
    "Function": _message(
        "1:name:text 8:doc_string:text 10:domain:text",
        "4:input:text 5:output:text 6:attribute:text 7:node:Node 9:opset_import:OperatorSet 12:value_info:ValueInfo "
        "14:metadata_props:Entry",
        "11:attribute_proto 13:overload",
    ),
    "ValueInfo": _message("1:name:text 2:type:Type 3:doc_string:text", "4:metadata_props:Entry"),
    "Type": _message(
        "1:tensor_type:TensorType 6:denotation:text",
        "",
        "4:sequence_type 5:map_type 7:opaque_type 8:sparse_tensor_type 9:optional_type",
    ),
    "TensorType": _message("1:elem_type:int 2:shape:Shape"),
    "Shape": _message("", "1:dim:Dimension"),
    "Dimension": _message("1:dim_value:int 2:dim_param:text 3:denotation:text"),
    "OperatorSet": _message("1:domain:text 2:version:int"),
    "Entry": _message("1:key:text 2:value:text"),
}

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # protobuf's wire types; 3 and 4 are groups
WIRES = {
    _Kind.INT: {VARINT}, _Kind.INTS: {VARINT, LENGTH}, _Kind.FLOAT: {FIXED32}, _Kind.FLOATS: {FIXED32, LENGTH},
}  # fmt: skip


class _Reader:
    """Reads messages of :data:`MESSAGES`; all others, and every field that is listed nowhere, are refused.

    A message is a dictionary of the fields that are there: integers signed, floats by their number alone (what is in
    weights does not matter here), bytes by where they lie.
    """

    def __init__(self, data: bytes, max_fields: int) -> None:
        self._data, self._left, self._max = data, max_fields, max_fields

    def message(self, kind: str, start: int, end: int) -> dict[str, Any]:
        """The message at ``start`` to ``end``."""
        fields, found, at = MESSAGES[kind], dict[str, Any](), start
        while at < end:
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            field = fields.get(number)
            if field is None or field.kind is _Kind.REFUSED:
                _refuse(
                    f"has {field.name if field else f'the unknown field {number}'} in {kind}, which is never written"
                )
            if wire not in WIRES.get(field.kind, {LENGTH}):  # type: ignore[call-overload]
                _refuse(f"is damaged: {kind}.{field.name} has wire type {wire}")
            self._count()
            at = self._field(found, field, wire, at, end, kind)
        return found

    def _field(self, found: dict[str, Any], field: _Field, wire: int, at: int, end: int, kind: str) -> int:
        """Put the value at ``at`` into ``found``; returns where it ends."""
        stop = at
        value: Any = None
        if wire == LENGTH:
            size, at = self._varint(at, end)
            stop = at + size
        elif wire == FIXED32:
            stop = at + 4
        if stop > end:
            _refuse(f"is damaged: {kind}.{field.name} ends beyond what holds it")
        if wire == VARINT:
            number, stop = self._varint(at, end)
            value = number - (1 << 64) if number >> 63 else number
        match field.kind:
            case _Kind.INTS:
                found.setdefault(field.name, []).extend([value] if wire == VARINT else self._packed(at, stop))
                return stop
            case _Kind.FLOATS:
                found[field.name] = found.get(field.name, 0) + (stop - at) // 4
                if (stop - at) % 4:
                    _refuse(f"is damaged: {kind}.{field.name} has {stop - at} bytes")
                return stop
            case _Kind.FLOAT | _Kind.BYTES:
                value = range(at, stop)
            case _Kind.TEXT:
                value = self._text(at, stop, f"{kind}.{field.name}")
            case _Kind.INT:
                pass
            case message:
                value = self.message(message, at, stop)
        if field.many:
            found.setdefault(field.name, []).append(value)
        elif field.name in found:
            _refuse(f"has {kind}.{field.name} twice")
        else:
            found[field.name] = value
        return stop

    def _packed(self, at: int, end: int) -> Iterator[int]:
        while at < end:
            self._count()
            value, at = self._varint(at, end)
            yield value - (1 << 64) if value >> 63 else value

    def _text(self, at: int, end: int, where: str) -> str:
        try:
            return self._data[at:end].decode("utf-8")
        except UnicodeDecodeError:
            _refuse(f"is damaged: {where} is not UTF-8")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                _refuse("is damaged: a number ends beyond what holds it")
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64 or (shift and not byte):
                    break
                return value, at
        _refuse("is damaged: a number is longer than it may be")

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            _refuse(f"has more than {self._max:,} fields; fewer are explained by the manifest's architecture")


# ------------------------------------------------------------------------------------------------------------- checking
def _check_versions(model: Mapping[str, Any], manifest: Manifest) -> None:
    version = model.get("ir_version")
    if version not in IR_VERSIONS:
        _refuse(f"has IR version {version}: expected {IR_VERSIONS.start} to {IR_VERSIONS.stop - 1}")
    _check_opsets(model.get("opset_import", []), manifest.opset)


def _check_opsets(opsets: Sequence[Mapping[str, Any]], expected: int | None) -> None:
    """``expected`` is the standard domain's version, or None for any that is known."""
    found = {opset.get("domain", ""): opset.get("version") for opset in opsets}
    if len(found) < len(opsets):
        _refuse("states the version of a domain twice")
    standard = found.pop("", None)
    if standard not in OPSETS or expected not in (None, standard):
        wanted = expected if expected in OPSETS else f"{OPSETS.start} to {OPSETS.stop - 1}"
        _refuse(f"has opset {standard}: expected {wanted}")
    for domain, version in found.items():
        if domain not in {known for known, _ in FUNCTIONS} or version != DOMAIN_VERSION:
            _refuse(f"uses operators of {_shown(domain)}, version {version}")


def _check_functions(model: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Domain and name of the functions that nodes may call."""
    found: set[tuple[str, str]] = set()
    for function in model.get("functions", []):
        name = function.get("domain", ""), function.get("name", "")
        if name not in FUNCTIONS:
            _refuse(f"defines the function {_shown('::'.join(name))}")
        if name in found:
            _refuse(f"defines the function {name[1]} twice")
        nodes = function.get("node", [])
        if len(nodes) > MAX_BODY_NODES:
            _refuse(f"has {len(nodes):,} nodes in the function {name[1]}: expected at most {MAX_BODY_NODES}")
        _check_opsets(function.get("opset_import", []), None)
        _check_nodes(nodes, set(), None)
        _check_flow(function.get("input", []), function.get("output", []), nodes)
        for value in function.get("value_info", []):
            _check_value(value)
        found.add(name)
    return found


def _check_sizes(size: int, weights: Sequence[Mapping[str, Any]], limits: Limits) -> None:
    elements = nbytes = 0
    for weight in weights:
        count = _check_tensor(weight)
        if count > limits.largest:
            name = _shown(weight.get("name", ""))
            _refuse(
                f"has a constant {name} of {count:,} elements; the manifest's architecture explains {limits.largest:,}"
            )
        elements += count
        nbytes += count * ELEMENT_BYTES[weight["data_type"]]
    if elements > limits.elements:
        _refuse(f"has {elements:,} weights; the manifest's architecture explains at most {limits.elements:,}")
    if size - nbytes > limits.overhead:
        _refuse(f"has {size - nbytes:,} bytes beside its weights: expected at most {limits.overhead:,}")


def _check_tensor(tensor: Mapping[str, Any]) -> int:
    """Its number of elements; its data have just so many."""
    name, dims, kind = _shown(tensor.get("name", "")), tensor.get("dims", []), tensor.get("data_type")
    if tensor.get("data_location", 0) != 0:
        _refuse(f"keeps the data of {name} in another file (data_location {tensor['data_location']})")
    if kind not in ELEMENT_BYTES:
        _refuse(f"has a constant {name} of data type {kind}, which is never written")
    if len(dims) > MAX_RANK or any(not 0 <= dim < 1 << 31 for dim in dims):
        _refuse(f"has a constant {name} of dimensions {dims[: MAX_RANK + 1]}")
    count: int = math.prod(dims)
    given = [(field, kinds) for field, kinds in TYPED_DATA.items() if field in tensor]
    if "raw_data" in tensor:
        fits = not given and len(tensor["raw_data"]) == count * ELEMENT_BYTES[kind]
    elif given:
        ((field, kinds), *others) = given
        values = tensor[field]
        fits = not others and kind in kinds and count == (values if isinstance(values, int) else len(values))
    else:
        fits = count == 0
    if not fits:
        _refuse(f"has a constant {name} whose data do not fit its dimensions {dims}")
    return count


def _check_nodes(
    nodes: Iterable[Mapping[str, Any]], functions: set[tuple[str, str]], manifest: Manifest | None
) -> None:
    """Operators and attributes. ``manifest`` is None for a function's body."""
    for node in nodes:
        domain, operator = node.get("domain", ""), node.get("op_type", "")
        if (domain, operator) not in functions and (domain or operator not in OPERATORS):
            _refuse(
                f"uses the operator {_shown(f'{domain}::{operator}' if domain else operator)}, which is never written"
            )
        attributes = _attributes(node)
        if operator == "Conv" and any(attributes.get("pads", {}).get("ints", [])):
            _refuse(f"pads its patches by {attributes['pads']['ints']}, which is never written")
        heads = attributes.get("num_heads", {}).get("i")
        if domain and manifest is not None and heads != manifest.architecture.heads:
            _refuse(f"has attention of {heads} heads; the manifest says {manifest.architecture.heads}")


def _attributes(node: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for attribute in node.get("attribute", []):
        name = attribute.get("name", "")
        field = ATTRIBUTE_VALUES.get(attribute.get("type"))
        where = f"the attribute {_shown(name)} of {node.get('op_type')}"
        if name in found:
            _refuse(f"has {where} twice")
        if field is None or (field not in attribute and field not in ("ints", "floats")):
            _refuse(f"has {where} of type {attribute.get('type')}, which is never written")
        surplus = set(ATTRIBUTE_VALUES.values()) & set(attribute) - {field}
        if surplus:
            _refuse(f"has {where} with a second value {min(surplus)}")
        numbers = [attribute["i"]] if field == "i" else attribute.get("ints", [])
        if len(numbers) > MAX_RANK or any(abs(number) > MAX_ATTRIBUTE for number in numbers):
            _refuse(f"has {where} with numbers beyond {MAX_ATTRIBUTE:,}, or too many")
        if field == "t" and _check_tensor(attribute["t"]) > MAX_CONSTANT:
            _refuse(f"has {where} of more than {MAX_CONSTANT:,} elements")
        found[name] = attribute
    return found


def _check_names(graph: Mapping[str, Any], weights: set[str]) -> None:
    """Every value is made once, before it is used; nothing but weights is known before there is an image."""
    nodes = graph.get("node", [])
    if len(weights) < len(graph.get("initializer", [])):
        _refuse("has constants without a name, or two of one name")
    names = [node["name"] for node in nodes if node.get("name")]
    if len(set(names)) < len(names):
        _refuse("has two nodes of one name")
    inputs = [value.get("name", "") for value in graph.get("input", [])]
    outputs = [value.get("name", "") for value in graph.get("output", [])]
    _check_flow([*inputs, *weights], outputs, nodes)
    for node in nodes:
        if weights.issuperset(node.get("input", [])):
            _refuse(f"computes {_shown(''.join(node.get('output', [])[:1]))} by {node['op_type']} from constants alone")
    for value in graph.get("value_info", []):
        _check_value(value)


def _integers(weight: Mapping[str, Any], data: bytes) -> list[int]:
    raw = weight.get("raw_data", range(0))
    return [
        *weight.get("int64_data", []),
        *(value for (value,) in struct.iter_unpack("<q", data[raw.start : raw.stop])),
    ]


def _check_expansions(
    nodes: Sequence[Mapping[str, Any]], integers: Mapping[str, Sequence[int]], limits: Limits
) -> None:
    """Expand makes much of little: it may repeat something for each image of the batch, and that is all."""
    makers = {name: node for node in nodes for name in node.get("output", [])}
    for node in nodes:
        if node["op_type"] != "Expand":
            continue
        shape = makers.get(node["input"][1], {}) if len(node.get("input", [])) == 2 else {}
        batch, *rest = shape.get("input", [""]) if shape.get("op_type") == "Concat" else [""]
        constants = [value for name in rest for value in integers.get(name, [0])]
        if not _is_batch(makers.get(batch, {})) or not 1 <= math.prod(constants) <= limits.largest:
            _refuse(
                f"expands {_shown(''.join(node.get('input', [])[:1]))} by more than the batch, which is never written"
            )


def _is_batch(node: Mapping[str, Any]) -> bool:
    """Whether it makes the number of images."""
    values = {attribute["name"]: attribute.get("i") for attribute in node.get("attribute", [])}
    return (node.get("op_type"), node.get("input"), values) == ("Shape", ["images"], {"start": 0, "end": 1})


def _check_flow(given: Sequence[str], outputs: Sequence[str], nodes: Iterable[Mapping[str, Any]]) -> None:
    """Values have printable names and are made once, before they are used."""
    made: set[str] = set()

    def make(name: str) -> None:
        if not name or len(name) > MAX_NAME or not name.isprintable():
            _refuse(f"has a value of the name {_shown(name)}")
        if name in made:
            _refuse(f"makes the value {_shown(name)} twice")
        made.add(name)

    for name in given:
        make(name)
    for node in nodes:
        for name in node.get("input", []):
            if name and name not in made:
                _refuse(f"uses {_shown(name)} before it is made")
        for name in node.get("output", []):
            if name:
                make(name)
    for name in outputs:
        if name not in made:
            _refuse(f"never makes its output {_shown(name)}")


Expected = Sequence[int | None]  # a dimension that may be anything but fixed is None


def _check_edges(graph: Mapping[str, Any], manifest: Manifest) -> None:
    """Inputs and outputs have the names, types and dimensions that the manifest means."""
    for which, expected in (("input", _inputs(manifest)), ("output", _outputs(manifest))):
        values = graph.get(which, [])
        given = sorted(value.get("name", "") for value in values)
        if given != sorted(expected):
            _refuse(f"has the {which}s {_shown(', '.join(given))}, the manifest means {', '.join(sorted(expected))}")
        for value in values:
            _check_edge(which, value, *expected[value["name"]])


def _grid(manifest: Manifest) -> tuple[int, int] | None:
    size = manifest.size
    return None if size is None else grid_size((size[0], size[1]), manifest.architecture.patch, manifest.stride)


def _inputs(manifest: Manifest) -> dict[str, tuple[int, Expected]]:
    if manifest.size is not None:
        return {"images": (UINT8, [None, *manifest.size, 3])}
    model = manifest.architecture
    rotation: dict[str, tuple[int, Expected]] = {"rotation": (FLOAT, [2, None, None, model.head_dim // 2])}
    return {
        "images": (UINT8, [None, None, None, 3]),
        "positional": (FLOAT, [1, None, None, model.dim]),
        **(rotation if manifest.rotation is not None else {}),
        **({name: (INT64, [None]) for name in _indices(manifest)}),
    }


def _indices(manifest: Manifest) -> tuple[str, ...]:
    return ("rows", "cols") if manifest.riders is None else ("rows", "cols", "carriers")


def _outputs(manifest: Manifest) -> dict[str, tuple[int, Expected]]:
    grid = _grid(manifest)
    cells = None if grid is None else math.prod(grid)
    tokens = None if cells is None else manifest.architecture.prefix + cells
    facets: dict[str, tuple[int, Expected]] = {
        name: (FLOAT, [None, tokens, manifest.architecture.dim]) for name in manifest.facets
    }
    attention = [name for name in manifest.outputs if name not in facets]
    return facets | {name: (FLOAT, [None, cells]) for name in attention}


def _check_edge(which: str, value: Mapping[str, Any], kind: int, expected: Expected) -> None:
    given_kind, dims = _check_value(value)
    if given_kind != kind or dims is None or list(dims) != list(expected):
        _refuse(
            f"has the {which} {value['name']} of type {given_kind} and dimensions {_dims(dims)}; the manifest means "
            f"type {kind} and {_dims(expected)}"
        )


def _check_value(value: Mapping[str, Any]) -> tuple[int | None, list[int | None] | None]:
    """Element type and dimensions of a value that is described, as far as they are."""
    tensor = value.get("type", {}).get("tensor_type", {})
    if "shape" not in tensor:
        return tensor.get("elem_type"), None
    dims = [dim.get("dim_value") for dim in tensor["shape"].get("dim", [])]
    if len(dims) > MAX_RANK or any(dim is not None and not 0 <= dim < 1 << 31 for dim in dims):
        _refuse(f"has the value {_shown(value.get('name', ''))} of dimensions {dims[: MAX_RANK + 1]}")
    return tensor.get("elem_type"), dims


def _dims(dims: Expected | None) -> str:
    return "unknown" if dims is None else "×".join("?" if dim is None else str(dim) for dim in dims)


def _shown(text: str) -> str:
    """Text from a file, for a message: one line, not long."""
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")
