"""The statistics of the diagnosis (paper, Section 3), for one batch; and a linear probe of t that streams.

Block k hands on the state z_k, which the first sublayer of block k + 1 reads, or for the last block the head: in a
residual model the stream, in a routed one the aggregated state. The loss is the velocity MSE of one example, so its
derivatives do not depend on the batch size. Norms and sums are float32, whatever the model computes in.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from dar_jax import diffusion
from dar_jax.diagnosis.forward import forward
from dar_jax.diagnosis.pairs import noise
from dar_jax.evaluation.statistics import Accumulator
from dar_jax.models import SiT
from dar_jax.models.layers import patchify
from dar_jax.routing import Layout

RIDGE = 1e-3  # penalty of the linear probe, for features of unit variance


def make_velocity_loss(config: ConfigDict) -> Callable[[Callable[[Array, Array], Array], dict, Array], Array]:
    """Returns (predict, batch, t) -> the velocity MSE `[B]` of the pairs of `batch` at times t `[B]`.

    It is that of the velocity, whatever the model predicts. `predict` maps x_t [B, H, W, C] and t [B] to the model's
    output [B, H, W, C]; `batch` is one of `pairs.batches`.
    """
    process, seed = diffusion.build(config.diffusion), config.seed

    def velocity_loss(predict, batch, t):
        return process.velocity_loss(predict, batch["x1"], noise(seed, batch["index"], batch["x1"].shape[1:]), t)

    return velocity_loss


def make_measure(config: ConfigDict, model: SiT) -> Callable[[dict, dict, Array], tuple[dict, dict]]:
    """Returns measure(params, batch, t) -> (sums, features), a pure function to jit.

    With A = 2 * depth + 1 readers (`forward.Reads`), `sums` are over the examples of weight 1, float32; `averages`
    turns them into the statistics:
      count, loss: []
      forward_rms, backward_rms: [depth], squares of z_k and of dLoss/dz_k, means over tokens and features
      similarity: [depth - 1], cos(z_k, z_(k+1)), means over tokens
      alignment, if the batch has a "target": [depth], `token_alignment` of z_k with it
      routed: weights [A, A], of source i for reader l, and entropy [A] of a reader's weights in nats, means over
        tokens
      residual: gate_gradient and gate_gradient_abs [A, A]: dLoss/dg of a gate g = 1 in front of source i where
        reader l sums it up, h_l = sum_i g_(i->l) v_i; as it is, whose mean is the derivative of the mean loss, and
        its absolute value, the importance.
    `features` are of every example, also of weight 0: "x_t" [B, F] and "states" [A, B, D], means over tokens, beside
    the batch's "index" and "weight".
    """
    depth, size = model.depth, model.hidden_size
    tokens = (model.input_size // model.patch_size) ** 2
    velocity_loss = make_velocity_loss(config)

    def measure(params: dict, batch: dict, t: Array) -> tuple[dict, dict]:
        weight = batch["weight"]

        def loss(taps):
            found = {}

            def predict(x_t, t):
                prediction, found["reads"] = forward(model, params, x_t, t, batch["condition"], taps)
                found["x_t"] = x_t
                return prediction

            per_example = velocity_loss(predict, batch, t)
            return jnp.sum(per_example * weight), (per_example, found)

        taps = jnp.zeros((2 * depth + 1, len(t), tokens, size), model.dtype)
        d_reads, (per_example, found) = jax.grad(loss, has_aux=True)(taps)
        reads, d_reads = found["reads"], _wide(d_reads)
        states, outputs = _wide(reads.states), _wide(reads.outputs)

        def total(x):  # [..., B] -> [...]
            return jnp.sum(x * weight, axis=-1)

        z = states[2::2]  # [depth, B, T, D]
        # All that read the residual stream after block k read z_k. A routed state has one reader.
        d_z = (jnp.cumsum(d_reads[::-1], axis=0)[::-1] if reads.weights is None else d_reads)[2::2]
        norms = jnp.linalg.norm(z, axis=-1)
        cosines = jnp.sum(z[1:] * z[:-1], axis=-1) / (norms[1:] * norms[:-1])
        sums = {
            "count": jnp.sum(weight),
            "loss": total(per_example),
            "forward_rms": total(jnp.mean(jnp.square(z), axis=(-2, -1))),
            "backward_rms": total(jnp.mean(jnp.square(d_z), axis=(-2, -1))),
            "similarity": total(jnp.mean(cosines, axis=-1)),
        }
        if "target" in batch:
            sums["alignment"] = total(jax.vmap(token_alignment, (0, None))(z, _wide(batch["target"])))
        if reads.weights is None:
            # h_l is linear in its gates: the derivative is that with respect to h_l times the source.
            gates = jnp.einsum("lbtd,ibtd->lib", d_reads, outputs)
            earlier = jnp.tri(2 * depth + 1)[..., None]  # h_l sums v_0 to v_(l-1)
            sums["gate_gradient"], sums["gate_gradient_abs"] = total(gates * earlier), total(jnp.abs(gates) * earlier)
        else:
            surprise = -jax.scipy.special.xlogy(reads.weights, reads.weights)
            sums["weights"] = total(jnp.mean(reads.weights, axis=-1))
            sums["entropy"] = total(jnp.mean(jnp.sum(surprise, axis=1), axis=-1))
        features = {
            "index": batch["index"],
            "weight": weight,
            "x_t": jnp.mean(patchify(found["x_t"], model.patch_size), axis=1),
            "states": jnp.mean(states, axis=2),
        }
        return sums, features

    return measure


def token_alignment(a: Array, b: Array) -> Array:
    """Whether two sets of features see the same tokens as alike: `[B, T, D]` and `[B, T, F]` -> `[B]` in 0 to 1.

    Linear CKA over the tokens of an image (Kornblith et al. 2019, arXiv:1905.00414), which needs no trained map between
    the two. Zero where one is the same for all tokens.
    """
    a, b = (x - jnp.mean(x, axis=1, keepdims=True) for x in (a, b))
    a, b = (jnp.einsum("btd,bsd->bts", x, x) for x in (a, b))
    norms = jnp.linalg.norm(a, axis=(1, 2)) * jnp.linalg.norm(b, axis=(1, 2))
    return jnp.sum(a * b, axis=(1, 2)) / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def averages(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The statistics from sums of `measure`, added up over batches: means over examples, roots of those of squares.

    All may have a leading axis of times.
    """
    means = {name: (np.transpose(x) / sums["count"]).T for name, x in sums.items() if name != "count"}
    for name in ("forward_rms", "backward_rms"):
        means[name] = np.sqrt(means[name])
    return means


def source_mask(depth: int, layout: Layout | None) -> np.ndarray:
    """Which source each reader has, bool [A, A] as `Reads.weights`; without a layout those of the residual sum."""
    mask = np.tri(2 * depth + 1, dtype=bool)
    if layout is None:
        return mask
    per_step, row_stride = layout.sublayers_per_step, layout.sublayers_per_step // layout.rows_per_step
    rows = np.arange(layout.num_rows) * row_stride
    for reader in range(2 * depth + 1):
        is_head = reader == 2 * depth
        step = layout.num_steps - 1 if is_head else reader // per_step
        mask[reader] = False
        mask[reader, rows[: layout.num_final_rows if is_head else layout.count(step)]] = True
        if layout.final_set.sees_outputs or not is_head:
            mask[reader, step * per_step + 1 : reader + 1] = True
    return mask


def relative_entropy(entropy: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Entropy [..., A] over log(number of sources): 1 is uniform. A reader with one source has 0."""
    count = mask.sum(axis=1)
    return np.where(count > 1, entropy / np.log(np.maximum(count, 2)), 0.0)


def over_times(result: dict, name: str) -> np.ndarray:
    """A curve [times, depth] over all times: the root mean square of an RMS, the mean of what else there is."""
    curve = result[name]
    return np.sqrt(np.square(curve).mean(axis=0)) if name.endswith("_rms") else curve.mean(axis=0)


def summary(result: dict) -> dict[str, float]:
    """The diagnosis in a few numbers, over all times.

    growth: RMS(z_last) / RMS(z_1). decay: RMS(dLoss/dz_1) / RMS(dLoss/dz_last). similarity: mean cosine of neighbours
    in the deeper half. probe_r2: the lowest R^2 of t of the readers behind five blocks (or of the head).
    """
    forward, backward, similarity = (over_times(result, name) for name in ("forward_rms", "backward_rms", "similarity"))
    probe = np.asarray(result["probe_r2"])
    return {
        "loss": float(result["loss"].mean()),
        "growth": float(forward[-1] / forward[0]),
        "decay": float(backward[0] / backward[-1]),
        "similarity": float(similarity[len(similarity) // 2 :].mean()),
        "probe_r2": float(probe[min(10, len(probe) - 1) :].min()),
    }


class LinearProbe:
    """Ridge regression of t on features, scored on pairs it was not fitted to; keeps second moments only."""

    def __init__(self):
        self.fitted, self.held_out = Accumulator(), Accumulator()

    def update(self, features: np.ndarray, t: np.ndarray, is_held_out: np.ndarray) -> None:
        """Adds features [B, F] at times t [B]; `is_held_out` [B] must be the same for all times of a pair."""
        rows = np.concatenate([features, t[:, None]], axis=1)
        for accumulator, chosen in ((self.fitted, ~is_held_out), (self.held_out, is_held_out)):
            if chosen.any():
                accumulator.update(rows[chosen])

    def r2(self) -> float:
        """1 - (squared error) / (variance of t) on the held-out pairs; the penalty is `RIDGE` per unit variance."""
        fitted, held_out = self.fitted.statistics(), self.held_out.statistics()
        variance = np.diag(fitted.covariance)[:-1]
        scale = np.where(variance > 0, 1 / np.sqrt(np.where(variance > 0, variance, 1)), 0)
        correlation = fitted.covariance[:-1, :-1] * np.outer(scale, scale)
        penalised = correlation + RIDGE * np.eye(len(scale))
        w = scale * np.linalg.solve(penalised, scale * fitted.covariance[:-1, -1])
        error = np.append(-w, 1)  # t - w . features, less its mean over the fitted pairs
        unbiased = (held_out.count - 1) / held_out.count
        squared = unbiased * error @ held_out.covariance @ error + (error @ (held_out.mean - fitted.mean)) ** 2
        return float(1 - squared / (unbiased * held_out.covariance[-1, -1]))
