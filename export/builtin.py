"""Built-in ViT: closed-form weights, no training and no download.

``state_dict()`` returns a plain DINO-style ViT (patch 8, 28x28 position table, pre-norm blocks, exact GELU) whose
weights are written down instead of learned.  It runs through the same network code as a real checkpoint.

How to read the construction
----------------------------
*Every channel of the token has a name* (``CHANNELS``) and every weight row is a linear form over names
(``{"x": 2.0, ONE: -1.0}`` means ``2 x - 1``).  Three devices make a ViT programmable:

* **LayerNorm becomes the identity.**  Two ballast channels hold +12 and -12, so a token's variance is almost constant
  whatever the photograph; four counterweight channels keep the mean of every token at exactly zero.  With the
  LayerNorm weight set to the nominal RMS, a normalised channel equals the raw channel to within a few per cent
  (in block 3, which only reads out, the step channels raise the RMS by 7 to 90 per cent).
* **GELU pairs.**  ``gelu(u) - gelu(-u) = u`` (copy), ``gelu(gu) + gelu(-gu)`` is ``g|u|`` for large g (rectified
  gradients, colour distances) and about ``0.8 (gu)^2`` for small g (squares).  Differences of two shifted GELUs clip
  to [0, 1].
* **Attention.**  Logits ``cos w(p_j - p_i - d)`` from the sine/cosine position channels are a Gaussian window at
  offset d; logits ``-|f_i - f_j|^2 / 2s^2`` are a bilateral (same colour, nearby) window; a constant query makes a
  global average weighted by ``exp(key)``.

=====  ======================================================  =====================================================
block  attention                                               MLP
=====  ======================================================  =====================================================
patch  colour means, 3x3 sub-position gradients of the patch
0      mean colour of the four image borders                   gradient energies e, |colour|^2, distance to borders d
1      energies pooled here (p) and in 4 directions (q);       e -> e/(e+B) (a, q), first saliency u: far from the
       border share of similar colours (bc)                    border colours, not connected to the border, central
2      soft extents of the object (weights: texture,           position inside those extents (s*), saliency logit,
       saliency); saliency of similar neighbours (us, bc2)     saturated gradients (f*)
3      CLS query reads the saliency logit in head 0            (unused: facets only)
=====  ======================================================  =====================================================

Three facets of block 3, for three uses: keys (``MATCH_FACET``) hold texture, surrounding texture, some fine gradients
and colour, and the position in the object frame, for matching different objects of a kind; values
(``COSEGMENT_FACET``) hold foreground-ness first, then a little of everything; queries (``TRACK_FACET``) hold appearance
without any position, for following the same object through a video.  The constants below come from a coarse search on
photographs; scores are flat around them, except that more ``fine`` and ``colour`` in the keys buys exact tracking and
costs matching across instances.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Form = dict[str, float]

DIM = 144
DEPTH = 4
HEADS = 6
MLP_RATIO = 2
PATCH = 8
GRID = 28
SALIENCY_HEADS: tuple[int, ...] = (0,)
MATCH_FACET: str = "key@3"
COSEGMENT_FACET: str = "value@3"
TRACK_FACET: str = "query@3"

HEAD_DIM = DIM // HEADS
HIDDEN = DIM * MLP_RATIO
ONE = "1"  # the constant term of a form
IMAGE_MEAN = np.array([0.485, 0.456, 0.406])
IMAGE_STD = np.array([0.229, 0.224, 0.225])
CELL = 2.0 / 55.0  # one cell of a 55x55 grid; positions run from -1 to 1

BALLAST = 12.0
FREQUENCIES = (math.pi / 2, 3 * math.pi / 2, 4 * math.pi)  # of the position code, on [-1, 1]
CODE = 0.5  # amplitude of the position code
NOT_CLS: Form = {"cls": -40.0}  # key term that hides CLS from a head whose query is 1

# --- local appearance
ORIENTATIONS = 4
SUBPOSITIONS = (1.6, 3.5, 5.4)  # pixels, both axes, inside the 8x8 patch
DERIVATIVE_SIGMA = 1.0  # pixels
ENERGY_GAIN = 30.0  # |gradient| below 1/30 of the grey range is treated as noise (quadratic)
ENERGY_UNIT = 2.0  # e channels hold 2 x mean |gradient|
ENERGY_HALF = 0.03  # B of e / (e + B)
HERE_SIGMA, AROUND_SIGMA, AROUND_OFFSET = 1.5 * CELL, 3.0 * CELL, 8.0 * CELL

# --- saliency
BORDER_SHARPNESS = 12.0  # the border average decays over 1/12 of the half image
BORDER_WIDTH = 0.2
SIMILAR_COLOUR, SIMILAR_RANGE = 0.05, 0.5
SMOOTH_COLOUR, SMOOTH_TEXTURE, SMOOTH_RANGE = 0.1, 0.5, 0.2
CONTRAST_SCALE = 0.3
CONNECTED, CONNECTED_LATE, CENTRE, TEXTURE = 3.0, 1.0, 0.5, 0.3  # weights in u
LOGIT_RANGE, LOGIT_LOW, LOGIT_SPAN = 6.0, -1.2, 1.5  # u in [low, low + span] -> logit in [0, 6]

# --- object frame
EXTENT_TEXTURE, EXTENT_TILT, EXTENT_CENTRE, EXTENT_SALIENCY = 2.0, 6.0, 1.0, 1.0
STEPS, STEP_SPACING, STEP_WIDTH = 7, 0.25, 0.3
FINE_HALF = 0.005  # gradient (about one grey level per pixel) at which a fine channel saturates

# --- weights of the channel groups in the facets
KEY = {"here": 1.0, "around": 0.4, "offset": 0.15, "fine": 0.4, "colour": 0.2, "frame": 0.35, "salient": 0.6}
QUERY = {"here": 1.0, "around": 0.8, "offset": 0.0, "fine": 0.15, "colour": 1.5}  # appearance only
VALUE = {"salient": 1.0, "texture": 0.3, "frame": 0.2, "colour": 0.2}

SIDES: tuple[tuple[str, Form], ...] = (("t", {"y": -1.0}), ("b", {"y": 1.0}), ("l", {"x": -1.0}), ("r", {"x": 1.0}))
COLOURS = ("L", "rg", "by")
BINS = range(ORIENTATIONS)
GRADIENTS = tuple(f"{s}{axis}" for s in range(9) for axis in "xy")
FINE = tuple(f"{s}{axis}" for s in (0, 2, 4, 6, 8) for axis in "xy")
FRAME = tuple(f"s{axis}{j}" for axis in "yx" for j in range(STEPS))
COUNTER = tuple(f"counter{i}" for i in range(4))

CHANNELS: tuple[str, ...] = (
    "ballast+", "ballast-", *COUNTER, "cls",  # LayerNorm control, 1 for CLS and 0 for patches
    *(f"{f}{axis}{i}" for axis in "yx" for i in range(3) for f in ("cos", "sin")),  # position code
    "y", "x", "r2", "border",  # position, squared radius, 1 near the image border
    *COLOURS, *(f"g{g}" for g in GRADIENTS),  # patch: lightness, red-green, blue-yellow, gradients
    *(f"{side}{c}" for side, _ in SIDES for c in COLOURS),  # block 0: border colours
    "|colour|2", "d", *(f"e{k}" for k in BINS),
    *(f"p{k}" for k in BINS), *(f"q{side}{k}" for side, _ in SIDES for k in BINS), "bc",  # block 1
    *(f"a{k}" for k in BINS), "|a|2", "u",
    "lo_y", "hi_y", "lo_x", "hi_x", "us", "bc2",  # block 2
    *FRAME, *(f"f{g}" for g in FINE), "logit",
)  # fmt: skip
INDEX = {name: i for i, name in enumerate(CHANNELS)}
RMS = math.sqrt((2 * BALLAST**2 + 6 * CODE**2 + 1.0) / DIM)  # nominal RMS of a token


def state_dict() -> dict[str, NDArray[np.float32]]:
    """Weights of the built-in model under the names and shapes of the official DINO checkpoints, float32."""
    weights = _embedding()
    for i, (heads, mlp) in enumerate((_block0(), _block1(), _block2(), _block3())):
        weights |= {f"blocks.{i}.{name}": value for name, value in _block(heads, mlp).items()}
    weights |= {"norm.weight": np.ones(DIM), "norm.bias": np.zeros(DIM)}
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in weights.items()}


# ------------------------------------------------------------------------------------------------ forms, heads, MLPs
def _scaled(form: Form, factor: float) -> Form:
    return {name: factor * value for name, value in form.items()}


def _plus(*forms: Form) -> Form:
    total: Form = {}
    for form in forms:
        for name, value in form.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _row(form: Form) -> Array:
    """Weights over the channels, then the constant: (DIM + 1,)."""
    row = np.zeros(DIM + 1)
    for name, value in form.items():
        row[DIM if name == ONE else INDEX[name]] += value
    return row


def _balance(rows: Array) -> Array:
    """Fill the counterweight channels of what is written to the tokens, (..., DIM), so that it sums to zero."""
    counters = [INDEX[name] for name in COUNTER]
    rows[..., counters] = 0.0
    rows[..., counters] = -rows.sum(axis=-1, keepdims=True) / len(counters)
    return rows


class _Head:
    """One attention head: logit = sum of query form x key form; each value form is added to a channel (or to none)."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Form, Form]] = []
        self.values: list[tuple[Form, str | None]] = []

    def match(self, query: Form, key: Form) -> _Head:
        self.pairs.append((query, key))
        return self

    def bias(self, key: Form) -> _Head:
        """A key term that all queries see alike; CLS is hidden."""
        return self.match({ONE: 1.0}, _plus(key, NOT_CLS))

    def window(self, sigma: float, dy: float = 0.0, dx: float = 0.0) -> _Head:
        """Gaussian window of width ``sigma`` centred ``(dy, dx)`` away from the query."""
        for axis, shift in (("y", dy), ("x", dx)):
            for i, (freq, amplitude) in enumerate(zip(FREQUENCIES, _amplitudes(sigma), strict=True)):
                cos, sin, c, s = f"cos{axis}{i}", f"sin{axis}{i}", math.cos(freq * shift), math.sin(freq * shift)
                self.match({cos: amplitude * c, sin: -amplitude * s}, {cos: 1.0})
                self.match({sin: amplitude * c, cos: amplitude * s}, {sin: 1.0})
        return self

    def similar(self, names: list[str], square: str, sigma: float) -> Form:
        """Logit -|f_i - f_j|^2 / 2 sigma^2 up to a term of i alone; returns the key term (of j alone) to bias with."""
        for name in names:
            self.match({name: sigma**-2}, {name: 1.0})
        return {square: -0.5 * sigma**-2}

    def value(self, form: Form, channel: str | None) -> _Head:
        self.values.append((form, channel))
        return self


def _amplitudes(sigma: float) -> tuple[float, float, float]:
    """Amplitudes A with sum A w^2 = 1/sigma^2: low frequencies rule out aliases, the highest one sharpens."""
    low, mid, high = (freq**2 for freq in FREQUENCIES)
    a = min(5.0, sigma**-2 / low)
    b = min(6.0, (sigma**-2 - a * low) / mid)
    c = (sigma**-2 - a * low - b * mid) / high
    return a / CODE**2, b / CODE**2, c / CODE**2


class _Mlp:
    """Hidden units of one block, as (input form, outputs) pairs."""

    def __init__(self) -> None:
        self.units: list[tuple[Form, Form]] = []

    def relu(self, form: Form, out: Form, gain: float) -> None:
        self.units.append((_scaled(form, gain), _scaled(out, 1.0 / gain)))

    def copy(self, form: Form, out: Form) -> None:
        self.relu(form, out, 1.0)
        self.relu(_scaled(form, -1.0), _scaled(out, -1.0), 1.0)

    def magnitude(self, form: Form, out: Form, gain: float) -> None:
        self.relu(form, out, gain)
        self.relu(_scaled(form, -1.0), out, gain)

    def square(self, form: Form, out: Form) -> None:
        """gelu(u) + gelu(-u) = u erf(u / sqrt 2), which is sqrt(2/pi) u^2 within 4 % for |u| < 0.5."""
        self.magnitude(form, _scaled(out, math.sqrt(math.pi / 2)), 1.0)

    def clip(self, form: Form, out: Form, gain: float = 8.0) -> None:
        """Clip to [0, 1] with rounded corners."""
        self.relu(form, out, gain)
        self.relu(_plus(form, {ONE: -1.0}), _scaled(out, -1.0), gain)

    def saturate(self, name: str, out: Form, out_squared: Form) -> None:
        """Write s = e/(e+B) and s^2 of an energy channel, piecewise linear with six knots."""
        knots = np.array([0.0, 0.5, 1.2, 2.5, 6.0, 14.0]) * ENERGY_HALF
        curve = knots / (knots + ENERGY_HALF)
        bends, bends_squared = (_bends(knots, values) for values in (curve, curve**2))
        for knot, bend, bend_squared in zip(knots, bends, bends_squared, strict=True):
            outputs = _plus(_scaled(out, bend), _scaled(out_squared, bend_squared))
            self.relu({name: 1.0 / ENERGY_UNIT, ONE: -knot}, outputs, 6.0 / ENERGY_HALF)


def _bends(knots: Array, values: Array) -> list[float]:
    """Change of slope at each knot of a curve that starts and ends flat."""
    slopes = np.concatenate([[0.0], np.diff(values) / np.diff(knots), [0.0]])
    return [float(bend) for bend in np.diff(slopes)]


# ------------------------------------------------------------------------------------------------------- embedding
def _embedding() -> dict[str, Array]:
    ballast = _row({"ballast+": BALLAST, "ballast-": -BALLAST})[:DIM]
    kernels = _balance(_patch_kernels())  # (3, 8, 8, DIM), applied to RGB in [0, 1]
    bias = _balance(ballast + _row({"L": -0.5})[:DIM]) + np.einsum("chwd,c->d", kernels, IMAGE_MEAN)
    table = np.concatenate([np.zeros((1, DIM)), _balance(_position_table()).reshape(GRID * GRID, DIM)])
    return {
        "cls_token": _balance(ballast + _row({"cls": 1.0})[:DIM])[None, None],
        "pos_embed": table[None],
        "patch_embed.proj.weight": kernels.transpose(3, 0, 1, 2) * IMAGE_STD[None, :, None, None],
        "patch_embed.proj.bias": bias,
    }


def _patch_kernels() -> Array:
    kernels = np.zeros((3, PATCH, PATCH, DIM))
    opponents = {"L": (1 / 3, 1 / 3, 1 / 3), "rg": (1.5, -1.5, 0.0), "by": (0.5, 0.5, -1.0)}
    for name, mix in opponents.items():
        kernels[..., INDEX[name]] = np.array(mix)[:, None, None] / PATCH**2
    luma = np.array([0.299, 0.587, 0.114])[:, None, None]
    for i in range(9):
        for axis in "xy":
            kernels[..., INDEX[f"g{i}{axis}"]] = luma * _derivative(SUBPOSITIONS[i // 3], SUBPOSITIONS[i % 3], axis)
    return kernels


def _derivative(centre_y: float, centre_x: float, axis: str) -> Array:
    """Gaussian derivative at a sub-position of the patch, mean removed, scaled to the slope of a ramp: (8, 8)."""
    y, x = np.mgrid[:PATCH, :PATCH].astype(np.float64)
    y, x = y - centre_y, x - centre_x
    kernel = (x if axis == "x" else y) * np.exp(-(y**2 + x**2) / (2 * DERIVATIVE_SIGMA**2))
    kernel -= kernel.mean()
    return np.asarray(1.4 * kernel / (np.abs(kernel * x).sum() + np.abs(kernel * y).sum()))


def _position_table() -> Array:
    """Patch rows of the position table: (28, 28, DIM)."""
    line = (np.arange(GRID) + 0.5) / (GRID / 2) - 1
    y, x = np.meshgrid(line, line, indexing="ij")
    edge = np.maximum(np.abs(y), np.abs(x)) - (1 - BORDER_WIDTH)
    planes = {"y": y, "x": x, "r2": np.minimum(y**2 + x**2, 1.5), "border": 1 / (1 + np.exp(-edge / 0.03))}
    for axis, position in (("y", y), ("x", x)):
        for i, freq in enumerate(FREQUENCIES):
            planes |= {f"cos{axis}{i}": CODE * np.cos(freq * position), f"sin{axis}{i}": CODE * np.sin(freq * position)}
    table = np.zeros((GRID, GRID, DIM))
    for name, plane in planes.items():
        table[..., INDEX[name]] = plane
    return table


# ---------------------------------------------------------------------------------------------------------- blocks
_Block = tuple[list[_Head], _Mlp]


def _block0() -> _Block:
    """Border colours; gradient energies and colour distances."""
    heads = []
    for side, outwards in SIDES:
        head = _Head().bias(_scaled(outwards, BORDER_SHARPNESS))
        for colour in COLOURS:
            head.value({colour: 1.0}, f"{side}{colour}")
        heads.append(head)
    mlp = _Mlp()
    _gradient_energies(mlp)
    for colour in COLOURS:
        mlp.square({colour: 1.0}, {"|colour|2": 1.0})
        for side, _ in SIDES:
            mlp.magnitude({colour: 1.0, f"{side}{colour}": -1.0}, {"d": 0.25}, 30.0)
    return heads, mlp


def _gradient_energies(mlp: _Mlp) -> None:
    """e_k = mean over the nine sub-positions of |gradient along orientation k|: a small unsigned HOG cell."""
    for k in BINS:
        cos, sin = math.cos(math.pi * k / ORIENTATIONS), math.sin(math.pi * k / ORIENTATIONS)
        for i in range(9):
            mlp.magnitude({f"g{i}x": cos, f"g{i}y": sin}, {f"e{k}": ENERGY_UNIT / 9}, ENERGY_GAIN)


def _block1() -> _Block:
    """Energies pooled here and eight cells away in four directions; how much of a colour lies at the border."""
    heads = []
    for side, outwards in SIDES:
        dy, dx = (AROUND_OFFSET * outwards.get(axis, 0.0) for axis in "yx")
        heads.append(_pooling(_Head().window(AROUND_SIGMA, dy, dx), f"q{side}"))
    heads.append(_pooling(_Head().window(HERE_SIGMA), "p"))
    connected = _Head().window(SIMILAR_RANGE)
    connected.bias(connected.similar([*COLOURS], "|colour|2", SIMILAR_COLOUR))
    heads.append(connected.value({"border": 0.5, "r2": 0.6}, "bc"))
    return heads, _block1_mlp()


def _pooling(head: _Head, channel: str) -> _Head:
    head.bias({})
    for k in BINS:
        head.value({f"e{k}": 1.0}, f"{channel}{k}")
    return head


def _block1_mlp() -> _Mlp:
    mlp = _Mlp()
    for k in BINS:
        mlp.saturate(f"p{k}", {f"a{k}": 1.0, "u": TEXTURE}, {"|a|2": 1.0})
        for side, _ in SIDES:  # added onto the raw energy, which is several times smaller
            mlp.saturate(f"q{side}{k}", {f"q{side}{k}": 1.0}, {})
    # Contrast to the border colours: two clips make a concave curve that saturates at 1.1.
    mlp.clip({"d": 0.6 / CONTRAST_SCALE}, {"u": 0.6})
    mlp.clip({"d": 0.3 / CONTRAST_SCALE}, {"u": 0.5})
    mlp.copy({"bc": -CONNECTED, "r2": -CENTRE}, {"u": 1.0})
    return mlp


def _block2() -> _Block:
    """Extents of the object and saliency averaged over similar neighbours."""
    heads = []
    weight: Form = {f"a{k}": EXTENT_TEXTURE for k in BINS} | {"u": EXTENT_SALIENCY, "r2": -EXTENT_CENTRE}
    for axis in "yx":
        for end, tilt in (("lo", -EXTENT_TILT), ("hi", EXTENT_TILT)):
            # exp(tilt * y) on top of the object weight moves the average to the object's far end.
            heads.append(_Head().bias(_plus(weight, {axis: tilt})).value({axis: 1.0}, f"{end}_{axis}"))
    smooth = _Head().window(SMOOTH_RANGE)
    colour = smooth.similar([*COLOURS], "|colour|2", SMOOTH_COLOUR)
    texture = smooth.similar([f"a{k}" for k in BINS], "|a|2", SMOOTH_TEXTURE)
    smooth.bias(_plus(colour, texture))
    heads.append(smooth.value({"u": 1.0}, "us").value({"border": 0.5, "r2": 0.6}, "bc2"))
    return heads, _block2_mlp()


def _block2_mlp() -> _Mlp:
    """Object frame, saliency logit, fine gradients.

    ``s_j`` steps from 0 to 2 where y passes ``lo + z_j (hi - lo)``.  That test is linear in y, lo and hi, so position
    is normalised by the object's size without a division; a step code's product falls linearly with distance.
    """
    mlp = _Mlp()
    for axis in "yx":
        for j in range(STEPS):
            z = 0.5 + (j - (STEPS - 1) / 2) * STEP_SPACING
            passed = {axis: 1.0, f"lo_{axis}": z - 1.0, f"hi_{axis}": -z}
            mlp.clip(_plus(_scaled(passed, 0.5 / STEP_WIDTH), {ONE: 0.5}), {f"s{axis}{j}": 2.0})
    above = {"us": 1.0, "bc2": -CONNECTED_LATE, ONE: -LOGIT_LOW}
    mlp.clip(_scaled(above, 1.0 / LOGIT_SPAN), {"logit": LOGIT_RANGE})
    for g in FINE:
        mlp.clip({f"g{g}": 0.5 / FINE_HALF, ONE: 0.5}, {f"f{g}": 2.0})
    return mlp


def _block3() -> _Block:
    """Facets only: the CLS row of head 0 reads the logit (query 20 x key logit / 20), nothing is written back."""
    heads = [_Head() for _ in range(HEADS)]
    heads[0].match({ONE: 20.0}, {"logit": 0.05, "cls": -2.0})
    for i, form in enumerate(_key_forms()):
        heads[i % HEADS].match({}, form)
    for i, form in enumerate(_value_forms()):
        heads[i % HEADS].value(form, None)
    for i, form in enumerate(_query_forms()):  # heads 1 to 5: a query in head 0 would change the saliency
        head = heads[1 + i % (HEADS - 1)]
        d = i // (HEADS - 1)
        head.pairs[d] = (form, head.pairs[d][1])
    return heads, _Mlp()


def _key_forms() -> list[Form]:
    forms = _appearance_forms(KEY) + _steps(FRAME, KEY["frame"])
    return [*forms, {"logit": KEY["salient"] / LOGIT_RANGE}]


def _query_forms() -> list[Form]:
    return _appearance_forms(QUERY)


def _appearance_forms(weight: dict[str, float]) -> list[Form]:
    """Texture here, texture around, saturated gradients, colour."""
    here, around, offset = weight["here"], weight["around"], weight["offset"]
    forms: list[Form] = [{f"a{k}": here, ONE: offset} for k in BINS]
    forms += [{f"q{side}{k}": around, ONE: around * offset} for side, _ in SIDES for k in BINS]
    forms += _steps(tuple(f"f{g}" for g in FINE), weight["fine"])
    return [*forms, *({c: weight["colour"]} for c in COLOURS)]


def _value_forms() -> list[Form]:
    # (2 l - 1, 1): k-means on normalised rows sees the logit as an angle of +-45 degrees.
    forms: list[Form] = [{"logit": 2 * VALUE["salient"] / LOGIT_RANGE, ONE: -VALUE["salient"]}, {ONE: 1.0}]
    forms += [{f"a{k}": VALUE["texture"], ONE: -0.3 * VALUE["texture"]} for k in BINS]
    return forms + _steps(FRAME, VALUE["frame"]) + [{c: VALUE["colour"]} for c in COLOURS]


def _steps(names: tuple[str, ...], weight: float) -> list[Form]:
    """Step channels (0 to 2) centred to -1..1; a saturated group has norm ``weight`` (the frame: per axis)."""
    share = weight / math.sqrt(STEPS if names == FRAME else len(names))
    return [{name: share, ONE: -share} for name in names]


# -------------------------------------------------------------------------------------------------------- assembly
def _block(heads: list[_Head], mlp: _Mlp) -> dict[str, Array]:
    norms = {f"norm{i}.weight": np.full(DIM, RMS) for i in (1, 2)} | {f"norm{i}.bias": np.zeros(DIM) for i in (1, 2)}
    return norms | _attention(heads) | _mlp(mlp)


def _attention(heads: list[_Head]) -> dict[str, Array]:
    qkv = np.zeros((3, HEADS, HEAD_DIM, DIM + 1))
    proj = np.zeros((HEADS, HEAD_DIM, DIM))
    for h, head in enumerate(heads):
        for d, (query, key) in enumerate(head.pairs):
            qkv[0, h, d] = _row(query) * math.sqrt(HEAD_DIM)  # undoes the logit scale
            qkv[1, h, d] = _row(key)
        for d, (value, channel) in enumerate(head.values):
            qkv[2, h, d] = _row(value)
            if channel is not None:
                proj[h, d, INDEX[channel]] = 1.0
    rows = qkv.reshape(3 * DIM, DIM + 1)
    return {
        "attn.qkv.weight": rows[:, :DIM],
        "attn.qkv.bias": rows[:, DIM],
        "attn.proj.weight": _balance(proj.reshape(DIM, DIM)).T,
        "attn.proj.bias": np.zeros(DIM),
    }


def _mlp(mlp: _Mlp) -> dict[str, Array]:
    fc1, fc2 = np.zeros((HIDDEN, DIM + 1)), np.zeros((HIDDEN, DIM))
    for i, (form, out) in enumerate(mlp.units):
        fc1[i], fc2[i] = _row(form), _row(out)[:DIM]
    return {
        "mlp.fc1.weight": fc1[:, :DIM],
        "mlp.fc1.bias": fc1[:, DIM],
        "mlp.fc2.weight": _balance(fc2).T,
        "mlp.fc2.bias": np.zeros(DIM),
    }
