from __future__ import annotations

import ast
import importlib.resources
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import facetrt.engine
import facetrt.kernels

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_on_disk_is_in_the_wheel() -> None:
    folders = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}
    on_disk = {
        folders.get(folder, "facetrt." + folder.replace("/", "."))
        for top in ("benchmarks", "engine", "export", "kernels")
        for init in (ROOT / top).rglob("__init__.py")
        for folder in [init.parent.relative_to(ROOT).as_posix()]
    }
    assert set(SETUPTOOLS["packages"]) == on_disk


def test_the_root_package_is_light_and_shows_the_engine(tmp_path: Path) -> None:
    """As a wheel lays it out, which an installation that is a namespace package of folders does not."""
    for package, folder in sorted(SETUPTOOLS["package-dir"].items()):
        place = tmp_path.joinpath(*package.split("."))
        if package == "facetrt":
            place.mkdir()
            (place / "__init__.py").symlink_to(ROOT / folder / "__init__.py")
        else:
            place.symlink_to(ROOT / folder)
    code = (
        "import sys, facetrt\n"
        "assert facetrt.__all__ == ['Engine', '__version__'] and set(facetrt.__all__) <= set(dir(facetrt))\n"
        "assert not {'numpy', 'facetrt.engine', 'importlib.metadata'} & set(sys.modules), sys.modules.keys()\n"
        "from facetrt import Engine, __version__\n"
        "import facetrt.engine\n"
        "assert Engine is facetrt.engine.Engine and __version__ == facetrt.engine.__version__\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)


@pytest.mark.parametrize("package", ["benchmarks", "engine", "export", "kernels"])
def test_types_are_published(package: str) -> None:
    assert (importlib.resources.files(f"facetrt.{package}") / "py.typed").is_file()


def test_no_bare_top_level_packages() -> None:
    for name in ("benchmarks", "engine", "export", "kernels"):
        assert not (Path(facetrt.engine.__file__).parents[2] / name / "py.typed").exists() or (
            Path(facetrt.engine.__file__).is_relative_to(ROOT)
        )


def test_the_builtin_bundle_is_small_and_ships() -> None:
    folder = importlib.resources.files("facetrt.engine") / "builtin"
    files = {path.name: len(path.read_bytes()) for path in folder.iterdir()}
    assert set(files) == {"manifest.json", "encoder.onnx", "padding.npy", "positional.npy"}
    assert sum(files.values()) <= 4 << 20


def test_public_names() -> None:
    assert {"Engine", "Features", "FacetrtError", "Matches", "Mask", "Masks", "Parts"} <= set(facetrt.engine.__all__)
    assert {"best_buddies", "kmeans", "log_bin", "vote", "dense_crf", "assign"} <= set(facetrt.kernels.__all__)
    for module in (facetrt.engine, facetrt.kernels):
        assert all(hasattr(module, name) for name in module.__all__)


def test_the_readmes_examples_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "(55, 55)" in capsys.readouterr().out


def test_product_code_has_no_assert_and_no_pickle() -> None:
    for top in ("benchmarks", "engine", "export", "kernels"):
        for path in (ROOT / top).rglob("*.py"):
            text = path.read_text()
            assert not re.search(r"^\s*assert\b", text, re.MULTILINE), path
            assert not re.search(r"^\s*(import|from) pickle\b", text, re.MULTILINE), path  # pickletools runs nothing
            assert "weights_only=False" not in text, path


def test_docstrings_do_not_begin_in_the_middle_of_a_sentence() -> None:
    """Pages are made of them, where no name stands before to begin it. Programs' texts are part of kernels' digests."""
    begun = re.compile(r"(Of|For|As|From|With|In|By|On|To)\b")
    for top in ("benchmarks", "engine", "export", "kernels"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and path.parent.name != "programs":
                    text = ast.get_docstring(node) or ""
                    assert not begun.match(text), f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
