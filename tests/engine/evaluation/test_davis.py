"""Label propagation on DAVIS: reader, sizes, resizing rules, figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from facetrt.engine import InputError, MissingFileError
from facetrt.engine.evaluation import evaluate, open_evaluation
from facetrt.engine.evaluation.datasets.videos import read_davis
from facetrt.engine.evaluation.davis import frame_size, resize_frame

QUICK = {"load_size": "64", "radius": "4", "queue": "2"}


def _frame(i, size=(96, 128)):
    """Two coloured squares that move apart, and their labels."""
    pixels, labels = np.full((*size, 3), 30), np.zeros(size, int)
    for label, (left, colour) in enumerate((((20 + 4 * i), (240, 40, 40)), ((72 - 4 * i), (40, 240, 60))), start=1):
        pixels[20 + 40 * (label - 1) :, left:][:24, :24] = colour
        labels[20 + 40 * (label - 1) :, left:][:24, :24] = label
    return pixels, labels


@pytest.fixture
def davis(tmp_path, save):
    """Two sequences of five frames with two objects each."""
    for name in ("apart", "together"):
        for i in range(5):
            pixels, labels = _frame(i)
            save(tmp_path / "JPEGImages" / "480p" / name / f"{i:05}.jpg", pixels)
            save(tmp_path / "Annotations" / "480p" / name / f"{i:05}.png", labels)
    return tmp_path


def test_reads_the_list_or_all_sequences(davis):
    videos, listed = read_davis(davis, "val")
    assert ([video.name for video in videos], listed) == (["apart", "together"], False)
    (davis / "ImageSets" / "2017").mkdir(parents=True)
    (davis / "ImageSets" / "2017" / "val.txt").write_text("together\n")
    videos, listed = read_davis(davis, "val")
    assert ([video.name for video in videos], listed) == (["together"], True)
    assert "all folders" not in open_evaluation("davis2017", davis).facts()["sequences_from"]


def test_what_is_missing_is_named(davis, tmp_path):
    with pytest.raises(MissingFileError, match=r"JPEGImages/480p is missing: DAVIS has one folder of frames"):
        read_davis(tmp_path / "Annotations", "val")
    (davis / "Annotations" / "480p" / "apart" / "00002.png").unlink()
    with pytest.raises(MissingFileError, match=r"apart/00002\.png is missing"):
        read_davis(davis, "val")


def test_an_annotation_of_another_size_is_named(davis, save):
    save(davis / "Annotations" / "480p" / "apart" / "00000.png", np.ones((10, 20)))
    with pytest.raises(InputError, match=r"00000\.png has 20×10 pixels and its frame 128×96"):
        read_davis(davis, "val")[0][0].labels(0)


def test_void_is_background_beside_objects_and_the_object_alone(davis, save):
    annotations = davis / "Annotations" / "480p"
    save(annotations / "apart" / "00000.png", _frame(0)[1] // 2 * 255)
    _, labels = _frame(0)
    labels[0] = 255
    save(annotations / "together" / "00000.png", labels)
    binary, several = read_davis(davis, "val")[0]
    assert (binary.binary, several.binary) == (True, False)
    assert set(np.unique(binary.labels(0))) == {0, 1}
    assert set(np.unique(several.labels(0))) == {0, 1, 2}


@pytest.mark.parametrize(
    ("original", "expected"), [((480, 854), (480, 832)), ((854, 480), (832, 480)), ((480, 910), (480, 896))]
)
def test_frame_sizes_of_the_protocol(original, expected):
    assert frame_size(original, 480) == expected


def test_frames_are_resized_without_antialiasing():
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::4] = 255
    assert resize_frame(stripes, (8, 16)).max() == 0  # samples between columns 1 and 2 of every four
    assert resize_frame(stripes, (4, 64)).shape == (4, 64, 3)


def test_moving_squares_are_followed(davis, make_engine, tmp_path):
    engine = make_engine()
    outcome = evaluate(open_evaluation("davis2017", davis, QUICK | {"limit": 1}), engine, tmp_path / "out")
    overall, static = outcome.summary.overall.figures, outcome.summary.baselines[0].figures
    assert overall["J"] > static["J"] + 0.1
    assert overall["J&F"] == pytest.approx((overall["J"] + overall["F"]) / 2)
    assert [row.name for row in outcome.summary.categories] == ["apart/1", "apart/2"]
    assert len(engine.encoded) == 5 and set(engine.strides) == {engine.manifest.architecture.patch}
    saved = Image.open(tmp_path / "out" / "pictures" / "apart" / "00003.png")
    compared = Image.open(tmp_path / "out" / "pictures" / "compared" / "apart" / "00003.jpg")
    assert compared.size == (3 * 320 + 2 * 8, 24 + 240)  # frame, annotation and prediction, each below its title
    assert saved.mode == "P"
    assert set(np.unique(np.asarray(saved))) == {0, 1, 2}


def test_other_strides_can_be_asked(davis, make_engine, tmp_path):
    engine = make_engine()
    evaluate(open_evaluation("davis2017", davis, QUICK | {"limit": 1, "stride": 4}), engine, tmp_path / "out")
    assert set(engine.strides) == {4}


def test_only_inner_frames_are_scored(davis, tmp_path):
    evaluate(open_evaluation("davis2017", davis), None, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "items.jsonl").read_text().splitlines()[1])["record"]
    assert [len(values["J"]) for values in record["static"]] == [3, 3]


def test_a_first_frame_without_object_is_an_error(davis, save, tmp_path):
    save(davis / "Annotations" / "480p" / "apart" / "00000.png", np.zeros((96, 128)))
    with pytest.raises(InputError, match="shows no object"):
        evaluate(open_evaluation("davis2017", davis), None, tmp_path / "out")


def test_the_real_sequence_is_read(shared_eval):
    evaluation = open_evaluation("davis2017", shared_eval / "davis")
    assert evaluation.facts()["sequences"] == {"car-shadow": 40}
    assert "is absent" in evaluation.facts()["sequences_from"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_size": "32"}, "load_size=32: expected a shorter side"),
        ({"queue": "-1"}, "queue=-1: expected at least 0"),
    ],
)
def test_options_out_of_range(davis, options, message):
    with pytest.raises(InputError, match=message):
        open_evaluation("davis2017", davis, options)
