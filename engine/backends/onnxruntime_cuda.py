"""ONNX Runtime on a GPU, with its CUDA provider and nothing behind it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from facetrt.engine.backends.base import first_line
from facetrt.engine.backends.cuda import (
    MAX_REPLAYS,
    CudaBackend,
    DeviceTensors,
    Lane,
    Shape,
    copy_all,
    fixed_copies,
    output_shapes,
)
from facetrt.engine.backends.onnxruntime import import_onnxruntime
from facetrt.engine.backends.run_options import BackendName
from facetrt.engine.bundle.manifest import Manifest
from facetrt.kernels.device import DeviceArray
from facetrt.kernels.device.runtime.cuda import CudaDevice
from facetrt.kernels.errors import BackendError, BundleError, MissingDependencyError

PROVIDER = "CUDAExecutionProvider"
NOT_RECORDED = "-1"  # ONNX Runtime's number for runs that it neither records nor replays


def check_provider() -> Any:
    """The onnxruntime module, if its CUDA provider is there.

    Raises:
        MissingDependencyError: it is not; says what is installed and what to do.
    """
    onnxruntime = import_onnxruntime()
    if PROVIDER not in onnxruntime.get_available_providers():
        found = " and ".join(f"{n} {v}" for n in ("onnxruntime", "onnxruntime-gpu") if (v := _version(n)) is not None)
        raise MissingDependencyError(
            f"this ONNX Runtime has no CUDA provider ({found or 'an unknown build'} is installed): pip uninstall "
            "onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu; the two share one folder"
        )
    return onnxruntime


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class OnnxRuntimeCudaBackend(CudaBackend):
    """One session for each lane, on the lane's stream and on our arrays.

    Bundles of one size run as CUDA graphs, which ONNX Runtime records in the first run of each batch size. Not so on
    several streams: it records in CUDA's global mode, in which what other threads allocate fails, and the recording
    with it. With one stream, no other thread of the process may use the GPU while a batch size runs first.
    """

    name = BackendName.ONNXRUNTIME

    @classmethod
    def check_installed(cls) -> None:
        check_provider()

    def _open(self, device: CudaDevice) -> None:
        self._library = check_provider()
        if hasattr(self._library, "preload_dlls"):
            self._library.preload_dlls()  # CUDA's libraries from their packages, if nothing loaded them yet
        self._encoder = self.bundle.encoder

    def _make_lane(self, device: CudaDevice) -> Lane:
        session = self._session(device)
        self._check_graph((v.name for v in session.get_inputs()), (v.name for v in session.get_outputs()))
        return OnnxRuntimeLane(device, self.bundle.manifest, self._library, session, records=self._records)

    @property
    def _records(self) -> bool:
        return not self.bundle.manifest.dynamic and self.options.streams == 1

    def _session(self, device: CudaDevice) -> Any:
        options = self._library.SessionOptions()
        options.log_severity_level = 4  # failures are raised as errors; the library would print them as well
        provider = {
            "device_id": str(device.ordinal),
            "user_compute_stream": str(device.stream_handle),
            "use_tf32": "0",  # fp32 bundles are held to fp32's contract
            "enable_cuda_graph": str(int(self._records)),
            "cudnn_conv_algo_search": "HEURISTIC",  # the default measures, and may choose differently every time
        }

        def make() -> Any:
            return self._library.InferenceSession(self._encoder, options, providers=[(PROVIDER, provider)])

        try:
            session = _with_memory(device, make, make)
        except Exception as error:
            if _lacks_memory(error):
                raise _out_of_memory(device, error) from error
            raise BundleError(f"{self.bundle.path}: the encoder cannot be loaded: {first_line(error)}") from error
        session.disable_fallback()
        found = session.get_providers()
        if found[:1] != [PROVIDER]:  # the library only warns when the provider cannot load
            raise BackendError(
                f"ONNX Runtime's CUDA provider cannot load here (it would run on {', '.join(found)}): install the CUDA "
                f"and cuDNN that onnxruntime-gpu {self._library.__version__} is built for: pip install "
                "'onnxruntime-gpu[cuda,cudnn]'"
            )
        return session

    def _shut(self) -> None:
        self._encoder = b""


class OnnxRuntimeLane(Lane):
    """A session whose runs are ordered by the lane's stream."""

    def __init__(self, device: CudaDevice, manifest: Manifest, library: Any, session: Any, *, records: bool) -> None:
        super().__init__(device, manifest)
        self._library, self._session, self._records = library, session, records
        self._replays: dict[Shape, _Bound] = {}

    def _run(self, inputs: DeviceTensors) -> dict[str, DeviceArray]:
        shape = inputs["images"].shape
        if self._records and shape not in self._replays and len(self._replays) < MAX_REPLAYS:
            fixed = fixed_copies(self.device, inputs)
            self._replays[shape] = _Bound(self, fixed, str(len(self._replays) + 1))
        if shape in self._replays:
            return self._replays[shape].run(inputs)
        return _Bound(self, inputs, NOT_RECORDED).enqueue()

    def close(self) -> None:
        self._replays.clear()
        self._session = None


class _Bound:
    """Inputs and outputs at fixed addresses, without which a recorded run would give stale results."""

    def __init__(self, lane: OnnxRuntimeLane, inputs: DeviceTensors, number: str) -> None:
        self._device, self._session = lane.device, lane._session
        self._inputs = inputs
        shapes = output_shapes(lane.manifest, inputs)
        self._outputs = {name: lane.device.empty(shape, np.float32) for name, shape in shapes.items()}
        self._binding = lane._session.io_binding()
        for bind, arrays in ((self._binding.bind_input, inputs), (self._binding.bind_output, self._outputs)):
            for name, array in arrays.items():
                bind(name, "cuda", lane.device.ordinal, array.dtype.type, list(array.shape), array.pointer)
        self._plain = self._run_options(lane, NOT_RECORDED)
        self._options = self._run_options(lane, number)

    @staticmethod
    def _run_options(lane: OnnxRuntimeLane, number: str) -> Any:
        options = lane._library.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if lane._records:
            options.add_run_config_entry("gpu_graph_id", number)
        return options

    def enqueue(self) -> dict[str, DeviceArray]:
        """Run on the bound arrays; without memory, once more after our pools have given back what they hold."""
        try:
            # After a run without memory the next one must not be recorded, as nothing can be allocated then.
            _with_memory(self._device, lambda: self._run(self._options), lambda: self._run(self._plain))
        except Exception as error:
            raise self._translated(error) from error
        return self._outputs

    def _run(self, options: Any) -> None:
        self._session.run_with_iobinding(self._binding, options)

    def _translated(self, error: Exception) -> BackendError:
        if _lacks_memory(error):
            return _out_of_memory(self._device, error)
        if "captur" in str(error):
            return BackendError(
                f"onnxruntime failed to record the encoder: {first_line(error)}: keep other threads off the GPU while "
                "a batch size runs first, or use streams=2, which records nothing"
            )
        return BackendError(f"onnxruntime failed to run the encoder: {first_line(error)}")

    def run(self, inputs: DeviceTensors) -> dict[str, DeviceArray]:
        """Copy in, run, copy out."""
        copy_all(self._device, inputs, self._inputs)
        fixed = self.enqueue()
        results = {name: self._device.empty(array.shape, array.dtype) for name, array in fixed.items()}
        copy_all(self._device, fixed, results)
        return results


def _with_memory(device: CudaDevice, call: Callable[[], Any], again: Callable[[], Any]) -> Any:
    """The result of ``call``; if memory is lacking, of ``again``, after our pools have given back what they hold."""
    try:
        return call()
    except Exception as error:
        if not _lacks_memory(error):
            raise
    device.free_held()
    return again()


def _lacks_memory(error: Exception) -> bool:
    return any(words in str(error) for words in ("allocate memory", "out of memory", "ALLOC_FAILED"))


def _out_of_memory(device: CudaDevice, error: Exception) -> BackendError:
    return BackendError(
        f"out of device memory on {device.name}, in onnxruntime: {first_line(error)}: lower the batch size or the "
        "image size, or use fewer streams"
    )
