"""Other ways across depth, to compare DAR with: long skips, hyper-connections, DenseFormer. Scans, plain autodiff.

A stack of this file takes the place of `plain_stack.ResidualStack`: the same arguments, results and parameters of
blocks, and it shows the same of its readers. It has parameters of its own beside them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dar_jax.models.layers import Dense, constrain, logical, modulated_norm, ones, scan_steps
from dar_jax.models.plain_stack import ResidualStep, rematerialised, run_block, show

SINKHORN_ITERATIONS = 20
GAIN = 0.01  # of what a lane's own tokens have to say, at the start
APART = -8.0  # logit between two lanes at the start: exp(-8) of a lane goes to another


class LongSkipStep(nn.Module):
    """A block of the second half, before which a stream of the first half joins by concatenation and a linear map."""

    block: Callable[..., nn.Module]
    hidden_at: tuple[int, ...]

    @nn.compact
    def __call__(self, carry: tuple, index: Array, skip: Array, condition: Array) -> tuple:
        (h, kept), block = carry, self.block(name="block_0")
        size, init = h.shape[-1], nn.initializers.truncated_normal(0.02)
        joined = jnp.concatenate([h, skip], axis=-1)
        h = constrain(Dense((size,), ("skip", "embed"), block.arithmetic, init, name="skip")(joined))
        return run_block(self, block, h, kept, self.hidden_at, index, condition), None


class LongSkipStack(nn.Module):
    """U-ViT's skips (arXiv 2209.12152): block L - 1 - i also reads the stream after block i, of an even number L.

    Arguments and results as of `ResidualStack`.
    """

    block: Callable[..., nn.Module]
    depth: int
    remat: str

    @nn.compact
    def __call__(
        self, v_0: Array, condition: Array, e_t: Array, shift: Array, scale: Array, hidden_at: tuple[int, ...] = ()
    ) -> tuple[Array, tuple[Array, ...]]:
        half, indices = self.depth // 2, jnp.arange(self.depth)
        carry = v_0, tuple(jnp.zeros_like(v_0) for _ in hidden_at)
        steps = scan_steps(rematerialised(ResidualStep, self.remat), half, (0, nn.broadcast))
        carry, streams = steps(self.block, hidden_at, emits=True, name="steps")(carry, indices[:half], condition)
        steps = scan_steps(rematerialised(LongSkipStep, self.remat), half, (0, 0, nn.broadcast))
        steps = steps(self.block, hidden_at, name="skip_steps")
        (h, kept), _ = steps(carry, indices[half:], jnp.flip(streams, 0), condition)
        self.sow("intermediates", "outputs", v_0)
        return modulated_norm(show(self, 0, h), shift, scale), kept

    @staticmethod
    def multiply_adds(depth: int, size: int) -> int:
        """Of the skips, per token."""
        return depth // 2 * 2 * size**2


class Connection(NamedTuple):
    """How one sublayer reads and writes n lanes. Leading axes are those of the tokens, `[B, T]`, or ones.

    Attributes:
      read: weights of the lanes in what the sublayer reads, `[..., n]`.
      mix: of lane j in what lane i becomes, `[..., n, n]`.
      write: of the sublayer's output in what lane i becomes, `[..., n]`.
    """

    read: Array
    mix: Array
    write: Array


class TokenConnection(nn.Module):
    """Manifold-constrained hyper-connections (arXiv 2512.24880): every token says how its lanes are read and written.

    With x = RMSNorm(all lanes of a token), a projection W of n D features and scalars a, every part is made of
    a x W + b: read = sigmoid, write = 2 sigmoid, mix = Sinkhorn(exp). If `mixes` is false, lanes are not mixed.

    The paper gives no b. Here a fresh model reads the mean of the lanes, writes to all alike and mixes hardly at all.
    So it begins near the residual model.
    """

    mixes: bool

    @nn.compact
    def __call__(self, lanes: Array) -> Connection:
        n, _, _, size = lanes.shape
        wide = lanes.astype(jnp.promote_types(lanes.dtype, jnp.float32))
        sizes = (n, n, n * n) if self.mixes else (n, n)

        def init_bias(key, shape, dtype=jnp.float32):
            off_diagonal = APART * (1 - jnp.eye(n)).reshape(-1)
            parts = jnp.full(n, -jnp.log(n - 1.0)), jnp.zeros(n), off_diagonal
            return jnp.concatenate(parts[: len(sizes)]).astype(dtype)

        norm = self.param("norm", logical(ones, (None, "norm")), (n, size))
        init = nn.initializers.normal(0.02)
        kernel = self.param("kernel", logical(init, (None, "embed", None)), (n, size, sum(sizes)))
        bias = self.param("bias", logical(init_bias, (None,)), (sum(sizes),))
        gain = self.param("gain", logical(nn.initializers.constant(GAIN), (None,)), (len(sizes),))
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=(0, 3)) + 1e-6)
        found = jnp.einsum("nbtd,ndm->btm", wide, norm[..., None] * kernel) * inverse_rms[..., None]
        found = jnp.repeat(gain, jnp.array(sizes), total_repeat_length=sum(sizes)) * found + bias
        read, write = nn.sigmoid(found[..., :n]), 2 * nn.sigmoid(found[..., n : 2 * n])
        mix = sinkhorn(found[..., 2 * n :].reshape(*found.shape[:2], n, n)) if self.mixes else jnp.eye(n)
        return Connection(read, mix, write)


def sinkhorn(logits: Array) -> Array:
    """exp(logits) `[..., n, n]` with rows and then columns divided by their sums, `SINKHORN_ITERATIONS` times."""

    def normalise(_, x: Array) -> Array:
        x = x / jnp.sum(x, axis=-1, keepdims=True)
        return x / jnp.sum(x, axis=-2, keepdims=True)

    return jax.lax.fori_loop(0, SINKHORN_ITERATIONS, normalise, jnp.exp(logits))


class LanesStep(nn.Module):
    """One block on n lanes `[n, B, T, D]`. `kept` are means of lanes."""

    block: Callable[..., nn.Module]
    hidden_at: tuple[int, ...]
    mixes: bool

    @nn.compact
    def __call__(self, carry: tuple, index: Array, fixed: Connection | None, condition: Array) -> tuple:
        (lanes, kept), block = carry, self.block(name="block_0")
        for j, (branch, shift, scale, gate) in enumerate(block.branches(condition)):
            if fixed is None:
                connection = TokenConnection(self.mixes, name=f"connection_{j}")(lanes)
            else:
                connection = jax.tree.map(lambda x: x[None, None, j], fixed)  # noqa: B023
            h = constrain(weighted_sum(connection.read, lanes).astype(lanes.dtype))
            output = branch(modulated_norm(show(self, j, h), shift, scale), gate)
            self.sow("intermediates", "outputs", output)
            lanes = written(connection, lanes, output)
        kept = tuple(
            jnp.where(index == k - 1, jnp.mean(lanes, axis=0), old) for k, old in zip(self.hidden_at, kept, strict=True)
        )
        return (lanes, kept), None


def weighted_sum(weights: Array, lanes: Array) -> Array:
    """Of lanes `[n, B, T, D]` with weights `[..., n]`, `[B, T, D]`."""
    return sum(weights[..., i, None] * lane for i, lane in enumerate(lanes))


@partial(jax.checkpoint, prevent_cse=False)
def written(connection: Connection, lanes: Array, output: Array) -> Array:
    """The lanes after a sublayer, `[n, B, T, D]`."""
    mixed = (weighted_sum(connection.mix[..., i, :], lanes) for i in range(len(lanes)))
    return constrain(
        jnp.stack([(x + connection.write[..., i, None] * output).astype(lanes.dtype) for i, x in enumerate(mixed)])
    )


class HyperStack(nn.Module):
    """Hyper-connections (arXiv 2409.19606): n residual streams side by side, here called lanes, [B, T, D] each.

    All begin as v_0, and the head reads their mean. A `kind` of "hyper" has n^2 + 2 n numbers for each sublayer:
    sublayer l reads lane l mod n at the start and writes to all, so that a fresh model is the residual one. "mhc" has a
    `TokenConnection` for each sublayer, and "identity_hyper" one that does not mix.

    Arguments and results as of `ResidualStack`.
    """

    block: Callable[..., nn.Module]
    depth: int
    remat: str
    lanes: int
    kind: str

    @nn.compact
    def __call__(
        self, v_0: Array, condition: Array, e_t: Array, shift: Array, scale: Array, hidden_at: tuple[int, ...] = ()
    ) -> tuple[Array, tuple[Array, ...]]:
        step = scan_steps(rematerialised(LanesStep, self.remat), self.depth, (0, 0, nn.broadcast))
        steps = step(self.block, hidden_at, self.kind == "mhc", name="steps")
        start = jnp.broadcast_to(v_0, (self.lanes, *v_0.shape)), tuple(jnp.zeros_like(v_0) for _ in hidden_at)
        fixed = self.fixed() if self.kind == "hyper" else None
        (lanes, kept), _ = steps(start, jnp.arange(self.depth), fixed, condition)
        self.sow("intermediates", "outputs", v_0)
        return modulated_norm(show(self, 0, jnp.mean(lanes, axis=0)), shift, scale), kept

    def fixed(self) -> Connection:
        """The parameters of "hyper", with leading axes of blocks and their two sublayers."""
        n, sublayers = self.lanes, (self.depth, 2)

        def in_turn(key, shape, dtype=jnp.float32):
            return jax.nn.one_hot(jnp.arange(2 * self.depth) % n, n, dtype=dtype).reshape(shape)

        def identity(key, shape, dtype=jnp.float32):
            return jnp.broadcast_to(jnp.eye(n, dtype=dtype), shape)

        read = self.param("read", logical(in_turn, ("layers", None, None)), (*sublayers, n))
        mix = self.param("mix", logical(identity, ("layers", None, None, None)), (*sublayers, n, n))
        write = self.param("write", logical(ones, ("layers", None, None)), (*sublayers, n))
        return Connection(read, mix, write)

    @staticmethod
    def multiply_adds(depth: int, size: int, lanes: int, kind: str) -> int:
        """Of reading, mixing and writing, and of the projections that say how, per token."""
        outputs = {"hyper": 0, "identity_hyper": 2 * lanes, "mhc": 2 * lanes + lanes**2}[kind]
        mixed = 0 if kind == "identity_hyper" else lanes**2
        return 2 * depth * size * (2 * lanes + mixed + lanes * outputs)


class DenseFormerStep(nn.Module):
    """A block, and then the weighted sum of all streams so far, rows of `[L + 1, B, T, D]`."""

    block: Callable[..., nn.Module]
    hidden_at: tuple[int, ...]

    @nn.compact
    def __call__(self, carry: tuple, index: Array, weights: Array, condition: Array) -> tuple:
        h, kept, streams = carry
        h, _ = run_block(self, self.block(name="block_0"), h, (), (), index, condition)
        streams = jax.lax.dynamic_update_slice_in_dim(streams, h[None], index + 1, axis=0)
        h = constrain(jnp.sum(weights[:, None, None, None] * streams, axis=0).astype(h.dtype))
        kept = tuple(jnp.where(index == k - 1, h, old) for k, old in zip(self.hidden_at, kept, strict=True))
        return (h, kept, streams), None


class DenseFormerStack(nn.Module):
    """Weighted averages over depth (DenseFormer, arXiv 2402.02622): a block reads a sum of v_0 and all streams so far.

    The weights are numbers, whatever the input: i + 1 of them after block i, 434 in all for 28 blocks. A fresh model
    reads the latest stream alone, so it is the residual one. Arguments and results as of `ResidualStack`.
    """

    block: Callable[..., nn.Module]
    depth: int
    remat: str

    @nn.compact
    def __call__(
        self, v_0: Array, condition: Array, e_t: Array, shift: Array, scale: Array, hidden_at: tuple[int, ...] = ()
    ) -> tuple[Array, tuple[Array, ...]]:
        rows, columns = np.tril_indices(self.depth, 1, self.depth + 1)

        def latest(key, shape, dtype=jnp.float32):
            return jnp.asarray(columns == rows + 1, dtype)

        numbers = self.param("weights", logical(latest, (None,)), rows.shape)
        weights = jnp.zeros((self.depth, self.depth + 1), numbers.dtype).at[rows, columns].set(numbers)
        streams = jnp.zeros((self.depth + 1, *v_0.shape), v_0.dtype).at[0].set(v_0)
        steps = scan_steps(rematerialised(DenseFormerStep, self.remat), self.depth, (0, 0, nn.broadcast))
        start = v_0, tuple(jnp.zeros_like(v_0) for _ in hidden_at), streams
        steps = steps(self.block, hidden_at, name="steps")
        (h, kept, _), _ = steps(start, jnp.arange(self.depth), weights, condition)
        self.sow("intermediates", "outputs", v_0)
        return modulated_norm(show(self, 0, h), shift, scale), kept

    @staticmethod
    def multiply_adds(depth: int, size: int) -> int:
        """Of the sums, per token."""
        return depth * (depth + 3) // 2 * size


class Rival(NamedTuple):
    """A routing with a stack in this file: its name in configs, and the number of lanes of those that have some."""

    kind: str
    lanes: int

    def stack(self, block: Callable[..., nn.Module], depth: int, remat: str, **named) -> nn.Module:
        """The module of `depth` blocks."""
        if self.kind == "long_skip":
            return LongSkipStack(block, depth, remat, **named)
        if self.kind == "dense_former":
            return DenseFormerStack(block, depth, remat, **named)
        return HyperStack(block, depth, remat, self.lanes, self.kind, **named)

    def multiply_adds(self, depth: int, size: int) -> int:
        """Per token, beside those of the blocks."""
        if self.kind == "long_skip":
            return LongSkipStack.multiply_adds(depth, size)
        if self.kind == "dense_former":
            return DenseFormerStack.multiply_adds(depth, size)
        return HyperStack.multiply_adds(depth, size, self.lanes, self.kind)
