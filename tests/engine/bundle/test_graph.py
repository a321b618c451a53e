"""Graphs that a backend must never see, and that whatever is damaged ends in our error, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from helpers import photo
from onnx import TensorProto, helper, numpy_helper

from facetrt.engine import BundleError
from facetrt.engine.backends.choice import make_backend
from facetrt.engine.backends.run_options import BackendName, RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.graph import FUNCTIONS, check_graph
from facetrt.engine.encoding.encoder import EncodeOptions, Encoder

Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def refused(bundle: Bundle, change: Change) -> str:
    """The message about a changed graph."""
    model = onnx.load_from_string(bundle.encoder)
    change(model)
    with pytest.raises(BundleError) as caught:
        check_graph(model.SerializeToString(), bundle.manifest)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_functions_are_what_the_exporter_writes(bundle: Bundle) -> None:
    model = onnx.load_from_string(bundle.encoder)
    assert {(function.domain, function.name) for function in model.functions} == FUNCTIONS


def external(tensor: Any) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "secret.bin"


def external_without_location(tensor: Any) -> None:
    external(tensor)
    tensor.ClearField("external_data")


def attribute_tensor(model: Any) -> Any:
    node = next(node for function in model.functions for node in function.node if node.op_type == "Constant")
    return node.attribute[0].t


def first(model: Any, operator: str) -> Any:
    return next(node for node in model.graph.node if node.op_type == operator)


def add_node(model: Any, operator: str, *, inputs: Any = ("images",), domain: str = "", **attributes: Any) -> None:
    model.graph.node.append(helper.make_node(operator, list(inputs), ["extra"], domain=domain, **attributes))


def empty_graph() -> Any:
    return helper.make_graph([], "inner", [], [])


def sparse(model: Any) -> Any:
    return model.graph.sparse_initializer.add()


def set_dim(values: Any, name: str, axis: int, value: int) -> None:
    next(v for v in values if v.name == name).type.tensor_type.shape.dim[axis].dim_value = value


def add_weight(model: Any, *dims: int, name: str = "extra", data: bytes = b"", kind: int = TensorProto.FLOAT) -> None:
    model.graph.initializer.append(TensorProto(name=name, dims=dims, data_type=kind, raw_data=data))


def many_nodes(model: Any) -> None:
    for number in range(5000):
        model.graph.node.append(helper.make_node("Erf", ["positional"], [f"extra{number}"]))


def second_function(model: Any) -> None:
    model.functions.append(model.functions[0])


def recursive(model: Any) -> None:
    model.functions[0].node.append(helper.make_node("MultiHeadAttention", ["query"], ["x"], domain="com.microsoft"))


def annotate(model: Any) -> None:
    model.graph.quantization_annotation.add().tensor_name = "images"


def string_tensor(model: Any) -> None:
    model.graph.initializer.append(helper.make_tensor("extra", TensorProto.STRING, [1], [b"x"]))


def pad(model: Any) -> None:
    next(a for a in first(model, "Conv").attribute if a.name == "pads").ints[0] = 9


def expand_all(model: Any) -> None:
    next(node for node in model.graph.node if first(model, "Expand").input[1] in node.output).input[1] = "val_0"


def expand_far(model: Any) -> None:
    add_weight(model, 1, name="far", data=(1 << 40).to_bytes(8, "little"), kind=TensorProto.INT64)
    next(node for node in model.graph.node if first(model, "Expand").input[1] in node.output).input[2] = "far"


def expand_to(model: Any) -> None:
    add_weight(model, 3, name="far", data=(1 << 20).to_bytes(8, "little") * 3, kind=TensorProto.INT64)
    first(model, "Expand").input[1] = "far"


CHANGES: list[tuple[str, Change]] = [
    ("external_data in Tensor", lambda m: external(m.graph.initializer[0])),
    ("another file", lambda m: external_without_location(m.graph.initializer[0])),
    ("external_data in Tensor", lambda m: external(attribute_tensor(m))),
    ("sparse_initializer in Graph", lambda m: external(sparse(m).values)),
    ("sparse_tensor in Attribute", lambda m: external(first(m, "Conv").attribute.add().sparse_tensor.values)),
    ("tensors in Attribute", lambda m: external(first(m, "Conv").attribute.add().tensors.add())),
    ("has g in Attribute", lambda m: add_node(m, "Add", body=empty_graph())),
    ("has g in Attribute", lambda m: add_node(m, "If", then_branch=empty_graph(), else_branch=empty_graph())),
    ("graphs in Attribute", lambda m: first(m, "Conv").attribute.add().graphs.append(empty_graph())),
    ("of type 5", lambda m: first(m, "Conv").attribute.append(onnx.AttributeProto(name="x", type=5, i=1))),
    ("operator 'Loop'", lambda m: add_node(m, "Loop")),
    ("operator 'ConstantOfShape'", lambda m: add_node(m, "ConstantOfShape")),
    ("operator 'Tile'", lambda m: add_node(m, "Tile")),
    ("operator 'Range'", lambda m: add_node(m, "Range")),
    ("'com.microsoft::Attention'", lambda m: add_node(m, "Attention", domain="com.microsoft")),
    ("'evil::Add'", lambda m: add_node(m, "Add", domain="evil")),
    ("operators of 'evil'", lambda m: m.opset_import.append(helper.make_opsetid("evil", 1))),
    ("version of a domain twice", lambda m: m.opset_import.append(helper.make_opsetid("", 17))),
    ("function 'evil::Add'", lambda m: m.functions.append(helper.make_function("evil", "Add", [], [], [], []))),
    ("MultiHeadAttention twice", second_function),
    ("operator 'com.microsoft::MultiHeadAttention'", recursive),
    ("operator 'com.microsoft::MultiHeadAttention'", lambda m: m.ClearField("functions")),
    ("attribute_proto in Function", lambda m: m.functions[0].attribute_proto.add()),
    ("training_info in Model", lambda m: m.training_info.add()),
    ("quantization_annotation", annotate),
    ("string_data in Tensor", string_tensor),
    ("segment in Tensor", lambda m: setattr(m.graph.initializer[0].segment, "begin", 1)),
    ("device_configurations", lambda m: m.graph.node[0].device_configurations.add()),
    ("has opset 17: expected 18", lambda m: setattr(m.opset_import[0], "version", 17)),
    ("has IR version 99", lambda m: setattr(m, "ir_version", 99)),
    ("holds no graph", lambda m: m.ClearField("graph")),
    ("nodes; at most", many_nodes),
    ("the outputs 'cls_attention, key@1, key@1", lambda m: setattr(m.graph.output[3], "name", "key@1")),
    ("manifest means cls_attention", lambda m: m.graph.output.pop()),
    ("the inputs", lambda m: m.graph.input.append(helper.make_tensor_value_info("more", 1, [1]))),
    ("input images of type 1", lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 1)),
    ("output key@1 of type 10", lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 10)),
    ("dimensions ?×224×?×3", lambda m: set_dim(m.graph.input, "images", 1, 224)),
    ("dimensions ?×?×96; the manifest means type 1 and ?×?×48", lambda m: set_dim(m.graph.output, "key@1", 2, 96)),
    ("dimensions unknown", lambda m: m.graph.output[0].type.tensor_type.ClearField("shape")),
    ("sequence_type in Type", lambda m: m.graph.output[0].type.sequence_type.elem_type.tensor_type.Clear()),
    ("two of one name", lambda m: m.graph.initializer.append(m.graph.initializer[0])),
    ("makes the value 'rows' twice", lambda m: add_weight(m, 1, name="rows", data=bytes(4))),
    ("two nodes of one name", lambda m: setattr(m.graph.node[0], "name", m.graph.node[1].name)),
    ("before it is made", lambda m: add_node(m, "Erf", inputs=["nowhere"])),
    ("before it is made", lambda m: add_node(m, "Erf", inputs=["extra"])),
    ("from constants alone", lambda m: add_node(m, "Erf", inputs=[m.graph.initializer[0].name])),
    ("data do not fit", lambda m: add_weight(m, 3, data=bytes(8))),
    ("data do not fit", lambda m: add_weight(m, 1 << 30, 1 << 30, 1 << 30, data=bytes(8))),
    ("data do not fit", lambda m: m.graph.initializer[0].float_data.append(1)),
    ("of dimensions [-1]", lambda m: add_weight(m, -1, data=bytes(4))),
    ("of dimensions [1099511627776]", lambda m: add_weight(m, 1 << 40, data=bytes(4))),
    ("data type 11", lambda m: add_weight(m, 1, data=bytes(8), kind=TensorProto.DOUBLE)),
    ("architecture explains 18,432", lambda m: add_weight(m, 1 << 15, data=bytes(1 << 17))),
    ("attention of 4 heads", lambda m: setattr(first(m, "MultiHeadAttention").attribute[0], "i", 4)),
    ("numbers beyond", lambda m: first(m, "Transpose").attribute[0].ints.append(1 << 40)),
    ("pads its patches by [9, 0, 0, 0]", pad),
    ("expands 'prefix' by more than the batch", expand_all),
    ("expands 'prefix' by more than the batch", expand_far),
    ("by Expand from constants alone", expand_to),
    ("bytes beside its weights", lambda m: setattr(m, "doc_string", "x" * (16 << 20))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), CHANGES, ids=[f"{i}" for i in range(len(CHANGES))])
def test_what_the_exporter_never_writes(bundle: Bundle, message: str, change: Change) -> None:
    assert message in refused(bundle, change)


def test_outputs_of_another_shape_than_promised(bundle: Bundle) -> None:
    """What a graph says of its outputs is a promise; what comes out is looked at as well."""
    model = onnx.load_from_string(bundle.encoder)
    made = next(node for node in model.graph.node if "key@1" in node.output)
    made.output[list(made.output).index("key@1")] = "whole"
    for node in model.graph.node:
        node.input[:] = ["whole" if name == "key@1" else name for name in node.input]
    part = helper.make_node("Slice", ["whole", "val_one", "val_two", "val_one"], ["key@1"])
    model.graph.node.insert(list(model.graph.node).index(made) + 1, part)
    for name, value in (("val_one", 1), ("val_two", 2)):
        add_weight(model, 1, name=name, data=value.to_bytes(8, "little"), kind=TensorProto.INT64)
    check_graph(model.SerializeToString(), bundle.manifest)
    options = RunOptions(BackendName.ONNXRUNTIME)
    backend = make_backend(replace(bundle, encoder=model.SerializeToString()), options)
    with pytest.raises(
        BundleError, match=r"gives key@1 as float32 \(1, 1, 48\), the manifest means float32 \(1, 226, 48\)"
    ):
        next(Encoder(bundle, backend).encode([photo(64, 64)], EncodeOptions(None)))
    backend.close()


def test_many_small_weights(bundle: Bundle) -> None:
    def change(model: Any) -> None:
        for number in range(40):
            add_weight(model, 18_000, name=f"extra{number}", data=bytes(72_000))

    assert "weights; the manifest's architecture explains at most" in refused(bundle, change)


def test_a_body_of_another_operator(bundle: Bundle) -> None:
    assert "operator 'Loop'" in refused(bundle, lambda m: m.functions[0].node.append(helper.make_node("Loop", [], [])))


@pytest.mark.parametrize(
    "data",
    [
        b"\x3a\xff\xff\xff\xff\x0f",  # a graph of 4 GiB
        b"\x08\x80",  # a number that ends too early
        b"\x08" + b"\x80" * 10 + b"\x01",  # one of 71 bits
        b"\x08\x8a\x00",  # one with a superfluous byte
        b"\x08" + b"\xff" * 9 + b"\x7f",  # one beyond 64 bits
        b"\x0b\x0c",  # a group
        b"\x0f",  # no wire type
        b"\x00\x00",  # no field
        b"\x3a\x02\x12\x01",  # a name that ends beyond its graph
        b"\x08\x0a\x08\x0a",  # a field twice
        b"\x12\x01\xff",  # text that is none
        b"\x09" + bytes(8),  # a number of another wire type
        b"\x3a\x00\x3a\x00",  # two graphs, which a parser would merge
        b"\x3a\x80\x80\x40" + b"\x0a\x00" * (1 << 19),  # half a million empty nodes
        b"",
    ],
)
def test_damaged_bytes(bundle: Bundle, data: bytes) -> None:
    with pytest.raises(BundleError, match="the encoder's graph"):
        check_graph(data, bundle.manifest)


def test_fields_may_be_packed_or_typed(bundle: Bundle) -> None:
    model = onnx.load_from_string(bundle.encoder)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT64:
            values = numpy_helper.to_array(tensor).ravel().tolist()
            tensor.ClearField("raw_data")
            tensor.int64_data.extend(values)
    check_graph(model.SerializeToString(), bundle.manifest)


MUTATE = """
import hashlib, json, random, sys, tempfile
from pathlib import Path
from facetrt.engine import Engine
from facetrt.engine.bundle.bundle import builtin_path
from facetrt.kernels.errors import FacetrtError

source, random_numbers = builtin_path(), random.Random(int(sys.argv[1]))
files = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
manifest = json.loads(files["manifest.json"])
VALUES = [None, -1, 0, 1, 1 << 31, 1 << 70, 0.5, float("nan"), "", "\\ud800", "x" * 300, [], {}, [[]], True]


def bytes_changed(data):
    changed = bytearray(data)
    for _ in range(random_numbers.choice([1, 1, 2, 8])):
        at = random_numbers.randrange(len(changed)) if random_numbers.random() < 0.3 else random_numbers.choice(marks)
        kind = random_numbers.randrange(4)
        if kind == 0:
            changed[at % len(changed)] = random_numbers.randrange(256)
        elif kind == 1:
            del changed[at:at + random_numbers.choice([1, 2, 9, 1000])]
        elif kind == 2:
            changed[at:at] = random_numbers.randbytes(random_numbers.choice([1, 2, 9]))
        else:
            changed[at % len(changed)] ^= 1 << random_numbers.randrange(8)
    return bytes(changed)


def field_changed(value):
    if isinstance(value, (dict, list)) and value and random_numbers.random() < 0.85:
        copy = value.copy()
        key = random_numbers.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if random_numbers.random() < 0.1:
            del copy[key]
        else:
            copy[key] = field_changed(value[key])
        return copy
    return random_numbers.choice(VALUES)


graph = files["encoder.onnx"]
size = len(graph)
tags = (0x0a, 0x12, 0x22, 0x2a, 0x3a, 0x42)
marks = [at for at in range(size) if graph[at] in tags and graph[at + 1:at + 3].isascii()]
marks = [at for at in marks if any(32 < byte < 127 for byte in graph[at + 2:at + 6])]  # mostly names and tags
opened = refused = 0
with tempfile.TemporaryDirectory() as place:
    folder = Path(place)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for turn in range(int(sys.argv[2])):
        changed = dict(manifest)
        if turn % 3 == 0:
            changed = field_changed(manifest)
            encoder = graph
        else:
            encoder = bytes_changed(graph)
        if turn % 3 and isinstance(changed, dict):
            entry = {"bytes": len(encoder), "sha256": hashlib.sha256(encoder).hexdigest()}
            changed["files"] = manifest["files"] | {"encoder.onnx": entry}
        (folder / "encoder.onnx").write_bytes(encoder)
        (folder / "manifest.json").write_text(json.dumps(changed))
        try:
            with Engine.open(folder, threads=1) as engine:
                engine._encoder.backend.activate()
            opened += 1
        except FacetrtError as error:
            refused += 1
            assert "\\n" not in str(error), error
            str(error).encode()
print(opened, refused)
"""


def test_mutated_bundles_end_in_our_error_or_open() -> None:
    """A process of its own: if a graph kills it, that is seen."""
    done = subprocess.run(
        [sys.executable, "-c", MUTATE, "7", "300"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    opened, turned_down = map(int, done.stdout.split())
    assert opened + turned_down == 300 and turned_down > 100
