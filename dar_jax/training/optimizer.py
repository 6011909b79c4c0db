"""AdamW with the schedules and parameter groups of `config.optimizer`."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from dar_jax.errors import UserError, check_choice, check_number, require

GROUP_FIELDS = ("learning_rate", "weight_decay", "frozen")


def check(optimizer: ConfigDict) -> None:
    """Raises UserError for the first field of `config.optimizer` that cannot work."""
    check_choice("config.optimizer.schedule", optimizer.schedule, SCHEDULES)
    for i, group in enumerate(optimizer.groups):
        name = f"config.optimizer.groups[{i}]"
        require(
            isinstance(group, tuple | list)
            and len(group) == 2
            and isinstance(group[0], str)
            and isinstance(group[1], Mapping | ConfigDict),
            f'{name} = {group} must be a regular expression and its settings, as ("head/.*", {{"frozen": True}}).',
        )
        pattern, settings = group
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f'{name}: "{pattern}" is no regular expression ({error}).') from error
        for field, value in settings.items():
            check_choice(name, field, GROUP_FIELDS)
            if field != "frozen":
                check_number(f"{name}.{field}", value, float, "[0, inf)")
            elif not isinstance(value, bool):
                raise UserError(f"{name}.frozen = {value!r} must be of type bool.")


def _constant(peak: float, warmup: int, num_steps: int) -> optax.Schedule:
    return optax.warmup_constant_schedule(0.0 if warmup else peak, peak, warmup)


def _cosine(peak: float, warmup: int, num_steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, max(num_steps, warmup + 1))


SCHEDULES = {"constant": _constant, "cosine": _cosine}


def make_schedule(optimizer: ConfigDict, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then constant or a cosine to 0 at `num_steps`."""
    return SCHEDULES[optimizer.schedule](optimizer.learning_rate, optimizer.warmup_steps, num_steps)


def make_optimizer(optimizer: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """AdamW (float32 state), after clipping by the global norm where `clip_norm` > 0.

    A parameter belongs to the first of `optimizer.groups` whose regular expression matches its whole path, as
    "stack/steps/block_0/adaln/kernel". A group may have a learning rate and weight decay of its own, or be frozen. A
    frozen parameter has no optimizer state, and its gradient does not count in the clipped norm.
    """
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    if not optimizer.groups:
        return optax.chain(clip, _adamw(optimizer, num_steps))
    groups = {str(i): group for i, (_, group) in enumerate(optimizer.groups)} | {"other": {}}

    def labels(params):
        return _labels(optimizer, params)

    def is_frozen(params):
        return jax.tree.map(lambda name: bool(groups[name].get("frozen")), labels(params))

    adamw = {
        name: _adamw(ConfigDict({**optimizer, **group}, convert_dict=False), num_steps)
        for name, group in groups.items()
    }
    return optax.chain(optax.masked(optax.set_to_zero(), is_frozen), clip, optax.multi_transform(adamw, labels))


def _adamw(settings: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """Of one group of parameters: `settings` are those of the optimizer, with the group's own in their places."""
    if settings.get("frozen"):
        return optax.set_to_zero()
    return optax.adamw(
        make_schedule(settings, num_steps), b1=settings.b1, b2=settings.b2, weight_decay=settings.weight_decay
    )


def _labels(optimizer: ConfigDict, params: Any) -> Any:
    """The group of each parameter. Raises UserError for a group that has none, which is most likely a typo."""
    patterns = [re.compile(pattern) for pattern, _ in optimizer.groups]
    found = set()

    def label(path, _) -> str:
        name = _path_name(path)
        group = next((str(i) for i, pattern in enumerate(patterns) if pattern.fullmatch(name)), "other")
        found.add(group)
        return group

    labels = jax.tree_util.tree_map_with_path(label, params, is_leaf=lambda x: hasattr(x, "unbox"))
    for i, (pattern, _) in enumerate(optimizer.groups):
        if str(i) not in found:
            names = [_path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            raise UserError(
                f'config.optimizer.groups[{i}]: no parameter is left for "{pattern}"; paths are like {names[0]} and '
                f"{names[-1]}."
            )
    return labels


def _path_name(path: tuple) -> str:
    """The path of a leaf as "stack/steps/block_0/adaln/kernel"."""
    return "/".join(str(key.key) for key in path if hasattr(key, "key"))
