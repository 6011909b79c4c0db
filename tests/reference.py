"""The routed stack as the paper writes it: unrolled over sublayers, lists of sources, plain autodiff."""

import jax
import jax.numpy as jnp

from dar_jax.models.layers import Block


def source_sets(depth, chunk_size, final):
    """Source names of every aggregator (paper Eq. 7 and 11): ("c", n) summaries and ("v", l) outputs."""
    num_sublayers = 2 * depth
    sets = []
    for l in range(1, num_sublayers + 1):
        n = (l - 1) // chunk_size + 1
        own = range((n - 1) * chunk_size + 1, l)
        sets.append([("c", i) for i in range(n)] + [("v", i) for i in own])
    num_chunks = num_sublayers // chunk_size
    if final == "summaries":
        sets.append([("c", i) for i in range(num_chunks + 1)])
    else:
        last = range((num_chunks - 1) * chunk_size + 1, num_sublayers + 1)
        sets.append([("c", i) for i in range(num_chunks)] + [("v", i) for i in last])
    return sets


def aggregator_params(params, layout, l):
    """Parameters of the aggregator before sublayer l (1-based), or of the final one for l = L + 1."""
    if l == 2 * layout.depth + 1:
        if layout.final != "shared":
            return params["final_query"]
        l -= 1
    step, position = divmod(l - 1, layout.sublayers_per_step)
    return jax.tree.map(lambda p: p[step], params["steps"][f"query_{position}"])


def attend(sources, params, kind, e_t):
    """Softmax over a list of sources `[B, T, D]` with RMSNorm keys, straight from Eq. 5 and 6."""
    values = jnp.stack(sources)
    keys = values / jnp.sqrt(jnp.mean(values**2, axis=-1, keepdims=True) + 1e-6) * params["scale"]
    if kind == "dynamic":
        query = sources[-1] @ params["project"]["kernel"]
    else:
        query = params["weight"] + (e_t[:, None] if kind == "static_t" else 0)
    scores = jnp.sum(query * keys, axis=-1) / jnp.sqrt(values.shape[-1])
    alpha = jax.nn.softmax(scores, axis=0)
    return jnp.sum(alpha[..., None] * values, axis=0), alpha


def unrolled_stack(params, block, layout, kind, v_0, condition, e_t):
    """Returns the head's state `[B, T, D]` and the routing weights of all L + 1 aggregators, each `[K_l, B, T]`."""
    module = Block(**block)
    values, weights = {("c", 0): v_0}, []
    sets = source_sets(layout.depth, layout.chunk_size, layout.final)
    for l, names in enumerate(sets, start=1):
        h, alpha = attend([values[n] for n in names], aggregator_params(params, layout, l), kind, e_t)
        weights.append(alpha)
        if l > 2 * layout.depth:
            return h, weights
        step, position = divmod(l - 1, layout.sublayers_per_step)
        p = {"params": jax.tree.map(lambda x: x[step], params["steps"][f"block_{position // 2}"])}  # noqa: B023
        modulation = module.apply(p, condition, method="modulation")
        branch = "attention_branch" if l % 2 else "mlp_branch"
        values["v", l] = module.apply(p, h, modulation, method=branch)
        n, end = divmod(l, layout.chunk_size)
        if end == 0:
            outputs = [values["v", i] for i in range(l - layout.chunk_size + 1, l + 1)]
            values["c", n] = sum(outputs) if layout.summary == "sum" else outputs[-1]
