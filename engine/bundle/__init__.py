"""The bundle: a folder that export writes and the engine opens, read as if it were hostile."""
