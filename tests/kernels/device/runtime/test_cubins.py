from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from facetrt.kernels.device import convert
from facetrt.kernels.device.runtime import cubins
from facetrt.kernels.device.runtime.cubins import (
    ARCHITECTURES,
    KernelSet,
    architecture_to_compile,
    choose_architecture,
    program_digest,
    source_digest,
)
from facetrt.kernels.errors import BackendError, BundleError

PROGRAM = convert.TO_HALF
CODE = b"\x7fELF and more"


def index(**changes: Any) -> dict[str, Any]:
    entry = {
        "symbol": "to_half",
        "shared": 0,
        "warps": 4,
        "arguments": [list(argument) for argument in PROGRAM.arguments],
        "hidden": 2,
        "size": len(CODE),
        "program": program_digest(PROGRAM),
        "source": source_digest(PROGRAM.source),
        "specific": True,
        "constants": dict(PROGRAM.constants),
    }
    whole = {"schema": 1, "architecture": "sm_90", "toolkit": "12.9", "triton": "3.9.0"}
    return {**whole, "programs": {PROGRAM.name: {**entry, **changes}}}


def read(content: Any, code: bytes = CODE) -> KernelSet:
    return KernelSet.read(json.dumps(content).encode(), lambda name: {f"{PROGRAM.name}.cubin": code}[name])


def test_reads_an_index() -> None:
    kernels = read(index())
    assert (kernels.architecture, kernels.toolkit) == ("sm_90", "12.9")
    assert kernels.find(PROGRAM).arguments == PROGRAM.arguments
    assert kernels.cubin(PROGRAM) == CODE


def test_reads_no_cubin_before_it_is_needed() -> None:
    KernelSet.read(json.dumps(index()).encode(), lambda name: pytest.fail(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"symbol": "a b"}, "symbol is 'a b'"),
        ({"shared": 1 << 20}, "shared is 1048576: expected an integer from 0 to 232448"),
        ({"warps": 0}, "warps is 0"),
        ({"warps": True}, "warps is True"),
        ({"hidden": -1}, "hidden is -1"),
        ({"size": 1 << 30}, "size is"),
        ({"program": "0"}, "program is '0'"),
        ({"arguments": [["a", "*bf16"]]}, "expected pairs of name and type"),
        ({"arguments": [["a"]]}, "expected pairs of name and type"),
        ({"specific": 1}, "specific and constants"),
        ({"more": 1}, "convert_to_half: keys .*'more'"),
    ],
)
def test_entries_that_are_wrong_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        read(index(**changes))


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "A", "", "x" * 65, "a.cubin"])
def test_names_that_could_be_paths_are_refused(name: str) -> None:
    content = index()
    content["programs"][name] = content["programs"][PROGRAM.name]
    with pytest.raises(BundleError, match="program is "):
        read(content)


def test_an_index_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in [
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[]", "keys list: expected"),
        (json.dumps({**index(), "schema": 2}).encode(), "schema 2: this version reads 1"),
        (json.dumps({**index(), "architecture": "sm_x"}).encode(), "architecture is 'sm_x'"),
        (json.dumps({**index(), "toolkit": 12}).encode(), "toolkit is 12"),
        (json.dumps({**index(), "programs": []}).encode(), "programs: expected an object"),
    ]:
        with pytest.raises(BundleError, match=message):
            KernelSet.read(content, lambda name: b"")
    monkeypatch.setattr(cubins, "_INDEX_LIMIT", 100)
    with pytest.raises(BundleError, match="bytes: expected at most 100"):
        read(index())


def test_cubins_are_checked_when_they_are_read() -> None:
    with pytest.raises(BundleError, match=f"convert_to_half.cubin is damaged: 3 bytes: expected an ELF of {len(CODE)}"):
        read(index(), b"abc").cubin(PROGRAM)
    with pytest.raises(BundleError, match="damaged"):
        read(index(), b"MZ".ljust(len(CODE))).cubin(PROGRAM)


def test_a_missing_kernel_names_the_command() -> None:
    with pytest.raises(BackendError, match="lack convert_take: run facetrt export BUNDLE --kernels sm_90"):
        read(index()).find(convert.TAKE)


@pytest.mark.parametrize(
    "changed",
    [
        replace(PROGRAM, warps=8),
        replace(PROGRAM, stages=3),
        replace(PROGRAM, constants={**PROGRAM.constants, "BLOCK": 512}),
        replace(PROGRAM, arguments=PROGRAM.arguments[::-1]),
        replace(PROGRAM, divisible=("size",)),
        replace(PROGRAM, source="convert:take"),
    ],
)
def test_kernels_of_another_version_are_refused(changed: Any) -> None:
    with pytest.raises(BackendError, match="compiled by another version of facetrt: run facetrt export"):
        read(index()).find(changed)


def test_kernels_of_another_source_text_are_refused() -> None:
    with pytest.raises(BackendError, match="compiled by another version of facetrt"):
        read(index(source="0" * 64)).find(PROGRAM)


def test_source_digests_cover_imported_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "a": b"from facetrt.kernels.device.programs.b import f\n",
        "b": b"from facetrt.kernels.device.programs import c\nimport triton\n",
        "c": b"from facetrt.kernels.device.programs.a import g\nX = 1\n",
        "d": b"",
    }
    monkeypatch.setattr(cubins, "_text", texts.__getitem__)
    source_digest.cache_clear()
    before = {name: source_digest(f"{name}:f") for name in texts}
    texts["c"] += b"Y = 2\n"
    source_digest.cache_clear()
    after = {name: source_digest(f"{name}:f") for name in texts}
    source_digest.cache_clear()
    assert {name for name in texts if before[name] != after[name]} == {"a", "b", "c"}


def test_digests_are_the_same_in_every_process() -> None:
    code = (
        "from facetrt.kernels.device import convert; from facetrt.kernels.device.runtime import cubins; import sys;"
        "print(cubins.program_digest(convert.TO_HALF), cubins.source_digest('convert:to_half'));"
        "sys.exit('triton' in sys.modules or 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [program_digest(PROGRAM), source_digest(PROGRAM.source)]


@pytest.mark.parametrize(
    ("available", "capability", "expected"),
    [
        (["sm_80", "sm_90"], (9, 0), "sm_90"),
        (["sm_80"], (8, 6), "sm_80"),
        (["sm_80", "sm_86"], (8, 9), "sm_86"),
        (["sm_80", "sm_87"], (8, 9), "sm_80"),
        (["sm_87"], (8, 7), "sm_87"),
        (["sm_100", "sm_120"], (12, 0), "sm_120"),
    ],
)
def test_chooses_what_runs(available: list[str], capability: tuple[int, int], expected: str) -> None:
    assert choose_architecture(available, capability) == expected


@pytest.mark.parametrize(
    ("available", "capability"),
    [
        ([], (9, 0)),
        (["sm_80"], (9, 0)),
        (["sm_89"], (8, 6)),
        (["sm_80", "sm_86"], (8, 7)),
    ],
)
def test_says_when_nothing_runs(available: list[str], capability: tuple[int, int]) -> None:
    there = ", ".join(available) or "none"
    wanted = f"sm_{capability[0]}{capability[1]}"
    with pytest.raises(
        BackendError,
        match=f"kernels missing .*{wanted}; the bundle has {there}: run .* --kernels {wanted}, or use kernels host$",
    ):
        choose_architecture(available, capability)


@pytest.mark.parametrize("capability", [(7, 5), (10, 3), (11, 0), (12, 1)])
def test_no_command_is_named_that_would_be_refused(capability: tuple[int, int]) -> None:
    wanted = f"sm_{capability[0]}{capability[1]}"
    assert architecture_to_compile(capability) is None
    with pytest.raises(BackendError, match=f"this version of facetrt has no kernels for {wanted}: use kernels host$"):
        choose_architecture(ARCHITECTURES, capability)


def test_what_is_recommended_runs() -> None:
    for architecture in ARCHITECTURES:
        assert architecture_to_compile((int(architecture[3:-1]), int(architecture[-1]))) == architecture
    with pytest.raises(BackendError, match=r"missing for this architecture, sm_88.* --kernels sm_86, or"):
        choose_architecture([], (8, 8))


def test_folders_that_are_no_architecture_are_refused() -> None:
    with pytest.raises(BundleError, match="architecture 'sm_9x': expected a name like sm_90"):
        choose_architecture(["sm_9x"], (9, 0))
