"""Who runs the encoder: one file for each, their contract, and how one is chosen."""
