"""``facetrt serve`` up to where Triton starts; ``tests/triton`` has the rest."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from facetrt.engine.cli.main import program
from facetrt.engine.serving import triton_server
from facetrt.kernels.errors import BackendError, InputError, MissingDependencyError

LISTENING = """#!{python}
import http.server, json, sys

options = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
if "{fails}":
    print("E1 model.cc:1] \\"failed to load 'match' version 1: Internal: {fails}\\\\n\\\\nAt:\\\\n  here\\"")
    sys.exit(1)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/v2":
            self.wfile.write(json.dumps({{"name": options["id"]}}).encode())
            sys.stdout.flush()

    def log_message(self, *arguments): pass

server = http.server.HTTPServer((options["http-address"], int(options["http-port"])), Handler)
for _ in range(2):  # whether it is ready, and who it is
    server.handle_request()
print("that was all")
"""


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        number: int = found.getsockname()[1]
    yield number


def serve(bundle: Path, port: int, *arguments: str) -> str:
    ports = ["--http-port", str(port), "--grpc-port", "0", "--metrics-port", "0"]
    line = ["serve", str(bundle), "--load-size", "64", *ports, *arguments]
    return CliRunner().invoke(program(), line, catch_exceptions=False).output


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
    """A program on the path that listens as Triton does, and ends after the first questions."""
    path = folder / "tritonserver"
    path.write_text(LISTENING.format(python=sys.executable, fails=fails))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_it_runs_until_triton_ends(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    stand_in(tmp_path, monkeypatch)
    with pytest.raises(BackendError, match="Triton ended: that was all"):
        serve(tiny_bundle, port)


def test_a_model_that_fails_is_named(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    stand_in(tmp_path, monkeypatch, fails="facetrt.InputError: no such facet")
    with pytest.raises(BackendError, match=r"Triton did not start: match: no such facet$"):
        serve(tiny_bundle, port)


def test_a_port_that_is_taken(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"cannot listen at 127\.0\.0\.1:{number} \(.*another --http-port"):
            serve(tiny_bundle, number)


def test_without_triton(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(triton_server, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'facetrt\[serve\]'"):
        serve(tiny_bundle, port)


def test_what_cannot_be_served_is_said_at_once(tiny_bundle: Path, port: int) -> None:
    with pytest.raises(InputError, match="sewing"):
        serve(tiny_bundle, port, "--tasks", "discover", "--method", "sewing")
