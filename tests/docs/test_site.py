"""The documentation as a site: it builds without a warning, has every public name, and asks no other host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import facetrt.engine
import facetrt.export
import facetrt.kernels

pytest.importorskip("mkdocs_same_dir", reason="the extra docs is not installed")

CONFIGURATION = Path(__file__).parents[2] / "docs" / "mkdocs.yml"
LOADED = dict.fromkeys(("script", "img", "iframe", "source", "video", "audio"), "src") | {"link": "href"}
QUIET = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = ["build", "--strict", "--quiet", "-f", str(CONFIGURATION), "-d", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *command], env=os.environ | QUIET, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


class Loads(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if given.get("rel") == "canonical":
            return
        self.urls += [url for url in (given.get(LOADED.get(tag, "")), given.get("srcset")) if url]


def test_pages_ask_no_other_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        elsewhere = [url for url in Loads(page).urls if re.match(r"(https?:)?//", url)]
        assert not elsewhere, (page, elsewhere)
        assert 'class="mermaid"' not in page.read_text(), "diagrams are drawn by a script from elsewhere"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style


@pytest.mark.parametrize("module", [facetrt.engine, facetrt.kernels, facetrt.export])
def test_every_public_name_is_documented(site: Path, module: object) -> None:
    name = getattr(module, "__name__")  # noqa: B009
    page = (site / "api" / f"{name.rpartition('.')[2]}.html").read_text()
    public = [public for public in getattr(module, "__all__") if not public.startswith("__")]  # noqa: B009
    assert public
    documented = {heading.rpartition(".")[2] for heading in re.findall(rf'<h[23] id="({name}\.[\w.]+)"', page)}
    assert not [each for each in public if each not in documented]
    assert ":meth:" not in page and ":class:" not in page and ":func:" not in page


def test_the_pages_own_tools_are_not_published(site: Path) -> None:
    assert not [path for path in site.rglob("*") if path.suffix in (".py", ".yml", ".md")]
