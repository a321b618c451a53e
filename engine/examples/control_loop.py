"""A control loop with asyncio: frames at a fixed rate, the newest one's features, and a deadline for each step.

    python -m facetrt.engine.examples.control_loop clip.mp4 --rate 20 --deadline 0.2

Where a robot would read its camera, this example plays a video. What a robot would decide is the direction of the most
salient place, from -1 (left) to 1 (right).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from facetrt.engine import Engine
from facetrt.engine.features.features import Features
from facetrt.engine.video.sources import Source, open_source
from facetrt.engine.video.stream import Stream, StreamResult
from facetrt.kernels.errors import FacetrtError


@dataclass
class Outcome:
    """What the loop did: how many commands went out, and how many steps had none in time."""

    commands: list[float] = field(default_factory=list)
    missed: int = 0


def steer(features: Features) -> float:
    """Direction of the most salient cell, from -1 (left) to 1 (right)."""
    column = int(features.saliency.argmax()) % features.grid[1]
    return 2 * (column + 0.5) / features.grid[1] - 1


async def push_frames(source: Source, stream: Stream[Features], rate: float) -> None:
    """Put a frame every ``1 / rate`` seconds, as a camera would; the stream keeps the newest alone."""
    begin, number = time.monotonic(), 0
    while (frame := await asyncio.to_thread(next, source, None)) is not None:
        await asyncio.sleep(begin + number / rate - time.monotonic())
        stream.put(frame)
        number += 1
    stream.finish()


async def control(stream: Stream[Features], deadline: float, act: Callable[[float], None], outcome: Outcome) -> None:
    """Act on each result. A step over its deadline acts on nothing; its result is late, and is still waited for."""
    pending: asyncio.Task[StreamResult[Features] | None] | None = None
    while True:
        pending = pending or asyncio.create_task(asyncio.to_thread(next, stream, None))
        done, _ = await asyncio.wait([pending], timeout=deadline)
        if not done:
            outcome.missed += 1
            act(0.0)  # what is safe here: straight on
            continue
        result, pending = pending.result(), None
        if result is None:
            return
        outcome.commands.append(steer(result.features))
        act(outcome.commands[-1])


async def run(
    engine: Engine,
    source: Source,
    *,
    rate: float = 20,
    deadline: float = 0.2,
    load_size: int = 112,
    act: Callable[[float], None] = lambda direction: None,
) -> Outcome:
    """Both at once, until the source ends; an error in one ends the other."""
    outcome = Outcome()
    with source, engine.stream(load_size=load_size, latency_budget=deadline) as stream:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(push_frames(source, stream, rate))
            tasks.create_task(control(stream, deadline, act, outcome))
        print(stream.report)
    return outcome


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="video file, or folder of images")
    parser.add_argument("--bundle", default="builtin")
    parser.add_argument("--rate", type=float, default=20, help="frames per second")
    parser.add_argument("--deadline", type=float, default=0.2, help="seconds that a step may take")
    parser.add_argument("--load-size", type=int, default=112)
    parser.add_argument("--frames", type=int, help="stop after so many")
    given = parser.parse_args(arguments)
    if given.rate <= 0 or (given.frames or 0) < 0:
        parser.error(f"--rate {given.rate:g}, --frames {given.frames}: expected a rate above 0 and frames from 0")
    with open_source(given.source) as source, Engine.open(given.bundle) as engine:
        outcome = asyncio.run(
            run(
                engine,
                open_source(islice(source, given.frames)),
                rate=given.rate,
                deadline=given.deadline,
                load_size=given.load_size,
                act=lambda direction: print(f"{direction:+.2f}"),
            )
        )
    print(f"{len(outcome.commands)} commands, {outcome.missed} deadlines missed")


if __name__ == "__main__":
    failed: list[str] = []
    try:
        main()
    except* FacetrtError as errors:  # in a group where a task of the loop raised it
        failed = [str(error) for error in errors.exceptions]
    except* KeyboardInterrupt:
        failed = ["interrupted"]
    sys.exit("; ".join(failed) or 0)
