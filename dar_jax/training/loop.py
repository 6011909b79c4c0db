"""The run: build everything, then step, log, evaluate and save until done or told to stop."""

import math
import signal
import threading
from contextlib import closing

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dar_jax import models, sharding
from dar_jax.config import encodes_online, micro_batch, validate
from dar_jax.data.pipeline import train_iterator
from dar_jax.data.sources import open_source
from dar_jax.diagnosis.inline import InlineDiagnosis
from dar_jax.diffusion import sampler
from dar_jax.errors import UserError
from dar_jax.evaluation.inline import InlineEvaluation
from dar_jax.models.flops import forward_flops
from dar_jax.training.checkpoint import Checkpoints, claim_workdir, latest_step, writing_to
from dar_jax.training.init_from import check_init_from, restore_initial
from dar_jax.training.logs import Logs, say
from dar_jax.training.online import make_online_encoder
from dar_jax.training.optimizer import make_optimizer
from dar_jax.training.state import make_state
from dar_jax.training.step import make_train_step

PROFILE_AFTER = 10  # steps of this process before a profile, so that none of it is compilation


def train(config: ConfigDict, workdir: str, profile_steps: int = 0) -> None:
    """Trains to config.train.num_steps in `workdir`, from its latest checkpoint, else from config.init_from, if given.

    SIGTERM, on any host, and in a single process Ctrl-C save and return. With `profile_steps` a trace of so many
    steps, of fewer at the end of the run, is written to workdir/profile. Raises UserError, before anything is compiled,
    for what cannot work, and when the loss, the gradient or the weights are no longer finite.
    """
    validate(config)
    sampler.check(config.sampler)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_model(mesh, config.model)
    sharding.check_batch(mesh, "config.train.batch_size / accumulate_steps", micro_batch(config))
    if config.diagnosis.every_steps:
        sharding.check_batch(mesh, "config.diagnosis.num_images", config.diagnosis.num_images)
    num_classes = open_source(config.data, config.data.train_split).num_classes
    if num_classes > config.model.num_classes:
        raise UserError(
            f"config.model.num_classes = {config.model.num_classes} but the data has {num_classes} classes; "
            f"set it to {num_classes}."
        )
    rows, first_step = sharding.local_rows(mesh, config.train.batch_size), latest_step(workdir) or 0
    iterator = train_iterator(
        config.data,
        channels=3 if encodes_online(config) else config.model.channels,
        batch_size=config.train.batch_size,
        seed=config.seed,
        first_step=first_step,
        rows=rows,
    )
    with writing_to(workdir), sharding.use(mesh), _StopSignal() as stop, closing(iterator):
        if config.init_from and latest_step(workdir) is None:
            check_init_from(config)
        claim_workdir(workdir, config)
        batches = (sharding.from_local_rows(mesh, config.train.batch_size, rows, local) for local in iterator)
        with closing(Checkpoints(workdir, config.checkpoint.keep)) as checkpoints:
            _run(config, workdir, mesh, batches, first_step, checkpoints, stop, profile_steps)


def _run(config, workdir, mesh, batches, first_step, checkpoints, stop, profile_steps) -> None:
    model = models.build(config.model)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    init, abstract = make_state(config, model, optimizer, mesh)
    if checkpoints.latest_step is None:
        state = init()
        if config.init_from:
            params = restore_initial(config, abstract.params, mesh)
            # Copies, because the step donates the state and no buffer twice.
            state = state.replace(params=params, ema=jax.tree.map(jnp.copy, params))
        _describe(state.params)
    else:
        state = checkpoints.restore(abstract)
        say(f"resumed at step {checkpoints.latest_step} from {workdir}/checkpoints")
    step = int(state.step)
    if step != first_step:
        raise UserError(
            f'the latest checkpoint in "{workdir}" was of step {first_step}, which the data follow, and is now of step '
            f"{step}: another run writes there, or the hosts do not see the same directory."
        )
    num_steps = config.train.num_steps
    if step >= num_steps:
        say(f"nothing to do: {workdir} is at step {step} of {num_steps}; raise --config.train.num_steps to go on")
        return

    encode = make_online_encoder(config, mesh) if encodes_online(config) else None
    evaluation = InlineEvaluation(config, model, mesh, workdir, say) if config.eval.every_steps else None
    diagnosis = InlineDiagnosis(config, model, mesh) if config.diagnosis.every_steps else None
    flops_per_step = 3 * config.train.batch_size * forward_flops(config.model)
    logs = Logs(workdir, first_step, num_steps, config.train.batch_size, flops_per_step)
    take_step = jax.jit(make_train_step(config, model, optimizer), donate_argnums=0)
    pending = None  # (step, metrics) of the newest step: fetched only when the next one is on its way
    skipped = skipped_in_a_row = 0

    def settle() -> None:
        nonlocal pending, skipped, skipped_in_a_row
        if pending is None:
            return
        (settled, values), pending = pending, None
        values = {name: float(value) for name, value in values.items()}
        is_finite = all(math.isfinite(value) for value in values.values())
        skipped_in_a_row = 0 if is_finite else skipped_in_a_row + 1
        skipped += not is_finite
        if skipped_in_a_row > config.train.max_skipped:
            raise UserError(_diverged(settled, values, checkpoints.steps, workdir, config.train.max_skipped))
        if not is_finite:
            say(f"step {settled} is not finite and skipped: {_format(values)}  ({skipped} skipped so far)")
        elif settled % config.train.log_every_steps == 0 or settled == num_steps:
            logs.progress(settled, {**values, "skipped": skipped} if config.train.max_skipped else values)
        if settled == first_step + 1:
            logs.start_window(settled)  # speed without the time of compiling

    say("compiling the train step")
    try:
        while step < num_steps and not stop(step):
            batch = next(batches)
            if encode:
                batch["image"] = encode(batch["image"], step)
            state, metrics = take_step(state, batch)
            step += 1
            settle()
            pending = step, metrics
            if diagnosis and step % config.diagnosis.every_steps == 0:
                settle()
                logs.write(step, diagnosis.run(state.params))
                logs.start_window(step)
            evaluate = evaluation and (step % config.eval.every_steps == 0 or step == num_steps)
            save = evaluate or step % config.checkpoint.every_steps == 0 or step == num_steps
            if profile_steps and step - first_step in (PROFILE_AFTER, PROFILE_AFTER + profile_steps):
                settle()
                _profile(workdir, step - first_step == PROFILE_AFTER)
            if save:
                settle()
                checkpoints.save(state, step)
            if evaluate:
                scalars = evaluation.run(state.ema, step)
                logs.write(step, scalars)
                say(f"step {step}: {workdir}/samples/{step:08d}.png  " + _format(scalars))
                if scalars:
                    checkpoints.note_score(step, *next(iter(scalars.items())))
            if save:
                logs.start_window(step)
        settle()
        if profile_steps and PROFILE_AFTER <= step - first_step < PROFILE_AFTER + profile_steps:
            _profile(workdir, start=False)
        if step < num_steps:
            checkpoints.save(state, step)
            checkpoints.wait()
            say(f"stopped by a signal at step {step}, saved; the same command goes on from here")
    finally:
        logs.close()


def _diverged(step: int, values: dict[str, float], steps: list[int], workdir: str, max_skipped: int) -> str:
    """What to say and do when `values` of `step` are not all finite."""
    text = f"step {step} is not finite: {_format(values)}. "
    if max_skipped:
        return (
            f"{text}So were the {max_skipped} before it, all skipped (config.train.max_skipped). Start again from the "
            f"last checkpoint in {workdir} with a lower config.optimizer.learning_rate, or look at these steps' data."
        )
    # The loss of a step is of the weights before it: a checkpoint of these weights would fail again.
    bad = step - 1 if not math.isfinite(values["loss"] + values["grad_norm"]) else step
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


def _profile(workdir: str, start: bool) -> None:
    path = f"{workdir}/profile"
    if start:
        jax.profiler.start_trace(path)
    else:
        jax.profiler.stop_trace()
        say(f"wrote a trace to {path}; look at it with xprof or tensorboard --logdir={path}")


def _format(scalars: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())


def _describe(params) -> None:
    from clu import parameter_overview

    say(parameter_overview.get_parameter_overview(params, include_stats=False))


class _StopSignal:
    """Within its context SIGTERM and SIGINT ask the loop to stop; calling it says whether they did."""

    def __enter__(self):
        self.asked = False
        self.previous = {}
        # With several processes jax.distributed listens for SIGTERM, and a handler here would silence it.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C interrupts at once

    def __call__(self, step: int) -> bool:
        if jax.process_count() > 1:  # all hosts must stop at the same step
            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked
