"""Frames in, results out: sources, streams, tracking, propagation, writing."""
