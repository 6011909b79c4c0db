"""Checkpoints of a run: workdir/checkpoints/<step> by orbax, workdir/config.json beside them.

A checkpoint holds two items: "ema", the weights that samples come from, and "train", the other fields of the state.
A checkpoint of converted weights holds "ema" alone. The data need no third item, because a batch is a function of the
step. A step's directory appears under its final name only when it is whole, so a crash while saving leaves the last
good one. In it, checksums.json has the SHA-256 of every file of the items, and nothing that differs is restored.
workdir/best.json names the checkpoint with the lowest score.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dar_jax import files, lock
from dar_jax.config import check_fields, default
from dar_jax.errors import UserError
from dar_jax.logs import say

# The layout of config.json. 1: it had no number, and config.model had no field `space`.
FORMAT = 2

CHECKSUMS = "checksums.json"
FINISHED = "commit_success.txt"  # of orbax, which writes it last in a bucket, where it renames on a disk
UNREADABLE = "cannot be read"
METADATA = "_CHECKPOINT_METADATA"  # of orbax: names and types of the items, and when the save began and ended

BEST = {"step": int, "metric": str, "value": int | float}  # the form of best.json
REMOVE_BEST = "remove it, and the next evaluation writes it again"

MAX_VALUE = 200  # characters of a config's value in an error

# What a run and its evaluations write to, tried before the run starts.
FOLDERS = ("checkpoints", "samples", "profile", "evaluation")

# What a run keeps for life: its function, its randomness, and what makes a batch of a step.
FIXED = (
    *("model", "diffusion", "seed", "data.source", "data.name", "data.train_split", "data.buckets", "train.batch_size"),
    *(
        f"repa.{name}"
        for name in ("target", "block", "later_block", "projector", "standardize", "mean_share", "encoder")
    ),
    "lora",
    *("algorithm", "dmd.num_steps", "dmd.shift", "dmd.simulation", "dmd.fake_rank"),
)


def _items(state) -> dict[str, Any]:
    """The items of a state: any dataclass with the fields `step` and `ema`."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {"ema": fields.pop("ema"), "train": fields}


class _Best:
    """Preserves the checkpoint with the lowest score so far; workdir/best.json remembers which it is.

    Orbax's own BestN takes the score when it saves, but a checkpoint must be safe before its long evaluation.
    """

    def __init__(self, workdir: str):
        self.path = files.path(workdir) / "best.json"
        self.record = files.read_json(self.path, BEST, REMOVE_BEST) if self.path.exists() else None

    def note(self, step: int, steps: list[int], metric: str, value: float) -> None:
        best = self.record
        if best and best["metric"] == metric and best["value"] <= value and best["step"] in steps:
            return
        self.record = {"step": step, "metric": metric, "value": value}
        if jax.process_index() == 0:
            files.write_json(self.path, files.seal(self.record))

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        return [self.record is not None and checkpoint.step == self.record["step"] for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one workdir; saves in the background, keeps the latest `checkpoint.keep` and the best."""

    def __init__(self, workdir: str, keep: int):
        self._directory, self._best = _directory(workdir), _Best(workdir)
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), self._best]),
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, also of one whose save is under way; ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def latest_step(self) -> int | None:
        return max(self.steps, default=None)

    def save(self, state, step: int) -> None:
        """Starts saving; returns when the state may be donated. A step that is already saved is left alone.

        If the one before failed, for want of room, say, its error is raised here.
        """
        if self.latest_step != step:
            self.save_items(_items(state), step)

    def save_items(self, items: dict[str, Any], step: int) -> None:
        """As `save`, of the items by name."""
        # Orbax calls back when all files are written, and then renames their directory.
        write = functools.partial(write_checksums, self._directory / str(step))
        context = ocp.Context()
        context.async_options.post_finalization_callback = write
        with context:
            self._checkpointer.save_checkpointables_async(step, items)

    def note_score(self, step: int, metric: str, value: float) -> None:
        """Keeps the checkpoint of `step` for good if its score is the lowest yet of this metric. Waits for its save."""
        self.wait()
        self._best.note(step, self.steps, metric, value)

    def restore(self, abstract):
        """The latest state, of the type and on the shardings of `abstract`; `set_damaged_aside` has checked it."""
        items = _load(self._directory / str(self.latest_step), _items(abstract))
        return type(abstract)(ema=items["ema"], **items["train"])

    def close(self) -> None:
        """Waits, and ends."""
        self._checkpointer.close()

    def wait(self) -> None:
        """Returns when the save under way is done; raises its error."""
        self._checkpointer.wait()


def _directory(workdir: str) -> files.Path:
    return files.path(workdir) / "checkpoints"


def _parts(path: files.Path) -> set[str]:
    """The items of a step directory, as its metadata lists them; empty unless all of them are there."""
    try:
        names = set(json.loads((path / METADATA).read_text())["item_handlers"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return names if all((path / name).exists() for name in names) else set()


def _is_finished(path: files.Path) -> bool:
    """False for what is left of a save in a bucket."""
    return not files.is_remote(path) or (path / FINISHED).exists()


def _is_whole(path: files.Path) -> bool:
    return _parts(path) in ({"train", "ema"}, {"ema"})


def _directories(workdir: str) -> dict[int, files.Path]:
    """The step directories whose save was finished, whole or not, by ascending step."""
    paths = [
        path
        for path in _directory(workdir).glob("*")
        if re.fullmatch("0|[1-9][0-9]*", path.name) and _is_finished(path)
    ]
    return {int(path.name): path for path in sorted(paths, key=lambda path: int(path.name))}


def _steps(workdir: str) -> list[int]:
    """Steps of the checkpoints that have all their parts, ascending."""
    return [step for step, path in _directories(workdir).items() if _is_whole(path)]


def latest_step(workdir: str) -> int | None:
    """Step of the latest checkpoint of `workdir` that has all its parts; None if there is none."""
    return max(_steps(workdir), default=None)


def saved_steps(workdir: str) -> list[int]:
    """Steps of the checkpoints, whole or not, ascending. Raises UserError if there is none."""
    if steps := list(_directories(workdir)):
        return steps
    raise UserError(f'workdir "{workdir}" holds no checkpoint; train with python -m dar_jax.main first.')


def _checksums(path: files.Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of the files of a step directory by name."""
    return dict(zip(names, files.checksums([path / name for name in names]), strict=True))


def _file_names(path: files.Path) -> list[str]:
    """Of the items. The files beside them are orbax's notes, which it still writes when the items are whole."""
    return [name for name in files.names(path) if "/" in name]


def write_checksums(path: files.Path) -> None:
    """Writes the checksums of the checkpoint that will be `path`; locally orbax may not yet have renamed it so."""
    temporary = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
    path = temporary if temporary.exists() else path
    files.write_json(path / CHECKSUMS, _checksums(path, _file_names(path)), indent=0)


def _read_checksums(path: files.Path) -> dict[str, str] | None:
    """What `write_checksums` wrote; None if there is no such file. Raises ValueError if it is damaged."""
    try:
        return dict(json.loads((path / CHECKSUMS).read_text()))
    except FileNotFoundError:
        return None


def _damage(path: files.Path, *, ema_only: bool = False) -> str:
    """What is wrong with a step directory, or with all of it but "train"; "" if nothing is. In every process alike.

    The processes share the reading of the files. Raises UserError if a file is there and cannot be read: then the
    checkpoint may be whole all the same.
    """
    found = _damage_of_share(path, ema_only)
    if jax.process_count() > 1:
        line = np.frombuffer(found.encode()[:256].ljust(256), np.uint8)
        lines = [bytes(line).decode(errors="replace").strip() for line in multihost_utils.process_allgather(line)]
        found = next(filter(None, lines), "")
    if found.startswith(UNREADABLE):
        raise UserError(f'checkpoint "{path}" {found}; mend that, or rename the directory to do without it.')
    return found


def _damage_of_share(path: files.Path, ema_only: bool) -> str:
    if not _is_whole(path):
        return "a part is missing"
    try:
        stored = _read_checksums(path)
        if stored is None:
            say(f"{path} has no {CHECKSUMS}: it is of an earlier version, and whether it is damaged cannot be checked")
            return ""
        names = [name for name in sorted(stored) if not (ema_only and name.startswith("train/"))]
        found = _checksums(path, names[jax.process_index() :: jax.process_count()])
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        return str(error)
    except OSError as error:
        return f"{UNREADABLE}: {error}"
    return next((f"the checksum of {name} differs" for name in found if found[name] != stored[name]), "")


def set_damaged_aside(workdir: str) -> int | None:
    """Step of the latest checkpoint that is whole and undamaged, from which a run goes on; None if there is none.

    Later ones are renamed, with a line that names them. Every process must call it. Raises UserError if checkpoints
    were finished, and all of them are damaged.
    """
    damaged, step = {}, None
    for number, path in reversed(_directories(workdir).items()):
        if not (damage := _damage(path)):
            step = number
            break
        damaged[path] = damage
    finished = [path for path in damaged if any((path / name).exists() for name in (CHECKSUMS, FINISHED))]
    if step is None and finished:
        found = ", ".join(f"{path.name} ({damaged[path]})" for path in finished)
        raise UserError(
            f'workdir "{workdir}" has no checkpoint that is not damaged: {found}. Put a copy in their place, or remove '
            "them to start from step 0."
        )
    if jax.process_index() == 0:
        for path, damage in damaged.items():
            aside = path.with_name(f"damaged-{path.name}-{time.time_ns()}")
            with files.writing(workdir, "--workdir"):
                path.rename(aside)
            say(f"{path} is damaged ({damage}): renamed to {aside.name} and not used")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
    return step


def _load(path: files.Path, items: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    try:
        with context:
            return ocp.load_checkpointables(path, items)
    except Exception as error:  # orbax raises what its readers happen to
        reason = str(error).partition("\n")[0]
        raise UserError(f'checkpoint "{path}" cannot be read: {type(error).__name__}, {reason}') from error


def find_ema(workdir: str, step: int | None = None) -> tuple[files.Path, int]:
    """Returns (directory, step) of a checkpoint, by default the latest whose EMA weights are not damaged.

    Every process calls it. Raises UserError if there is none.
    """
    steps = saved_steps(workdir)
    if step not in (None, *steps):
        raise UserError(f'workdir "{workdir}" has no checkpoint of step {step}; it has {steps}.')
    wanted = steps[::-1] if step is None else [step]
    for number in wanted:
        path = _directory(workdir) / str(number)
        if not (damage := _damage(path, ema_only=True)):
            return path, number
        say(f"{path} is damaged ({damage}) and not used")
    raise UserError(
        f'workdir "{workdir}": the checkpoints of steps {wanted} are damaged ({damage}); put a copy in their place, or '
        "take another --step."
    )


def restore_ema(workdir: str, abstract_params, step: int | None = None, *, partial: bool = False) -> tuple[Any, int]:
    """Returns (EMA weights, step) of the checkpoint that `find_ema` finds, with its errors.

    `abstract_params` may ask for other types than those that were saved, and if `partial` for a part of the weights.
    """
    path, number = find_ema(workdir, step)
    return _load(path, {"ema": abstract_params}, partial=partial)["ema"], number


def weights_fingerprint(workdir: str, step: int) -> str:
    """Identity of the EMA weights of a checkpoint: the SHA-256 of the checksums of their files."""
    path = _directory(workdir) / str(step)
    sums = _read_checksums(path) or _checksums(path, _file_names(path))
    weights = {name: value for name, value in sums.items() if name.startswith("ema/")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


def load_config(workdir: str) -> ConfigDict:
    """The config a workdir was trained with. Raises UserError if there is none, it is damaged or of a later format."""
    path = files.path(workdir) / "config.json"
    if not path.exists():
        raise UserError(
            f'"{workdir}/config.json" does not exist; --workdir must be a directory that python -m dar_jax.main wrote.'
        )
    stored = files.read_json(path, dict, "copy it again")
    number = stored.pop("format", 1)
    if type(number) is not int or number not in range(1, FORMAT + 1):
        raise UserError(f'"{path}" has format {number!r}, but this version reads up to {FORMAT}; update dar_jax.')
    config = default()
    try:
        if number == 1:
            stored["model"]["space"] = "pixels" if stored["model"]["channels"] in (1, 3) else "latents"
        with config.unlocked():
            config.update(stored)
        check_fields(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of contents that no run has written
        raise UserError(f'"{path}" cannot be read ({error}); copy it again.') from error
    return config.lock()


@contextlib.contextmanager
def holding_workdir(workdir: str) -> Iterator[lock.Lock]:
    """The lock of those who write checkpoints: workdir/run.lock. Raises UserError as `lock.holding`."""
    if not workdir.strip():
        raise UserError("the workdir is empty; name a directory with --workdir.")
    path = files.path(workdir) / "run.lock"
    with lock.holding(path, f'workdir "{workdir}"', "wait for its end, or take another directory") as held:
        try:
            yield held
        except Exception:
            if jax.process_index() == 0 and not path.exists() and not files.is_remote(path):
                _remove_unfinished(workdir)
            raise


def _remove_unfinished(workdir: str) -> None:
    """Removes what a save made anew in a workdir that was removed meanwhile, and the workdir if it is empty then."""
    for path in _directory(workdir).glob("*.orbax-checkpoint-tmp"):
        files.remove_tree(path)
    with contextlib.suppress(OSError):
        _directory(workdir).rmdir()
        _directory(workdir).parent.rmdir()


def claim_workdir(workdir: str, config: ConfigDict) -> None:
    """Writes config.json, or raises UserError if the workdir holds a run that `config` cannot continue.

    The fields in `FIXED` must be those of the run; lengths, learning rate, logging and evaluation may change.
    """
    path = files.path(workdir)
    if steps := _steps(workdir):
        if "train" not in _parts(_directory(workdir) / str(steps[-1])):
            raise UserError(
                f'workdir "{workdir}" holds converted weights, not a run; take another --workdir, and start from them '
                f"with --config.init_from={workdir}."
            )
        stored = load_config(workdir)
        difference = first_difference(stored, config, FIXED)
        if _groups(stored) != _groups(config):  # they shape the optimizer's state
            difference = f"config.optimizer.groups = {_groups(stored)}, not {_groups(config)}"
        if difference:
            raise UserError(
                f'workdir "{workdir}" holds a run with {difference}; take another --workdir, or the config of that run.'
            )
    for name in FOLDERS if jax.process_index() == 0 else FOLDERS[:1]:  # every process saves its part
        files.check_directory(path / name, "--workdir")
    if jax.process_index() == 0:
        with files.writing(workdir, "--workdir"):
            content = {"format": FORMAT, **json.loads(config.to_json())}
            files.write_json(path / "config.json", files.seal(content), indent=2)


def _groups(config: ConfigDict) -> list[tuple[str, bool]]:
    """The regular expression of each group of parameters, and whether it is frozen; rates and decays may change."""
    return [(pattern, bool(settings.get("frozen"))) for pattern, settings in config.optimizer.groups]


def write_weights(workdir: str, config: ConfigDict, params: dict) -> None:
    """Makes a workdir of converted weights: config.json and, as the EMA of step 0, `params`.

    Raises UserError if the workdir holds checkpoints or cannot be written.
    """
    with holding_workdir(workdir):
        if _steps(workdir):
            raise UserError(f'--output = "{workdir}" holds checkpoints; take another.')
        claim_workdir(workdir, config)
        with contextlib.closing(Checkpoints(workdir, keep=1)) as checkpoints:
            checkpoints.save_items({"ema": params}, 0)


@contextlib.contextmanager
def writing_to(workdir: str):
    """Turns the error of a disk that is full or cannot be written, from whichever library, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = re.search("No space left on device|Disk quota exceeded|File too large|Read-only file system", str(error))
        if not full:
            raise
        step = latest_step(workdir)
        kept = "No checkpoint was saved." if step is None else f"The checkpoint of step {step} is whole."
        raise UserError(
            f'workdir "{workdir}" cannot be written: {full[0]}. {kept} Make room, and the same command goes on.'
        ) from error


def first_difference(stored: ConfigDict, wanted: ConfigDict, fields: Iterable[str]) -> str | None:
    """`config.<field> = <stored>, not <wanted>` for the first of `fields` ("model.depth", "seed") that differs."""
    a, b = json.loads(stored.to_json()), json.loads(wanted.to_json())  # tuples and lists alike
    for field in fields:
        x, y = a, b
        for name in field.split("."):
            x, y = x[name], y[name]
        if difference := _difference(x, y, f"config.{field}"):
            return difference
    return None


def _difference(a, b, name: str) -> str | None:
    if isinstance(a, dict):
        found = (_difference(a[key], b[key], f"{name}.{key}") for key in a)
        return next(filter(None, found), None)
    return None if a == b else f"{name} = {_short(a)}, not {_short(b)}"


def _short(value: Any) -> str:
    """The value, cut where it is too long for a line."""
    text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."
