"""The loss of a SiT with REPA in PyTorch, on linen parameters. Linear path, velocity. Shares no code with dar_jax."""

import torch
import torch.nn.functional as F

from tests.parity import torch_reads
from tests.parity.torch_stack import linear


def states(params, model, layout, x_t, t, label, constants):
    """What every sublayer and the head read, and the prediction. `layout` is None for the residual model."""
    v_0, condition, e_t = torch_reads.embed(params, model, x_t, t, label, **constants)
    if layout is None:
        gates = torch.ones(2 * model.depth + 1, 2 * model.depth + 1, dtype=x_t.dtype)
        found, _ = torch_reads.residual_stack(params["stack"], model.depth, model.num_heads, v_0, condition, gates)
    else:
        found, _ = torch_reads.routed_reads(
            params["stack"], layout, model.routing.query, model.num_heads, v_0, condition, e_t
        )
    return found, torch_reads.head(params, model, found[-1], condition)


def project(params, x, grid):
    """REPA's MLP, or a 3x3 convolution of the grid of tokens."""
    if "dense" in params:
        kernel = params["dense"]["kernel"].unflatten(0, (3, 3, -1)).permute(3, 2, 0, 1)
        image = x.mT.unflatten(2, (grid, grid))
        return F.conv2d(image, kernel, params["dense"]["bias"], padding=1).flatten(2).mT
    for i in range(3):
        x = linear(F.silu(x) if i else x, params[f"dense_{i}"])
    return x


def loss(params, config, layout, drawn, target):
    """Of config.repa, with `target` `[B, T, F]` for what is no state of the model; and its parts."""
    settings, t = config.repa, drawn["t"]
    x_t = t[:, None, None, None] * drawn["x1"] + (1 - t[:, None, None, None]) * drawn["x0"]
    read, velocity = states(params, config.model, layout, x_t, t, drawn["label"], drawn["constants"])
    if settings.target == "later_block":
        projected, target = read[2 * settings.block], read[2 * settings.later_block].detach()
    else:
        grid = config.model.input_size // config.model.patch_size
        projected = project(params["repa"], read[2 * settings.block], grid)
    if settings.standardize:
        mean, std = target.mean(1, keepdim=True), target.std(1, keepdim=True)
        target = (target - settings.mean_share * mean) / (std + 1e-6)
    flow = ((velocity - (drawn["x1"] - drawn["x0"])) ** 2).mean()
    if settings.target == "latents":
        error = F.smooth_l1_loss(projected, target)
    else:
        error = -(F.normalize(projected, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean()
    return flow + settings.coefficient * error, flow, error
