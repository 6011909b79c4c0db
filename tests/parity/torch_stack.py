"""The routed and the residual stack in PyTorch, unrolled over sublayers with plain autodiff, as the paper writes them.

Shares no code with dar_jax: lists of sources, explicit chunk sets, no buffer. Parameters come as the nested dict of
linen, with a leading axis for the scan's steps.
"""

import math

import torch
import torch.nn.functional as F


def source_sets(depth, chunk_size, final):
    """Source names of every aggregator (paper Eq. 7 and 11): ("c", n) summaries and ("v", l) sublayer outputs."""
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


def index(tree, i):
    return {k: index(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]


def linear(x, p):
    kernel = p["kernel"].flatten(1)
    return x @ kernel + (p["bias"].flatten() if "bias" in p else 0)


def modulated_norm(h, shift, scale):
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


def sublayer(p, h, condition, num_heads, l):
    """f_l(h; t): the whole adaLN-Zero branch of sublayer l (odd: attention, even: MLP) without the residual add."""
    modulation = linear(F.silu(condition), p["adaln"])[:, None].chunk(6, dim=-1)
    shift, scale, gate = modulation[:3] if l % 2 else modulation[3:]
    x = modulated_norm(h, shift, scale)
    if l % 2:
        b, t, d = x.shape
        q, k, v = linear(x, p["attention"]["qkv"]).reshape(b, t, 3, num_heads, d // num_heads).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d // num_heads)
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(b, t, d)
        return gate * linear(out, p["attention"]["out"])
    hidden = F.gelu(linear(x, p["mlp"]["dense_0"]), approximate="tanh")
    return gate * linear(hidden, p["mlp"]["dense_1"])


def attend(sources, p, query, e_t):
    """Softmax over a list of sources [B, T, D] with RMSNorm keys (Eq. 5, 6): state [B, T, D], weights [K, B, T]."""
    values = torch.stack(sources)
    keys = values / torch.sqrt((values**2).mean(-1, keepdim=True) + 1e-6) * p["scale"]
    timed = {"static_t": e_t[:, None], "gated_t": p.get("gate", 0) * e_t[:, None]}.get(query, 0)
    q = sources[-1] @ p["kernel"] if query == "dynamic" else p["weight"] + timed
    alpha = ((q * keys).sum(-1) / math.sqrt(values.shape[-1])).softmax(0)
    return (alpha[..., None] * values).sum(0), alpha


def routed_stack(params, layout, query, num_heads, v_0, condition, e_t, on_read=lambda h: h):
    """Returns the head's state [B, T, D], all values by source name, and the weights of the L + 1 aggregators.

    `on_read` is shown every aggregated state and returns what is read instead.
    """
    values, weights = {("c", 0): v_0}, []
    per_step = sum(name.startswith("query_") for name in params["steps"])
    for l, names in enumerate(source_sets(layout.depth, layout.chunk_size, layout.final), start=1):
        is_final = l > 2 * layout.depth
        step, position = divmod(l - 1 - (is_final and layout.final == "shared"), per_step)
        if is_final and layout.final != "shared":
            p_query = params["final_query"]
        else:
            p_query = index(params["steps"][f"query_{position}"], step)
        h, alpha = attend([values[name] for name in names], p_query, query, e_t)
        weights.append(alpha)
        h = on_read(h)
        if is_final:
            return h, values, weights
        block = index(params["steps"][f"block_{position // 2}"], step)
        values["v", l] = sublayer(block, h, condition, num_heads, l)
        n, rest = divmod(l, layout.chunk_size)
        if rest == 0:
            outputs = [values["v", i] for i in range(l - layout.chunk_size + 1, l + 1)]
            values["c", n] = sum(outputs) if layout.summary == "sum" else outputs[-1]


def residual_stack(params, depth, num_heads, h, condition):
    for k in range(depth):
        block = index(params["steps"]["block_0"], k)
        for l in (1, 2):
            h = h + sublayer(block, h, condition, num_heads, l)
    return h


def long_skip_stack(params, depth, num_heads, h, condition):
    """U-ViT: what the head reads, and the streams after the blocks."""
    streams, half = [], depth // 2
    for i in range(depth):
        steps, j = (params["steps"], i) if i < half else (params["skip_steps"], i - half)
        if i >= half:
            h = linear(torch.cat([h, streams[depth - 1 - i]], dim=-1), index(steps["skip"], j))
        for l in (1, 2):
            h = h + sublayer(index(steps["block_0"], j), h, condition, num_heads, l)
        streams.append(h)
    return h, streams


def dense_former_stack(params, depth, num_heads, h, condition):
    """What the head reads, and what is handed on after the blocks."""
    streams, handed_on, weights = [h], [], list(params["weights"])
    for i in range(depth):
        for l in (1, 2):
            h = h + sublayer(index(params["steps"]["block_0"], i), h, condition, num_heads, l)
        streams.append(h)
        h = sum(weights.pop(0) * stream for stream in streams)
        handed_on.append(h)
    return h, handed_on


def delta_stack(params, layout, query, num_heads, v_0, condition, e_t):
    """The residual stream plus a gated correction that routing makes: what the head reads."""
    values, stream = {("c", 0): v_0}, v_0
    per_step = sum(name.startswith("query_") for name in params["steps"])
    for l, names in enumerate(source_sets(layout.depth, layout.chunk_size, layout.final), start=1):
        step, position = divmod(l - 1, per_step)
        if l > 2 * layout.depth:
            own = params["final_query"], params["final_gate"]
        else:
            own = (index(params["steps"][f"{name}_{position}"], step) for name in ("query", "gate"))
        p_query, gate = own
        h = stream + gate * attend([values[name] for name in names], p_query, query, e_t)[0]
        if l > 2 * layout.depth:
            return h
        block = index(params["steps"][f"block_{position // 2}"], step)
        values["v", l] = sublayer(block, h, condition, num_heads, l)
        stream = stream + values["v", l]
        if l % layout.chunk_size == 0:
            values["c", l // layout.chunk_size] = sum(values["v", i] for i in range(l - layout.chunk_size + 1, l + 1))


def hyper_stack(params, depth, num_heads, lanes, kind, v_0, condition):
    """Hyper-connections with n lanes: what the head reads, and the means of the lanes after the blocks."""
    streams, means = v_0[:, :, None].repeat(1, 1, lanes, 1), []  # [B, T, n, D]
    for i in range(depth):
        for j in (0, 1):
            if kind == "hyper":
                read, mix, write = (params[name][i, j] for name in ("read", "mix", "write"))
            else:
                read, mix, write = token_connection(index(params["steps"][f"connection_{j}"], i), streams, kind)
            output = sublayer(index(params["steps"]["block_0"], i), (read[..., None] * streams).sum(2), condition,
                              num_heads, j + 1)  # fmt: skip
            streams = mix @ streams + write[..., None] * output[:, :, None]
        means.append(streams.mean(2))
    return means[-1], means


def token_connection(p, streams, kind):
    """Read [B, T, n], mix [B, T, n, n] and write [B, T, n] of manifold-constrained hyper-connections."""
    b, t, n, size = streams.shape
    x = streams.flatten(2)
    x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * p["norm"].flatten()
    found = x @ p["kernel"].reshape(n * size, -1)
    read = torch.sigmoid(p["gain"][0] * found[..., :n] + p["bias"][:n])
    write = 2 * torch.sigmoid(p["gain"][1] * found[..., n : 2 * n] + p["bias"][n : 2 * n])
    if kind == "identity_hyper":
        return read, torch.eye(n, dtype=x.dtype), write
    mix = torch.exp(p["gain"][2] * found[..., 2 * n :] + p["bias"][2 * n :]).reshape(b, t, n, n)
    for _ in range(20):
        mix = mix / mix.sum(-1, keepdim=True)
        mix = mix / mix.sum(-2, keepdim=True)
    return read, mix, write
