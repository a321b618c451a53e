"""``--precision auto``: the shortest precision that the weights bear, found by measurement, and why.

Weighed in this order, the first that does is taken: fp16, bf16, either of them with at most half of the blocks in
fp32 (the cheaper first), fp32. A half precision does if

* fp16 has room for what it must hold: the largest attention logit and activation measured stay within ``RANGE_ROOM`` of
  its range, as other images may have larger ones;
* it keeps its contract, and uses at most ``ROOM`` of what that allows;
* tasks find what they find in fp32, within :data:`facetrt.engine.tasks.agreement.BOUNDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from facetrt.engine.backends.run_options import Precision
from facetrt.engine.bundle.manifest import Candidate, Fp32Parts, Manifest, PrecisionRecord, Ranges, TaskAgreement
from facetrt.engine.tasks.agreement import describe
from facetrt.export.encoder import HALF_LOGITS, RESULTS
from facetrt.export.export_options import Facet
from facetrt.export.precision import EMULATED_ROOM, Trial, encoder_depth, hold_contract, share_used

ROOM = EMULATED_ROOM  # of the contract: as much as a precision that is asked for may use
LARGEST = 65504.0  # that fp16 holds
RANGE_ROOM = 0.25  # of it: a few small images were measured, and others reach further
MOST_IN_FP32 = 0.5  # of the blocks: with more, fp32 is about as fast and needs no islands
HALVES = (Precision.FP16, Precision.BF16)  # the one with more digits first

Weighed = tuple[Candidate, PrecisionRecord | None]


@dataclass(frozen=True)
class Measures:
    """How a half precision is measured: see :func:`facetrt.export.precision.hold_contract`; ``tasks`` are dear."""

    trial: Trial
    emulate: Trial
    tasks: Callable[[Fp32Parts], TaskAgreement]


@dataclass(frozen=True)
class Choice:
    """The candidates in the order they were weighed, of which the last is taken, and its record; None of fp32."""

    candidates: list[Candidate]
    record: PrecisionRecord | None

    @property
    def taken(self) -> Candidate:
        """The one that the bundle is made in."""
        return self.candidates[-1]


def choose_precision(manifest: Manifest, ranges: Ranges, measures: Mapping[Precision, Measures]) -> Choice:
    """The first candidate that does; fp32 always does.

    Args:
        ranges: what half precision would have to hold in each block.
        measures: of each of ``HALVES``.
    """
    candidates = []
    for candidate, record in _weigh_each(manifest, ranges, measures):
        candidates.append(candidate)
        if candidate.taken:
            return Choice(candidates, record)
    taken = Candidate(Precision.FP32, Fp32Parts(), taken=True, why="nothing shorter does", tasks=None)
    return Choice([*candidates, taken], None)


def _weigh_each(manifest: Manifest, ranges: Ranges, measures: Mapping[Precision, Measures]) -> Iterator[Weighed]:
    halves = [_Half(precision, manifest, ranges, measures[precision]) for precision in HALVES]
    for half in halves:
        yield half.weigh_whole()
    for half in sorted(halves, key=lambda each: each.cost):
        yield half.weigh_mixed()


class _Half:
    """A half precision under examination; what was tried once is not tried again."""

    def __init__(self, precision: Precision, manifest: Manifest, ranges: Ranges, measures: Measures) -> None:
        self._precision, self._manifest, self._ranges, self._measures = precision, manifest, ranges, measures
        self._trial = _remembered(measures.trial)
        self._depth = encoder_depth(manifest)
        self._must = parts_out_of_range(manifest, ranges) if precision is Precision.FP16 else Fp32Parts()

    def weigh_whole(self) -> Weighed:
        """The candidate with no block in fp32."""
        if self._must.blocks:
            return self._refuse(Fp32Parts(), f"too large for fp16 in {self._must}: {self._range(Fp32Parts())}"), None
        return self._weigh(self._whole)

    def weigh_mixed(self) -> Weighed:
        """The candidate with those blocks in fp32 that do most harm, and those whose numbers it cannot hold."""
        if self._mixed is None:
            return self._refuse(self._must, self._too_many(self._must)), None
        if not self._mixed.fp32.blocks:
            why = self._mixed.missed or "no choice of blocks leaves it more room"
            return self._refuse(self._mixed.fp32, f"blocks in fp32 do not help: {why}"), None
        return self._weigh(self._mixed)

    @property
    def cost(self) -> tuple[int, int]:
        """How many blocks of the mixed candidate have attention that no builder fuses, and how many are in fp32."""
        blocks = [] if self._mixed is None else self._mixed.fp32.blocks
        if not blocks:
            return self._depth + 1, self._depth + 1
        small = [b for b in blocks if self._precision is Precision.FP16 and self._ranges.logits[b] <= HALF_LOGITS]
        return len(blocks) - len(small), len(blocks)

    @cached_property
    def _whole(self) -> PrecisionRecord:
        return self._search(ROOM, islands=False)

    @cached_property
    def _mixed(self) -> PrecisionRecord | None:
        if self._is_too_much(self._must):
            return None
        if self._must.blocks or not self._within_room(self._whole):
            return self._search(ROOM, islands=True)
        return self._search(self._share(self._whole) / 2, islands=True)  # tasks ask for more than the contract does

    def _search(self, room: float, *, islands: bool) -> PrecisionRecord:
        def keeping(trial: Trial) -> Trial:
            return lambda parts: trial(_union(parts, self._must))

        trial, emulate = keeping(self._trial), keeping(self._measures.emulate)
        return hold_contract(self._precision, self._manifest, trial, emulate, room=room, islands=islands)

    def _weigh(self, record: PrecisionRecord) -> Weighed:
        if not record.holds:
            also = ", and [CLS] attention in fp32 does not help" if self._manifest.saliency_heads is not None else ""
            return self._refuse(record.fp32, f"misses its contract{also}: {record.missed}"), None
        used = f"uses {self._share(record):.0%} of what its contract allows, and may use {ROOM:.0%}"
        if not self._within_room(record):
            return self._refuse(record.fp32, used), None
        if self._is_too_much(record.fp32):
            return self._refuse(record.fp32, self._too_many(record.fp32)), None
        tasks = self._measures.tasks(record.fp32)
        why = "; ".join(
            [used, *([self._range(record.fp32)] if self._precision is Precision.FP16 else []), describe(tasks)]
        )
        taken = not tasks.missed
        return Candidate(self._precision, record.fp32, taken, why, tasks), replace(record, tasks=tasks)

    def _within_room(self, record: PrecisionRecord) -> bool:
        return record.holds and self._share(record) <= ROOM

    def _share(self, record: PrecisionRecord) -> float:
        return share_used(self._precision, self._manifest, record)

    def _refuse(self, parts: Fp32Parts, why: str) -> Candidate:
        return Candidate(self._precision, parts, taken=False, why=why, tasks=None)

    def _is_too_much(self, parts: Fp32Parts) -> bool:
        return len(parts.blocks) > MOST_IN_FP32 * self._depth

    def _too_many(self, parts: Fp32Parts) -> str:
        return f"{len(parts.blocks)} of {self._depth} blocks would stay in fp32, and at most {MOST_IN_FP32:.0%} may"

    def _range(self, parts: Fp32Parts) -> str:
        """The largest numbers that are to be held, and their bound, in words."""
        blocks = [block for block in range(self._depth) if block not in parts.blocks]
        largest = []
        for name, values in (("logit", self._ranges.logits), ("activation", self._ranges.activations)):
            held = [b for b in blocks if name != "logit" or makes_logits(self._manifest, b, parts)]
            if held:
                block = max(held, key=values.__getitem__)
                largest.append(f"largest {name} {values[block]:.4g} in block {block}")
        return f"{', '.join(largest)}, of at most {RANGE_ROOM * LARGEST:,.0f} ({RANGE_ROOM:.0%} of its range)"


def makes_logits(manifest: Manifest, block: int, parts: Fp32Parts) -> bool:
    """Whether half precision holds attention logits of a block, all of them or those of [CLS]."""
    last = encoder_depth(manifest) - 1
    return _is_complete(manifest, block) or (
        block == last and manifest.saliency_heads is not None and not parts.cls_attention
    )


def _is_complete(manifest: Manifest, block: int) -> bool:
    """The last block is only if its result is an output."""
    results = {facet.layer for facet in map(Facet.parse, manifest.facets) if facet.kind in RESULTS}
    return block + 1 < encoder_depth(manifest) or block in results


def parts_out_of_range(manifest: Manifest, ranges: Ranges) -> Fp32Parts:
    """What fp16 cannot hold with room."""
    depth = encoder_depth(manifest)
    wide = [_too_large(logit) for logit in ranges.logits[:depth]]
    blocks = [
        block
        for block in range(depth)
        if _too_large(ranges.activations[block]) or (wide[block] and _is_complete(manifest, block))
    ]
    return Fp32Parts(manifest.saliency_heads is not None and wide[-1], blocks)


def _too_large(value: float) -> bool:
    return not value <= RANGE_ROOM * LARGEST  # NaN is


def _union(a: Fp32Parts, b: Fp32Parts) -> Fp32Parts:
    return Fp32Parts(a.cls_attention or b.cls_attention, sorted({*a.blocks, *b.blocks}))


def _remembered(trial: Trial) -> Trial:
    known: dict[str, PrecisionRecord] = {}

    def remembered(parts: Fp32Parts) -> PrecisionRecord:
        if str(parts) not in known:
            known[str(parts)] = trial(parts)
        return known[str(parts)]

    return remembered
