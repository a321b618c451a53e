#!/usr/bin/env bash
# Sets up an environment of its own, runs lint, types and tests, and builds the documentation. Needs Python 3.11 or newer and pip, no GPU.
# Arguments go to pytest, for example: bash tests/run.sh tests/kernels
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${FACETRT_VENV:-.venv-tests}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
rm -rf build  # setuptools copies stale files from an earlier build into the wheel
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check ".[cpu,openvino,export,bench,docs,test,dev]"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps .

"$venv/bin/python" -m pip install --quiet --disable-pip-version-check ".[crf]" ||
    echo "pydensecrf2 could not be built (no C++ compiler?): the tests that compare with it will be skipped"

"$venv/bin/python" -m pip install --quiet --disable-pip-version-check tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs ||
    echo "TensorRT for RTX could not be installed: nothing will be built by NVIDIA's builder"
# without the libraries, which are not on the package index: only names and signatures are looked at
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps tensorrt-cu13-bindings ||
    echo "TensorRT's bindings could not be installed: the stand-in will not be compared with their signatures"

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true "$venv/bin/mkdocs" build --strict --quiet -f docs/mkdocs.yml
"$venv/bin/python" -m pytest -q "$@"
