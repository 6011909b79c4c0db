"""A whole SiT in PyTorch on linen parameters, unrolled, which shows every state that a sublayer or the head reads."""

import math

import torch
import torch.nn.functional as F

from tests.parity import torch_sit, torch_stack
from tests.parity.torch_stack import linear


def residual_stack(params, depth, num_heads, v_0, condition, gates):
    """Every reader sums its own gated sources. Returns the A states and the A values, each [B, T, D].

    gates: [A, A] by reader and source; with ones this is the ordinary residual stream.
    """
    states, values = [], [v_0]
    for l in range(1, 2 * depth + 2):
        h = sum(gates[l - 1, i] * v for i, v in enumerate(values))
        states.append(h)
        if l <= 2 * depth:
            block = torch_stack.index(params["steps"]["block_0"], (l - 1) // 2)
            values.append(torch_stack.sublayer(block, h, condition, num_heads, l))
    return states, values


def routed_reads(params, layout, query, num_heads, v_0, condition, e_t):
    """The A states, each a node of the graph, and the weights [A, A, B, T] by reader and source position."""
    states = []
    _, _, found = torch_stack.routed_stack(
        params, layout, query, num_heads, v_0, condition, e_t, on_read=lambda h: states.append(h) or h
    )
    sets = torch_stack.source_sets(layout.depth, layout.chunk_size, layout.final)
    weights = torch.zeros(len(sets), len(sets), *found[0].shape[1:], dtype=v_0.dtype)
    for l, (names, alpha) in enumerate(zip(sets, found, strict=True)):
        for (kind, i), a in zip(names, alpha, strict=True):
            weights[l, i * layout.chunk_size if kind == "c" else i] = a
    return states, weights


def embed(params, model, x, t, y, frequencies=None, positions=None):
    """v_0 [B, T, D], the condition and e(t) [B, D] of x [B, H, W, C].

    The frequencies of t and the table of positions may be given, because libraries round float32 differently.
    """
    frequencies = 10000.0 ** (-torch.arange(128, dtype=x.dtype) / 128) if frequencies is None else frequencies
    angle = t[:, None] * frequencies
    features = torch.cat([angle.cos(), angle.sin()], dim=1)
    e_t = linear(F.silu(linear(features, params["timestep"]["dense_0"])), params["timestep"]["dense_1"])
    p, grid = model.patch_size, model.input_size // model.patch_size
    tokens = x.unflatten(2, (grid, p)).unflatten(1, (grid, p)).permute(0, 1, 3, 2, 4, 5).reshape(len(x), grid**2, -1)
    positions = torch_sit.position_embedding(grid, model.hidden_size) if positions is None else positions
    return linear(tokens, params["patch"]) + positions.to(x.dtype), e_t + params["label"]["table"][y], e_t


def head(params, model, h, condition):
    """The prediction [B, H, W, C] from the state that the head reads."""
    shift, scale = linear(F.silu(condition), params["head"]["adaln"])[:, None].chunk(2, dim=-1)
    out = linear(torch_stack.modulated_norm(h, shift, scale), params["head"]["dense"])
    p, grid = model.patch_size, math.isqrt(h.shape[1])
    return out.reshape(len(h), grid, grid, p, p, -1).transpose(2, 3).reshape(len(h), grid * p, grid * p, -1)
