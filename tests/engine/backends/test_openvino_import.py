"""Importing OpenVINO through facetrt sends nothing, writes nothing and starts nothing; in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import require_openvino

require_openvino()

REPEATS = 5  # with telemetry five in six hung, on two processors

WATCH = """
import sys, threading
from facetrt.engine.backends.openvino import import_openvino
import numpy

seen = []
WATCHED = ("socket.", "os.fork", "os.posix_spawn", "os.exec", "subprocess.", "os.mkdir")
sys.addaudithook(lambda event, arguments: seen.append((event, arguments)) if event.startswith(WATCHED) else None)
threads = set(threading.enumerate())
openvino = import_openvino()
assert set(threading.enumerate()) == threads, threading.enumerate()
assert not any(name.partition(".")[0] == "openvino_telemetry" for name in sys.modules)
"""

PRODUCTS = """
matrix = numpy.ones((256, 256), numpy.float32)
workers = [threading.Thread(target=lambda: [matrix @ matrix for _ in range(25)]) for _ in range(2)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
openvino.Core().available_devices
assert not seen, seen
"""


def run(code: str, home: Path) -> None:
    """Run a program with an empty home folder, which stays empty."""
    environment = os.environ | {"HOME": str(home), "USERPROFILE": str(home)}
    environment.pop("CI", None)  # with which telemetry would be off anyway
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list(home.iterdir())


def test_the_import_is_silent_and_products_end(tmp_path: Path) -> None:
    for _ in range(REPEATS):
        run(WATCH + PRODUCTS, tmp_path)


def test_the_doctor_is_silent_as_well(tmp_path: Path) -> None:
    run(
        "from facetrt.engine.doctor.diagnosis import ask; assert 'FP32' in ask('openvino')['capabilities']",
        tmp_path,
    )


def test_what_the_caller_has_imported_stays(tmp_path: Path) -> None:
    loaded = """
import sys, types
mine, inner = types.ModuleType("openvino_telemetry"), types.ModuleType("openvino_telemetry.backend")
sys.modules["openvino_telemetry"], sys.modules["openvino_telemetry.backend"] = mine, inner
from facetrt.engine.backends.openvino import import_openvino
openvino = import_openvino()
assert sys.modules["openvino_telemetry"] is mine and sys.modules["openvino_telemetry.backend"] is inner
assert import_openvino() is openvino is sys.modules["openvino"]
"""
    run(loaded, tmp_path)
    taken = "import sys, types\nsys.modules['openvino'] = mine = types.ModuleType('openvino')\n"
    taken += "from facetrt.engine.backends.openvino import import_openvino\nassert import_openvino() is mine\n"
    run(taken, tmp_path)


def test_telemetry_can_be_imported_afterwards(tmp_path: Path) -> None:
    pytest.importorskip("openvino_telemetry")
    run(WATCH + "import openvino_telemetry\nassert openvino_telemetry.Telemetry", tmp_path)


STACK_FOR_SIGNALS = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

def stack():
    found = Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.pointer
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the thread's stack for signals as Linux has it")
def test_ctrl_c_finds_its_stack_after_engines_that_ended_out_of_order(tmp_path: Path) -> None:
    """Each core of OpenVINO gives the thread a stack for signals, and gives back what it found: a freed one."""
    run(
        f"{STACK_FOR_SIGNALS}\n"
        "import os, signal, numpy\n"
        "from facetrt.engine import Engine\n"
        "stacks, engines = set(), []\n"
        "for _ in range(3):\n"
        "    engines.append(Engine.open('builtin', backend='openvino', threads=1))\n"
        "    engines[-1].encode([numpy.zeros((32, 32, 3), numpy.uint8)], load_size=None)\n"
        "    stacks.add(stack())\n"
        "while engines:\n    engines.pop(0).close()\n    stacks.add(stack())\n"
        "assert len(stacks) == 1, stacks\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    raise SystemExit(3)\n"
        "except KeyboardInterrupt:\n    pass",
        tmp_path,
    )
