"""The serve suite: what Triton's batches are worth with many clients, and how long each of them waits."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from facetrt.benchmarks.cpu.suite import Opening, Report
from facetrt.benchmarks.missing import import_library
from facetrt.benchmarks.one_bundle import OneBundle
from facetrt.benchmarks.results import Bar, Row, Spread
from facetrt.benchmarks.timing import Clock, Contestant, compare, rows_of
from facetrt.engine.samples import sample_paths
from facetrt.engine.serving.tasks import TaskName, TaskOptions
from facetrt.engine.serving.triton_config import EncoderPlatform, RepositoryOptions
from facetrt.engine.serving.triton_repository import write_repository
from facetrt.engine.serving.triton_server import ServerOptions, TritonServer

BATCHED, UNBATCHED = "served, batched", "served, one at a time"
ALONE = "engine, one after the other"


@dataclass(frozen=True)
class ServeSizes:
    """How large everything is; the bars hold for the defaults.

    Attributes:
        side: shorter side of the images, in pixels.
        clients: that ask side by side, each for its next result when it has the last.
        requests: of one round, in all.
        batch: that are run together at most.
        seconds: for the whole suite, roughly.
    """

    side: int = 112
    clients: int = 16
    requests: int = 64
    batch: int = 16
    seconds: float = 150


QUICK_SERVE = ServeSizes(side=64, clients=4, requests=8, batch=4, seconds=0)


@dataclass
class ServeBench(OneBundle):
    """Servers of one bundle; use as a context manager."""

    bundle: Path | str
    folder: Path
    sizes: ServeSizes = field(default_factory=ServeSizes)
    rounds: int = 5
    report: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self._clients: dict[int, list[Any]] = {}

    def clients(self, batch: int) -> list[Any]:
        """Connections to a server whose batches have at most so many requests, which is started at first.

        Raises:
            MissingDependencyError, BackendError: Triton is not there, or does not start.
        """
        if batch not in self._clients:
            triton, options = import_library("tritonclient.grpc", extra="serve"), _free_ports()
            place = self.folder / f"batch-{batch}"
            queue = RepositoryOptions(encoder=EncoderPlatform.INSIDE, batch=batch, waiting=10 * self.sizes.clients)
            tasks = TaskOptions((TaskName.MATCH,), load_size=self.sizes.side)
            write_repository(self.bundle, place, tasks, queue)
            self._stack.enter_context(TritonServer(place, options, place.with_suffix(".log")))
            address = f"127.0.0.1:{options.grpc_port}"
            self._clients[batch] = [
                self._stack.enter_context(triton.InferenceServerClient(address)) for _ in range(self.sizes.clients)
            ]
        return self._clients[batch]


def run_serve(bench: ServeBench) -> Report:
    """Measure all sections; a row that this machine cannot run says why."""
    opening = Opening()
    rows = measure(bench)
    return opening.close("serve", bench, rows, bars(bench.sizes), comparable=bench.sizes == ServeSizes(), notes=[])


def bars(sizes: ServeSizes) -> list[Bar]:
    """What is wanted, on any machine."""
    what = f"time per pair, {sizes.clients} clients, one at a time vs batched"
    return [Bar(what, section(sizes), BATCHED, UNBATCHED, 1.5)]


def section(sizes: ServeSizes) -> str:
    """How the rows call it."""
    return f"match, {sizes.side} px, {sizes.clients} clients"


def measure(bench: ServeBench) -> list[Row]:
    """Seconds per pair and latencies of clients that all ask at once, of servers that batch and that do not."""
    sizes, waits = bench.sizes, dict[str, list[float]]()
    paths = list(sample_paths().values())
    pairs = [(paths[i % len(paths)], paths[(i + 1 + i // len(paths)) % len(paths)]) for i in range(sizes.requests)]
    contents = {path: path.read_bytes() for path in paths}

    def served(name: str, batch: int) -> Contestant:
        def ask(client: Any, pair: Sequence[Path]) -> float:
            start = time.perf_counter()
            inputs = [_input(key, contents[path]) for key, path in zip(("image_a", "image_b"), pair, strict=True)]
            client.infer("match", inputs)
            return time.perf_counter() - start

        def ask_all(client: Any, share: Sequence[tuple[Path, Path]]) -> list[float]:
            return [ask(client, pair) for pair in share]

        def run(clock: Clock) -> Any:
            clients = bench.clients(batch)
            with ThreadPoolExecutor(sizes.clients) as pool:
                shares = [pairs[i :: sizes.clients] for i in range(len(clients))]
                seconds = [each for found in pool.map(ask_all, clients, shares) for each in found]
            waits.setdefault(name, []).extend(seconds)
            clock.charge(clock.seconds / len(pairs))

        return Contestant(name, run, prepare=lambda: bench.clients(batch))

    def alone(clock: Clock) -> None:
        for pair in pairs[: max(2, len(pairs) // 8)]:
            bench.engine.match(*pair, load_size=sizes.side)
        clock.charge(clock.seconds / max(2, len(pairs) // 8))

    contestants = [served(BATCHED, sizes.batch), served(UNBATCHED, 1), Contestant(ALONE, alone)]
    timings = compare(contestants, rounds=bench.rounds, budget=sizes.seconds, report=bench.report)
    rows = rows_of(
        section(sizes),
        timings,
        [UNBATCHED, ALONE],
        details=lambda name, found: {"pairs/s": round(1 / timings[name].spread.median, 1)},  # type: ignore[union-attr]
    )
    for name, seconds in waits.items():
        for share in (50, 99):
            rows.append(Row(section(sizes), f"{name}, p{share}", Spread.of([float(np.percentile(seconds, share))])))
    return rows


def _input(name: str, data: bytes) -> Any:
    triton = import_library("tritonclient.grpc", extra="serve")
    tensor = triton.InferInput(name, [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[data]], np.object_))
    return tensor


def _free_ports() -> ServerOptions:
    with ExitStack() as held:
        found = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        http, grpc = (each.getsockname()[1] for each in found)
    return ServerOptions(http_port=http, grpc_port=grpc, metrics_port=0)
