"""A residual checkpoint becomes a routed model, with the same function where that is possible.

LayerNorm(x / c) = LayerNorm(x) up to its epsilon, and every sublayer and the head begin with one that is scale-free.
Uniform routing over all earlier outputs, or over chunk sums and the current chunk's outputs, hands on the residual
stream divided by the number of sources, so the pretrained weights compute what they did.

Routing is uniform where the folded query u = q * g / sqrt(D) is zero (queries.py). For `static` and `dynamic` q = 0
and the norm's scale g = 1, as in a fresh model. For `static_t`, q = w + e(t), and e(t) is zero only in a fresh model:
here the timestep embedder is trained and adaLN depends on it. So there g = 0. The gradient of u still reaches g,
because q = e(t) is not zero, and from the second step on it reaches w and e(t) through g. (With q and g both zero,
neither would ever move.)
"""

import jax
import jax.numpy as jnp

from dar_jax.routing.sources import Layout


def keeps_function(layout: Layout) -> bool:
    """Whether uniform routing hands on the residual stream up to a factor: whether `warm_start` is exact.

    It is for S = 1 and for sums. Last outputs forget the rest of a finished chunk; with one chunk none is finished
    before the final aggregator, which then must see the chunk in full.
    """
    single = layout.num_steps == 1 and layout.final != "summaries"
    return layout.chunk_size == 1 or layout.summary == "sum" or single


def warm_start(params: dict, layout: Layout, query: str) -> dict:
    """Parameters of a DAR model with the blocks, embedders and head of a residual one and uniform routing.

    Args:
      params: of a residual `models.SiT` (unboxed): its blocks are stacked `[depth, ...]` in stack/steps/block_0.
      layout: of the routed model, of the same depth. Where `keeps_function(layout)`, the routed model computes the
        same function up to LayerNorm's epsilon; elsewhere only a start that training has to mend.
      query: "static", "static_t" or "dynamic".

    Returns:
      The params tree of the routed model: block i of every step is stacked `[num_steps, ...]` in
      stack/steps/block_i, aggregator j in stack/steps/query_j.
    """
    stacked = params["stack"]["steps"]["block_0"]
    size = params["patch"]["bias"].shape[-1]
    num_steps, blocks_per_step = layout.num_steps, layout.sublayers_per_step // 2

    def block(i: int) -> dict:  # a step holds consecutive blocks
        return jax.tree.map(lambda x: x.reshape(num_steps, blocks_per_step, *x.shape[1:])[:, i], stacked)

    def uniform(*leading: int) -> dict:
        scale = jnp.full((*leading, size), 0.0 if query == "static_t" else 1.0)
        if query == "dynamic":
            return {"scale": scale, "kernel": jnp.zeros((*leading, size, size))}
        return {"scale": scale, "weight": jnp.zeros((*leading, size))}

    steps = {f"block_{i}": block(i) for i in range(blocks_per_step)}
    steps |= {f"query_{j}": uniform(num_steps) for j in range(layout.sublayers_per_step)}
    stack = {"steps": steps} | ({} if layout.final == "shared" else {"final_query": uniform()})
    return {**params, "stack": stack}
