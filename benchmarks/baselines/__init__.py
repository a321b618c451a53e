"""What facetrt is compared with, written plainly: the style of research code, and a very good engineer's."""
