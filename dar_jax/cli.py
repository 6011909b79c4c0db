"""How a door runs: its flags are checked, and a user's mistake is one line on stderr and exit code 2."""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

from dar_jax import files, hosts
from dar_jax.config import check_key, default
from dar_jax.errors import UserError


def require_flags(**values) -> None:
    """Raises UserError for a flag that was not given."""
    for name, value in values.items():
        if value is None:
            raise UserError(f"--{name} is required; see --help.")


def parse_numbers(flag: str, words: list[str]) -> list[float]:
    """The numbers of a list flag. Raises UserError if a word is none, or there are no words."""
    try:
        return [float(word) for word in words or [""]]
    except ValueError as error:
        raise UserError(f"--{flag} = {','.join(words)} must be numbers: 0,0.5,1.") from error


def run(main: Callable) -> None:
    """Runs the `main` of a door under absl."""
    from absl import app, logging

    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else tensorflow, which clu imports, greets on stderr
    logging.set_verbosity(logging.FATAL)  # orbax describes its every move, and every error that it raises anyway
    sys.unraisablehook = _print_unraisable

    def parse(argv):
        if {"--help", "-help", "--helpshort", "--helpfull"} & set(argv):
            with contextlib.suppress(SystemExit):  # absl leaves with 1
                flags.FLAGS(argv)
            sys.exit(0)
        path = ""
        try:
            path = _check_config_flags(argv[1:])
            rest = flags.FLAGS(argv)[1:]
            if rest:
                raise UserError(f'"{rest[0]}" is not understood; a flag is written --name=value, see --help.')
            config = flags.FLAGS["config"].value if path else None
            if path and not isinstance(config, ConfigDict):  # ml_collections keeps an OSError of the file for later
                raise getattr(config, "_error", None) or UserError(f'get_config of "{path}" must return a ConfigDict.')
            return argv[:1]
        except (Exception, SystemExit) as error:  # a config file is a program, which raises what it likes
            _exit(_describe(error, path))

    def guarded(argv):
        try:
            _check_empty_flags()
            main(argv)
            hosts.finish()
        except UserError as error:
            _exit(str(error))
        except BaseException as error:
            if reason := files.failure(error):
                _exit(f"a bucket cannot be used: {reason}; see docs/scale.md.")
            if isinstance(error, OSError):  # a file or disk that no check before has found
                _exit(str(error))
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                _exit(f"there is not enough memory: {str(error).partition(chr(10))[0]}; take smaller batches or sizes.")
            if hosts.is_joined():
                _end_job(error)
            raise

    app.run(guarded, flags_parser=parse)


def _check_config_flags(args: list[str]) -> str:
    """Returns the file of --config, "" if there is none.

    Raises UserError if the file does not exist, or a --config.x.y is no field.
    """
    path = ""
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
    return path


def _check_empty_flags() -> None:
    """Raises UserError for a flag that is given as an empty text, as --workdir= by an unset variable of a shell."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if flag.present and flag.default is None and isinstance(flag.value, str) and not flag.value.strip():
            raise UserError(f'--{name} = "{flag.value}" is empty; give it a value, or leave it out.')


def _describe(error: BaseException, path: str) -> str:
    """What is wrong with the flags, or the kind of error, with its line, that the config file at `path` raised."""
    # ml_collections hides what a config file raised in the text of another error.
    while "Traceback" in str(error) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    if isinstance(error, UserError | flags.Error):
        return str(error)
    lines = [call.lineno for call in traceback.extract_tb(error.__traceback__) if call.filename == path]
    where = f'--config = "{path}"' + (f", line {lines[-1]}" if lines else "")
    return f"{where}: {type(error).__name__}: {error.args[0] if isinstance(error, KeyError) else error}"


def _print_unraisable(unraisable: Any) -> None:
    """As Python does, but for the writes that are under way when a save has failed and complain that it is over."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _exit(text: str) -> NoReturn:
    """Ends at once: threads of a save that failed would go on to wait for each other, or to print what they think."""
    hosts.fail(" ".join(text.split()))


def _end_job(error: BaseException) -> None:
    """Ends all processes of the job for an error of this one that is no user's mistake."""
    if isinstance(error, SystemExit):
        hosts.fail("stopped by a signal", code=int(error.code or 0), say=False)
    time.sleep(2)  # a process that is lost breaks what jax does with it, and its loss makes the better line
    traceback.print_exception(error)
    hosts.fail(f"{type(error).__name__}: {' '.join(str(error).split())}"[:500], code=1, say=False)
