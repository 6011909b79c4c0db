"""How a door runs: its flags are checked, and a user's mistake is one line on stderr and exit code 2."""

import contextlib
import os
import re
import sys
from collections.abc import Callable

from ml_collections import ConfigDict

from dar_jax import files
from dar_jax.config import check_key, default
from dar_jax.errors import UserError


def require_flags(**values) -> None:
    """Raises UserError for a flag that was not given."""
    for name, value in values.items():
        if value is None:
            raise UserError(f"--{name} is required; see --help.")


def parse_numbers(flag: str, words: list[str]) -> list[float]:
    """The numbers of a list flag. Raises UserError if a word is none."""
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise UserError(f"--{flag} = {','.join(words)} must be numbers: 0,0.5,1.") from error


def run(main: Callable) -> None:
    """Runs the `main` of a door under absl."""
    from absl import app, flags, logging

    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else tensorflow, which clu imports, greets on stderr
    logging.set_verbosity(logging.FATAL)  # orbax describes its every move, and every error that it raises anyway

    def parse(argv):
        if {"--help", "-help", "--helpshort", "--helpfull"} & set(argv):
            with contextlib.suppress(SystemExit):  # absl leaves with 1
                flags.FLAGS(argv)
            sys.exit(0)
        try:
            _check_config_flags(argv[1:])
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
        except Exception as error:
            if reason := files.failure(error):
                _exit(UserError(f"a bucket cannot be used: {reason}; see docs/scale.md."))
            raise

    app.run(guarded, flags_parser=parse)


def _check_config_flags(args: list[str]) -> None:
    """Raises UserError for a --config file that does not exist and for a --config.x.y that is no field."""
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        if match := re.match(r"--?config(?:=(.*))?$", arg):
            path = (following if match[1] is None else match[1]).split(":")[0]
            if not os.path.isfile(path):
                raise UserError(f'--config = "{path}" is no file; name one like configs/digits.py.')
        elif match := re.match(r"--?(?:no)?config\.([^=]*)", arg):
            schema, prefix = default(), "config"
            for key in match[1].split("."):
                if not isinstance(schema, ConfigDict):
                    raise UserError(f'flag "{arg}": {prefix} is a value, not a section.')
                check_key(key, schema, prefix)
                schema, prefix = schema[key], f"{prefix}.{key}"


def _exit(error: Exception) -> None:
    if "Traceback" in str(error):  # ml_collections hides what a config file raised in the text of another error
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
