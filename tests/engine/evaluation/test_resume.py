"""An interrupted evaluation continues and ends as if it had not been interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from facetrt.engine import InputError, OutputError
from facetrt.engine.evaluation import evaluate, open_evaluation
from facetrt.engine.evaluation.resume import ITEMS, RESULTS, ItemStore, list_differences, write_atomically

COSEG = {"refine": "none", "load_size": "none", "saliency_threshold": "0.3", "sample_interval": "9"}


@pytest.fixture
def coseg(tmp_path, save):
    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        for i in range(2):
            picture = random.integers(20, 40, (32, 40, 3))
            picture[4 + i : 20, 8:30] += 180
            save(tmp_path / "data" / "images" / name / f"{i}.png", picture)
            save(tmp_path / "data" / "masks" / name / f"{i}.png", (picture.mean(axis=2) > 120) * 255)
    return tmp_path / "data"


def _figures(out: Path):
    results = json.loads((out / RESULTS).read_text())
    return {
        name: results[name] for name in ("overall", "baselines", "categories", "counts", "options", "model", "data")
    }


def test_an_interrupted_run_continues_to_the_same_result(coseg, make_engine, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate(open_evaluation("msrc", coseg, COSEG), make_engine(), whole)
    with pytest.raises(KeyboardInterrupt):
        evaluate(open_evaluation("msrc", coseg, COSEG), make_engine(fail_after=3), parts)
    assert not (parts / RESULTS).exists()
    second = make_engine()
    outcome = evaluate(open_evaluation("msrc", coseg, COSEG), second, parts)
    assert (outcome.resumed, outcome.items, len(second.encoded)) == (1, 3, 4)
    assert _figures(parts) == _figures(whole)
    again = make_engine()
    assert evaluate(open_evaluation("msrc", coseg, COSEG), again, parts).resumed == 3
    assert again.encoded == []


def test_progress_counts_what_an_earlier_run_did(coseg, make_engine, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(open_evaluation("msrc", coseg, COSEG), make_engine(fail_after=2), tmp_path / "out")
    seen, started = [], []
    evaluate(
        open_evaluation("msrc", coseg, COSEG),
        make_engine(),
        tmp_path / "out",
        progress=lambda done, total: seen.append((done, total)),
        started=lambda done, total: started.append((done, total)),
    )
    assert seen == [(done, 6) for done in (2, 3, 4, 5, 6)]
    assert started == [(1, 3)]


def test_another_model_or_option_is_refused_and_named(coseg, make_engine, tmp_path):
    out = tmp_path / "out"
    evaluate(open_evaluation("msrc", coseg, COSEG), make_engine(), out)
    with pytest.raises(OutputError, match=r"options\.elbow is 0\.975 there and 0\.9 now.*--force"):
        evaluate(open_evaluation("msrc", coseg, COSEG | {"elbow": "0.9"}), make_engine(), out)
    with pytest.raises(OutputError, match=r"model\.model is stub there and other now"):
        evaluate(open_evaluation("msrc", coseg, COSEG), make_engine("other"), out)
    (coseg / "masks" / "a" / "0.png").write_bytes((coseg / "masks" / "a" / "0.png").read_bytes() + b"\0")
    with pytest.raises(OutputError, match=r"data\.digest"):
        evaluate(open_evaluation("msrc", coseg, COSEG), make_engine(), out)
    outcome = evaluate(open_evaluation("msrc", coseg, COSEG), make_engine(), out, force=True)
    assert outcome.resumed == 0


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    with ItemStore(tmp_path, {"n": 1}) as store:
        store.add("a", {"v": 1})
        store.add("b", {"v": 2})
    path = tmp_path / ITEMS
    path.write_bytes(path.read_bytes()[:-9])
    with ItemStore(tmp_path, {"n": 1}) as store:
        assert store.records == {"a": {"v": 1}}
        store.add("b", {"v": 3})
    with ItemStore(tmp_path, {"n": 1}) as store:
        assert store.records == {"a": {"v": 1}, "b": {"v": 3}}


def test_a_header_cut_off_or_without_items_is_replaced(tmp_path):
    (tmp_path / ITEMS).write_text('{"fingerp')
    ItemStore(tmp_path, {"n": 1}).close()
    ItemStore(tmp_path, {"n": 2}).close()
    assert (tmp_path / ITEMS).read_text() == '{"fingerprint": {"n": 2}}\n'


def test_damage_is_named_with_its_line(tmp_path):
    (tmp_path / ITEMS).write_text('{"fingerprint": {}}\nnonsense\n')
    with pytest.raises(InputError, match="line 2 is damaged"):
        ItemStore(tmp_path, {})


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"no items\.jsonl to continue"):
        ItemStore(tmp_path, {}, force=True)
    with pytest.raises(OutputError, match="is a file"):
        ItemStore(tmp_path / "thesis.tex", {})
    other = tmp_path / "other"
    other.mkdir()
    (other / ITEMS).write_text("my own list\n")
    with pytest.raises(OutputError, match="was not written by facetrt"):
        ItemStore(other, {}, force=True)
    assert (other / ITEMS).read_text() == "my own list\n"


def test_two_runs_do_not_share_a_folder(tmp_path):
    with ItemStore(tmp_path, {}), pytest.raises(OutputError, match="another run is writing"):
        ItemStore(tmp_path, {})
    ItemStore(tmp_path, {}).close()


def test_items_survive_a_kill(tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom facetrt.engine.evaluation.resume import ItemStore\n"
        "store = ItemStore(Path(sys.argv[1]), {'n': 1})\nstore.add('a', {'v': 1})\nprint('kept', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with ItemStore(tmp_path, {"n": 1}) as store:
        assert store.records == {"a": {"v": 1}}


def test_differences_are_listed_by_path():
    assert list_differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c is 2 there and 3 now",
        "d is None there and 4 now",
    ]


def test_files_are_written_whole(tmp_path):
    write_atomically(tmp_path / "x.json", "{}")
    with pytest.raises(OutputError, match="cannot be written"):
        write_atomically(tmp_path / "missing" / "x.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_clock_of_a_result_is_in_utc(coseg, tmp_path):
    evaluate(open_evaluation("msrc", coseg), None, tmp_path / "out")
    finished = json.loads((tmp_path / "out" / RESULTS).read_text())["finished"]
    assert finished.startswith(time.strftime("%Y-", time.gmtime()))
    assert finished.endswith("+00:00")
