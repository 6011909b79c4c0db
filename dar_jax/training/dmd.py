"""Distillation by distribution matching: a student of a few steps, a fake score that follows it, a frozen teacher.

A step updates the fake score `dmd.fake_updates` times on fresh samples of the student, and then the student once
(objectives/dmd.py). The student starts from the teacher's weights, routed or not, or as adapters on them. So does the
fake score. Neither is guided.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax import Array
from ml_collections import ConfigDict

from dar_jax import conditions, diffusion, models, objectives
from dar_jax.diffusion import guidance
from dar_jax.models import lora
from dar_jax.objectives import Objective, adapted, dmd
from dar_jax.training.algorithm import Algorithm
from dar_jax.training.optimizer import make_optimizer
from dar_jax.training.update import averaged, value_and_grad

FAKE_STREAM = 2**32 - 4  # of the key of `init`, for the adapters of the fake score


class DmdState(flax.struct.PyTreeNode):
    """What a distillation carries from step to step.

    Attributes:
      step: updates of the student taken, int32.
      params: float32 weights of the student, or of its adapters.
      ema: their exponential moving average, the weights that samples come from.
      opt_state: of the student's optimizer.
      fake: float32 weights of the fake score, or of its adapters on the teacher.
      fake_opt_state: of its optimizer.
    """

    step: Array
    params: dict
    ema: dict
    opt_state: optax.OptState
    fake: dict
    fake_opt_state: optax.OptState


def build(
    config: ConfigDict, objective: Objective, teacher: ConfigDict, load_teacher: Callable[[Any], dict]
) -> Algorithm:
    """The algorithm of `config.dmd`.

    What is frozen is {"student": what `objective` has frozen, "teacher": the teacher's weights}. The teacher is ()
    where it is the frozen base of the student.

    Args:
      config: of the run.
      objective: of the student: its parameters and how they are assembled.
      teacher: config of the run that is distilled.
      load_teacher: abstract weights of the teacher, with shardings -> its weights.
    """
    settings, seed, num_micro = config.dmd, config.seed, config.train.accumulate_steps
    process, kind = diffusion.build(config.diffusion), conditions.build(config.model)
    path, prediction = process.path, process.prediction
    times = dmd.student_times(settings, prediction.time_range(sampling=True))
    student_model, teacher_model = models.build(config.model), models.build(teacher.model)
    teacher_objective = objectives.build(teacher)
    is_shared = config.lora.rank > 0 and not adapted.is_rearranged(config.model)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    of_fake = config.optimizer.copy_and_resolve_references()
    of_fake.update(learning_rate=settings.fake_learning_rate, schedule="constant", warmup_steps=0)
    of_fake.groups = ()
    fake_optimizer = make_optimizer(of_fake, config.train.num_steps)

    def init(key: Array) -> DmdState:
        params = objective.init(key)
        fake = teacher_objective.init_sampled(key)
        if settings.fake_rank:
            fake = lora.init(jax.random.fold_in(key, FAKE_STREAM), fake, settings.fake_rank, config.lora.targets)
        ema = jax.tree.map(jnp.copy, params)  # a copy, because the step donates the state and no buffer twice
        return DmdState(jnp.int32(0), params, ema, optimizer.init(params), fake, fake_optimizer.init(fake))

    def init_frozen(key: Array) -> dict:
        weights = () if is_shared else teacher_objective.init_sampled(key)
        if config.lora.rank:
            weights = jax.tree.map(lambda x: x.astype(config.lora.dtype), weights)
        return {"student": objective.init_frozen(key), "teacher": weights}

    def load_frozen(abstract: dict) -> dict:
        student = objective.load_frozen(abstract["student"]) if objective.load_frozen else ()
        return {"student": student, "teacher": () if is_shared else load_teacher(abstract["teacher"])}

    def begin(frozen: dict) -> dict:
        """The fake score begins as the teacher."""
        return {"fake": jax.tree.map(lambda x: x.astype(jnp.float32), teacher_of(frozen))}

    def teacher_of(frozen: dict) -> dict:
        return frozen["student"]["base"] if is_shared else frozen["teacher"]

    def assemble(trained: dict, frozen: dict) -> dict:
        return objective.assemble(trained, frozen["student"])

    def fake_of(fake: dict, frozen: dict) -> dict:
        return lora.assemble(teacher_of(frozen), fake, 1.0) if settings.fake_rank else fake

    def real_of(fake: dict, frozen: dict, step: Array) -> dict:
        if not settings.real_scale:
            return teacher_of(frozen)
        share = settings.real_scale * dmd.annealed(settings, step)
        leaves = traverse_util.flatten_dict(fake)
        shared = {key: share * leaf if key[-1] == "lora_b" else leaf for key, leaf in leaves.items()}
        return fake_of(traverse_util.unflatten_dict(shared), frozen)

    def call(model, params: dict, condition: dict, x_t: Array, t: Array) -> Array:
        return model.apply({"params": params}, x_t, t, condition).prediction

    def data(output: Callable[[Array, Array], Array], x_t: Array, t: Array) -> Array:
        return prediction.data(output(x_t, t), x_t, t)

    def generated(params: dict, key: Array, batch: dict) -> dict:
        """The inputs of one step of the student, the same step for all samples: {"x": [B, ...], "t": [B]}."""
        x1, condition = batch["x1"], batch["condition"]
        noise_key, step_key, keys_key = jax.random.split(key, 3)
        x0, keys = jax.random.normal(noise_key, x1.shape, x1.dtype), jax.random.split(keys_key, len(x1))
        k = jax.random.randint(step_key, (), 0, settings.num_steps)
        student = partial(data, partial(call, student_model, params, condition))
        x = dmd.step_inputs(student, settings, path, times, x0, keys, k)
        at, following = (jnp.full(x1.shape[:1], jnp.asarray(times, x1.dtype)[i]) for i in (k, k + 1))
        return {"x": x, "t": at, "t_next": following, "condition": condition}

    def update_fake(carry: tuple, key: Array, params: dict, frozen: dict, batch: dict) -> tuple[tuple, dict]:
        fake, opt_state = carry
        sample_key, draw_key = jax.random.split(key)
        inputs = generated(params, sample_key, batch)
        x1 = data(partial(call, student_model, params, inputs["condition"]), inputs["x"], inputs["t"])
        t, x0 = process.draw(draw_key, x1)

        def loss(fake: dict, drawn: dict) -> tuple[Array, dict]:
            predict = partial(call, teacher_model, fake_of(fake, frozen), drawn["condition"])
            return jnp.mean(process.loss(predict, drawn["x1"], drawn["x0"], drawn["t"])), {}

        drawn = {"x1": x1, "x0": x0, "t": t, "condition": inputs["condition"]}
        metrics, grads = value_and_grad(loss, fake, drawn, num_micro)
        updates, opt_state = fake_optimizer.update(grads, opt_state, fake)
        found = {"loss_fake": metrics["loss"], "grad_norm_fake": optax.global_norm(grads)}
        return (optax.apply_updates(fake, updates), opt_state), found

    def student_loss(trained: dict, drawn: dict, frozen: dict, fake: dict, step: Array) -> tuple[Array, dict]:
        condition = drawn["condition"]
        null, params = kind.null(condition), assemble(trained, frozen)
        x1 = data(partial(call, student_model, params, condition), drawn["x"], drawn["t"])
        clean = jax.lax.stop_gradient(x1)
        real_params = real_of(fake, frozen, step)
        # Decoupled, the comparison is without guidance, whose part follows below.
        scale = 1.0 if settings.decoupled else settings.guidance
        rescaled_patch = config.model.patch_size if settings.guidance_rescale else 0
        conditional = lambda x_t, t, condition: call(teacher_model, real_params, condition, x_t, t)  # noqa: E731
        guide = partial(guidance.guided, conditional, rescaled_patch=rescaled_patch)
        real = guide(condition, null, scale=scale)
        fake_output = partial(call, teacher_model, fake_of(fake, frozen), condition)

        t = drawn["t_renoised"]
        x_t = path.interpolate(clean, drawn["noise"], t)
        outputs = fake_output(x_t, t), real(x_t, t)
        seen_fake, seen_real = (prediction.data(output, x_t, t) for output in outputs)
        direction = dmd.gradient(clean, seen_fake, seen_real)
        v_fake, v_real = (prediction.velocity(output, x_t, t) for output in outputs)
        if settings.decoupled and settings.guidance != 1:
            t = drawn["t_guided"]
            x_t = path.interpolate(clean, drawn["noise_guided"], t)
            with_condition = data(partial(conditional, condition=condition), x_t, t)
            without = data(partial(conditional, condition=null), x_t, t)
            direction += dmd.guidance_gradient(clean, with_condition, without, settings.guidance, seen_real)
        metrics = {
            "cosine_fake_real": jnp.sum(v_fake * v_real) / (jnp.linalg.norm(v_fake) * jnp.linalg.norm(v_real)),
            "gap_fake_real": jnp.linalg.norm(v_real - v_fake) / jnp.linalg.norm(v_real),
        }
        return dmd.matching_loss(x1, jax.lax.stop_gradient(direction)), metrics

    def draw_student(params: dict, key: Array, batch: dict, step: Array) -> dict:
        keys = jax.random.split(key, 5)
        inputs, x1 = generated(params, keys[0], batch), batch["x1"]
        inputs["t_renoised"] = 1 - dmd.draw_levels(keys[1], len(x1), settings, step)
        inputs["noise"] = jax.random.normal(keys[2], x1.shape, x1.dtype)
        if settings.decoupled:
            low, _ = settings.renoise_range
            unit = jax.random.uniform(keys[3], x1.shape[:1])
            inputs["t_guided"] = low + (jnp.maximum(inputs["t_next"], low) - low) * unit
            inputs["noise_guided"] = jax.random.normal(keys[4], x1.shape, x1.dtype)
        return inputs

    def step(state: DmdState, frozen: dict, batch: dict) -> tuple[DmdState, dict]:
        fake_key, student_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        params = assemble(state.params, frozen)
        update = partial(update_fake, params=params, frozen=frozen, batch=batch)
        carry = state.fake, state.fake_opt_state
        (fake, fake_opt_state), found = jax.lax.scan(update, carry, jax.random.split(fake_key, settings.fake_updates))
        drawn = draw_student(params, student_key, batch, state.step)
        loss = partial(student_loss, frozen=frozen, fake=fake, step=state.step)
        metrics, grads = value_and_grad(loss, state.params, drawn, num_micro)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        trained = optax.apply_updates(state.params, updates)
        ema = averaged(state.ema, trained, config.optimizer.ema_decay)
        metrics |= {name: values[-1] for name, values in found.items()}
        metrics |= {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(trained)}
        return DmdState(state.step + 1, trained, ema, opt_state, fake, fake_opt_state), metrics

    begins = None if settings.fake_rank else begin
    return Algorithm(init, step, objective.sample, init_frozen, load_frozen, assemble, begins, forward_passes(config))


def forward_passes(config: ConfigDict) -> float:
    """Of a step for each image, on average, as `Algorithm.forward_passes`."""
    settings = config.dmd
    student, fake = 2 if config.lora.rank else 3, 2 if config.dmd.fake_rank else 3
    simulated = (settings.num_steps - 1) / 2
    of_teacher = 1 if settings.guidance == 1 else 3 if settings.decoupled else 2
    return settings.fake_updates * (simulated + 1 + fake) + simulated + student + 1 + of_teacher
