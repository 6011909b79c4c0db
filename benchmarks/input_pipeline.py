"""Measures what reading costs, for prepared latents and for a PNG and an .npy per image (the layout of REPA).

    python benchmarks/input_pipeline.py --count=1000 --rounds=5

Rates are per second of one core. They are medians over rounds that take turns, of processor time summed over threads.
The images are random but smooth, so that a PNG of 256x256 pixels has about the size of a photograph's PNG. REPA draws
its latents on the device. Here the host draws them, and the draw counts as reading.

Also measures the share of time that training waits for data: the wall time spent in next(iterator) in a loop of real
train steps, which are dispatched as dar_jax.training.loop does.
"""

import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import app, flags
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict
from PIL import Image

from dar_jax import config as config_lib
from dar_jax import files, sharding
from dar_jax.data.latents import SCHEMA, record_dtype
from dar_jax.data.pipeline import train_iterator
from dar_jax.training.setup import build_algorithm, set_up

COUNT = flags.DEFINE_integer("count", 1000, "Images of 256x256 pixels, with their latents")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 50, "Examples per batch; a round reads all images once")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds over all cases, after one to warm up")
STEPS = flags.DEFINE_integer("steps", 50, "Train steps of the wait measurement, after five to warm up")
JSON = flags.DEFINE_string("json", None, "Where to write the result")

MOMENTS = ["moments", "<f2", [2, 2, 32, 32, 4]]
PIXELS = ["image", "|u1", [256, 256, 3]]


def write_sets(root: pathlib.Path) -> None:
    """Writes the same examples as REPA's files, prepared latents, prepared latents with pixels, and pixels only."""
    rng = np.random.default_rng(0)
    sets = {"latents": [MOMENTS], "both": [MOMENTS, PIXELS], "pixels": [PIXELS]}
    dtypes = {name: record_dtype([["label", "<i4", []], *fields]) for name, fields in sets.items()}
    writers = {}
    for name in sets:
        (root / name / "train").mkdir(parents=True)
        writers[name] = ArrayRecordWriter(str(root / name / "train" / "shard"), "group_size:1,uncompressed")
    for folder in ("png/train/0", "npy"):
        (root / folder).mkdir(parents=True)
    for i in range(COUNT.value):
        coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).resize((256, 256), Image.BICUBIC)
        image = np.clip(np.asarray(coarse) + rng.normal(0, 2, (256, 256, 3)), 0, 255).astype(np.uint8)
        moments = rng.normal(size=(2, 2, 32, 32, 4)).astype(np.float32)
        Image.fromarray(image).save(root / f"png/train/0/{i:08}.png")
        np.save(root / f"npy/{i:08}.npy", moments[0].transpose(0, 3, 1, 2).reshape(8, 32, 32))
        for name, writer in writers.items():
            record = np.zeros((), dtypes[name])
            for field, value in (("image", image), ("moments", moments)):
                if field in dtypes[name].names:
                    record[field] = value
            writer.write(record.tobytes())
    for name, writer in writers.items():
        writer.close()
        shard = root / name / "train" / "shard"
        entry = {"name": "shard", "records": COUNT.value, "bytes": shard.stat().st_size, "sha256": files.sha256(shard)}
        manifest = {
            "schema": SCHEMA,
            "num_classes": 1000,
            "vae": {"fingerprint": "none", "scale": 0.18215},
            "fields": [["label", "<i4", []], *sets[name]],
            "shards": [entry],
        }
        (shard.parent / "manifest.json").write_text(json.dumps(manifest))


def repa_batches(root: pathlib.Path) -> Iterator[tuple[np.ndarray, ...]]:
    """A loader like one in PyTorch: its data set opens two files for an example, and a function collates them."""
    rng = np.random.default_rng(0)
    while True:
        for batch in np.split(rng.permutation(COUNT.value), COUNT.value // BATCH_SIZE.value):
            images, moments = [], []
            for i in batch:
                with Image.open(root / f"png/train/0/{i:08}.png") as image:
                    images.append(np.asarray(image).transpose(2, 0, 1))
                moments.append(np.load(root / f"npy/{i:08}.npy"))
            yield np.stack(images), np.stack(moments), np.zeros(len(batch), np.int64)


def data_config(**fields) -> ConfigDict:
    data = config_lib.default().data
    data.update(flip=True, **fields)
    return data


def our_batches(batch_size: int, channels: int, **fields) -> Iterator:
    space = "latents" if channels == 4 else "pixels"
    return train_iterator(data_config(**fields), space=space, channels=channels, batch_size=batch_size, seed=0)


def measure_rates(root: pathlib.Path) -> list[dict]:
    def ours(name, channels):
        return our_batches(
            BATCH_SIZE.value, channels, source="latents", path=str(root / name), image_size=32 if channels == 4 else 256
        )

    cases: dict[str, Callable] = {
        "PNG + npy (REPA)": lambda: repa_batches(root),
        "prepared latents": lambda: ours("latents", 4),
        "prepared latents beside pixels": lambda: ours("both", 4),
        "PNG folder, pixels": lambda: our_batches(
            BATCH_SIZE.value, 3, source="folder", path=str(root / "png"), image_size=256
        ),
        "prepared pixels": lambda: ours("pixels", 3),
    }
    rates = {name: [] for name in cases}
    for _ in range(ROUNDS.value + 1):
        for name, open_case in cases.items():
            start, batches = time.process_time(), open_case()
            for _ in range(COUNT.value // BATCH_SIZE.value):
                next(batches)
            batches.close()  # before the clock stops, so that the next case does not pay for what was read ahead
            rates[name].append(COUNT.value / (time.process_time() - start))
    medians = {name: float(np.median(values[1:])) for name, values in rates.items()}
    base = medians["PNG + npy (REPA)"]
    return [{"case": name, "per_core_second": rate, "ratio": rate / base} for name, rate in medians.items()]


def measure_waiting(root: pathlib.Path) -> float:
    """The share of wall time that a loop of train steps of a small SiT on latents spends waiting for its batches."""
    config = config_lib.route(config_lib.default(), "static_t")
    config.model.update(space="latents", input_size=32, channels=4, num_classes=1000, patch_size=4)
    config.train.batch_size = 32
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use(mesh):
        run = set_up(config, build_algorithm(config), mesh)
        state = run.init()
        batches = our_batches(config.train.batch_size, 4, source="latents", path=str(root / "latents"), image_size=32)
        waited, pending = 0.0, None
        for i in range(STEPS.value + 5):
            if i == 5:
                jax.block_until_ready(state)
                start, waited = time.monotonic(), 0.0
            before = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - before
            state, metrics = run.step(state, (), jax.device_put(batch, sharding.batch_sharding(mesh)))
            if pending:
                jax.block_until_ready(pending)  # the loop too waits for the metrics of the previous step
            pending = metrics
        jax.block_until_ready(state)
        return waited / (time.monotonic() - start)


def main(_):
    if COUNT.value % BATCH_SIZE.value:
        raise SystemExit("--count must be a multiple of --batch_size")
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        write_sets(root)
        rows, waiting = measure_rates(root), measure_waiting(root)
    print(f"{COUNT.value} images of 256x256, batches of {BATCH_SIZE.value}")
    for row in rows:
        print(f"{row['case']:32}{row['per_core_second']:8.0f} /s of one core{row['ratio']:8.1f}x")
    print(f"share of the train step's time spent waiting for latents: {100 * waiting:.2f} %")
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps({"rates": rows, "waiting": waiting}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
