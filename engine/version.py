"""The version that is installed."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The installed version of facetrt, like ``0.1.0``; ``unknown`` where the code runs without being installed."""
    try:
        return version("facetrt")
    except PackageNotFoundError:
        return "unknown"


__version__ = installed_version()
