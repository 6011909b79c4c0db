"""What the autoencoders of images have in common: moments of latents, and images of latents."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

# Full precision: latents and FID must not depend on an accelerator's default for convolutions.
PRECISION = jax.lax.Precision.HIGHEST


def conv(features: int, kernel: int, name: str, **options) -> nn.Conv:
    """A convolution of kernel x kernel pixels."""
    return nn.Conv(features, (kernel, kernel), precision=PRECISION, name=name, **options)


class Autoencoder(nn.Module):
    """Encoder and decoder of single images, float32. A kind of it says what its `networks` are.

    Attributes:
      channels: width of each level, from the pixels inward; every level but the last halves the sides.
      latent_channels: C of the latents.
    """

    channels: tuple[int, ...]
    latent_channels: int

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder."""
        raise NotImplementedError

    def setup(self):
        self.encoder, self.decoder = self.networks()
        self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), precision=PRECISION)
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), precision=PRECISION)

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.channels) - 1)

    def encode(self, x: Array) -> Array:
        """Moments of the latents' distribution, not normalised.

        Args:
          x: images float32 [B, H, W, 3] in [-1, 1].

        Returns:
          float32 [B, 2, H / factor, W / factor, latent_channels], rounded down: mean, standard deviation.
        """
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return jnp.stack([mean, jnp.exp(0.5 * jnp.clip(log_variance, -30, 20))], axis=1)

    def decode(self, z: Array) -> Array:
        """Latents, not normalised, float32 [B, h, w, latent_channels] -> images [B, factor * h, factor * w, 3]."""
        return self.decoder(self.post_quant_conv(z))

    def __call__(self, x: Array) -> Array:
        """Images to the images of their mean latents."""
        return self.decode(self.encode(x)[:, 0])
