"""A routed MM-DiT in PyTorch, unrolled over blocks with plain autodiff: lists of sources, no buffer, no scan.

Shares no code with dar_jax. Parameters come as the nested dict of linen, in float64.
"""

import math

import torch
import torch.nn.functional as F

from tests.parity.torch_stack import attend, index, linear, modulated_norm, source_sets


class Stream:
    """A stream that its sublayers 1, 2, ... read and write in turn; `queries` are None where it is residual."""

    def __init__(self, v_0, layout, query, queries, final_query, e_t):
        self.layout, self.query, self.e_t = layout, query, e_t
        self.queries, self.final_query = queries, final_query
        self.outputs, self.values = [v_0], {("c", 0): v_0}

    def read(self, l):
        if self.queries is None:
            return sum(self.outputs)
        is_final = l > 2 * self.layout.depth
        has_own = is_final and self.layout.final != "shared"
        p = self.final_query if has_own else index(self.queries, l - 1 - is_final)
        names = source_sets(self.layout.depth, self.layout.chunk_size, self.layout.final)[l - 1]
        return attend([self.values[name] for name in names], p, self.query, self.e_t)[0]

    def write(self, output):
        self.outputs.append(output)
        l, size = len(self.outputs) - 1, self.layout.chunk_size
        self.values["v", l] = output
        if l % size == 0:
            chunk = self.outputs[-size:]
            self.values["c", l // size] = sum(chunk) if self.layout.summary == "sum" else chunk[-1]


def rms_norm(x, p):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * p["scale"]


def turn(x, positions, axes):
    """x [B, T, heads, d] as complex numbers, turned by the positions [T, 3] on the axes."""
    angles = [
        positions[:, [a]] * torch.exp(-math.log(10000) * 2 * torch.arange(n // 2, dtype=x.dtype) / n)
        for a, n in enumerate(axes)
    ]
    by = torch.cat([torch.polar(torch.ones_like(angle), angle) for angle in angles], dim=1)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * by[:, None]).flatten(-2)


def joint_attention(p, xs, positions, axes, num_heads, mask):
    """[text, image], each [B, T, D] -> the same; `mask` [B, L] of text tokens."""
    q, k, v = [], [], []
    for p_stream, x, position in zip(p, xs, positions, strict=True):
        heads = {name: linear(x, p_stream[name]).unflatten(-1, (num_heads, -1)) for name in "qkv"}
        q.append(turn(rms_norm(heads["q"], p_stream["q_norm"]), position, axes))
        k.append(turn(rms_norm(heads["k"], p_stream["k_norm"]), position, axes))
        v.append(heads["v"])
    q, k, v = (torch.cat(x, dim=1) for x in (q, k, v))
    is_read = F.pad(mask, (0, xs[1].shape[1]), value=True)[:, None, None]
    weights = torch.exp(torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])) * is_read
    out = torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), v).flatten(2)
    outs = out[:, : mask.shape[1]], out[:, mask.shape[1] :]
    return [linear(x, p_stream["out"]) for p_stream, x in zip(p, outs, strict=True)]


def mlp(p, x):
    return linear(F.gelu(linear(x, p["dense_0"]), approximate="tanh"), p["dense_1"])


def mmdit(params, layout, query, num_heads, axes, tokens, grid, text, mask, e_t):
    """Tokens [B, T, 4 C] and text [B, L, E] -> predictions of tokens, and what the image stream read before each block.

    Streams are routed where there are parameters of their aggregators.
    """
    stack = params["stack"]
    v_0 = linear(rms_norm(text, params["text_norm"]), params["text"]), linear(tokens, params["image"])
    streams = [
        Stream(v, layout, query, stack.get(f"{name}_query"), stack.get("final_query"), e_t)
        for name, v in zip(("text", "image"), v_0, strict=True)
    ]
    rows, columns = grid
    first = max(rows // 2, columns // 2)
    of_text = torch.tensor([[first + i] * 3 for i in range(text.shape[1])], dtype=text.dtype)
    of_image = [[0, r - math.ceil(rows / 2), c - math.ceil(columns / 2)] for r in range(rows) for c in range(columns)]
    positions = of_text, torch.tensor(of_image, dtype=text.dtype)
    entered = []
    for n in range(layout.depth):
        p = [index(stack["steps"]["block_0"], n)[name] for name in ("text", "image")]
        modulation = [linear(F.silu(e_t), p_stream["adaln"])[:, None].chunk(6, dim=-1) for p_stream in p]
        for half in (0, 1):
            triples = [m[3 * half : 3 * half + 3] for m in modulation]
            is_unread = half == 1 and n == layout.depth - 1  # by the text: nothing reads what it would write
            reads = [s.read(2 * n + 1 + half) if i or not is_unread else None for i, s in enumerate(streams)]
            if half == 0:
                entered.append(reads[1])
                xs = [modulated_norm(h, shift, scale) for h, (shift, scale, _) in zip(reads, triples, strict=True)]
                outs = joint_attention(p, xs, positions, axes, num_heads, mask)
            else:
                outs = [
                    None if h is None else mlp(p_stream["mlp"], modulated_norm(h, shift, scale))
                    for p_stream, h, (shift, scale, _) in zip(p, reads, triples, strict=True)
                ]
            for stream, out, (_, _, gate) in zip(streams, outs, triples, strict=True):
                if out is not None:
                    stream.write(gate * out)
    scale, shift = linear(F.silu(e_t), params["head"]["adaln"])[:, None].chunk(2, dim=-1)
    x = modulated_norm(streams[1].read(2 * layout.depth + 1), shift, scale)
    return -linear(x, params["head"]["dense"]), entered
