"""What can run on this machine, and what mends the rest."""
