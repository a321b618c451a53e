"""What the packages show: the same names for people, for type checkers and when the program runs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("facetrt.engine", "facetrt.export", "facetrt.kernels")


@pytest.mark.parametrize("package", PACKAGES)
def test_what_type_checkers_see_is_what_runs(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    block = next(node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == module._homes and sorted(seen) == sorted(module.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there_and_listed(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is getattr(importlib.import_module(module._homes[name]), name)
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        assert module.nothing


def test_an_operation_is_not_hidden_by_the_file_of_its_name() -> None:
    code = (
        "import facetrt.kernels.kmeans\nfrom facetrt.kernels import kmeans, parallel\n"
        "assert callable(kmeans) and facetrt.kernels.kmeans is kmeans, kmeans\n"
        "assert parallel.__name__ == 'facetrt.kernels.parallel'\n"
        "from facetrt.kernels.kmeans import kmeans as same\nassert same is kmeans"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_nothing_until_a_name_is_used(package: str) -> None:
    code = f"import sys, {package}\nassert 'numpy' not in sys.modules and dir({package})"
    subprocess.run([sys.executable, "-c", code], check=True)
