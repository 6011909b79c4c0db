"""Times that stand closer together near the noise, as large images need them: the shift of SD3 and Qwen-Image.

Published schedules count the time as s = 1 - t, which is sigma_t of the linear path: 1 is noise and 0 is data.
"""

import math
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from dar_jax.errors import require

Array = jax.Array

# The published mu of Qwen-Image is linear in the number of image tokens: .5 at 256, .9 at 8192.
BASE_TOKENS, BASE_MU = 256, 0.5
MAX_TOKENS, MAX_MU = 8192, 0.9


def shift_time(s: Array, shift: float) -> Array:
    """e^mu / (e^mu + 1 / s - 1) with e^mu = `shift` (arXiv 2403.03206, Eq. 23), for s in [0, 1] of any shape."""
    return shift * s / (1 + (shift - 1) * s)


def shift_of(num_tokens: int) -> float:
    """The shift e^mu of Qwen-Image for images of `num_tokens` tokens."""
    return math.exp(BASE_MU + (MAX_MU - BASE_MU) * (num_tokens - BASE_TOKENS) / (MAX_TOKENS - BASE_TOKENS))


def _uniform(section: ConfigDict, num_tokens: int, intervals: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, intervals + 1)


def _shifted(section: ConfigDict, num_tokens: int, intervals: int) -> np.ndarray:
    s = shift_time(np.linspace(1.0, 0.0, intervals + 1), section.shift or shift_of(num_tokens))
    if section.terminal_s:
        s[:-1] = 1 - (1 - s[:-1]) * (1 - section.terminal_s) / (1 - s[-2])
    return 1 - s


# (config.sampler, image tokens of a sample, intervals N) -> N + 1 times from 0 to 1.
SCHEDULES: dict[str, Callable[[ConfigDict, int, int], np.ndarray]] = {"uniform": _uniform, "shifted": _shifted}


def check_shifted(section: ConfigDict) -> None:
    """Raises UserError if `config.sampler` asks for a shifted schedule that cannot be."""
    require(
        section.method in ("euler", "heun"),
        f'config.sampler.schedule = "shifted" is for the methods euler and heun, not "{section.method}"; take one of '
        'them, or schedule = "uniform".',
    )
    require(
        section.num_steps >= 2 or not section.terminal_s,
        f"config.sampler.num_steps = {section.num_steps} must be at least 2, because terminal_s = {section.terminal_s} "
        "is the start of the last step; set terminal_s = 0 for a single step.",
    )
