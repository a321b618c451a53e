"""Each device kernel beside torch, beside a copy of as many bytes, and against the same kernel on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.benchmarks.baselines.common import elbow_sweep, load_pixels
from facetrt.benchmarks.cpu.discovery import THRESHOLD
from facetrt.benchmarks.cpu.kernels import crf_energy
from facetrt.benchmarks.cpu.scenes import scene_rows
from facetrt.benchmarks.gpu.encoder import product, torch_pass
from facetrt.benchmarks.gpu.workbench import CountingDevice, GpuWorkbench
from facetrt.benchmarks.results import Row, Spread
from facetrt.benchmarks.timing import Contestant, Timings, queued, rows_of
from facetrt.engine.images.loading import resize as resize_on_cpu
from facetrt.engine.samples import sample_images
from facetrt.engine.tasks.clustering import MAX_CLUSTERS, cluster_elbow
from facetrt.engine.tasks.cosegmentation import CosegmentOptions
from facetrt.engine.tasks.descriptors import normalise
from facetrt.engine.video.alignment import Patches, Slopes, align
from facetrt.engine.video.descriptor_maps import DescriptorMap
from facetrt.engine.video.searching import Window, find
from facetrt.kernels import best_buddies, dense_crf, log_bin, smallest_eigenvectors, threshold_graph, vote
from facetrt.kernels.device import best_buddies as device_buddies
from facetrt.kernels.device import dense_crf as device_crf
from facetrt.kernels.device import graph as device_graph
from facetrt.kernels.device import kmeans as device_kmeans
from facetrt.kernels.device import log_bin as device_log_bin
from facetrt.kernels.device import preprocess
from facetrt.kernels.device import track as device_track
from facetrt.kernels.device import vote as device_vote
from facetrt.kernels.errors import FacetrtError

CEILING = "matrix product"
MEMORY = "device memory"

Float = NDArray[np.float32]
Work = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One kernel on one input.

    Attributes:
        work: queues it; inputs lie on the device.
        ways: how ``work`` can do it, where it chooses by the size.
        baselines: others that do the same, with torch on the device or with libraries on the host.
        quality: how close the result is to the CPU kernel's.
        nbytes: that have to be read and written, whatever the method.
        flops: likewise.
    """

    name: str
    work: Work
    quality: Callable[[Any], Mapping[str, float]]
    baselines: Mapping[str, Work] = field(default_factory=dict)
    ways: Mapping[str, Work] = field(default_factory=dict)
    nbytes: int = 0
    flops: float = 0.0


def copy_name(kernel: str) -> str:
    """How the rows call the copy of as many bytes as a kernel moves."""
    return f"{kernel}, copy of as many bytes"


def glue_name(kernel: str) -> str:
    """How the rows call torch's way to do what a kernel does."""
    return f"{kernel}, strong glue"


def section(kernel: str) -> str:
    """The section of a kernel's rows."""
    return f"kernel: {kernel}"


def buddies_name(cells: int) -> str:
    """How the rows call best buddies of two maps of so many cells each."""
    return f"best_buddies, {cells} × {cells}"


def measure(bench: GpuWorkbench) -> list[Row]:
    """All kernels, where :attr:`GpuWorkbench.kernels` runs them."""
    grid = bench.glue_gpu().grid(bench.size, bench.stride)
    large = bench.sizes.large_grid, bench.sizes.large_grid
    makers: dict[str, Callable[[str], Case]] = {
        "resize": lambda name: _resize(bench, name),
        "log_bin": lambda name: _log_bin(bench, name),
        buddies_name(grid[0] * grid[1]): lambda name: _best_buddies(bench, name, grid),
        buddies_name(large[0] * large[1]): lambda name: _best_buddies(bench, name, large),
        "k-means sweep": lambda name: _sweep(bench, name),
        "vote": lambda name: _vote(bench, name),
        "dense_crf": lambda name: _dense_crf(bench, name),
        "track": lambda name: _track(bench, name),
        "second eigenvectors": lambda name: _eigenvectors(bench, name),
    }
    rows = [row for name, make in makers.items() for row in _measure(bench, name, make)]
    return [*rows, *_memory(bench, large)]


def _measure(bench: GpuWorkbench, name: str, make: Callable[[str], Case]) -> list[Row]:
    try:
        case = make(name)
    except FacetrtError as error:
        return [Row(section(name), name, None, reason=str(error))]
    window = bench.sizes.window

    def contestant(title: str, work: Work, synchronize: Work, rounds: int | None = None) -> Contestant:
        run = bench.guarded(lambda clock: queued(clock, work, synchronize, seconds=window))
        prepare = None if window else lambda: None  # a quick run times the first call
        return Contestant(title, run, rounds=rounds, prepare=prepare)

    contestants = [contestant(title, work, bench.kernels.synchronize) for title, work in case.ways.items()]
    contestants = [contestant(name, case.work, bench.kernels.synchronize), *contestants]
    contestants += [contestant(title, work, bench.wait, 3) for title, work in case.baselines.items()]
    if case.nbytes:
        contestants.append(contestant(copy_name(name), _copy(bench, case.nbytes), bench.wait))
    if case.flops:
        contestants.append(product(bench))
    timings = bench.compare(section(name), contestants, share=0.02)

    def quality(title: str, result: Any) -> Mapping[str, float]:
        return case.quality(result) if title == name or title in case.ways else {}

    def details(title: str, result: Any) -> Mapping[str, Any]:
        return _rates(bench, case, timings, title) if title == name or title in case.ways else {}

    baselines = [title for title in timings if title != name and title != CEILING]
    return rows_of(section(name), timings, baselines, quality=quality, details=details)


def _rates(bench: GpuWorkbench, case: Case, timings: Timings, title: str) -> dict[str, Any]:
    """What was reached, and what share of what a copy and a matrix product reach in the same run."""
    spread, found = timings[title].spread, dict[str, Any]({"on": type(bench.kernels).__name__})
    if spread is None:
        return found
    if case.nbytes:
        found["GB/s"] = round(case.nbytes / spread.median / 1e9, 2)
    if case.flops:
        found["TFLOP/s"] = round(case.flops / spread.median / 1e12, 4)
        if timings[CEILING].seconds:
            best = 2.0 * bench.sizes.product**3 / min(timings[CEILING].seconds)
            found["of the fastest product"] = round(case.flops / spread.median / best, 4)
    return found


def _copy(bench: GpuWorkbench, nbytes: int) -> Work:
    """Half of them read, half of them written."""
    torch = bench.torch
    source, target = (torch.zeros(max(nbytes // 2, 1), dtype=torch.uint8, device=bench.target.torch) for _ in range(2))
    return lambda: target.copy_(source)


def _maps(bench: GpuWorkbench, grid: tuple[int, int], count: int) -> list[Float]:
    """Descriptors ``(grid_h, grid_w, C)`` of images, by torch in fp32."""

    def make() -> list[Float]:
        size = tuple((cells - 1) * bench.stride + bench.spec.patch for cells in grid)
        found = []
        for i in range(count):
            pixels = load_pixels(bench.paths[i % len(bench.paths)], (size[0], size[1]))
            encoded = torch_pass(bench, pixels[None], compiled=False, half=False)
            tokens = encoded.fetch(encoded.queue())[str(bench.match_facet)]
            found.append(np.ascontiguousarray(tokens[0, 1:].reshape(*grid, -1)))
        return found

    maps: list[Float] = bench.once(("maps", grid, count), make)
    return maps


def _grid(bench: GpuWorkbench) -> tuple[int, int]:
    grid: tuple[int, int] = bench.glue_gpu().grid(bench.size, bench.stride)
    return grid


def _resize(bench: GpuWorkbench, name: str) -> Case:
    height, width = bench.sizes.decoded
    photo = next(iter(sample_images().values())).convert("RGB").resize((width, height))
    image = np.asarray(photo)
    images = np.repeat(image[None], bench.sizes.batch, axis=0)
    device, size = bench.kernels, bench.size
    held, expected = device.upload(images), np.asarray(resize_on_cpu(photo, size))

    def quality(result: Any) -> Mapping[str, float]:
        return {"largest difference": float(np.abs(device.download(result)[-1].astype(int) - expected).max())}

    nbytes = images.nbytes + len(images) * expected.nbytes
    return Case(name, lambda: preprocess.resize(device, held, size), quality, nbytes=nbytes)


def _log_bin(bench: GpuWorkbench, name: str) -> Case:
    from facetrt.benchmarks.baselines import strong_glue

    grid, device, torch = _grid(bench), bench.kernels, bench.torch
    maps = np.stack(_maps(bench, grid, bench.sizes.batch)).astype(np.float16)
    held, tensor = device.upload(maps), torch.from_numpy(maps).to(bench.target.torch)
    tensor = tensor if bench.target.half else tensor.float()

    def quality(result: Any) -> Mapping[str, float]:
        expected = log_bin(maps[-1])
        difference = np.abs(device.download(result)[-1].astype(np.float32) - expected).max()
        return {"largest difference": float(difference / np.abs(expected).max())}

    bins = 17
    return Case(
        name,
        lambda: device_log_bin.log_bin(device, held),
        quality,
        {glue_name(name): lambda: [strong_glue.log_bin(one) for one in tensor]},
        nbytes=maps.nbytes * (1 + bins),
    )


def _best_buddies(bench: GpuWorkbench, name: str, grid: tuple[int, int]) -> Case:
    """Binning included on both sides."""
    from facetrt.benchmarks.baselines import strong_glue

    device, torch = bench.kernels, bench.torch
    maps = _maps(bench, grid, 2)
    halves = [values.astype(np.float16) for values in maps]
    held = [device.upload(values) for values in halves]
    tensors = [torch.from_numpy(values).to(bench.target.torch) for values in (halves if bench.target.half else maps)]

    def glue() -> Any:
        return strong_glue.best_buddies(strong_glue.log_bin(tensors[0]), strong_glue.log_bin(tensors[1]))

    def quality(result: Any) -> Mapping[str, float]:
        expected = best_buddies(maps[0], maps[1])
        pairs = ((result.nn_ab, expected.nn_ab), (result.nn_ba, expected.nn_ba))
        return {"equal neighbours": min(float((device.download(got) == want).mean()) for got, want in pairs)}

    methods = [device_buddies.Method.DIRECT, device_buddies.Method.IDENTITY] if grid == _grid(bench) else []
    ways = {
        f"{name}, {method}": partial(device_buddies.best_buddies, device, held[0], held[1], 2, method)
        for method in methods
    }
    cells, channels = grid[0] * grid[1], maps[0].shape[2]
    return Case(
        name,
        lambda: device_buddies.best_buddies(device, held[0], held[1], 2),
        quality,
        {glue_name(name): glue},
        ways,
        flops=2.0 * cells * cells * channels * 2,  # by the identity: one product for each of two levels
    )


def _sweep(bench: GpuWorkbench, name: str) -> Case:
    """The co-segmentation's elbow sweep: every k on the device, where the host stops at the elbow."""
    device, sizes, options = bench.kernels, bench.sizes, CosegmentOptions(str(bench.cosegment_facet))
    rows = [normalise(values.reshape(-1, values.shape[2])) for values in _maps(bench, _grid(bench), bench.sizes.batch)]
    interval = min(options.sample_interval, max(1, len(rows) * len(rows[0]) // (4 * MAX_CLUSTERS)))
    samples = np.concatenate([values[::interval] for values in rows])
    counts = range(1, min(MAX_CLUSTERS, len(samples)) + 1)
    held, held_samples = device.upload(np.concatenate(rows)), device.upload(samples)

    def work() -> Any:
        fits = device_kmeans.kmeans_each(
            device, held_samples, counts, iterations=sizes.iterations, restarts=sizes.restarts
        )
        found = device_kmeans.assign_each(device, held, [fit.centroids for fit in fits])
        chosen = device_kmeans.elbow(device, found.objectives, len(held), options.elbow)
        return device_kmeans.select_labels(device, found.labels, chosen)

    def quality(result: Any) -> Mapping[str, float]:
        expected = np.concatenate(cluster_elbow(rows, elbow=options.elbow, sample_interval=interval).labels)
        return {"equal labels": float((device.download(result) == expected).mean())}

    faiss = {f"{name}, FAISS on the CPU": lambda: elbow_sweep(rows, all_rounds=False, sample_interval=interval)}
    return Case(name, work, quality, faiss)


def _vote(bench: GpuWorkbench, name: str) -> Case:
    device, random = bench.kernels, np.random.default_rng(0)
    grid, images = _grid(bench), bench.sizes.images
    cells = grid[0] * grid[1]
    labels = random.integers(0, MAX_CLUSTERS, (images, cells)).astype(np.uint8)
    saliency = random.random((images, cells), np.float32) * (labels + 1) / MAX_CLUSTERS
    held = device.upload(labels.ravel()), device.upload(saliency.astype(np.float32).ravel())
    bounds = [cells * i for i in range(images + 1)]

    def work() -> Any:
        return device_vote.vote(device, held[0], held[1], bounds, MAX_CLUSTERS, threshold=0.2, percentage=75)

    def quality(result: Any) -> Mapping[str, float]:
        expected = vote(list(labels), list(saliency), MAX_CLUSTERS, threshold=0.2, percentage=75)
        return {"equal counts": float((device.download(result.counts) == expected.counts).mean())}

    return Case(name, work, quality, nbytes=labels.nbytes + saliency.nbytes)


def _dense_crf(bench: GpuWorkbench, name: str) -> Case:
    """Message passing on lattices that are on the device already; the host's time includes making them."""
    device = bench.kernels
    image = np.asarray(resize_on_cpu(next(iter(sample_images().values())).convert("RGB"), bench.size)).copy()
    energy, rounds = crf_energy(image, bench.sizes.labels), bench.sizes.crf_iterations
    lattices = device_crf.upload_lattices(device, image)
    held = device.upload(energy.reshape(len(energy), -1))

    def quality(result: Any) -> Mapping[str, float]:
        found = device.download(result).argmax(axis=0)
        expected = dense_crf(image, energy, iterations=rounds).reshape(len(energy), -1).argmax(axis=0)
        return {"equal labels": float((found == expected).mean())}

    host = {f"{name}, on the CPU": lambda: dense_crf(image, energy, iterations=rounds)}
    return Case(name, lambda: device_crf.mean_field(device, held, lattices, iterations=rounds), quality, host)


def _track(bench: GpuWorkbench, name: str) -> Case:
    """Points of a frame, looked for everywhere, there and back; the CPU goes from coarse to fine."""
    device, values = bench.kernels, _maps(bench, _grid(bench), 1)[0]
    values = values - values.mean(axis=(0, 1))
    frames, grid, channels = (values, np.roll(values, 1, axis=1)), values.shape[:2], values.shape[2]
    at = np.random.default_rng(0).uniform(0, 1, (bench.sizes.points, 2)) * (np.array(grid[::-1]) - 1)
    count, whole = len(at), Window.whole(len(at), (grid[0], grid[1]))
    none, flags = device.upload(np.zeros(channels, np.float32)), device.zeros((2,), np.int32)
    parts = [device_track.Part(device.upload(frame), none, 1.0) for frame in frames]
    positions, shapes = (device.upload(a.astype(np.float32)) for a in (at, np.tile(np.eye(2), (count, 1, 1))))
    window, rows = (device.upload(a.astype(np.int32)) for a in (whole.corners, np.arange(count)))
    first = device_track.prepare(device, parts[:1], flags)
    around = device_track.patches(device, first, positions)

    def work() -> Any:
        seen = device_track.prepare(device, parts[1:], flags, first)
        start = device_track.search(device, seen, device_track.binned(device, first, positions), window)
        found = device_track.align(device, around, rows, seen, start, shapes)
        device_track.search(device, first, device_track.binned(device, seen, found.positions), window)
        return found.positions

    def on_host() -> NDArray[np.float64]:
        before, seen = (DescriptorMap.of(frame) for frame in frames)
        start = find(seen, before.binned(at), whole)
        found = align(Patches.around(before, at), Slopes.of(seen), start, np.tile(np.eye(2), (count, 1, 1)))
        find(before, seen.binned(found.positions), whole)
        return found.positions

    def quality(result: Any) -> Mapping[str, float]:
        distance = np.abs(device.download(result) - on_host()).max(axis=1)
        return {"within 0.05 cells of the CPU's": float((distance < 0.05).mean())}

    flops = 2.0 * 2 * count * 17 * channels * grid[0] * grid[1]
    return Case(name, work, quality, {f"{name}, on the CPU": on_host}, flops=flops)


def _eigenvectors(bench: GpuWorkbench, name: str) -> Case:
    """Graphs and second eigenvectors of a batch of scenes, beside one on the CPU and by torch's dense solver."""
    device, torch = bench.kernels, bench.torch
    rows = scene_rows(bench.sizes.eigenvector, bench.spec.dim)
    held = device.upload(np.stack([rows] * bench.sizes.batch))

    def work() -> Any:
        return device_graph.solve(device_graph.threshold_graphs(device, held, THRESHOLD), 2)

    def dense() -> Any:
        weights = torch.from_numpy(threshold_graph(rows, THRESHOLD).dense()).to(bench.target.torch)
        scale = weights.sum(dim=1).rsqrt()
        return torch.linalg.eigh(scale[:, None] * weights * scale)[1][:, -2]

    def quality(result: Any) -> Mapping[str, float]:
        expected = smallest_eigenvectors(threshold_graph(rows, THRESHOLD), 2).vectors[:, 1]
        found = result[0].vectors[:, 1]
        return {"cosine": float(abs(found @ expected) / (np.linalg.norm(found) * np.linalg.norm(expected)))}

    baselines = {
        f"{name}, one image on the CPU": lambda: smallest_eigenvectors(threshold_graph(rows, THRESHOLD), 2),
        f"{name}, one image by torch's dense solver": dense,
    }
    return Case(name, work, quality, baselines)


def _memory(bench: GpuWorkbench, grid: tuple[int, int]) -> list[Row]:
    """The most that best buddies of two large maps hold, the maps included."""
    name = buddies_name(grid[0] * grid[1])
    try:
        counting = CountingDevice(bench.kernels)
        held = [counting.upload(values.astype(np.float16)) for values in _maps(bench, grid, 2)]
        found = device_buddies.best_buddies(counting, held[0], held[1], 2)
        counting.download(found.nn_ab)
    except FacetrtError as error:
        return [Row(MEMORY, name, None, "MiB", reason=str(error))]
    return [Row(MEMORY, name, Spread.of([counting.peak / 2**20]), "MiB")]
