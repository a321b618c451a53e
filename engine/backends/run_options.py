"""What a user may choose about running an encoder, and how ``auto`` is resolved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from facetrt.engine.machine.memory import MAX_CELLS, MAX_CELLS_SETTING
from facetrt.engine.settings import Setting, check
from facetrt.kernels.errors import InputError
from facetrt.kernels.machine import processors, processors_to_run_on

MAX_STREAMS = 16  # a GPU is full long before


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
    """When programs, or kernels, for the very shapes of a batch are compiled, by a backend that compiles.

    ``eager``: before the first batch of these shapes runs. ``lazy``: once that pays (OpenVINO: after ten batches;
    TensorRT for RTX: beside the first ones, so that no batch waits), and results may change in their last bits then.
    ``none``: never, general ones run always. ``auto`` is ``eager`` for TensorRT for RTX. For OpenVINO it is not: a
    program for one size gains 3 to 7 % and costs as much as ten images of 224 pixels gain by it, which only the caller
    can know to come. But for long sequences in bf16 ``auto`` and ``lazy`` are ``eager``: the first image gains more.
    """

    AUTO = "auto"
    EAGER = "eager"
    LAZY = "lazy"
    NONE = "none"


PANEL = "Running the encoder"


@dataclass(frozen=True)
class RunOptions:
    """How an encoder is run; ``Engine.open`` documents the fields. A backend gets it without any ``auto``."""

    backend: Annotated[BackendName, Setting("Who runs it.", panel=PANEL)] = BackendName.AUTO
    device: Annotated[DeviceName, Setting("Where.", panel=PANEL)] = DeviceName.AUTO
    precision: Annotated[
        Precision, Setting("Auto is the bundle's own; fastest is bf16 where that is exact enough.", panel=PANEL)
    ] = Precision.AUTO
    hint: Annotated[Hint, Setting("One batch at a time, or several side by side.", panel=PANEL)] = Hint.LATENCY
    threads: Annotated[int | None, Setting("Of the processor; all cores by default.", minimum=1, panel=PANEL)] = None
    cache: Annotated[Path | None, Setting("Folder for compiled encoders (openvino, tensorrt-rtx).", panel=PANEL)] = None
    streams: Annotated[int, Setting("Of a GPU: batches that overlap.", minimum=1, maximum=MAX_STREAMS, panel=PANEL)] = 1
    kernels: Annotated[
        Kernels, Setting("Where match and cosegment do the rest; auto is beside the encoder.", panel=PANEL)
    ] = Kernels.AUTO
    allow_inexact: Annotated[
        bool, Setting("Run a precision although it misses its contract with this bundle.", panel=PANEL)
    ] = False
    specialisation: Annotated[
        Specialisation, Setting("When openvino and tensorrt-rtx compile for new image sizes.", panel=PANEL)
    ] = Specialisation.AUTO
    max_cells: Annotated[int | None, replace(MAX_CELLS_SETTING, panel=PANEL)] = MAX_CELLS

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def parse(*, threads: int | None = None, **options: Any) -> RunOptions:
        """Options by names and numbers, for the processors here.

        Raises:
            InputError: a name that there is not, listing all; a number out of range.
        """
        here = processors()
        if threads is not None and not 1 <= threads <= here:
            raise InputError(f"threads={threads}: expected 1 to {here}, the processors here, or None for all")
        if threads is None and here < processors_to_run_on():
            threads = here  # backends count what they may run on, and then wait for their container's share of it
        return RunOptions(threads=threads, **options)
