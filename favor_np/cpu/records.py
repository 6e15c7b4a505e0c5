"""The records of the kernels: what each of them takes, by name.

The rows of all problems lie one behind the other in `q`, `k`, `v` and `out`: where those of a job
begin says the table `jobs`, whose columns are named in ``favor_np.jobs``.  Up to `control` the
fields are those of one call; behind it they are of all calls of these shapes.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias, get_type_hints

import numpy as np
import numpy.typing as npt

from favor_np.cpu.record import (
    Array,
    Bytes2,
    Doubles1,
    Doubles2,
    Doubles3,
    Field,
    Floats1,
    Floats2,
    Floats3,
    Ints1,
    Ints2,
    Log2Bias,
    Mask,
    Rows,
    Whole1,
    Whole2,
)

#: Words of `control`, by which threads share the jobs of a call: the next job, the threads that
#: came, the jobs finished, those in trouble, what was found not to be finite, and the jobs in all.
NEXT, CAME, FINISHED, TROUBLE, OVERFLOW, COUNT = 0, 4, 8, 12, 14, 15
CONTROL = 16

#: What is done to a chunk by a job of a pipeline: its keys are folded, its queries read, or both;
#: and the job that adds up the states of a group.
FOLD, READ, WHOLE, SCAN = 0, 1, 2, 2
#: How many groups of a pipeline have their states in memory: until they are read, and until nobody
#: needs their c.
RING = 4
#: Words of a pipeline: its chunks, those of a group, its threads, the address of the function by
#: which a thread gives way to others; then for each turn, and for RING
#: before the first, the jobs of each kind that are left; then for each state, and that of the
#: beginning, the last chunk at which c had moved before this one was folded, that with this one,
#: and whether its keys fit together.
CHUNKS, GROUP, THREADS, GIVE_WAY, LEFT = range(5)
BASE, MOVED, FITS = range(3)


class Parameters(NamedTuple):
    """What a kernel needs to know about the feature map and the call."""

    kind: int
    signs: int
    filled: int
    nothing: int
    padding_exponent: int
    max_rise: int
    key_norm: float
    kernel_epsilon: float
    limit: float
    far: float
    affine: bool
    factored: bool
    causal: bool


class ExactParameters(NamedTuple):
    """The same for exact attention; the first two are what the activation expects of a map."""

    kind: int
    kernel_epsilon: float
    scale: float
    limit: float
    far: float
    hidden: int
    left: int
    right: int


_KINDS = {int: np.int64, float: np.float64, bool: np.bool_}
PARAMETERS, EXACT_PARAMETERS = (
    np.dtype([(name, _KINDS[kind]) for name, kind in get_type_hints(cls).items()], align=True)
    for cls in (Parameters, ExactParameters)
)


def constants(parameters: Parameters | ExactParameters) -> Array:
    """Return parameters as kernels take them."""
    kind = PARAMETERS if isinstance(parameters, Parameters) else EXACT_PARAMETERS
    return np.array([tuple(parameters)], kind)


Optional: TypeAlias = npt.NDArray[Any] | None
PartWeights = Annotated[Optional, Field(ndim=3, variants=("parts",))]
TileConfig = Annotated[Optional, Field("u1", variants=("pairs", "parts"))]


class Attend(NamedTuple):
    """What attention takes.

    Attributes
    ----------
    mask, log2_bias
        Which keys take part, in jobs that have a MASK_ROW; and log2 of what their weights are
        multiplied with, in those that have a BIAS_ROW.
    query, key, bias, affine
        Of each block of the map, the weights (d, width), the bias and, if it is calibrated, rows:
        the centres of queries and of keys, what is linear in the log-norm of a key and, if it has a
        quadratic part, the columns of its factor.
    q_rows, out_rows
        The first row of each run of queries that reads the state of a job, and that of its results.
    out, weights, tops
        Results and, unless these are empty, their denominators weights * 2**tops.
    c, s, z
        States, as ``kernels.state`` describes them: those of the jobs, or one for each thread.
    room
        A row of bytes for each thread: see ``cpu.tiles``.
    pipeline, features
        What threads know of the one problem that they share, and the features of the keys of its
        states: see ``kernels.pipeline``.
    errors, sizes, variances, error_bars
        Where standard errors and effective sample sizes go; the variances of the values (batch of
        v, dv); and three numbers of `call.ErrorBars` (dof, prior_dof, t_factor), and how many rows
        of values share variances.
    query_parts, key_parts
        The weights, split into parts.
    config
        The operand of LDTILECFG.
    """

    q: Rows
    k: Rows
    v: Rows
    mask: Mask
    log2_bias: Log2Bias
    out: Rows
    weights: Floats1
    tops: Whole1
    c: Whole2
    s: Floats3
    z: Floats2
    room: Bytes2
    control: Ints1
    constants: Annotated[Array, Field(PARAMETERS)]
    jobs: Ints2
    q_rows: Ints2
    out_rows: Ints2
    query: Floats3
    key: Floats3
    bias: Floats2
    affine: Floats3
    pipeline: Annotated[Optional, Field("i8", 1, ("pipeline",))] = None
    features: Annotated[Optional, Field(ndim=4, variants=("pipeline",))] = None
    errors: Annotated[Optional, Field(ndim=2, variants=("error_bars",))] = None
    sizes: Annotated[Optional, Field(variants=("error_bars",))] = None
    variances: Annotated[Optional, Field(ndim=2, variants=("error_bars",))] = None
    error_bars: Annotated[Optional, Field("f8", variants=("error_bars",))] = None
    query_parts: PartWeights = None
    key_parts: PartWeights = None
    config: TileConfig = None


class Pull(NamedTuple):
    """What the pullback takes; `out`, `weights` and `tops` are what the forward pass wrote.

    Attributes
    ----------
    none
        The bias of queries: zeros.
    query_rows, key_rows
        The weights (blocks, width, d) row by row.
    hessian, linear
        The matrix of the quadratic part of a key's log-norm, and its linear part.
    dq, dk, dv, dbias, projection, bias_sums
        What is written: rows or, if these are not empty, for each job sums over its rows.
    query_parts, key_parts, query_rows_parts, key_rows_parts
        Weights split into parts: of queries as left and right factor, of keys as right and left.
    """

    q: Rows
    k: Rows
    v: Rows
    mask: Mask
    log2_bias: Log2Bias
    grad: Rows
    out: Rows
    weights: Floats1
    tops: Whole1
    dq: Floats2
    dk: Floats2
    dv: Floats2
    dbias: Doubles1
    projection: Doubles3
    bias_sums: Doubles2
    c: Whole2
    s: Floats3
    z: Floats2
    room: Bytes2
    control: Ints1
    constants: Annotated[Array, Field(PARAMETERS)]
    jobs: Ints2
    query: Floats3
    key: Floats3
    bias: Floats2
    affine: Floats3
    none: Floats2
    query_rows: Floats3
    key_rows: Floats3
    hessian: Floats3
    linear: Floats2
    query_parts: PartWeights = None
    key_parts: PartWeights = None
    query_rows_parts: PartWeights = None
    key_rows_parts: PartWeights = None
    config: TileConfig = None


class Exact(NamedTuple):
    """What exact attention takes: as `Attend`, its jobs being blocks of tiles of queries.

    Attributes
    ----------
    exponents, shares
        What the weights of keys are multiplied with, shares * 2**exponents, in jobs that have a
        BIAS_ROW.
    """

    q: Rows
    k: Rows
    v: Rows
    mask: Mask
    out: Rows
    weights: Floats1
    tops: Whole1
    exponents: Whole1
    shares: Floats1
    room: Bytes2
    control: Ints1
    constants: Annotated[Array, Field(EXACT_PARAMETERS)]
    jobs: Ints2
    config: TileConfig = None


class ExactPull(NamedTuple):
    """What the gradient of exact attention takes.

    Attributes
    ----------
    inverse, delta, tops
        What is known of a query besides q and g: one over its denominator, and g . out.
    q_rows, out_rows, dq_rows
        The first rows of the queries of each head that reads a problem, of their results, and of
        their dq in each part.
    dq
        Padded: whole vectors, rows in multiples of 8; it still lacks the scale.
    exponents, shares, dbias
        What the weights of keys are multiplied with, as in `Exact`, and the gradient by its
        logarithm.
    """

    q: Rows
    k: Rows
    v: Rows
    mask: Mask
    g: Rows
    inverse: Floats1
    delta: Floats1
    tops: Whole1
    dq: Floats2
    dk: Floats2
    dv: Floats2
    exponents: Whole1
    shares: Floats1
    dbias: Doubles1
    room: Bytes2
    control: Ints1
    constants: Annotated[Array, Field(EXACT_PARAMETERS)]
    jobs: Ints2
    q_rows: Ints2
    out_rows: Ints2
    dq_rows: Ints2


class Merge(NamedTuple):
    """What `merge` takes: states, and others that are added to them slot by slot."""

    c: Whole2
    s: Floats3
    z: Floats2
    other_c: Whole2
    other_s: Floats3
    other_z: Floats2
    control: Ints1


class Numbers(NamedTuple):
    """What `holds_large` takes."""

    rows: Floats2


# Layers of favor_np.nn.  A job is a block of rows, or a piece of a vector.


class Normalize(NamedTuple):
    """What `normalize` takes.

    Attributes
    ----------
    bias
        One, or none.
    stats
        What is written for each row: its mean, if it is subtracted, and one over its size.
    constants
        What is added to the mean square; whether the mean is subtracted; the rows of a sequence;
        from which column on a row gets what belongs to the one before it.
    """

    x: Floats2
    y: Floats2
    stats: Floats2
    control: Ints1
    weight: Floats1
    bias: Floats1
    constants: Doubles1


class NormalizeBack(NamedTuple):
    """What `normalize_back` takes; `sums` are those of a block for weight and bias."""

    x: Floats2
    stats: Floats2
    grad: Floats2
    dx: Floats2
    sums: Floats3
    control: Ints1
    weight: Floats1
    constants: Doubles1


class Activate(NamedTuple):
    """What `activate` takes; `constants` has the function's number, and whether it is gated."""

    x: Floats2
    y: Floats2
    control: Ints1
    constants: Ints1


class ActivateBack(NamedTuple):
    """What `activate_back` takes."""

    x: Floats2
    grad: Floats2
    dx: Floats2
    control: Ints1
    constants: Ints1


class Heads(NamedTuple):
    """What `split_heads` and `merge_heads` take: rows (batch * L, all heads * d), and their heads.

    Attributes
    ----------
    q, k, v
        Heads (batch * heads * L, d); `merge_heads` finds cotangents there.
    lengths
        Of q and k on the sphere of each of their heads, or none.
    cos, sin
        What each number of a head, and its partner, are multiplied with at each position, (L, d),
        or none.
    sums
        What a block adds to the gradient of the lengths; `merge_heads` only.
    constants
        The rows of a sequence; heads of q, of k and of v; how far apart partners are, 1 or d / 2.
    """

    rows: Floats2
    out: Floats2
    q: Floats2
    k: Floats2
    v: Floats2
    sums: Doubles2
    control: Ints1
    lengths: Floats1
    cos: Floats2
    sin: Floats2
    constants: Ints1


class Entropy(NamedTuple):
    """What `cross_entropy` takes; a target of -1 does not count."""

    logits: Floats2
    grad: Floats2
    losses: Doubles1
    targets: Ints1
    control: Ints1
    factor: Doubles1


class Squares(NamedTuple):
    """What `square_sums` takes: `pieces` has where each begins and ends."""

    x: Floats1
    sums: Doubles1
    control: Ints1
    pieces: Ints2


class Adam(NamedTuple):
    """What `adam` takes; a piece has its begin, its end, and whether it decays.

    `constants`: what gradients are multiplied with, both betas, the rate over the first correction,
    one over the second, epsilon, and what weights that decay are multiplied with.
    """

    x: Floats1
    grad: Floats1
    m: Floats1
    v: Floats1
    control: Ints1
    pieces: Ints2
    constants: Doubles1
