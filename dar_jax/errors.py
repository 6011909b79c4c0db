"""A user's mistake, and the checks of words and numbers that find it. `cli.run` prints it as one line."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """A mistake in a config, path or flag. The message names the value, the rule and the fix."""


def near_miss(name: str, valid: Iterable[str]) -> str:
    """Returns ` Did you mean "x"?` for the closest valid name, else the list of valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else f" Valid: {', '.join(valid)}."


def check_choice(field: str, value: str, valid: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of `valid`."""
    valid = list(valid)
    if value not in valid:
        raise UserError(f'{field} = "{value}" is unknown.{near_miss(str(value), valid)}')


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def check_ranges(prefix: str, section: Mapping[str, Any], **intervals: str) -> None:
    """Raises UserError for the first number of `section` outside its interval; NaN and infinity are outside all.

    Args:
      prefix: what the section is called, as "config.optimizer".
      section: holds the fields.
      intervals: by field, as "[0, 1)", "(0, inf)" or "[1, inf)".
    """
    for name, interval in intervals.items():
        value = section[name]
        low, high = (float(end) for end in interval[1:-1].split(","))
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            rule = f"at least {low:g}" if interval[0] == "[" and interval.endswith("inf)") else f"in {interval}"
            rule += " and finite" if isinstance(value, float) and interval.endswith("inf)") else ""
            raise UserError(f"{prefix}.{name} = {value} must be {rule}.")
