"""How ``auto`` and ``fastest`` are resolved."""

from __future__ import annotations

from pathlib import Path

import pytest

from facetrt.engine import Engine, InputError
from facetrt.engine.backends import choice as module
from facetrt.engine.backends.choice import choose_backend, choose_precision
from facetrt.engine.backends.run_options import BackendName, Hint, Precision

AUTO, ORT, OPENVINO = BackendName.AUTO, BackendName.ONNXRUNTIME, BackendName.OPENVINO
FP32, FP16, BF16, FASTEST = Precision.FP32, Precision.FP16, Precision.BF16, Precision.FASTEST


@pytest.mark.parametrize(
    ("asked", "own", "backend", "there", "bf16", "expected"),
    [
        (Precision.AUTO, FP32, AUTO, True, True, FP32),  # never lowered without being asked
        (Precision.AUTO, FP16, AUTO, True, True, FP16),
        (BF16, FP32, AUTO, False, False, BF16),  # asked for: an error comes later, not another precision
        (FASTEST, FP32, AUTO, True, True, BF16),
        (FASTEST, FP32, OPENVINO, True, True, BF16),
        (FASTEST, FP32, ORT, True, True, FP32),
        (FASTEST, FP32, AUTO, False, True, FP32),
        (FASTEST, FP32, AUTO, True, False, FP32),
        (FASTEST, FP16, AUTO, True, True, FP16),
    ],
)
def test_precision(
    monkeypatch: pytest.MonkeyPatch,
    asked: Precision, own: Precision, backend: BackendName, there: bool, bf16: bool, expected: Precision,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "installed", lambda name: there)
    monkeypatch.setattr(module, "runs_bf16", lambda: bf16)
    assert choose_precision(asked, own, backend) is expected
    assert choose_precision(asked, own, backend, keeps_bf16=False) is (own if asked is FASTEST else expected)


@pytest.mark.parametrize(
    ("asked", "precision", "hint", "there", "expected"),
    [
        (AUTO, FP32, Hint.LATENCY, {"onnxruntime", "openvino"}, ORT),
        (AUTO, FP32, Hint.LATENCY, {"openvino"}, OPENVINO),
        (AUTO, FP32, Hint.LATENCY, set(), ORT),
        (AUTO, FP16, Hint.LATENCY, {"openvino"}, ORT),
        (AUTO, BF16, Hint.LATENCY, {"onnxruntime", "openvino"}, OPENVINO),
        (AUTO, FP32, Hint.THROUGHPUT, {"onnxruntime", "openvino"}, OPENVINO),
        (ORT, BF16, Hint.LATENCY, {"openvino"}, ORT),
        (OPENVINO, FP32, Hint.LATENCY, set(), OPENVINO),
    ],
)
def test_backend(
    monkeypatch: pytest.MonkeyPatch,
    asked: BackendName, precision: Precision, hint: Hint, there: set[str], expected: BackendName,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "installed", lambda name: name in there)
    assert choose_backend(asked, precision, hint) is expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tpu"}, "backend 'tpu': expected one of auto, onnxruntime"),
        ({"device": "tpu"}, "device 'tpu': expected one of auto, cpu, cuda"),
        ({"precision": "int8"}, "precision 'int8': expected one of"),
        ({"hint": "speed"}, "expected latency or throughput"),
        ({"threads": 0}, "threads=0: expected 1 to"),
        ({"threads": 100_000}, "threads=100000: expected 1 to"),
        ({"backend": "onnxruntime", "precision": "bf16"}, "runs a bundle in its own precision, fp32, and bf16"),
        ({"precision": "fp16"}, "runs a bundle in its own precision, fp32, and fp16"),
        ({"backend": "onnxruntime", "hint": "throughput"}, "use hint latency, or backend openvino"),
    ],
)
def test_what_cannot_be(tiny_bundle: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine.open(tiny_bundle, **options)  # type: ignore[arg-type]


def test_a_cache_that_serves_nothing_is_said(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the cache is not used"), Engine.open(tiny_bundle, cache=tmp_path):
        pass
