"""Fused kernels of the aggregation for TPUs (Pallas, Mosaic), behind the signatures of aggregate.py.

A program owns a tile of tokens of one sample and walks over the history: every row is read once, its scores and the
online softmax are computed in VMEM, and rows from `count` on are not fetched. The forward pass reads the sources
once, the backward pass twice: `query_cotangent` for each read, `add_cotangent` for all reads of a step
together and in place. Matrix products take the type of the sources; everything else is float32.

Names: Q queries, K rows, B samples, T tokens, D features. Columns are `[tile, Q]`: one number per token and query.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

VMEM_PER_TILE = 6 * 2**20  # bytes of blocks and scratch; with the compiler's own temporaries they must fit 16 MiB


def forward(
    u: Array, sources: Array, inv_rms: Array, count: Array, *, mean_count: float | None = None, interpret: bool = False
) -> tuple[Array, Array]:
    """The aggregates `[Q, B, T, D]` in the type of the sources and their log sums, float32 `[Q, B, T]`.

    Args:
      u: folded queries in the type of the sources, `[Q, B, 1 or T, D]`.
      sources: `[K, B, T, D]`, and their `inv_rms`, float32 `[K, B, T]`.
      count: filled rows, at least 1, int32 scalar.
      mean_count: its mean over all calls, None for K; only the declared cost depends on it.
      interpret: run without a TPU, slowly.
    """
    (k, b, t, d), q, size = sources.shape, len(u), sources.dtype.itemsize
    per_token = u.shape[2] > 1
    tile = _tile(t, d * (2 * size * (1 + q + q * per_token) + 4 * q))
    aggregate, log_sum = pl.pallas_call(
        functools.partial(_forward, per_token),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, pl.cdiv(t, tile), k),
            in_specs=[_query_spec(u, tile), _row_spec(sources, tile), _columns_spec(k, tile)],
            out_specs=[_tokens_spec(q, d, tile), _columns_spec(q, tile)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((q, tile, d), (tile, q), (tile, q))],
        ),
        out_shape=[jax.ShapeDtypeStruct((q, b, t, d), u.dtype), jax.ShapeDtypeStruct((b, t, q), jnp.float32)],
        cost_estimate=_cost(sources, mean_count, 1, 4 + 4 * q, u.size * size + q * b * t * (d * size + 4)),
        compiler_params=_SEPARATE_TILES,
        interpret=interpret,
    )(count.reshape(1), _by_sample(u), sources, _columns(inv_rms))
    return aggregate, jnp.moveaxis(log_sum, -1, 0)


def _forward(per_token, count, u, row, inv_rms, aggregate, log_sum, total, maximum, denominator):
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        denominator[...] = jnp.zeros_like(denominator)
        maximum[...] = jnp.full_like(maximum, -jnp.inf)

    @pl.when(k < count[0])
    def _():
        v = row[...].astype(jnp.float32)
        scores = _dots(u[...], row[...], per_token) * _column(inv_rms, k)
        new_maximum = jnp.maximum(maximum[...], scores)
        weights, kept = jnp.exp(scores - new_maximum), jnp.exp(maximum[...] - new_maximum)
        maximum[...] = new_maximum
        denominator[...] = kept * denominator[...] + weights
        for q in range(len(total)):
            total[q] = kept[:, q : q + 1] * total[q] + weights[:, q : q + 1] * v

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        log_sum[...] = maximum[...] + jnp.log(denominator[...])
        for q in range(len(total)):
            aggregate[q] = (total[q] / denominator[:, q : q + 1]).astype(aggregate.dtype)


def query_cotangent(
    u: Array, sources: Array, inv_rms: Array, count: Array, log_sum: Array, g: Array, l: Array,
    *, mean_count: float | None = None, interpret: bool = False,
) -> Array:  # fmt: skip
    """The cotangent of u, float32 `[Q, B, 1 or T, D]`: sum_k s_k r_k v_k with s_k = alpha_k (g . v_k + l).

    Args:
      u, sources, inv_rms, count, mean_count, interpret: as in `forward`.
      log_sum: from `forward`, `[Q, B, T]`.
      g: cotangent of the aggregates, `[Q, B, T, D]` in the type of the sources.
      l: cotangent of the log sums minus g . aggregate, `[Q, B, T]`.
    """
    (k, b, t, d), q, size = sources.shape, len(u), sources.dtype.itemsize
    per_token = u.shape[2] > 1
    tile = _tile(t, d * (2 * size * (1 + q + q * per_token) + 8 * q * per_token))
    if per_token:
        out_spec, out_shape, params = _tokens_spec(q, d, tile), (q, b, t, d), _SEPARATE_TILES
    else:
        out_spec, out_shape, params = _sample_spec(q, d), (b, q, d), _JOINT_TILES
    d_u = pl.pallas_call(
        functools.partial(_query_cotangent, per_token, t),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, pl.cdiv(t, tile), k),
            in_specs=[
                _query_spec(u, tile), _row_spec(sources, tile), _columns_spec(k, tile),
                _columns_spec(q, tile), _tokens_spec(q, d, tile), _columns_spec(q, tile),
            ],
            out_specs=out_spec,
        ),
        out_shape=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        cost_estimate=_cost(sources, mean_count, 1, 3 + 6 * q, (u.size + g.size) * size + 4 * (u.size + 2 * l.size)),
        compiler_params=params,
        interpret=interpret,
    )(count.reshape(1), _by_sample(u), sources, _columns(inv_rms), _columns(log_sum), g, _columns(l))  # fmt: skip
    return d_u if per_token else d_u.swapaxes(0, 1)[:, :, None]


def _query_cotangent(per_token, tokens, count, u, row, inv_rms, log_sum, g, l, d_u):
    t, k = pl.program_id(1), pl.program_id(2)

    @pl.when(k == 0 if per_token else (k == 0) & (t == 0))
    def _():
        d_u[...] = jnp.zeros_like(d_u)

    @pl.when(k < count[0])
    def _():
        v = row[...].astype(jnp.float32)
        r = _column(inv_rms, k)
        alpha = jnp.exp(_dots(u[...], row[...], per_token) * r - log_sum[...])
        s_r = alpha * (_dots(g[...], row[...], True) + l[...]) * r
        if per_token:
            for q in range(len(d_u)):
                d_u[q] += s_r[:, q : q + 1] * v
        else:
            inside = t * len(v) + jax.lax.broadcasted_iota(jnp.int32, (len(v), 1), 0) < tokens
            s_r, v = jnp.where(inside, s_r, 0), jnp.where(inside, v, 0)
            d_u[...] += _matmul(s_r.astype(row.dtype), v.astype(row.dtype), 0, 0)


def add_cotangent(
    d_sources: Array, u: Array, sources: Array, inv_rms: Array, count: Array, log_sum: Array, g: Array, l: Array,
    *, mean_count: float | None = None, interpret: bool = False,
) -> Array:  # fmt: skip
    """Adds to `d_sources` what Q reads hand back to the first `count` rows; returns `[K, B, T, D]`.

    Source k gets alpha_k g + s_k r_k u - (s_k score_k r_k^2 / D) v_k of each query.

    Args:
      d_sources: cotangent so far, shape and type of the sources; overwritten.
      The others are as in `query_cotangent`.
    """
    (k, b, t, d), q, size = sources.shape, len(u), sources.dtype.itemsize
    per_token = u.shape[2] > 1
    tile = _tile(t, d * (2 * size * (3 + q + q * per_token) + 8))
    row_spec = _row_spec(sources, tile)
    return pl.pallas_call(
        functools.partial(_add_cotangent, per_token),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, pl.cdiv(t, tile), k),
            in_specs=[
                row_spec, _query_spec(u, tile), row_spec, _columns_spec(k, tile),
                _columns_spec(q, tile), _tokens_spec(q, d, tile), _columns_spec(q, tile),
            ],
            out_specs=row_spec,
        ),
        out_shape=jax.ShapeDtypeStruct(d_sources.shape, d_sources.dtype),
        input_output_aliases={1: 0},
        cost_estimate=_cost(sources, mean_count, 3, 6 + 8 * q, (u.size + g.size) * size + 8 * l.size),
        compiler_params=_SEPARATE_TILES,
        interpret=interpret,
    )(count.reshape(1), d_sources, _by_sample(u), sources, _columns(inv_rms), _columns(log_sum), g, _columns(l))  # fmt: skip


def _add_cotangent(per_token, count, d_row, u, row, inv_rms, log_sum, g, l, new_d_row):
    k = pl.program_id(2)

    @pl.when(k < count[0])
    def _():
        v = row[...].astype(jnp.float32)
        r = _column(inv_rms, k)
        scores = _dots(u[...], row[...], per_token) * r
        alpha = jnp.exp(scores - log_sum[...])
        s = alpha * (_dots(g[...], row[...], True) + l[...])
        along_v = jnp.sum(s * scores, axis=-1, keepdims=True) * r * r / v.shape[-1]
        total = d_row[...].astype(jnp.float32) - along_v * v
        for q in range(alpha.shape[-1]):
            total += alpha[:, q : q + 1] * g[q].astype(jnp.float32)
        if per_token:
            for q in range(alpha.shape[-1]):
                total += (s * r)[:, q : q + 1] * u[q].astype(jnp.float32)
        else:
            total += _matmul((s * r).astype(row.dtype), u[...], 1, 0)
        new_d_row[...] = total.astype(new_d_row.dtype)


_SEPARATE_TILES = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
_JOINT_TILES = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))


def _tile(tokens: int, bytes_per_token: int) -> int:
    """Tokens per program: all, or a power of two that fits VMEM."""
    tile = 16
    while tile < tokens and 2 * tile * bytes_per_token <= VMEM_PER_TILE:
        tile *= 2
    return min(tile, tokens)


def _cost(sources: Array, mean_count: float | None, passes: int, flops: int, other_bytes: int) -> pl.CostEstimate:
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


def _tokens_spec(queries: int, features: int, tile: int) -> pl.BlockSpec:
    return pl.BlockSpec((queries, None, tile, features), lambda b, t, k, count: (0, b, t, 0))


def _sample_spec(queries: int, features: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, queries, features), lambda b, t, k, count: (b, 0, 0))


def _query_spec(u: Array, tile: int) -> pl.BlockSpec:
    q, _, tokens, d = u.shape
    return _tokens_spec(q, d, tile) if tokens > 1 else _sample_spec(q, d)


def _by_sample(u: Array) -> Array:
    """`[Q, B, 1, D]` -> `[B, Q, D]`: the queries of a sample are one block, the left side of a matrix product."""
    return u if u.shape[2] > 1 else u[:, :, 0].swapaxes(0, 1)


def _columns_spec(queries: int, tile: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, tile, queries), lambda b, t, k, count: (b, t, 0))


def _columns(x: Array) -> Array:
    """`[Q, B, T]` -> `[B, T, Q]`, float32."""
    return jnp.moveaxis(x, 0, -1).astype(jnp.float32)


def _column(columns: pl.MemoryRef, k: Array) -> Array:
    """Column k, which only the running program knows, `[tile, 1]`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, columns.shape[-1]), 1)
    return jnp.sum(jnp.where(lane == k, columns[...], 0.0), axis=-1, keepdims=True)


def _dots(x: Array, row: Array, per_token: bool) -> Array:
    """x . v for each token: x `[Q, tile, D]` or `[Q, D]`, row `[tile, D]` -> `[tile, Q]` float32."""
    if not per_token:
        return _matmul(row, x, 1, 1)
    v = row.astype(jnp.float32)
    columns = [jnp.sum(x_q.astype(jnp.float32) * v, axis=-1, keepdims=True) for x_q in x]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, len(x)), 1)
    return sum(jnp.where(lane == q, column, 0.0) for q, column in enumerate(columns))


def _matmul(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """The product of two matrices over an axis of each, in float32. Mosaic has none in bfloat16 for one query."""
    if 1 in (*a.shape, *b.shape):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = ((a_axis,), (b_axis,)), ((), ())
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
