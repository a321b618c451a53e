"""The benchmark suite behind ``facetrt bench``. Needs the ``bench`` extra (what ``export`` needs, and matplotlib)."""
