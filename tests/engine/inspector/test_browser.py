"""The page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import base64
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import uvicorn
from helpers import photo

from facetrt.engine import Engine, similarity_map
from facetrt.engine.inspector.gallery import Gallery
from facetrt.engine.inspector.server import make_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no chromium on the path", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")

NAME = '<b id="markup">bold</b>.png'
COLUMN = "(canvas) => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)"


@pytest.fixture
def address(tiny_engine: Engine) -> Iterator[str]:
    gallery = Gallery(tiny_engine, "B", 64)
    gallery.add([("one.png", "one.png", photo(70, 90)), (NAME, None, photo(80, 66, 1))])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(make_app(gallery, ["127.0.0.1"]), log_level="error", lifespan="off")
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        running.should_exit = True
        thread.join(10)


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(address)
        page.get_by_text("best budd").first.wait_for()
        yield page
        assert page.complaints == []
        browser.close()


def test_a_click_shows_what_the_engine_finds(page: Any, tiny_engine: Engine) -> None:
    first = page.locator("[data-photo='0'] button")
    box = first.bounding_box()
    with page.expect_response("**/api/similarity*") as answered:
        first.click(position={"x": box["width"] / 3, "y": box["height"] / 2})
    maps = answered.value.json()["maps"]
    assert "photo=0&x=30&y=35" in page.url or "x=30" in page.url
    a, b = (tiny_engine.encode([image], load_size=64)[0] for image in (photo(70, 90), photo(80, 66, 1)))
    expected = similarity_map(a, b, facet=tiny_engine.manifest.default_facet("match"), point_xy=(30, 35)).values
    shown = np.frombuffer(base64.b64decode(maps[1]["values"]), np.uint8).reshape(maps[1]["grid"])
    scaled = (expected - expected.min()) / np.ptp(expected) * 255
    np.testing.assert_allclose(shown, scaled, atol=1)
    page.wait_for_timeout(200)
    pixels = np.array(page.locator("[data-photo='1'] canvas").evaluate(COLUMN)).reshape(*expected.shape, 4)
    brightest = np.unravel_index(pixels[..., 0].argmax(), expected.shape)  # yellow: the colour of the largest
    assert expected[brightest] > np.quantile(expected, 0.98)


def test_the_keyboard_moves_the_point_and_the_address_brings_it_back(page: Any, address: str) -> None:
    page.locator("[data-photo='0'] button").focus()
    with page.expect_response("**/api/similarity*"):
        page.keyboard.press("ArrowRight")
    assert "x=47" in page.url
    kept = page.url
    page.get_by_role("tab", name="Similarity").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("confidence").wait_for()
    assert page.get_by_role("tab", name="Matches").get_attribute("aria-selected") == "true"
    page.go_back()
    page.get_by_text("best budd").first.wait_for()
    assert page.url == kept


def test_names_are_text_and_nothing_is_wider_than_a_phone(page: Any) -> None:
    assert page.locator("#markup").count() == 0
    assert page.get_by_text(NAME, exact=True).count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_calls_to_copy_and_photographs_to_add(page: Any) -> None:
    page.get_by_role("button", name="Copy as command line").click()
    page.wait_for_timeout(100)
    assert page.locator("#code").text_content().startswith("facetrt similarity one.png")
    png = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    page.set_input_files("#files", {"name": "dot.png", "mimeType": "image/png", "buffer": b"no image"})
    page.get_by_text("dot.png is not an image").wait_for()
    page.complaints.clear()  # the browser's own line about the answer 400
    page.set_input_files("#files", {"name": "small.png", "mimeType": "image/png", "buffer": png})
    page.get_by_text("small.png").first.wait_for()
    page.complaints.clear()
