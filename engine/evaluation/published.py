"""The paper's figures (arXiv 2112.05814, first version, tables 1 to 5), as shares; landmark errors × 100 as printed.

Source: specification §15. They were measured with trained weights on the complete data sets. Those on discovery and
on followed points are other papers'.
"""

from __future__ import annotations

from collections.abc import Sequence

from facetrt.engine.evaluation.protocol import Row

PAPER = "Amir et al."

_COSEGMENTATION = {
    "this system": {"msrc": (86.7, 96.5), "internet300": (79.5, 94.6),
                    "pascal-coseg": (60.7, 88.2), "pascal-co": (79.5, 94.7)},
    "saliency baseline": {"msrc": (79.7, 94.0), "internet300": (59.1, 85.0),
                          "pascal-coseg": (49.9, 83.8), "pascal-co": (75.0, 93.1)},
    "Faktor & Irani (unsupervised)": {"msrc": (77.0, 92.0), "pascal-coseg": (46.0, 84.0), "pascal-co": (41.4, 79.9)},
    "best supervised listed": {"msrc": (87.2, 97.9), "internet300": (84.0, 97.1),
                               "pascal-coseg": (75.4, 95.8), "pascal-co": (74.2, 94.5)},
}  # fmt: skip

_PASCAL_CO_FEATURES = {
    "DINO ResNet": (37.7, 78.1),
    "supervised ResNet": (40.0, 78.9),
    "supervised ViT": (39.9, 69.7),
}

_LANDMARKS = {
    ("celeba", 4): {"this system": 11.36, "with supervised ViT": 12.83, "Liu et al.": 15.39,
                    "SCOPS": 21.76, "SCOPS without saliency": 46.62},
    ("celeba", 8): {"this system": 10.74, "with supervised ViT": 12.74, "Liu et al.": 12.26,
                    "SCOPS": 15.01, "SCOPS without saliency": 22.11},
}  # fmt: skip

_CUB = {
    "this system": (17.14, 14.67, 19.59),
    "Liu et al.": (18.15, 17.54, 19.40),
    "SCOPS without saliency": (18.50, 18.82, 21.07),
}

_PCK = {"this system": 56.48, "NBB": 26.98, "CATs (supervised)": 61.43}

_PCK_PER_CATEGORY = {
    "aeroplane": 0.69, "bicycle": 0.50, "bird": 0.82, "boat": 0.47, "bottle": 0.37, "bus": 0.42, "car": 0.53,
    "cat": 0.66, "chair": 0.45, "cow": 0.75, "dog": 0.65, "horse": 0.46, "motorbike": 0.69, "person": 0.48,
    "pottedplant": 0.44, "sheep": 0.65, "train": 0.54, "tvmonitor": 0.59,
}  # fmt: skip

_DAVIS = {
    "this system (ViT-S/8, stride 4)": (72.2, 67.9, 76.5),
    "ViT-S/8": (69.9, 66.6, 73.1),
    "ViT-B/8": (71.4, 67.9, 74.9),
    "ViT-S/16": (61.8, 60.2, 63.4),
    "ViT-B/16": (62.3, 60.7, 63.9),
}

_FOLLOWED: dict[str, tuple[tuple[float | None, float | None, float | None], str]] = {  # AJ, δ and OA; and the source
    "TAP-Net, first": ((33.0, 48.6, 78.8), "arXiv 2411.18671, table 1"),
    "TAPIR, first": ((56.2, 70.0, 86.5), "arXiv 2411.18671, table 1"),
    "CoTracker, first": ((61.8, 76.1, 88.3), "arXiv 2411.18671, table 1"),
    "CoTracker3 online, first": ((63.8, 76.3, 90.2), "arXiv 2411.18671, table 1"),
    "TAP-Net, strided": ((38.4, None, None), "README of google-deepmind/tapnet"),
    "DINO-Tracker at 480p, strided": ((65.28, 80.66, 88.54), "README of AssafSinger94/dino-tracker"),
    "raw DINOv2-L at 480p, strided (quoted by others)": ((None, 64.7, None), "arXiv 2403.14548, table 1"),
    "raw DINOv2-L at 256, strided (quoted by others)": ((None, 61.4, None), "arXiv 2403.14548, table 1"),
}


_CORLOC = {  # VOC2007, VOC2012, COCO20k
    "TokenCut, ViT-S/16": (68.8, 72.1, 58.8),
    "TokenCut, ViT-S/8": (67.3, 71.6, 60.7),
    "LOST, ViT-S/16": (61.9, 64.0, 50.7),
    "LOST, ViT-S/8": (55.5, 57.0, 49.5),
    "DINO-seg, ViT-S/16": (45.8, 46.2, 42.1),
    "Deep Spectral (unconfirmed)": (62.7, 66.4, 52.2),
    "FOUND (unconfirmed)": (72.5, 76.1, 62.9),
    "SelfMask (unconfirmed)": (72.3, 75.3, 62.7),
}
_CORLOC_SETS = ("VOC2007", "VOC2012", "COCO20k")

_SALIENCY: dict[
    str, tuple[tuple[str, ...], list[tuple[float, ...]]]
] = {  # ECSSD, DUTS-TE, DUT-OMRON; each by its own variant
    "TokenCut": (("maxF", "IoU", "acc"), [(80.3, 71.2, 91.8), (67.2, 57.6, 90.3), (60.0, 53.3, 88.0)]),
    "TokenCut + solver": (("maxF", "IoU", "acc"), [(87.4, 77.2, 93.4), (75.5, 62.4, 91.4), (69.7, 61.8, 89.7)]),
    "FOUND, single": (("acc", "IoU", "maxF"), [(91.2, 79.3, 94.6), (93.9, 63.7, 73.3), (92.0, 58.6, 68.3)]),
    "FOUND, multi": (("acc", "IoU", "maxF"), [(94.9, 80.7, 95.5), (93.8, 64.5, 71.5), (91.2, 57.8, 66.3)]),
    "SelfMask (quoted by others)": (("acc", "IoU"), [(94.4, 78.1), (92.3, 62.6), (90.1, 58.2)]),
    "Deep Spectral (quoted by others)": (("IoU",), [(73.3,), (51.4,), (56.7,)]),
}
_SALIENCY_SETS = ("ECSSD", "DUTS-TE", "DUT-OMRON")

_CLASS_AGNOSTIC = {  # zero-shot, of the detector that was trained on MaskCut's masks; none of MaskCut alone
    "CutLER's detector, COCO": (21.9, 32.7),
    "CutLER's detector, COCO20K": (22.4, 33.1),
    "CutLER's detector, VOC": (36.9, 44.3),
}


def _discovery_rows(name: str) -> list[Row]:
    """Figures of the methods of discovery, each method's own."""
    if name == "corloc":
        return [
            Row(f"{method}: {data}", {"CorLoc": value}, "published")
            for method, values in _CORLOC.items()
            for data, value in zip(_CORLOC_SETS, values, strict=True)
        ]
    if name == "saliency":
        return [
            Row(f"{method}: {data}", {m: v / 100 for m, v in zip(metrics, values, strict=True)}, "published")
            for method, (metrics, found) in _SALIENCY.items()
            for data, values in zip(_SALIENCY_SETS, found, strict=True)
        ]
    return [Row(n, {"box AP50": ap, "box AR100": ar}, "published") for n, (ap, ar) in _CLASS_AGNOSTIC.items()]


def published_rows(name: str, num_parts: int | None = None) -> list[Row]:
    """The paper's rows for an evaluation, its own system first; none for PF-WILLOW, which it does not report."""
    if name in ("corloc", "saliency", "class-agnostic"):
        return _discovery_rows(name)
    if name == "spair71k":
        return [_row(method, {"PCK": value / 100}) for method, value in _PCK.items()]
    if name == "davis2017":
        metrics = ("J&F", "J", "F")
        return [_row(m, {k: v / 100 for k, v in zip(metrics, values, strict=True)}) for m, values in _DAVIS.items()]
    if name == "tapvid-davis":
        return [_followed_row(method, figures, source) for method, (figures, source) in _FOLLOWED.items()]
    if name == "cub":
        rows = _CUB if num_parts in (None, 4) else {}
        return [_row(method, {"error": sum(values) / len(values)}) for method, values in rows.items()]
    if name == "celeba":
        return [_row(m, {"error": value}) for m, value in _LANDMARKS.get((name, num_parts or 4), {}).items()]
    found = {method: sets[name] for method, sets in _COSEGMENTATION.items() if name in sets}
    if name == "pascal-co":
        found |= _PASCAL_CO_FEATURES
    return [_row(method, {"J": j / 100, "P": p / 100}) for method, (j, p) in found.items()]


def published_categories(name: str) -> dict[str, dict[str, float]]:
    """The paper's own figures per category, where it prints them."""
    if name == "spair71k":
        return {category: {"PCK": value} for category, value in _PCK_PER_CATEGORY.items()}
    if name == "cub":
        return {f"00{i}": {"error": value} for i, value in enumerate(_CUB["this system"], start=1)}
    return {}


def _followed_row(method: str, figures: Sequence[float | None], source: str) -> Row:
    shares = (None if value is None else value / 100 for value in figures)
    return Row(method, dict(zip(("AJ", "delta_avg", "OA"), shares, strict=True)), source)


def _row(method: str, figures: dict[str, float]) -> Row:
    return Row(f"{PAPER}: {method}", figures, "arXiv 2112.05814v1")
