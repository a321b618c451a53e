"""The suite for processors."""
