#!/usr/bin/env bash
# Installs the oldest versions that pyproject.toml allows into an environment of its own and runs the commands with them.
# Needs pip and Python 3.11, the oldest that is allowed: wheels of that age exist for it. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/uv"
"$work/uv/bin/pip" install --quiet --disable-pip-version-check uv
export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-https://pypi.org/simple}}
"$work/uv/bin/uv" venv --quiet --python "${PYTHON:-3.11}" "$work/lowest"
rm -rf build  # setuptools copies stale files from an earlier build into the wheel
"$work/uv/bin/uv" pip install --quiet --python "$work/lowest/bin/python" --resolution lowest-direct ".[cpu,openvino]"
"$work/uv/bin/uv" pip list --python "$work/lowest/bin/python"

unset PYTHONPATH  # what was installed is tested, not this folder
facetrt=$work/lowest/bin/facetrt
cp engine/samples/{cat,ibex}.jpg tests/clips.py "$work"
cd "$work"
lowest/bin/python -c 'from clips import *; write_clip(Path("clip.mp4"), moving_pictures(6))'
common="--bundle builtin --load-size 112"
"$facetrt" demo --out demo
"$facetrt" match cat.jpg ibex.jpg $common --out match
"$facetrt" cosegment cat.jpg ibex.jpg $common --backend openvino --out cosegment
"$facetrt" extract cat.jpg ibex.jpg $common --out extract
"$facetrt" video clip.mp4 --task track --points 5 $common --out video.mp4

lowest/bin/python - <<'PYTHON'
import av
import numpy as np
from PIL import Image

from facetrt.engine import FeatureStore

matches = np.load("match/matches.npz")
assert matches["points_a_xy"].shape == matches["points_b_xy"].shape == (10, 2), matches["points_a_xy"].shape
mask = np.asarray(Image.open("cosegment/masks/cat.png"))
assert mask.shape[::-1] == Image.open("cat.jpg").size and 0 < (mask > 0).mean() < 1
store = FeatureStore.open("extract/features.zarr")
assert len(store) == 2 and all(np.isfinite(features["key@3"]).all() for features in store)
with av.open("video.mp4") as clip:
    assert sum(1 for _ in clip.decode(video=0)) == 6
assert Image.open("demo/cosegment/overview.png").size > (100, 100)
print("the oldest versions allowed run every command")
PYTHON
