"""The plan of the house: which folder may import which, and that no imports run in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "engine", "export", "benchmarks")

FLOORS: tuple[tuple[str, ...], ...] = (  # lowest first; a file may import from its own floor and from those below
    ("kernels",),
    ("engine.images", "engine.machine", "engine.samples", "engine.settings", "engine.version"),
    ("engine.bundle",),
    ("engine.files", "engine.backends"),
    ("engine.features", "engine.doctor"),
    ("engine.encoding",),
    ("engine.tasks",),
    ("engine.video", "engine.drawing"),
    ("engine.device",),
    ("engine.engine", "engine.learning"),
    ("engine.evaluation", "engine.inspector", "engine.serving"),
    ("engine.scale",),
    ("engine.cli", "engine.examples"),
    ("export",),
    ("benchmarks",),
)
FACES = {"engine", "engine.root"}  # what a package shows: it names what lies on any of its floors


def modules() -> dict[str, Path]:
    """Every file of the product by its dotted name below ``facetrt``."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, names: set[str]) -> Iterator[str]:
    """Modules of the product that a file imports, anywhere in it: also for types alone, and by ``import_module``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            candidates = [name if name.removeprefix("facetrt.") in names else node.module for name in inner]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            candidates = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else:
            continue
        yield from (name.removeprefix("facetrt.") for name in candidates if name.startswith("facetrt."))


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    found = modules()
    return {name: set(imported(path, set(found))) - {name} for name, path in found.items()}


def floor(module: str) -> int:
    for number, folders in enumerate(FLOORS):
        if any(module == folder or module.startswith(f"{folder}.") for folder in folders):
            return number
    raise AssertionError(f"{module} is on no floor: give its folder a place in FLOORS")


def test_no_imports_run_in_a_circle(imports: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"imports run in a circle: {' → '.join(error.args[1])}")


def test_no_import_runs_up(imports: dict[str, set[str]]) -> None:
    up = [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in sorted(others)
        if name not in FACES and other not in FACES and floor(other) > floor(name)
    ]
    assert not up, "\n".join(up)


def test_few_files_lie_flat_in_the_engine() -> None:
    flat = [path.name for path in (ROOT / "engine").iterdir() if path.is_file()]
    assert len(flat) <= 10, flat


def test_the_tests_lie_as_the_code_does() -> None:
    tests = ROOT / "tests"
    folders = {p.parent.relative_to(tests) for package in PACKAGES for p in (tests / package).rglob("test_*.py")}
    assert len(folders) > 10
    assert [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_every_folder_of_code_has_tests_of_its_own() -> None:
    elsewhere = {
        "benchmarks/baselines",  # in one file, test_baselines.py
        "engine/root",  # test_packaging.py
        "engine/samples",  # photographs
        "kernels/device/programs",  # where they are launched, in the folder above
    }
    folders = {str(p.parent.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    without = {folder for folder in folders if not any((ROOT / "tests" / folder).glob("test_*.py"))}
    assert without == elsewhere
