"""What of facetrt can run on this machine, why the rest cannot, and the command that mends it.

Heavy libraries are only imported by :mod:`facetrt.engine.doctor.probes`, in processes of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from facetrt.engine.backends.flavours import FLAVOURS, RTX, Flavour
from facetrt.engine.backends.run_options import BackendName
from facetrt.engine.backends.tensorrt import PlanKey
from facetrt.engine.bundle.bundle import Bundle, builtin_path
from facetrt.engine.bundle.manifest import ENCODER, Manifest, PlanRecord
from facetrt.engine.doctor import probes
from facetrt.engine.machine.processor import BF16_FLAGS, cpu_field, installed_versions, processor_flags
from facetrt.kernels.device.runtime.cubins import architecture_to_compile, choose_architecture, no_kernels
from facetrt.kernels.errors import BackendError

PACKAGES = (
    "facetrt", "numpy", "opencv-python-headless", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "pycuda", "cuda-bindings", "nvidia-ml-py", "faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "torch", "triton", "timm",
    "onnx", "av", "zarr",
)  # fmt: skip
SHARING = (  # distributions that install the same files, so that the later one breaks the earlier one
    ("onnxruntime", "onnxruntime-gpu"),
    ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12"),
)
NOTABLE_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
PROBE_SECONDS = 60.0  # importing TensorRT from a cold disk takes many

CPU, GPU, OPENVINO, RTX_EXTRA = (f"pip install 'facetrt[{extra}]'" for extra in ("cpu", "gpu", "openvino", "rtx"))
DRIVER = "install NVIDIA's driver: https://www.nvidia.com/drivers"
VISIBLE = "nvidia-smi -L  # is the GPU listed, and does CUDA_VISIBLE_DEVICES hide it?"
RTX_PACKAGE = "tensorrt-rtx-cu13-bindings"
GPU_PACKAGES = ("onnxruntime-gpu", "tensorrt", RTX_PACKAGE, "pycuda")

KERNELS = "device kernels"
GPU_NEEDS = {  # packages
    "onnxruntime cuda": ("onnxruntime-gpu", "pycuda"),
    "tensorrt": ("tensorrt", "pycuda", "cuda-bindings"),
    "tensorrt-rtx": (RTX_PACKAGE, "pycuda", "cuda-bindings"),
    KERNELS: ("pycuda",),
}
INSTALLS = {"tensorrt-rtx": RTX_EXTRA}  # others come with the extra gpu
PROBE_OF = {
    "onnxruntime-gpu": "onnxruntime_cuda",
    "tensorrt": "tensorrt",
    RTX_PACKAGE: "tensorrt_rtx",
    "pycuda": "pycuda",
}
VERSIONS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # builder of a plan → probe that knows its version

Answer = Mapping[str, Any]


class State(StrEnum):
    """The state of one thing: it works, it could be made to work here, or it has no place on this machine."""

    WORKS = "works"
    MISSING = "missing"
    NOT_HERE = "not here"

    @property
    def mark(self) -> str:
        """``✓``, ``✗`` or ``–``."""
        return {State.WORKS: "✓", State.MISSING: "✗", State.NOT_HERE: "–"}[self]


@dataclass(frozen=True)
class Finding:
    """One thing, whether it works, what was found out about it, and the command that mends it, if one does."""

    name: str
    state: State
    detail: str = ""
    remedy: str | None = None


@dataclass(frozen=True)
class Gpu:
    """A GPU that CUDA sees. ``capability`` is (major, minor), ``memory`` in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def arch(self) -> str:
        """The architecture that kernels are compiled for, for example ``sm_90``."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: its version, the newest CUDA it runs, the GPUs it shows; ``problem`` says why there are none."""

    version: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class BundleReport:
    """What of a bundle can run here. ``architectures`` are those that it holds kernels for."""

    path: str
    model: str
    precision: str
    architectures: tuple[str, ...]
    backends: tuple[Finding, ...]
    kernels: Finding
    plans: tuple[Finding, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    ``clashes`` lists packages that overwrite each other's files; ``builders`` are the versions of those that build
    plans, as the libraries say them.
    """

    packages: Mapping[str, str]
    processor: str
    flags: tuple[str, ...]
    driver: Driver
    clashes: tuple[Finding, ...]
    backends: tuple[Finding, ...]
    kernels: Finding
    builders: Mapping[str, str] = field(default_factory=dict)
    bundle: BundleReport | None = None

    @property
    def runs(self) -> bool:
        """Whether some backend can run here, and the bundle, if one was given."""
        backends = self.backends if self.bundle is None else self.bundle.backends
        return any(finding.state is State.WORKS for finding in backends)


def diagnose(bundle: str | Path | None = None) -> Diagnosis:
    """Look at this machine, and at what of a bundle it can run. Creates no GPU context in this process.

    Raises:
        MissingFileError, BundleError: no bundle there, or a damaged one.
    """
    opened = None if bundle is None else Bundle.open(bundle)
    packages = installed_versions(PACKAGES)
    driver = read_driver(ask("gpu"))
    answers = _ask_all(packages, driver)
    flags = frozenset(processor_flags() or ())
    *on_gpu, kernels = _on_gpu(packages, driver, answers)
    machine = Diagnosis(
        packages,
        cpu_field("model name") or "unknown",
        tuple(flag for flag in NOTABLE_FLAGS if flag in flags),
        driver,
        clashes(packages),
        (*_on_processor(answers, flags), *on_gpu),
        kernels,
        {name: answers[probe]["version"] for name, probe in VERSIONS.items() if "version" in answers.get(probe, {})},
    )
    return machine if opened is None else replace(machine, bundle=_examine(opened, machine, str(bundle)))


def ask(probe: str, *arguments: str) -> Answer:
    """The answer of one of :data:`facetrt.engine.doctor.probes.PROBES`; a crash or silence becomes ``{"error": …}``."""
    command = [sys.executable, "-P", probes.__file__, probe, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_SECONDS:g} seconds"}
    if done.returncode < 0:
        return {"error": f"it crashed (signal {-done.returncode})"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"it ended with exit code {done.returncode}"}
    return answer


def read_driver(answer: Answer) -> Driver:
    """Read the driver from the answer of the probe ``gpu``."""
    gpus = tuple(Gpu(g["name"], (g["capability"][0], g["capability"][1]), g["memory"]) for g in answer.get("gpus", ()))
    cuda = answer.get("cuda")
    problem = answer.get("error") or (None if gpus else "the driver sees no GPU")
    return Driver(answer.get("driver"), None if cuda is None else (cuda[0], cuda[1]), gpus, problem)


def clashes(packages: Mapping[str, str]) -> tuple[Finding, ...]:
    """Installed packages that share their files."""
    found = []
    for names in SHARING:
        present = [name for name in names if name in packages]
        if len(present) > 1:
            extra = CPU if "gpu" not in "".join(present) else GPU
            remedy = f"pip uninstall -y {' '.join(present)} && {extra}"
            detail = "installed side by side, they overwrite each other's files: keep one"
            found.append(Finding(" and ".join(present), State.MISSING, detail, remedy))
    return tuple(found)


def _ask_all(packages: Mapping[str, str], driver: Driver) -> dict[str, Answer]:
    """What is installed, side by side; what needs a GPU only where there is one."""
    questions: dict[str, tuple[str, ...]] = {}
    if "onnxruntime" in packages or "onnxruntime-gpu" in packages:
        questions["onnxruntime"] = ()
    if "openvino" in packages:
        questions["openvino"] = ()
    if driver.gpus and "onnxruntime-gpu" in packages:
        questions["onnxruntime_cuda"] = (str(builtin_path() / ENCODER),)
    others = [PROBE_OF[name] for name in ("tensorrt", RTX_PACKAGE, "pycuda") if driver.gpus and name in packages]
    questions |= dict.fromkeys(others, ())
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda item: ask(item[0], *item[1]), questions.items())
        return dict(zip(questions, answers, strict=True))


def _on_processor(answers: Mapping[str, Answer], flags: frozenset[str]) -> tuple[Finding, ...]:
    onnxruntime = _library("onnxruntime cpu", "onnxruntime", answers, CPU)
    openvino = _library("openvino fp32", "openvino", answers, OPENVINO)
    bf16 = replace(openvino, name="openvino bf16")
    if openvino.state is State.WORKS and not (flags & BF16_FLAGS and "BF16" in answers["openvino"]["capabilities"]):
        bf16 = Finding("openvino bf16", State.NOT_HERE, "this processor has no bf16 arithmetic")
    return onnxruntime, openvino, bf16


def _on_gpu(packages: Mapping[str, str], driver: Driver, answers: Mapping[str, Answer]) -> tuple[Finding, ...]:
    """ONNX Runtime on CUDA; TensorRT; and our own kernels, all on memory that pycuda allocates."""
    if not driver.gpus:
        meant = any(package in packages for package in GPU_PACKAGES)  # who installed them wants to use a GPU
        state, remedy = (State.MISSING, DRIVER if driver.cuda is None else VISIBLE) if meant else (State.NOT_HERE, None)
        return tuple(Finding(name, state, driver.problem or "no GPU", remedy) for name in GPU_NEEDS)
    found = []
    for name, wanted in GPU_NEEDS.items():
        install = INSTALLS.get(name, GPU)
        absent = [package for package in wanted if package not in packages]
        parts = [_library(name, PROBE_OF[package], answers, install) for package in wanted if package in PROBE_OF]
        broken = next((part for part in parts if part.state is not State.WORKS), Finding(name, State.WORKS))
        found.append(Finding(name, State.MISSING, f"no {' and no '.join(absent)}", install) if absent else broken)
    if not RTX.covers(driver.gpus[0].arch):
        here = f"does not run on {driver.gpus[0].arch}, but on {', '.join(RTX.architectures or ())}"
        found = [Finding(f.name, State.NOT_HERE, here) if f.name == RTX.backend else f for f in found]
    if architecture_to_compile(driver.gpus[0].capability) is None:
        found[-1] = Finding(KERNELS, State.NOT_HERE, f"{no_kernels(driver.gpus[0].capability)}: use kernels host")
    return tuple(found)


def _library(name: str, probe: str, answers: Mapping[str, Answer], install: str) -> Finding:
    if probe not in answers:
        return Finding(name, State.MISSING, "not installed", install)
    if "error" in answers[probe]:
        return Finding(name, State.MISSING, str(answers[probe]["error"]), f"{install} --force-reinstall")
    return Finding(name, State.WORKS)


def _examine(bundle: Bundle, machine: Diagnosis, path: str) -> BundleReport:
    manifest = bundle.manifest
    plans = tuple(_plan(name, plan, manifest, machine, path) for name, plan in manifest.plans.items())
    backends = tuple(_for_bundle(finding, manifest.precision, plans, path) for finding in machine.backends)
    architectures = tuple(bundle.kernel_architectures())
    return BundleReport(
        path, manifest.title, manifest.precision, architectures, backends,
        _bundle_kernels(machine, architectures, path), plans,
    )  # fmt: skip


def _for_bundle(finding: Finding, precision: str, plans: Sequence[Finding], path: str) -> Finding:
    """A backend that works, held against what the bundle is."""
    runs = {"onnxruntime cpu": ("fp32", "fp16"), "openvino fp32": ("fp32",), "openvino bf16": ("fp32",)}
    if finding.state is not State.WORKS:
        return finding
    if precision not in runs.get(finding.name, (precision,)):
        return Finding(finding.name, State.NOT_HERE, f"does not run {precision} bundles")
    own = [plan for plan in plans if plan.name.startswith(f"{finding.name} ")]
    if finding.name in FLAVOURS and not any(plan.state is State.WORKS for plan in own):
        detail = "no plan fits this GPU and the library" if own else "no plan in this bundle"
        return Finding(finding.name, State.MISSING, detail, FLAVOURS[BackendName(finding.name)].build_command(path))
    return finding


def _bundle_kernels(machine: Diagnosis, architectures: Sequence[str], path: str) -> Finding:
    held = f"for {', '.join(architectures)}" if architectures else "none in this bundle"
    if not machine.driver.gpus:
        return Finding(KERNELS, State.NOT_HERE, f"{held}; {machine.kernels.detail}")
    gpu = machine.driver.gpus[0]
    try:
        choose_architecture(architectures, gpu.capability)
    except BackendError:
        wanted = architecture_to_compile(gpu.capability)
        if wanted is None:
            return Finding(KERNELS, State.NOT_HERE, f"{held}; {machine.kernels.detail}")
        return Finding(KERNELS, State.MISSING, f"{held}; not {gpu.arch}", f"facetrt export {path} --kernels {wanted}")
    return Finding(KERNELS, machine.kernels.state, machine.kernels.detail or held, machine.kernels.remedy)


def _plan(name: str, plan: PlanRecord, manifest: Manifest, machine: Diagnosis, path: str) -> Finding:
    """Whether a plan can be loaded here: it is bound to its graph, to its builder's version and to the GPU."""
    flavour = FLAVOURS[BackendName(plan.builder)]
    short = f"{flavour.backend} {PurePosixPath(name).stem[:12]}"
    built = f"{flavour.title} {plan.version}, {plan.architecture}, up to {plan.max_batch} images"
    gpus, version = machine.driver.gpus, machine.builders.get(plan.builder)
    if not gpus or version is None:
        return Finding(short, State.NOT_HERE, f"{built}; no {flavour.title if gpus else 'GPU'} here")
    return _held_against(short, built, plan, PlanKey.here(manifest, version, gpus[0].arch), flavour, path)


def _held_against(short: str, built: str, plan: PlanRecord, here: PlanKey, flavour: Flavour, path: str) -> Finding:
    misfits = here.differences(plan)
    if not misfits:
        return Finding(short, State.WORKS, built)
    detail = f"{built}; here {', '.join(f'{field} is {getattr(here, field):.12}' for field in misfits)}"
    if not flavour.covers(here.architecture):
        return Finding(short, State.NOT_HERE, detail)
    return Finding(short, State.MISSING, detail, flavour.build_command(path))
