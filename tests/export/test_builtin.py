"""The built-in model: reproducible from its source, and better than the trivial baselines."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from facetrt.engine import Engine
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.samples import sample_images, second_view
from facetrt.export import export_bundle


@pytest.fixture(scope="module")
def builtin() -> Engine:
    return Engine.open("builtin")


def test_the_shipped_bundle_is_what_the_source_makes(tmp_path: Path, builtin: Engine) -> None:
    manifest = export_bundle("builtin", tmp_path / "again")
    assert manifest.facets == builtin.manifest.facets and manifest.saliency_heads == builtin.manifest.saliency_heads
    pixels = np.asarray(sample_images()["coffee"])
    with Engine.open(tmp_path / "again") as again:
        new, shipped = (engine.encode([pixels], load_size=96)[0] for engine in (again, builtin))
    for facet in manifest.facets:
        np.testing.assert_allclose(new.tokens[facet], shipped.tokens[facet], atol=1e-4)
    np.testing.assert_allclose(new.saliency, shipped.saliency, atol=1e-4)


def test_it_says_that_it_is_not_dino(builtin: Engine) -> None:
    assert "not DINO" in builtin.manifest.description


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_known_correspondences_are_found(builtin: Engine, name: str) -> None:
    pixels = np.asarray(sample_images()[name])
    turned, matrix = second_view(pixels)
    matches = builtin.match(pixels, turned, load_size=160)
    error = np.linalg.norm(matches.points_a_xy @ matrix[:, :2].T + matrix[:, 2] - matches.points_b_xy, axis=1)
    assert len(matches) == 10 and np.median(error) < 0.03 * max(pixels.shape)


@pytest.mark.parametrize("size", [(64, 64), (65, 130), (200, 90)])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_constant_images_are_harmless(builtin: Engine, size: tuple[int, int], value: int) -> None:
    features = builtin.encode([np.full((*size, 3), value, np.uint8)], load_size=None)[0]
    assert all(np.isfinite(rows).all() for rows in features.tokens.values())
    assert np.isfinite(features.saliency).all()


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    program = "import sys; from facetrt.engine.cli.main import main; sys.argv[0] = 'facetrt'; main()"
    command = [sys.executable, "-c", program, "export", "builtin", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*.tmp")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
    subprocess.run(command, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Bundle.open(tmp_path / "out").manifest.model == "builtin"
