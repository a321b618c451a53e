from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from helpers import TINY, deterministic_weights, export_tiny, facets, photo

from facetrt.engine import Engine, InputError, MissingFileError, OutputError, ParityError
from facetrt.engine.backends import parity
from facetrt.engine.backends.onnxruntime import OnnxRuntimeBackend
from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.export import exporting
from facetrt.export.encoder import FacetEncoder
from facetrt.export.export_options import ExportOptions, Facet, GraphPrecision
from facetrt.export.exporting import export_bundle, load_model, resolve_options
from facetrt.export.models import MODELS, find_model
from facetrt.export.reference import ReferenceModel
from facetrt.export.weights import fetch_checkpoint, load_strictly, load_weights

SIZES = [(48, 48), (61, 83), (104, 40), (8, 8)]


def operators(bundle: Path) -> list[str]:
    return [node.op_type for node in onnx.load(bundle / "encoder.onnx").graph.node]


def weight_count(bundle: Path) -> int:
    return sum(int(np.prod(t.dims)) for t in onnx.load(bundle / "encoder.onnx").graph.initializer)


@pytest.mark.parametrize("size", SIZES)
def test_dynamic_equals_the_torch_model_at_other_sizes(
    tiny_weights: Path, tiny_bundle: Path, tiny_engine: Engine, size: tuple[int, int]
) -> None:
    vit, _ = load_model(TINY, tiny_weights)
    names = tiny_engine.manifest.facets
    reference = ReferenceModel(vit, TINY, stride=4, saliency_heads=[0, 1, 2])
    expected = reference.run(photo(*size), [Facet.parse(name) for name in names])
    got = tiny_engine.encode([photo(*size)], load_size=None)[0]
    for name in names:
        np.testing.assert_allclose(got.tokens[name], expected[name], atol=1e-4)
    assert got.attention is not None
    np.testing.assert_allclose(got.attention.ravel(), expected["cls_attention"], atol=1e-6)


def test_only_what_the_outputs_need_is_in_the_graph(work: Path, tiny_weights: Path) -> None:
    one = export_tiny(tiny_weights, work / "one", facets=facets("key@0"), saliency=False)
    two = export_tiny(tiny_weights, work / "two", facets=facets("key@1"), saliency=False)
    with_saliency = export_tiny(tiny_weights, work / "three", facets=facets("key@1"))
    dim, patch = TINY.dim, 3 * TINY.patch**2 * TINY.dim
    projection = dim * dim
    assert patch + projection <= weight_count(one) < patch + 1.5 * projection  # a third of one qkv, nothing else
    block = 12 * projection
    assert weight_count(one) + block <= weight_count(two) < weight_count(one) + 1.1 * block
    attentions = [operators(bundle).count("MultiHeadAttention") for bundle in (one, two, with_saliency)]
    assert attentions == [0, 1, 2]
    assert [operators(bundle).count("Softmax") for bundle in (one, two, with_saliency)] == [0, 0, 1]
    last = 2 * projection  # keys, and queries for [CLS]; no values, no MLP
    assert weight_count(two) + block - projection + last - 100 <= weight_count(with_saliency)
    assert weight_count(with_saliency) < weight_count(two) + 1.1 * block + last


def test_saliency_never_makes_the_whole_attention_of_the_last_layer(work: Path, tiny_weights: Path) -> None:
    bundle = export_tiny(tiny_weights, work / "row", facets=facets("key@0"))
    graph = onnx.shape_inference.infer_shapes(onnx.load(bundle / "encoder.onnx")).graph
    shapes = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    softmaxes = [shapes.get(node.output[0]) for node in graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 1 and softmaxes[0] is not None
    assert softmaxes[0][2] == 1  # one query row: [CLS]
    assert not any(node.op_type in ("If", "Loop", "Resize") for node in graph.node)


def test_the_body_of_the_attention_function_is_the_same_attention(tiny_bundle: Path, tiny_engine: Engine) -> None:
    """Runtimes without a kernel of that name read the body: inlined, the graph must give the same numbers."""
    inlined = onnx.inliner.inline_local_functions(onnx.load(tiny_bundle / "encoder.onnx"))
    assert not inlined.functions and "MultiHeadAttention" not in {node.op_type for node in inlined.graph.node}
    assert sum(node.op_type == "Softmax" for node in inlined.graph.node) == 4  # three blocks, [CLS]
    opened = Bundle.open(tiny_bundle)
    plain = OnnxRuntimeBackend(replace(opened, encoder=inlined.SerializeToString()), RunOptions())
    rng = np.random.default_rng(0)
    inputs = {
        "images": rng.integers(0, 256, (2, 36, 52, 3), np.uint8),
        "positional": rng.standard_normal((1, 8, 12, TINY.dim)).astype(np.float32),
        "rows": np.arange(8),
        "cols": np.arange(12),
    }
    fused = tiny_engine._encoder.backend.run(inputs)
    for name, values in plain.run(inputs).items():
        np.testing.assert_allclose(fused[name], values, atol=1e-5)


def test_half_precision_calls_the_attention_kernel_and_its_formula_sums_in_fp32(work: Path, tiny_weights: Path) -> None:
    """ONNX Runtime runs its kernel, which holds no t × t matrix; who inlines the function gets an fp32 softmax."""
    bundle = export_tiny(tiny_weights, work / "half-plain", facets=facets("key@1"), precision=GraphPrecision.FP16)
    model = onnx.load(bundle / "encoder.onnx")
    (body,) = model.functions
    makers = {name: node for node in body.node for name in node.output}
    (softmax,) = [node for node in body.node if node.op_type == "Softmax"]
    before = makers[softmax.input[0]]
    assert before.op_type == "Cast" and before.attribute[0].i == onnx.TensorProto.FLOAT
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(work / "half-optimised.onnx")
    onnxruntime.InferenceSession(bundle / "encoder.onnx", options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(work / "half-optimised.onnx")
    assert [node.op_type for node in optimised.graph.node].count("MultiHeadAttention") == 2


def test_uint8_goes_in_and_opset_is_recorded(tiny_bundle: Path, tiny_engine: Engine) -> None:
    model = onnx.load(tiny_bundle / "encoder.onnx")
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    assert kinds["images"] == onnx.TensorProto.UINT8 and kinds["positional"] == onnx.TensorProto.FLOAT
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert opsets[""] == tiny_engine.manifest.opset == 18
    assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)


def test_fp16_holds_its_contract_and_keeps_fp32_islands(work: Path, tiny_weights: Path, tiny_engine: Engine) -> None:
    bundle = export_tiny(tiny_weights, work / "half", precision=GraphPrecision.FP16, facets=facets("key@1,token@2"))
    graph = onnx.load(bundle / "encoder.onnx").graph
    halves = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT16 and len(t.dims) == 2]
    assert len(halves) >= 3 * 3 and (bundle / "encoder.onnx").stat().st_size < 400_000
    image = photo(72, 56)
    with Engine.open(bundle) as engine:
        got = engine.encode([image], load_size=None)[0]
        assert engine.manifest.precision == "fp16"
    metrics = parity.compare_output(got["token@2"], tiny_engine.encode([image], load_size=None)[0]["token@2"])
    assert metrics["mean_cosine"] >= 0.999 and metrics["p1_cosine"] >= 0.995 and metrics["relative_frobenius"] <= 0.01


def test_the_report_is_in_the_manifest(tiny_engine: Engine) -> None:
    report = tiny_engine.manifest.parity
    assert set(report.outputs) == {"key@1", "query@1", "key@2", "token@2", "cls_attention"}
    assert len(report.cases) == 5 and any("noise" in case for case in report.cases)
    for name, metrics in report.outputs.items():
        assert metrics["relative_frobenius"] <= 1e-5 and metrics["mean_cosine"] >= 0.999999
        figures = ["saliency_error"] if name == "cls_attention" else ["error", "bias", "max_error", "cls_error"]
        assert all(0 < metrics[figure] < 1e-4 and 0 < metrics[f"torch_{figure}"] < 1e-4 for figure in figures)


def test_a_graph_that_misses_its_contract_is_not_written(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FacetEncoder.forward

    def wrong(
        self: FacetEncoder, images: torch.Tensor, positional: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return tuple(output * 1.01 for output in original(self, images, positional, rows, cols))

    monkeypatch.setattr(exporting, "FacetEncoder", type("Wrong", (FacetEncoder,), {"forward": wrong}))
    with pytest.raises(ParityError, match=r"does not reproduce the model: .* no bundle was written"):
        export_bundle("tiny", tmp_path / "out", ExportOptions(saliency=False), weights=tiny_weights)
    assert list(tmp_path.iterdir()) == []


def test_nan_never_passes(tmp_path: Path) -> None:
    good = np.ones((3, 4), np.float32)
    bad = good.copy()
    bad[1] = np.nan
    with pytest.raises(ParityError, match="NaN"):
        parity.compare_output(bad, good)
    report = parity.compare_output(good, good)
    merged = parity.worst([{"key@0": report}, {"key@0": report | {"relative_frobenius": float("nan")}}])
    with pytest.raises(ParityError):
        parity.check(merged, GraphPrecision.FP16)


def test_a_wrong_layer_head_or_table_would_be_seen(tiny_weights: Path) -> None:
    vit, _ = load_model(TINY, tiny_weights)
    names = [Facet.parse("key@1")]
    right = ReferenceModel(vit, TINY, stride=4, saliency_heads=[0, 1]).run(photo(61, 83), names)
    for other in (
        ReferenceModel(vit, TINY, stride=4, saliency_heads=[0, 2]).run(photo(61, 83), names),
        ReferenceModel(vit, TINY, stride=4, saliency_heads=[0, 1]).run(photo(61, 83), [Facet.parse("key@2")]),
    ):
        metrics = parity.compare(dict(zip(right, other.values(), strict=True)), right)
        assert max(m["relative_frobenius"] for m in metrics.values()) > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"facets": facets("key@3")}, "key@3: tiny has layers 0 to 2"),
        ({"stride": 3}, "stride 3 does not divide the patch size 8"),
        ({"saliency_heads": (7,)}, "saliency heads 7: tiny has heads 0 to 2"),
        ({"size": (4, 40)}, "smaller than one patch"),
        ({"size": (100_000, 100_000)}, "use a smaller --size"),
        ({"saliency_heads": (0, 0)}, "named twice"),
        ({"saliency_heads": (0,), "saliency": False}, "give one"),
    ],
)
def test_options_the_model_does_not_have(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_options(TINY, ExportOptions(**options))


@pytest.mark.parametrize("text", ["key", "keys@9", "key@", "key@-1", "key@9 ", "9@key"])
def test_facets_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InputError, match="expected key, query, value, token or normed"):
        Facet.parse(text)


def test_models_and_their_saliency_heads() -> None:
    assert find_model("dino_vits8").saliency_heads == (0, 2, 4, 5)
    assert resolve_options(find_model("dino_vits16"), ExportOptions()).saliency_heads == tuple(range(6))
    assert find_model("vit_base_patch16_224").normalisation[0] == (0.5, 0.5, 0.5)
    assert [str(f) for f in resolve_options(find_model("dino_vitb8"), ExportOptions()).facets or ()] == [
        "key@9",
        "key@11",
    ]
    with pytest.raises(InputError, match="did you mean dino_vits8 or"):
        find_model("dino_vits9")


def test_output_exists(tiny_bundle: Path, tiny_weights: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        export_bundle("tiny", tiny_bundle, weights=tiny_weights)


def test_loading_is_strict() -> None:
    state = {name: torch.from_numpy(value) for name, value in deterministic_weights(TINY).items()}
    load_strictly(TINY.build(), state, "x.pth")
    extra = state | {"reg_token": torch.zeros(1, 4, 48), "dist_token": torch.zeros(1, 1, 48)}
    del extra["norm.bias"]
    extra["cls_token"] = torch.zeros(1, 1, 50)
    with pytest.raises(InputError) as caught:
        load_strictly(TINY.build(), extra, "x.pth")
    for part in (
        "1 missing: norm.bias",
        "2 extra: dist_token, reg_token",
        "cls_token (1, 1, 50) instead of (1, 1, 48)",
    ):
        assert part in str(caught.value)


def test_timm_supervised_models_have_their_two_head_tensors_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    spec, notes = find_model("vit_small_patch16_224"), list[str]()
    published = timm.create_model("vit_small_patch16_224", pretrained=False)
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: published)
    vit, _ = load_model(spec, None, report=notes.append)
    assert torch.equal(vit.blocks[11].attn.qkv.weight, published.blocks[11].attn.qkv.weight)
    assert len(notes) == 1 and notes[0].endswith("not used: 2 tensors of heads (head.bias, head.weight)")


def test_dino_weights_do_not_pass_for_supervised_ones() -> None:
    import timm

    for size, patch in (("small", 16), ("base", 8), ("base", 16)):
        name = find_model(f"vit_{size}_patch{patch}_224").timm_name
        assert name is not None and name in timm.list_pretrained(f"vit_{size}_patch{patch}_224*")
        assert timm.get_pretrained_cfg(name).mean == (0.5, 0.5, 0.5)
    with pytest.raises(MissingFileError, match="no supervised checkpoint of vit_small_patch8_224"):
        load_weights(find_model("vit_small_patch8_224"), None)


def test_timm_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*arguments: object, **options: object) -> None:
        raise OSError("Network is unreachable\nlong explanation")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        MissingFileError,
        match=r"Network is unreachable\. They are published on .* timm/vit_base_patch16_224.* --weights",
    ):
        load_weights(find_model("vit_base_patch16_224"), None)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A local web server with one checkpoint, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "tiny.pth").write_bytes(b"x" * 5000)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "www"), **options)  # type: ignore[arg-type]

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_downloads_are_cached_checked_and_reported(server: str) -> None:
    calls: list[tuple[int, int | None]] = []
    spec = replace(TINY, url=f"{server}/tiny.pth", published_bytes=5000)
    path = fetch_checkpoint(spec, lambda done, total: calls.append((done, total)))
    assert path.read_bytes() == b"x" * 5000 and calls == [(5000, 5000)]
    assert fetch_checkpoint(replace(spec, url="http://127.0.0.1:9/tiny.pth")) == path  # from the cache
    with pytest.raises(InputError, match=r"has 5,000 bytes; the published checkpoint of tiny has 6,000"):
        fetch_checkpoint(replace(spec, published_bytes=6000))
    with pytest.raises(InputError, match="SHA-256"):
        fetch_checkpoint(replace(spec, published_sha256="0" * 64))
    assert [p.name for p in path.parent.iterdir()] == ["tiny.pth"]


def test_failed_downloads_say_what_to_do_and_leave_nothing(server: str, tmp_path: Path) -> None:
    for url in (f"{server}/none.pth", "http://127.0.0.1:9/none.pth"):
        with pytest.raises(MissingFileError) as caught:
            fetch_checkpoint(replace(TINY, url=url))
        for part in (url, str(tmp_path / "cache" / "facetrt" / "none.pth"), "--weights"):
            assert part in str(caught.value)
    assert list((tmp_path / "cache" / "facetrt").iterdir()) == []


def test_all_models_are_named_after_what_they_are() -> None:
    assert set(MODELS) >= {
        "dino_vits8", "dino_vits8_300ep", "dino_vits16", "dino_vitb8", "dino_vitb16", "builtin",
        "vit_small_patch8_224", "vit_small_patch16_224", "vit_base_patch8_224", "vit_base_patch16_224",
    }  # fmt: skip
    assert find_model("dino_vits8").url != find_model("dino_vits8_300ep").url
