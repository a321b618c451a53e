"""Checkpoints as people have them: any container gives the same weights, and what cannot be read says why in a line."""

from __future__ import annotations

import argparse
import gzip
import io
import os
import pickle
import re
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, deterministic_weights, export_tiny, facets
from safetensors.torch import save_file

from facetrt.engine.bundle.bundle import read_manifest
from facetrt.export.backbone import find_backbone
from facetrt.export.checkpoints import read_checkpoint
from facetrt.export.weights import load_weights, read_state_dict
from facetrt.kernels.errors import InputError, MissingFileError

State = dict[str, Any]


@pytest.fixture(scope="module")
def state() -> State:
    return {name: torch.from_numpy(values) for name, values in deterministic_weights(TINY).items()}


@pytest.fixture(scope="module")
def other(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def heads(prefix: str = "") -> State:
    names = ("head.mlp.0.weight", "head.mlp.0.bias", "head.last_layer.weight_g", "head.last_layer.weight_v")
    return {prefix + name: torch.zeros(3) for name in names}


class Schedule(Enum):
    COSINE = "cosine"


def arguments() -> argparse.Namespace:
    """What lies beside weights after training."""
    return argparse.Namespace(
        arch="vit", lr=np.float64(1e-4), dtype=np.dtype("float32"), seeds=np.arange(3), out=Path("runs") / "1",
        schedule=partial(int, 3), kinds={1, 2}, sizes=defaultdict(list, a=[1]),
        nested=argparse.Namespace(x=(1, 2.0, None)),
    )  # fmt: skip


def saved(content: Any, path: Path, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


LAYOUTS: dict[str, Callable[[State, State], Any]] = {
    "plain": lambda own, other: own,
    "ordered": lambda own, other: OrderedDict(own),
    "dino": lambda own, other: {
        "student": under("module.backbone.", other) | heads("module."),
        "teacher": under("backbone.", own) | heads(),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "dino_loss": {"center": torch.zeros(1, 8)},
        "fp16_scaler": None, "epoch": 3, "args": arguments(),
    },
    "student alone": lambda own, other: {"student": under("module.backbone.", own) | heads("module.")},
    "model, arguments first": lambda own, other: {"args": arguments(), "model": own},
    "nested": lambda own, other: {"model": {"state_dict": {"teacher": own, "student": other}}, "epoch": 1},
    "model before state_dict": lambda own, other: {"state_dict": other, "model": own},
    "timm's average": lambda own, other: {"state_dict": other, "state_dict_ema": own},
    "DeiT's average": lambda own, other: {"model": other, "model_ema": under("module.", own), "epoch": 1},
    "prefixes in any order": lambda own, other: {
        "model_state_dict": under("_orig_mod.module.encoder._orig_mod.backbone.module.", own)
    },
    "lightning": lambda own, other: {
        "state_dict": under("teacher.backbone.", own) | under("student.backbone.", other) | heads("student."),
        "pytorch-lightning_version": "2.4", "hyper_parameters": {"path": Path("x")}, "optimizer_states": [{}],
        "callbacks": {"ModelCheckpoint": {"best_model_path": Path("a"), "current_score": torch.tensor(1.0)}},
    },
    "compiled blocks": lambda own, other: {
        re.sub(r"^blocks\.(\d)", r"blocks.\1._orig_mod", name): tensor for name, tensor in own.items()
    },
    "parameters": lambda own, other: {name: torch.nn.Parameter(tensor) for name, tensor in own.items()},
    "classifier": lambda own, other: own | {"head.weight": torch.zeros(9, 48), "fc.bias": torch.zeros(9)},
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(
    tmp_path: Path, state: State, other: State, layout: str, legacy: bool
) -> None:
    plain = load_weights(TINY, saved(state, tmp_path / "plain.pth"))[1]
    path = saved(LAYOUTS[layout](state, other), tmp_path / "w.pth", legacy=legacy)
    weights, checkpoint = load_weights(TINY, path)
    assert weights.keys() == state.keys() and all(torch.equal(weights[name], state[name]) for name in state)
    assert checkpoint.sha256 == plain.sha256


def test_what_was_taken_and_what_was_not_is_said(tmp_path: Path, state: State, other: State) -> None:
    notes: list[str] = []
    read_state_dict(saved(LAYOUTS["dino"](state, other), tmp_path / "w.pth"), notes.append)
    assert "took the weights under 'teacher.backbone'; also there, and not used: 'student.backbone'" in notes[0]
    assert "not used: 4 tensors of heads (teacher.head.last_layer.weight_g, " in notes[1]
    notes.clear()
    read_state_dict(saved(state, tmp_path / "plain.pth"), notes.append)
    assert notes == []


def test_other_formats_give_the_same_bundle(tiny_weights: Path, tmp_path: Path, state: State, other: State) -> None:
    files = {
        "plain.pth": lambda path: saved(state, path),
        "training.ckpt": lambda path: saved(LAYOUTS["dino"](state, other), path),
        "w.safetensors": lambda path: save_file(under("module.backbone.", state), path),
        "w.npz": lambda path: np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()}),
    }
    for name, write in files.items():
        write(tmp_path / name)
    assert len({load_weights(TINY, tmp_path / name)[1].sha256 for name in files}) == 1
    one, two = (  # exports take seconds
        export_tiny(tmp_path / name, tmp_path / f"{name}-bundle", facets=facets("key@0"))
        for name in ("training.ckpt", "w.npz")
    )
    assert read_manifest(one).checkpoint.sha256 == read_manifest(two).checkpoint.sha256
    for name in ("encoder.onnx", "positional.npy"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_one_other_number_or_name_is_another_hash(tmp_path: Path, state: State) -> None:
    def sha256(changed: State) -> str:
        return load_weights(TINY, saved(state | changed, tmp_path / "w.pth"))[1].sha256

    found = {sha256({}), sha256({"norm.bias": state["norm.bias"] + 1e-6}), sha256({"norm.scale": state["norm.bias"]})}
    found.add(sha256({"cls_token": state["cls_token"].reshape(-1)}))
    assert len(found) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_any_float_become_float32(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    path = saved({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "w.pth")
    weights, checkpoint = load_weights(TINY, path)
    assert all(torch.equal(weights[name], state[name].to(dtype).float()) for name in state)
    widened = saved({name: tensor.to(dtype).float() for name, tensor in state.items()}, tmp_path / "f.pth")
    assert load_weights(TINY, widened)[1].sha256 == checkpoint.sha256


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.to(torch.int64), "norm.bias is torch.int64"),
        (lambda t: t.to_sparse(), "expected floating-point numbers"),
        (lambda t: t * float("nan"), "norm.bias has values that are not finite"),
        (lambda t: torch.zeros(1).expand(3 << 30), "expected at most"),
    ],
)
def test_tensors_that_are_no_weights(tmp_path: Path, state: State, change: Callable[[Any], Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_weights(TINY, saved(state | {"norm.bias": change(state["norm.bias"])}, tmp_path / "w.pth"))


def test_configurations_of_libraries_that_are_not_installed(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OmegaConf's and Lightning's objects, by stand-ins that are gone when the file is read."""
    modules = ("omegaconf", "omegaconf.dictconfig", "lightning_fabric", "lightning_fabric.utilities.data")
    for name in modules:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    config = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
    kind = type("AttributeDict", (dict,), {"__module__": "lightning_fabric.utilities.data"})
    monkeypatch.setattr(sys.modules["omegaconf.dictconfig"], "DictConfig", config, raising=False)
    monkeypatch.setattr(sys.modules["lightning_fabric.utilities.data"], "AttributeDict", kind, raising=False)
    made = config()
    made.content = {"lr": 0.1}
    path = saved({"state_dict": state, "cfg": made, "hyper_parameters": kind(width=3)}, tmp_path / "w.ckpt")
    monkeypatch.undo()
    assert read_state_dict(path).keys() == state.keys()


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (lambda mark: Runs(os.system, f"touch {mark}"), "system"),
        (lambda mark: Runs(exec, f"open({str(mark)!r}, 'w')"), "exec"),
        (lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"), "eval"),
        (lambda mark: Runs(getattr, "a", "upper"), "getattr"),
        (lambda mark: Runs(Path.touch, mark), "getattr"),
        (lambda mark: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda mark: Schedule.COSINE, "Schedule"),
    ],
)
def test_nothing_is_run(tmp_path: Path, state: State, thing: Callable[[Path], Any], name: str, legacy: bool) -> None:
    path = saved({"model": state, "args": thing(tmp_path / "ran")}, tmp_path / "w.pth", legacy=legacy)
    with pytest.raises(InputError, match=rf"cannot be read as a checkpoint: it holds \S*{re.escape(name)}, an object"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def as_bytes(write: Callable[[Any], Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zipped(file: Any, *names: str) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


def tarred(file: Any) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))


PICKLE = as_bytes(lambda file: torch.save({"cls_token": torch.zeros(500)}, file))
LEGACY = as_bytes(lambda file: torch.save({"cls_token": torch.zeros(500)}, file, _use_new_zipfile_serialization=False))
PROTOCOL_4 = as_bytes(lambda file: torch.save({"cls_token": torch.zeros(500)}, file, pickle_protocol=4))
NO_CHECKPOINTS = {
    "empty": (b"", "it is empty"),
    "text": (b"hello", "its content is none that is known here: expected a file that torch.save wrote"),
    "page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "it is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
    "cut zip": (PICKLE[: len(PICKLE) // 2], "it is cut off"),
    "cut legacy": (LEGACY[: len(LEGACY) // 2], "it is damaged or cut off"),
    "changed zip": (PICKLE.replace(b"cls_token", b"\xff" * 9), "it is damaged or cut off"),
    "four bytes of zip": (b"PK\x03\x04", "it is cut off"),
    "other zip": (as_bytes(lambda file: zipped(file, "w.pth")), "a zip archive without a checkpoint's entries"),
    "tar": (as_bytes(tarred), "it is an archive: unpack it first"),
    "gzip": (gzip.compress(PICKLE), "it is an archive: unpack it first"),
    "cut safetensors": (b"\x08\0\0\0\0\0\0\0{", "it is damaged or cut off"),
    "objects": (as_bytes(lambda file: np.savez(file, a=np.array([{}], object))), "a is damaged, or holds objects"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    "protocol": (PROTOCOL_4, "it was written with pickle protocol 4, which torch only reads by running its code"),
    "script": (as_bytes(lambda file: zipped(file, "m/data.pkl", "m/constants.pkl")), "it is a TorchScript program"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_files_that_are_no_checkpoints_say_why_in_one_line(tmp_path: Path, kind: str) -> None:
    content, reason = NO_CHECKPOINTS[kind]
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_checkpoint(tmp_path / "w.pth")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'w.pth'} cannot be read as a checkpoint: ") and reason in message
    assert not re.search(r"[\n\x1b]|weights_only", message)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"does not exist: expected a file that torch\.save wrote"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(InputError, match="is a folder: expected a file"):
        read_checkpoint(tmp_path)


def test_files_that_unpack_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facetrt.export.checkpoints.MAX_CHECKPOINT_BYTES", 100_000)
    np.savez_compressed(tmp_path / "w.npz", cls_token=np.zeros(1_000_000, np.float32))
    with pytest.raises(InputError, match=r"it unpacks to 4,000,128 bytes, more than 100,000"):
        read_checkpoint(tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", cls_token=np.zeros(1_000_000, np.float32))
    with pytest.raises(InputError, match=r"bytes: expected at most 100,000"):
        read_checkpoint(tmp_path / "w.npz")


def test_layouts_that_are_not_known_name_what_was_found(state: State, other: State) -> None:
    for loaded, reason in (
        ({"weights": state}, r"its first tensors are weights\.cls_token, .* and \d+ more: expected names like blocks"),
        (under("vision_tower.", state), r"its first tensors are vision_tower\."),
        ({"features.0.weight": torch.zeros(3)}, r"its first tensors are features\.0\.weight: expected"),
        ({"epoch": 3, "args": {}}, "holds no tensors, but epoch, args: expected"),
        ({}, "holds no tensors, but nothing"),
        ([torch.zeros(3)], "holds no tensors, but a list"),
        (under("backbone.", state) | under("encoder.", other), "holds two models, under 'backbone' and 'encoder'"),
        (state | under("module.", other), "two tensors that would both be"),
    ):
        with pytest.raises(InputError, match=reason):
            find_backbone(loaded, "w.pth")
    assert find_backbone(state | under("module.", state), "w.pth").tensors.keys() == state.keys()
