"""What a config may say of a model."""

from ml_collections import ConfigDict

from dar_jax.config import RIVALS
from dar_jax.errors import check_choice, require
from dar_jax.models.build import MODELS, ROUTED, ROUTINGS
from dar_jax.models.two_streams import STREAMS
from dar_jax.routing import FINALS, IMPLEMENTATIONS, QUERIES, SUMMARIES

SPACES = ("pixels", "latents")
TEXTS = ("words", "embeddings")  # of a caption
IMAGE_CHANNELS = (1, 3)  # grey and RGB


def check(model: ConfigDict) -> None:
    """Raises UserError for the first field of `config.model` that cannot work."""
    check_choice("config.model.family", model.family, MODELS)
    check_choice("config.model.space", model.space, SPACES)
    check_choice("config.model.dtype", model.dtype, ("float32", "bfloat16"))
    check_choice("config.model.remat", model.remat, ("dense", "block"))
    require(
        model.space == "latents" or model.channels in IMAGE_CHANNELS,
        f"config.model.channels = {model.channels} does not suit images; take 1 (grey) or 3 (RGB) channels, or set "
        "config.model.space = latents.",
    )
    require(
        model.hidden_size % 4 == 0 and model.hidden_size % model.num_heads == 0,
        f"config.model.hidden_size = {model.hidden_size} must be divisible by 4 and by num_heads = {model.num_heads}.",
    )
    require(
        model.input_size % model.patch_size == 0,
        f"config.model.input_size = {model.input_size} must be divisible by patch_size = {model.patch_size}.",
    )
    require(
        int(model.hidden_size * model.mlp_ratio) >= 1,
        f"config.model.mlp_ratio = {model.mlp_ratio} leaves no hidden unit of hidden_size = {model.hidden_size}.",
    )
    if model.family == "mmdit":
        _check_mmdit(model)
    _check_routing(model.routing, 2 * model.depth)
    kind = model.routing.kind
    require(
        model.family == "sit" or kind not in RIVALS,
        f"config.model.routing.kind = {kind} is of config.model.family = sit alone; set it to residual or dar.",
    )
    require(
        kind != "long_skip" or model.depth % 2 == 0,
        f"config.model.depth = {model.depth} must be even with config.model.routing.kind = long_skip, which joins the "
        "blocks in pairs.",
    )
    require(
        model.family == "sit" or model.routing.query != "shared",
        "config.model.routing.query = shared is of config.model.family = sit alone; set it to static.",
    )


def _check_mmdit(model: ConfigDict) -> None:
    require(
        model.hidden_size // model.num_heads % 2 == 0,
        f"config.model.hidden_size = {model.hidden_size} and num_heads = {model.num_heads} make heads of an odd number "
        "of features, which cannot turn in pairs; change one.",
    )
    check_choice("config.model.text", model.text, TEXTS)
    require(
        model.text == "embeddings" or model.text_depth == 0 or model.text_size % model.num_heads == 0,
        f"config.model.text_size = {model.text_size} must be divisible by num_heads = {model.num_heads}.",
    )
    require(model.mlp_ratio == 4, f"config.model.mlp_ratio = {model.mlp_ratio} must be 4 in an mmdit.")
    require(not model.learn_sigma, "config.model.learn_sigma = True is of sit alone; set it to False.")


def _check_routing(routing: ConfigDict, sublayers: int) -> None:
    check_choice("config.model.routing.kind", routing.kind, ROUTINGS)
    check_choice("config.model.routing.query", routing.query, QUERIES)
    check_choice("config.model.routing.summary", routing.summary, SUMMARIES)
    check_choice("config.model.routing.final", routing.final, FINALS)
    check_choice("config.model.routing.streams", routing.streams, STREAMS)
    check_choice("config.model.routing.implementation", routing.implementation, IMPLEMENTATIONS)
    divisors = [1] + [s for s in range(2, sublayers + 1, 2) if sublayers % s == 0]
    require(
        routing.kind not in ROUTED or routing.chunk_size in divisors,
        f"config.model.routing.chunk_size = {routing.chunk_size} must be 1 or an even divisor of 2 * depth = "
        f"{sublayers}: one of {divisors}.",
    )
    require(
        routing.kind != "delta" or routing.chunk_size == 1 or SUMMARIES[routing.summary].is_complete,
        f"config.model.routing.summary = {routing.summary} leaves outputs out of the residual stream of "
        "config.model.routing.kind = delta; set it to sum.",
    )
