"""Published weights of Qwen-Image become a checkpoint and come back, bit for bit, and without being held in memory."""

import copy
import errno
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from flax import traverse_util
from safetensors.torch import load_file, save_file

from dar_jax import checkpoint, mmdit_weights, sharding, streaming
from dar_jax import config as config_lib
from dar_jax.errors import UserError
from dar_jax.pretrained import qwen_image, shards
from tests.models.test_mmdit import inputs_of, model_of, reference, single
from tests.training import tiny

DEPTH = 3


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The state dict of a small model in bfloat16, and a directory where diffusers has saved it in several shards."""
    model = copy.deepcopy(reference(DEPTH)).to(torch.bfloat16)  # which other tests share
    directory = tmp_path_factory.mktemp("published")
    model.save_pretrained(directory, max_shard_size="200KB")
    assert len([*directory.glob("*.safetensors")]) > 2
    return model.state_dict(), directory


def door(source, out, *flags):
    command = [sys.executable, "-m", "dar_jax.convert", "--kind=qwen_image", f"--input={source}", f"--output={out}"]
    return subprocess.run([*command, *flags], capture_output=True, text=True)


def bits(tensors):
    return {name: (tensor.dtype, tensor.shape, tensor.numpy(force=True).tobytes()) for name, tensor in tensors.items()}


def as_words(tensors):
    return bits({name: tensor.view(torch.int16) for name, tensor in tensors.items()})


def read_shards(directory):
    index = json.loads((directory / "diffusion_pytorch_model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        tensors |= load_file(directory / shard)
    assert {name: shard for name, shard in index["weight_map"].items() if name in tensors} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


@functools.cache
def abstract_on_mesh():
    model, mesh = model_of(DEPTH), tiny.make_mesh(2, 4)
    return sharding.abstract(mesh, lambda: model.init(jax.random.key(0), *single(inputs_of((2, 2))))["params"])


def abstract(dtype):
    """The params of the small model on eight devices, four of them for fsdp."""
    put = lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)  # noqa: E731
    return jax.tree.map(put, abstract_on_mesh())


def test_there_and_back_is_bit_equal(published, tmp_path, monkeypatch):
    state_dict, source = published
    out = tmp_path / "workdir"
    done = door(source, out)
    assert done.returncode == 0, done.stderr
    assert "MM-DiT of 3 blocks x 48, 3 heads, patch 2, 4 channels, text of 12" in done.stdout

    config = json.loads((out / "config.json").read_text())["model"]
    fields = {"family": "mmdit", "hidden_size": 48, "depth": 3, "num_heads": 3, "channels": 4, "text_size": 12}
    assert fields.items() <= config.items() and config["routing"]["kind"] == "residual"

    for dtype in (jnp.bfloat16, jnp.float32):
        params, step = checkpoint.restore_ema(str(out), abstract(dtype))
        kernel = params["stack"]["steps"]["block_0"]["image"]["mlp"]["dense_0"]["kernel"]
        assert step == 0 and kernel.shape == (3, 48, 192) and kernel.sharding.shard_shape(kernel.shape) == (3, 12, 192)
        expected = qwen_image.params_from_torch(state_dict)
        jax.tree.map(lambda a, b, d=dtype: np.testing.assert_array_equal(a, b.astype(d)), params, expected)

    again = door(source, out)
    assert again.returncode == 2 and "holds checkpoints; take another" in again.stderr

    back = tmp_path / "back"
    done = door(out, back, "--export")
    assert done.returncode == 0, done.stderr
    assert as_words(read_shards(back)) == as_words(state_dict)
    monkeypatch.setattr(shards, "LIMIT", 100_000)
    mmdit_weights.export(str(out), str(tmp_path / "small"))
    files = sorted((tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 120_000 for file in files)
    (tmp_path / "small" / "config.json").write_bytes((source / "config.json").read_bytes())
    loaded = type(reference(DEPTH)).from_pretrained(tmp_path / "small", torch_dtype=torch.bfloat16)
    assert as_words(loaded.state_dict()) == as_words(state_dict)
    with pytest.raises(UserError, match=r"holds diffusion_pytorch_model\.safetensors\.index\.json; take another"):
        mmdit_weights.export(str(out), str(tmp_path / "small"))


def test_one_that_was_killed_goes_on(published, tmp_path):
    """The second run writes what is missing, and both make the same files as one that nobody has killed."""
    _, source = published
    _, parts, identity = mmdit_weights.find_parts(str(source))
    config = config_lib.default()
    workdirs = [str(tmp_path / name) for name in ("whole", "killed")]
    streaming.write_weights(workdirs[0], config, parts, identity)

    read = []

    def count_and_die(part, last):
        read.append(part.path)
        if len(read) > last:
            raise KeyboardInterrupt
        return part.read()

    def dying(last):
        return [part._replace(read=lambda part=part: count_and_die(part, last)) for part in parts]

    with pytest.raises(KeyboardInterrupt):
        streaming.write_weights(workdirs[1], config, dying(40), identity)
    assert checkpoint.latest_step(workdirs[1]) is None
    (tmp_path / "killed" / "unfinished" / "ema" / "image.bias" / "c" / "0.__lock").touch()
    with pytest.raises(UserError, match=r"is of other files; remove it, or take another --output"):
        streaming.write_weights(workdirs[1], config, parts, {"other": [1, 2]})
    read.clear()
    streaming.write_weights(workdirs[1], config, dying(10**6), identity)
    assert len(parts) - 60 < len(read) <= len(parts) - 40 + streaming.THREADS
    sums = [json.loads((tmp_path / name / "checkpoints/0/checksums.json").read_text()) for name in ("whole", "killed")]
    assert sums[0] == sums[1] and len(sums[0]) > len(parts)


def test_checkpoint_of_a_run_is_exported(tmp_path):
    """Of float32 weights on a mesh, in the form in which training saves them: chunks are the shares of devices."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), abstract(jnp.float32)
    )
    checkpoints = checkpoint.Checkpoints(str(tmp_path / "run"), keep=1)
    checkpoints.save_items({"ema": params}, 7)
    checkpoints.close()
    assert mmdit_weights.export(str(tmp_path / "run"), str(tmp_path / "out")) == (13 + 32 * DEPTH, 7)
    expected = qwen_image.params_to_torch(params)
    assert bits(read_shards(tmp_path / "out")) == bits({name: torch.tensor(x) for name, x in expected.items()})


def test_export_to_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    """The room is taken before the first tensor is read."""

    def fail(descriptor, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(UserError, match=r"--output = .* cannot be written: No space left on device"):
        shards.Writer(str(tmp_path / "out"), {"a": ((2,), np.dtype(np.float32))})
    assert not [*(tmp_path / "out").iterdir()]


def test_other_models_are_not_exported(tmp_path):
    params = qwen_image.params_from_torch(reference(1).state_dict())
    leaves = traverse_util.flatten_dict(params, sep="/")
    for name, change, message in (
        ("routed", {"stack/query_0/weight": np.ones(4)}, r'has "stack/query_0/weight", which no residual MM-DiT has'),
        ("lacking", {"image/bias": None}, r'lacks "image/bias" of a residual MM-DiT'),
    ):
        changed = {path: leaf for path, leaf in {**leaves, **change}.items() if leaf is not None}
        checkpoints = checkpoint.Checkpoints(str(tmp_path / name), keep=1)
        checkpoints.save_items({"ema": traverse_util.unflatten_dict(changed, sep="/")}, 0)
        checkpoints.close()
        with pytest.raises(UserError, match=message):
            mmdit_weights.export(str(tmp_path / name), str(tmp_path / "out"))


def edit(change):
    def damage(directory):
        tensors = {}
        for file in sorted(directory.glob("*.safetensors")):
            tensors |= load_file(file)
            file.unlink()
        next(directory.glob("*.index.json")).unlink()
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def truncate(directory):
    file = sorted(directory.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])


NORM, KERNEL = "transformer_blocks.1.attn.norm_q.weight", "transformer_blocks.2.img_mlp.net.0.proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(lambda d: d.pop(KERNEL)), f'lack the key "{KERNEL}"'),
        (edit(lambda d: d.pop("img_in.weight")), 'lack the key "img_in.weight"'),
        (edit(lambda d: d.update({"lora.weight": torch.ones(2)})), 'the key "lora.weight", which Qwen-Image has not'),
        (edit(lambda d: d.update({NORM: torch.ones(8)})), rf'"{NORM}" has shape \(8,\), but .* ask for \(16,\)'),
        (edit(lambda d: d.update({KERNEL: torch.ones(48)})), f'"{KERNEL}" has shape .* not of rank 2'),
        (edit(lambda d: d.update({NORM: d[NORM].float()})), f'"{NORM}" is float32, but its like .* is bfloat16'),
        (edit(lambda d: d.update({NORM: d[NORM].to(torch.float8_e4m3fn)})), "of dtype F8_E4M3; take weights in BF16"),
        (truncate, r"cannot be read \(.*; copy it again"),
        (lambda path: sorted(path.glob("*.safetensors"))[1].unlink(), "is missing; copy it again"),
        (lambda path: next(path.glob("*.index.json")).write_text("{"), "index.json. cannot be read"),
        (lambda path: next(path.glob("*.index.json")).unlink(), r"files \*\.safetensors; name one"),
    ],
)
def test_wrong_weights_are_one_line(damage, message, published, tmp_path):
    for file in published[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        mmdit_weights.find_parts(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_number_that_is_not_finite_is_named(published, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in published[0].items()}
    tensors[NORM][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    _, parts, source = mmdit_weights.find_parts(str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=f'"{NORM}" in .* holds numbers that are not finite'):
        streaming.write_weights(str(tmp_path / "out"), config_lib.default(), parts, source)


def test_sizes_are_those_of_the_published_model():
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in QwenImageTransformer2DModel(num_layers=60).state_dict().items()}
    assert qwen_image.infer_model(shapes) == {
        **{"channels": 16, "patch_size": 2, "hidden_size": 3072, "depth": 60, "num_heads": 24, "text_size": 3584}
    }
