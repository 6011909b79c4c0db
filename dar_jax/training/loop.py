"""The run: set everything up, then step, log, evaluate and save until done or told to stop."""

import importlib.util
import math
import signal
import threading
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dar_jax import conditions, files, hosts, models, sharding
from dar_jax.checkpoint import (
    Checkpoints,
    claim_workdir,
    holding_workdir,
    restore_ema,
    set_damaged_aside,
    writing_to,
)
from dar_jax.config import micro_batch
from dar_jax.data.captions import with_captions_of
from dar_jax.data.feed import describe_shape, max_shapes, open_batches
from dar_jax.data.sources import open_source
from dar_jax.diagnosis.curves import InlineDiagnosis
from dar_jax.errors import UserError, require
from dar_jax.evaluation.in_training import InlineEvaluation, check_evaluation, is_due, is_evaluation, unfinished
from dar_jax.init_from import check_init_from, pin_weights, restore_initial, with_teacher
from dar_jax.lock import Lock
from dar_jax.logs import Logs, say
from dar_jax.models.flops import forward_flops
from dar_jax.objectives import repa
from dar_jax.training.setup import Setup, build_algorithm, set_up

PROFILE_AFTER = 10  # steps of this process before a profile, so that none of it is compilation


def check(train: ConfigDict) -> None:
    """Raises UserError unless the microbatches of `config.train` are of one size."""
    require(
        train.batch_size % train.accumulate_steps == 0,
        f"config.train.batch_size = {train.batch_size} must be divisible by accumulate_steps = "
        f"{train.accumulate_steps}.",
    )


def train(config: ConfigDict, workdir: str, profile_steps: int = 0) -> None:
    """Trains to config.train.num_steps in `workdir`, from its latest checkpoint, else from config.init_from, if given.

    SIGTERM and SIGHUP, on any host, and in a single process Ctrl-C save and return. With `profile_steps` a trace of so
    many steps, of fewer at the end of the run, is written to workdir/profile. `config` has passed `validate`. Raises
    UserError, before anything is compiled, for what cannot work here, and later when the loss, the gradient or the
    weights are no longer finite.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_model(mesh, config.model)
    sharding.check_batch(mesh, "config.train.batch_size / accumulate_steps", micro_batch(config))
    if config.diagnosis.every_steps:
        sharding.check_batch(mesh, "config.diagnosis.num_images", config.diagnosis.num_images)
    source = open_source(config.data, config.data.train_split)
    config = with_teacher(with_captions_of(source, config))
    conditions.build(config.model).check_data(source)
    if config.data.source == "latents":
        source.check_patches(config.model.patch_size)
    if config.eval.every_steps:
        check_evaluation(config, source)
    with sharding.use(mesh), holding_workdir(workdir) as lock, writing_to(workdir), _StopSignal() as stop:
        latest = set_damaged_aside(workdir)
        hosts.agree({"the latest checkpoint": latest, "the number of examples": len(source)}, "the first step")
        first_step = latest or 0
        with open_batches(config, mesh, batch_size=config.train.batch_size, first_step=first_step) as batches:
            if config.init_from and latest is None:
                check_init_from(config)
            repa.check_files(config)
            config = pin_weights(config, workdir)
            claim_workdir(workdir, config)
            with closing(Checkpoints(workdir, config.checkpoint.keep)) as checkpoints:
                run = set_up(config, build_algorithm(config), mesh)
                state = _first_state(config, workdir, mesh, run, checkpoints)
                evaluations = unfinished(config, workdir, checkpoints.steps)
                if first_step >= config.train.num_steps and not evaluations:
                    say(
                        f"nothing to do: {workdir} is at step {first_step} of {config.train.num_steps}; raise "
                        "--config.train.num_steps to go on"
                    )
                    return
                frozen = run.load_frozen()
                if run.begin and checkpoints.latest_step is None:
                    state = state.replace(**run.begin(frozen))
                hooks = _Hooks.start(config, workdir, mesh, run, first_step, profile_steps, checkpoints)
                with closing(hooks.logs):
                    _make_up(evaluations, run, state, frozen, hooks)
                    if first_step < config.train.num_steps:
                        _loop(config, run, state, frozen, batches, hooks, stop, lock)


def _first_state(config: ConfigDict, workdir: str, mesh: Mesh, run: Setup, checkpoints: Checkpoints) -> Any:
    if checkpoints.latest_step is not None:
        state = checkpoints.restore(run.state)
        say(f"resumed at step {checkpoints.latest_step} from {workdir}/checkpoints")
        return state
    state = run.init()
    if config.init_from:
        ema = restore_initial(config, state.ema, mesh)
        # A copy, because the step donates the state and no buffer twice.
        state = state.replace(params={**state.params, **jax.tree.map(jnp.copy, ema)}, ema=ema)
    _describe(state.params)
    return state


class _Hooks(NamedTuple):
    """What happens beside the steps."""

    workdir: str
    checkpoints: Checkpoints
    logs: Logs
    metrics: "_Metrics"
    profile: "_Profile"
    evaluation: InlineEvaluation | None
    diagnosis: InlineDiagnosis | None

    @classmethod
    def start(cls, config, workdir, mesh, run, first_step, profile_steps, checkpoints) -> "_Hooks":
        model, evaluation, diagnosis = models.build(config.model), None, None
        if config.eval.every_steps:
            evaluation = InlineEvaluation(config, run.algorithm.sample, mesh, workdir, say)
        if config.diagnosis.every_steps:
            diagnosis = InlineDiagnosis(config, model, mesh)
        flops_per_step = run.algorithm.forward_passes * config.train.batch_size * forward_flops(model)
        logs = Logs(workdir, first_step, config.train.num_steps, config.train.batch_size, flops_per_step)
        logs.say_what_is_missing(first_step, config.train.log_every_steps)
        metrics = _Metrics(config, workdir, logs, checkpoints)
        profile = _Profile(workdir, first_step + PROFILE_AFTER, profile_steps)
        return cls(workdir, checkpoints, logs, metrics, profile, evaluation, diagnosis)


def _make_up(steps: list[int], run: Setup, state: Any, frozen: Any, hooks: _Hooks) -> None:
    """Evaluates the checkpoints of `steps`, of which the newest may be that of `state`."""
    for step in steps:
        say(f"making up for the evaluation of step {step}, which did not finish")
        try:
            if step == state.step:
                ema, params = state.ema, state.params
            else:
                ema, params = restore_ema(hooks.workdir, run.state.ema, step)[0], None
        except UserError as error:
            say(f"it cannot be made up for: {error}")
            continue
        assembled = [weights and run.algorithm.assemble(weights, frozen) for weights in (ema, params)]
        _evaluate(hooks, assembled[0], step, assembled[1])


def _loop(
    config: ConfigDict, run: Setup, state: Any, frozen: Any, batches, hooks: _Hooks, stop: "_StopSignal", lock: Lock
) -> None:
    """Takes the steps that are left, and saves where the run ends or is stopped, as long as `lock` is held."""
    step, num_steps, assemble = int(state.step), config.train.num_steps, run.algorithm.assemble
    shapes, most = set(), max_shapes(config)
    while step < num_steps and not stop(step):
        batch = next(batches)
        is_new = (shape := describe_shape(batch)) not in shapes
        if is_new:
            shapes.add(shape)
            say(f"compiling the train step{f' for {shape}, shape {len(shapes)} of at most {most}' if most > 1 else ''}")
        state, metrics = run.step(state, frozen, batch)
        step += 1
        hooks.metrics.add(step, metrics)
        if is_new:
            hooks.metrics.settle()
            hooks.logs.start_window(step)  # speed without the time of compiling
        hooks.profile.after(step, hooks.metrics)
        if hooks.diagnosis and step % config.diagnosis.every_steps == 0:
            hooks.metrics.settle()
            hooks.logs.write(step, hooks.diagnosis.run(assemble(state.params, frozen)))
            hooks.logs.start_window(step)
        evaluate = is_due(config, step)
        if evaluate or step % config.checkpoint.every_steps == 0 or step == num_steps:
            hooks.metrics.settle()
            lock.check()
            hooks.logs.flush()  # first, so that no metrics are missing before a checkpoint
            hooks.checkpoints.save(state, step)
            if evaluate:
                _evaluate(hooks, assemble(state.ema, frozen), step, assemble(state.params, frozen))
            hooks.logs.start_window(step)
    hooks.metrics.settle()
    hooks.profile.stop()
    if step < num_steps:
        lock.check()
        hooks.checkpoints.save(state, step)
        hooks.checkpoints.wait()
        say(f"stopped by a signal at step {step}, saved; the same command goes on from here")


def _evaluate(hooks: _Hooks, ema: Any, step: int, params: Any) -> None:
    scores = hooks.evaluation.run(ema, step, params)
    if scores:
        hooks.checkpoints.note_score(step, *next(iter(scores.items())))
    hooks.logs.drop(lambda line: line["step"] == step and is_evaluation(line))
    hooks.logs.write(step, scores)  # last, because it says that the evaluation is finished
    say(
        f"step {step}: {hooks.workdir}/samples/{step:08d}.png  "
        + _format({k: v for k, v in scores.items() if "/" not in k})
    )


class _Metrics:
    """The metrics of the steps: logged, and the end of a run that diverges.

    Those of the newest step are fetched only when the next one is on its way, so that the devices do not wait.
    """

    def __init__(self, config: ConfigDict, workdir: str, logs: Logs, checkpoints: Checkpoints):
        self.settings, self.workdir, self.logs, self.checkpoints = config.train, workdir, logs, checkpoints
        self.pending, self.skipped, self.skipped_in_a_row = None, 0, 0

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Notes the metrics of a step that was started, and settles those of the step before."""
        self.settle()
        self.pending = step, metrics

    def settle(self) -> None:
        """Waits for the newest step. Raises UserError if it, and too many before it, are not finite."""
        if self.pending is None:
            return
        (step, values), self.pending = self.pending, None
        values = {name: float(value) for name, value in values.items()}
        is_finite = all(math.isfinite(value) for value in values.values())
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        self.skipped += not is_finite
        max_skipped = self.settings.max_skipped
        if self.skipped_in_a_row > max_skipped:
            raise UserError(diverged(step, values, self.checkpoints.steps, self.workdir, max_skipped))
        if not is_finite:
            say(f"step {step} is not finite and skipped: {_format(values)}  ({self.skipped} skipped so far)")
        elif step % self.settings.log_every_steps == 0 or step == self.settings.num_steps:
            self.logs.progress(step, {**values, "skipped": self.skipped} if max_skipped else values)


def diverged(step: int, values: dict[str, float], steps: list[int], workdir: str, max_skipped: int) -> str:
    """What to say and do when `values` of `step` are not all finite and the checkpoints of `steps` are saved."""
    text = f"step {step} is not finite: {_format(values)}. "
    if max_skipped:
        return (
            f"{text}So were the {max_skipped} before it, all skipped (config.train.max_skipped). Start again from the "
            f"last checkpoint in {workdir} with a lower config.optimizer.learning_rate, or look at these steps' data."
        )
    # All metrics but the norm of the new weights are of the weights before: their checkpoint would fail again.
    before = [value for name, value in values.items() if name != "param_norm"]
    bad = step if all(math.isfinite(value) for value in before) else step - 1
    good = max((s for s in steps if s < bad), default=None)
    text += (
        "No good checkpoint was saved. " if good is None else f"The last good checkpoint is step {good} in {workdir}. "
    )
    for s in steps:
        if s >= bad:
            text += f"Remove {workdir}/checkpoints/{s}, which leads here. "
    return text + (
        "Lower config.optimizer.learning_rate, set config.optimizer.clip_norm, or leave out such steps with "
        "config.train.max_skipped, and start again."
    )


class _Profile:
    """A trace of `count` steps, the first of them after step `first`, in workdir/profile.

    Raises UserError beside a TPU library that jax has loaded in vain: the process would end in a segmentation fault.
    """

    def __init__(self, workdir: str, first: int, count: int):
        has_vain_library = jax.default_backend() != "tpu" and importlib.util.find_spec("libtpu")
        if count and has_vain_library and not jax.config.jax_platforms:
            raise UserError(
                f"--profile={count}: jax cannot trace beside an installed libtpu without a TPU; set JAX_PLATFORMS="
                f"{'cuda,cpu' if jax.default_backend() == 'gpu' else 'cpu'} in the environment."
            )
        self.path, self.first, self.count, self.mirror = f"{workdir}/profile", first, count, None

    def after(self, step: int, metrics: _Metrics) -> None:
        """Starts or stops the trace, if it is time."""
        if self.count and step in (self.first, self.first + self.count):
            metrics.settle()
            if self.mirror:
                self.stop()
            else:
                self.mirror = files.Mirror(self.path)
                jax.profiler.start_trace(self.mirror.directory)

    def stop(self) -> None:
        """Ends the trace, if one is under way."""
        if self.mirror:
            jax.profiler.stop_trace()
            self.mirror.close()
            self.mirror = None
            say(f"wrote a trace to {self.path}; look at it with xprof or tensorboard --logdir={self.path}")


def _format(scalars: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())


def _describe(params) -> None:
    try:
        from clu import parameter_overview
    except ImportError:
        say(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")
    else:
        say(parameter_overview.get_parameter_overview(params, include_stats=False))


class _StopSignal:
    """Within its context SIGTERM, SIGHUP and SIGINT ask the loop to stop; calling it says whether they did.

    With several processes any of them asks all, which stop before the same step; there SIGINT interrupts at once.
    """

    def __enter__(self):
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            alone = (signal.SIGINT,) if jax.process_count() == 1 else ()
            for number in (signal.SIGTERM, signal.SIGHUP, *alone):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does with SIGHUP
                    self.previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_):
        hosts.forget_stop()
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        hosts.ask_to_stop()
        if signal.SIGINT in self.previous:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C interrupts at once

    def __call__(self, step: int) -> bool:
        return hosts.is_stopping(step)
