from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import photo
from PIL import Image

from facetrt.engine import Engine, learn_cosegmentation
from facetrt.engine.scale.batches import Apply, Discover, Encode, Match, OnBatches
from facetrt.kernels.errors import InputError

SIDE = 64
PHOTOS = [photo(70, 80), photo(64, 90, 1), photo(66, 64, 2)]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    for number, pixels in enumerate(PHOTOS):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return [str(tmp_path / f"{number}.png") for number in range(len(PHOTOS))]


def column(values: list[Any]) -> np.ndarray:
    found = np.empty(len(values), np.object_)
    found[:] = values
    return found


def in_another_process(work: OnBatches) -> OnBatches:
    """As an actor gets it: even one that has worked already holds no engine."""
    return pickle.loads(pickle.dumps(work))


def test_descriptors_of_paths_files_and_arrays(tiny_bundle: Path, tiny_engine: Engine, paths: list[str]) -> None:
    expected = [tiny_engine.encode([pixels], load_size=SIDE)[0] for pixels in PHOTOS]
    encode = Encode(str(tiny_bundle), facets=["key@1"], load_size=SIDE)
    arrays = np.empty(3, np.object_)
    for row, pixels in enumerate(PHOTOS):
        arrays[row] = pixels
    for images in (np.array(paths), column([Path(path).read_bytes() for path in paths]), arrays):
        found = encode({"image": images, "number": np.arange(3)})
        assert list(found["number"]) == [0, 1, 2] and list(found["error"]) == [None] * 3
        assert ("image" in found) == (images.dtype.kind == "U")  # no pixels are carried on
        for row, features in enumerate(expected):
            np.testing.assert_allclose(found["key@1"][row], features["key@1"], atol=1e-5)
            np.testing.assert_allclose(found["saliency"][row], features.saliency.ravel(), atol=1e-5)
            assert tuple(found["grid"][row]) == features.grid
        encode = in_another_process(encode)


def test_a_broken_image_is_its_own_rows(tiny_bundle: Path, paths: list[str]) -> None:
    found = Encode(str(tiny_bundle), load_size=SIDE)({"image": np.array([paths[0], "/nowhere.png", paths[1]])})
    assert found["error"][0] is found["error"][2] is None and "/nowhere.png is not a file" in found["error"][1]
    assert found["key@1"][1].shape == (0, 48) and found["key@1"][2].size
    alone = Encode(str(tiny_bundle), load_size=SIDE)({"image": np.array(["/nowhere.png"])})
    assert alone.keys() == found.keys()
    both = Match(str(tiny_bundle), load_size=SIDE)(
        {"image_a": np.array(paths[:2]), "image_b": np.array([paths[2], "/nowhere.png"])}
    )
    assert both["error"][0] is None and "/nowhere.png" in both["error"][1] and both["points_a_xy"][1].shape == (0, 2)


def test_tasks_find_what_the_engine_finds(
    tiny_bundle: Path, tiny_engine: Engine, paths: list[str], tmp_path: Path
) -> None:
    found = in_another_process(Match(str(tiny_bundle), load_size=SIDE, num_pairs=3))(
        {"image_a": np.array(paths[:2]), "image_b": np.array(paths[1:])}
    )
    for row in range(2):
        expected = tiny_engine.match(PHOTOS[row], PHOTOS[row + 1], load_size=SIDE, num_pairs=3)
        np.testing.assert_allclose(found["points_b_xy"][row], expected.points_b_xy, rtol=1e-6)
    objects = in_another_process(Discover(str(tiny_bundle), load_size=SIDE, method="lost"))({"image": np.array(paths)})
    for row, each in enumerate(tiny_engine.discover(PHOTOS, "lost", load_size=SIDE)):
        np.testing.assert_allclose(objects["boxes"][row], each.boxes)
    features = tiny_engine.encode(PHOTOS, load_size=SIDE)
    model = learn_cosegmentation(tiny_engine, features, sample_interval=5, saliency_threshold=0, votes_percentage=30)
    model.save(tmp_path / "model.npz")
    masks = in_another_process(Apply(str(tiny_bundle), learned=tmp_path / "model.npz"))({"image": np.array(paths)})
    for row, item in enumerate(features):
        pixels = np.asarray(Image.open(io.BytesIO(masks["mask"][row][0])))
        np.testing.assert_array_equal(pixels == 255, tiny_engine.apply(model, item, refine="none").mask)


def test_columns_are_what_arrow_holds(tiny_bundle: Path, paths: list[str]) -> None:
    """Numbers of one kind and rank, texts, and lists of bytes: Ray would pickle anything else."""
    given = {"image": np.array([*paths, "/nowhere.png"])}
    for work in (Encode(str(tiny_bundle), load_size=SIDE), Discover(str(tiny_bundle), load_size=SIDE, method="lost")):
        for name, values in work(given).items():
            if name in ("image", "error"):
                assert all(value is None or isinstance(value, str) for value in values)
            elif name == "masks":
                assert all(
                    isinstance(value, list) and all(isinstance(file, bytes) for file in value) for value in values
                )
            else:
                assert len({(value.dtype, value.ndim) for value in values}) == 1 and values[0].dtype != np.object_


def test_tables_are_plain_lists(tiny_bundle: Path, tiny_engine: Engine, paths: list[str]) -> None:
    pa = pytest.importorskip("pyarrow")
    table = Encode(str(tiny_bundle), facets=["key@1"], load_size=SIDE, arrow=True)({"image": [*paths, "/nowhere.png"]})
    assert table.schema.field("key@1").type == pa.list_(pa.list_(pa.float32(), 48))
    expected = tiny_engine.encode([PHOTOS[1]], load_size=SIDE)[0]["key@1"]
    np.testing.assert_allclose(table["key@1"][1].as_py(), expected, atol=1e-5)
    assert table["key@1"][3].as_py() == [] and "not a file" in table["error"][3].as_py()
    objects = Discover(str(tiny_bundle), load_size=SIDE, method="lost", arrow=True)({"image": paths})
    assert objects.schema.field("masks").type == pa.list_(pa.binary())


def test_what_is_wrong_is_said_before_anything_is_sent(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="the batch has columns picture: expected image"):
        Encode(str(tiny_bundle))({"picture": np.array(["a.png"])})
    with pytest.raises(InputError, match="expected a model exactly where apply"):
        Apply(str(tiny_bundle))
    with pytest.raises(InputError, match="num_pairs=0"):
        Match(str(tiny_bundle), num_pairs=0)
