"""Label propagation against its definition, on awkward grids."""

import importlib

import numpy as np
import pytest

from facetrt.kernels import InputError
from facetrt.kernels.propagate import TILE, propagate, propagate_reference
from facetrt.kernels.short_descriptors import Descriptors, Subspace


def _case(grid=(7, 11), frames=3, channels=8, labels=3, seed=0):
    random = np.random.default_rng(seed)
    features = random.standard_normal((frames + 1, *grid, channels)).astype(np.float32)
    soft = random.random((frames, *grid, labels)).astype(np.float32)
    return features[-1], features[:-1], soft


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (7, 11), (TILE, TILE), (TILE + 1, 2 * TILE - 1), (29, 5)])
@pytest.mark.parametrize(("radius", "topk"), [(0, 5), (2, 5), (3, 1), (40, 7)])
def test_equals_the_definition(grid, radius, topk):
    target, context, labels = _case(grid)
    fast = propagate(target, context, labels, radius=radius, topk=topk)
    np.testing.assert_allclose(
        fast, propagate_reference(target, context, labels, radius=radius, topk=topk), rtol=2e-4, atol=2e-5
    )


def _near_a_subspace(grid, channels, width, rest, frames=4, seed=3):
    """Smooth descriptors of which all but a little lies in a few directions, and which move from frame to frame."""
    random = np.random.default_rng(seed)
    coarse = random.standard_normal((grid[0] + 9, grid[1] + 9, width))
    smooth = sum(np.roll(coarse, (dy, dx), axis=(0, 1)) for dy in range(3) for dx in range(3))
    directions = np.linalg.qr(random.standard_normal((channels, width)))[0]
    frames = [smooth[i : i + grid[0], 2 * i : 2 * i + grid[1]] @ directions.T for i in range(frames + 1)]
    features = np.stack([f + rest * random.standard_normal(f.shape) for f in frames]).astype(np.float32)
    labels = random.random((len(frames) - 1, *grid, 2)).astype(np.float32)
    return features[-1], features[:-1], labels


@pytest.mark.parametrize(
    ("grid", "radius"), [((19, 23), 5), ((19, 23), 1), ((19, 23), 0), ((1, 40), 6), ((26, 17), 99)]
)
def test_pruning_changes_nothing(grid, radius, monkeypatch):
    target, context, labels = _near_a_subspace(grid, channels=48, width=6, rest=0.02)
    kernel = importlib.import_module("facetrt.kernels.propagate")
    survivors, found = kernel._survivors, []
    monkeypatch.setattr(kernel, "_survivors", lambda *args: found.append(survivors(*args)) or found[-1])
    pruned = propagate(target, context, labels, radius=radius)
    pairs = [few for few in found if few is not None]
    if radius > 1:  # smaller neighbourhoods hold too few cells
        assert pairs
    if radius in (5, 99):
        assert sum(len(few.targets) for few in pairs) < 40 * grid[0] * grid[1]
    expected = propagate_reference(target, context, labels, radius=radius)
    np.testing.assert_allclose(pruned, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("rest", [0.0, 3.0])
def test_what_cannot_be_pruned_is_computed(rest):
    """Equal descriptors, of which none can be left out, and such as fill their space."""
    target, context, labels = _near_a_subspace((13, 15), channels=32, width=4, rest=rest)
    if not rest:
        context[:] = target = np.broadcast_to(target[3, 4], target.shape)
    fast = propagate(target, context, labels, radius=4)
    expected = propagate_reference(target, context, labels, radius=4)
    np.testing.assert_allclose(fast, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("width", [0, 8])
def test_bounds_hold(width):
    """No cosine is larger than what the short descriptors allow."""
    random = np.random.default_rng(5)
    values = random.standard_normal((11, 13, 40)).astype(np.float32) ** 3
    values[0, 0], values[1] = 0, values[2]
    directions = np.linalg.qr(random.standard_normal((40, max(width, 1))))[0][:, :width].astype(np.float32)
    found = Descriptors.of(values, Subspace(directions))
    rows, short = found.unit.reshape(-1, 40).astype(np.float64), found.short.reshape(-1, width + 1).astype(np.float64)
    assert (rows @ rows.T <= short @ short.T + 1e-6).all()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1)[1:], 1, atol=1e-6)


def test_a_subspace_is_as_small_as_will_do():
    target, _, _ = _near_a_subspace((20, 20), channels=48, width=6, rest=0.001)
    assert Subspace.fit(target).width == 8
    noise = np.random.default_rng(0).standard_normal((20, 20, 48)).astype(np.float32)
    assert Subspace.fit(noise).width == 0 and Subspace.fit(noise[..., :4]).width == 0
    assert Subspace.fit(np.zeros((20, 20, 48), np.float32)).width in (0, 8)


def test_sequences_and_half_precision_are_taken():
    target, context, labels = _case()
    expected = propagate_reference(target.astype(np.float16), context.astype(np.float16), labels)
    fast = propagate(target.astype(np.float16), list(context.astype(np.float16)), list(labels))
    assert fast.dtype == np.float32
    np.testing.assert_allclose(fast, expected, rtol=2e-3, atol=2e-4)


def test_lengths_do_not_matter():
    target, context, labels = _case()
    scaled = propagate(target * 50, context * np.float32(0.01), labels, radius=2)
    np.testing.assert_allclose(scaled, propagate(target, context, labels, radius=2), rtol=1e-4, atol=1e-5)


def test_a_moved_image_moves_its_labels():
    random = np.random.default_rng(1)
    frame = random.standard_normal((9, 9, 32)).astype(np.float32)
    labels = random.random((9, 9, 2)).astype(np.float32)
    moved = np.roll(frame, (2, -1), axis=(0, 1))
    result = propagate(moved, [frame], [labels], radius=3, topk=1)
    np.testing.assert_array_equal(result[2:, :-1], labels[:-2, 1:])


def test_a_match_beyond_the_radius_is_not_seen():
    frame = np.zeros((1, 9, 2), np.float32)
    frame[..., 0] = 1
    frame[0, 8] = [0, 1]
    target = np.broadcast_to(np.float32([0, 1]), (1, 9, 2))
    labels = np.zeros((1, 9, 1), np.float32)
    labels[0, 8] = 1
    reached = propagate(target, [frame], [labels], radius=2, topk=1)[0, :, 0]
    np.testing.assert_array_equal(reached > 0.5, [False] * 6 + [True] * 3)


def test_ties_at_the_smallest_kept_value_are_all_kept():
    frame = np.ones((1, 4, 3), np.float32)
    labels = np.float32([[[0], [0], [0], [1]]])
    np.testing.assert_allclose(propagate(frame, [frame], [labels], topk=2), 0.25)


@pytest.mark.parametrize("channels", [64, 768, 1000])
def test_copies_of_a_frame_tie_at_the_smallest_kept_cosine(channels):
    """Even where their products differ in the last bits, by where they stand in the product."""
    frame, other = np.random.default_rng(0).standard_normal((2, 1, 1, channels)).astype(np.float32)
    same = np.broadcast_to(frame, (5, 7, channels))
    labels = np.random.default_rng(1).random((4, 5, 7, 2)).astype(np.float32)
    kept = propagate(same, [same, np.broadcast_to(other, same.shape), same, same], labels, topk=2)
    np.testing.assert_allclose(kept, np.broadcast_to(labels[[0, 2, 3]].mean(axis=(0, 1, 2)), kept.shape), rtol=1e-5)


def test_a_cold_temperature_does_not_overflow():
    target, context, labels = _case()
    result = propagate(target, context, labels, temperature=1e-4)
    assert np.isfinite(result).all()


@pytest.mark.parametrize("zero", ["target", "context"])
def test_zero_descriptors_are_like_everything(zero):
    target, context, labels = _case()
    (target if zero == "target" else context)[:] = 0
    np.testing.assert_allclose(
        propagate(target, context, labels), propagate_reference(target, context, labels), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("grid", [(0, 0), (0, 4)])
def test_an_empty_grid_gives_an_empty_map(grid):
    target, context, labels = _case(grid)
    assert propagate(target, context, labels).shape == (*grid, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c, s: (t, c[:0], s[:0]), "at least one"),
        (lambda t, c, s: (t, c, s[:1]), "3 context frames and 1 label maps"),
        (lambda t, c, s: (t[:-1], c, s), "expected the same"),
        (lambda t, c, s: (t, c, s[:, :-1]), "one row of labels per cell"),
        (lambda t, c, s: (t * np.float32(np.nan), c, s), "NaN or infinite"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(InputError, match=message):
        propagate(*change(*_case()))


@pytest.mark.parametrize("option", [{"radius": -1}, {"topk": 0}, {"temperature": 0}, {"temperature": float("nan")}])
def test_options_out_of_range_are_named(option):
    with pytest.raises(InputError, match="expected a radius"):
        propagate(*_case(), **option)
