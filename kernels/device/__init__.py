"""The operations of ``facetrt.kernels`` on a GPU.

``programs`` holds the Triton kernels; the modules here plan their launches and need neither torch nor triton. A
:class:`Device` launches them: :class:`~facetrt.kernels.device.cuda.CudaDevice` from compiled cubins (production),
:class:`~facetrt.kernels.device.triton_device.TritonDevice` from source, on a GPU or in Triton's interpreter.
"""

from facetrt.kernels.device.base import Device, DeviceArray
from facetrt.kernels.device.program import Program

__all__ = ["Device", "DeviceArray", "Program"]
