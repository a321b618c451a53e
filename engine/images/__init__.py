"""Image files and arrays as they come: finding, decoding, sizes and geometry."""
