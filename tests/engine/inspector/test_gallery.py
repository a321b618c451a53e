from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import photo
from PIL import Image
from starlette.testclient import TestClient

from facetrt.engine import Engine, similarity_map
from facetrt.engine.inspector import server
from facetrt.engine.inspector.gallery import Gallery
from facetrt.engine.inspector.server import make_app
from facetrt.kernels.errors import InputError

SIDE = 64
PHOTOS = [photo(70, 90), photo(80, 66, 1), photo(64, 64, 2)]
NAME = '<img src=x onerror="alert(1)">.png'


@pytest.fixture
def gallery(tiny_engine: Engine) -> Gallery:
    found = Gallery(tiny_engine, "B", SIDE)
    assert found.add([(f"{i}.png", f"photos/{i}.png", image) for i, image in enumerate(PHOTOS)]) == []
    return found


@pytest.fixture
def asking(gallery: Gallery) -> Iterator[TestClient]:
    with TestClient(make_app(gallery, ["localhost"]), base_url="http://localhost:8700") as client:
        yield client


def features(engine: Engine) -> list[Any]:
    return [engine.encode([image], load_size=SIDE)[0] for image in PHOTOS]


def picture(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


@pytest.mark.parametrize("hierarchy", [0, 1])
def test_maps_are_the_engines_and_buddies_are_mutual(asking: TestClient, tiny_engine: Engine, hierarchy: int) -> None:
    about = asking.get("/api/about").json()
    query = {"photo": 1, "x": 30, "y": 40, "facet": "key@1", "hierarchy": hierarchy}
    maps = asking.get("/api/similarity", params=query).json()["maps"]
    a, *_ = (all_of := features(tiny_engine))[1:]
    assert [each["name"] for each in about["photos"]] == ["0.png", "1.png", "2.png"] and len(maps) == 3
    for item, found in zip(all_of, maps, strict=True):
        expected = similarity_map(a, item, facet="key@1", point_xy=(30, 40), hierarchy=hierarchy)
        values = np.frombuffer(base64.b64decode(found["values"]), np.uint8).reshape(found["grid"]) / 255
        np.testing.assert_allclose(
            found["low"] + values * (found["high"] - found["low"]), expected.values, atol=1 / 255
        )
        np.testing.assert_allclose(found["best"], expected.points_xy[0], atol=0.06)
        back = similarity_map(item, a, facet="key@1", point_xy=tuple(expected.points_xy[0]), hierarchy=hierarchy)
        assert found["mutual"] == (back.cells[0] == expected.cell_a)
        assert all(0 <= share <= 1 for share in found["covers"])
    assert maps[1]["mutual"]  # with itself


def test_matches_are_the_engines(asking: TestClient, tiny_engine: Engine) -> None:
    found = asking.get("/api/match", params={"a": 0, "b": 2, "pairs": 3, "hierarchy": 1, "facet": "key@1"}).json()
    a, _, b = features(tiny_engine)
    expected = tiny_engine.match(a, b, num_pairs=3, hierarchy=1, facet="key@1")
    np.testing.assert_allclose(found["a"], expected.points_a_xy, atol=0.06)
    np.testing.assert_allclose(found["b"], expected.points_b_xy, atol=0.06)
    assert found["confidence"] == pytest.approx(expected.confidence, abs=1e-3)


def test_masks_and_parts_lie_where_they_were_found(asking: TestClient, gallery: Gallery, tiny_engine: Engine) -> None:
    chosen = {"facet": "key@2", "threshold": 0, "votes": 30}
    found = asking.get("/api/cosegment", params=chosen).json()
    masks = tiny_engine.cosegment(
        features(tiny_engine), facet="key@2", saliency_threshold=0, votes_percentage=30,
        sample_interval=gallery._interval, refine="none",
    )  # fmt: skip
    assert found["clusters"] == len(masks.clustering.centroids)
    for overlay, mask in zip(found["overlays"], masks, strict=True):
        drawn = picture(overlay)[..., 3] > 0
        assert drawn.shape == mask.mask.shape and (drawn == mask.mask).mean() > 0.9  # but for smooth borders
    parts = asking.get("/api/parts", params={"facet": "key@2", "threshold": 0, "parts": 2}).json()
    assert len(parts["overlays"]) == 3


def test_components_and_objects(asking: TestClient, tiny_engine: Engine) -> None:
    joint, alone = (asking.get("/api/pca", params={"facet": "key@1", "joint": each}).json() for each in (1, 0))
    assert joint["overlays"] != alone["overlays"] and sum(joint["shares"]) <= 1
    found = asking.get("/api/discover", params={"method": "lost"}).json()
    expected = tiny_engine.discover(features(tiny_engine), "lost")
    assert found["boxes"] == [each.boxes.round(1).tolist() for each in expected]


def test_photographs_that_are_dropped(asking: TestClient, tiny_engine: Engine) -> None:
    """Whose name is text and whose place nobody knows."""
    file = io.BytesIO()
    Image.fromarray(photo(64, 72, 5)).save(file, format="PNG")
    about = asking.post("/api/photos", params={"name": NAME}, content=file.getvalue()).json()
    assert about["photos"][3] == {"id": 3, "name": NAME, "place": None, "height": 64, "width": 72}
    shown = asking.get("/api/photo/3")
    assert shown.headers["content-type"] == "image/jpeg" and shown.headers["x-content-type-options"] == "nosniff"
    refused = asking.post("/api/photos", params={"name": "x.png"}, content=b"no image")
    assert refused.status_code == 400 and "x.png is not an image" in refused.json()["error"]


def test_what_is_too_much(asking: TestClient, gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UPLOAD", 10)
    assert "more than 0 MiB" in asking.post("/api/photos", content=b"x" * 11).json()["error"]
    monkeypatch.setattr("facetrt.engine.inspector.gallery.MAX_PHOTOS", 3)
    with pytest.raises(InputError, match="3 photographs are shown already"):
        gallery.add([("more.png", None, PHOTOS[0])])


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/api/similarity?photo=7", "photograph 7: expected one of 3"),
        ("/api/similarity?photo=0&x=nan&y=0", "expected finite pixel coordinates"),
        ("/api/similarity?photo=0&x=1&y=1&facet=key@9", "key@9 was not exported"),
        ("/api/similarity?photo=one", "photo='one': expected a number"),
        ("/api/match?a=0&b=1&pairs=0", "num_pairs=0: expected"),
        ("/api/discover?method=sew", "sew"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(asking: TestClient, path: str, said: str) -> None:
    answer = asking.get(path)
    assert answer.status_code == 400 and said in answer.json()["error"]


def test_only_its_own_page_asks(asking: TestClient) -> None:
    assert asking.get("/api/about", headers={"host": "evil.example"}).status_code == 400
    foreign = asking.get("/api/about", headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403 and "evil.example" in foreign.json()["error"]
    assert asking.get("/api/about", headers={"origin": "http://localhost:8700"}).status_code == 200
    page = asking.get("/")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.js", "page.css"):
        assert f"/{name}" in page.text and asking.get(f"/{name}").status_code == 200
    assert not (set(Path(server.PAGE).iterdir()) - {server.PAGE / name for name in server.FILES.values()})
    for file in Path(server.PAGE).iterdir():  # nothing is asked of anybody else
        assert "https://" not in (text := file.read_text()) and text.count("http://") == text.count("http://www.w3.org")
