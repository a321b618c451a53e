#!/usr/bin/env bash
# Runs everything that needs a GPU, and fails if there is none or if any of it was skipped.
#
# Needs: an NVIDIA GPU of compute capability 8.0 or higher with its driver, Python 3.11 or newer and pip, the CUDA
# toolkit (nvcc builds pycuda; compute-sanitizer), a C compiler (Triton, torch.compile), about 15 GB of disk.
# FACETRT_VENV names an environment to set up or to use; FACETRT_PYTHON an interpreter that has everything already.
#
# Steps: tests marked `gpu`; every kernel under compute-sanitizer's memcheck; 1,000 runs that give the same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not there: install the CUDA toolkit" >&2; exit 1; }

python=${FACETRT_PYTHON:-}
if [ -z "$python" ]; then
    venv=${FACETRT_VENV:-.venv-gpu}
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    python=$venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check --upgrade pip
    rm -rf build  # setuptools copies stale files from an earlier build into the wheel
    "$python" -m pip install --quiet --disable-pip-version-check ".[gpu,export,bench,test]"
    "$python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps .
fi

"$python" -c "from facetrt.engine.cli.main import main; main()" doctor
"$python" -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'torch sees no GPU')"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# run NAME ARGUMENTS…: pytest on the tests marked gpu; a skipped test, or none at all, is a failure.
run() {
    local name=$1
    shift
    "$@" --junitxml="$work/$name.xml"
    "$python" tests/none_skipped.py "$work/$name.xml"
}

echo "== tests on the device"
# Only folders and files that have such tests: elsewhere whole files are skipped where an extra for processors is not installed.
run tests "$python" -m pytest -q -m gpu --ignore=tests/gpu/test_repeated.py tests/gpu tests/kernels tests/engine/device tests/export/backbones/test_tasks.py

echo "== every kernel under compute-sanitizer"
# Without torch's cache each array is an allocation of its own, whose end is known. Calls that fail are no errors of
# kernels: a test runs out of memory, and libraries ask the driver for functions that it lacks.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
run sanitizer compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q -m gpu tests/kernels/device

echo "== 1,000 runs, the same bytes"
run repeated "$python" -m pytest -q -m gpu tests/gpu/test_repeated.py

echo "all of it ran on the GPU, nothing was skipped"
