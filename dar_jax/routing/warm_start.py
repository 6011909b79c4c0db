"""A residual checkpoint becomes a routed model, with the same function where that is possible.

LayerNorm(x / c) = LayerNorm(x) up to its epsilon, and every sublayer and the head begin with one that is scale-free.
Uniform routing over all earlier outputs, or over chunk sums and the current chunk's outputs, hands on the residual
stream divided by the number of sources, so the pretrained weights compute what they did. An additive reader adds that
to the stream itself, which is longer then, and nothing else.

Routing is uniform where the folded query u = q * g / sqrt(D) is zero (queries.py). In a fresh model q = 0 and the
norm's scale g = 1. A query that adds e(t) is zero only in a fresh model: here the timestep embedder is trained, and
adaLN depends on it. So there g = 0. The gradient of u still reaches g, because q = e(t) is not zero, and from the
second step on it reaches the other parameters of q and e(t) through g. (With q and g both zero, neither would ever
move.)
"""

import jax
import jax.numpy as jnp
from flax.core import meta

from dar_jax.routing.queries import Query
from dar_jax.routing.sources import Layout


def keeps_function(layout: Layout) -> bool:
    """Whether uniform routing hands on the residual stream up to a factor: whether `warm_start` is exact.

    It is for S = 1 and for sums. Last outputs forget the rest of a finished chunk; with one chunk none is finished
    before the final aggregator, which then must see the chunk in full.
    """
    return layout.keeps_outputs or (layout.num_steps == 1 and layout.final_set.sees_outputs)


def warm_start(params: dict, layout: Layout, query: type[Query]) -> dict:
    """Parameters of a DAR model with the blocks, embedders and head of a residual one and uniform routing.

    Args:
      params: of a residual `models.SiT` (unboxed): its blocks are stacked `[depth, ...]` in stack/steps/block_0.
      layout: of the routed model, of the same depth. Where `keeps_function(layout)`, the routed model computes the
        same function up to LayerNorm's epsilon; elsewhere only a start that training has to mend.
      query: of the routed model.

    Returns:
      The params tree of the routed model: block i of every step is stacked `[num_steps, ...]` in
      stack/steps/block_i, aggregator j in stack/steps/query_j, and the gate of an additive one in stack/steps/gate_j.
    """
    stacked = params["stack"]["steps"]["block_0"]
    num_steps, blocks_per_step = layout.num_steps, layout.sublayers_per_step // 2

    def block(i: int) -> dict:  # a step holds consecutive blocks
        return jax.tree.map(lambda x: x.reshape(num_steps, blocks_per_step, *x.shape[1:])[:, i], stacked)

    aggregator = _uniform_aggregator(query, params["patch"]["bias"].shape[-1])
    steps = {f"block_{i}": block(i) for i in range(blocks_per_step)}
    steps |= {f"query_{j}": _stack(aggregator, num_steps) for j in range(layout.sublayers_per_step)}
    stack = {"steps": steps} | ({"final_query": aggregator} if layout.final_set.has_query else {})
    if layout.is_additive:
        steps |= {f"gate_{j}": jnp.ones(num_steps) for j in range(layout.sublayers_per_step)}
        stack["final_gate"] = jnp.ones(())
    return {**params, "stack": stack}


def warm_start_streams(params: dict, layout: Layout, query: type[Query], streams: str) -> dict:
    """The same for a `models.mmdit.MMDiT` with its `streams`, "image" or "both".

    The blocks are those of `params`, not copies: a residual and a routed model may share them.
    """
    aggregator = _uniform_aggregator(query, params["image"]["bias"].shape[-1])
    queries = {"image_query": _stack(aggregator, 2 * layout.depth)}
    if streams == "both":
        queries["text_query"] = _stack(aggregator, 2 * layout.depth - 1)
    if layout.final_set.has_query:
        queries["final_query"] = aggregator
    return {**params, "stack": {**params["stack"], **queries}}


def _uniform_aggregator(query: type[Query], size: int) -> dict:
    """Parameters of an aggregator whose folded query is zero, but not the gradient of it."""
    fresh = meta.unbox(query().init(jax.random.key(0), jnp.zeros((1, size)), jnp.zeros((1, 1, size))))["params"]
    return uniform(fresh, query)


def uniform(aggregators: dict, query: type[Query]) -> dict:
    """Fresh parameters of aggregators, a tree of any depth, with g = 0 where q is not zero."""

    def start(path: tuple, leaf):
        return jnp.zeros_like(leaf) if query.adds_time and path[-1].key == "scale" else leaf

    return jax.tree_util.tree_map_with_path(start, aggregators)


def _stack(aggregator: dict, count: int) -> dict:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), aggregator)
