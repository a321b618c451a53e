"""Memory, streams, launches and exchange with other libraries on a GPU."""
