"""Points of one descriptor map in another: their binned descriptors, the best cell, how their surroundings lie there.

Positions are (column, row) in cells, fractional; shapes (2, 2) map offsets (x, y), row by row. Whatever a map holds,
NaN included, no cell outside it is read.
"""

import triton
import triton.language as tl

from facetrt.kernels.device.programs.best_buddies import bin_place
from facetrt.kernels.device.programs.log_bin import shifted

NOWHERE = tl.constexpr(2147483647)
BINS = tl.constexpr(17)
TINY = tl.constexpr(1e-30)  # as a divisor: nothing by nothing is nothing


@triton.jit
def _within(index, last):
    """0 to ``last``."""
    return tl.minimum(tl.maximum(index, 0), last)


@triton.jit
def centre(
    values, mean, previous, out, flags, factor, cells, channels, first, total, compared,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``(values (cells, channels) - mean) · factor`` into the channels from ``first`` on of ``out (cells, total)``.

    ``flags[0]`` becomes 1 where a number is not finite, and, if ``compared``, ``flags[1]`` where ``previous`` differs.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < cells)[:, None] & (c < channels)[None, :]
    source = row.to(tl.int64)[:, None] * channels + c[None, :]
    target = row.to(tl.int64)[:, None] * total + first + c[None, :]
    value = tl.load(values + source, mask=inside, other=0.0).to(tl.float32)
    value = (value - tl.load(mean + c, mask=c < channels, other=0.0)[None, :]) * factor
    tl.store(out + target, value, mask=inside)
    broken = inside & ((value - value) != 0.0)
    if tl.max(tl.max(broken.to(tl.int32), 1), 0) > 0:
        tl.store(flags, 1)
    if compared > 0:
        before = tl.load(previous + target, mask=inside, other=0.0)
        if tl.max(tl.max((inside & (before != value)).to(tl.int32), 1), 0) > 0:
            tl.store(flags + 1, 1)


@triton.jit
def _bilinear(values, x, y, c, channels, grid_h, grid_w, used):
    """``values (grid_h, grid_w, channels)`` at positions clamped to the grid, of channels ``c``."""
    x = tl.minimum(tl.maximum(x, 0.0), (grid_w - 1).to(tl.float32))
    y = tl.minimum(tl.maximum(y, 0.0), (grid_h - 1).to(tl.float32))
    left, top = _within(x.to(tl.int32), grid_w - 1), _within(y.to(tl.int32), grid_h - 1)
    right, down = tl.minimum(left + 1, grid_w - 1), tl.minimum(top + 1, grid_h - 1)
    across, along = (x - left.to(tl.float32))[:, None], (y - top.to(tl.float32))[:, None]
    upper, lower = top.to(tl.int64) * grid_w, down.to(tl.int64) * grid_w
    a = tl.load(values + ((upper + left) * channels)[:, None] + c[None, :], mask=used, other=0.0)
    b = tl.load(values + ((upper + right) * channels)[:, None] + c[None, :], mask=used, other=0.0)
    mixed = (a * (1.0 - across) + b * across) * (1.0 - along)
    a = tl.load(values + ((lower + left) * channels)[:, None] + c[None, :], mask=used, other=0.0)
    b = tl.load(values + ((lower + right) * channels)[:, None] + c[None, :], mask=used, other=0.0)
    return mixed + (a * (1.0 - across) + b * across) * along


@triton.jit
def binned(
    levels, positions, shapes, out, turned, kept, grid_h, grid_w, channels,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """A unit binned descriptor per program, of ``levels (2, grid_h, grid_w, C)``, into ``out (n, BINS, C)``.

    ``shapes`` lay out the bins if ``turned``. What ``out`` holds is kept with the share ``kept``, unless that is 0.
    """
    point = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SLOTS)
    level, dy, dx = bin_place(i)
    right, down = dx.to(tl.float32), dy.to(tl.float32)
    shape = shapes + 4 * point
    a, b = tl.load(shape, mask=turned > 0, other=1.0), tl.load(shape + 1, mask=turned > 0, other=0.0)
    c, d = tl.load(shape + 2, mask=turned > 0, other=0.0), tl.load(shape + 3, mask=turned > 0, other=1.0)
    x = tl.load(positions + 2 * point) + (a * right + b * down)
    y = tl.load(positions + 2 * point + 1) + (c * right + d * down)
    first = tl.minimum(level, 1).to(tl.int64)[:, None] * grid_h * grid_w * channels
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((SLOTS,), tl.float32)
    for start in range(0, channels, BLOCK):
        used = (i < BINS)[:, None] & (start + lane < channels)[None, :]
        value = _bilinear(levels + first, x, y, start + lane, channels, grid_h, grid_w, used)
        total += tl.sum(value * value, 1)
    scale = (1.0 - kept) / tl.maximum(tl.sqrt_rn(tl.sum(total, 0)), FLOOR)
    target = out + (point * BINS + i)[:, None] * channels
    for start in range(0, channels, BLOCK):
        used = (i < BINS)[:, None] & (start + lane < channels)[None, :]
        value = _bilinear(levels + first, x, y, start + lane, channels, grid_h, grid_w, used) * scale
        held = tl.load(target + (start + lane)[None, :], mask=used & (kept > 0), other=0.0)
        tl.store(target + (start + lane)[None, :], value + held * kept, mask=used)


@triton.jit
def scores(
    levels, norms, queries, windows, out, count, grid_h, grid_w, channels,
    BLOCK_POINTS: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Cosines of ``queries (count, BINS, C)`` to all cells, ``(count, cells)``, as a product of pooled maps.

    Tiles without a row of the windows ``(count, 4)`` of their points are left out.
    """
    cells = grid_h * grid_w
    tiles = tl.cdiv(cells, BLOCK_CELLS)
    point = (tl.program_id(0) // tiles) * BLOCK_POINTS + tl.arange(0, BLOCK_POINTS)
    first = (tl.program_id(0) % tiles) * BLOCK_CELLS
    cell = first + tl.arange(0, BLOCK_CELLS)
    low = tl.load(windows + 4 * point, mask=point < count, other=NOWHERE)
    high = tl.load(windows + 4 * point + 2, mask=point < count, other=-1)
    last = tl.minimum(first + BLOCK_CELLS, cells) - 1
    if tl.max(((low <= last // grid_w) & (high >= first // grid_w)).to(tl.int32), 0) > 0:
        lane, blocks = tl.arange(0, BLOCK_CHANNELS), tl.cdiv(channels, BLOCK_CHANNELS)
        query = tl.minimum(point, count - 1).to(tl.int64) * BINS
        dots = tl.zeros((BLOCK_POINTS, BLOCK_CELLS), tl.float32)
        for i in range(0, blocks * BINS):
            level, dy, dx = bin_place(i // blocks)
            channel = (i % blocks) * BLOCK_CHANNELS + lane
            row = level.to(tl.int64) * cells + shifted(cell, dy, dx, grid_h, grid_w)
            exists = channel < channels
            place = (query + i // blocks)[:, None] * channels + channel[None, :]
            a = tl.load(queries + place, mask=exists[None, :], other=0.0)
            b = tl.load(levels + row[None, :] * channels + channel[:, None], mask=exists[:, None], other=0.0)
            dots = tl.dot(a, b, dots, input_precision="ieee")
        norm = tl.maximum(tl.load(norms + cell, mask=cell < cells, other=1.0), FLOOR)
        target = out + point.to(tl.int64)[:, None] * cells + cell[None, :]
        tl.store(target, dots / norm[None, :], mask=(point < count)[:, None] & (cell < cells)[None, :])


@triton.jit
def peaks(
    cosines, windows, out, grid_h, grid_w,
    TIE: tl.constexpr, TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A point per program: the first cell of its window that ties with the best one, and a soft-argmax around it."""
    point = tl.program_id(0).to(tl.int64)
    low_y, low_x = tl.load(windows + 4 * point), tl.load(windows + 4 * point + 1)
    high_y, high_x = tl.load(windows + 4 * point + 2), tl.load(windows + 4 * point + 3)
    own, lane = cosines + point * grid_h * grid_w, tl.arange(0, BLOCK)
    first, count = low_y * grid_w, (high_y + 1 - low_y) * grid_w
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, count, BLOCK):
        cell = first + start + lane
        taken = (cell // grid_w <= high_y) & (cell % grid_w >= low_x) & (cell % grid_w <= high_x)
        most = tl.maximum(most, tl.load(own + cell, mask=taken, other=float("-inf")))
    limit = tl.max(most, 0) - TIE
    where = tl.full((BLOCK,), NOWHERE, tl.int32)
    for start in range(0, count, BLOCK):
        cell = first + start + lane
        taken = (cell // grid_w <= high_y) & (cell % grid_w >= low_x) & (cell % grid_w <= high_x)
        found = tl.load(own + cell, mask=taken, other=float("-inf"))
        where = tl.minimum(where, tl.where(taken & (found >= limit), cell, NOWHERE))
    best = _within(tl.min(where, 0), grid_h * grid_w - 1)
    y, x = best // grid_w, best % grid_w
    near = tl.arange(0, 16)
    down, right = near // 3 - 1, near % 3 - 1
    taken = (near < 9) & (y + down >= low_y) & (y + down <= high_y) & (x + right >= low_x) & (x + right <= high_x)
    found = tl.load(own + best + down * grid_w + right, mask=taken, other=float("-inf"))
    top = tl.max(found, 0)
    span = top - tl.min(tl.where(taken, found, float("inf")), 0)
    weight = tl.where(taken, tl.exp((found - top) / tl.maximum(TEMPERATURE * span, TIE)), 0.0)
    total = tl.sum(weight, 0)
    tl.store(out + 2 * point, x.to(tl.float32) + tl.sum(weight * right.to(tl.float32), 0) / total)
    tl.store(out + 2 * point + 1, y.to(tl.float32) + tl.sum(weight * down.to(tl.float32), 0) / total)


@triton.jit
def _offsets(k, SIDE: tl.constexpr, SPREAD: tl.constexpr):
    """Sample ``k``'s offset from the middle of its patch, (x, y)."""
    return (k % SIDE - SIDE // 2).to(tl.float32) * SPREAD, (k // SIDE - SIDE // 2).to(tl.float32) * SPREAD


@triton.jit
def _inside(x, y, grid_h, grid_w):
    """Between the outermost cells' centres."""
    return (x >= 0.0) & (x <= (grid_w - 1).to(tl.float32)) & (y >= 0.0) & (y <= (grid_h - 1).to(tl.float32))


@triton.jit
def patches(
    values, positions, out, grid_h, grid_w, channels,
    SLOTS: tl.constexpr, SIDE: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``SIDE × SIDE`` samples around each position, ``(n, SIDE², C)``."""
    point, k = tl.program_id(0).to(tl.int64), tl.arange(0, SLOTS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x, y = _offsets(k, SIDE, SPREAD)
    x, y = x + tl.load(positions + 2 * point), y + tl.load(positions + 2 * point + 1)
    used = (k < SIDE * SIDE)[:, None] & (c < channels)[None, :]
    value = _bilinear(values, x, y, c, channels, grid_h, grid_w, used)
    tl.store(out + (point * SIDE * SIDE + k)[:, None] * channels + c[None, :], value, mask=used)


@triton.jit
def _three(at, last):
    """The three cells around a place on one axis, with their shares of the value and of its change over a cell.

    Half a cell to either side of a place lie two of these three cells each. The value's share of the middle one is what
    the other two leave of 1; its change's, what makes their sum 0.
    """
    nearest = tl.floor(at + 0.5)
    share, cell = at + 0.5 - nearest, nearest.to(tl.int32)
    before, after = tl.maximum(0.5 - share, 0.0), tl.maximum(share - 0.5, 0.0)
    return _within(cell - 1, last), _within(cell, last), _within(cell + 1, last), before, after, share - 1.0, share


@triton.jit
def _row(values, row, x0, x1, x2, before, after, fall, rise, c, used):
    """One grid row's value and change along it; ``row`` and the columns in elements."""
    a = tl.load(values + (row + x0)[:, None] + c[None, :], mask=used, other=0.0)
    b = tl.load(values + (row + x1)[:, None] + c[None, :], mask=used, other=0.0)
    d = tl.load(values + (row + x2)[:, None] + c[None, :], mask=used, other=0.0)
    value = b + before[:, None] * (a - b) + after[:, None] * (d - b)
    return value, fall[:, None] * (a - b) + rise[:, None] * (d - b)


@triton.jit
def _solved(a00, a01, a02, a03, a11, a12, a13, a22, a23, a33, b0, b1, b2, b3, DAMPING: tl.constexpr):
    """``(A + damping) s = b`` of a symmetric A, as L D Lᵀ."""
    damping = DAMPING * (a00 + a11 + a22 + a33) / 4.0 + TINY
    d0 = a00 + damping
    l1, l2, l3 = a01 / d0, a02 / d0, a03 / d0
    d1 = a11 + damping - l1 * a01
    m2, m3 = a12 - l1 * a02, a13 - l1 * a03
    k2, k3 = m2 / d1, m3 / d1
    d2 = a22 + damping - l2 * a02 - k2 * m2
    n3 = a23 - l2 * a03 - k2 * m3
    j3 = n3 / d2
    d3 = a33 + damping - l3 * a03 - k3 * m3 - j3 * n3
    b1 = b1 - l1 * b0
    b2 = b2 - l2 * b0 - k2 * b1
    s3 = (b3 - l3 * b0 - k3 * b1 - j3 * b2) / d3
    s2 = b2 / d2 - j3 * s3
    s1 = b1 / d1 - k2 * s2 - k3 * s3
    return b0 / d0 - l1 * s1 - l2 * s2 - l3 * s3, s1, s2, s3


@triton.jit
def _clipped(value, LIMIT: tl.constexpr):
    return tl.minimum(tl.maximum(value, -LIMIT), LIMIT)


@triton.jit
def _step(
    samples, values, falloff, ax, ay, px, py, k, grid_h, grid_w, channels,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, DAMPING: tl.constexpr,
):  # fmt: skip
    """Gauss–Newton from where samples ``(SIDE², C)`` lie now: move in x and y, growth, turn."""
    weights = tl.where(_inside(px, py, grid_h, grid_w), falloff, 0.0)
    shares = weights / tl.maximum(tl.sum(weights, 0), TINY)
    x0, x1, x2, x_before, x_after, x_fall, x_rise = _three(px, grid_w - 1)
    y0, y1, y2, y_before, y_after, y_fall, y_rise = _three(py, grid_h - 1)
    x0, x1, x2 = x0 * channels, x1 * channels, x2 * channels
    y0, y1, y2 = y0 * grid_w * channels, y1 * grid_w * channels, y2 * grid_w * channels
    xx, xy, yy = tl.zeros_like(px), tl.zeros_like(px), tl.zeros_like(px)
    xr, yr = tl.zeros_like(px), tl.zeros_like(px)
    lane = tl.arange(0, BLOCK)
    none = tl.zeros((BLOCK,), tl.float32)
    m00, m01, m02, m03, m11, m12, m13, m22, m23, m33 = none, none, none, none, none, none, none, none, none, none
    r0, r1, r2, r3 = none, none, none, none
    for start in range(0, channels, BLOCK):
        c = start + lane
        used = (k < SIDE * SIDE)[:, None] & (c < channels)[None, :]
        above, x_above = _row(values, y0, x0, x1, x2, x_before, x_after, x_fall, x_rise, c, used)
        here, x_here = _row(values, y1, x0, x1, x2, x_before, x_after, x_fall, x_rise, c, used)
        above -= here
        value = here + y_before[:, None] * above
        right = x_here + y_before[:, None] * (x_above - x_here)
        down = y_fall[:, None] * above
        below, x_below = _row(values, y2, x0, x1, x2, x_before, x_after, x_fall, x_rise, c, used)
        below -= here
        value += y_after[:, None] * below
        right += y_after[:, None] * (x_below - x_here)
        down += y_rise[:, None] * below
        sample = tl.load(samples + k[:, None] * channels + c[None, :], mask=used, other=0.0)
        residual = sample - value
        xx += tl.sum(right * right, 1)
        xy += tl.sum(right * down, 1)
        yy += tl.sum(down * down, 1)
        xr += tl.sum(right * residual, 1)
        yr += tl.sum(down * residual, 1)
        s0, s1, r = shares[:, None] * right, shares[:, None] * down, tl.sum(shares[:, None] * residual, 0)
        g2, g3 = tl.sum(ax[:, None] * s0 + ay[:, None] * s1, 0), tl.sum(ax[:, None] * s1 - ay[:, None] * s0, 0)
        g0, g1 = tl.sum(s0, 0), tl.sum(s1, 0)
        m00, m01, m02, m03 = m00 + g0 * g0, m01 + g0 * g1, m02 + g0 * g2, m03 + g0 * g3
        m11, m12, m13 = m11 + g1 * g1, m12 + g1 * g2, m13 + g1 * g3
        m22, m23, m33 = m22 + g2 * g2, m23 + g2 * g3, m33 + g3 * g3
        r0, r1, r2, r3 = r0 + g0 * r, r1 + g1 * r, r2 + g2 * r, r3 + g3 * r
    xx, xy, yy, xr, yr = xx * shares, xy * shares, yy * shares, xr * shares, yr * shares
    gx, gy, tx, ty = ax * xx + ay * xy, ax * xy + ay * yy, ax * xy - ay * xx, ax * yy - ay * xy
    return _solved(
        tl.sum(xx, 0) - tl.sum(m00, 0), tl.sum(xy, 0) - tl.sum(m01, 0),
        tl.sum(gx, 0) - tl.sum(m02, 0), tl.sum(tx, 0) - tl.sum(m03, 0),
        tl.sum(yy, 0) - tl.sum(m11, 0), tl.sum(gy, 0) - tl.sum(m12, 0), tl.sum(ty, 0) - tl.sum(m13, 0),
        tl.sum(ax * gx + ay * gy, 0) - tl.sum(m22, 0), tl.sum(ax * gy - ay * gx, 0) - tl.sum(m23, 0),
        tl.sum(ax * ty - ay * tx, 0) - tl.sum(m33, 0),
        tl.sum(xr, 0) - tl.sum(r0, 0), tl.sum(yr, 0) - tl.sum(r1, 0),
        tl.sum(ax * xr + ay * yr, 0) - tl.sum(r2, 0), tl.sum(ax * yr - ay * xr, 0) - tl.sum(r3, 0), DAMPING,
    )  # fmt: skip


@triton.jit
def align(
    samples, places, rows, values, starts, shapes, positions, turned, similarity,
    key_h, key_w, grid_h, grid_w, channels,
    SLOTS: tl.constexpr, SIDE: tl.constexpr, SPREAD: tl.constexpr, SIGMA: tl.constexpr, BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr, LARGEST_STEP: tl.constexpr, LARGEST_TURN: tl.constexpr, SMALLEST_STEP: tl.constexpr,
    DAMPING: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """A point per program: its patch, number ``rows[i]`` of ``samples (N, SIDE², C)``, laid best on ``values``.

    ``places (N, 2)`` are the patches' middles on their own grid. From ``starts`` and ``shapes`` it comes to
    ``positions``, ``turned`` and the ``similarity`` there.
    """
    point = tl.program_id(0).to(tl.int64)
    number = tl.load(rows + point).to(tl.int64)
    samples += number * SIDE * SIDE * channels
    k = tl.arange(0, SLOTS)
    ox, oy = _offsets(k, SIDE, SPREAD)
    counted = _inside(tl.load(places + 2 * number) + ox, tl.load(places + 2 * number + 1) + oy, key_h, key_w)
    falloff = tl.exp(-(ox * ox + oy * oy) / (2.0 * SIGMA * SIGMA))
    falloff = tl.where(counted & (k < SIDE * SIDE), falloff, 0.0)
    x, y = tl.load(starts + 2 * point), tl.load(starts + 2 * point + 1)
    a, b = tl.load(shapes + 4 * point), tl.load(shapes + 4 * point + 1)
    c, d = tl.load(shapes + 4 * point + 2), tl.load(shapes + 4 * point + 3)
    done = 0
    while done < ITERATIONS:
        ax, ay = a * ox + b * oy, c * ox + d * oy
        right, down, grow, turn = _step(
            samples, values, falloff, ax, ay, x + ax, y + ay, k, grid_h, grid_w, channels, SIDE, BLOCK, DAMPING
        )
        rim = tl.abs(right) + tl.abs(down) + SIDE // 2 * SPREAD * (tl.abs(grow) + tl.abs(turn))
        x, y = x + _clipped(right, LARGEST_STEP), y + _clipped(down, LARGEST_STEP)
        grow, turn = 1.0 + _clipped(grow, LARGEST_TURN), _clipped(turn, LARGEST_TURN)
        a, b, c, d = grow * a - turn * c, grow * b - turn * d, turn * a + grow * c, turn * b + grow * d
        done = tl.where(rim > SMALLEST_STEP, done + 1, ITERATIONS)
    px, py = x + a * ox + b * oy, y + c * ox + d * oy
    weights = tl.where(_inside(px, py, grid_h, grid_w), falloff, 0.0)
    dots, own, others = tl.zeros_like(px), tl.zeros_like(px), tl.zeros_like(px)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        used = (k < SIDE * SIDE)[:, None] & (channel < channels)[None, :]
        left = tl.load(samples + k[:, None] * channels + channel[None, :], mask=used, other=0.0)
        value = _bilinear(values, px, py, channel, channels, grid_h, grid_w, used)
        dots += tl.sum(left * value, 1)
        own += tl.sum(left * left, 1)
        others += tl.sum(value * value, 1)
    squares = tl.sum(own * weights, 0) * tl.sum(others * weights, 0)
    tl.store(similarity + point, tl.sum(dots * weights, 0) / tl.maximum(tl.sqrt_rn(squares), FLOOR))
    tl.store(positions + 2 * point, x)
    tl.store(positions + 2 * point + 1, y)
    tl.store(turned + 4 * point, a)
    tl.store(turned + 4 * point + 1, b)
    tl.store(turned + 4 * point + 2, c)
    tl.store(turned + 4 * point + 3, d)
