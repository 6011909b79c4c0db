"""AutoencoderKL in PyTorch, from its description and under the names of diffusers; shares no code with dar_jax."""

import math

import torch
from torch import nn
from torch.nn import functional


def norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


class Resnet(nn.Module):
    def __init__(self, width_in, width):
        super().__init__()
        self.norm1, self.conv1 = norm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2, self.conv2 = norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(functional.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.group_norm = norm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT  # [B, T, C]
        h = functional.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).mT.reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(width, width), Resnet(width, width)])
        self.attentions = nn.ModuleList([Attention(width)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Sampler(nn.Module):
    """Halves the sides (zeros at the right and at the bottom), or doubles them by repetition."""

    def __init__(self, width, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, padding=1) if up else nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        if self.up:
            return self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Block(nn.Module):
    def __init__(self, width_in, width, resnets, sampler):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(width if i else width_in, width) for i in range(resnets))
        if sampler:
            samplers = nn.ModuleList([Sampler(width, up=sampler == "up")])
            setattr(self, {"up": "upsamplers", "down": "downsamplers"}[sampler], samplers)

    def forward(self, x):
        for module in [m for children in self.children() for m in children]:
            x = module(x)
        return x


class Coder(nn.Module):
    """The encoder (direction "down") or the decoder ("up")."""

    def __init__(self, direction, widths, size_in, size_out):
        super().__init__()
        self.direction, resnets = direction, {"down": 2, "up": 3}[direction]
        self.conv_in = nn.Conv2d(size_in, widths[0], 3, padding=1)
        last = len(widths) - 1
        blocks = nn.ModuleList(
            Block(widths[max(i - 1, 0)], width, resnets, direction if i < last else None)
            for i, width in enumerate(widths)
        )
        setattr(self, f"{direction}_blocks", blocks)
        self.mid_block = MidBlock(widths[-1] if direction == "down" else widths[0])
        self.conv_norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], size_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        levels = list(getattr(self, f"{self.direction}_blocks"))
        for module in [*levels, self.mid_block] if self.direction == "down" else [self.mid_block, *levels]:
            x = module(x)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    def __init__(self, widths, latents=4):
        super().__init__()
        self.encoder = Coder("down", widths, 3, 2 * latents)
        self.decoder = Coder("up", widths[::-1], latents, 3)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)

    def encode(self, x):
        """[B, 3, H, W] -> mean and standard deviation, [B, C, h, w] each."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20).mul(0.5).exp()

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))


def randomise(model, seed=0):
    """Random weights that keep activations of order one, biases and norms included, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return model


def old_names(state_dict):
    """The same weights under the attention names of older files."""
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for key, tensor in state_dict.items():
        for new, old in names.items():
            key = key.replace(new, old)
        renamed[key] = tensor
    return renamed
