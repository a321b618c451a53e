"""``facetrt video``: frames in, an overlay video out. Parse, check, call, write, print."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from facetrt.engine.backends.run_options import Kernels, RunOptions, Specialisation
from facetrt.engine.cli.app import BundleOption, ForceOption, console, errors, interruption, note
from facetrt.engine.cli.opening import open_engine
from facetrt.engine.cli.parameters import expanded
from facetrt.engine.cli.records import describe
from facetrt.engine.cli.viewers import (
    LOAD_SIZE,
    DiscoverViewer,
    Drawn,
    MaskViewer,
    ModelViewer,
    PcaViewer,
    SeveralViewers,
    TrackViewer,
    VideoTask,
    Viewer,
    learn_from,
    read_tasks,
)
from facetrt.engine.encoding.encoder import EncodeOptions
from facetrt.engine.engine import Engine
from facetrt.engine.files import (
    atomic_file,
    atomic_folder,
    check_replaceable,
    read_mark,
    write_json,
    write_results,
)
from facetrt.engine.images.first_mask import read_first_mask
from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.loading import DEFAULT_SIZE, LOAD_SIZE_SETTING, DefaultSize, LoadSize, Pixels
from facetrt.engine.settings import Setting, check, values_of
from facetrt.engine.tasks.discovery.catalogue import METHODS
from facetrt.engine.tasks.models import PartsModel, SegmentationModel, load_model
from facetrt.engine.tasks.refinement import Refinement, check_available
from facetrt.engine.tasks.similarity import parse_point
from facetrt.engine.video.propagation import record_of
from facetrt.engine.video.sources import LIVE_SCHEMES, Source, is_address
from facetrt.engine.video.stream import Policy, PolicyChoice, Stream
from facetrt.engine.video.writing import DEFAULT_FPS, VideoWriter, check_suffix, find_encoder
from facetrt.kernels.errors import BackendError, InputError, OutputError

POINTS = 20
WINDOW = "facetrt"
STOP_KEYS = (27, ord("q"))  # 27 is Esc


@dataclass(frozen=True)
class Request:
    """What was asked."""

    bundle: BundleOption
    task: Annotated[
        tuple[VideoTask, ...],
        Setting(f"What to show: {', '.join(VideoTask)}; or several, comma-separated.", read=read_tasks),
    ]
    out: Annotated[Path, typer.Option("--out", "-o", help="Video to write: .mp4, .mkv or .avi.")]
    video: Annotated[
        str | None, typer.Argument(metavar="IN", help="Video file, folder of images or rtsp:// address.")
    ] = None
    camera: Annotated[int | None, Setting("Number of a camera, instead of IN.", minimum=0)] = None
    load_size: Annotated[
        LoadSize, replace(LOAD_SIZE_SETTING, help="Shorter side (224, or the model's), HEIGHTxWIDTH, none.", shown="")
    ] = DEFAULT_SIZE
    points: Annotated[int | None, Setting("track: how many to choose (20).", minimum=1)] = None
    point: Annotated[
        list[str] | None,
        typer.Option("--point", help="track: X,Y in pixels of the first frame that can be read; repeat for more."),
    ] = None
    first_mask: Annotated[
        Path | None,
        Setting("mask: of the first frame that can be read: labels, colours or alpha; 0 is background."),
    ] = None
    model: Annotated[
        Path | None, Setting("cosegment, parts: from --save-model; learned from the video without it.")
    ] = None
    method: Annotated[str | None, Setting(f"discover: one of {', '.join(METHODS)} (tokencut).")] = None
    refine: Annotated[
        Refinement | None, Setting("How masks are refined on each frame; slower. Not for track and pca (none).")
    ] = None
    limit: Annotated[int | None, Setting("Stop after so many frames.", minimum=1)] = None
    policy: PolicyChoice = Policy.AUTO
    latency_budget: Annotated[
        float | None,
        Setting("Milliseconds; frames over it are counted as late.", above=0, expected="more than 0 milliseconds"),
    ] = None
    preview: Annotated[bool, Setting("Show it in a window; q ends.")] = False
    data: Annotated[bool, Setting("Write OUT.frames: an NPZ file for each frame.")] = True
    force: ForceOption = False

    def __post_init__(self) -> None:
        check(self)
        if (self.video is None) == (self.camera is None):
            raise InputError(
                "expected a video to read: either IN (a file, folder or rtsp:// address) or --camera NUMBER"
            )

    @property
    def source(self) -> str | int:
        """A path, an address or the number of a camera."""
        return self.video if self.video is not None else int(self.camera or 0)

    @property
    def live(self) -> bool:
        """Whether frames cannot be read twice."""
        return isinstance(self.source, int) or (self.source.startswith(LIVE_SCHEMES) and is_address(self.source))

    @property
    def tasks(self) -> str:
        """The tasks as one text."""
        return ",".join(self.task)

    @property
    def record_path(self) -> Path:
        """The path of the results record."""
        return self.out.with_suffix(".json")

    @property
    def data_path(self) -> Path:
        """The folder with an NPZ per frame."""
        return self.out.with_suffix(".frames")

    @property
    def points_xy(self) -> np.ndarray[Any, np.dtype[np.float64]] | int:
        """Points given, ``(N, 2)``, or how many to choose."""
        if not self.point:
            return POINTS if self.points is None else self.points
        return np.array([parse_point(text, "--point") for text in self.point])

    def options(self) -> dict[str, Any]:
        """The options, for the record."""
        given = None if isinstance(self.load_size, DefaultSize) else self.load_size
        named = values_of(self, without=("task", "camera", "preview", "data"))
        return named | {"load_size": given, "point": self.point or []}


def _for_frames(running: RunOptions) -> RunOptions:
    """Frames are many and of one size, so compiling for it pays, unless it was chosen when."""
    chosen = running.specialisation
    return replace(running, specialisation=Specialisation.EAGER if chosen is Specialisation.AUTO else chosen)


@expanded
def video(request: Request, running: RunOptions) -> None:
    """Follow points or masks through a video, segment it, or show its descriptors; an overlay video and a record.

    Ctrl-C ends the video where it is, playable. OUT.json beside it tells how it was made.
    """
    check_request(request)
    with open_engine(request.bundle, _for_frames(running)) as engine:
        record = run_video(engine, request)
    mask = record["result"] if len(request.task) == 1 else record["result"].get(VideoTask.MASK, {})
    if lost := mask.get("lost"):
        note(f"objects {', '.join(map(str, lost))} are too small to be followed: use a larger --load-size")
    report = record["report"]
    console.print(
        f"{record['video']['frames']} frames, {report['fps']:.1f} a second, latency {1e3 * report['latency_p50']:.0f} "
        f"ms (99 %: {1e3 * report['latency_p99']:.0f}), {report['dropped']} dropped, {report['skipped']} skipped, "
        f"{report['late']} late: {request.out}",
        soft_wrap=True,
    )


def check_request(request: Request) -> None:
    """Find out what cannot work before anything is read or written.

    Raises:
        InputError, OutputError, BackendError: with one line that says what to change.
    """
    tasks = request.task
    check_suffix(request.out)
    for option, value, allowed in (
        ("--points", request.points, VideoTask.TRACK in tasks),
        ("--point", request.point or None, VideoTask.TRACK in tasks),
        ("--first-mask", request.first_mask, VideoTask.MASK in tasks),
        ("--model", request.model, any(task.clusters for task in tasks)),
        ("--method", request.method, VideoTask.DISCOVER in tasks),
        ("--refine", request.refine, any(task.refinements for task in tasks)),
    ):
        if value is not None and not allowed:
            raise InputError(f"{option} has no meaning for --task {request.tasks}: leave it out")
    if request.refine is not None:
        for task in filter(lambda task: task.refinements, tasks):
            if request.refine not in task.refinements:
                known = ", ".join(task.refinements)
                raise InputError(f"--refine {request.refine} does not fit --task {task}: expected one of {known}")
        check_available(request.refine)
    if request.points is not None and request.point:
        raise InputError("--points chooses points and --point gives them: use one of the two")
    if VideoTask.MASK in tasks and request.first_mask is None:
        raise InputError("--task mask follows the objects of a first mask: add --first-mask PNG")
    clustering = [task for task in tasks if task.clusters]
    if clustering and request.live and request.model is None:
        raise InputError(
            f"--task {clustering[0]} on a live source needs --model: learn one from a few images with facetrt "
            f"{clustering[0]} --save-model FILE"
        )
    find_encoder()
    _check_places(request)
    if request.preview:
        check_display()


def _check_places(request: Request) -> None:
    """``--force`` replaces what the record beside it says that facetrt wrote, and never what is read."""
    out = request.out
    inputs = [Path(p) for p in (request.source, request.first_mask, request.model) if isinstance(p, (str, Path))]
    for path in (out, request.record_path):
        if any(path.resolve() == given.resolve() for given in inputs):
            raise InputError(f"{path} is read and would be overwritten: choose another --out")
        if not (path.exists() or path.is_symlink()):
            continue
        if not request.force:
            raise OutputError(f"{path} exists already: choose another --out, or replace it with --force")
        if path.is_symlink() or not path.is_file() or not _is_ours(request.record_path):
            raise OutputError(
                f"{path} was not written by facetrt ({request.record_path} would say so), so --force does not replace "
                "it: choose another --out"
            )
    if request.data:
        check_replaceable(request.data_path, force=request.force, inputs=[*inputs, request.bundle])


def _is_ours(record: Path) -> bool:
    """Whether facetrt wrote a record of a video there."""
    found = read_mark(record)
    return found.get("tool") == "facetrt" and found.get("command") == "video"


def check_display() -> None:
    """Raise :class:`BackendError` unless OpenCV can open a window."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise BackendError("--preview needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set: leave it out")
    try:
        cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    except cv2.error as error:
        raise BackendError(
            "--preview needs an OpenCV that can open windows, and this is a headless one: leave it out, or install "
            "opencv-python in place of opencv-python-headless"
        ) from error


def run_video(engine: Engine, request: Request) -> dict[str, Any]:
    """Make the video; the record, which lies beside it.

    However it ends, after at least one frame the video is playable and the record says what ended it.
    """
    viewer, encoding = _prepare(engine, request)
    budget = None if request.latency_budget is None else request.latency_budget / 1e3
    options: dict[str, Any] = {
        "load_size": encoding.load_size,
        "stride": encoding.stride,
        "policy": request.policy,
        "latency_budget": budget,
    }
    on_device = engine.kernels == Kernels.DEVICE and viewer.on_device and encoding.fit is Fit.NONE
    make = engine.stream_on_device if on_device else partial(engine.stream, fit=encoding.fit)
    with make(request.source, **options) as stream:
        outputs = Outputs(request, stream)
        with interruption.explained(outputs.kept):
            stopped = outputs.fill(viewer)
            record = _record(request, engine, stream, viewer, outputs)
            record |= {"interrupted": stopped is not None, "stopped_by": _said(stopped)}
            _write_record(request.record_path, record)
            if stopped is not None:
                raise stopped
    return record


def _write_record(place: Path, record: dict[str, Any]) -> None:
    try:
        with atomic_file(place) as path:
            write_json(path, record)
    except OSError as error:
        raise OutputError(f"{place} cannot be written: {error.strerror or error}; the video is there") from error


def _said(stopped: BaseException | None) -> str | None:
    """An error's message; of signals and errors without one, their name."""
    if stopped is None:
        return None
    if isinstance(stopped, SystemExit) and isinstance(stopped.code, int) and stopped.code > 128:
        return signal.Signals(stopped.code - 128).name
    return (str(stopped) if isinstance(stopped, Exception) else "") or type(stopped).__name__


def _prepare(engine: Engine, request: Request) -> tuple[Viewer, EncodeOptions]:
    """The viewer of all tasks, and how frames are encoded for them.

    Raises:
        InputError: tasks that want them encoded differently.
    """
    asked = LOAD_SIZE if isinstance(request.load_size, DefaultSize) else request.load_size
    viewers: dict[str, Viewer] = {}
    wanted: dict[str, EncodeOptions] = {}
    for task in request.task:
        viewers[task], encoding = _prepare_task(engine, request, task, asked)
        if encoding is not None:
            wanted[_described(engine, encoding)] = encoding
    if len(wanted) > 1:
        raise InputError(
            f"--task {request.tasks}: one takes frames at {' and one at '.join(wanted)}: name a --load-size for both, "
            "or make a video of each"
        )
    viewer = SeveralViewers(viewers) if len(viewers) > 1 else next(iter(viewers.values()))
    return viewer, next(iter(wanted.values()), EncodeOptions(asked))


def _described(engine: Engine, encoding: EncodeOptions) -> str:
    stride = encoding.stride or engine.manifest.stride
    return f"load size {encoding.load_size}, stride {stride}, fit {encoding.fit} and {encoding.saliency} saliency"


def _prepare_task(
    engine: Engine, request: Request, task: VideoTask, asked: LoadSize
) -> tuple[Viewer, EncodeOptions | None]:
    """A task's viewer, and how it wants frames to be encoded if that matters to it."""
    refine = request.refine or Refinement.NONE
    if task is VideoTask.MASK and request.first_mask is not None:
        return MaskViewer(engine, read_first_mask(request.first_mask), refine), None
    if task is VideoTask.TRACK:
        return TrackViewer(engine, request.points_xy), None
    if task is VideoTask.PCA:
        return PcaViewer(engine), None
    if task is VideoTask.DISCOVER:
        discovery = engine.discovery(request.method or "tokencut", refine=refine)
        return DiscoverViewer(discovery), discovery.method.encoding(engine.manifest, asked)
    model = _model(engine, request, task, asked)
    size = model.load_size if isinstance(request.load_size, DefaultSize) else asked
    return ModelViewer(engine, model, refine), EncodeOptions(size, stride=model.stride)


def _model(engine: Engine, request: Request, task: VideoTask, size: LoadSize) -> SegmentationModel | PartsModel:
    """Read the model from its file, or learn it from the video at ``size``."""
    if request.model is None:
        with errors.status("learning from a sample of the frames"):
            return learn_from(engine, request.source, task, size, request.limit)
    model = load_model(request.model)
    if isinstance(model, PartsModel) != (task is VideoTask.PARTS):
        raise InputError(f"{request.model} holds a {model.kind} model: it does not fit --task {task}")
    return model


def _record(request: Request, engine: Engine, stream: Stream[Any], viewer: Viewer, outputs: Outputs) -> dict[str, Any]:
    source = stream.source
    known = {} if source is None else {name: getattr(source, name) for name in ("name", "live", "fps", "frame_count")}
    decoder = {} if source is None else {"decoder": source.decoder}
    return {
        "tool": "facetrt",
        "command": "video",
        "task": request.tasks,
        "options": request.options(),
        "source": known | decoder,
        "bundle": request.bundle,
        "backend": engine.backend,
        "precision": engine.precision,
        "first_frame": outputs.first,
        "policy": stream.policy,
        "report": asdict(stream.report),
        "video": outputs.facts(),
        "data": request.data_path.name if request.data else None,
        "result": viewer.facts(),
    }


class Outputs:
    """The video, the data beside it and the window, as frames come.

    Attributes:
        first: what the record says of the first frame.
    """

    def __init__(self, request: Request, stream: Stream[Any]) -> None:
        self._request, self._stream = request, stream
        self._writer: VideoWriter | None = None
        self._folder: Path | None = None
        self._written = ExitStack()
        self._said: set[str] = set()
        self._began = 0.0  # the first frame's time stamp
        self.first: dict[str, Any] = {}

    def fill(self, viewer: Viewer) -> BaseException | None:
        """Write all frames; what ended them early is returned if at least one was written, else raised."""
        stopped: BaseException | None = None
        with ExitStack() as kept:
            if self._request.data:
                self._folder = kept.enter_context(atomic_folder(self._request.data_path, force=self._request.force))
            try:
                with self._written, progress(self._request.tasks, self._total()) as tick:
                    self._write_all(viewer, tick)
            except BaseException as error:  # raised again once what there is has been kept
                if self._writer is None or not self._writer.kept:
                    raise
                stopped = error
            if self._folder is not None:
                write_results(self._folder, {"command": "video", "task": self._request.tasks})
        return stopped

    def _write_all(self, viewer: Viewer, tick: Tick) -> None:
        for result in islice(self._stream, self._request.limit):
            self.first = self.first or describe(record_of(result.features))
            for drawn in viewer.feed(result):
                if not self._write(drawn):
                    return
            tick(self._stream)
        for drawn in viewer.finish():
            self._write(drawn)

    def _write(self, drawn: Drawn) -> bool:
        """Returns whether to go on: a key in the window ends it."""
        picture = drawn.picture
        writer = self._writer or self._open(drawn, (picture.shape[0], picture.shape[1]))
        if picture.shape[:2] != writer.size:
            self._say("the size of the frames changes: those of another size than the first are scaled to its")
            picture = np.asarray(cv2.resize(picture, writer.size[::-1], interpolation=cv2.INTER_AREA), np.uint8)
        late = (drawn.frame.timestamp - self._began) * writer.fps - writer.frames
        if self._timed and not writer.keeps_time and abs(late) > 1:
            self._say(f"the time between frames varies: {writer.path.name} shows {writer.fps:g} a second throughout")
        writer.write(picture, drawn.frame.timestamp if self._timed else None)
        if self._folder is not None:
            arrays: dict[str, Any] = {"index": drawn.frame.index, "timestamp": drawn.frame.timestamp, **drawn.data}
            np.savez_compressed(self._folder / f"{drawn.frame.index:06}.npz", **arrays)
        return not (self._request.preview and show(picture))

    def _open(self, drawn: Drawn, size: tuple[int, int]) -> VideoWriter:
        fps = self._source.fps if self._source is not None else None
        sound = self._source.sound if self._source is not None else None
        self._writer = self._written.enter_context(
            VideoWriter(self._request.out, min(fps or DEFAULT_FPS, 1000), size, sound=sound)
        )
        self._began = drawn.frame.timestamp
        return self._writer

    @property
    def _source(self) -> Source | None:
        return self._stream.source

    @property
    def _timed(self) -> bool:
        """Whether time stamps mean time: those of a folder are numbers."""
        return self._source is not None and (self._source.live or self._source.fps is not None)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            note(text)

    def _total(self) -> int | None:
        count, limit = None if self._source is None else self._source.frame_count, self._request.limit
        return min(known) if (known := [n for n in (count, limit) if n is not None]) else None

    def kept(self) -> str:
        """What is left if it ends now, in words."""
        if self._writer is None or not self._writer.kept:
            return "nothing was written"
        return f"{self._writer.path} ends after {self._writer.frames} frames, playable"

    def facts(self) -> dict[str, Any]:
        """What is known of the video, for the record."""
        writer = self._writer
        if writer is None:
            return {}
        return {
            "file": writer.path.name,
            "codec": writer.codec,
            "library": writer.library,
            "fps": writer.fps,
            "keeps_time": writer.keeps_time,
            "frames": writer.frames,
            "size": writer.even_size,
        }


def show(picture: Pixels) -> bool:
    """Put a picture into the window; whether q, Esc or the window's own button asked for the end."""
    cv2.imshow(WINDOW, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    pressed = cv2.waitKey(1) & 0xFF
    return pressed in STOP_KEYS or cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1


Tick = Callable[[Stream[Any]], None]


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Tick]:
    """A bar on standard error with the stream's speed and latency."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(description, total=total, speed="")

        def tick(stream: Stream[Any]) -> None:
            report = stream.report
            speed = f"{report.fps:.1f} fps, latency {1e3 * report.latency_p50:.0f} ms"
            bar.update(task, completed=report.frames, speed=speed)

        yield tick
