"""The whole engine on a real GPU; what belongs to one operation or backend is tested beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import photo

from facetrt.engine import Engine, Features
from facetrt.engine.backends.parity import check, compare, worst
from facetrt.engine.backends.run_options import Precision
from facetrt.engine.bundle.manifest import CLS_ATTENTION
from facetrt.engine.samples import sample_paths
from facetrt.kernels.device.runtime.cuda import CudaContext
from facetrt.kernels.errors import BackendError

pytestmark = pytest.mark.gpu

MAX_BATCH = 16  # of the plans
IMAGES = [photo(96, 128, seed) for seed in range(MAX_BATCH)]


def outputs(features: Features) -> dict[str, np.ndarray]:
    attention = np.ravel(features.attention) if features.attention is not None else np.empty(0, np.float32)
    return {**features.tokens, CLS_ATTENTION: attention}


def same_bytes(a: Features, b: Features) -> bool:
    return all(np.array_equal(value, outputs(b)[name]) for name, value in outputs(a).items())


def agree(engine: Engine, exact: Engine, images: list[np.ndarray], load_size: int | None) -> None:
    pairs = zip(engine.encode(images, load_size=load_size), exact.encode(images, load_size=load_size), strict=True)
    check(worst([compare(outputs(got), outputs(want)) for got, want in pairs]), Precision(engine.precision))


@pytest.mark.parametrize("side", [98, 224, 448])
def test_the_contract_is_kept_on_photographs(engine: Engine, exact: Engine, side: int) -> None:
    for path in list(sample_paths().values())[:2]:
        agree(engine, exact, [path], side)  # type: ignore[list-item]


def test_the_contract_is_kept_for_every_batch_size(engine: Engine, exact: Engine) -> None:
    for count in range(1, MAX_BATCH + 1):
        agree(engine, exact, IMAGES[:count], None)


def test_neighbours_in_a_batch_change_nothing(engine: Engine) -> None:
    together = engine.encode(IMAGES, load_size=None)
    for shift in (1, 5, MAX_BATCH - 1):
        order = [(i + shift) % MAX_BATCH for i in range(MAX_BATCH)]
        again = engine.encode([IMAGES[i] for i in order], load_size=None)
        assert all(same_bytes(together[i], item) for i, item in zip(order, again, strict=True))


def test_match_is_that_of_the_host(bundle: Path, backend: str, engine: Engine) -> None:
    paths = list(sample_paths().values())[:2]
    found = engine.match(*paths)
    with Engine.open(bundle, device="cuda", backend=backend, kernels="host") as host:
        expected = host.match(*paths)
    got, want = (set(zip(m.cells_a.tolist(), m.cells_b.tolist(), strict=True)) for m in (found, expected))
    assert len(want) > 10 and len(got & want) >= 0.98 * len(got | want)
    assert len(found) == len(expected)


def test_cosegmentation_is_that_of_the_host(bundle: Path, backend: str, engine: Engine) -> None:
    paths = list(sample_paths().values())
    found = engine.cosegment(paths, refine="none")
    with Engine.open(bundle, device="cuda", backend=backend, kernels="host") as host:
        expected = host.cosegment(paths, refine="none")
    assert found.clustering.tried_k == expected.clustering.tried_k
    for got, want in zip(found, expected, strict=True):
        assert (got.labels == want.labels).mean() >= 0.98


def test_two_streams_give_what_one_gives(bundle: Path, backend: str, engine: Engine) -> None:
    images = IMAGES * 3
    with Engine.open(bundle, device="cuda", backend=backend, streams=2) as two:
        pairs = zip(engine.encode(images, load_size=None), two.encode(images, load_size=None), strict=True)
        agree = [compare(outputs(a), outputs(b)) for a, b in pairs]
    assert min(metrics["mean_cosine"] for found in agree for metrics in found.values()) > 0.9999


def test_out_of_memory_leaves_the_engine_usable(engine: Engine) -> None:
    import torch

    before = engine.encode(IMAGES[:1], load_size=None)[0]
    large = [photo(448, 448, seed) for seed in range(MAX_BATCH)]
    context = CudaContext.of(0)
    with context:
        for lane in context.lanes:
            lane._pool.free_held()  # else it could be enough
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - (64 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(BackendError, match="out of device memory"):
        engine.encode(large, load_size=None)
    del hog
    torch.cuda.empty_cache()
    assert same_bytes(engine.encode(IMAGES[:1], load_size=None)[0], before)
    assert len(engine.encode(large, load_size=None)) == MAX_BATCH


TORCH = "import torch; torch.ones(8, device='cuda').sum().item()"
ENCODE = """
import hashlib, numpy
from facetrt.engine import Engine
image = numpy.arange(96 * 128 * 3, dtype=numpy.uint8).reshape(96, 128, 3)
with Engine.open({bundle!r}, device="cuda", backend={backend!r}) as engine:
    features = engine.encode([image], load_size=None)[0]
print("digest", hashlib.sha256(b"".join(v.tobytes() for v in features.tokens.values())).hexdigest())
"""


def test_torch_may_come_before_or_after_or_not_at_all(bundle: Path, backend: str) -> None:
    encode = ENCODE.format(bundle=str(bundle), backend=backend)
    digests = set()
    for code in (encode, f"{TORCH}\n{encode}\n{TORCH}", f"{encode}\n{TORCH}\n{encode}"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        digests |= {line for line in done.stdout.splitlines() if line.startswith("digest")}
    assert len(digests) == 1
