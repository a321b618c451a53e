"""Protocol buffers' text format, as far as Triton's model configurations need it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


class Word(str):
    """The name of an enumeration's value, which stands without quotes."""

    __slots__ = ()


def pbtxt(fields: Mapping[str, Any], depth: int = 0) -> str:
    """A message as text: mappings are messages, sequences repeat a field, and what is None is left out."""
    indent = "  " * depth
    lines = []
    for name, value in fields.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            lines.append(f"{indent}{name} {{\n{pbtxt(value, depth + 1)}{indent}}}\n")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if all(isinstance(item, Mapping) for item in value):
                lines += [pbtxt({name: item}, depth) for item in value]
            else:
                lines.append(f"{indent}{name}: [{', '.join(map(_scalar, value))}]\n")
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not isinstance(value, Word):
        return json.dumps(value)  # its escapes are the format's as well, all in ASCII
    return str(value)
