"""What plain autodiff of a transformer block does slowly on a CPU: the weight gradients, and what is kept for them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.models.attention import KEPT, attention, by_autodiff

# For `jax.checkpoint`: the backward pass keeps the outputs of dense layers, their biases included, and recomputes all
# else, that is LayerNorm, modulation, GELU and the attention weights. On a CPU, to write and read these takes longer
# than to compute them again. Of attention by kernels it keeps the outputs too, so that no kernel runs twice.
keep_dense_outputs = jax.checkpoint_policies.save_only_these_names(KEPT)


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """x times kernel over one axis, `[..., I]` and `[I, *O]` of one dtype -> `[..., *O]`.

    The gradient of the kernel is computed in the order that suits the platform: x^T g of two matrices on CPU, whose
    matmul reads them as they lie; elsewhere (g^T x)^T over all leading axes, the order of autodiff, for which XLA on
    CPU writes transposed copies and runs 1.6 times as long. TPUs schedule the latter better. Reverse mode only;
    `plain_matmul` has derivatives of all modes and orders.
    """
    return jnp.tensordot(x, kernel, 1)


def _matmul_backward(residuals, g):
    x, kernel = residuals
    leading, outputs = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, g.ndim))

    def matrices(x, g):
        return (x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, math.prod(kernel.shape[1:]))).reshape(kernel.shape)

    def in_order_of_autodiff(x, g):
        return jnp.moveaxis(jnp.tensordot(g, x, (leading, leading)), -1, 0)

    d_kernel = jax.lax.platform_dependent(
        x,
        g,
        cpu=matrices,
        default=in_order_of_autodiff,
    )
    return jnp.tensordot(g, kernel, (outputs, tuple(range(1, kernel.ndim)))), d_kernel


matmul.defvjp(lambda x, kernel: (jnp.tensordot(x, kernel, 1), (x, kernel)), _matmul_backward)


def plain_matmul(x: Array, kernel: Array) -> Array:
    """The same product as `matmul`, differentiated by JAX."""
    return jnp.tensordot(x, kernel, 1)


class Arithmetic(NamedTuple):
    """How the layers of a model multiply.

    Attributes:
      dtype: of activations and of the kernels that they are multiplied with.
      matmul: `matmul` or `plain_matmul`.
      attention: `attention.attention` or `attention.by_autodiff`.
    """

    dtype: jnp.dtype
    matmul: Callable[[Array, Array], Array] = matmul
    attention: Callable[..., Array] = attention

    @classmethod
    def of(cls, dtype: jnp.dtype, *, plain: bool) -> "Arithmetic":
        """That of a model, which is fast, or has derivatives of all modes if `plain`."""
        return cls(dtype, plain_matmul, by_autodiff) if plain else cls(dtype)
