"""The tasks on a GPU: images go up once as bytes, results come down once."""
