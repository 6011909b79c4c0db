"""The formula of a forward pass's FLOPs against published figures, the traced matmuls, and the compiler's own count."""

import jax
import jax.numpy as jnp
import pytest

from dar_jax import config as config_lib
from dar_jax import models, planning
from dar_jax.models.flops import PEAK_FLOPS, forward_flops, peak_flops

# Multiply-adds for one image at 32x32x4, as published (10^9).
PUBLISHED = {"S": 6.06, "B": 23.01, "L": 80.70, "XL": 118.6}


def make(variant, **fields):
    model = config_lib.route(config_lib.default(), variant).model
    model.update(input_size=32, channels=4, num_classes=1000, label_dropout=0.0, **fields)
    return model


def lower(model):
    """The forward pass of one image, traced and lowered for no device in particular."""
    net, abstract = models.build(model), jax.ShapeDtypeStruct
    inputs = abstract((1, 32, 32, 4), jnp.float32), abstract((1,), jnp.float32), {"label": abstract((1,), jnp.int32)}
    params = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    return jax.jit(net.apply).trace(params, *inputs)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    assert forward_flops(models.build(make("residual", **config_lib.SIZES[size]))) / 2e9 == pytest.approx(
        PUBLISHED[size], rel=2e-3
    )


@pytest.mark.parametrize(
    ("variant", "chunk_size"),
    [("residual", 4), ("static_t", 4), ("dynamic", 4), ("static", 1), ("long_skip", 4), ("mhc", 4)],
)
def test_traced_matmuls(variant, chunk_size):
    """All that is left out is routing's own sums, which are no matmuls where XLA adds term by term."""
    model = make(variant, depth=4, hidden_size=96, num_heads=4)
    model.routing.update(chunk_size=chunk_size, implementation="pallas")
    counted = planning.count_flops(lower(model).jaxpr.jaxpr, "cpu")  # a TPU's attention counts the lanes that it fills
    assert forward_flops(models.build(model)) == pytest.approx(counted, rel=0.05 if variant != "residual" else 1e-9)


@pytest.mark.parametrize("variant", ["residual", "dynamic"])
def test_the_compilers_count(variant):
    """Within 5 %: it adds what is no matmul. One step of the scan, because it takes a loop's body once."""
    model = make(variant, depth=1, hidden_size=384, num_heads=6)
    model.routing.chunk_size = 2
    counted = lower(model).lower().cost_analysis()["flops"]
    assert forward_flops(models.build(model)) == pytest.approx(counted, rel=0.05)


def test_peaks_are_found_by_the_kind_that_jax_reports():
    published = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
    assert {name: chip.peak_flops for name, chip in planning.CHIPS.items()} == published
    assert peak_flops("TPU v5 lite") == peak_flops("TPU v5e") == planning.CHIPS["v5e"].peak_flops
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == planning.CHIPS["v5p"].peak_flops
    assert peak_flops("TPU v4") == planning.CHIPS["v4"].peak_flops
    assert peak_flops("TPU v6 lite") == peak_flops("TPU v6e") == planning.CHIPS["v6e"].peak_flops
    assert peak_flops("NVIDIA H100 80GB HBM3") == PEAK_FLOPS["NVIDIA H100"]
    assert peak_flops("cpu") is None
