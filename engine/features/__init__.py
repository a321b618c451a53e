"""Descriptors of one image, of many in bounded memory, and on disk."""
