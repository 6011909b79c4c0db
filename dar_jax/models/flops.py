"""How much a forward pass computes, by formula, and what chips could do: the two sides of MFU."""

from dar_jax.models.mmdit import MMDiT
from dar_jax.models.sit import SiT
from dar_jax.models.two_streams import stream_kinds

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


def forward_flops(model: SiT | MMDiT) -> float:
    """FLOPs of the forward pass of a model for one image: its matmuls, two for a multiply-add.

    An aggregator adds its query, the scores and the weighted sum of its sources; a rival adds what it does. Of an
    MM-DiT the image is of input_size, its text of text_length; the encoder of words is left out.
    """
    return _mmdit_flops(model) if isinstance(model, MMDiT) else _sit_flops(model)


def _mmdit_flops(model: MMDiT) -> float:
    d, image = model.hidden_size, (model.input_size // model.patch_size) ** 2
    streams = (model.text_length, image)
    kinds = stream_kinds(model.layout, model.query, model.streams)
    pixels = model.patch_size**2 * model.channels
    total = image * 2 * pixels * d + model.text_length * model.text_size * d + 256 * d + d * d + 2 * d * d
    for tokens, kind in zip(streams, kinds, strict=True):
        total += model.depth * (tokens * (12 * d * d + 2 * sum(streams) * d) + 6 * d * d)
        if kind.num_queries:
            counts = model.layout.source_counts()[: kind.num_queries + (kind is kinds[-1])]
            total += tokens * (2 * d * sum(counts) + len(counts) * model.query.multiply_adds(d))
    return 2.0 * total


def _sit_flops(model: SiT) -> float:
    d, depth = model.hidden_size, model.depth
    tokens = (model.input_size // model.patch_size) ** 2
    pixels = model.patch_size**2 * model.channels
    hidden = int(d * model.mlp_ratio)
    per_token = pixels * d + depth * (4 * d * d + 2 * tokens * d + 2 * d * hidden)
    per_token += d * pixels * (2 if model.learn_sigma else 1)
    if model.layout is not None:
        counts = model.layout.source_counts()
        per_token += 2 * d * sum(counts) + len(counts) * model.query.multiply_adds(d)
    if model.rival is not None:
        per_token += model.rival.multiply_adds(depth, d)
    per_image = 256 * d + d * d + depth * 6 * d * d + 2 * d * d
    return 2.0 * (tokens * per_token + per_image)
