"""How much a forward pass computes, by formula, and what chips could do: the two sides of MFU."""

from dar_jax.models.sit import SiT

# bfloat16 FLOP/s of one jax device (of TPU v4 and v5p, two cores), without sparsity, as published; by the start of
# its `device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Of the longest name that `device_kind` starts with; None if it is not in the table."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def forward_flops(model: SiT) -> float:
    """FLOPs of the forward pass of a model for one image: its matmuls, two for a multiply-add.

    An aggregator adds its query, the scores and the weighted sum of its sources. A train step counts as three
    forward passes, whatever it recomputes.
    """
    d, depth = model.hidden_size, model.depth
    tokens = (model.input_size // model.patch_size) ** 2
    pixels = model.patch_size**2 * model.channels
    hidden = int(d * model.mlp_ratio)
    per_token = pixels * d + depth * (4 * d * d + 2 * tokens * d + 2 * d * hidden)
    per_token += d * pixels * (2 if model.learn_sigma else 1)
    if model.layout is not None:
        counts = model.layout.source_counts()
        per_token += 2 * d * sum(counts) + len(counts) * model.query.multiply_adds(d)
    per_image = 256 * d + d * d + depth * 6 * d * d + 2 * d * d
    return 2.0 * (tokens * per_token + per_image)
