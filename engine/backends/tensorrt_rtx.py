"""TensorRT for RTX: engines that were built anywhere, for a list of GPUs, and get their kernels on the GPU at hand.

What the GPU at hand makes of an engine is kept beside the bundle, in ``BUNDLE.cache``, or in the cache folder that was
chosen: the kernels that were compiled for it, and the comparison that no machine could make where the engine was built.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.base import Tensors
from facetrt.engine.backends.compiled_cache import CompiledCache
from facetrt.engine.backends.flavours import RTX
from facetrt.engine.backends.onnxruntime import OnnxRuntimeBackend
from facetrt.engine.backends.plan_check import check_reference, compare_plan
from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.backends.tensorrt import TensorRtBackend
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import ParityReport
from facetrt.engine.machine.driver import driver_version
from facetrt.kernels.device.runtime.cuda import CudaDevice
from facetrt.kernels.errors import OutputError, ParityError


class TensorRtRtxBackend(TensorRtBackend):
    """TensorRT's backend with kernels that are compiled here and kept, and an engine compared when it first runs.

    Attributes:
        parity: what the comparison found on this GPU, now or earlier; None before the backend is active.
    """

    flavour = RTX
    name = RTX.backend
    keeps_cache = True
    _config: Any = None
    _kernels_cache: Any = None

    @classmethod
    def check_supported(cls, bundle: Bundle, options: RunOptions) -> None:
        super().check_supported(bundle, options)
        OnnxRuntimeBackend.check_installed()  # what the engine is compared with when it first runs

    def __init__(self, bundle: Bundle, options: RunOptions) -> None:
        super().__init__(bundle, options)
        self.parity: ParityReport | None = None
        self._kept = b""  # the kernels on disk
        self._keeps = True  # until a folder that nobody chose cannot be written

    def _activate(self) -> None:
        super()._activate()
        try:
            self._compare_once()
            with self._devices[0].activate():
                self._keep_kernels()
        except BaseException:
            self._dispose()
            raise

    def _open(self, device: CudaDevice) -> None:
        super()._open(device)
        trt = self._trt
        self._key = self._cache_key(device)
        self._config = self._engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        chosen = self.options.specialisation.name
        self._config.dynamic_shapes_kernel_specialization_strategy = getattr(
            trt.DynamicShapesKernelSpecializationStrategy, chosen
        )
        self._kernels_cache = self._config.create_runtime_cache()
        kept = self._entry("kernels").read()
        if kept is not None and self._kernels_cache.deserialize(kept):
            self._kept = kept
        self._config.set_runtime_cache(self._kernels_cache)

    def _make_context(self) -> Any:
        return self._engine.create_execution_context(self._config)

    def _cache_key(self, device: CudaDevice) -> dict[str, str]:
        """Everything that compiled kernels, and their results, depend on."""
        major, minor = device.compute_capability
        return {
            "backend": self.name,
            "version": self._trt.__version__,
            "plan": self.bundle.manifest.files[self.plan].sha256,
            "gpu": f"{device.name} sm_{major}{minor}",
            "driver": f"{driver_version() or 'unknown'}, CUDA {device.driver_version}",
            "specialisation": self.options.specialisation,
        }

    @property
    def cache_folder(self) -> Path:
        """Where kernels and the comparison are kept."""
        beside = self.bundle.path.absolute()
        return self.options.cache or beside.with_name(f"{beside.name}.cache")

    def _entry(self, what: str) -> CompiledCache:
        return CompiledCache(self.cache_folder, {**self._key, "what": what})

    def _keep(self, what: str, blob: bytes) -> None:
        """Write an entry. A chosen folder must take it; beside the bundle, which may be read-only, it may fail."""
        if not self._keeps:
            return
        try:
            self._entry(what).write(blob)
        except OutputError as error:
            if self.options.cache is not None:
                raise
            self._keeps = False
            warnings.warn(f"{error}: until then every start compiles and compares anew", stacklevel=2)

    def _keep_kernels(self) -> None:
        blob = bytes(self._kernels_cache.serialize())
        if blob != self._kept:
            self._keep("kernels", blob)
            self._kept = blob

    def _compare_once(self) -> None:
        """Hold the engine to its contract on this GPU, unless that was done and recorded.

        Raises:
            ParityError: it misses the contract; nothing is recorded.
        """
        known = self._entry("parity").read()
        if known is not None:
            self.parity = ParityReport(**json.loads(known))
            return
        device = self._devices[0]
        record = self.bundle.manifest.plans[self.plan]
        check_reference(self.bundle.manifest, record)
        warnings.warn(
            f"{self.plan} runs for the first time on {device.name}: it is compared with ONNX Runtime on the processor, "
            "once, which may take a minute",
            stacklevel=2,
        )
        try:
            self.parity = compare_plan(self.bundle, record, self._run_here)
        except ParityError as error:
            raise ParityError(
                f"{self.bundle.path / self.plan} does not reproduce its graph on {device.name}, where it ran for the "
                f"first time: {error}; use backend onnxruntime, or a bundle of another precision"
            ) from None
        self._keep("parity", json.dumps(asdict(self.parity)).encode())

    def _run_here(self, inputs: Tensors) -> dict[str, NDArray[np.float32]]:
        """One batch on the first lane, before anybody else can have it."""
        lane = self._open_lanes[0]
        outputs = lane.run({name: lane.device.upload(values) for name, values in inputs.items()})
        return {name: lane.device.download(outputs[name]) for name in self.bundle.manifest.outputs}

    def _shut(self) -> None:
        if self._kernels_cache is not None and self._kept:  # not where opening failed
            self._keep_kernels()
        self._config = self._kernels_cache = None
        super()._shut()
