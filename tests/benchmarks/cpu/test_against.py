from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from facetrt.benchmarks.cpu import against
from facetrt.benchmarks.cpu.workbench import Workbench
from facetrt.kernels.errors import InputError, MissingDependencyError, MissingFileError

EXTRACTOR = """
import torch

class ViTExtractor:
    def __init__(self, model_type, stride, model, device):
        self.model = model
    def preprocess(self, path, size):
        return torch.zeros(1, 3, *size), None
    def extract_descriptors(self, batch, layer, facet, bin=False):
        self.model(batch)
        return torch.ones(1, 1, 30, 4)
    def extract_saliency_maps(self, batch):
        return torch.ones(1, 30)
"""
CORRESPONDENCES = "from extractor import ViTExtractor\ndef chunk_cosine_sim(a, b):\n    return a @ b.transpose(2, 3)\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "extractor.py").write_text(EXTRACTOR)
    (tmp_path / "correspondences.py").write_text(CORRESPONDENCES)
    yield tmp_path
    for name in ("extractor", "correspondences"):
        sys.modules.pop(name, None)


def test_a_checkout_is_timed(checkout: Path, workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "MODEL", workbench.spec.name)
    monkeypatch.setattr(against, "SECONDS", 0)
    rows = against.measure(workbench, checkout)
    assert [(row.section, row.name) for row in rows] == [
        (section, name) for section in (against.ENCODER, against.MATCH) for name in ("facetrt fp32", against.ORIGINAL)
    ]
    assert all(row.value is not None for row in rows) and rows[2].ratios[against.ORIGINAL].median > 0
    assert rows[3].extrapolated == "rows of the similarity: 24 of 30 timed"
    assert str(checkout) not in sys.path


def test_missing_files_are_named(tmp_path: Path, workbench: Workbench) -> None:
    (tmp_path / "extractor.py").write_text("")
    with pytest.raises(MissingFileError, match=r"correspondences\.py not found"):
        against.check_checkout(tmp_path)


def test_a_missing_library_is_named(checkout: Path, workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "MODEL", workbench.spec.name)
    (checkout / "extractor.py").write_text("import no_such_library")
    with pytest.raises(MissingDependencyError, match="no_such_library"):
        against.measure(workbench, checkout)


def test_only_one_model(checkout: Path, workbench: Workbench) -> None:
    with pytest.raises(InputError, match="dino_vits8 only, and this bundle holds tiny"):
        against.measure(workbench, checkout)
