"""The PyTorch side of benchmarks: a SiT of the same size with its optimizer and EMA, and the plain aggregation.

The SiT is the independent one of tests/parity, and needs the extra `test`. It is as quick as PyTorch makes it: fused
attention (`F.scaled_dot_product_attention`), `F.layer_norm`, tanh-GELU in one kernel, tokens made contiguous after the
patch embedding, AdamW with `fused=True`, the EMA by `torch._foreach_lerp_`, and sampling under `inference_mode`. A
train step draws noise, times and dropped labels, and computes the velocity loss, its gradients, AdamW and the EMA.
"""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for tests.parity

from dar_jax import config as config_lib
from tests.parity import torch_sit


class TorchCase:
    """A SiT of a published size, patch 2, on latents of 32x32x4.

    Computes in `dtype` by autocast, in float32 without. `compiled` is torch.compile, or leaves a function as it is.
    """

    def __init__(self, size: str, batch_size: int, device="cpu", dtype=torch.float32, compiled=lambda f: f):
        fields = {"input_size": 32, "channels": 4, "num_classes": 1000, "patch_size": 2, "learn_sigma": False}
        self.model = torch_sit.randomise(torch_sit.SiT(**fields, **config_lib.SIZES[size])).to(device)
        self.model.x_embedder.register_forward_hook(lambda module, inputs, tokens: tokens.contiguous())
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, weight_decay=0.0, fused=True)
        self.x = torch.randn(batch_size, 4, 32, 32, device=device)
        self.y = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.run, self.loss = compiled(self.model), compiled(self._loss)
        self.autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def _loss(self) -> torch.Tensor:
        t, noise = torch.rand(len(self.x), device=self.x.device), torch.randn_like(self.x)
        y = torch.where(torch.rand(len(self.y), device=self.x.device) < 0.1, 1000, self.y)
        x_t = torch.lerp(noise, self.x, t[:, None, None, None])
        return (self.model(x_t, t, y) - (self.x - noise)).square().mean()

    def step(self) -> None:
        with self.autocast:
            loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        torch._foreach_lerp_(self.ema, self.params, 1e-4)

    @torch.inference_mode()
    def evaluate(self) -> None:
        with self.autocast:
            self.run(self.x, torch.full((len(self.x),), 0.5, device=self.x.device), self.y)


def aggregate(u: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """What benchmarks/aggregation.py calls plain: u `[B, 1 or T, D]`, sources `[N, B, T, D]` -> `[B, T, D]`."""
    wide = sources.float()
    keys = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    scores = (u * keys).sum(-1)
    return (scores.softmax(0)[..., None] * wide).sum(0).to(sources.dtype)
