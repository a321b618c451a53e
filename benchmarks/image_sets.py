"""How memory and time of co-segmentation grow with the number of images.

    python benchmarks/image_sets.py [--counts 50,100,200] [--bundle builtin] [--load-size 224] [--json FILE]

Each count runs in a process of its own, on copies of the sample photographs with random crops. Features are allowed 128
MiB of memory; beyond that they are spilled. Prints peak memory, growth per further image, and time per image.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from timing import machine

from facetrt.engine import Engine
from facetrt.engine.samples import sample_images

MEMORY_LIMIT = 128 << 20


def write_images(folder: Path, count: int) -> list[Path]:
    """Random crops of the sample photographs as JPEG files."""
    random, samples = np.random.default_rng(0), list(sample_images().values())
    paths = []
    for i in range(count):
        image = samples[i % len(samples)]
        left, top = (int(random.integers(0, side // 10)) for side in image.size)
        crop = image.crop((left, top, left + image.width * 9 // 10, top + image.height * 9 // 10))
        paths.append(folder / f"{i:05}.jpg")
        crop.save(paths[-1], quality=90)
    return paths


def run(count: int, bundle: str, load_size: int) -> dict[str, float]:
    """Co-segment ``count`` files in this process."""
    with tempfile.TemporaryDirectory() as folder, Engine.open(bundle) as engine:
        paths = write_images(Path(folder), count)
        start = time.perf_counter()
        facet = engine.manifest.default_facet("cosegment")
        options: dict[str, Any] = {"facets": [facet], "load_size": load_size, "saliency": "low_resolution"}
        with engine.collect(paths, **options, memory_limit=MEMORY_LIMIT) as features:
            masks, spilled = engine.cosegment(features), features.spilled
        seconds = time.perf_counter() - start
    if len(masks) != count:
        raise RuntimeError(f"{len(masks)} masks for {count} images")
    return {"count": count, "seconds_per_image": seconds / count, "peak_mib": peak_mib(), "spilled": spilled}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="50,100,200")
    parser.add_argument("--bundle", default="builtin")
    parser.add_argument("--load-size", type=int, default=224)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one, options.bundle, options.load_size)))
        return
    rows = []
    for count in map(int, options.counts.split(",")):
        command = [sys.executable, __file__, "--one", str(count), "--bundle", options.bundle]
        result = subprocess.run(
            [*command, "--load-size", str(options.load_size)], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(result.stdout))
        row, growth = rows[-1], ""
        if len(rows) > 1:
            added = (row["peak_mib"] - rows[-2]["peak_mib"]) * 1024 / (count - rows[-2]["count"])
            growth = f", {added:.0f} KiB per further image"
        print(f"{count:5} images: {row['peak_mib']:.0f} MiB, {row['seconds_per_image']:.3f} s per image{growth}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
