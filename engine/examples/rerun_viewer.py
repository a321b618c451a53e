"""Watch a video or a camera with its saliency and its descriptors in the Rerun viewer (extra ``viz``).

    python -m facetrt.engine.examples.rerun_viewer clip.mp4
    python -m facetrt.engine.examples.rerun_viewer 0 --save camera.rrd

Three descriptor channels are shown as red, green and blue: the principal components of the first frame, so that colours
mean the same in all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine import Engine, Features, fit_pca
from facetrt.engine.images.loading import Pixels
from facetrt.engine.video.stream import Stream
from facetrt.kernels.errors import FacetrtError, MissingDependencyError


def load_rerun() -> Any:
    """The library; raises :class:`MissingDependencyError` if it is not installed."""
    try:
        import rerun
    except ImportError as error:
        raise MissingDependencyError("rerun is not installed: pip install 'facetrt[viz]'") from error
    return rerun


def colouring(first: Features, facet: str) -> Callable[[Features], Pixels]:
    """Gives ``(grid_h, grid_w, 3)`` uint8 colours of any frame, on the components and the range of the first one."""
    pca = fit_pca([first], facet, 3)
    projected = pca.project(first)
    low, high = projected.min(axis=(0, 1)), projected.max(axis=(0, 1))

    def colour(features: Features) -> Pixels:
        scaled = (pca.project(features) - low) / np.maximum(high - low, 1e-9)
        return np.asarray(np.rint(scaled.clip(0, 1) * 255), np.uint8)

    return colour


def grey(saliency: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``(grid_h, grid_w)``."""
    return np.rint(saliency * 255).astype(np.uint8)


def show(rerun: Any, stream: Stream[Features], facet: str, *, limit: int | None = None) -> None:
    """Log every frame of the stream, at most ``limit``, on the time line ``video``."""
    colour: Callable[[Features], Pixels] | None = None
    for number, result in enumerate(stream, start=1):
        colour = colour or colouring(result.features, facet)
        rerun.set_time("video", duration=result.frame.timestamp)
        rerun.log("frame", rerun.Image(result.frame.pixels))
        rerun.log("descriptors", rerun.Image(colour(result.features)))
        rerun.log("saliency", rerun.Image(grey(result.features.saliency)))
        rerun.log("latency_ms", rerun.Scalars(result.latency * 1000))
        rerun.log("dropped", rerun.Scalars(result.dropped))
        if number == limit:
            return


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="video file, folder of images, rtsp:// address or number of a camera")
    parser.add_argument("--bundle", default="builtin")
    parser.add_argument("--load-size", type=int, default=224)
    parser.add_argument("--frames", type=int, help="stop after so many")
    parser.add_argument("--save", help="write a recording (.rrd) instead of opening the viewer")
    given = parser.parse_args(arguments)
    rerun = load_rerun()
    rerun.init("facetrt", spawn=given.save is None)
    if given.save is not None:
        rerun.save(given.save)
    source = int(given.source) if given.source.isdecimal() else given.source
    with Engine.open(given.bundle) as engine, engine.stream(source, load_size=given.load_size) as stream:
        show(rerun, stream, engine.manifest.default_facet("match"), limit=given.frames)
        print(stream.report)
    rerun.disconnect()  # everything is sent or written before the program ends


if __name__ == "__main__":
    try:
        main()
    except FacetrtError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")
