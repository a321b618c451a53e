"""Results over a wire: what tasks take and give, and the servers that they run in."""
