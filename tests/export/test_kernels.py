"""Kernels are compiled without a GPU, by triton's own compiler, in processes that do not interpret them."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from facetrt.benchmarks.gpu.resources import read_usage
from facetrt.export import kernels
from facetrt.export.kernels import compile_kernels, describe, parse_architectures
from facetrt.kernels.device import catalogue, convert
from facetrt.kernels.device.runtime.cubins import ARCHITECTURES, SHARED_LIMITS, KernelSet, choose_architecture
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import BackendError, InputError, MissingDependencyError

PROGRAM = convert.TO_HALF
MACHINE = 190  # EM_CUDA in an ELF header
COMPLETE = ("sm_80", "sm_90")  # each has spilled registers where no other did; docs/kernels.md is of all


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]], dict[Any, Any]]:
    """Every program for two architectures, and for one of the others: those take turns."""
    folder = tmp_path_factory.mktemp("kernels")
    programs = catalogue.programs()
    others = [architecture for architecture in ARCHITECTURES if architecture not in COMPLETE]
    jobs = [(architecture, name) for architecture in COMPLETE for name in sorted(programs)]
    jobs += [(others[i % len(others)], name) for i, name in enumerate(sorted(programs))]
    for architecture in ARCHITECTURES:
        (folder / architecture).mkdir()
    return folder, jobs, kernels._compile_all(folder, jobs, programs)


def test_every_program_compiles_and_every_architecture(compiled: Any) -> None:
    folder, jobs, answers = compiled
    assert {architecture for architecture, _ in jobs} == set(ARCHITECTURES)
    assert set(answers) == set(jobs)
    for (architecture, name), answer in answers.items():
        code = (folder / architecture / f"{name}.cubin").read_bytes()
        assert code.startswith(b"\x7fELF"), name
        assert int.from_bytes(code[18:20], "little") == MACHINE
        assert len(code) == answer["kernel"]["size"]
        assert answer["kernel"]["symbol"].encode() in code
        assert os.fsencode(Path(kernels.__file__).parents[1]) not in code, "a path of this machine"


def test_every_program_fits_every_architecture(compiled: Any) -> None:
    """Shared memory hardly depends on the architecture; what is near a limit must be compiled for that one too."""
    _, _, answers = compiled
    for (_, name), answer in answers.items():
        assert answer["kernel"]["shared"] <= min(SHARED_LIMITS.values()), name


def test_no_kernel_spills_registers(compiled: Any) -> None:
    folder, _, answers = compiled
    spilled = {
        job: read_usage(folder / job[0] / f"{job[1]}.cubin", answer["kernel"]["symbol"])[1]
        for job, answer in answers.items()
    }
    assert {job: count for job, count in spilled.items() if count} == {}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    programs = {program.name: program for program in (convert.TO_HALF, convert.PLACE)}
    compile_kernels(folder, ARCHITECTURES, programs)
    return folder


def read(bundle: Path, architecture: str) -> KernelSet:
    folder = bundle / "kernels" / architecture
    return KernelSet.read((folder / "kernels.json").read_bytes(), lambda name: (folder / name).read_bytes())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_runtime_reads_what_was_compiled(bundle: Path, architecture: str) -> None:
    found = read(bundle, architecture)
    assert found.architecture == architecture
    assert sorted(found.kernels) == ["convert_place", "convert_to_half"]
    for program in (convert.TO_HALF, convert.PLACE):
        kernel = found.find(program)
        assert (kernel.arguments, kernel.warps, kernel.hidden) == (program.arguments, program.warps, 2)
        assert kernel.symbol == program.source.partition(":")[2]
        assert kernel.specific == (architecture in ("sm_90", "sm_100", "sm_120"))
        assert dict(kernel.constants) == dict(program.constants)
        assert found.cubin(program).startswith(b"\x7fELF")


def test_a_bundle_holds_only_what_it_should(bundle: Path) -> None:
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    names = ("convert_place.cubin", "convert_to_half.cubin", "kernels.json")
    assert files == {f"kernels/{architecture}/{name}" for architecture in ARCHITECTURES for name in names}
    found = json.loads((bundle / "kernels" / "sm_80" / "kernels.json").read_text())
    assert found["triton"] == import_module("importlib.metadata").version("triton")
    assert found["toolkit"].partition(".")[0].isdigit()
    available = [path.name for path in (bundle / "kernels").iterdir()]
    assert choose_architecture(available, (8, 9)) == "sm_89"


def test_names_of_architectures() -> None:
    assert parse_architectures("all") == ARCHITECTURES
    assert parse_architectures("none") == ()
    assert parse_architectures("sm_90, sm_80,sm_90") == ("sm_90", "sm_80")
    assert parse_architectures("sm90,SM_80,sm_90") == ("sm_90", "sm_80")
    for text in ("sm_75", "sm_90,", "90", ""):
        with pytest.raises(
            InputError, match="expected all, none, or some of sm_80,sm_86,sm_87,sm_89,sm_90,sm_100,sm_120"
        ):
            parse_architectures(text)
    with pytest.raises(InputError, match="'sm_75'"):
        compile_kernels(Path("nowhere"), ["sm_75"])


def test_nothing_is_compiled_for_no_architecture(tmp_path: Path) -> None:
    compile_kernels(tmp_path, ())
    assert list(tmp_path.rglob("*.cubin")) == []


def test_reports_what_it_does(tmp_path: Path) -> None:
    stages: list[str] = []
    compile_kernels(tmp_path, ["sm_80"], {}, stages.append)
    assert stages == ["compiling 0 kernels for sm_80"]


def test_a_program_that_does_not_compile_is_named(tmp_path: Path) -> None:
    wrong = Program("wrong", PROGRAM.source, PROGRAM.arguments, {"LIMIT": 1.0, "BLOCK": 1000})  # no power of two
    with pytest.raises(BackendError, match="wrong does not compile for sm_90: "):
        compile_kernels(tmp_path, ["sm_90"], {"wrong": wrong})


def test_a_program_whose_kernel_is_not_there_is_named(tmp_path: Path) -> None:
    absent = Program("absent", "convert:no_such_kernel", PROGRAM.arguments, PROGRAM.constants)
    with pytest.raises(BackendError, match=r"absent does not compile for sm_90: .*no_such_kernel"):
        compile_kernels(tmp_path, ["sm_90"], {"absent": absent})


def test_a_child_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"compiling kernels ended with status 1: (.|\n)*FileNotFoundError"):
        kernels._compile_all(tmp_path / "absent", [("sm_90", PROGRAM.name)], {PROGRAM.name: PROGRAM})


def test_triton_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise kernels.PackageNotFoundError(name)

    monkeypatch.setattr(kernels, "version", version)
    with pytest.raises(MissingDependencyError, match=r"facetrt\[export\]"):
        compile_kernels(tmp_path, ["sm_90"])


PTX = """
.version 8.7
.target sm_90a
.visible .entry to_half(
    .param .u64 .ptr .global .align 1 to_half_param_0,
    .param .u64 .ptr .global .align 1 to_half_param_1,
    .param .u64 to_half_param_2,
    .param .u64 .ptr .global .align 1 to_half_param_3,
    .param .u64 .ptr .global .align 1 to_half_param_4
)
.reqntid 128
"""


def metadata(**changes: Any) -> Any:
    return SimpleNamespace(**{"name": "to_half", "shared": 0, "num_warps": 4, "num_ctas": 1, **changes})


def test_metadata_of_a_plain_kernel() -> None:
    kernel = describe(PROGRAM, "sm_90", metadata(shared=512), PTX, 1000)
    assert (kernel.symbol, kernel.shared, kernel.size, kernel.specific) == ("to_half", 512, 1000, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_scratch_size": 128}, "cannot launch global_scratch_size = 128"),
        ({"profile_scratch_size": 1}, "cannot launch profile_scratch_size = 1"),
        ({"launch_pdl": True}, "launch_pdl = True"),
        ({"launch_cooperative_grid": True}, "launch_cooperative_grid = True"),
        ({"num_ctas": 2}, "num_ctas = 2"),
        ({"shared": 232449}, "needs 232449 bytes of shared memory: expected at most 232448"),
    ],
)
def test_kernels_that_the_runtime_cannot_launch_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        describe(PROGRAM, "sm_90", metadata(**changes), PTX, 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (".param .u64 to_half_param_2", ".param .u32 to_half_param_2", "expected .*the last 2 of them hidden"),
        ("    .param .u64 .ptr .global .align 1 to_half_param_3,\n", "", "expected"),
        (".entry to_half(", ".entry other(", r"compiled to parameters \[\]"),
        ("sm_90a", "sm_90", "unexpected target"),
    ],
)
def test_kernels_with_other_parameters_are_refused(old: str, new: str, message: str) -> None:
    assert old in PTX
    with pytest.raises(BackendError, match=message):
        describe(PROGRAM, "sm_90", metadata(), PTX.replace(old, new), 1)


@pytest.mark.parametrize(("architecture", "shared"), [("sm_86", 101377), ("sm_80", 166913), ("sm_120", 101377)])
def test_limits_of_shared_memory(architecture: str, shared: int) -> None:
    ptx = PTX.replace("sm_90a", f"{architecture}a" if architecture == "sm_120" else architecture)
    describe(PROGRAM, architecture, metadata(shared=shared - 1), ptx, 1)
    with pytest.raises(BackendError, match=f"{architecture} needs {shared} bytes"):
        describe(PROGRAM, architecture, metadata(shared=shared), ptx, 1)
