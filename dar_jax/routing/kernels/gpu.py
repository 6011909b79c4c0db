"""The passes over the history as fused kernels for GPUs (Pallas, Triton). Arguments and results as in tpu.py.

A program owns one token, whose vectors it holds in registers, and loops over the filled rows; so all statistics are
scalars. Triton's vectors are of powers of two, so a token's are held in parts, 1152 = 1024 + 128. How many warps share
them follows from how many there are, and long chunks take their queries in groups: on sm_90 no kernel spills registers.
In `cotangents`, whose queries are shared by all tokens of a sample, a program walks over a few tokens and the partial
sums are added outside, in a fixed order: no atomic additions, so results repeat.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dar_jax.routing.kernels.xla import EPS

TOKENS_PER_PARTIAL_SUM = 8
LEAST_PART = 128  # features of the smallest part of a vector
# Numbers of its vectors that a thread holds. With these, kernels do not spill on sm_90, where a thread may have 255
# registers among 4 warps and 128 among 16 (tests/test_gpu_kernels.py compiles them).
MOST_NUMBERS, NUMBERS_OF_QUERIES = 92, 64


@jax.tree_util.register_pytree_node_class
class Vector:
    """A token's features in float32, in parts of powers of two, the last of which may end in zeros."""

    def __init__(self, *parts: Array):
        self.parts = parts

    def tree_flatten(self):
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(*parts)

    def _with(self, other, operation) -> "Vector":
        others = other.parts if isinstance(other, Vector) else len(self.parts) * (other,)
        return Vector(*map(operation, self.parts, others))

    def __add__(self, other):
        return self._with(other, operator.add)

    def __sub__(self, other):
        return self._with(other, operator.sub)

    def __mul__(self, other):
        return self._with(other, operator.mul)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other):
        return self._with(other, operator.truediv)

    def sum(self) -> Array:
        return functools.reduce(operator.add, map(jnp.sum, self.parts))

    @classmethod
    def zeros(cls, size: int) -> "Vector":
        return cls(*(jnp.zeros(n, jnp.float32) for _, n in parts_of(size)))


def parts_of(size: int) -> list[tuple[int, int]]:
    """First feature and length of every part of a vector of so many features: 1152 -> [(0, 1024), (1024, 128)]."""
    first, left, found = 0, -(-size // LEAST_PART) * LEAST_PART, []
    while left:
        found.append((first, 1 << left.bit_length() - 1))
        first, left = first + found[-1][1], left - found[-1][1]
    return found


def warps_for(vectors: int, size: int) -> int:
    """How many warps share so many vectors of so many features that a program holds."""
    return next((warps for warps in (4, 8) if vectors * size <= 32 * warps * MOST_NUMBERS), 16)


def queries_at_once(size: int) -> int:
    """How many queries a program takes: it holds up to three vectors for each, and one or two more."""
    return max(1, min(8, (NUMBERS_OF_QUERIES * 32 * 16 // size - 1) // 3))


def forward(
    u, sources, inv_rms, count, *, mean_count=None, interpret=False
) -> tuple[tuple[Array, ...], Array]:  # fmt: skip
    """See tpu.forward."""
    options = {"mean_count": mean_count, "interpret": interpret}
    if len(u) > queries_at_once(sources.shape[3]):
        parts = [forward(group, sources, inv_rms, count, **options) for group in _groups(u, sources)]
        return sum((aggregates for aggregates, _ in parts), ()), jnp.concatenate([log_sum for _, log_sum in parts])
    _, b, t, d = sources.shape
    out_shape = len(u) * (jax.ShapeDtypeStruct((b, t, d), sources.dtype),), _scalars(len(u), b, t)
    call = _call(_forward, (b, t), out_shape, vectors=2 * len(u) + 1, size=d, **options)
    return call(u, sources, inv_rms, count.reshape(1))


def _forward(u, sources, inv_rms, count, aggregates, log_sum):
    b, t = pl.program_id(0), pl.program_id(1)
    queries = [_load(x, b, t) for x in u]

    def add_row(k, carry):
        v, r = _load(sources, k, b, t), inv_rms[k, b, t]
        result = []
        for query, (total, maximum, denominator) in zip(queries, carry, strict=True):
            score = (query * v).sum() * r
            new_maximum = jnp.maximum(maximum, score)
            weight, kept = jnp.exp(score - new_maximum), jnp.exp(maximum - new_maximum)
            result.append((kept * total + weight * v, new_maximum, kept * denominator + weight))
        return result

    start = Vector.zeros(sources.shape[3]), jnp.float32(-jnp.inf), jnp.float32(0)
    sums = jax.lax.fori_loop(0, count[0], add_row, len(u) * [start])
    for q, (total, maximum, denominator) in enumerate(sums):
        _store(aggregates[q], total / denominator, b, t)
        log_sum[q, b, t] = maximum + jnp.log(denominator)


def query_cotangent(
    u, sources, inv_rms, count, aggregates, log_sum, g, l, *, mean_count=None, interpret=False
) -> tuple[tuple[Array, ...], Array]:
    """See tpu.query_cotangent."""
    options = {"mean_count": mean_count, "interpret": interpret}
    if len(u) > queries_at_once(sources.shape[3]):
        split = zip(*(_groups(x, sources) for x in (u, aggregates, log_sum, g, l)), strict=True)
        parts = [
            query_cotangent(us, sources, inv_rms, count, made, sums, gs, ls, **options)
            for us, made, sums, gs, ls in split
        ]
        return sum((d_u for d_u, _ in parts), ()), jnp.concatenate([new_l for _, new_l in parts])
    _, b, t, d = sources.shape
    out_shape = len(u) * (jax.ShapeDtypeStruct((b, t, d), u[0].dtype),), _scalars(len(u), b, t)
    call = _call(_query_cotangent, (b, t), out_shape, vectors=3 * len(u) + 1, size=d, **options)
    return call(u, sources, inv_rms, count.reshape(1), aggregates, log_sum, g, l)


def _query_cotangent(u, sources, inv_rms, count, aggregates, log_sum, g, l, d_u, new_l):
    b, t = pl.program_id(0), pl.program_id(1)
    queries, cotangents = [_load(x, b, t) for x in u], [_load(x, b, t) for x in g]
    shifted = _less_aggregate(aggregates, cotangents, l, b, t)
    for q, value in enumerate(shifted):
        new_l[q, b, t] = value

    def add_row(k, totals):
        v, r = _load(sources, k, b, t), inv_rms[k, b, t]
        result = []
        for q, total in enumerate(totals):
            alpha = jnp.exp((queries[q] * v).sum() * r - log_sum[q, b, t])
            result.append(total + alpha * ((cotangents[q] * v).sum() + shifted[q]) * r * v)
        return result

    zeros = [Vector.zeros(sources.shape[3]) for _ in u]
    for q, total in enumerate(jax.lax.fori_loop(0, count[0], add_row, zeros)):
        _store(d_u[q], total, b, t)


def _less_aggregate(aggregates, cotangents, l, b, t) -> list[Array]:
    """l - g . aggregate for every query."""
    return [l[q, b, t] - (cotangents[q] * _load(x, b, t)).sum() for q, x in enumerate(aggregates)]


def add_source_cotangent(
    d_sources, u, sources, inv_rms, count, log_sum, g, l, *, mean_count=None, interpret=False
) -> Array:
    """See tpu.add_source_cotangent."""
    options = {"mean_count": mean_count, "interpret": interpret}
    if len(u) > queries_at_once(sources.shape[3]):
        for us, sums, gs, ls in zip(*(_groups(x, sources) for x in (u, log_sum, g, l)), strict=True):
            d_sources = add_source_cotangent(d_sources, us, sources, inv_rms, count, sums, gs, ls, **options)
        return d_sources
    before = () if d_sources is None else (d_sources,)
    out_shape = jax.ShapeDtypeStruct(sources.shape, sources.dtype)
    options |= {"input_output_aliases": {0: 0} if before else {}}
    call = _call(
        _add_source_cotangent, sources.shape[1:3], out_shape, vectors=2 * len(u) + 2, size=sources.shape[3], **options
    )
    return call(before, u, sources, inv_rms, count.reshape(1), log_sum, g, l)


def _add_source_cotangent(before, u, sources, inv_rms, count, log_sum, g, l, d_sources):
    b, t = pl.program_id(0), pl.program_id(1)
    queries, cotangents = [_load(x, b, t) for x in u], [_load(x, b, t) for x in g]

    def add_to_row(k, carry):
        v, r = _load(sources, k, b, t), inv_rms[k, b, t]
        total = sum((_load(x, k, b, t) for x in before), Vector.zeros(sources.shape[3]))
        for q, (query, cotangent) in enumerate(zip(queries, cotangents, strict=True)):
            score = (query * v).sum() * r
            alpha = jnp.exp(score - log_sum[q, b, t])
            s_r = alpha * ((cotangent * v).sum() + l[q, b, t]) * r
            total += alpha * cotangent + s_r * query - s_r * score * r / sources.shape[3] * v
        _store(d_sources, total, k, b, t)
        return carry

    jax.lax.fori_loop(0, count[0], add_to_row, 0)
    if not before:
        jax.lax.fori_loop(count[0], sources.shape[0], functools.partial(_clear_row, d_sources, b, t), 0)


def cotangents(
    d_sources, u, sources, inv_rms, count, aggregates, log_sum, g, l, *, mean_count=None, interpret=False
) -> tuple[Array, tuple[Array, ...]]:
    """See tpu.cotangents."""
    options = {"mean_count": mean_count, "interpret": interpret}
    if len(u) > queries_at_once(sources.shape[3]):
        d_u = ()
        for us, made, sums, gs, ls in zip(*(_groups(x, sources) for x in (u, aggregates, log_sum, g, l)), strict=True):
            d_sources, d_us = cotangents(d_sources, us, sources, inv_rms, count, made, sums, gs, ls, **options)
            d_u += d_us
        return d_sources, d_u
    before = () if d_sources is None else (d_sources,)
    _, b, t, d = sources.shape
    programs = pl.cdiv(t, TOKENS_PER_PARTIAL_SUM)
    partial_sums = jax.ShapeDtypeStruct((b, programs, d), jnp.float32)
    out_shape = jax.ShapeDtypeStruct(sources.shape, sources.dtype), len(u) * (partial_sums,)
    options |= {"input_output_aliases": {0: 0} if before else {}}
    call = _call(_cotangents, (b, programs), out_shape, vectors=3 * len(u) + 2, size=d, **options)
    d_sources, d_u = call(before, u, sources, inv_rms, count.reshape(1), aggregates, log_sum, g, l)
    return d_sources, tuple(jnp.sum(x, axis=1, keepdims=True) for x in d_u)


def _cotangents(before, u, sources, inv_rms, count, aggregates, log_sum, g, l, d_sources, d_u):
    b, program = pl.program_id(0), pl.program_id(1)
    queries = [_load(x, b, 0) for x in u]

    def add_token(t, totals):
        cotangents = [_load(x, b, t) for x in g]
        shifted = _less_aggregate(aggregates, cotangents, l, b, t)

        def add_row(k, totals):
            v, r = _load(sources, k, b, t), inv_rms[k, b, t]
            d_row, result = sum((_load(x, k, b, t) for x in before), Vector.zeros(sources.shape[3])), []
            for q, (query, cotangent, total) in enumerate(zip(queries, cotangents, totals, strict=True)):
                score = (query * v).sum() * r
                alpha = jnp.exp(score - log_sum[q, b, t])
                s_r = alpha * ((cotangent * v).sum() + shifted[q]) * r
                d_row += alpha * cotangent + s_r * query - s_r * score * r / sources.shape[3] * v
                result.append(total + s_r * v)
            _store(d_sources, d_row, k, b, t)
            return result

        totals = jax.lax.fori_loop(0, count[0], add_row, totals)
        if not before:
            jax.lax.fori_loop(count[0], sources.shape[0], functools.partial(_clear_row, d_sources, b, t), 0)
        return totals

    start = program * TOKENS_PER_PARTIAL_SUM
    end = jnp.minimum(start + TOKENS_PER_PARTIAL_SUM, sources.shape[2])
    zeros = [Vector.zeros(sources.shape[3]) for _ in u]
    for q, total in enumerate(jax.lax.fori_loop(start, end, add_token, zeros)):
        _store(d_u[q], total, b, program)


def _clear_row(d_sources, b, t, k, carry):
    _store(d_sources, Vector.zeros(d_sources.shape[3]), k, b, t)
    return carry


def sublayer_input(u, values, columns, modulation, *, interpret=False) -> tuple[Array]:
    """See tpu.sublayer_input."""
    b, t, d = values[0].shape
    out_shape = (jax.ShapeDtypeStruct(values[0].shape, values[0].dtype),)
    call = _call(_sublayer_input, (b, t), out_shape, vectors=len(values) + 2, size=d, interpret=interpret)
    return tuple(call(u, values, columns, modulation))


def _sublayer_input(u, values, columns, modulation, x):
    b, t = pl.program_id(0), pl.program_id(1)
    normal = _merge(u, values, columns, b, t)[-2]
    shift, scale = (_load(m, b, t) for m in modulation)
    _store(x, normal * (1 + scale) + shift, b, t)


def sublayer_input_cotangents(
    u, values, columns, modulation, g, d_recent, *, interpret=False
) -> tuple[tuple[Array, ...], ...]:  # fmt: skip
    """See tpu.sublayer_input_cotangents."""
    b, t, d = values[0].shape
    programs = pl.cdiv(t, TOKENS_PER_PARTIAL_SUM)
    partial_sums = jax.ShapeDtypeStruct((b, programs, d), jnp.float32)
    d_u = tuple(partial_sums if x.shape[1] == 1 else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in u)
    d_values = tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values)
    out_shape = d_u, d_values, (jax.ShapeDtypeStruct((b, t), jnp.float32),), 2 * (partial_sums,)
    aliases = {len(u) + len(values) + len(columns) + 3 + r: len(u) + 1 + r for r in range(len(d_recent))}
    options = {"input_output_aliases": aliases, "interpret": interpret}
    call = _call(
        _sublayer_input_cotangents, (b, programs), out_shape, vectors=2 * len(values) + 5, size=d, **options
    )  # fmt: skip
    d_u, d_values, d_log_sum, d_modulation = call(u, values, columns, modulation, g, d_recent)
    d_u = tuple(d if x.shape[1] > 1 else jnp.sum(d, axis=1, keepdims=True) for d, x in zip(d_u, u, strict=True))
    return d_u, d_values, d_log_sum, tuple(jnp.sum(d, axis=1, keepdims=True) for d in d_modulation)


def _sublayer_input_cotangents(
    u, values, columns, modulation, g, d_recent, d_u, d_values, d_log_sum, d_modulation
):  # fmt: skip
    b, program = pl.program_id(0), pl.program_id(1)
    tokens = values[0].shape[1]
    is_shared = bool(u) and d_u[0].shape[1] < tokens
    scale = _load(modulation[1], b, 0)

    def add_token(t, sums):
        query, loaded, scores, alpha, normal, inverse_deviation = _merge(u, values, columns, b, t)
        cotangent = _load(g[0], b, t)
        g_normal = cotangent * (1 + scale)
        size = values[0].shape[-1]
        g_h = g_normal - g_normal.sum() / size - normal * ((g_normal * normal).sum() / size)
        g_h = g_h * inverse_deviation
        dots = [(g_h * v).sum() for v in loaded]
        along_h = sum(a * dot for a, dot in zip(alpha, dots, strict=True))
        d_scores = [a * (dot - along_h) for a, dot in zip(alpha, dots, strict=True)]
        d_log_sum[0][b, t] = d_scores[0]
        _store(d_values[0], alpha[0] * g_h, b, t)
        d_query = Vector.zeros(size)
        for k in range(1, len(values)):
            r = columns[k][b, t]
            d_score = d_scores[k] * r
            total = _load(d_recent[k - 1], b, t) + alpha[k] * g_h
            total += d_score * query - (d_score * scores[k] * r / size) * loaded[k]
            _store(d_values[k], total, b, t)
            d_query += d_score * loaded[k]
        if u and not is_shared:
            _store(d_u[0], d_query, b, t)
        terms = [cotangent, cotangent * normal, *([d_query] if is_shared else [])]
        return [total + term for total, term in zip(sums, terms, strict=True)]

    start, end = program * TOKENS_PER_PARTIAL_SUM, jnp.minimum((program + 1) * TOKENS_PER_PARTIAL_SUM, tokens)
    sums = jax.lax.fori_loop(start, end, add_token, [Vector.zeros(values[0].shape[-1]) for _ in range(2 + is_shared)])
    for ref, total in zip([*d_modulation, *(d_u if is_shared else ())], sums, strict=True):
        _store(ref, total, b, program)


def _merge(u, values, columns, b, t):
    """The query, the values, their scores and weights, (h - mean) / deviation of the merged state h, 1 / deviation."""
    size = values[0].shape[-1]
    query = _load(u[0], b, t) if u else None
    loaded = [_load(v, b, t) for v in values]
    scores = [columns[0][b, t]] + [(query * v).sum() * r[b, t] for v, r in zip(loaded[1:], columns[1:], strict=True)]
    largest = functools.reduce(jnp.maximum, scores)
    weights = [jnp.exp(score - largest) for score in scores]
    alpha = [w / sum(weights) for w in weights]
    h = sum(a * v for a, v in zip(alpha, loaded, strict=True))
    mean = h.sum() / size
    places = [first + jnp.arange(n) for first, n in parts_of(size)]
    parts = (jnp.where(i < size, part - mean, 0.0) for i, part in zip(places, h.parts, strict=True))
    centred = Vector(*parts) if size % LEAST_PART else h - mean
    inverse_deviation = jax.lax.rsqrt((centred * centred).sum() / size + EPS)
    return query, loaded, scores, alpha, centred * inverse_deviation, inverse_deviation


def _call(kernel, grid, out_shape, *, vectors: int, size: int, mean_count: float | None = None, **options):
    """A function that runs a kernel whose programs hold so many vectors of so many features at a time.

    It declares the bytes that cross the memory once: of the history, `[K, B, T, D]`, `mean_count` rows, None being all.
    What the kernel computes is little beside them, and is declared as nothing.
    """
    params = triton.CompilerParams(num_warps=warps_for(vectors, size))

    def crossing(x) -> float:
        rows = x.shape[0] if mean_count is None or len(x.shape) < 4 else mean_count
        return rows * math.prod(x.shape[1:]) * x.dtype.itemsize

    def run(*args):
        cost = pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=int(sum(map(crossing, jax.tree.leaves((args, out_shape)))))
        )
        return pl.pallas_call(
            kernel, grid=grid, out_shape=out_shape, compiler_params=params, cost_estimate=cost, **options
        )(*args)  # fmt: skip

    return run


def _groups(x, sources) -> list:
    """What belongs to the queries, a tuple of arrays or an array `[Q, ...]`, in groups that a program takes."""
    size = queries_at_once(sources.shape[3])
    return [x[i : i + size] for i in range(0, len(x), size)]


def _scalars(queries: int, batch: int, tokens: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((queries, batch, tokens), jnp.float32)


def _load(ref, *index) -> Vector:
    """The vector at `index`; an axis of one entry is shared by all tokens."""
    index = tuple(jnp.int32(0) if size == 1 else i for i, size in zip(index, ref.shape, strict=False))
    size, parts = ref.shape[-1], []
    for first, length in parts_of(size):
        at = ref.at[(*index, pl.ds(first, length))]
        is_whole = first + length <= size
        mask = None if is_whole else first + jnp.arange(length) < size
        parts.append(triton.load(at, mask=mask, other=None if is_whole else 0.0).astype(jnp.float32))
    return Vector(*parts)


def _store(ref, vector: Vector, *index) -> None:
    size = ref.shape[-1]
    for (first, length), part in zip(parts_of(size), vector.parts, strict=True):
        mask = None if first + length <= size else first + jnp.arange(length) < size
        triton.store(ref.at[(*index, pl.ds(first, length))], part.astype(ref.dtype), mask=mask)
