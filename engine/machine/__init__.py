"""What this machine has: processors, memory, installed libraries."""
