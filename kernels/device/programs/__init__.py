"""Triton kernels, one operation per file. Imported only where they are compiled or interpreted."""
