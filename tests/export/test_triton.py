"""``facetrt export … --target triton``."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from facetrt.engine.cli.main import program
from facetrt.kernels.errors import InputError, OutputError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(program(), ["export", *map(str, arguments)], catch_exceptions=False)


def test_a_repository_of_a_bundle_and_what_became_of_it(tiny_bundle: Path, tmp_path: Path) -> None:
    place = ("--target", "triton", "--repository", tmp_path / "models")
    found = run(tiny_bundle, *place, "--tasks", "match,track", "--load-size", 64, "--batch", 4)
    assert "models: match, track, encoder" in found.output
    assert "is what would be written now" in run(tiny_bundle, *place, "--check").output
    config = tmp_path / "models" / "match" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 4", "max_batch_size: 5"))
    with pytest.raises(OutputError, match="has drifted: write it anew with --force"):
        run(tiny_bundle, *place, "--check")
    run(tiny_bundle, *place, "--tasks", "match", "--force")
    assert "is what would be written now" in run(tiny_bundle, *place, "--check").output


def test_options_that_do_not_belong_together(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--target triton needs a place: add --repository"):
        run(tiny_bundle, "--target", "triton")
    with pytest.raises(InputError, match="--repository, --tasks shape a model repository: add --target triton"):
        run(tiny_bundle, "--repository", tmp_path / "models", "--tasks", "match")
    with pytest.raises(InputError, match="--check looks at a repository: add --target triton --repository"):
        run(tiny_bundle, "--check")
    with pytest.raises(InputError, match="--model: no model: expected a model exactly where apply"):
        run(tiny_bundle, "--target", "triton", "--repository", tmp_path / "models", "--tasks", "apply")
