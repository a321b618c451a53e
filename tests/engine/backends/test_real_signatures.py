"""The stand-in for TensorRT next to both real libraries: names, arguments, enumerations. Nothing of them is run."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import fakes_tensorrt
import pytest

STUBS = {  # libraries that TensorRT's bindings link to, and what they look up in them when they are imported
    "libnvinfer.so.11": [
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry", "getPluginRegistry",
    ],
    "libnvinfer_plugin.so.11": ["initLibNvInferPlugins"],
    "libnvonnxparser.so.11": [
        "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getNvOnnxParserVersion",
    ],
}  # fmt: skip
DESCRIBE = """
import enum, importlib, json, sys
library = importlib.import_module(sys.argv[1])
found = {"version": library.__version__, "classes": {}, "enumerations": {}}
for name, kind in vars(library).items():
    if isinstance(kind, type) and hasattr(kind, "__members__"):
        found["enumerations"][name] = list(kind.__members__)
    elif isinstance(kind, type):
        members = {n: getattr(kind, n) for n in dir(kind) if not n.startswith("_")}
        found["classes"][name] = {n: None if isinstance(m, property) else m.__doc__ for n, m in members.items()}
found["enumerations"]["Severity"] = list(library.ILogger.Severity.__members__)
found["bytes"] = library.nptype(library.DataType.UINT8).__name__
print(json.dumps(found))
"""
CLASSES = {
    "Builder": fakes_tensorrt.Builder,
    "IBuilderConfig": fakes_tensorrt.BuilderConfig,
    "ICudaEngine": fakes_tensorrt.CudaEngine,
    "IExecutionContext": fakes_tensorrt.ExecutionContext,
    "ILogger": fakes_tensorrt.ILogger,
    "INetworkDefinition": fakes_tensorrt.Network,
    "IOptimizationProfile": fakes_tensorrt.OptimizationProfile,
    "IProgressMonitor": fakes_tensorrt.IProgressMonitor,
    "EngineInspector": fakes_tensorrt.EngineInspector,
    "OnnxParser": fakes_tensorrt.OnnxParser,
    "Runtime": fakes_tensorrt.Runtime,
}
ONLY_RTX = {
    "IRuntimeConfig": fakes_tensorrt.RuntimeConfig,
    "IRuntimeCache": fakes_tensorrt.RuntimeCache,
    "IExecutionContext": fakes_tensorrt.RtxExecutionContext,
}
OWN = {"ascends", "checked", "layers_of_plan"}  # what the stand-in says of itself
OF_RTX = {  # members that TensorRT lacks
    "num_compute_capabilities", "set_compute_capability",
}  # fmt: skip
ENUMERATIONS = (
    "DataType", "TensorIOMode", "LayerInformationFormat", "ProfilingVerbosity", "BuilderFlag", "Severity",
    "HardwareCompatibilityLevel", "ExecutionContextAllocationStrategy", "LayerType",
)  # fmt: skip


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TensorRT's bindings over libraries that hold nothing: the true ones are not on the package index."""
    if find_spec("tensorrt_bindings") is None:
        pytest.skip("tensorrt-cu13-bindings is not installed")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler for the libraries that TensorRT's bindings link to")
    folder = tmp_path_factory.mktemp("stubs")
    for library, symbols in STUBS.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"void {symbol}(void) {{}}\n" for symbol in symbols))
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / library), str(source)], check=True)
    return describe("tensorrt_bindings", LD_LIBRARY_PATH=str(folder))


@pytest.fixture(scope="module")
def rtx() -> Any:
    if find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("the extra rtx is not installed")
    return describe("tensorrt_rtx_bindings")


def describe(module: str, **environment: str) -> Any:
    """What a library offers, from a process of its own: the two register the same types."""
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, module],
        capture_output=True, text=True, check=False, env={**os.environ, **environment, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def arguments(doc: str, method: str) -> list[list[str]]:
    """Names of the arguments of each overload."""
    plain = re.sub(r"<[^>]*>|\[[^\]]*\]", "", doc)
    return [re.findall(r"(\w+): ", signature) for signature in re.findall(rf"{method}\(self[^,)]*,? ?(.*)\) ->", plain)]


def check_class(real: dict[str, str | None], fake: type, *, without: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    members = {n: m for n, m in vars(fake).items() if not n.startswith("_") and n not in OWN | without}
    assert members
    for name, member in members.items():
        assert name in real, name
        if isinstance(member, property):
            assert real[name] is None, f"{name} is no property"
        elif inspect.isfunction(member):
            expected = [p for p in inspect.signature(member).parameters if p != "self"]
            assert expected in arguments(real[name] or "", name), (name, real[name])


@pytest.mark.parametrize("name", CLASSES)
def test_the_stand_in_has_what_tensorrt_has(tensorrt: Any, name: str) -> None:
    assert tensorrt["version"].startswith("11.")
    check_class(tensorrt["classes"][name], CLASSES[name], without=OF_RTX)


@pytest.mark.parametrize(("name", "fake"), [*CLASSES.items(), *ONLY_RTX.items()])
def test_the_stand_in_has_what_tensorrt_for_rtx_has(rtx: Any, name: str, fake: type) -> None:
    assert rtx["version"].startswith("1.")
    check_class(rtx["classes"][name], fake)


@pytest.mark.parametrize("which", ["tensorrt", "rtx"])
def test_the_stand_in_has_their_enumerations(which: str, request: pytest.FixtureRequest) -> None:
    real = request.getfixturevalue(which)
    for name in ENUMERATIONS:
        assert set(getattr(fakes_tensorrt, name).__members__) <= set(real["enumerations"][name]), name
    assert not {"FP16", "BF16", "INT8"} & set(real["enumerations"]["BuilderFlag"])  # precision comes from the graph
    assert "STRONGLY_TYPED" in real["enumerations"]["NetworkDefinitionCreationFlag"] and real["bytes"] == "uint8"


def test_the_stand_in_has_what_only_tensorrt_for_rtx_has(rtx: Any) -> None:
    for name in ("ComputeCapability", "DynamicShapesKernelSpecializationStrategy"):
        assert list(getattr(fakes_tensorrt, name).__members__) == rtx["enumerations"][name]
