"""The passes over the history as fused kernels for TPUs (Pallas, Mosaic).

A program owns a tile of tokens of one sample and walks over the history: every row is read once, its scores and the
online softmax are computed in VMEM, and rows from `count` on are not fetched. The forward pass reads the sources
once, the backward pass twice: `query_cotangent` for each read, `add_source_cotangent` for all reads of a step
together and in place. Matrix products take the type of the sources; everything else is float32.

`sublayer_input` merges recent sources, normalizes and modulates in one pass, which backward adds to the cotangents of
the recent sources in place.

Queries, aggregates and their cotangents are tuples of Q arrays: stacking them would copy them.

Names: Q queries, K rows, B samples, T tokens, D features. Columns are `[tile, Q]`: one number per token and query.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dar_jax.routing.kernels.xla import EPS

VMEM_PER_TILE = 6 * 2**20  # bytes of blocks and scratch; with the compiler's own temporaries they must fit 16 MiB


def forward(
    u: tuple[Array, ...], sources: Array, inv_rms: Array, count: Array, *,
    mean_count: float | None = None, interpret: bool = False,
) -> tuple[tuple[Array, ...], Array]:  # fmt: skip
    """The aggregates, Q times `[B, T, D]` in the type of the sources, and their log sums, float32 `[Q, B, T]`.

    Args:
      u: folded queries in the type of the sources, Q times `[B, 1 or T, D]`.
      sources: `[K, B, T, D]`, and their `inv_rms`, float32 `[K, B, T]`.
      count: filled rows, at least 1, int32 scalar.
      mean_count: its mean over all calls, None for K; only the declared cost depends on it.
      interpret: run without a TPU, slowly.
    """
    (k, b, t, d), q, size, per_token = sources.shape, len(u), sources.dtype.itemsize, u[0].shape[1] > 1
    tile = _tile(t, d * (2 * size * (1 + q + q * per_token) + 4 * q))
    aggregates, log_sum = pl.pallas_call(
        functools.partial(_forward, per_token),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, pl.cdiv(t, tile), k),
            in_specs=[_query_spec(u, tile), _row_spec(sources, tile), _columns_spec(k, tile)],
            out_specs=[_tokens_spec(q, d, tile), _columns_spec(q, tile)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((q, tile, d), (tile, q), (tile, q))],
        ),
        out_shape=[q * (jax.ShapeDtypeStruct((b, t, d), sources.dtype),), jax.ShapeDtypeStruct((b, t, q), jnp.float32)],
        cost_estimate=_cost(sources, mean_count, 1, 4 + 4 * q, q * (u[0].size + b * t * d) * size),
        compiler_params=_SEPARATE_TILES,
        interpret=interpret,
    )(count.reshape(1), _by_sample(u), sources, _columns(inv_rms))
    return aggregates, jnp.moveaxis(log_sum, -1, 0)


def _forward(per_token, count, u, row, inv_rms, aggregates, log_sum, total, maximum, denominator):
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        denominator[...] = jnp.zeros_like(denominator)
        maximum[...] = jnp.full_like(maximum, -jnp.inf)

    @pl.when(k < count[0])
    def _():
        v = row[...].astype(jnp.float32)
        scores = _dots(u, row[...]) * _column(inv_rms, k)
        new_maximum = jnp.maximum(maximum[...], scores)
        weights, kept = jnp.exp(scores - new_maximum), jnp.exp(maximum[...] - new_maximum)
        maximum[...] = new_maximum
        denominator[...] = kept * denominator[...] + weights
        for q in range(len(total)):
            total[q] = kept[:, q : q + 1] * total[q] + weights[:, q : q + 1] * v

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        log_sum[...] = maximum[...] + jnp.log(denominator[...])
        for q, aggregate in enumerate(aggregates):
            aggregate[...] = (total[q] / denominator[:, q : q + 1]).astype(aggregate.dtype)


def query_cotangent(
    u: tuple[Array, ...], sources: Array, inv_rms: Array, count: Array, aggregates: tuple[Array, ...], log_sum: Array,
    g: tuple[Array, ...], l: Array, *, mean_count: float | None = None, interpret: bool = False,
) -> tuple[tuple[Array, ...], Array]:  # fmt: skip
    """The cotangents of queries per token, Q times `[B, T, D]`, and `l - g . aggregate`, float32 `[Q, B, T]`.

    With s_k = alpha_k (g . v_k - g . aggregate + l), that of u is sum_k s_k r_k v_k.

    Args:
      u, sources, inv_rms, count, mean_count, interpret: as in `forward`; u Q times `[B, T, D]`.
      aggregates, log_sum: from `forward`.
      g: cotangents of the aggregates, Q times `[B, T, D]`.
      l: cotangents of the log sums, `[Q, B, T]`.
    """
    (k, b, t, d), q, size = sources.shape, len(u), sources.dtype.itemsize
    tile = _tile(t, d * (2 * size * (1 + 3 * q) + 8 * q))
    tokens, columns = _tokens_spec(q, d, tile), _columns_spec(q, tile)
    d_u, l = pl.pallas_call(
        _query_cotangent,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, pl.cdiv(t, tile), k),
            in_specs=[tokens, _row_spec(sources, tile), _columns_spec(k, tile), tokens, columns, tokens, columns],
            out_specs=[tokens, columns],
            scratch_shapes=[pltpu.VMEM((q, tile, d), jnp.float32)],
        ),
        out_shape=[q * (jax.ShapeDtypeStruct((b, t, d), u[0].dtype),), jax.ShapeDtypeStruct((b, t, q), jnp.float32)],
        cost_estimate=_cost(sources, mean_count, 1, 3 + 6 * q, 4 * q * b * t * d * size),
        compiler_params=_SEPARATE_TILES,
        interpret=interpret,
    )(
        count.reshape(1), u, sources, _columns(inv_rms), aggregates, _columns(log_sum), g, _columns(l)
    )  # fmt: skip
    return d_u, jnp.moveaxis(l, -1, 0)


def _query_cotangent(count, u, row, inv_rms, aggregates, log_sum, g, l, d_u, new_l, total):
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        new_l[...] = l[...] - _dots_of_tokens(g, aggregates)
        total[...] = jnp.zeros_like(total)

    @pl.when(k < count[0])
    def _():
        v = row[...].astype(jnp.float32)
        r = _column(inv_rms, k)
        alpha = jnp.exp(_dots(u, row[...]) * r - log_sum[...])
        s_r = alpha * (_dots(g, row[...]) + new_l[...]) * r
        for q in range(len(total)):
            total[q] += s_r[:, q : q + 1] * v

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        for q, d_u_q in enumerate(d_u):
            d_u_q[...] = total[q].astype(d_u_q.dtype)


def add_source_cotangent(
    d_sources: Array | None, u: tuple[Array, ...], sources: Array, inv_rms: Array, count: Array, log_sum: Array,
    g: tuple[Array, ...], l: Array, *, mean_count: float | None = None, interpret: bool = False,
) -> Array:  # fmt: skip
    """Adds to `d_sources` what Q reads by queries per token hand back to the first `count` rows; `[K, B, T, D]`.

    Source k gets alpha_k g + s_k r_k u - (s_k score_k r_k^2 / D) v_k of each query, with s_k = alpha_k (g . v_k + l).

    Args:
      d_sources: cotangent so far, shape and type of the sources; overwritten. None: zeros, which are not read.
      l: from `query_cotangent`. The others are as there.
    """
    d, q, size = sources.shape[-1], len(u), sources.dtype.itemsize
    before = () if d_sources is None else (d_sources,)
    tile = _tile(sources.shape[2], d * (2 * size * (3 + 2 * q) + 8))
    columns, tokens = _columns_spec(q, tile), _tokens_spec(q, d, tile)
    arguments = before, u, sources, _columns(inv_rms), _columns(log_sum), g, _columns(l)
    specs = len(before) * (_row_spec(sources, tile),), tokens, *_history_specs(sources, tile), columns, tokens, columns
    return _add_to_rows(_add_source_cotangent, arguments, specs, sources, count, mean_count, q, 2 * q, interpret)[0]


def _add_source_cotangent(count, d_row, u, row, inv_rms, log_sum, g, l, new_d_row):
    k = pl.program_id(2)

    @pl.when(k < count[0])
    def _():
        _, s_r, total = _row_cotangent(k, d_row, u, row, inv_rms, log_sum, g, l)
        for q, u_q in enumerate(u):
            total += s_r[:, q : q + 1] * u_q[...].astype(jnp.float32)
        new_d_row[...] = total.astype(new_d_row.dtype)

    _clear_rows_from(count, d_row, new_d_row)


def cotangents(
    d_sources: Array | None, u: tuple[Array, ...], sources: Array, inv_rms: Array, count: Array,
    aggregates: tuple[Array, ...], log_sum: Array, g: tuple[Array, ...], l: Array, *,
    mean_count: float | None = None, interpret: bool = False,
) -> tuple[Array, tuple[Array, ...]]:  # fmt: skip
    """What Q reads hand back, by queries that all tokens of a sample share, `[B, 1, D]`: both of the above in one pass.

    Args: those of `add_source_cotangent` and `query_cotangent`, with the `l` of the latter.

    Returns:
      `d_sources` with what is added, and the cotangents of u, float32.
    """
    (_, b, t, d), q, size = sources.shape, len(u), sources.dtype.itemsize
    before = () if d_sources is None else (d_sources,)
    tile = _tile(t, d * (2 * size * (3 + 2 * q) + 8))
    columns, tokens = _columns_spec(q, tile), _tokens_spec(q, d, tile)
    arguments = before, _by_sample(u), sources, _columns(inv_rms), aggregates, _columns(log_sum), g, _columns(l)
    specs = (
        len(before) * (_row_spec(sources, tile),), _sample_spec(q, d), *_history_specs(sources, tile), tokens, columns,
        tokens, columns,
    )  # fmt: skip
    sums = _sample_spec(q, d), jax.ShapeDtypeStruct((b, q, d), jnp.float32)
    d_sources, d_u = _add_to_rows(
        functools.partial(_cotangents, t), arguments, specs, sources, count, mean_count, q, 2 * q, interpret,
        sums, [pltpu.VMEM((tile, q), jnp.float32)],
    )  # fmt: skip
    return d_sources, tuple(d_u[:, i : i + 1] for i in range(q))


def _cotangents(tokens, count, d_row, u, row, inv_rms, aggregates, log_sum, g, l, new_d_row, d_u, new_l):
    t, k = pl.program_id(1), pl.program_id(2)

    @pl.when(k == 0)
    def _():
        new_l[...] = l[...] - _dots_of_tokens(g, aggregates)

    @pl.when((k == 0) & (t == 0))
    def _():
        d_u[...] = jnp.zeros_like(d_u)

    @pl.when(k < count[0])
    def _():
        v, s_r, total = _row_cotangent(k, d_row, u, row, inv_rms, log_sum, g, new_l)
        new_d_row[...] = (total + _matmul(s_r.astype(row.dtype), u[...], 1, 0)).astype(new_d_row.dtype)
        inside = t * len(v) + jax.lax.broadcasted_iota(jnp.int32, (len(v), 1), 0) < tokens
        s_r, v = jnp.where(inside, s_r, 0), jnp.where(inside, v, 0)
        d_u[...] += _matmul(s_r.astype(row.dtype), v.astype(row.dtype), 0, 0)

    _clear_rows_from(count, d_row, new_d_row)


def _row_cotangent(k, d_row, u, row, inv_rms, log_sum, g, l) -> tuple[Array, Array, Array]:
    """Row k in float32, s r `[tile, Q]`, and the cotangent of the row without its part along the queries."""
    v = row[...].astype(jnp.float32)
    r = _column(inv_rms, k)
    scores = _dots(u, row[...]) * r
    alpha = jnp.exp(scores - log_sum[...])
    s = alpha * (_dots(g, row[...]) + l[...])
    total = -jnp.sum(s * scores, axis=-1, keepdims=True) * r * r / v.shape[-1] * v
    for before in d_row:
        total += before[...].astype(jnp.float32)
    for q, g_q in enumerate(g):
        total += alpha[:, q : q + 1] * g_q[...].astype(jnp.float32)
    return v, s * r, total


def _clear_rows_from(count, d_row, new_d_row) -> None:
    """Where there was no cotangent before, that of rows which are not filled is zero."""
    if not d_row:

        @pl.when(pl.program_id(2) >= count[0])
        def _():
            new_d_row[...] = jnp.zeros_like(new_d_row)


def _add_to_rows(
    kernel, arguments, specs, sources, count, mean_count, queries, others, interpret, sums=None, scratch=()
):
    """Runs a kernel that adds to every filled row of a cotangent, the first of `arguments`, or makes it from nothing.

    Args:
      arguments, specs: of the kernel and their blocks; `specs` says of how many tokens.
      others: how many arrays `[B, T, D]` it reads besides.
      sums: None, or the block and shape of a second result, which tiles of a sample add up one after the other.
      scratch: memory of the kernel.
    """
    (k, b, t, d), before, row = sources.shape, arguments[0], specs[2]
    tile = row.block_shape[2]
    every_row = pl.BlockSpec((None, None, tile, d), lambda b, t, k, count: (k, b, t, 0))
    passes = 2 + len(before) if before or mean_count is None else 1 + k / mean_count
    rows = (row if before else every_row), jax.ShapeDtypeStruct(sources.shape, sources.dtype)
    out_specs, out_shape = zip(*([rows, sums] if sums else [rows]), strict=True)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, pl.cdiv(t, tile), k),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        input_output_aliases={1: 0} if before else {},
        cost_estimate=_cost(sources, mean_count, passes, 6 + 8 * queries, others * b * t * d * sources.dtype.itemsize),
        compiler_params=_JOINT_TILES if sums else _SEPARATE_TILES,
        interpret=interpret,
    )(count.reshape(1), *arguments)


def sublayer_input(
    u: tuple[Array, ...], values: tuple[Array, ...], columns: tuple[Array, ...], modulation: tuple[Array, Array], *,
    interpret: bool = False,
) -> tuple[Array]:  # fmt: skip
    """What a sublayer reads: LayerNorm(h) * (1 + scale) + shift, `[B, T, D]` in the type of the values.

    h = sum_k alpha_k value_k with alpha the softmax of the log sum of value 0 and the scores of all others.

    Args:
      u: the folded query in the type of the values, `[B, 1 or T, D]`; none if value 0 is the only one.
      values: the aggregate of the history and R recent sources, `[B, T, D]`.
      columns: the log sum of the aggregate, and 1 / rms of the recent sources, float32 `[B, T]`. A kernel, which has
        the sources in VMEM, computes the latter once more rather than read them.
      modulation: shift and scale, `[B, 1, D]`.
      interpret: run without a TPU, slowly.
    """
    b, t, d = values[0].shape
    tile = _merge_tile(u, values, len(values) + 1)
    (tokens,) = _tokens_spec(1, d, tile)
    (x,) = pl.pallas_call(
        _sublayer_input,
        grid=(b, pl.cdiv(t, tile)),
        in_specs=_merge_specs(u, values, tile),
        out_specs=(tokens,),
        out_shape=(jax.ShapeDtypeStruct((b, t, d), values[0].dtype),),
        cost_estimate=_merge_cost(u, values, len(values) + 1),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(u, values, columns[0][..., None].astype(jnp.float32), modulation)
    return (x,)


def _sublayer_input(u, values, log_sum, modulation, x):
    normal = _merge(u, values, log_sum)[-2]
    shift, scale = (m[...].astype(jnp.float32) for m in modulation)
    x[...] = (normal * (1 + scale) + shift).astype(x.dtype)


def sublayer_input_cotangents(
    u: tuple[Array, ...], values: tuple[Array, ...], columns: tuple[Array, ...], modulation: tuple[Array, Array],
    g: tuple[Array], d_recent: tuple[Array, ...], *, interpret: bool = False,
) -> tuple[tuple[Array, ...], ...]:  # fmt: skip
    """The cotangents of u, of the values, of the log sum and of the modulation, each a tuple.

    Those of recent sources are added to `d_recent`. Of the others all are float32, but for that of a query per token.

    Args:
      u, values, columns, modulation, interpret: as in `sublayer_input`.
      g: cotangent of its result.
      d_recent: cotangents so far of the recent sources, R times `[B, T, D]`; overwritten.
    """
    (b, t, d), per_token = values[0].shape, bool(u) and u[0].shape[1] > 1
    tile = _merge_tile(u, values, 3 * len(values))
    (tokens,), sample, column = _tokens_spec(1, d, tile), _sample_spec(1, d), _columns_spec(1, tile)
    per_sample, per_token_column = (jax.ShapeDtypeStruct((b, *s), jnp.float32) for s in ((1, d), (t, 1)))
    d_u, d_values, d_log_sum, d_modulation = pl.pallas_call(
        functools.partial(_sublayer_input_cotangents, t),
        grid=(b, pl.cdiv(t, tile)),
        in_specs=[*_merge_specs(u, values, tile), (tokens,), len(d_recent) * (tokens,)],
        out_specs=(len(u) * (tokens if per_token else sample,), len(values) * (tokens,), (column,), 2 * (sample,)),
        out_shape=(
            tuple(jax.ShapeDtypeStruct(x.shape, x.dtype if per_token else jnp.float32) for x in u),
            tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values),
            (per_token_column,),
            2 * (per_sample,),
        ),
        input_output_aliases={len(u) + len(values) + 4 + r: len(u) + 1 + r for r in range(len(d_recent))},
        cost_estimate=_merge_cost(u, values, 3 * len(values), 2),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(u, values, columns[0][..., None].astype(jnp.float32), modulation, g, d_recent)
    return d_u, d_values, (d_log_sum[0][..., 0],), d_modulation


def _sublayer_input_cotangents(
    tokens, u, values, log_sum, modulation, g, d_recent, d_u, d_values, d_log_sum, d_modulation
):
    query, wide, inverse, scores, alpha, normal, inverse_deviation = _merge(u, values, log_sum)
    g = g[0][...].astype(jnp.float32)
    g_normal = g * (1 + modulation[1][...].astype(jnp.float32))
    g_h = g_normal - _mean(g_normal) - normal * _mean(g_normal * normal)
    g_h *= inverse_deviation
    dots = [jnp.sum(g_h * v, axis=-1, keepdims=True) for v in wide]
    along_h = sum(a * dot for a, dot in zip(alpha, dots, strict=True))
    d_scores = [a * (dot - along_h) for a, dot in zip(alpha, dots, strict=True)]
    d_log_sum[0][...] = d_scores[0]
    d_values[0][...] = (alpha[0] * g_h).astype(d_values[0].dtype)
    d_query = jnp.zeros_like(g)
    for k, (v, r) in enumerate(zip(wide[1:], inverse, strict=True), start=1):
        d_score = d_scores[k] * r
        total = d_recent[k - 1][...].astype(jnp.float32) + alpha[k] * g_h
        total += d_score * query - (d_score * scores[k] * r / v.shape[-1]) * v
        d_values[k][...] = total.astype(d_values[k].dtype)
        d_query += d_score * v

    sums = [(d_modulation[0], g), (d_modulation[1], g * normal)]
    if u and u[0].shape[0] > 1:
        d_u[0][...] = d_query.astype(d_u[0].dtype)
    elif u:
        sums.append((d_u[0], d_query))
    t, tile = pl.program_id(1), len(g)
    for total, terms in sums:

        @pl.when(t == 0)
        def _(total=total):
            total[...] = jnp.zeros_like(total)

        if tokens % tile:
            inside = t * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0) < tokens
            terms = jnp.where(inside, terms, 0)
        total[...] += jnp.sum(terms, axis=0, keepdims=True)


def _merge(u, values, log_sum):
    """What both directions need: the query, the values in float32, 1 / rms, scores and weights, and the LayerNorm.

    The latter is that of the merged state, (h - mean) / deviation, and 1 / deviation. Scores and weights are lists of
    `[tile, 1]`.
    """
    query = u[0][...].astype(jnp.float32) if u else None
    wide = [v[...].astype(jnp.float32) for v in values]
    inverse = [jax.lax.rsqrt(_mean(v * v) + EPS) for v in wide[1:]]
    dots = [jnp.sum(query * v, axis=-1, keepdims=True) for v in wide[1:]]
    scores = [log_sum[...]] + [dot * r for dot, r in zip(dots, inverse, strict=True)]
    largest = functools.reduce(jnp.maximum, scores)
    weights = [jnp.exp(score - largest) for score in scores]
    alpha = [w / sum(weights) for w in weights]
    h = sum(a * v for a, v in zip(alpha, wide, strict=True))
    centred = h - _mean(h)
    inverse_deviation = jax.lax.rsqrt(_mean(centred * centred) + EPS)
    return query, wide, inverse, scores, alpha, centred * inverse_deviation, inverse_deviation


def _mean(x: Array) -> Array:
    return jnp.mean(x, axis=-1, keepdims=True)


def _merge_specs(u, values, tile: int) -> list:
    """Blocks of the arguments of `sublayer_input`."""
    d = values[0].shape[-1]
    (tokens,), sample = _tokens_spec(1, d, tile), _sample_spec(1, d)
    queries = tuple(tokens if x.shape[1] > 1 else sample for x in u)
    return [queries, len(values) * (tokens,), _columns_spec(1, tile), 2 * (sample,)]


def _merge_tile(u, values, arrays: int) -> int:
    """Tokens per program, for blocks of `arrays` arrays like the values, and as many float32 temporaries as values."""
    _, t, d = values[0].shape
    return _tile(t, d * (2 * values[0].dtype.itemsize * arrays + 16 * len(u) + 4 * (len(values) + 3)))


def _merge_cost(u, values, arrays: int, directions: int = 1) -> pl.CostEstimate:
    one = values[0]
    size = arrays * one.nbytes + directions * sum(x.nbytes for x in u)
    return pl.CostEstimate(flops=directions * 10 * len(values) * one.size, transcendentals=0, bytes_accessed=size)


_SEPARATE_TILES = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
_JOINT_TILES = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))


def _tile(tokens: int, bytes_per_token: int) -> int:
    """Tokens per program: all, or a power of two that fits VMEM."""
    tile = 16
    while tile < tokens and 2 * tile * bytes_per_token <= VMEM_PER_TILE:
        tile *= 2
    return min(tile, tokens)


def _cost(sources: Array, mean_count: float | None, passes: float, flops: int, other_bytes: int) -> pl.CostEstimate:
    filled = (len(sources) if mean_count is None else mean_count) * sources[0].size
    return pl.CostEstimate(
        flops=int(flops * filled),
        transcendentals=0,
        bytes_accessed=int(passes * filled * sources.dtype.itemsize + other_bytes),
    )


def _row_spec(sources: Array, tile: int) -> pl.BlockSpec:
    """`[tile, D]` of row k; beyond the last filled row the block does not change, so nothing is fetched."""
    block = (None, None, tile, sources.shape[-1])
    return pl.BlockSpec(block, lambda b, t, k, count: (jnp.minimum(k, count[0] - 1), b, t, 0))


def _history_specs(sources: Array, tile: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Blocks of the sources and of their `inv_rms` as columns."""
    return _row_spec(sources, tile), _columns_spec(len(sources), tile)


def _tokens_spec(queries: int, features: int, tile: int) -> tuple[pl.BlockSpec, ...]:
    return queries * (pl.BlockSpec((None, tile, features), lambda b, t, *_: (b, t, 0)),)


def _sample_spec(queries: int, features: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, queries, features), lambda b, t, *_: (b, 0, 0))


def _query_spec(u: tuple[Array, ...], tile: int) -> pl.BlockSpec | tuple[pl.BlockSpec, ...]:
    _, tokens, d = u[0].shape
    return _tokens_spec(len(u), d, tile) if tokens > 1 else _sample_spec(len(u), d)


def _by_sample(u: tuple[Array, ...]) -> Array | tuple[Array, ...]:
    """Q times `[B, 1, D]` -> `[B, Q, D]`: what is the same for all tokens of a sample is the factor of a matmul."""
    return u if u[0].shape[1] > 1 else jnp.concatenate(u, axis=1)


def _columns_spec(queries: int, tile: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, tile, queries), lambda b, t, *_: (b, t, 0))


def _columns(x: Array) -> Array:
    """`[Q, B, T]` -> `[B, T, Q]`, float32."""
    return jnp.moveaxis(x, 0, -1).astype(jnp.float32)


def _column(columns: pl.MemoryRef, k: Array) -> Array:
    """Column k, which only the running program knows, `[tile, 1]`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, columns.shape[-1]), 1)
    return jnp.sum(jnp.where(lane == k, columns[...], 0.0), axis=-1, keepdims=True)


def _dots(x: pl.MemoryRef | tuple[pl.MemoryRef, ...], row: Array) -> Array:
    """x . v for each token: x `[Q, D]` or Q times `[tile, D]`, row `[tile, D]` -> `[tile, Q]` float32."""
    if not isinstance(x, tuple):
        return _matmul(row, x[...], 1, 1)
    v = row.astype(jnp.float32)
    return _join(jnp.sum(x_q[...].astype(jnp.float32) * v, axis=-1, keepdims=True) for x_q in x)


def _dots_of_tokens(x: tuple[pl.MemoryRef, ...], y: tuple[pl.MemoryRef, ...]) -> Array:
    """x . y for each token: both Q times `[tile, D]` -> `[tile, Q]` float32."""
    wide = [(x_q[...].astype(jnp.float32), y_q[...].astype(jnp.float32)) for x_q, y_q in zip(x, y, strict=True)]
    return _join(jnp.sum(x_q * y_q, axis=-1, keepdims=True) for x_q, y_q in wide)


def _join(columns) -> Array:
    """Q times `[tile, 1]` -> `[tile, Q]`."""
    columns = list(columns)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, len(columns)), 1)
    return sum(jnp.where(lane == q, column, 0.0) for q, column in enumerate(columns))


def _matmul(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """The product of two matrices over an axis of each, in float32. Mosaic has none in bfloat16 for one query."""
    if 1 in (*a.shape, *b.shape):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = ((a_axis,), (b_axis,)), ((), ())
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
