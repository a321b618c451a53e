from __future__ import annotations

import numpy as np
import pytest

from facetrt.kernels import InputError, vote
from facetrt.kernels.vote import vote_reference


@pytest.mark.parametrize("sizes", [(1,), (5, 7, 3), (70_000, 12)])
@pytest.mark.parametrize("percentage", [0, 50, 75, 100])
def test_equals_the_definition(sizes: tuple[int, ...], percentage: float) -> None:
    rng = np.random.default_rng(sum(sizes))
    labels = [rng.integers(0, 4, size) for size in sizes]
    saliencies = [rng.random(size, np.float32) ** 4 for size in sizes]
    got = vote(labels, saliencies, 6, threshold=0.2, percentage=percentage)
    expected = vote_reference(labels, saliencies, 6, threshold=0.2, percentage=percentage)
    np.testing.assert_allclose(got.mean_saliency, expected.mean_saliency, rtol=1e-6)
    np.testing.assert_array_equal(got.counts, expected.counts)
    np.testing.assert_array_equal(got.salient_labels, expected.salient_labels)


def test_the_threshold_is_strict_and_absent_clusters_do_not_vote() -> None:
    labels = [np.array([0, 1]), np.array([0, 0])]
    saliencies = [np.array([0.5, 0.75], np.float32), np.array([0.75, 0.25], np.float32)]
    got = vote(labels, saliencies, 3, threshold=0.5, percentage=50)
    np.testing.assert_array_equal(got.counts, [0, 1, 0])
    assert got.needed == 1 and np.isnan(got.mean_saliency[1, 1])
    np.testing.assert_array_equal(got.salient_labels, [1])


def test_votes_are_rounded_up() -> None:
    labels, saliencies = [np.array([0])] * 5, [np.array([1.0], np.float32)] * 5
    assert vote(labels, saliencies, 1).needed == 4  # 75 % of 5


@pytest.mark.parametrize(
    ("labels", "saliencies", "options", "message"),
    [
        ([], [], {}, "0 label maps"),
        ([np.array([0])], [np.array([0.5, 0.5])], {}, "differ in shape"),
        ([np.array([3])], [np.array([0.5])], {}, r"0\.\.1"),
        ([np.array([0])], [np.array([0.5])], {"percentage": 101}, "101"),
    ],
)
def test_bad_input(labels: list, saliencies: list, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        vote(labels, saliencies, 2, **options)
