"""SiT in PyTorch, from its description and under the official names; shares no code with dar_jax."""

import math

import torch
from torch import nn


def sin_cos(position, size):
    """[N] positions -> [N, size]: sines, then cosines, of geometric frequencies down to 1/10000, in float64."""
    k = torch.arange(size // 2, dtype=torch.float64)
    angle = position[:, None] * torch.exp(-math.log(10000) * k / (size // 2))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def position_embedding(grid, size):
    token = torch.arange(grid * grid, dtype=torch.float64)
    column, row = token % grid, token // grid
    return torch.cat([sin_cos(column, size // 2), sin_cos(row, size // 2)], dim=1).float()[None]


class PatchEmbed(nn.Module):
    def __init__(self, channels, patch, size):
        super().__init__()
        self.proj = nn.Conv2d(channels, size, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).mT  # [B, T, D], rows of patches


class TimestepEmbedder(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t):
        angle = t[:, None] * 10000.0 ** (-torch.arange(128, device=t.device) / 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class LabelEmbedder(nn.Module):
    def __init__(self, classes, size):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, size)

    def forward(self, y):
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, dim=-1))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, size, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(size, hidden), nn.GELU("tanh"), nn.Linear(hidden, size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def adaptive_norm(x, shift, scale):
    x = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Block(nn.Module):
    def __init__(self, size, heads, hidden):
        super().__init__()
        self.attn, self.mlp = Attention(size, heads), Mlp(size, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(adaptive_norm(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(adaptive_norm(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, size, features):
        super().__init__()
        self.linear = nn.Linear(size, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(self, x, c):
        return self.linear(adaptive_norm(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


class SiT(nn.Module):
    """x [B, C, H, W], t [B] in [0, 1], y [B] -> [B, C, H, W]."""

    def __init__(self, *, input_size, channels, num_classes, patch_size, hidden_size, depth, num_heads, learn_sigma):
        super().__init__()
        self.channels, self.patch, self.grid = channels, patch_size, input_size // patch_size
        self.x_embedder = PatchEmbed(channels, patch_size, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(position_embedding(self.grid, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, 4 * hidden_size) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * channels * (2 if learn_sigma else 1))

    def forward(self, x, t, y):
        c = self.t_embedder(t) + self.y_embedder(y)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        out = self.final_layer(h, c).unflatten(-1, (self.patch, self.patch, -1))  # [B, T, p, q, c]
        out = out.unflatten(1, (self.grid, self.grid))
        return torch.einsum("nhwpqc->nchpwq", out).flatten(4).flatten(2, 3)[:, : self.channels]


def randomise(model, seed=0):
    """Random weights, also where SiT starts at zero, that keep activations and gates of order one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            with torch.no_grad():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
    return model
