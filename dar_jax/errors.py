"""One way for a user's mistake to reach the user: a single clear line and exit code 2."""

import difflib
from collections.abc import Iterable


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
