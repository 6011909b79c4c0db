"""The stack of double-stream blocks, text and image, each stream residual or routed, as scans with plain autodiff.

A block has two pairs of sublayers, and a stream has one of each pair. What a sublayer reads and what becomes of its
output is the business of the stream's kind. A routed stream has a history of its own: a joint one would be ill-posed,
because the streams have different tokens.

The parameters of the blocks are the same whatever the streams are, so that one copy serves a residual and a routed
model. The plain form of routed streams makes the parameters and is the reference for the fused form
(fused_streams.py), which models use: the gradient of a loss through the plain form takes memory that is quadratic in
depth.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.models.fused_streams import NAMES, FusedStep, fused_streams
from dar_jax.models.layers import constrain, modulated_norm, scan_steps
from dar_jax.models.plain_stack import show, source_weights, weighted
from dar_jax.routing import SUMMARIES, Layout, Query

STREAMS = ("image", "both")


@dataclasses.dataclass(frozen=True)
class Residual:
    """A residual stream: the state is the sum of v_0 and all outputs, `[B, T, D]`. It has no aggregators."""

    num_queries = 0

    def start(self, v_0: Array) -> Array:
        return v_0

    def read(self, state: Array, query: tuple, e_t: Array, sublayer: Array) -> tuple[Array, None]:
        return state, None

    def write(self, state: Array, sublayer: Array, output: Array) -> Array:
        return constrain(state + output)

    def read_by_head(
        self, state: Array, query: Callable[[Array, Array], Array] | None, e_t: Array
    ) -> tuple[Array, None]:
        return state, None


@dataclasses.dataclass(frozen=True)
class Routed:
    """A routed stream: the state is its sources `[K + R, B, T, D]`.

    First come the K rows of the history (routing/sources.py), then the places of the R outputs of the current chunk,
    none if dense. Places not yet filled, or filled in an earlier chunk, are masked.

    Attributes:
      layout: of depth N blocks, 2 N sublayers.
      query: of the aggregators.
      num_queries: aggregators of sublayers: all, or all but the last where nothing reads its output.
    """

    layout: Layout
    query: type[Query]
    num_queries: int

    @property
    def num_recent(self) -> int:
        return self.layout.chunk_size if self.layout.chunk_size > 1 else 0

    def start(self, v_0: Array) -> Array:
        sources = jnp.zeros((self.layout.num_rows + self.num_recent, *v_0.shape), v_0.dtype)
        return constrain(sources.at[0].set(v_0))

    def read(self, sources: Array, query: dict, e_t: Array, sublayer: Array) -> tuple[Array, Array]:
        """What a sublayer (0-based) reads: the aggregate of what was written before, `[B, T, D]`, and `by_position`.

        `query` are the parameters of its aggregator.
        """
        rows, chunk_size = self.layout.num_rows, self.layout.chunk_size
        chunk, position = sublayer // chunk_size, sublayer % chunk_size
        newest = jnp.where(position == 0, chunk, rows + position - 1)
        u = self.query(parent=None).apply({"params": query}, e_t, sources[newest])
        place = jnp.arange(len(sources))
        weights = source_weights(u, sources, jnp.where(place < rows, place <= chunk, place - rows < position))
        positions = jnp.where(place < rows, place * chunk_size, chunk * chunk_size + 1 + place - rows)
        return weighted(sources, weights), self.by_position(weights, positions)

    def by_position(self, weights: Array, positions: Array) -> Array:
        """Weights of sources `[K, B, T]` by the sublayer that made them, 0 for v_0: `[2 * depth + 1, B, T]`."""
        empty = jnp.zeros((2 * self.layout.depth + 1, *weights.shape[1:]), weights.dtype)
        return empty.at[positions].add(weights)

    def write(self, sources: Array, sublayer: Array, output: Array) -> Array:
        """The sources with the output of a sublayer. The summary of an unfinished chunk is there but not read."""
        rows, chunk_size = self.layout.num_rows, self.layout.chunk_size
        if chunk_size == 1:
            return sources.at[1 + sublayer].set(output)
        sources = sources.at[rows + sublayer % chunk_size].set(output)
        return sources.at[1 + sublayer // chunk_size].set(SUMMARIES[self.layout.summary].of(tuple(sources[rows:])))

    def read_by_head(self, sources: Array, query: Callable[[Array, Array], Array], e_t: Array) -> tuple[Array, Array]:
        """What the head reads after all sublayers, `[B, T, D]`, and `by_position`."""
        rows, chunk_size = self.layout.num_rows, self.layout.chunk_size
        positions = chunk_size * jnp.arange(rows)
        if self.num_recent and self.layout.final_set.sees_outputs:
            sources = jnp.delete(sources, rows - 1, 0)
            last = 2 * self.layout.depth - chunk_size + 1 + jnp.arange(chunk_size)
            positions = jnp.concatenate([positions[:-1], last])
        sources = sources[: len(positions)]
        weights = source_weights(query(e_t, sources[-1]), sources, jnp.ones(len(sources), bool))
        return weighted(sources, weights), self.by_position(weights, positions)


Kind = Residual | Routed


def stream_kinds(layout: Layout | None, query: type[Query], streams: str) -> tuple[Kind, Kind]:
    """The kinds of the text and the image stream.

    Args:
      layout: structure of the routing; None: both are residual.
      query: of the aggregators.
      streams: one of `STREAMS`: which are routed. Nothing reads the text after the last block, and so its last MLP has
        no aggregator, which would never get a gradient.
    """
    if streams not in STREAMS:
        raise ValueError(f'streams = "{streams}" must be one of {STREAMS}.')
    if layout is None:
        return Residual(), Residual()
    text = Routed(layout, query, 2 * layout.depth - 1) if streams == "both" else Residual()
    return text, Routed(layout, query, 2 * layout.depth)


class Step(nn.Module):
    """One block. It keeps what the image stream of block k + 1 reads, for each k of `hidden_at`.

    It shows the image stream as the stacks of plain_stack.py do.
    """

    block: Callable[..., nn.Module]
    kinds: tuple[Kind, Kind]
    hidden_at: tuple[int, ...]

    @nn.compact
    def __call__(self, carry: tuple, index: Array, queries: tuple, e_t: Array, by: tuple, key_mask: Array) -> tuple:
        states, kept = carry
        for j, (sublayers, modulations) in enumerate(self.block(name="block_0").pairs(e_t, by, key_mask)):
            sublayer = 2 * index + j
            reads, weights = zip(
                *(
                    kind.read(state, jax.tree.map(lambda p: p[j], query), e_t, sublayer)  # noqa: B023
                    for kind, state, query in zip(self.kinds, states, queries, strict=True)
                ),
                strict=True,
            )
            if j == 0:
                kept = tuple(jnp.where(index == k, reads[-1], old) for k, old in zip(self.hidden_at, kept, strict=True))
            reads = *reads[:-1], show(self, j, reads[-1])
            outputs = sublayers(
                *(modulated_norm(h, shift, scale) for h, (shift, scale, _) in zip(reads, modulations, strict=True))
            )
            outputs = [constrain(gate * output) for output, (_, _, gate) in zip(outputs, modulations, strict=True)]
            self.sow("intermediates", "outputs", outputs[-1])
            if weights[-1] is not None:
                self.sow("intermediates", "weights", weights[-1])
            states = tuple(
                kind.write(state, sublayer, output)
                for kind, state, output in zip(self.kinds, states, outputs, strict=True)
            )
        return (states, kept), None


class Stack(nn.Module):
    """`depth` blocks on text and image, `[B, L, D]` and `[B, T, D]` -> what the head reads of the image, `[B, T, D]`.

    Also returns what the image stream of the block after each block of `hidden_at` reads, `[B, T, D]`.
    """

    block: Callable[..., nn.Module]
    depth: int
    remat: str
    kinds: tuple[Kind, Kind]
    implementation: str
    plain: bool

    @nn.compact
    def __call__(
        self, v_0: tuple[Array, Array], e_t: Array, by: tuple, key_mask: Array, hidden_at: tuple[int, ...] = ()
    ) -> tuple[Array, tuple[Array, ...]]:
        queries = tuple(self._queries(*of) for of in zip(NAMES, self.kinds, v_0, (e_t, e_t), strict=True))
        is_routed = any(kind.num_queries for kind in self.kinds)
        if is_routed and not (self.plain or self.is_initializing()):
            step = FusedStep(self.block, self.kinds, self.implementation, parent=None)
            params = {"block": nn.meta.unbox(self.variables["params"])["steps"]["block_0"]}
            params |= {f"{name}_query": of for name, of in zip(NAMES, queries, strict=True) if of}
            final_query, inputs = self._final_query(queries[-1]), (v_0, e_t, by, key_mask)
            return fused_streams((step, self.remat), params, final_query, inputs, hidden_at)
        step = nn.remat(Step, prevent_cse=False) if is_routed or self.remat == "block" else Step
        in_axes = 0, 0, *3 * (nn.broadcast,)
        steps = scan_steps(step, self.depth, in_axes)(self.block, self.kinds, hidden_at, name="steps")
        states = tuple(kind.start(v) for kind, v in zip(self.kinds, v_0, strict=True))
        kept = tuple(jnp.zeros_like(v_0[-1]) for _ in hidden_at)
        (states, kept), _ = steps((states, kept), jnp.arange(self.depth), queries, e_t, by, key_mask)
        h, weights = self.kinds[-1].read_by_head(states[-1], self._final_query(queries[-1]), e_t)
        self.sow("intermediates", "outputs", v_0[-1])
        if weights is not None:
            self.sow("intermediates", "weights", weights)
        return show(self, 0, h), kept

    def _queries(self, stream: str, kind: Kind, v_0: Array, e_t: Array) -> dict | tuple:
        """Parameters of a stream's aggregators, `[depth, 2, ...]`; zeros stand for an aggregator that it lacks."""
        if not kind.num_queries:
            return ()
        stacked = nn.vmap(
            kind.query,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=kind.num_queries,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(name=f"{stream}_query")
        if self.is_initializing():
            stacked(e_t, v_0)

        def by_block(p: Array) -> Array:
            p = jnp.pad(p, ((0, 2 * self.depth - len(p)), *(p.ndim - 1) * ((0, 0),)))
            return p.reshape(self.depth, 2, *p.shape[1:])

        return jax.tree.map(by_block, nn.meta.unbox(stacked.variables["params"]))

    def _final_query(self, image_queries: dict | tuple) -> Callable[[Array, Array], Array] | None:
        """The query of the head's aggregator: one of its own, or that of the image's last sublayer."""
        image = self.kinds[-1]
        if not image.num_queries:
            return None
        if image.layout.final_set.has_query:
            return image.query(name="final_query")
        params = jax.tree.map(lambda p: p[-1, -1], image_queries)
        return partial(image.query(parent=None).apply, {"params": params})
