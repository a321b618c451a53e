"""Registers, shared memory and occupancy of the kernels, read from machine code that is compiled without a GPU."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from facetrt.benchmarks.gpu import resources
from facetrt.benchmarks.gpu.resources import SECTION, main, measure, read_usage, resident_blocks, sources_digest
from facetrt.engine.bundle.bundle import Bundle
from facetrt.export.additions import add_kernels
from facetrt.kernels.device import catalogue, convert, kmeans
from facetrt.kernels.device.runtime.cubins import ARCHITECTURES
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import BackendError

DOCUMENT = Path(__file__).parents[3] / "docs" / "kernels.md"
# Four times the tile that fits the registers.
SPILLING = replace(kmeans.LLOYD, constants={**kmeans.LLOYD.constants, "ROWS": 64, "COLUMNS": 128})

Use = Callable[..., None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes some programs, for one architecture, all that there are."""

    def only(*programs: Program) -> None:
        monkeypatch.setattr(catalogue, "programs", lambda: {program.name: program for program in programs})
        monkeypatch.setattr(resources, "ARCHITECTURES", ("sm_90",))

    return only


def cells(text: str) -> dict[str, list[str]]:
    """The table's rows by kernel."""
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: row.split(" | ") for name, row in found}


def test_the_document_is_of_these_kernels_and_none_of_them_spills() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert sources_digest() in text, "kernels have changed: python -m facetrt.benchmarks.gpu.resources docs/kernels.md"
    assert f"| kernel | {' | '.join(ARCHITECTURES)} |" in text
    table = cells(text)
    assert sorted(table) == sorted(catalogue.programs())
    for name, row in table.items():
        assert len(row) == len(ARCHITECTURES), name
        for cell in row:
            assert re.fullmatch(r"\d+ / \d+ / [1-9]\d*", cell), f"{name}: {cell}"


def test_the_digest_is_of_everything_that_is_compiled(use: Use) -> None:
    digests = {sources_digest()}
    for programs in ((convert.TO_HALF,), (convert.PLACE,), (convert.TO_HALF, convert.PLACE)):
        use(*programs)
        digests.add(sources_digest())
    use(replace(convert.TO_HALF, warps=8))
    assert len(digests | {sources_digest()}) == 5


def test_a_kernel_that_spills_is_named_and_fails(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use(convert.TO_HALF, SPILLING)
    assert main(tmp_path / "kernels.md") == 1
    assert re.search(r"spill registers:\nkmeans_lloyd on sm_90: \d+ bytes\n$", capsys.readouterr().err)
    text = (tmp_path / "kernels.md").read_text()
    assert "found no register: 1 do." in text
    (lloyd,), (half,) = (cells(text)[name] for name in ("kmeans_lloyd", "convert_to_half"))
    assert re.fullmatch(r"255 \+ \d+ / \d+ / 1", lloyd) and re.fullmatch(r"\d+ / 0 / 16", half)


def test_no_kernel_that_spills(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use(convert.TO_HALF)
    assert main(tmp_path / "kernels.md") == 0
    assert capsys.readouterr().err.endswith("kernels.md\n")
    assert "found no register: none does." in (tmp_path / "kernels.md").read_text()


def test_rows_of_a_bundle(use: Use, tiny_bundle: Path, tmp_path: Path) -> None:
    use(convert.TO_HALF, convert.PLACE)
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    add_kernels(folder, ["sm_80", "sm_90"])
    rows = measure(Bundle.open(folder), "sm_86")  # runs the code for sm_80
    assert [(row.section, row.name) for row in rows] == [(SECTION, "convert_place"), (SECTION, "convert_to_half")]
    for row in rows:
        assert row.value is not None and 1 <= row.value.median <= 255 and row.unit == "registers"
        assert row.details["spilled bytes"] == 0 and row.details["warps"] == 4 and row.details["blocks per SM"] >= 8
    use(replace(convert.TO_HALF, warps=8))
    assert "another version of facetrt" in str(measure(Bundle.open(folder), "sm_90")[0].reason)


def test_a_bundle_without_kernels_says_so(tiny_bundle: Path) -> None:
    (row,) = measure(Bundle.open(tiny_bundle), "sm_90")
    assert row.value is None and "--kernels sm_90" in str(row.reason)


@pytest.mark.parametrize(  # by cudaOccMaxActiveBlocksPerMultiprocessor of NVIDIA's cuda_occupancy.h
    ("architecture", "registers", "shared", "warps", "blocks"),
    [
        ("sm_80", 16, 0, 1, 32),
        ("sm_80", 16, 4999, 1, 27),
        ("sm_86", 16, 0, 1, 16),
        ("sm_87", 30, 0, 2, 16),
        ("sm_89", 16, 0, 1, 24),
        ("sm_120", 40, 0, 4, 12),
        ("sm_90", 168, 0, 4, 3),
        ("sm_90", 171, 0, 8, 1),
        ("sm_100", 255, 0, 16, 0),
        ("sm_90", 32, 98304, 8, 2),
        ("sm_120", 32, 98304, 8, 1),
    ],
)
def test_resident_blocks(architecture: str, registers: int, shared: int, warps: int, blocks: int) -> None:
    assert resident_blocks(architecture, registers, shared, warps) == blocks


def test_occupancy_of_another_architecture_is_unknown() -> None:
    with pytest.raises(BackendError, match="kernels for sm_75: expected one of sm_80, "):
        resident_blocks("sm_75", 32, 0, 4)


def test_what_is_no_cubin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.cubin"
    path.write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(BackendError, match=r"cuobjdump finds no kernel to_half in damaged\.cubin"):
        read_usage(path, "to_half")
