"""A page in the browser to look at what descriptors see: ``facetrt inspect``."""
