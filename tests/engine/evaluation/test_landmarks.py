"""Landmark regression: readers, part centres, least squares, errors."""

from __future__ import annotations

import json

import numpy as np
import pytest

from facetrt.engine import InputError, MissingFileError
from facetrt.engine.evaluation import evaluate, open_evaluation
from facetrt.engine.evaluation.datasets.landmarks import LandmarkImage, read_celeba, read_cub
from facetrt.engine.evaluation.landmarks import (
    CelebA,
    Cub,
    LandmarkOptions,
    Landmarks,
    fill_absent,
    normalised_error,
    part_centres,
    regress,
)

SIZE = (50, 100)  # height, width of every picture here


def _positions(count, seed=0):
    return np.random.default_rng(seed).integers(10, 40, (count, 2))


@pytest.fixture
def celeba(tmp_path, save):
    """Twelve faces, eight to fit and four to score; one face more that is too small. Landmarks sit at fixed offsets."""
    offsets = np.array([[-8, -5], [8, -5], [0, 0], [-5, 7], [5, 7]])
    rows, boxes, names = [], [], []
    for i, position in enumerate(_positions(13)):
        name = f"{i:06}.jpg"
        save(tmp_path / "img_celeba" / name, np.zeros((*SIZE, 3)))
        rows.append(f"{name} " + " ".join(str(v) for v in (position + offsets).ravel()))
        boxes.append(f"{name} 5 5 {60 if i < 12 else 10} 40")
        names.append(name)
    for file, lines in (("list_landmarks_celeba.txt", rows), ("list_bbox_celeba.txt", boxes)):
        (tmp_path / "Anno").mkdir(exist_ok=True)
        (tmp_path / "Anno" / file).write_text("\n".join(["13", "columns of numbers", *lines]) + "\n")
    (tmp_path / "MAFL").mkdir()
    (tmp_path / "MAFL" / "training.txt").write_text("\n".join([*names[:8], names[12]]))
    (tmp_path / "MAFL" / "testing.txt").write_text("\n".join(names[8:12]))
    return tmp_path


@pytest.fixture
def cub(tmp_path, save):
    """Three categories of four birds, two of them for training; landmark 15 is never visible."""
    root = tmp_path / "CUB_200_2011"
    (root / "parts").mkdir(parents=True)
    lines = {name: [] for name in ("images", "train_test_split", "bounding_boxes", "parts/part_locs")}
    for i, position in enumerate(_positions(12)):
        category = f"{i // 4 + 1:03}.Bird"
        save(root / "images" / category / f"{i}.jpg", np.zeros((*SIZE, 3)))
        lines["images"].append(f"{i + 1} {category}/{i}.jpg")
        lines["train_test_split"].append(f"{i + 1} {i % 4 // 2}")
        lines["bounding_boxes"].append(f"{i + 1} 0.0 0.0 50.0 40.0")
        lines["parts/part_locs"] += [
            f"{i + 1} {p} {position[0] + p} {position[1]}.5 {int(p < 15)}" for p in range(1, 16)
        ]
    for name, content in lines.items():
        (root / f"{name}.txt").write_text("\n".join(content) + "\n")
    return tmp_path


def _part_maps(positions):
    """Two parts at 100 × 50 pixels: a block that moves with ``positions`` and one that moves half as far."""
    for x, y in positions:
        labels = np.full(SIZE, -1)
        labels[y - 2 : y + 3, x - 2 : x + 3] = 0
        labels[(y - 2) // 2 : (y + 3) // 2, 60 + x // 2 : 63 + x // 2] = 1
        yield labels


def test_celeba_is_filtered_by_box(celeba):
    (found,) = read_celeba(celeba)
    assert (len(found.train), len(found.test)) == (8, 4)
    assert found.train[0].points_xy.shape == (5, 2)
    assert len(read_celeba(celeba, limit=3)[0].train) == 3


def test_celeba_names_what_is_missing(celeba, tmp_path):
    (celeba / "MAFL" / "testing.txt").write_text("nobody.jpg")
    with pytest.raises(InputError, match=r"testing\.txt: image nobody\.jpg has no entry"):
        read_celeba(celeba)
    (celeba / "MAFL" / "testing.txt").unlink()
    with pytest.raises(
        MissingFileError, match=r"MAFL/testing\.txt or .*testing\.txt is missing: CelebA has MAFL's list"
    ):
        read_celeba(celeba)
    with pytest.raises(MissingFileError, match="in-the-wild images"):
        read_celeba(tmp_path / "MAFL")


def test_cub_is_read_by_category_and_split(cub):
    sets = read_cub(cub)
    assert [(s.name, len(s.train), len(s.test)) for s in sets] == [("001", 2, 2), ("002", 2, 2), ("003", 2, 2)]
    first = sets[0].train[0]
    assert first.visible.tolist() == [True] * 14 + [False]
    assert first.box_wh == (50.0, 40.0)
    assert first.size == SIZE
    np.testing.assert_array_equal(np.diff(first.points_xy[:, 0]), 1)


def test_cub_names_what_is_missing_or_odd(cub, tmp_path):
    with pytest.raises(MissingFileError, match=r"images\.txt is missing: CUB-200-2011 has its list of images"):
        read_cub(tmp_path / "nowhere")
    root = cub / "CUB_200_2011"
    (root / "bounding_boxes.txt").write_text("1 0 0 500 40\n" * 1)
    with pytest.raises(InputError, match=r"annotated box reaches to \(500, 40\)|image 2 has no entry"):
        read_cub(cub)
    (root / "parts" / "part_locs.txt").write_text("1 2 3\n")
    with pytest.raises(InputError, match=r"part_locs\.txt, line 1: 3 columns, expected 5"):
        read_cub(cub)


def test_part_centres_by_hand():
    labels = np.full((4, 8), -1)
    labels[1:3, 2:6] = 0
    labels[0, 0] = 2
    centres = part_centres(labels, 3, 8)
    np.testing.assert_array_equal(centres[0], [3.5, 3.5])  # x 2..5; y 1..2 of 4 rows is 1.5, twice as far on 8
    assert np.isnan(centres[1]).all()
    np.testing.assert_array_equal(centres[2], [0, 0.5])


def test_absent_parts_get_the_training_mean():
    centres = np.array([[[1.0, 2], [np.nan] * 2], [[3, 4], [np.nan] * 2], [[np.nan] * 2, [9, 9]]])
    filled = fill_absent(centres, 2, 256)
    np.testing.assert_array_equal(filled[2, 0], [2, 3])
    np.testing.assert_array_equal(filled[:, 1], [[127.5, 127.5]] * 3)


def test_regression_recovers_an_affine_map_and_gives_the_mean_without_inputs():
    random = np.random.default_rng(0)
    inputs = random.standard_normal((30, 4))
    targets = (inputs @ random.standard_normal((4, 6)) + random.standard_normal(6)).reshape(30, 3, 2)
    visible = np.ones((30, 3), bool)
    found = regress(inputs[:20], targets[:20], visible[:20], inputs[20:])
    np.testing.assert_allclose(found, targets[20:])
    flat = regress(np.zeros((20, 4)), targets[:20], visible[:20], np.zeros((2, 4)))
    np.testing.assert_allclose(flat, [targets[:20].mean(axis=0)] * 2)


def test_regression_equals_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    scaling = pytest.importorskip("sklearn.preprocessing")
    random = np.random.default_rng(1)
    inputs, targets = random.standard_normal((25, 6)) * 9 + 3, random.standard_normal((25, 5, 2)) * 20
    scale_in, scale_out = scaling.StandardScaler().fit(inputs), scaling.StandardScaler().fit(targets.reshape(25, -1))
    model = linear.LinearRegression(fit_intercept=False)
    model.fit(scale_in.transform(inputs), scale_out.transform(targets.reshape(25, -1)))
    asked = random.standard_normal((4, 6)) * 9
    expected = scale_out.inverse_transform(model.predict(scale_in.transform(asked)))
    found = regress(inputs, targets, np.ones((25, 5), bool), asked)
    np.testing.assert_allclose(found.reshape(4, -1), expected)


def test_invisible_landmarks_are_neither_fitted_nor_counted():
    random = np.random.default_rng(0)
    inputs = random.standard_normal((20, 2))
    targets = np.stack([inputs * 3, inputs * 5], axis=1)
    visible = np.ones((20, 2), bool)
    visible[:10, 1] = False
    targets[:10, 1] = 1e6
    found = regress(inputs, targets, visible, inputs[10:])
    assert abs(found[:, 0] - targets[10:, 0]).max() < 1e-9
    assert abs(found[:, 1]).max() < 1e3
    never = regress(inputs, targets, np.zeros((20, 2), bool), inputs[:3])
    assert np.isnan(never).all()


def test_normalised_error_by_hand():
    test = Landmarks(np.array([[[0.0, 0], [3, 4]], [[1, 1], [2, 2]]]), np.array([[True, True], [True, False]]))
    predicted = np.array([[[0.0, 0], [0, 0]], [[1, 2], [100, 100]]])
    assert normalised_error(predicted, test, np.array([10.0, 5.0])) == pytest.approx(100 * (0.25 + 0.2) / 2)
    assert normalised_error(np.full((2, 2, 2), np.nan), test, np.ones(2)) is None


def test_landmarks_are_scaled_and_truncated():
    image = LandmarkImage(None, (50, 100), np.array([[33.0, 33.0]]), np.array([True]), (1, 1))
    np.testing.assert_array_equal(Landmarks.of([image], 256).points_xy, [[[84, 168]]])  # 84.48, 168.96


def test_celeba_with_known_parts(celeba, tmp_path):
    positions = _positions(13)
    evaluation = CelebA(celeba, LandmarkOptions(num_parts=2), parts_of=lambda images: _part_maps(positions[:12]))
    summary = evaluate(evaluation, None, tmp_path / "out").summary
    assert summary.overall.figures["error"] < 3  # truncation to integers and odd halves
    assert summary.baselines[0].figures["error"] > 20
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["counts"] == {"absent parts in CelebA": 0}
    assert results["options"]["num_parts"] == 2


def test_cub_with_known_parts_and_an_absent_one(cub, tmp_path):
    positions = _positions(12)
    number = {f"{i}.jpg": i for i in range(12)}

    def parts_of(images):
        for image, labels in zip(images, _part_maps(positions[[number[p.name] for p in images]]), strict=True):
            yield np.where(labels == 1, -1, labels) if image.name == "3.jpg" else labels

    summary = evaluate(Cub(cub, LandmarkOptions(num_parts=2), parts_of), None, tmp_path / "out").summary
    assert [row.name for row in summary.categories] == ["001", "002", "003"]
    assert summary.counts["absent parts in 001"] == 1
    assert all(row.figures["error"] is not None for row in summary.categories)


def test_cub_errors_are_divided_by_the_box(cub):
    evaluation = Cub(cub, LandmarkOptions())
    images = evaluation.sets["001"].test
    np.testing.assert_allclose(evaluation.scale(images), 256 * np.sqrt(0.5 * 0.8))
    longest = open_evaluation("cub", cub, {"box_norm": "max_side"})
    np.testing.assert_allclose(longest.scale(images), 256 * 0.8)


def test_too_few_part_maps_are_noticed(celeba, tmp_path):
    evaluation = CelebA(celeba, LandmarkOptions(num_parts=2), parts_of=lambda images: _part_maps(_positions(3)))
    with pytest.raises(InputError, match="3 part maps of 12 images"):
        evaluate(evaluation, None, tmp_path / "out")


def test_celeba_with_parts_of_the_engine(celeba, save, make_engine, tmp_path):
    """Bright blocks on black, one red and one green: part centres follow them, and so do the landmarks."""
    for i, (x, y) in enumerate(_positions(13)):
        picture = np.zeros((*SIZE, 3))
        picture[y - 6 : y + 6, x - 9 : x] = (255, 180, 180)
        picture[y - 6 : y + 6, x : x + 9] = (180, 255, 180)
        save(celeba / "img_celeba" / f"{i:06}.jpg", picture)
    options = {"num_parts": 2, "side": 64, "saliency": "full", "refine": "none", "sample_interval": 3}
    seen = []
    evaluation = open_evaluation("celeba", celeba, {key: str(value) for key, value in options.items()})
    summary = evaluate(
        evaluation, make_engine(), tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    ).summary
    assert summary.overall.figures["error"] < summary.baselines[0].figures["error"] / 2
    assert seen[-1] == (12, 12)
