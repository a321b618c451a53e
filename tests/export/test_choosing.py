"""Which precision an export takes that is to choose one, and what it says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import facets, registered
from trained_like import SPEC, Weights, trained_like
from typer.testing import CliRunner

from facetrt.engine import Engine
from facetrt.engine.backends.run_options import Precision
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import Fp32Parts, Manifest, PrecisionRecord, Ranges, TaskAgreement
from facetrt.engine.cli.main import program
from facetrt.export import exporting
from facetrt.export.choosing import Choice, Measures, choose_precision, parts_out_of_range
from facetrt.export.export_options import ExportOptions, GraphPrecision
from facetrt.export.exporting import choose, load_model, make_sample, task_trial
from facetrt.export.precision import measure_ranges

OPTIONS = ExportOptions(stride=8, size=(48, 48), precision=GraphPrecision.AUTO)
AGREE = TaskAgreement("", {"buddies": 1.0}, {}, "")
DIFFER = TaskAgreement("", {"buddies": 0.5}, {}, "buddies 0.500 < 0.9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with registered(SPEC):
        yield tmp_path_factory.mktemp("choosing")


def chosen(folder: Path, params: Weights, **changes: Any) -> Manifest:
    """The manifest with a choice, without a graph."""
    np.savez(folder / "weights.npz", **params)
    vit, checkpoint = load_model(SPEC, folder / "weights.npz")
    options = exporting.resolve_options(SPEC, replace(OPTIONS, **changes))
    manifest = exporting._manifest(SPEC, options, checkpoint)
    sample = make_sample(vit, SPEC, manifest)
    manifest = replace(manifest, ranges=measure_ranges(exporting._reference(vit, SPEC, manifest), sample.images))
    return choose(vit, SPEC, options, manifest, sample)


def sharpen(params: Weights, blocks: range) -> Weights:
    """Logits of some 4e5, which fp16 cannot hold."""
    for block in blocks:
        for name in ("weight", "bias"):
            params[f"blocks.{block}.attn.qkv.{name}"][: 2 * SPEC.dim] *= np.float32(300)
    return params


def test_fp16_is_taken_where_it_has_room(folder: Path) -> None:
    manifest = chosen(folder, trained_like("sharp1"))
    assert manifest.precision == "fp16" and manifest.fp32_parts("fp16") == Fp32Parts()
    (candidate,) = manifest.candidates or []
    assert candidate.taken and candidate.tasks == manifest.precisions["fp16"].tasks
    assert candidate.tasks is not None and set(candidate.tasks.figures) == {
        "buddies",
        "points",
        "labels",
        "masks",
        "pca",
    }
    assert "may use 80%" in candidate.why and "16,376" in candidate.why and "tasks agree" in candidate.why


def test_logits_that_overflow_fp16_everywhere_never_get_it(folder: Path) -> None:
    manifest = chosen(folder, sharpen(trained_like("sharp1"), range(SPEC.depth)))
    assert min(manifest.ranges.logits) > 65504
    assert manifest.precision == "fp32" and manifest.precisions == {}
    first, *others = manifest.candidates or []
    assert (first.precision, first.taken) == ("fp16", False) and "too large for fp16 in" in first.why
    assert [candidate.taken for candidate in others] == [False, False, False, True]


def test_a_block_whose_logits_overflow_fp16_stays_in_fp32(folder: Path) -> None:
    manifest = chosen(folder, sharpen(trained_like("sharp1"), range(1)))  # whose inputs nothing has rounded
    taken = (manifest.candidates or [])[-1]
    assert taken.taken and taken.fp32.blocks == [0] and taken.fp32 == manifest.fp32_parts(manifest.precision)


def test_activations_that_leave_fp16_alone_get_bf16(folder: Path) -> None:
    params, values = trained_like("sharp1"), slice(2 * SPEC.dim, None)
    for block in range(SPEC.depth):  # the same function, through numbers that only bf16 holds
        for name in ("weight", "bias"):
            params[f"blocks.{block}.attn.qkv.{name}"][values] *= np.float32(2**16)
        params[f"blocks.{block}.attn.proj.weight"] *= np.float32(2**-16)
    manifest = chosen(folder, params, saliency=False)
    assert manifest.precision == "bf16" and manifest.precisions["bf16"].holds
    assert [(candidate.precision, candidate.taken) for candidate in manifest.candidates or []] == [
        ("fp16", False),
        ("bf16", True),
    ]


# ----------------------------------------------------------------------------------------------------- made-up measures
def decide(
    folder: Path,
    errors: dict[str, float],
    *,
    harmful: tuple[int, ...] = (),
    tasks: dict[str, TaskAgreement] | None = None,
    ranges: Ranges | None = None,
) -> Choice:
    """The choice where each precision has a relative error, and none once its ``harmful`` blocks are in fp32."""
    np.savez(folder / "weights.npz", **trained_like("sharp1"))
    _, checkpoint = load_model(SPEC, folder / "weights.npz")
    manifest = exporting._manifest(SPEC, exporting.resolve_options(SPEC, OPTIONS), checkpoint)

    def measures(precision: Precision) -> Measures:
        def trial(parts: Fp32Parts) -> PrecisionRecord:
            mended = harmful and set(harmful) <= set(parts.blocks)
            error = 0.001 if mended else errors[precision]
            figures = {name: {"relative_frobenius": error} for name in manifest.outputs}
            return PrecisionRecord("too far" if error > 0.01 else "", "", parts, figures, None)

        return Measures(trial, trial, lambda parts: (tasks or {}).get(precision, AGREE))

    small = [1.0] * SPEC.depth
    return choose_precision(
        manifest,
        ranges or Ranges(small, small),
        {each: measures(each) for each in (Precision.FP16, Precision.BF16)},
    )


def test_a_contract_kept_without_room_is_not_enough(folder: Path) -> None:
    choice = decide(folder, {"fp16": 0.009, "bf16": 0.0079})
    assert choice.taken.precision == "bf16" and choice.record is not None and choice.record.tasks == AGREE
    assert choice.candidates[0].why == "uses 90% of what its contract allows, and may use 80%"


def test_a_contract_that_holds_is_not_enough_where_tasks_differ(folder: Path) -> None:
    choice = decide(folder, {"fp16": 0.001, "bf16": 0.005}, tasks={"fp16": DIFFER})
    assert choice.taken.precision == "bf16"
    assert "buddies 0.500 < 0.9" in choice.candidates[0].why and choice.candidates[0].tasks == DIFFER
    nothing = decide(folder, {"fp16": 0.001, "bf16": 0.005}, tasks={"fp16": DIFFER, "bf16": DIFFER})
    assert nothing.taken.precision == "fp32" and nothing.record is None


def test_fp16_needs_room_in_its_range_too(folder: Path) -> None:
    wide = Ranges([1.0, 20_000.0, *[1.0] * (SPEC.depth - 2)], [1.0] * SPEC.depth)
    assert decide(folder, {"fp16": 0.001, "bf16": 0.005}, ranges=wide).taken.precision == "bf16"
    mixed = decide(folder, {"fp16": 0.001, "bf16": 0.05}, ranges=wide)
    assert (mixed.taken.precision, mixed.taken.fp32.blocks) == ("fp16", [1])


def test_mixed_is_for_models_that_keep_half_of_their_blocks_short(folder: Path) -> None:
    few = decide(folder, {"fp16": 0.05, "bf16": 0.05}, harmful=(1,))
    assert few.taken.precision == "fp16" and 1 in few.taken.fp32.blocks
    many = decide(folder, {"fp16": 0.05, "bf16": 0.05}, harmful=(0, 1, 2))
    assert many.taken.precision == "fp32"


def test_logits_of_the_last_block_matter_to_cls_attention_alone(folder: Path) -> None:
    np.savez(folder / "weights.npz", **trained_like("sharp1"))
    _, checkpoint = load_model(SPEC, folder / "weights.npz")
    last = SPEC.depth - 1
    ranges = Ranges([*[1.0] * last, 1e6], [1.0] * SPEC.depth)
    for names, saliency, expected in (
        (f"key@{last}", True, Fp32Parts(True, [])),
        (f"key@{last}", False, Fp32Parts()),
        (f"token@{last}", False, Fp32Parts(False, [last])),
    ):
        options = replace(OPTIONS, facets=facets(names), saliency=saliency)
        manifest = exporting._manifest(SPEC, exporting.resolve_options(SPEC, options), checkpoint)
        assert parts_out_of_range(manifest, ranges) == expected


# --------------------------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize(
    ("changes", "figures", "absent"),
    [
        ({"saliency": False}, {"pca"}, {"matches": "saliency was not exported"}),
        ({"facets": facets("value@0")}, set(), {"PCA": "was not exported"}),
    ],
)
def test_what_tasks_cannot_be_compared_on_is_said(
    folder: Path, changes: dict[str, Any], figures: set[str], absent: dict[str, str]
) -> None:
    np.savez(folder / "weights.npz", **trained_like("sharp1"))
    vit, checkpoint = load_model(SPEC, folder / "weights.npz")
    options = exporting.resolve_options(SPEC, replace(OPTIONS, **changes))
    manifest = exporting._manifest(SPEC, options, checkpoint)
    tasks = task_trial(vit, SPEC, options, manifest)(GraphPrecision.FP16, Fp32Parts())
    assert set(tasks.figures) == figures and not tasks.missed
    assert all(why in tasks.absent[task] for task, why in absent.items())


# ---------------------------------------------------------------------------------------------------------- end to end
def test_the_command_says_what_it_took_and_info_shows_why(folder: Path) -> None:
    np.savez(folder / "end.npz", **trained_like("sharp1"))
    out = folder / "end"
    command = [
        "export",
        SPEC.name,
        "--weights",
        str(folder / "end.npz"),
        "--stride",
        "8",
        "--size",
        "48x48",
        "-o",
        str(out),
    ]
    done = CliRunner().invoke(program(), [*command, "--precision", "auto"])
    assert done.exit_code == 0, done.output
    assert "auto takes fp16" in done.output and "tasks agree with fp32" in done.output
    with Engine.open(out) as engine:
        assert engine.precision == "fp16"
    shown = CliRunner().invoke(program(), ["info", str(out)]).output
    assert "how the precision was chosen" in shown and "tasks in half precision" in shown and "0.9)" in shown
    data = json.loads((out / "manifest.json").read_text())
    del data["candidates"], data["precisions"]["fp16"]["tasks"]  # as this schema was written before
    (out / "manifest.json").write_text(json.dumps(data))
    older = Bundle.open(out).manifest
    assert older.candidates is None and older.precisions["fp16"].tasks is None
