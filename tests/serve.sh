#!/usr/bin/env bash
# Installs facetrt with Triton itself, which reads NumPy 1 only, into an environment of its own, and runs the tests that ask it
# over the wire. Needs Linux on x86-64, pip and Python 3.11 with its shared library; PYTHON names another interpreter.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check --upgrade pip
rm -rf build  # setuptools copies stale files from an earlier build into the wheel
"$python" -m pip install --quiet --disable-pip-version-check ".[cpu,serve]" pytest || {
    echo "Triton could not be installed: nothing is served by it"
    exit 0
}
"$python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps .

if ! "$python" - <<'PYTHON'; then
import ctypes.util, sys, sysconfig
from pathlib import Path

name = sysconfig.get_config_var("LDLIBRARY") or ""
folder = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
sys.exit(not ((folder / name).exists() and ".so" in name or ctypes.util.find_library(f"python3.{sys.version_info.minor}")))
PYTHON
    echo "this Python has no shared library: Triton cannot run its models"
    exit 0
fi

unset PYTHONPATH  # what was installed is tested, not this folder
cp tests/triton/test_server.py tests/none_skipped.py "$work"
cd "$work"
"$python" -m pytest -q --junitxml=report.xml test_server.py "$@"
"$python" none_skipped.py report.xml
