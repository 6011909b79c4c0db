"""Every statistic against a plain unrolled recomputation in PyTorch; the linear probe on states that are known."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dar_jax import config as config_lib
from dar_jax import models
from dar_jax.diagnosis import probes
from dar_jax.diagnosis.forward import forward
from tests.parity import torch_reads

CASES = {
    "residual": {"kind": "residual"},
    "static_t": {"query": "static_t", "chunk_size": 2},
    "dynamic-dense": {"query": "dynamic", "chunk_size": 1, "final": "shared"},
    "static-sum": {"query": "static", "chunk_size": 6, "summary": "sum", "final": "summaries"},
}
BATCH, WEIGHT, TIME = 5, (1, 1, 0, 1, 1), 0.3


def make_config(case):
    config = config_lib.default()
    config.model.update(patch_size=4, depth=3, hidden_size=16, num_heads=2)
    config.model.routing.update(CASES[case])
    return config


class Setting:
    """A model with random weights everywhere, and a batch whose third example is filling."""

    def __init__(self, case, dtype=jnp.float32):
        self.config = make_config(case)
        self.model = models.build(self.config.model).clone(dtype=dtype)
        rng = np.random.default_rng(0)
        self.batch = {
            "x1": rng.uniform(-1, 1, (BATCH, 8, 8, 1)).astype(np.float32),
            "condition": {"label": rng.integers(0, 10, BATCH, dtype=np.int32)},
            "index": np.arange(7, 7 + BATCH, dtype=np.int32),
            "weight": np.array(WEIGHT, np.float32),
        }
        inputs = self.batch["x1"], np.zeros(BATCH, np.float32), self.batch["condition"]
        shapes = nn.meta.unbox(jax.eval_shape(self.model.init, jax.random.key(0), *inputs)["params"])
        self.params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.2, dtype), shapes)
        keys = [jax.random.fold_in(jax.random.key(self.config.seed), i) for i in self.batch["index"]]
        noise = np.stack([jax.random.normal(key, (8, 8, 1), jnp.float32) for key in keys])
        self.x_t = TIME * self.batch["x1"] + (1 - TIME) * noise
        self.velocity = self.batch["x1"] - noise

    def measure(self):
        measure = jax.jit(probes.make_measure(self.config, self.model))
        return jax.device_get(measure(self.params, self.batch, np.full(BATCH, TIME, np.float32)))

    def tensors(self, dtype):
        """Parameters, x_t, t, labels and velocity of the examples that count."""
        chosen = np.flatnonzero(WEIGHT)
        to = lambda x: torch.tensor(np.asarray(x), dtype=dtype)  # noqa: E731
        t = torch.full((len(chosen),), TIME, dtype=dtype)
        y = torch.tensor(self.batch["condition"]["label"][chosen], dtype=torch.long)
        return jax.tree.map(to, self.params), to(self.x_t[chosen]), t, y, to(self.velocity[chosen])

    def unrolled(self, gates=None, dtype=torch.float32):
        """The states of the A readers, values or weights, and the loss of each example, by plain PyTorch."""
        model = self.config.model
        params, x_t, t, y, velocity = self.tensors(dtype)
        v_0, condition, e_t = torch_reads.embed(params, model, x_t, t, y)
        v_0.requires_grad_()
        if model.routing.kind == "residual":
            gates = torch.ones(2 * model.depth + 1, 2 * model.depth + 1, dtype=dtype) if gates is None else gates
            stack = model.depth, model.num_heads
            states, others = torch_reads.residual_stack(params["stack"], *stack, v_0, condition, gates)
        else:
            layout, query = self.model.layout, model.routing.query
            states, others = torch_reads.routed_reads(
                params["stack"], layout, query, model.num_heads, v_0, condition, e_t
            )
        for state in states:
            state.retain_grad()
        prediction = torch_reads.head(params, model, states[-1], condition)
        return states, others, ((prediction - velocity) ** 2).mean(dim=(1, 2, 3)), prediction


def close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < tolerance, error


@pytest.mark.parametrize("case", CASES)
def test_statistics_equal_an_unrolled_recomputation(case):
    setting = Setting(case)
    sums, features = setting.measure()
    found = probes.averages(sums)
    states, others, losses, _ = setting.unrolled()
    z = states[2::2]
    close(found["loss"], losses.mean().item())
    close(found["forward_rms"], [state.detach().square().mean().sqrt() for state in z])
    cosines = [torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in itertools.pairwise(z)]
    close(found["similarity"], cosines)
    chosen = np.flatnonzero(WEIGHT)
    close(features["states"][:, chosen], [state.detach().mean(dim=1).numpy() for state in states])
    patches = setting.x_t.reshape(BATCH, 2, 4, 2, 4).mean(axis=(1, 3)).reshape(BATCH, 16)
    close(features["x_t"], patches)

    if case != "residual":
        losses.sum().backward()
        close(found["backward_rms"], [state.grad.square().mean().sqrt() for state in z])
        weights = others.detach().numpy()
        close(found["weights"], weights.mean(axis=(2, 3)))
        entropy = -np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-30)), 0).sum(axis=1)
        close(found["entropy"], entropy.mean(axis=(1, 2)))
        mask = probes.source_mask(3, setting.model.layout)
        assert np.array_equal(mask, weights.max(axis=(2, 3)) > 0)
        uniform = probes.relative_entropy(np.log(mask.sum(axis=1)), mask)
        close(uniform, (mask.sum(axis=1) > 1).astype(float))


def test_gradient_of_the_residual_stream_equals_pytorch():
    """With respect to the stream itself, as PyTorch accumulates it when every block adds to one tensor."""
    setting = Setting("residual")
    model = setting.config.model
    params, x_t, t, y, velocity = setting.tensors(torch.float32)
    h, condition, _ = torch_reads.embed(params, model, x_t, t, y)
    h.requires_grad_()
    z = []
    for k in range(model.depth):
        block = torch_reads.torch_stack.index(params["stack"]["steps"]["block_0"], k)
        for l in (1, 2):
            h = h + torch_reads.torch_stack.sublayer(block, h, condition, model.num_heads, l)
        h.retain_grad()
        z.append(h)
    loss = ((torch_reads.head(params, model, h, condition) - velocity) ** 2).mean(dim=(1, 2, 3)).sum()
    loss.backward()
    found = probes.averages(setting.measure()[0])
    close(found["backward_rms"], [state.grad.square().mean().sqrt() for state in z])


def test_gate_gradients_equal_finite_differences():
    """In float64, for every source of every reader: of each example, so that the absolute values are checked too."""
    with jax.enable_x64(True):
        setting = Setting("residual", jnp.float64)
        sums, _ = setting.measure()
    readers, step = 7, 1e-5
    signed, absolute = np.zeros((readers, readers)), np.zeros((readers, readers))
    for l in range(readers):
        for i in range(l + 1):
            losses = []
            for sign in (1, -1):
                gates = torch.ones(readers, readers, dtype=torch.float64)
                gates[l, i] += sign * step
                losses.append(setting.unrolled(gates, torch.float64)[2].detach())
            difference = (losses[0] - losses[1]).numpy() / (2 * step)
            signed[l, i], absolute[l, i] = difference.mean(), np.abs(difference).mean()
    found = probes.averages(sums)
    close(found["gate_gradient"], signed)
    close(found["gate_gradient_abs"], absolute)


@pytest.mark.parametrize("case", CASES)
def test_prediction_is_the_models(case):
    with jax.enable_x64(True):
        setting = Setting(case, jnp.float64)
        inputs = setting.params, setting.x_t, np.full(BATCH, TIME), setting.batch["condition"]
        opened, _ = jax.jit(lambda params, *inputs: forward(setting.model, params, *inputs))(*inputs)
        plain = jax.jit(lambda params, *inputs: setting.model.apply({"params": params}, *inputs).prediction)(*inputs)
    close(opened, plain, 1e-6)  # a model returns float32


def test_frozen_routing_mixes_with_the_given_weights():
    """Sources weighted by constants, which PyTorch's unrolled stack takes in place of its softmax."""
    setting = Setting("static_t")
    rng = np.random.default_rng(1)
    mask = probes.source_mask(3, setting.model.layout)
    weights = mask * rng.uniform(size=mask.shape)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    chosen = np.flatnonzero(WEIGHT)
    inputs = (
        setting.x_t[chosen],
        np.full(len(chosen), TIME, np.float32),
        {"label": setting.batch["condition"]["label"][chosen]},
    )
    model = setting.model.clone(plain=True, frozen_weights=weights[..., None])
    frozen = model.apply({"params": setting.params}, *inputs).prediction

    stack, model = torch_reads.torch_stack, setting.config.model
    rows = iter(zip(stack.source_sets(3, 2, "dedicated"), weights, strict=True))

    def attend(sources, p, query, e_t):
        names, row = next(rows)
        values = [float(row[2 * i if kind == "c" else i]) for kind, i in names]
        alpha = torch.tensor(values)[:, None, None].expand(-1, *sources[0].shape[:2])
        return sum(w * v for w, v in zip(values, sources, strict=True)), alpha

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "attend", attend)
        *_, prediction = setting.unrolled()
    close(frozen, prediction.detach().numpy())
    assert model.routing.query == "static_t"


def test_a_source_is_removed_and_queries_see_another_time():
    """PyTorch's unrolled stack drops source 2 from every softmax that has another one, and its queries take t = 0.8."""
    setting, removed, query_t = Setting("static_t"), 2, 0.8
    chosen = np.flatnonzero(WEIGHT)
    inputs = setting.x_t[chosen], np.full(len(chosen), TIME, np.float32)
    model = setting.model.clone(plain=True, removed=jnp.arange(7) == removed)
    label = {"label": setting.batch["condition"]["label"][chosen]}
    times = np.full(len(chosen), query_t, np.float32)
    ablated = model.apply({"params": setting.params}, *inputs, label, query_t=times).prediction

    stack = torch_reads.torch_stack
    rows, whole = iter(stack.source_sets(3, 2, "dedicated")), stack.attend
    params, x_t, t, y, _ = setting.tensors(torch.float32)
    other_time = torch_reads.embed(params, setting.config.model, x_t, torch.full_like(t, query_t), y)[2]

    def attend(sources, p, query, e_t):
        positions = [2 * i if kind == "c" else i for kind, i in next(rows)]
        left = [x for x, position in zip(sources, positions, strict=True) if position != removed] or sources
        h, _ = whole(left, p, query, other_time)
        return h, torch.ones(len(sources), *h.shape[:2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "attend", attend)
        *_, prediction = setting.unrolled()
    close(ablated, prediction.detach().numpy())


def stream(probe, features, t, pairs):
    for part in np.array_split(np.arange(len(t)), 7):
        probe.update(features[part], t[part], pairs[part] % 4 == 0)


def test_linear_probe_recovers_t_exactly():
    """From 12 features of which a mixture is t, at very different scales and far from zero."""
    rng = np.random.default_rng(0)
    pairs, t = np.repeat(np.arange(200), 5), np.tile(np.linspace(0, 1, 5), 200)
    others = rng.normal(size=(len(t), 12))
    others[:, 3] = 100 + 40 * (t - 0.2 * others[:, 0] + 0.5 * others[:, 7])
    others[:, 9] = 4.0  # a constant must not harm
    probe = probes.LinearProbe()
    stream(probe, others.astype(np.float32), t, pairs)
    assert 1 - 1e-4 < probe.r2() <= 1


def test_linear_probe_finds_nothing_where_nothing_is():
    """Features that tell pairs apart, but not times: fitted pairs would be no evidence."""
    rng = np.random.default_rng(0)
    pairs, t = np.repeat(np.arange(200), 5), np.tile(np.linspace(0, 1, 5), 200)
    probe = probes.LinearProbe()
    stream(probe, rng.normal(size=(200, 12))[pairs] + 0.1 * rng.normal(size=(1000, 12)), t, pairs)
    assert abs(probe.r2()) < 0.05


def test_linear_probe_is_ridge_regression_on_unseen_pairs():
    """Against NumPy's least squares on stacked rows, and on other pairs than it was fitted to."""
    rng = np.random.default_rng(0)
    pairs, t = np.repeat(np.arange(40), 3), np.tile([0.0, 0.3, 1.0], 40)
    x = rng.normal(size=(len(t), 4)) + t[:, None] * [1.0, 0, -2, 0.5]
    probe = probes.LinearProbe()
    stream(probe, x, t, pairs)
    held_out = pairs % 4 == 0
    mean, std = x[~held_out].mean(axis=0), x[~held_out].std(axis=0, ddof=1)
    scaled, centre = (x - mean) / std, t[~held_out].mean()
    penalty = np.sqrt(probes.RIDGE * (np.sum(~held_out) - 1)) * np.eye(4)
    targets = np.append(t[~held_out] - centre, np.zeros(4))
    w = np.linalg.lstsq(np.concatenate([scaled[~held_out], penalty]), targets)[0]
    residual = t[held_out] - centre - scaled[held_out] @ w
    expected = 1 - np.sum(residual**2) / np.sum((t[held_out] - t[held_out].mean()) ** 2)
    assert probe.r2() == pytest.approx(expected, rel=1e-10)
