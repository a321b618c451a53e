from __future__ import annotations

import hashlib
import importlib.util
import io
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import export_tiny, facets, photo, require_openvino
from PIL import Image

from facetrt.engine import BackendError, Engine, Features, InputError, SaliencyMode
from facetrt.engine.encoding import encoder as module
from facetrt.engine.encoding.encoder import EncodeOptions
from facetrt.engine.machine import memory
from facetrt.kernels.machine import Memory


def test_features_have_the_documented_shapes(tiny_engine: Engine) -> None:
    features = tiny_engine.encode([photo(70, 93)], load_size=None)[0]
    assert (
        features.grid == (16, 22) and features.image_size == (70, 93) and features.stride == 4 and features.patch == 8
    )
    assert features["key@1"].shape == (352, 48) and features["key@1"].dtype == np.float32
    assert features.cls("key@1").shape == (48,) and features.map("key@1").shape == (16, 22, 48)
    assert features.saliency.shape == (16, 22) and features.saliency.min() == 0 and features.saliency.max() == 1
    assert features.facets == ["key@1", "query@1", "key@2", "token@2"]
    assert features.provenance.backend == "onnxruntime" and features.provenance.model == "tiny"


def test_a_batch_equals_singles_and_keeps_the_order(tiny_engine: Engine) -> None:
    images = [photo(*size, seed=i) for i, size in enumerate([(64, 64), (40, 72), (64, 64), (64, 64), (40, 72)])]
    together = tiny_engine.encode(images, load_size=None)
    for image, features in zip(images, together, strict=True):
        alone = tiny_engine.encode([image], load_size=None)[0]
        np.testing.assert_array_equal(features.pixels, image)
        np.testing.assert_allclose(features["token@2"], alone["token@2"], atol=2e-5)
        np.testing.assert_allclose(features.saliency, alone.saliency, atol=1e-4)


def test_images_in_any_form_give_the_same_features(tiny_engine: Engine, tmp_path: Path) -> None:
    pixels = photo(40, 48)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    with (tmp_path / "a.png").open("rb") as opened:
        forms = [pixels, data, io.BytesIO(data), opened, Image.fromarray(pixels), tmp_path / "a.png"]
        if importlib.util.find_spec("torch"):
            import torch

            forms.append(torch.from_numpy(pixels.copy()))
        found = tiny_engine.encode(forms, load_size=None)
    for features in found:
        np.testing.assert_array_equal(features.saliency, found[0].saliency)
    assert len(tiny_engine.match(data, io.BytesIO(data), load_size=40).points_a_xy) > 0


@pytest.mark.parametrize("kind", ["bytes", "file", "array", "path", "image"])
def test_one_image_is_no_list(tiny_engine: Engine, tmp_path: Path, kind: str) -> None:
    one = {
        "bytes": b"", "file": io.BytesIO(), "array": photo(8, 8), "path": tmp_path, "image": Image.new("RGB", (8, 8))
    }[kind]  # fmt: skip
    with pytest.raises(InputError, match=r"write \[image\]"):
        tiny_engine.encode(one)  # type: ignore[arg-type]


def test_a_batch_in_one_array_says_how_it_becomes_a_list(tiny_engine: Engine) -> None:
    images = np.stack([photo(32, 40), photo(32, 40)])
    for given, how in ((images, "list(images)"), (images.transpose(0, 3, 1, 2), "list(images.transpose(0, 2, 3, 1))")):
        with pytest.raises(InputError, match=re.escape(how)):
            tiny_engine.encode(given)
        assert len(tiny_engine.encode(eval(how, {"images": given}), load_size=None)) == 2


def test_trailing_pixels_are_unused(tiny_engine: Engine) -> None:
    image = photo(67, 66)
    changed = image.copy()
    changed[64:], changed[:, 64:] = 0, 255
    a, b = (tiny_engine.encode([pixels], load_size=None)[0] for pixels in (image, changed))
    assert a.geometry.unused_pixels == (3, 2)
    np.testing.assert_array_equal(a["key@2"], b["key@2"])


def test_windows_and_progress(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 2)
    calls: list[tuple[int, int]] = []
    images = [photo(32, 32, seed) for seed in range(5)]
    found = tiny_engine.encode(images, load_size=None, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (5, 5) and len(found) == 5
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_generators_are_read_a_window_at_a_time(tiny_engine: Engine) -> None:
    consumed = []

    def frames() -> Iterator[np.ndarray]:
        for i in range(10_000_000):
            consumed.append(i)
            yield photo(32, 32, i % 3)

    stream = tiny_engine.encode_iter(frames(), load_size=None)
    first = next(stream)
    assert first.grid == (7, 7) and len(consumed) == module.WINDOW
    stream.close()
    totals: list[int | None] = []
    tiny_engine.encode(
        (photo(32, 32) for _ in range(2)), load_size=None, progress=lambda done, total: totals.append(total)
    )
    assert totals == [None]


def test_windows_are_bounded_by_what_their_features_take(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_BYTES", 1)
    consumed: list[int] = []
    images = (consumed.append(i) or photo(32, 32, i) for i in range(5))
    next(tiny_engine.encode_iter(images, load_size=None))
    assert len(consumed) == 1


def test_static_equals_dynamic(work: Path, tiny_weights: Path, tiny_engine: Engine) -> None:
    size = (52, 83)  # neither square nor divisible
    bundle = export_tiny(tiny_weights, work / "static", size=size, facets=facets("key@1,token@2"))
    image = photo(*size)
    expected = tiny_engine.encode([image], load_size=None)[0]
    with Engine.open(bundle) as engine:
        got = engine.encode([image, image], load_size=None)
        for features in got:
            np.testing.assert_allclose(features["token@2"], expected["token@2"], atol=1e-4)
            np.testing.assert_allclose(features["key@1"], expected["key@1"], atol=1e-4)
            np.testing.assert_allclose(features.saliency, expected.saliency, atol=1e-4)
        with pytest.raises(InputError, match=r"built for 52×83: use load size 52x83, or export with --dynamic"):
            engine.encode([image], load_size=40)
        with pytest.raises(InputError, match="low-resolution saliency"):
            engine.cosegment([image, image], load_size=None, facet="key@1")


def test_low_resolution_saliency_is_a_stride_8_pass_at_half_size(
    work: Path, tiny_weights: Path, tiny_engine: Engine
) -> None:
    stride8 = export_tiny(tiny_weights, work / "stride8", stride=8, facets=facets("key@2"))
    image = photo(120, 168)
    low = tiny_engine.encode([image], load_size=60, saliency="low_resolution")[0]
    full = tiny_engine.encode([image], load_size=60)[0]
    with Engine.open(stride8) as engine:
        half = engine.encode([image], load_size=(30, 42))[0]
    assert half.grid == (3, 5) and low.grid == (14, 20) and low.saliency_mode is SaliencyMode.LOW_RESOLUTION
    assert low.attention is not None and half.attention is not None
    rows = ((np.arange(14) + 0.5) * 3 / 14).astype(int)  # no ties at these sizes
    columns = ((np.arange(20) + 0.5) * 5 / 20).astype(int)
    np.testing.assert_allclose(low.attention, half.attention[np.ix_(rows, columns)], rtol=1e-4)
    np.testing.assert_array_equal(low["key@2"], full["key@2"])
    assert not np.allclose(low.saliency, full.saliency)


def test_a_larger_stride_of_one_bundle(work: Path, tiny_weights: Path, tiny_engine: Engine) -> None:
    stride8 = export_tiny(tiny_weights, work / "eight", stride=8, facets=facets("token@2"))
    image = photo(61, 83)
    got = tiny_engine.encode([image], load_size=None, stride=8)[0]
    with Engine.open(stride8) as engine:
        expected = engine.encode([image], load_size=None)[0]
    assert got.stride == 8 and got.grid == expected.grid == (7, 10)
    np.testing.assert_allclose(got["token@2"], expected["token@2"], atol=1e-4)
    np.testing.assert_allclose(got.saliency, expected.saliency, atol=1e-4)
    with pytest.raises(InputError, match="stride 6: this bundle can run at stride 4 or 8"):
        tiny_engine.encode([image], stride=6)


def test_saliency_of_a_constant_image_is_zero_or_finite(tiny_engine: Engine) -> None:
    features = tiny_engine.encode([np.zeros((8, 8, 3), np.uint8)], load_size=None)[0]
    assert features.grid == (1, 1)
    np.testing.assert_array_equal(features.saliency, [[0]])


def test_bad_images_and_options(tiny_engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="smaller than one patch"):
        tiny_engine.encode([photo(7, 40)], load_size=None)
    with pytest.raises(InputError, match=r"write \[image\]"):
        tiny_engine.encode(photo(40, 40))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"write \[image\]"):
        tiny_engine.encode("a.png")
    with pytest.raises(InputError, match=r"write list\(images\)"):
        tiny_engine.encode(np.zeros((2, 40, 40, 3), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"write \[image\]"):
        tiny_engine.encode(Image.new("RGB", (40, 40)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is a NoneType: expected a path"):
        tiny_engine.encode([None])  # type: ignore[list-item]
    for size in (24.5, [24, 24], (1, 2, 3), "24"):
        with pytest.raises(InputError, match="expected the shorter side, a pair"):
            tiny_engine.encode([photo(40, 40)], load_size=size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"image 0: low-resolution saliency halves the image"):
        tiny_engine.encode([photo(40, 40)], load_size=14, saliency="low_resolution")
    with pytest.raises(InputError, match="expected full or low_resolution"):
        tiny_engine.encode([photo(40, 40)], saliency="high")
    with pytest.raises(InputError, match="value@2 was not exported: this bundle has key@1"):
        _ = tiny_engine.encode([photo(40, 40)], load_size=None)[0]["value@2"]


def test_more_cells_than_memory_is_refused_before_running(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "usable_memory", lambda: Memory(1 << 20, "this container has"))
    with pytest.raises(
        InputError, match=r"841 cells at stride 4; encoding them needs about .* and this container has 1 MB"
    ):
        tiny_engine.encode([photo(120, 120)], load_size=None)


@pytest.mark.parametrize("height_width", [(100, 2000), (700, 900), (8, 8000)])
@pytest.mark.parametrize("saliency", ["full", "low_resolution"])
@pytest.mark.parametrize("stride", [4, 8])
def test_too_many_cells_are_refused_with_the_largest_load_size_that_passes(
    tiny_bundle: Path, height_width: tuple[int, int], saliency: str, stride: int
) -> None:
    image = photo(*height_width)
    with Engine.open(tiny_bundle, threads=1, max_cells=500) as engine:
        encode = partial(engine.encode, [image], saliency=saliency, stride=stride)
        with pytest.raises(InputError, match=r"pixels, which makes [\d,]+ cells; .* at most 500 are encoded") as caught:
            encode(load_size=24 if height_width[0] == 8 else 240)
        found = re.search(r"--load-size (\d+)\), or raise the bound with max_cells=\d+", str(caught.value))
        if height_width[0] == 8:
            assert found is None and "crop it" in str(caught.value)
            return
        assert found is not None
        features = encode(load_size=int(found[1]))[0]
        assert features.grid[0] * features.grid[1] <= 500
        with pytest.raises(InputError, match="at most 500"):
            encode(load_size=int(found[1]) + 1)


def test_the_bound_on_cells_passes_what_is_reasonable_and_can_be_lifted(tiny_engine: Engine, tiny_bundle: Path) -> None:
    check = tiny_engine._encoder.check_size
    options = EncodeOptions(None)
    for shape, stride in (((480, 854), 4), ((1080, 1920), 8)):
        check("image", shape, shape, None, replace(options, stride=stride))
    for shape in ((3024, 4032), (50, 20000), (1080, 1920)):
        with pytest.raises(InputError, match=r"cells; time grows with their square, and at most 32,768 are encoded"):
            check("image", shape, shape, None, options)
    check("icon", (8, 8), (224, 224), None, options)
    with pytest.raises(InputError, match=r"line is enlarged from 8×1 to 1792×224 pixels, .* 24,585 cells.* 98340\)"):
        check("line", (1, 8), (224, 1792), None, options)
    with Engine.open(tiny_bundle, max_cells=4 * 24_585) as engine:
        engine._encoder.check_size("line", (1, 8), (224, 1792), None, options)
    with Engine.open(tiny_bundle, max_cells=None) as engine:
        engine._encoder.check_size("image", (1080, 1920), (1080, 1920), None, options)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(InputError, match=r"max_cells=.*expected a number of cells"):
            Engine.open(tiny_bundle, max_cells=wrong)  # type: ignore[arg-type]


def test_the_second_pass_of_low_resolution_saliency_counts_as_well(tiny_bundle: Path) -> None:
    with Engine.open(tiny_bundle, threads=1, max_cells=225) as engine:
        encoder = engine._encoder
        coarse = EncodeOptions(None, SaliencyMode.LOW_RESOLUTION, 8)
        encoder.check_size("image", (120, 120), (120, 120), None, coarse)
        assert encoder._most_cells((120, 120), (60, 60), replace(coarse, stride=4)) == 841


def test_the_bound_holds_in_tasks_streams_and_for_features_of_another_engine(
    tiny_engine: Engine, tiny_bundle: Path
) -> None:
    images = [photo(64, 64, seed=i) for i in range(2)]
    features = tiny_engine.encode(images, load_size=64)
    with Engine.open(tiny_bundle, threads=1, max_cells=100) as engine:
        for run in (
            lambda: engine.match(*images, load_size=64),
            lambda: engine.match(*features),
            lambda: engine.cosegment(images, load_size=64),
            lambda: engine.cosegment(features, saliency="full"),
            lambda: engine.segment_parts(images, load_size=64),
            lambda: engine.collect(images, load_size=64),
            lambda: list(engine.stream(images, load_size=64)),
        ):
            with pytest.raises(InputError, match=r"225 cells; .* at most 100 are encoded"):
                run()


def test_counts_that_multiply_the_work_are_bounded(tiny_engine: Engine) -> None:
    images = [photo(40, 40)] * 2
    with pytest.raises(InputError, match="num_crop_augmentations=101: expected 0 to 100"):
        tiny_engine.segment_parts(images, num_crop_augmentations=101)
    with pytest.raises(InputError, match="num_pairs=10001: expected 1 to 10,000"):
        tiny_engine.match(*images, num_pairs=10_001)


def test_only_attention_that_is_held_in_full_grows_with_the_square_of_the_cells() -> None:
    sizes = {"dim": 384, "heads": 6}
    davis = (1 + (480 - 8) // 4) * (1 + (854 - 8) // 4)  # 480p at stride 4
    assert memory.encoding_bytes(**sizes, cells=davis, fused=True) < 2 << 30
    assert memory.encoding_bytes(**sizes, cells=davis, fused=False) > 28e9


def test_throughput_gives_the_same_features_in_order(tiny_bundle: Path, tiny_engine: Engine) -> None:
    require_openvino()
    images = [photo(48, 60 if i % 3 else 52, seed=i) for i in range(7)]
    expected = tiny_engine.encode(images, load_size=None, saliency="low_resolution")
    with Engine.open(tiny_bundle, hint="throughput") as engine:
        got = engine.encode(images, load_size=None, saliency="low_resolution")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)
        np.testing.assert_allclose(a["key@2"], b["key@2"], atol=1e-4)
        np.testing.assert_allclose(a.saliency, b.saliency, atol=1e-4)


def test_opening_options(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="backend 'tpu': expected one of"):
        Engine.open(tiny_bundle, backend="tpu")
    with pytest.raises(InputError, match="device 'npu': expected one of"):
        Engine.open(tiny_bundle, device="npu")
    with pytest.raises(InputError, match="streams=2 are parallel lanes of a GPU"):
        Engine.open(tiny_bundle, streams=2)
    with pytest.raises(InputError, match="threads=0"):
        Engine.open(tiny_bundle, threads=0)


def test_a_closed_engine_says_so(tiny_bundle: Path) -> None:
    engine = Engine.open(tiny_bundle)
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine.encode([photo(40, 40)], load_size=None)


def test_threads_share_an_engine_and_engines_share_a_process(tiny_bundle: Path, tiny_engine: Engine) -> None:
    images = [photo(48, 48, seed) for seed in range(4)]
    expected = [tiny_engine.encode([image], load_size=None)[0]["key@2"] for image in images]
    results: dict[int, np.ndarray] = {}
    with Engine.open(tiny_bundle, threads=1) as other:

        def work(i: int) -> None:
            engine = other if i % 2 else tiny_engine
            results[i] = engine.encode([images[i]], load_size=None)[0]["key@2"]

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for i, value in enumerate(expected):
        np.testing.assert_array_equal(results[i], value)


def test_one_encode_per_image_and_task(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[int, ...]] = []
    original = tiny_engine._encoder.backend.run
    monkeypatch.setattr(
        tiny_engine._encoder.backend, "run", lambda inputs: runs.append(inputs["images"].shape) or original(inputs)
    )
    tiny_engine.match(photo(48, 48), photo(48, 48, 1), load_size=None)
    assert sum(shape[0] for shape in runs) == 2
    runs.clear()
    features = tiny_engine.encode([photo(48, 48), photo(48, 48, 1)], load_size=None)
    tiny_engine.match(*features)
    tiny_engine.cosegment(features, sample_interval=5)
    assert sum(shape[0] for shape in runs) == 2


def test_features_of_another_bundle_are_refused(work: Path, tiny_weights: Path, tiny_engine: Engine) -> None:
    other = export_tiny(tiny_weights, work / "other", facets=facets("key@1"))
    with Engine.open(other) as engine:
        features = engine.encode([photo(40, 40)], load_size=None)[0]
        with pytest.raises(InputError, match="come from another bundle"):
            tiny_engine.match(features, photo(40, 40))


def test_provenance_names_the_encoder(tiny_bundle: Path, tiny_engine: Engine) -> None:
    features = tiny_engine.encode([photo(40, 40)], load_size=None)[0]
    digest = hashlib.sha256((tiny_bundle / "encoder.onnx").read_bytes()).hexdigest()
    assert features.provenance.encoder_sha256 == digest


def test_features_check_their_shapes(tiny_engine: Engine) -> None:
    features = tiny_engine.encode([photo(40, 40)], load_size=None)[0]
    with pytest.raises(InputError, match="expected 82 rows"):
        Features(**{**vars(features), "tokens": {"key@1": np.zeros((3, 4), np.float32)}})


@pytest.mark.parametrize("stride", [0, -4, 3])
def test_a_stride_that_cannot_be(tiny_engine: Engine, stride: int) -> None:
    with pytest.raises(InputError, match=f"stride {stride}: this bundle can run at stride 4 or 8"):
        tiny_engine.encode([photo(40, 40)], stride=stride)


@pytest.mark.parametrize("form", [list, iter])
def test_features_and_images_together_are_an_error(tiny_engine: Engine, form: Callable[[list[Any]], Any]) -> None:
    """None is left out silently, whatever they come in."""
    image = photo(48, 48)
    features = tiny_engine.encode([image, image], load_size=32)
    for call in (tiny_engine.cosegment, tiny_engine.segment_parts):
        with pytest.raises(InputError, match="given together"):
            call(form([*features, image]))
        with pytest.raises(InputError, match="image 1 is a Features"):
            call(form([image, *features]))


def test_a_load_size_with_features_is_an_error(tiny_engine: Engine) -> None:
    features = tiny_engine.encode([photo(48, 48), photo(48, 48, 1)], load_size=None, saliency="low_resolution")
    with tiny_engine.collect([photo(48, 48)], load_size=None) as collected:
        calls = (
            lambda size: tiny_engine.match(features[0], features[1], load_size=size),
            lambda size: tiny_engine.cosegment(features, load_size=size),
            lambda size: tiny_engine.segment_parts(collected, load_size=size),
        )
        for call in calls:
            for size in (224, 48, (48, 48)):
                with pytest.raises(InputError, match="loaded already"):
                    call(size)
    tiny_engine.match(features[0], photo(48, 48, 1), load_size=48)  # one of them is to be loaded
