"""Numbers of point tracking that the host and the device share; :mod:`facetrt.engine.video.tracking` uses them."""

from __future__ import annotations

HIERARCHY = 2  # levels of log-binning, as for matching

# Soft-argmax over 3 × 3 cells at a fifth of their range: of windows 3, 5, 7 and temperatures 0.05, 0.1, 0.2 the one
# with the smallest error one frame on: medians of 0.16 to 0.27 cells, of the best cell alone 0.24 to 0.46.
PEAK_TEMPERATURE = 0.2

# 7 × 7 samples, two cells apart. In clips turned by 3° per frame up to 21°, 97 and 96 % of the points stay within half
# a cell (load sizes 112 and 160); with 5 × 5 samples 94 and 95 %.
SAMPLES = 7  # in each direction
SPREAD = 2.0  # cells from one to the next
SIGMA = 4.0  # cells, of the weights
ITERATIONS = 5
LARGEST_STEP = 1.0  # cells in one iteration
LARGEST_TURN = 0.15  # change of shape in one iteration
# Cells at the rim of the window: after a smaller step none follows. On turned, zoomed and shifted clips points then end
# within 0.03 cells of where five steps take them (99 %: 0.014), with 3.3 instead of 5 on average.
SMALLEST_STEP = 0.05
DAMPING = 1e-3  # of the mean diagonal entry: flat surroundings make no step rather than a wild one
