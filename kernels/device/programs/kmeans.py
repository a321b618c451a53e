"""k-means: FAISS's rounds for many runs at once, assignment to many sets of centroids, and diverse clusters.

Only whole launches wait for each other. Where one program alone passes values from thread to thread through memory, a
barrier stands between.
"""

import triton
import triton.language as tl


@triton.jit
def assign(
    rows, centroids, clusters, counts, changed, labels, sums, sets, count, channels, parts, blocks,
    SETS: tl.constexpr, CLUSTERS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Nearest centroid of ROWS rows in SETS sets, and the sum of the squared distances to it.

    Programs for the same rows follow each other, so that all but the first find them in the cache. Sets of which no
    part is marked in ``changed (sets, parts)`` are left as they are.
    """
    groups = tl.cdiv(sets, SETS)
    first = (tl.program_id(0) % groups) * SETS
    block = tl.program_id(0) // groups
    which = first + tl.arange(0, SETS)
    part = tl.arange(0, PARTS)
    flags = (which * parts)[:, None] + part[None, :]
    moving = tl.load(changed + flags, mask=(which < sets)[:, None] & (part < parts)[None, :], other=0)
    limit = tl.where(tl.max(moving, axis=1) > 0, tl.load(counts + which, mask=which < sets, other=0), 0)
    if block * ROWS < tl.max(limit, axis=0):
        row = block * ROWS + tl.arange(0, ROWS)
        distances = _distances(rows, centroids, row, count, first * CLUSTERS, sets * CLUSTERS, channels,
                               SETS * CLUSTERS, ROWS, CHANNELS)  # fmt: skip
        distances = tl.reshape(distances, (ROWS, SETS, CLUSTERS))
        real = tl.arange(0, CLUSTERS)[None, :] < tl.load(clusters + which, mask=which < sets, other=0)[:, None]
        distances = tl.where(real[None, :, :], distances, float("inf"))
        nearest, label = tl.min(distances, axis=2), tl.argmin(distances, axis=2)
        inside = row[:, None] < limit[None, :]
        place = which.to(tl.int64)[None, :] * count + row[:, None]
        tl.store(labels + place, label.to(tl.uint8), mask=inside)
        total = tl.sum(tl.where(inside, nearest, 0.0), axis=0)
        tl.store(sums + which.to(tl.int64) * blocks + block, total, mask=block * ROWS < limit)


@triton.jit
def _distances(
    rows, centroids, row, count, first, last, channels,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Squared distances of rows to centroids ``first`` and on, ``(ROWS, COLUMNS)``; below 0 by rounding becomes 0."""
    column = first + tl.arange(0, COLUMNS)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    row_norms, column_norms = tl.zeros((ROWS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        x_place = row.to(tl.int64)[:, None] * channels + channel[None, :]
        x = tl.load(rows + x_place, mask=(row < count)[:, None] & (channel < channels)[None, :], other=0.0)
        y_place = column[None, :] * channels + channel[:, None]
        y = tl.load(centroids + y_place, mask=(column < last)[None, :] & (channel < channels)[:, None], other=0.0)
        products = tl.dot(x, y, products, input_precision="ieee")
        row_norms += tl.sum(x * x, axis=1)
        column_norms += tl.sum(y * y, axis=0)
    return tl.maximum(row_norms[:, None] + column_norms[None, :] - 2 * products, 0.0)


@triton.jit
def unit_distances(
    rows, centroids, out, count, clusters, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Squared distances of ROWS rows, divided by their length, to COLUMNS centroids, into ``out (clusters, count)``.

    Rows without length stay zero. What is not finite stays so: ``maximum`` would make 0 of NaN.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    row_squares, column_squares = tl.zeros((ROWS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        x_place = row.to(tl.int64)[:, None] * channels + channel[None, :]
        x = tl.load(rows + x_place, mask=(row < count)[:, None] & (channel < channels)[None, :], other=0.0)
        y_place = column.to(tl.int64)[None, :] * channels + channel[:, None]
        y = tl.load(centroids + y_place, mask=(column < clusters)[None, :] & (channel < channels)[:, None], other=0.0)
        products = tl.dot(x, y, products, input_precision="ieee")
        row_squares += tl.sum(x * x, axis=1)
        column_squares += tl.sum(y * y, axis=0)
    empty = row_squares == 0
    lengths = tl.sqrt_rn(tl.where(empty, 1.0, row_squares))[:, None] + tl.zeros((ROWS, COLUMNS), tl.float32)
    distances = tl.where(empty, 0.0, 1.0)[:, None] + column_squares[None, :] - 2 * tl.div_rn(products, lengths)
    distances = tl.where(distances < 0, 0.0, distances)
    place = column.to(tl.int64)[None, :] * count + row[:, None]
    tl.store(out + place, distances, mask=(row < count)[:, None] & (column < clusters)[None, :])


@triton.jit
def update(
    rows, centroids, labels, clusters, counts, draws, before, after, stride, channels,
    CLUSTERS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """New centroids of one run in CHANNELS channels, and whether any bit of them changed."""
    part, parts, run = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    lane = tl.arange(0, PARTS)
    moving = tl.max(tl.load(before + run * parts + lane, mask=lane < parts, other=0), axis=0)
    moved = 0
    if moving > 0:
        total, k = tl.load(counts + run), tl.load(clusters + run)
        channel = part * CHANNELS + tl.arange(0, CHANNELS)
        number = tl.arange(0, CLUSTERS)
        sums = tl.zeros((CLUSTERS, CHANNELS), tl.float32)
        sizes = tl.zeros((CLUSTERS,), tl.float32)
        for start in range(0, total, ROWS):
            row = start + tl.arange(0, ROWS)
            label = tl.load(labels + run.to(tl.int64) * stride + row, mask=row < total, other=255).to(tl.int32)
            member = (number[:, None] == label[None, :]).to(tl.float32)
            place = row[:, None] * channels + channel[None, :]
            x = tl.load(rows + place, mask=(row < total)[:, None] & (channel < channels)[None, :], other=0.0)
            sums = tl.dot(member, x, sums, input_precision="ieee")
            sizes += tl.sum(member, axis=1)
        divisor = tl.maximum(sizes, 1.0)
        means = sums * tl.div_rn(tl.full((CLUSTERS,), 1.0, tl.float32), divisor)[:, None]
        means = _split(means, sizes, draws, total, k, channel, CLUSTERS, DRAWS)
        place = (run * CLUSTERS + number)[:, None] * channels + channel[None, :]
        inside = (number < k)[:, None] & (channel < channels)[None, :]
        old = tl.load(centroids + place, mask=inside, other=0.0)
        tl.debug_barrier()  # another thread may store what one has loaded
        tl.store(centroids + place, means, mask=inside)
        differs = (inside & (means != old)).to(tl.int32)
        moved = tl.max(tl.max(differs, axis=1), axis=0)
    tl.store(after + run * parts + part, moved)


@triton.jit
def _split(means, sizes, draws, total, k, channel, CLUSTERS: tl.constexpr, DRAWS: tl.constexpr):
    """Empty clusters become perturbed copies of large ones, by FAISS's rule and its random numbers."""
    number = tl.arange(0, CLUSTERS)
    sign = tl.where(channel % 2 == 0, 0.0009765625, -0.0009765625)
    spare = (total - k).to(tl.float32)
    drawn = 0
    for empty in range(k):
        if tl.sum(tl.where(number == empty, sizes, 0.0), axis=0) == 0:
            donor = 0
            size = tl.sum(tl.where(number == donor, sizes, 0.0), axis=0)
            while tl.load(draws + drawn % DRAWS) >= tl.div_rn(size - 1.0, spare):
                drawn += 1
                donor = (donor + 1) % k
                size = tl.sum(tl.where(number == donor, sizes, 0.0), axis=0)
            drawn += 1
            source = tl.sum(tl.where((number == donor)[:, None], means, 0.0), axis=0)
            means = tl.where((number == empty)[:, None], (source * (1 + sign))[None, :], means)
            means = tl.where((number == donor)[:, None], (source * (1 - sign))[None, :], means)
            sizes = tl.where((number == empty) | (number == donor), size / 2, sizes)
    return means


@triton.jit
def choose_run(sums, centroids, chosen, objectives, restarts, blocks, size, spacing, BLOCK: tl.constexpr):
    """One set per program: the centroids of its restart with the least objective, the first one on ties."""
    wanted = tl.program_id(0)
    best, least = 0, tl.full((), float("inf"), tl.float32)
    for restart in range(restarts):
        objective = _total(sums + (wanted * restarts + restart) * blocks, blocks, BLOCK).to(tl.float32)
        best = tl.where(objective < least, restart, best)
        least = tl.minimum(objective, least)
    tl.store(objectives + wanted * spacing, least)
    source = centroids + (wanted * restarts + best).to(tl.int64) * size
    for start in range(0, size, BLOCK):
        item = start + tl.arange(0, BLOCK)
        value = tl.load(source + item, mask=item < size)
        tl.store(chosen + wanted.to(tl.int64) * size + item, value, mask=item < size)


@triton.jit
def _total(values, count, BLOCK: tl.constexpr):
    """The sum of ``count`` float32 as float64."""
    lane = tl.arange(0, BLOCK)
    partial = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        partial += tl.load(values + start + lane, mask=start + lane < count, other=0.0).to(tl.float64)
    return tl.sum(partial, axis=0)


@triton.jit
def add_up(sums, totals, blocks, BLOCK: tl.constexpr):
    """One set per program: the sum over its blocks."""
    wanted = tl.program_id(0)
    tl.store(totals + wanted, _total(sums + wanted.to(tl.int64) * blocks, blocks, BLOCK))


@triton.jit
def elbow(objectives, factor, chosen, sets, cells):
    """The first set whose mean objective exceeds ``factor`` times the previous one, else the last."""
    best = sets - 1
    share, each = tl.load(factor), tl.full((), 1.0, tl.float64) * cells
    for back in range(1, sets):
        now = sets - back
        mean, before = tl.load(objectives + now) / each, tl.load(objectives + now - 1) / each
        best = tl.where(mean > share * before, now, best)
    tl.store(chosen, best)


@triton.jit
def take_set(values, chosen, taken, size, BLOCK: tl.constexpr):
    """``taken = values[chosen]`` of ``values (sets, size)``."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + tl.load(chosen) * size + item, mask=item < size)
    tl.store(taken + item, value, mask=item < size)


@triton.jit
def mean_row(rows, count, mean, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The mean of the first ``count`` rows in BLOCK channels."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(count)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, total, ROWS):
        row = start + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * channels + channel[None, :]
        sums += tl.load(rows + place, mask=(row < total)[:, None] & (channel < channels)[None, :], other=0.0)
    tl.store(mean + channel, tl.sum(sums, axis=0) / tl.maximum(total, 1).to(tl.float32), mask=channel < channels)


@triton.jit
def gram(rows, mean, count, out, stride, channels, BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    """One tile of the dot products of the first ``count`` rows, less their mean, and its mirror image.

    ``out`` has ``stride`` numbers per row. Tiles below the diagonal have nothing to do.
    """
    total = tl.load(count)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if (tl.program_id(0) <= tl.program_id(1)) & (tl.program_id(1) * BLOCK < total):
        products = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            centre = tl.load(mean + channel, mask=channel < channels, other=0.0)
            a_inside = (i < total)[:, None] & (channel < channels)[None, :]
            b_inside = (j < total)[None, :] & (channel < channels)[:, None]
            a = tl.load(rows + i.to(tl.int64)[:, None] * channels + channel[None, :], mask=a_inside, other=0.0)
            b = tl.load(rows + j.to(tl.int64)[None, :] * channels + channel[:, None], mask=b_inside, other=0.0)
            a, b = tl.where(a_inside, a - centre[None, :], 0.0), tl.where(b_inside, b - centre[:, None], 0.0)
            products = tl.dot(a, b, products, input_precision="ieee")
        inside = (i < total)[:, None] & (j < total)[None, :]
        tl.store(out + i.to(tl.int64)[:, None] * stride + j[None, :], products, mask=inside)
        tl.store(out + j.to(tl.int64)[None, :] * stride + i[:, None], products, mask=inside)


@triton.jit
def _diagonal(gram, item, inside, stride):
    return tl.load(gram + item.to(tl.int64) * (stride + 1), mask=inside, other=0.0).to(tl.float64)


@triton.jit
def seed(
    gram, count, draws, trial_counts, seeds, closest, nearer, step, wanted, stride,
    TRIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One restart per program: the next seed of greedy k-means++.

    ``closest (restarts, stride)`` holds squared distances to the seeds so far, ``nearer`` gets those with the new one.
    """
    restart = tl.program_id(0)
    total = tl.load(count)
    k = tl.minimum(wanted, total)
    if step < k:
        trials = tl.load(trial_counts + k)
        stream = draws + restart * (1 + (k - 1) * trials)
        old, new = closest + restart.to(tl.int64) * stride, nearer + restart.to(tl.int64) * stride
        chosen = tl.minimum((tl.load(stream) * total).to(tl.int32), total - 1)
        if step > 0:
            stream += 1 + (step - 1) * trials
            chosen = _best_candidate(gram, old, stream, trials, total, stride, TRIALS, BLOCK)
        tl.store(seeds + restart * wanted + step, chosen)
        own = tl.load(gram + chosen.to(tl.int64) * (stride + 1)).to(tl.float64)
        for start in range(0, total, BLOCK):
            item = start + tl.arange(0, BLOCK)
            inside = item < total
            product = tl.load(gram + chosen.to(tl.int64) * stride + item, mask=inside, other=0.0).to(tl.float64)
            distance = tl.maximum(own + _diagonal(gram, item, inside, stride) - 2 * product, 0.0)
            if step > 0:
                distance = tl.minimum(distance, tl.load(old + item, mask=inside, other=0.0))
            tl.store(new + item, distance, mask=inside)


@triton.jit
def _best_candidate(gram, closest, stream, trials, total, stride, TRIALS: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows drawn by their squared distance to the seeds, the one that leaves the least sum of such distances."""
    trial = tl.arange(0, TRIALS)
    mass = tl.full((), 0.0, tl.float64)
    for start in range(0, total, BLOCK):
        item = start + tl.arange(0, BLOCK)
        mass += tl.sum(tl.load(closest + item, mask=item < total, other=0.0), axis=0)
    goal = tl.load(stream + trial, mask=trial < trials, other=0.0) * mass
    candidate = tl.zeros((TRIALS,), tl.int32)
    below = tl.full((), 0.0, tl.float64)
    for start in range(0, total, BLOCK):
        item = start + tl.arange(0, BLOCK)
        share = tl.load(closest + item, mask=item < total, other=0.0)
        reached = below + tl.cumsum(share, axis=0)
        passed = (reached[None, :] < goal[:, None]) & (item < total)[None, :]
        candidate += tl.sum(passed.to(tl.int32), axis=1)
        below += tl.sum(share, axis=0)
    candidate = tl.minimum(candidate, total - 1)
    own = tl.load(gram + candidate.to(tl.int64) * (stride + 1)).to(tl.float64)
    left = tl.zeros((TRIALS,), tl.float64)
    for start in range(0, total, BLOCK):
        item = start + tl.arange(0, BLOCK)
        inside = item < total
        place = candidate.to(tl.int64)[:, None] * stride + item[None, :]
        product = tl.load(gram + place, mask=inside[None, :], other=0.0).to(tl.float64)
        distance = own[:, None] + _diagonal(gram, item, inside, stride)[None, :] - 2 * product
        share = tl.load(closest + item, mask=inside, other=0.0)
        distance = tl.minimum(tl.maximum(distance, 0.0), share[None, :])
        left += tl.sum(tl.where(inside[None, :], distance, 0.0), axis=1)
    best = tl.argmin(tl.where(trial < trials, left, float("inf")), axis=0)
    return tl.sum(tl.where(trial == best, candidate, 0), axis=0)


@triton.jit
def lloyd(
    gram, count, seeds, members, labels, nearest, cross, norms, inertia, last, wanted, stride, width, rounds, tolerance,
    CLUSTERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One restart per program: Lloyd's rounds from its seeds, on the Gram matrix of centred rows.

    ``members``, ``labels``, ``norms`` hold two rounds, by parity: what a round writes, it does not read. ``members (2,
    stride)`` says which centroid a row is averaged in, ``cross (wanted, stride)`` are the products of centroids and
    rows, ``norms (2, wanted)`` the centroids' squared lengths. ``last`` becomes the parity of the last labels.

    Products take ``ROWS × COLUMNS`` of the matrix at a time, passes over rows alone BLOCK.
    """
    restart = tl.program_id(0)
    total = tl.load(count)
    k = tl.minimum(wanted, total)
    seeds += restart * wanted
    members += restart.to(tl.int64) * 2 * stride
    labels += restart.to(tl.int64) * 2 * stride
    nearest += restart.to(tl.int64) * stride
    cross += restart.to(tl.int64) * wanted * stride
    norms += restart * 2 * wanted
    limit = _variance(gram, total, stride, BLOCK) / width * tolerance
    step, running = 0, (total > 0).to(tl.int32)
    error = tl.full((), 0.0, tl.float64)
    while running > 0:
        now, other = step % 2, (step + 1) % 2
        if step > 0:
            _fill_empty(labels + other * stride, nearest, members + now * stride, total, k, CLUSTERS, BLOCK)
            tl.debug_barrier()
        shift = tl.full((), 0.0, tl.float64)
        for first in range(0, k, CLUSTERS):
            shift += _products(gram, seeds, members, cross, norms, step, first, k, wanted, total, stride,
                               CLUSTERS, ROWS, COLUMNS, BLOCK)  # fmt: skip
        tl.debug_barrier()
        moved, error = _assign_rows(gram, cross, norms + now * wanted, members + other * stride, labels, nearest,
                                    step, k, total, stride, BLOCK)  # fmt: skip
        tl.debug_barrier()
        done = (moved == 0) | ((step > 0) & (shift <= limit)) | (step >= rounds)
        running = tl.where(done, 0, 1)
        step += 1
    tl.store(inertia + restart, error)
    tl.store(last + restart, (step + 1) % 2)


@triton.jit
def _variance(gram, total, stride, BLOCK: tl.constexpr):
    """Mean squared length of the centred rows."""
    trace = tl.full((), 0.0, tl.float64)
    for start in range(0, total, BLOCK):
        item = start + tl.arange(0, BLOCK)
        trace += tl.sum(_diagonal(gram, item, item < total, stride), axis=0)
    return trace / tl.maximum(total, 1).to(tl.float64)


@triton.jit
def _fill_empty(labels, nearest, members, total, k, CLUSTERS: tl.constexpr, BLOCK: tl.constexpr):
    """Each empty cluster takes the farthest row that none took before."""
    taken, taken_item = tl.full((), float("inf"), tl.float64), tl.full((), -1, tl.int32)
    for first in range(0, k, CLUSTERS):
        number = first + tl.arange(0, CLUSTERS)
        sizes = tl.zeros((CLUSTERS,), tl.int32)
        for start in range(0, total, BLOCK):
            item = start + tl.arange(0, BLOCK)
            label = tl.load(labels + item, mask=item < total, other=-1)
            sizes += tl.sum((number[:, None] == label[None, :]).to(tl.int32), axis=1)
        empty = ((sizes == 0) & (number < k)).to(tl.int32)
        for _ in range(tl.sum(empty, axis=0)):
            cluster = tl.min(tl.where(empty > 0, number, 0x7FFFFFFF), axis=0)
            empty = tl.where(number == cluster, 0, empty)
            taken, taken_item = _farthest(nearest, taken, taken_item, total, BLOCK)
            tl.store(members + taken_item, cluster)


@triton.jit
def _farthest(nearest, taken, taken_item, total, BLOCK: tl.constexpr):
    """What follows ``taken_item`` in the order of falling distance and rising index."""
    best, chosen = tl.full((), -1.0, tl.float64), tl.full((), 0, tl.int32)
    for start in range(0, total, BLOCK):
        item = start + tl.arange(0, BLOCK)
        value = tl.load(nearest + item, mask=item < total, other=-1.0)
        later = (value < taken) | ((value == taken) & (item > taken_item))
        value = tl.where((item < total) & later, value, -1.0)
        most = tl.max(value, axis=0)
        where = tl.min(tl.where(value == most, item, 0x7FFFFFFF), axis=0)
        chosen = tl.where(most > best, where, chosen)
        best = tl.maximum(most, best)
    return best, chosen


@triton.jit
def _products(
    gram, seeds, members, cross, norms, step, first, k, wanted, total, stride,
    CLUSTERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Products of some centroids with all rows; returns how far, squared, those centroids moved."""
    number = first + tl.arange(0, CLUSTERS)
    seed_item = tl.load(seeds + number, mask=number < k, other=-1)
    now, before = members + (step % 2) * stride, members + ((step + 1) % 2) * stride
    size = _sizes(number, seed_item, now, step, total, CLUSTERS, BLOCK)
    old_size = _sizes(number, seed_item, before, step - 1, total, CLUSTERS, BLOCK)
    own, mixed = tl.zeros((CLUSTERS,), tl.float64), tl.zeros((CLUSTERS,), tl.float64)
    for start in range(0, total, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        sums = tl.zeros((CLUSTERS, COLUMNS), tl.float64)
        for first_row in range(0, total, ROWS):
            row = first_row + tl.arange(0, ROWS)
            weight = _averages(number, seed_item, now, row, step, total).to(tl.float32)
            inside = (row < total)[:, None] & (column < total)[None, :]
            tile = tl.load(gram + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
            sums += tl.dot(weight, tile, input_precision="ieee").to(tl.float64)
        products = sums / size[:, None]
        place = number.to(tl.int64)[:, None] * stride + column[None, :]
        tl.store(cross + place, products, mask=(number < k)[:, None] & (column < total)[None, :])
        own += tl.sum(tl.where(_averages(number, seed_item, now, column, step, total), products, 0.0), axis=1)
        here = _averages(number, seed_item, before, column, step - 1, total)
        mixed += tl.sum(tl.where(here, products, 0.0), axis=1)
    own, mixed = own / size, mixed / old_size
    used = number < k
    tl.store(norms + (step % 2) * wanted + number, own, mask=used)
    old = tl.load(norms + ((step + 1) % 2) * wanted + number, mask=used & (step > 0), other=0.0)
    return tl.sum(tl.where(used, own - 2 * mixed + old, 0.0), axis=0)


@triton.jit
def _averages(number, seed_item, members, item, step, total):
    """Whether each centroid of a round is averaged over each row: at first over its seed, before that over none."""
    member = tl.load(members + item, mask=(item < total) & (step > 0), other=-1)
    return tl.where(step == 0, seed_item[:, None] == item[None, :], member[None, :] == number[:, None])


@triton.jit
def _sizes(number, seed_item, members, step, total, CLUSTERS: tl.constexpr, BLOCK: tl.constexpr):
    """How many rows each centroid is averaged over, at least 1."""
    size = tl.zeros((CLUSTERS,), tl.int32)
    for start in range(0, total, BLOCK):
        item = start + tl.arange(0, BLOCK)
        size += tl.sum(_averages(number, seed_item, members, item, step, total).to(tl.int32), axis=1)
    return tl.maximum(size, 1).to(tl.float64)


@triton.jit
def _assign_rows(gram, cross, norms, members, labels, nearest, step, k, total, stride, BLOCK: tl.constexpr):
    """Nearest centroid of every row, the first one on ties; returns how many rows changed it and the inertia."""
    moved, inertia = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    now, before = labels + (step % 2) * stride, labels + ((step + 1) % 2) * stride
    for start in range(0, total, BLOCK):
        item = start + tl.arange(0, BLOCK)
        inside = item < total
        length = _diagonal(gram, item, inside, stride)
        least, label = tl.full((BLOCK,), float("inf"), tl.float64), tl.zeros((BLOCK,), tl.int32)
        of_cluster = cross
        for cluster in range(k):
            product = tl.load(of_cluster + item, mask=inside, other=0.0)
            of_cluster += stride
            distance = tl.maximum(length - 2 * product + tl.load(norms + cluster), 0.0)
            label = tl.where(distance < least, cluster, label)
            least = tl.minimum(distance, least)
        tl.store(now + item, label, mask=inside)
        tl.store(members + item, label, mask=inside)
        tl.store(nearest + item, least, mask=inside)
        previous = tl.load(before + item, mask=inside & (step > 0), other=-1)
        moved += tl.sum((inside & (previous != label)).to(tl.int32), axis=0)
        inertia += tl.sum(tl.where(inside, least, 0.0), axis=0)
    return moved, inertia


@triton.jit
def choose_labels(labels, inertia, last, count, clusters, restarts, stride, BETTER: tl.constexpr, BLOCK: tl.constexpr):
    """The labels of the restart with the least inertia, and -1 behind ``count``.

    A later restart has to be better by a share of BETTER: rounding is not.
    """
    best, least = 0, tl.load(inertia)
    for restart in range(1, restarts):
        value = tl.load(inertia + restart)
        better = value < least * BETTER
        best = tl.where(better, restart, best)
        least = tl.where(better, value, least)
    source = labels + (best * 2 + tl.load(last + best)).to(tl.int64) * stride
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(source + item, mask=item < tl.load(count), other=-1)
    tl.store(clusters + item, label, mask=item < stride)
