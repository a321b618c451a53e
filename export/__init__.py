"""The export stage: from a checkpoint to a bundle. Needs the ``export`` extra (torch, timm, onnx)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from facetrt.export.exporting import export_bundle
    from facetrt.export.options import ExportOptions

__all__ = ["ExportOptions", "export_bundle"]


def __getattr__(name: str) -> object:  # the command installs its signal handlers before anything heavy is imported
    if name == "export_bundle":
        from facetrt.export.exporting import export_bundle

        return export_bundle
    if name == "ExportOptions":
        from facetrt.export.options import ExportOptions

        return ExportOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
