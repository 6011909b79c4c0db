"""The diffusion process: paths, what a network predicts, the loss, samplers and guidance. Networks are functions here.

`build(config.diffusion)` is the process and `sampler.build(config.sampler, process)` the sampler. The config is read
there alone.
"""

from dar_jax.diffusion.guidance import guided
from dar_jax.diffusion.path import Path
from dar_jax.diffusion.process import Diffusion, build, check

__all__ = ["Diffusion", "Path", "build", "check", "guided"]
