"""Seeded damage to everything that facetrt reads: ``python tests/fuzz.py --runs 2000 --seed 0``.

Each run damages one file of one kind and reads it, in a worker process. A file may load or be refused by an error of
ours in one printable line; anything else is a finding: another exception, a process that hangs, dies or takes too much
memory. Findings are listed with the command that repeats one of them alone, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from facetrt.engine.bundle.bundle import Bundle, builtin_path
from facetrt.engine.engine import Engine
from facetrt.engine.evaluation.catalogue import open_evaluation
from facetrt.engine.evaluation.datasets import keypoints as keypoint_sets
from facetrt.engine.evaluation.datasets import landmarks as landmark_sets
from facetrt.engine.evaluation.datasets import masks as mask_sets
from facetrt.engine.evaluation.datasets import points as point_sets
from facetrt.engine.evaluation.datasets import videos as video_sets
from facetrt.engine.evaluation.datasets.reading import image_size, read_mask, read_mat
from facetrt.engine.evaluation.resume import ITEMS, ItemStore
from facetrt.engine.features.store import FeatureStore
from facetrt.engine.files import Content, check_replaceable, is_store
from facetrt.engine.images.first_mask import read_first_mask
from facetrt.engine.images.label_images import read_labels
from facetrt.engine.images.loading import load_image
from facetrt.engine.tasks.models import SegmentationModel, load_model
from facetrt.engine.video.sources import open_source
from facetrt.kernels.device.runtime.cubins import KernelSet
from facetrt.kernels.errors import FacetrtError

TIMEOUT = 60.0  # seconds of one run, on a machine with other work
MEMORY = 3 << 30  # bytes that a worker may take: images have at most 100,000,000 pixels
ADDRESSES = 24 << 30  # of a worker, so that a bomb is an error and not the end of the machine
FRAMES = 12  # read of a clip

ODD: list[Any] = [
    None, True, -1, 0, 1, 10**12, 10**400, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "", "\ud800",
    "a\nb\x1b[31m", "../../etc/passwd", "/etc/passwd", "x" * 5000, "\0", [], {}, [[]], [None], [1, 2, 3], {"a": 1},
    [[[[[[1]]]]]],
]  # fmt: skip
SNIPPETS = [
    b"NaN", b"1e999", b"-1", b"9" * 5000, b'"\\ud800"', b"\xff\xfe\x00", b"[" * 50_000, b"\0" * 64, b"\x7fELF", b"%s%n",
    b"\x1b]0;x\x07", b"\n\n", b"..", b"/", b"-nan", "²".encode(),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kind of file: ``read(folder)`` reads what ``make(folder)`` wrote there. ``names`` are damaged; all if empty."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    names: tuple[str, ...] = ()
    sign: Callable[[Path], None] = lambda folder: None  # makes checksums fit the damage, as an attacker would


# ---- kinds of files


def picture(height: int = 40, width: int = 48, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def image_case(suffix: str, mode: str = "RGB", **options: Any) -> Case:
    def make(folder: Path) -> None:
        given = dict(options)
        if suffix in (".jpg", ".tif", ".webp"):
            exif = Image.Exif()
            exif[0x0112] = 6
            given["exif"] = exif
        picture().convert(mode).save(folder / f"a{suffix}", **given)

    return Case(make, lambda folder: load_image(folder / f"a{suffix}", 64))


def label_case(read: Callable[[Path], object], suffix: str = ".png", mode: str = "P") -> Case:
    def make(folder: Path) -> None:
        labels = np.zeros((24, 32), np.uint8)
        labels[5:15, 5:15], labels[12:20, 20:30] = 1, 2
        image = Image.fromarray(labels if mode == "P" else labels * 100)
        if mode == "P":
            image.putpalette(bytes(range(256)) * 3)
        image.convert(mode).save(folder / f"a{suffix}")

    return Case(make, lambda folder: read(folder / f"a{suffix}"))


def make_mat(folder: Path) -> None:
    from scipy.io import savemat

    points = np.random.default_rng(0).uniform(1, 30, (2, 10))
    savemat(folder / "a.mat", {"pts_coord": points, "name": "car"}, do_compression=True)


def make_willow(folder: Path) -> None:
    (folder / "car(G)").mkdir()
    for i in range(2):
        picture(seed=i).save(folder / "car(G)" / f"{i}.png")
        make_mat(folder / "car(G)")
        (folder / "car(G)" / "a.mat").rename(folder / "car(G)" / f"{i}.mat")


def make_spair(folder: Path) -> None:
    (folder / "JPEGImages" / "cat").mkdir(parents=True)
    (folder / "PairAnnotation" / "test").mkdir(parents=True)
    for name in ("a", "b"):
        picture().save(folder / "JPEGImages" / "cat" / f"{name}.jpg")
    pair = {"category": "cat"} | {f"{s}_imname": f"{n}.jpg" for s, n in (("src", "a"), ("trg", "b"))}
    pair |= {f"{side}_imsize": [48, 40, 3] for side in ("src", "trg")}
    pair |= {f"{side}_kps": [[3, 4], [20, 30]] for side in ("src", "trg")}
    (folder / "PairAnnotation" / "test" / "1-a-b:cat.json").write_text(json.dumps(pair))


def make_cub(folder: Path) -> None:
    (folder / "parts").mkdir()
    numbers = range(1, 10)
    for number in numbers:
        place = folder / "images" / f"00{1 + number % 3}.Bird"
        place.mkdir(parents=True, exist_ok=True)
        picture().save(place / f"{number}.jpg")
    lines = {
        "images.txt": [f"{n} 00{1 + n % 3}.Bird/{n}.jpg" for n in numbers],
        "train_test_split.txt": [f"{n} {int(n < 7)}" for n in numbers],
        "bounding_boxes.txt": [f"{n} 2.0 3.0 30.0 20.0" for n in numbers],
        "parts/part_locs.txt": [f"{n} {part} 10.0 12.5 1" for n in numbers for part in (1, 7, 15)],
    }
    for name, rows in lines.items():
        (folder / name).write_text("\n".join(rows) + "\n")


def make_celeba(folder: Path) -> None:
    names = [f"{n}.jpg" for n in range(4)]
    (folder / "img_celeba").mkdir()
    for name in names:
        picture().save(folder / "img_celeba" / name)
    points = [f"{name} 10 10 30 10 20 20 12 30 28 30" for name in names]
    boxes = [f"{name} 1 1 46 38" for name in names]
    (folder / "list_landmarks_celeba.txt").write_text("\n".join(["4", "lefteye_x", *points]))
    (folder / "list_bbox_celeba.txt").write_text("\n".join(["4", "image_id", *boxes]))
    (folder / "training.txt").write_text("\n".join(names[:2]))
    (folder / "testing.txt").write_text("\n".join(names[2:]))


def make_davis(folder: Path) -> None:
    for name in ("JPEGImages", "Annotations"):
        (folder / name / "480p" / "cat").mkdir(parents=True)
    for i in range(3):
        picture().save(folder / "JPEGImages" / "480p" / "cat" / f"{i:05}.jpg")
        label_case(read_labels).make(folder)
        labels = np.asarray(Image.open(folder / "a.png").resize((48, 40), Image.Resampling.NEAREST))
        Image.fromarray(labels).save(folder / "Annotations" / "480p" / "cat" / f"{i:05}.png")
    (folder / "a.png").unlink()
    (folder / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("cat\n")


def read_davis(folder: Path) -> None:
    for video in video_sets.read_davis(folder, "val")[0]:
        video.labels(0)


def make_points(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"points": rng.random((3, 4, 2)), "occluded": np.zeros((3, 4), bool)}
    np.savez_compressed(folder / "a.npz", video=rng.integers(0, 255, (4, 20, 24, 3), np.uint8), **arrays)


def read_points(folder: Path) -> None:
    for video in point_sets.read_point_videos(folder):
        video.pictures()


def make_sets(folder: Path) -> None:
    for name in ("images", "masks"):
        (folder / name / "cat").mkdir(parents=True)
    picture().save(folder / "images" / "cat" / "a.jpg")
    Image.fromarray(np.eye(40, 48, dtype=np.uint8) * 255).save(folder / "masks" / "cat" / "a.png")


def read_sets(folder: Path) -> None:
    for found in mask_sets.read_image_sets(folder, "MSRC"):
        for mask in found.masks:
            read_mask(mask)


FINGERPRINT = {"evaluation": "pf-willow", "options": {"a": 1}, "data": {"digest": "x"}}


def make_items(folder: Path) -> None:
    with ItemStore(folder / "out", FINGERPRINT) as store:
        for key in ("a", "b", "c"):
            store.add(key, {"category": "cat", "pck": 0.5})


def read_items(folder: Path) -> None:
    with ItemStore(folder / "out", FINGERPRINT):
        pass


def make_model(folder: Path) -> None:
    SegmentationModel(
        facet="key@2", encoder="builtin", encoder_sha256="0" * 64, stride=4, load_size=64, options={"elbow": 0.97},
        images=2, centroids=np.eye(4, 8, dtype=np.float32), salient_labels=np.array([1, 2]),
    ).save(folder / "a.npz")  # fmt: skip


def make_store(folder: Path) -> None:
    with Engine.open("builtin", threads=1) as engine:
        engine.extract([picture(), picture(seed=1)], folder / "features.zarr", load_size=32)


def read_store(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for item in FeatureStore.open(folder / "features.zarr"):
            item.saliency  # noqa: B018
    is_store(folder / "features.zarr")


def make_bundle(folder: Path) -> None:
    shutil.copytree(builtin_path(), folder / "bundle")


def sign_bundle(folder: Path) -> None:
    """Hashes and sizes in the manifest become those of the files."""
    path = folder / "bundle" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name in manifest["files"]:
        data = (folder / "bundle" / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))


def read_bundle(folder: Path) -> None:
    Bundle.open(folder / "bundle")


def run_bundle(folder: Path) -> None:
    with Engine.open(folder / "bundle", threads=1, backend="onnxruntime") as engine:
        engine.encode([picture()], load_size=32)


def make_kernels(folder: Path) -> None:
    digest = "0" * 64
    kernel = {
        "symbol": "k", "shared": 0, "warps": 4, "arguments": [["a", "i32"]], "hidden": 1, "size": 8, "program": digest,
        "source": digest, "specific": False, "constants": {"BLOCK": 64},
    }  # fmt: skip
    index = {"schema": 1, "architecture": "sm_80", "toolkit": "12.8", "triton": "3.6", "programs": {"log_bin": kernel}}
    (folder / "kernels.json").write_text(json.dumps(index))


def make_results(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "results.json").write_text(json.dumps({"tool": "facetrt", "command": "match", "images": [1]}))


def make_clip(folder: Path, suffix: str) -> None:
    pictures = [picture(seed=i) for i in range(4)]
    if suffix in (".gif", ".webp", ".png"):
        pictures[0].save(folder / f"a{suffix}", save_all=True, append_images=pictures[1:], duration=40)
        return
    code = cv2.VideoWriter.fourcc(*{".mp4": "mp4v", ".avi": "MJPG"}[suffix])
    writer = cv2.VideoWriter(str(folder / f"a{suffix}"), code, 25, (48, 40))
    for pixels in pictures:
        writer.write(cv2.cvtColor(np.asarray(pixels), cv2.COLOR_RGB2BGR))
    writer.release()


def clip_case(suffix: str) -> Case:
    def read(folder: Path) -> None:
        with closing(open_source(folder / f"a{suffix}")) as source:
            for _, _ in zip(range(FRAMES), source, strict=False):
                pass

    return Case(lambda folder: make_clip(folder, suffix), read)


def make_checkpoint(folder: Path, suffix: str) -> None:
    state = {"cls_token": np.zeros((1, 1, 8), np.float32), "norm.weight": np.ones(8, np.float32)}
    if suffix == ".npz":
        np.savez(folder / "a.npz", **state)  # type: ignore[arg-type]
        return
    import torch

    tensors = {name: torch.from_numpy(values) for name, values in state.items()}
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, folder / "a.safetensors")
    else:
        torch.save({"teacher": {f"module.backbone.{name}": t for name, t in tensors.items()}}, folder / "a.pth")


def checkpoint_case(suffix: str) -> Case:
    def read(folder: Path) -> None:
        from facetrt.export.weights import read_state_dict

        read_state_dict(folder / f"a{suffix}")

    return Case(lambda folder: make_checkpoint(folder, suffix), read)


CASES: dict[str, Case] = {
    "png": image_case(".png"),
    "png 16 bits": image_case(".png", "I;16"),
    "jpeg": image_case(".jpg"),
    "gif": image_case(".gif", "P"),
    "bmp": image_case(".bmp"),
    "tiff": image_case(".tif", compression="tiff_lzw"),
    "webp": image_case(".webp"),
    "jpeg 2000": image_case(".jp2"),
    "ppm": image_case(".ppm"),
    "labels": label_case(read_labels),
    "labels 16 bits": label_case(read_labels, ".tif", "I;16"),
    "first mask": label_case(read_first_mask),
    "first mask rgb": label_case(read_first_mask, ".png", "RGB"),
    "mask": label_case(read_mask, ".png", "L"),
    "image size": label_case(image_size, ".png", "RGB"),
    "mat": Case(make_mat, lambda folder: read_mat(folder / "a.mat", "pts_coord")),
    "pf-willow": Case(make_willow, lambda folder: open_evaluation("pf-willow", folder)),
    "spair": Case(
        make_spair,
        lambda folder: keypoint_sets.read_spair(folder, split="test", pairs_per_category=None, seed=0),
        (".json",),
    ),
    "cub": Case(make_cub, lambda folder: landmark_sets.read_cub(folder), (".txt",)),
    "celeba": Case(make_celeba, lambda folder: landmark_sets.read_celeba(folder), (".txt",)),
    "davis": Case(make_davis, read_davis, (".txt", ".png")),
    "tap-vid": Case(make_points, read_points),
    "cosegmentation sets": Case(make_sets, read_sets),
    "items": Case(make_items, read_items, (ITEMS,)),
    "model": Case(make_model, lambda folder: load_model(folder / "a.npz")),
    "store": Case(make_store, read_store),
    "store metadata": Case(make_store, read_store, ("zarr.json",)),
    "bundle": Case(make_bundle, read_bundle),
    "manifest": Case(make_bundle, read_bundle, ("manifest.json",)),
    "graph": Case(make_bundle, run_bundle, ("encoder.onnx",), sign_bundle),
    "positional table": Case(make_bundle, run_bundle, ("positional.npy",), sign_bundle),
    "kernels": Case(
        make_kernels, lambda folder: KernelSet.read((folder / "kernels.json").read_bytes(), lambda name: b"")
    ),
    "results": Case(
        make_results, lambda folder: check_replaceable(folder / "out", force=True, content=Content.RESULTS)
    ),
    "mp4": clip_case(".mp4"),
    "avi": clip_case(".avi"),
    "animated gif": clip_case(".gif"),
    "animated webp": clip_case(".webp"),
    "animated png": clip_case(".png"),
    "checkpoint npz": checkpoint_case(".npz"),
    "checkpoint safetensors": checkpoint_case(".safetensors"),
    "checkpoint pth": checkpoint_case(".pth"),
}


# ---- damage


def damage(data: bytes, name: str, dice: random.Random) -> bytes:
    """Something that is wrong with the file; JSON is often kept JSON."""
    if name.endswith((".json", ".jsonl")) and dice.random() < 0.6:
        return damage_json(data, dice)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 8))):
        data = dice.choice(BYTES)(data, dice)
    return data


def flip(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 2, 5, 20))):
        if changed:
            changed[dice.randrange(min(len(changed), dice.choice((64, 512, 1 << 30))))] = dice.randrange(256)
    return bytes(changed)


def cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data) + 1)]


def leave_out(data: bytes, dice: random.Random) -> bytes:
    begin = dice.randrange(len(data) + 1)
    return data[:begin] + data[begin + dice.choice((1, 4, 100)) :]


def repeat(data: bytes, dice: random.Random) -> bytes:
    begin = dice.randrange(len(data) + 1)
    return data[:begin] + data[begin : begin + dice.choice((1, 8, 200))] + data[begin:]


def insert(data: bytes, dice: random.Random) -> bytes:
    begin = dice.randrange(len(data) + 1)
    return data[:begin] + dice.choice(SNIPPETS) + data[begin:]


def extreme(data: bytes, dice: random.Random) -> bytes:
    """A number of four or eight bytes becomes very small or large."""
    begin, width = dice.randrange(len(data) + 1), dice.choice((2, 4, 8))
    value = dice.choice((0, 1, (1 << 8 * width - 1) - 1, (1 << 8 * width) - 1, 1 << 8 * width - 1))
    return data[:begin] + value.to_bytes(width, dice.choice(("little", "big"))) + data[begin + width :]


def replace_all(data: bytes, dice: random.Random) -> bytes:
    return dice.choice((b"", b"\0", b"{}", b"[]", b"[" * 100_000, dice.randbytes(300), data[::-1], *SNIPPETS))


def replace_number(data: bytes, dice: random.Random) -> bytes:
    """A digit of a text becomes something else."""
    places = [i for i, byte in enumerate(data[:20_000]) if 48 <= byte < 58]
    if not places:
        return flip(data, dice)
    place = dice.choice(places)
    return data[:place] + dice.choice(SNIPPETS) + data[place + 1 :]


BYTES = (flip, flip, flip, cut, leave_out, repeat, insert, extreme, extreme, replace_all, replace_number)


def damage_json(data: bytes, dice: random.Random) -> bytes:
    """One value of a document, or of a line of several, becomes an odd one, goes, or comes twice."""
    lines = data.splitlines() if b"\n{" in data else [data]
    number = dice.randrange(len(lines))
    document = json.loads(lines[number])
    places = list(walk(document))
    container, key = dice.choice(places) if places else ([document], 0)
    kind = dice.random()
    if kind < 0.8:
        container[key] = dice.choice(ODD)
    elif kind < 0.9:
        del container[key]
    elif isinstance(container, dict):
        container[f"{key}?"] = container[key]
    else:
        container.append(container[key])
    lines[number] = json.dumps(document, indent=dice.choice((None, 2)) if len(lines) == 1 else None).encode()
    return b"\n".join(lines) + b"\n"


def walk(document: Any) -> list[tuple[Any, Any]]:
    """``(container, key)`` of every value."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else []
    return [(document, key) for key in keys] + [place for key in keys for place in walk(document[key])]


# ---- runs


def run_one(seeds: Path, names: list[str], seed: int, run: int) -> tuple[str, str | None]:
    """The case, and what was wrong."""
    dice = random.Random(f"{seed}/{run}")
    name = names[run % len(names)]
    case = CASES[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
        folder = Path(made) / "a"
        shutil.copytree(seeds / name, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and fits(path, case.names))
        path = dice.choice(files)
        path.write_bytes(damage(path.read_bytes(), path.name, dice))
        case.sign(folder)
        return name, complaint(case, folder)


def fits(path: Path, names: tuple[str, ...]) -> bool:
    return not names or path.name.endswith(names)


def complaint(case: Case, folder: Path) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.read(folder)
    except FacetrtError as error:
        text = str(error)
        return None if text and text.isprintable() else f"an error of ours that is not one printable line: {text!r}"
    except BaseException:  # noqa: BLE001  (that is what is looked for)
        return traceback.format_exc(limit=-6)
    return None


def make_seeds(folder: Path, names: list[str]) -> None:
    """An undamaged example of each case, which must load: else its damage would show nothing."""
    for name in names:
        (folder / name).mkdir(parents=True)
        CASES[name].make(folder / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CASES[name].read(folder / name)


def work(seeds: Path, names: list[str], seed: int) -> None:
    """A worker: numbers of runs on standard input, a line of JSON for each on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        name, wrong = run_one(seeds, names, seed, int(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if wrong is None and peak > before and peak << 10 > MEMORY:
            wrong = f"it took {peak >> 10:,} MiB"
        answers.write(json.dumps({"case": name, "wrong": wrong}) + "\n")
        answers.flush()


class Worker:
    """A process that does runs one by one, and is replaced when one of them was its last."""

    def __init__(self, arguments: list[str]) -> None:
        self._command = [sys.executable, __file__, *arguments]
        self._process: subprocess.Popen[str] | None = None

    def do(self, run: int) -> dict[str, Any]:
        """``case`` and ``wrong``."""
        process = self._process or subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._process = process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a worker without pipes")
        process.stdin.write(f"{run}\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], TIMEOUT)
        line = process.stdout.readline() if ready else ""
        if line:
            return dict(json.loads(line))
        wrong = f"the process ended with code {process.wait()}" if ready else f"hangs: no answer in {TIMEOUT:.0f} s"
        self.close()
        return {"case": None, "wrong": wrong}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage what facetrt reads, and look for what it does not catch.")
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--cases", help="some of them, comma-separated", default=",".join(CASES))
    parser.add_argument("--here", action="store_true", help="in this process, for a debugger")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.cases.split(",")
    if given.worker is not None:
        work(given.worker, names, given.seed)
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as made:
        seeds = Path(made)
        make_seeds(seeds, names)
        worker = Worker(["--worker", made, "--seed", str(given.seed), "--cases", given.cases])
        findings = Counter[str]()
        for run in range(given.first, given.first + given.runs):
            if given.here:
                answer: dict[str, Any] = dict(
                    zip(("case", "wrong"), run_one(seeds, names, given.seed, run), strict=True)
                )
            else:
                answer = worker.do(run)
            if answer["wrong"] is not None:
                name = names[run % len(names)]
                findings[name] += 1
                again = f"--runs 1 --first {run} --seed {given.seed}" + (
                    "" if names == list(CASES) else f" --cases '{given.cases}'"
                )
                print(f"run {run}, {name}: {answer['wrong'].rstrip()}\n    again: {again}", flush=True)
        worker.close()
    print(f"{given.runs} runs of {len(names)} cases in {time.monotonic() - started:.0f} s: {findings.total()} findings")
    for name, count in findings.items():
        print(f"  {name}: {count}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
