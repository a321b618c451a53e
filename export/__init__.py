"""The export stage: from a checkpoint to a bundle. Needs the ``export`` extra (torch, timm, onnx)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from facetrt.kernels.lazy import show

if TYPE_CHECKING:
    from facetrt.export.export_options import ExportOptions
    from facetrt.export.exporting import export_bundle

show(
    __name__,
    {
        "facetrt.export.exporting": ("export_bundle",),
        "facetrt.export.export_options": ("ExportOptions",),
    },
)

__all__ = ["ExportOptions", "export_bundle"]
