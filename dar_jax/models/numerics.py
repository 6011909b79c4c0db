"""What plain autodiff of a transformer block does slowly on a CPU: the weight gradients, and what is kept for them."""

import jax
import jax.numpy as jnp
from jax import Array

# For `jax.checkpoint`: the backward pass keeps the outputs of dense layers and recomputes all else, that is LayerNorm,
# modulation, GELU and the attention weights. On a CPU, to write and read these takes longer than to compute them again.
keep_dense_outputs = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """x @ kernel, `[..., I]` and `[I, O]` of one dtype -> `[..., O]`.

    The gradient of the kernel is computed in the order that suits the platform: x^T g of two matrices on CPU, whose
    matmul reads them as they lie; elsewhere (g^T x)^T over all leading axes, the order of autodiff, for which XLA on
    CPU writes transposed copies and runs 1.6 times as long. TPUs schedule the latter better. Reverse mode only.
    """
    return x @ kernel


def _matmul_backward(residuals, g):
    x, kernel = residuals
    leading = tuple(range(x.ndim - 1))
    d_kernel = jax.lax.platform_dependent(
        x,
        g,
        cpu=lambda x, g: x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1]),
        default=lambda x, g: jnp.tensordot(g, x, (leading, leading)).T,
    )
    return g @ kernel.T, d_kernel


matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)
