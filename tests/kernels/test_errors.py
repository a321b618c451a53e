from __future__ import annotations

from pathlib import Path

import pytest

from facetrt.kernels.errors import BundleError, FacetrtError, InputError, MissingFileError, printable, reading


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – 漢", "plain – 漢"),
        ("two\nlines\t and \r\nmore", "two lines and more"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\ud800b\udcff", "a\\ud800b\\udcff"),
        ("left\u202eright", "left\\u202eright"),
    ],
)
def test_messages_are_one_printable_line(text: str, shown: str) -> None:
    assert printable(text) == shown == str(InputError(text)) == str(MissingFileError(text))
    assert shown.encode()


def test_messages_have_an_end() -> None:
    assert len(str(InputError("x" * 1_000_000))) < 5_000


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (KeyError("a"), InputError, "a.npz is not a model that can be read: 'a'"),
        (AttributeError(), InputError, "a.npz is not a model that can be read: AttributeError"),
        (OSError(5, "Input/output error"), InputError, "a.npz is not a model that can be read: Input/output error"),
        (RecursionError(), InputError, "nested too deeply"),
        (MemoryError(), InputError, "would not fit into memory"),
        (FileNotFoundError(), MissingFileError, "a.npz does not exist: expected a model"),
        (BundleError("ours"), BundleError, "^ours$"),
    ],
)
def test_whatever_reading_raises_is_ours(raised: Exception, kind: type[FacetrtError], said: str) -> None:
    with pytest.raises(kind, match=said), reading(Path("a.npz"), "a model"):
        raise raised


def test_an_interruption_is_no_damage() -> None:
    with pytest.raises(KeyboardInterrupt), reading("a", "a model"):
        raise KeyboardInterrupt
