"""The CPU suite: the order of its sections, and the bars that it is held against."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from facetrt.benchmarks.cpu import backbones, discovery, encoder, kernels, memory, scaling
from facetrt.benchmarks.cpu import task_times as tasks
from facetrt.benchmarks.cpu.workbench import Sizes, Workbench
from facetrt.benchmarks.machine import commit, machine, versions
from facetrt.benchmarks.results import Bar, Row, Verdict, judge
from facetrt.export.models import find_model

SCHEMA = 2


@dataclass(frozen=True)
class Report:
    """Everything that a run of the suite found."""

    rows: Sequence[Row]
    verdicts: Sequence[Verdict]
    facts: dict[str, Any]
    notes: Sequence[str]

    @property
    def sections(self) -> dict[str, list[Row]]:
        """Rows by section, in the order of measuring."""
        names = dict.fromkeys(row.section for row in self.rows)
        return {name: [row for row in self.rows if row.section == name] for name in names}


class Measured(Protocol):
    """What a report tells of the bench that a suite ran on; ``sizes`` is a dataclass and ``spec`` has a name."""

    @property
    def spec(self) -> Any: ...
    @property
    def stride(self) -> int: ...
    @property
    def sizes(self) -> Any: ...
    @property
    def rounds(self) -> int: ...


class Opening:
    """What is noted when a suite begins; :meth:`close` makes the report when it ends."""

    def __init__(self, **more: Any) -> None:
        """``more``: facts about the machine that only some suites know."""
        self._started, self._start = datetime.now(UTC), time.perf_counter()
        self._facts = {"machine": machine() | more, "versions": versions(), "commit": commit()}

    def close(
        self,
        suite: str,
        bench: Measured,
        rows: Sequence[Row],
        bars: Sequence[Bar],
        *,
        comparable: bool,
        notes: Sequence[str],
    ) -> Report:
        """The rows, held against the bars where the sizes are theirs."""
        verdicts = [judge(bar, rows, comparable=comparable) for bar in bars]
        facts = self._facts | {
            "suite": suite,
            "date": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._start, 1),
            "model": bench.spec.name,
            "stride": bench.stride,
            "sizes": asdict(bench.sizes),
            "rounds": bench.rounds,
        }
        return Report(rows, verdicts, facts, notes)


def run_cpu(bench: Workbench, *, against: Path | None = None, notes: Sequence[str] = ()) -> Report:
    """Measure all sections; a row that this machine cannot run says why.

    Args:
        against: a checkout of the original research code, to be timed as well.
        notes: what a reader must know about the model.
    """
    opening = Opening()
    rows = [*encoder.measure(bench), *encoder.measure_long(bench), *tasks.measure_match(bench)]
    found, features = tasks.measure_cosegment(bench)
    facet = str(bench.cosegment_facet)
    rows += found
    rows += kernels.measure(bench, [np.ascontiguousarray(item[facet]) for item in features], features[0].grid)
    rows += [*tasks.measure_parts(bench), *discovery.measure(bench), *backbones.measure(bench)]
    rows += [*memory.measure(bench), *scaling.measure(bench)]
    if against is not None:
        from facetrt.benchmarks.cpu.against import measure

        rows += measure(bench, against)
    return opening.close("cpu", bench, rows, bars(bench.sizes), comparable=bench.sizes == Sizes(), notes=notes)


def bars(sizes: Sizes) -> list[Bar]:
    """What is wanted: ratios of medians on two cores, for a ViT-S/8-sized model at stride 4 and 224 pixels."""
    fp32, bf16 = map(tasks.facetrt_name, tasks.PRECISIONS)
    research, glue = tasks.RESEARCH, tasks.GLUE
    few, many = scaling.images_name(sizes.images), scaling.images_name(sizes.many)
    return [
        Bar("pair match, fp32, vs research style", "match", fp32, research, 200),
        Bar("pair match, bf16, vs research style", "match", bf16, research, 350),
        Bar("pair match, fp32, vs strong glue", "match", fp32, glue, 1.15),
        Bar("pair match, bf16, vs strong glue", "match", bf16, glue, 2.2),
        Bar(
            "encoder, OpenVINO bf16, vs torch SDPA fp32",
            encoder.SECTION,
            encoder.engine_name("openvino", "bf16"),
            encoder.TORCH,
            2.2,
        ),
        Bar("best buddies, vs one wide product", kernels.SECTION, "best_buddies", kernels.WIDE, 6),
        Bar("elbow sweep, vs FAISS with all rounds", kernels.SECTION, "elbow sweep", kernels.FAISS, 5),
        Bar(f"cosegment, {sizes.images} images, fp32, vs research style", "cosegment", fp32, research, 10),
        Bar(f"cosegment, {sizes.images} images, bf16, vs research style", "cosegment", bf16, research, 10),
        Bar(f"cosegment, {sizes.images} images, fp32, vs strong glue", "cosegment", fp32, glue, 1.5),
        Bar(f"cosegment, {sizes.images} images, bf16, vs strong glue", "cosegment", bf16, glue, 1.5),
        *(
            Bar(f"TokenCut, whole image, {name}, vs research style", discovery.TOKENCUT, name, research, 3)
            for name in (fp32, bf16)
        ),
        Bar("second eigenvector, vs SciPy's", discovery.EIGENVECTOR, discovery.LANCZOS, discovery.DENSE, 30),
        Bar("memory of that, vs SciPy's", memory.SECTION, memory.LANCZOS, memory.DENSE, 100),
        Bar("MaskCut, three cuts, vs research style", discovery.MASKCUT, discovery.OURS, research, 15),
        Bar("FOUND, vs the encoder alone", discovery.FOUND, discovery.ENCODER, discovery.HEAD, 1.05, at_most=True),
        *_backbone_bars(sizes),
        Bar(
            f"peak memory of discovery, {sizes.collection} images",
            memory.SECTION,
            memory.DISCOVER.format(sizes.collection),
            None,
            1536,
            at_most=True,
            unit="MiB",
        ),
        Bar(f"time per image, {sizes.many} images vs {sizes.images}", scaling.NUMBERS, few, many, 1.1, at_most=True),
    ]


def _backbone_bars(sizes: Sizes) -> list[Bar]:
    """Every model at the first of the sizes, and what the rotation costs."""
    faster = [
        Bar(
            f"{name}, bf16, vs timm's forward in fp32",
            backbones.section(name, backbones.sides(sizes, find_model(name))[0]),
            backbones.BF16,
            backbones.TIMM,
            1.8,
        )
        for name in sizes.models
    ]
    costs = [
        Bar(
            f"RoPE, {side} pixels, vs nothing rotated",
            backbones.section(backbones.ROTATION, side),
            backbones.STILL,
            backbones.FP32,
            1.03,
            at_most=True,
        )
        for side in backbones.sides(sizes, find_model(backbones.ROTATING))
    ]
    return [*faster, *costs]
