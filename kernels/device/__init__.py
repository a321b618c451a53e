"""The operations of ``facetrt.kernels`` on a GPU.

``programs`` holds the Triton kernels; the modules here plan their launches and need neither torch nor triton. A
:class:`Device` launches them: :class:`~facetrt.kernels.device.runtime.cuda.CudaDevice` from compiled cubins
(production), :class:`~facetrt.kernels.device.runtime.triton_device.TritonDevice` from source, on a GPU or in Triton's
interpreter.
"""

from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program

__all__ = ["Device", "DeviceArray", "Program"]
