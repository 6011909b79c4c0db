"""A SiT with REPA in PyTorch, from parameters as linen holds them: the loss of one drawn batch. Linear path, velocity.

Shares no code with dar_jax. The states are those that the first sublayer of a block reads.
"""

import torch
import torch.nn.functional as F

from tests.parity import torch_stack
from tests.parity.torch_stack import linear, modulated_norm


def model(params, config, x_t, t, constants, label, blocks):
    """The velocity `[B, H, W, C]` and the states behind `blocks`, each `[B, T, D]`.

    The frequencies of the time and the table of positions are given, because libraries round them differently in
    float32, in which they are computed.
    """
    heads, patch = config.num_heads, config.patch_size
    angle = t[:, None] * constants["frequencies"]
    features = torch.cat([angle.cos(), angle.sin()], dim=1)
    e_t = linear(F.silu(linear(features, params["timestep"]["dense_0"])), params["timestep"]["dense_1"])
    condition = e_t + params["label"]["table"][label]
    b, h, w, c = x_t.shape
    pixels = x_t.reshape(b, h // patch, patch, w // patch, patch, c).transpose(2, 3).reshape(b, -1, patch * patch * c)
    x = linear(pixels, params["patch"]) + constants["positions"]
    stack, reads = params["stack"], []
    if config.routing.kind == "residual":
        for k in range(config.depth):
            reads += [x, None]
            for sublayer in (1, 2):
                x = x + torch_stack.sublayer(
                    torch_stack.index(stack["steps"]["block_0"], k), x, condition, heads, sublayer
                )
    else:
        x, _, _ = torch_stack.routed_stack(
            stack, _Layout(config), config.routing.query, heads, x, condition, e_t, lambda h: reads.append(h) or h
        )
    shift, scale = linear(F.silu(condition), params["head"]["adaln"])[:, None].chunk(2, dim=-1)
    out = linear(modulated_norm(x, shift, scale), params["head"]["dense"])
    out = out.reshape(b, h // patch, w // patch, patch, patch, c).transpose(2, 3).reshape(b, h, w, c)
    return out, [reads[2 * k] for k in blocks]


class _Layout:
    def __init__(self, config):
        routing = config.routing
        self.depth, self.chunk_size = config.depth, routing.chunk_size
        self.summary, self.final = routing.summary, routing.final


def project(params, x, grid):
    """REPA's MLP, or a 3x3 convolution of the grid of tokens."""
    if "dense" in params:
        kernel = params["dense"]["kernel"].unflatten(0, (3, 3, -1)).permute(3, 2, 0, 1)
        image = x.mT.unflatten(2, (grid, grid))
        return F.conv2d(image, kernel, params["dense"]["bias"], padding=1).flatten(2).mT
    for i in range(3):
        x = linear(F.silu(x) if i else x, params[f"dense_{i}"])
    return x


def loss(params, config, drawn, target):
    """Of config.repa, with `target` `[B, T, F]` for what is no state of the model; and its parts."""
    settings, t = config.repa, drawn["t"]
    x_t = t[:, None, None, None] * drawn["x1"] + (1 - t[:, None, None, None]) * drawn["x0"]
    is_layer = settings.target == "later_block"
    blocks = [settings.block, *([settings.later_block] if is_layer else [])]
    velocity, states = model(params, config.model, x_t, t, drawn["constants"], drawn["label"], blocks)
    grid = config.model.input_size // config.model.patch_size
    projected = states[0] if is_layer else project(params["repa"], states[0], grid)
    target = states[1].detach() if is_layer else target
    if settings.standardize:
        mean, std = target.mean(1, keepdim=True), target.std(1, keepdim=True)
        target = (target - settings.mean_share * mean) / (std + 1e-6)
    flow = ((velocity - (drawn["x1"] - drawn["x0"])) ** 2).mean()
    if settings.target == "latents":
        error = F.smooth_l1_loss(projected, target)
    else:
        error = -(F.normalize(projected, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean()
    return flow + settings.coefficient * error, flow, error
