"""Methods of discovery by name."""

from __future__ import annotations

from facetrt.engine.tasks.discovery.method import Method

METHODS: dict[str, type[Method]] = {}  # in the order in which people meet them
