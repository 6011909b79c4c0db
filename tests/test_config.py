"""The schema: every number has a range beside its meaning, and a value outside of it is refused in one line."""

import functools
import math

import pytest
from ml_collections import ConfigDict

from dar_jax.config import check_fields, default
from dar_jax.errors import UserError, check_number


def numbers(section, prefix=""):
    """Names and defaults of all numbers of a config."""
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


def refuses(name, value):
    config = default()
    *sections, field = name.split(".")
    with config.ignore_type():
        functools.reduce(getattr, sections, config)[field] = value
    with pytest.raises(UserError, match=f"config.{name} = ") as error:
        check_fields(config)
    return "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), numbers(default()))
def test_no_number_takes_what_nobody_can_mean(name, value):
    check_fields(default())
    for impossible in (math.nan, math.inf, -math.inf, 10**40, -(10**40), "1", None, (value,)):
        assert refuses(name, impossible)
    if isinstance(value, int):  # ml_collections makes a float of a bool itself
        assert refuses(name, True)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", [-1, 2**32]),
        ("data.num_workers", [-1]),
        ("model.depth", [0, 10**6]),
        ("model.label_dropout", [1.0, -0.1]),
        ("diffusion.time_std", [0.0]),
        ("sampler.num_steps", [0]),
        ("sampler.rtol", [0.0]),
        ("sampler.diffusion_norm", [-1.0]),
        ("sampler.cfg_channels", [-1]),
        ("optimizer.learning_rate", [-1e-9, 1e39]),
        ("optimizer.b1", [1.0, -0.1]),
        ("optimizer.b2", [1.0]),
        ("optimizer.weight_decay", [-1.0]),
        ("optimizer.clip_norm", [-1.0]),
        ("optimizer.ema_decay", [1.0, 2.0, -1.0]),
        ("train.batch_size", [0]),
        ("train.num_steps", [0, 2**31]),
        ("eval.final_samples", [-1]),
        ("checkpoint.keep", [0]),
    ],
)
def test_values_just_outside(name, values):
    assert all(refuses(name, value) for value in values)


@pytest.mark.parametrize(
    ("value", "kind", "interval", "words"),
    [
        (0, int, "[1, inf)", "n = 0 must be at least 1 and below 2^31."),
        (2**31, int, "[1, inf)", "n = 2147483648 must be at least 1 and below 2^31."),
        (1e39, float, "(0, inf)", "n = 1e+39 must be in (0, inf) and finite in float32."),
        (1, float, "[0, 1)", "n = 1 must be in [0, 1)."),
        (0.5, int, "[0, 1]", "n = 0.5 must be of type int."),
    ],
)
def test_message_names_value_and_rule(value, kind, interval, words):
    with pytest.raises(UserError) as error:
        check_number("n", value, kind, interval)
    assert str(error.value) == words


def test_ends_of_an_interval():
    check_number("n", 0, float, "[0, 1)")
    check_number("n", 2**31 - 1, int, "[1, inf)")
    check_number("n", 2**32 - 1, int, "[0, 4294967296)")
    check_number("n", -3.4e38, float, "(-inf, inf)")
