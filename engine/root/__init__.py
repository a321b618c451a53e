"""Dense visual descriptors from a frozen DINO ViT: ``from facetrt import Engine``.

This is the package ``facetrt`` itself; it lies in ``engine/`` because the repository's root holds folders alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from facetrt.kernels.lazy import show

if TYPE_CHECKING:
    from facetrt.engine.engine import Engine
    from facetrt.engine.version import __version__

show(
    __name__,
    {
        "facetrt.engine.engine": ("Engine",),
        "facetrt.engine.version": ("__version__",),
    },
)

__all__ = ["Engine", "__version__"]
