from __future__ import annotations

import subprocess
import sys

BLOCKED = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "tensorrt",
    "pycuda",
    "safetensors",
    "openvino",
    "scipy",
)

SCRIPT = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} must not be needed here")
sys.meta_path.insert(0, Block())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT + code], capture_output=True, text=True, check=False)


def test_the_runtime_needs_no_export_library() -> None:
    result = run(
        "import facetrt.engine, facetrt.kernels, facetrt.engine.cli.tasks, numpy\n"
        "with facetrt.engine.Engine.open('builtin') as engine:\n"
        "    f = engine.encode([numpy.zeros((64, 64, 3), numpy.uint8)], load_size=None)[0]\n"
        "print(f.grid)\n"
        "assert not any(n.startswith('facetrt.export') for n in sys.modules)\n"
    )
    assert result.stdout.strip() == "(15, 15)", result.stderr


def test_the_command_line_starts_without_them() -> None:
    result = run("sys.argv = ['facetrt', '--help']\nfrom facetrt.engine.cli.main import main\nmain()")
    assert result.returncode == 0 and "cosegment" in result.stdout, result.stderr


def test_export_names_the_extra_that_is_missing() -> None:
    code = "sys.argv = ['facetrt', 'export', 'builtin', '--out', 'x']\nfrom facetrt.engine.cli.main import main\nmain()"
    result = run(code)
    assert result.returncode == 2 and "facetrt[export,cpu]" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_runtime_names_both_extras() -> None:
    for library, call in (
        ("onnxruntime", "from facetrt.engine import Engine; Engine.open('builtin')"),
        ("faiss", "import numpy; from facetrt.kernels import kmeans; kmeans(numpy.ones((3, 2), 'f4'), 1)"),
    ):
        code = f"import sys\nsys.modules[{library!r}] = sys.modules['openvino'] = None\n{call}"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "MissingDependencyError" in result.stderr
        assert "facetrt[cpu]" in result.stderr and "facetrt[gpu]" in result.stderr
