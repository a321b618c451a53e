"""Memory and processors as containers and ``ulimit`` leave them: made-up files, and real limits in a child."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.cli import main as entry
from facetrt.kernels import machine
from facetrt.kernels.errors import InputError, UnsupportedSystemError
from facetrt.kernels.machine import Memory, check_system, processors, usable_memory

V2 = "30 23 0:26 {tree} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "31 23 0:27 {tree} {at} rw,nosuid - cgroup cgroup rw,{controllers}\n"
OTHER = "22 1 0:21 / /proc rw,relatime - proc proc rw\n"


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 processors and 256 GB."""
    monkeypatch.setattr(machine, "processors_to_run_on", lambda: 64)
    values = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 62_500_000}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)


def make(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A root folder with what the kernel shows of control groups."""
    contents = {"proc/self/cgroup": groups, "proc/self/mountinfo": OTHER + mounts, **files}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.usefixtures("many")
def test_a_container_of_version_2(tmp_path: Path) -> None:
    """With a namespace of its own, as container engines make it today."""
    root = make(
        tmp_path,
        "0::/\n",
        V2.format(tree="/", at="/sys/fs/cgroup"),
        {"sys/fs/cgroup/memory.max": "2000000000\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
    )
    assert usable_memory(root) == Memory(2_000_000_000, "this container has")
    assert str(usable_memory(root)) == "this container has 2.0 GB"
    assert processors(root) == 2  # one and a half


@pytest.mark.usefixtures("many")
def test_a_service_is_bounded_by_every_group_that_holds_it(tmp_path: Path) -> None:
    above = "sys/fs/cgroup/system.slice"
    root = make(
        tmp_path,
        "0::/system.slice/app.service\n",
        V2.format(tree="/", at="/sys/fs/cgroup"),
        {
            f"{above}/app.service/memory.max": "max\n", f"{above}/app.service/cpu.max": "max 100000\n",
            f"{above}/memory.max": "500000000\n", f"{above}/cpu.max": "300000 100000\n",
        },
    )  # fmt: skip
    assert str(usable_memory(root)) == "this container has 500 MB" and processors(root) == 3


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("tree", ["/", "/docker/abc"])
def test_a_container_of_version_1(tmp_path: Path, tree: str) -> None:
    """Without a namespace the mount shows the container's part of the host's tree, under the host's path."""
    folders = {"memory": "sys/fs/cgroup/memory", "cpu": "sys/fs/cgroup/cpu,cpuacct"}
    root = make(
        tmp_path,
        "12:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
        V1.format(tree=tree, at="/sys/fs/cgroup/memory", controllers="memory")
        + V1.format(tree=tree, at="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct"),
        {
            f"{folders['memory']}/memory.limit_in_bytes": "1500000000\n",
            f"{folders['cpu']}/cpu.cfs_quota_us": "50000\n", f"{folders['cpu']}/cpu.cfs_period_us": "100000\n",
        },
    )  # fmt: skip
    assert usable_memory(root).nbytes == 1_500_000_000 and processors(root) == 1


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("groups", "mounts", "files"),
    [
        ("", "", {}),
        ("0::/\n", V2.format(tree="/", at="/sys/fs/cgroup"), {}),
        ("0::/../other\n", V2.format(tree="/", at="/c"), {"c/memory.max": "max\n", "c/cpu.max": "max 100000\n"}),
        (
            "4:memory:/a\n5:cpu:/a\n",
            V1.format(tree="/", at="/m", controllers="memory") + V1.format(tree="/", at="/c", controllers="cpu"),
            {
                "m/a/memory.limit_in_bytes": "9223372036854771712\n",
                "c/a/cpu.cfs_quota_us": "-1\n", "c/a/cpu.cfs_period_us": "100000\n",
            },
        ),
        ("nonsense\n:\n", "nonsense - cgroup2\n - \n", {}),
    ],
)  # fmt: skip
def test_without_limits_the_machine_counts(tmp_path: Path, groups: str, mounts: str, files: dict[str, str]) -> None:
    root = make(tmp_path, groups, mounts, files)
    assert str(usable_memory(root)) == "this machine has 256.0 GB" and processors(root) == 64


@pytest.mark.usefixtures("many")
def test_mounts_with_spaces(tmp_path: Path) -> None:
    root = make(tmp_path, "0::/\n", V2.format(tree="/", at="/a\\040b"), {"a b/memory.max": "1000000\n"})
    assert usable_memory(root).nbytes == 1_000_000


def test_backends_get_as_many_threads_as_the_container_has(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"backend": "auto", "device": "auto", "precision": "auto", "hint": "latency", "cache": None}
    monkeypatch.setattr("facetrt.engine.backends.run_options.processors", lambda: 2)
    for threads, there, chosen in ((None, 64, 2), (None, 2, None), (1, 64, 1)):
        monkeypatch.setattr("facetrt.engine.backends.run_options.processors_to_run_on", lambda there=there: there)
        assert RunOptions.parse(threads=threads, **options).threads == chosen  # type: ignore[arg-type]
    with pytest.raises(InputError, match="threads=3: expected 1 to 2, the processors here"):
        RunOptions.parse(threads=3, **options)  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of processes are tested on Linux")
@pytest.mark.parametrize(("limit", "option"), [("RLIMIT_AS", "-v"), ("RLIMIT_DATA", "-d")])
def test_ulimit_counts_what_is_left(limit: str, option: str) -> None:
    code = f"""
import resource, numpy
from facetrt.engine.machine import memory
from facetrt.kernels.machine import usable_memory
column = {{"RLIMIT_AS": 0, "RLIMIT_DATA": 5}}[{limit!r}]
mapped = int(open("/proc/self/statm").read().split()[column]) * resource.getpagesize()
kind = getattr(resource, {limit!r})
resource.setrlimit(kind, (mapped + 400_000_000, resource.getrlimit(kind)[1]))
print(usable_memory())
assert memory.fits(200_000_000) and not memory.fits(350_000_000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bound, megabytes, unit = done.stdout.strip().rsplit(" ", 2)
    assert bound == f"ulimit {option} leaves" and unit == "MB" and 300 < int(megabytes) <= 400


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to processors")
def test_processors_that_a_process_is_bound_to() -> None:
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{one}])\n"
    code += "from facetrt.kernels.machine import processors; print(processors())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_another_system_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_system()
    with pytest.raises(UnsupportedSystemError, match="facetrt runs on Linux and macOS, and this system is"):
        check_system("nt")
    monkeypatch.setattr(entry, "os", type("Windows", (), {"name": "nt"}))
    monkeypatch.setattr(machine.check_system, "__defaults__", ("nt",))
    with pytest.raises(SystemExit) as left:
        entry.main()
    assert left.value.code == 2 and capsys.readouterr().err.startswith("error: facetrt runs on Linux and macOS")
