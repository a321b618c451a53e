"""What a user may choose about running an encoder, and how ``auto`` is resolved."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from facetrt.kernels.errors import InputError
from facetrt.kernels.machine import processors, processors_to_run_on

MAX_STREAMS = 16  # a GPU is full long before

Choice = TypeVar("Choice", bound=StrEnum)


class BackendName(StrEnum):
    """Backends by name; ``auto`` is resolved once, when the engine opens (see ``choose_backend``)."""

    AUTO = "auto"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class DeviceName(StrEnum):
    """Devices by name; ``auto`` is resolved once, when the engine opens.

    ``auto`` is the CPU, and the GPU only if the backend is TensorRT, of either kind: nothing moves to another machine's
    GPU, and to other arithmetic, because a driver happens to be there.
    """

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """What an encoder computes in.

    ``auto`` is the bundle's own: precision is never lowered without being asked. ``bf16`` keeps the patch convolution
    and the residual stream in fp32, and what else the bundle's contract was found to need. ``fastest`` is bf16 where
    the contract holds, OpenVINO is installed and the processor has it, and the bundle's own elsewhere; on a GPU a
    bundle always runs in its own.
    """

    AUTO = "auto"
    FASTEST = "fastest"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Hint(StrEnum):
    """``latency`` gives one run all threads; ``throughput`` runs several batches side by side."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


class Kernels(StrEnum):
    """Where the tasks' kernels run; ``auto`` is the device on a GPU and the host on a CPU."""

    AUTO = "auto"
    DEVICE = "device"
    HOST = "host"


class Specialisation(StrEnum):
    """When kernels for the very shapes of a batch are compiled, by a backend that compiles on the GPU at hand.

    ``eager``: before the first batch of these shapes runs. ``lazy``: beside it, while general kernels run, so that no
    batch waits, and results may change in their last bits once. ``none``: never, general kernels run always.
    """

    EAGER = "eager"
    LAZY = "lazy"
    NONE = "none"


@dataclass(frozen=True)
class RunOptions:
    """How an encoder is run; ``Engine.open`` documents the fields. A backend gets it without any ``auto``."""

    backend: BackendName = BackendName.AUTO
    device: DeviceName = DeviceName.AUTO
    precision: Precision = Precision.AUTO
    hint: Hint = Hint.LATENCY
    threads: int | None = None
    cache: Path | None = None
    streams: int = 1
    kernels: Kernels = Kernels.AUTO
    allow_inexact: bool = False
    specialisation: Specialisation = Specialisation.EAGER

    @staticmethod
    def parse(
        *,
        backend: str,
        device: str,
        precision: str,
        hint: str,
        threads: int | None,
        cache: str | Path | None,
        streams: int = 1,
        kernels: str = Kernels.AUTO,
        allow_inexact: bool = False,
        specialisation: str = Specialisation.EAGER,
    ) -> RunOptions:
        """Options by their names; raises :class:`InputError`, which lists what there is, for others."""
        if not 1 <= streams <= MAX_STREAMS:
            raise InputError(f"streams={streams}: expected 1 to {MAX_STREAMS}")
        here = processors()
        if threads is not None and not 1 <= threads <= here:
            raise InputError(f"threads={threads}: expected 1 to {here}, the processors here, or None for all")
        if threads is None and here < processors_to_run_on():
            threads = here  # backends count what they may run on, and then wait for their container's share of it
        return RunOptions(
            _choice("backend", backend, BackendName),
            _choice("device", device, DeviceName),
            _choice("precision", precision, Precision),
            _choice("hint", hint, Hint),
            threads,
            None if cache is None else Path(cache),
            streams,
            _choice("kernels", kernels, Kernels),
            allow_inexact,
            _choice("specialisation", specialisation, Specialisation),
        )


def _choice(what: str, given: str, choices: type[Choice]) -> Choice:
    try:
        return choices(given)
    except ValueError as error:
        names = ", ".join(choices)
        raise InputError(f"{what} {given!r} is not available in this version: expected one of {names}") from error
