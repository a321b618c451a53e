"""Docstrings as Markdown: their references (``:meth:`encode```) become links, where what they name has a page."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:meth|func|class|mod|attr|data):`~?([^`]+)`")


class References(griffe.Extension):
    """Writes references as the site has them; what is not public has no page, and is only named."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called once, when all of the package has been read."""
        _rewrite(pkg)


def _rewrite(owner: griffe.Object) -> None:
    if owner.docstring is not None:
        owner.docstring.value = ROLE.sub(lambda found: _link(owner, found[1]), owner.docstring.value)
    for member in owner.members.values():
        if isinstance(member, griffe.Object):  # and not an alias, whose target is another's member
            _rewrite(member)


def _link(owner: griffe.Object, name: str) -> str:
    try:
        target = owner.resolve(name)
    except griffe.NameResolutionError:
        target = name
    return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'
