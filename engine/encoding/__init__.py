"""Turning images into descriptors: the encoder's inputs, batches, and what its outputs must keep."""
