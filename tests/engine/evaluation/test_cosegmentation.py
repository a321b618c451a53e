"""Co-segmentation: layouts accepted, masks read, figures, baselines."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from facetrt.engine import InputError, MissingFileError
from facetrt.engine.evaluation import evaluate, open_evaluation
from facetrt.engine.evaluation.cosegmentation import CosegmentationOptions, centred_box, load_size_of
from facetrt.engine.evaluation.datasets.masks import read_image_sets
from facetrt.engine.evaluation.datasets.reading import read_mask

FLAT = {"refine": "none", "load_size": "none", "saliency_threshold": "0.3", "sample_interval": "5"}


def _bright_square(i, size=(64, 80)):
    """A white square on black, and its mask."""
    mask = np.zeros(size, bool)
    mask[8 + 4 * i : 40 + 4 * i, 16:56] = True
    return np.where(mask[..., None], (250, 240, 230), (10, 20, 30)), mask


@pytest.fixture
def coseg(tmp_path, save):
    """Two sets of three images, one class folder each under images/ and masks/."""
    for name in ("Cow", "Dog"):
        for i in range(3):
            picture, mask = _bright_square(i)
            save(tmp_path / "images" / name / f"img_{i}.jpg", picture)
            save(tmp_path / "masks" / name / f"img_{i}.png", mask * 255)
    return tmp_path


def test_both_layouts_are_read(coseg, save, tmp_path):
    sets = read_image_sets(coseg, "a set")
    assert [(found.name, len(found.images)) for found in sets] == [("Cow", 3), ("Dog", 3)]
    other = tmp_path / "other"
    picture, mask = _bright_square(0)
    save(other / "Airplane100" / "0001.jpg", picture)
    save(other / "Airplane100" / "GroundTruth" / "0001_GT.png", mask * 255)
    (found,) = read_image_sets(other, "a set")
    assert (found.name, found.masks[0].name) == ("Airplane100", "0001_GT.png")
    assert len(read_image_sets(coseg, "a set", limit=2)[0].images) == 2


def test_what_is_missing_is_named(coseg, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"is not MSRC: expected images/SET/NAME\.jpg"):
        open_evaluation("msrc", tmp_path / "empty")
    (coseg / "masks" / "Cow" / "img_1.png").rename(coseg / "masks" / "Cow" / "img_9.png")
    with pytest.raises(MissingFileError, match=r"img_9\.png has no image"):
        read_image_sets(coseg, "a set")
    (coseg / "masks" / "Cow" / "img_9.png").unlink()
    with pytest.raises(MissingFileError, match=r"Cow/img_1\.png is missing"):
        read_image_sets(coseg, "a set")


def test_a_mask_of_another_size_is_named(coseg, save):
    save(coseg / "masks" / "Cow" / "img_1.png", np.zeros((10, 20)))
    with pytest.raises(InputError, match=r"img_1\.png has 20×10 pixels and .*img_1\.jpg 80×64"):
        open_evaluation("pascal-coseg", coseg)


def test_masks_are_read_whatever_their_values(tmp_path, save):
    expected = np.array([[False, True], [True, False]])
    for name, values in (
        ("ones", expected),
        ("white", expected * 255),
        ("rgb", expected[..., None].repeat(3, axis=2) * 255),
    ):
        path = save(tmp_path / f"{name}.png", np.asarray(values))
        np.testing.assert_array_equal(read_mask(path), expected)
    assert not read_mask(save(tmp_path / "black.png", np.zeros((2, 2)))).any()
    palette = Image.fromarray(np.array([[0, 15], [15, 255]], np.uint8))
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "voc.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "voc.png"), expected)


def test_the_trivial_box_by_hand():
    assert centred_box((10, 20)).sum() == (8 - 1) * (17 - 3)  # 1.5 → 1 and 8.5 → 8; 3 and 17


def test_long_images_are_loaded_smaller(tmp_path, save):
    path = save(tmp_path / "wide.png", np.zeros((100, 330, 3)))
    assert load_size_of(path, CosegmentationOptions()) == (242, 800)
    assert load_size_of(path, CosegmentationOptions(longest_side=None)) == 320
    assert load_size_of(path, CosegmentationOptions(load_size=200)) == 200


def test_a_bright_object_is_segmented_and_scored(coseg, make_engine, tmp_path):
    engine = make_engine()
    outcome = evaluate(open_evaluation("pascal-coseg", coseg, FLAT), engine, tmp_path / "out")
    summary = outcome.summary
    assert summary.overall.figures["J"] > 0.7
    assert summary.overall.figures["P"] > 0.9
    assert [row.name for row in summary.baselines] == ["saliency baseline", "centred box of 70 % × 70 % (trivial)"]
    assert summary.baselines[0].figures["J"] > 0.6
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["published"][0]["J"] == 0.607
    assert results["model"]["model"] == "stub"
    assert results["options"]["facet"] == "key@9"
    assert (tmp_path / "out" / "pictures" / "Cow" / "img_0.png").is_file()
    compared = Image.open(tmp_path / "out" / "pictures" / "compared" / "Cow" / "img_0.jpg")
    assert compared.size == (3 * 300 + 2 * 8, 24 + 240)  # photograph, annotation and prediction, each below its title


def test_an_empty_annotation_is_left_out_of_j_and_kept_in_p(coseg, save, tmp_path):
    save(coseg / "masks" / "Cow" / "img_0.png", np.zeros((64, 80)))
    outcome = evaluate(open_evaluation("internet300", coseg), None, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "items.jsonl").read_text().splitlines()[1])["record"]
    assert record["box"]["J"][0] is None
    assert record["box"]["P"][0] == pytest.approx(1 - 45 * 56 / (64 * 80))
    assert outcome.summary.counts["images_with_empty_annotation"] == 1
    assert outcome.summary.categories[0].figures["J"] == pytest.approx(np.mean(record["box"]["J"][1:]))


def test_internet300_removes_outliers_by_default(coseg):
    assert open_evaluation("internet300", coseg).options.remove_outliers
    assert not open_evaluation("msrc", coseg).options.remove_outliers


def test_a_set_that_cannot_be_segmented_is_named(coseg, make_engine, tmp_path):
    evaluation = open_evaluation("pascal-coseg", coseg, FLAT | {"remove_outliers": "yes", "outlier_threshold": "2"})
    with pytest.raises(InputError, match="set Cow: outlier removal"):
        evaluate(evaluation, make_engine(), tmp_path / "out")


def test_one_image_is_no_set(coseg):
    with pytest.raises(InputError, match="at least 2 images"):
        open_evaluation("pascal-coseg", coseg, {"limit": 1})


def test_trivial_baseline_on_the_shared_images(shared_eval, tmp_path):
    outcome = evaluate(open_evaluation("pascal-coseg", shared_eval / "pascal_coseg"), None, tmp_path / "out")
    figures = outcome.summary.baselines[0].figures
    assert (round(figures["J"], 3), round(figures["P"], 3)) == (0.300, 0.644)
