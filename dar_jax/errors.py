"""A user's mistake, and the checks of words and numbers that find it. `cli.run` prints it as one line."""

import difflib
import math
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A mistake in a config, path or flag. The message names the value, the rule and the fix."""


MOST_NAMES = 60  # that an error lists


def near_miss(name: str, valid: Iterable[str]) -> str:
    """Returns ` Did you mean "x"?` for the closest valid name, else the list of valid names, if it is short."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if close:
        return f' Did you mean "{close[0]}"?'
    return f" Valid: {', '.join(valid)}." if len(valid) <= MOST_NAMES else ""


def check_choice(field: str, value: str, valid: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of `valid`."""
    valid = list(valid)
    if value not in valid:
        raise UserError(f'{field} = "{value}" is unknown.{near_miss(str(value), valid)}')


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def check_number(name: str, value: Any, kind: type, interval: str) -> None:
    """Raises UserError unless `value` is a number of `kind`, int or float, within `interval`.

    Args:
      name: what the value is called, as "config.optimizer.b1".
      value: the value. An int is a float too, and a bool is neither.
      kind: int or float.
      interval: as "[0, 1)" or "(0, inf)". NaN is outside of all. An infinite end stands for the largest number of the
        devices, which is 2^31 - 1 for int and that of float32 for float.
    """
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise UserError(f"{name} = {value!r} must be of type {kind.__name__}.")
    largest = 2**31 - 1 if kind is int else 3.4028235e38
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below and (abs(value) <= largest or math.isfinite(high))):
        rule = f"at least {low:g}" if interval[0] == "[" and interval.endswith("inf)") else f"in {interval}"
        if interval.endswith("inf)"):
            rule += " and below 2^31" if kind is int else " and finite in float32"
        raise UserError(f"{name} = {value} must be {rule}.")
