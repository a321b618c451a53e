"""The export stage: from a checkpoint to a bundle. Needs the ``export`` extra (torch, timm, onnx)."""

from facetrt.export.options import ExportOptions

__all__ = ["ExportOptions", "export_bundle"]


def __getattr__(name: str) -> object:  # torch is imported when export_bundle is first used, not before
    if name == "export_bundle":
        from facetrt.export.exporting import export_bundle

        return export_bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
