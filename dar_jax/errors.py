"""One way for a user's mistake to reach the user: a single clear line and exit code 2."""

import contextlib
import difflib
import os
import sys
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


def require_flags(**values) -> None:
    """Raises UserError for a flag that was not given."""
    for name, value in values.items():
        if value is None:
            raise UserError(f"--{name} is required; see --help.")


def run(main) -> None:
    """Runs a door under absl. A user's mistake, in a flag or later, is one line on stderr and exit code 2."""
    from absl import app, flags, logging

    from dar_jax.config import check_flags

    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else tensorflow, which clu imports, greets on stderr
    logging.set_verbosity(logging.FATAL)  # orbax describes its every move, and every error that it raises anyway

    def parse(argv):
        if {"--help", "-help", "--helpshort", "--helpfull"} & set(argv):
            with contextlib.suppress(SystemExit):  # absl leaves with 1
                flags.FLAGS(argv)
            sys.exit(0)
        try:
            check_flags(argv[1:])
            rest = flags.FLAGS(argv)[1:]
            if rest:
                raise UserError(f'"{rest[0]}" is not understood; a flag is written --name=value, see --help.')
            return argv[:1]
        except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            _exit(error)

    def guarded(argv):
        try:
            main(argv)
        except UserError as error:
            _exit(error)

    app.run(guarded, flags_parser=parse)


def _exit(error: Exception) -> None:
    if "Traceback" in str(error):  # ml_collections hides what a config file raised in the text of another error
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
