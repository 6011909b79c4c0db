"""Batches: endless, shuffled and sharded for training, a function of the step; whole arrays for evaluation."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from dar_jax.conditions import Embeddings, Kind, Labels
from dar_jax.data.buckets import assign, parse_buckets
from dar_jax.data.images import center_crop, to_channels, to_float
from dar_jax.data.latents import LatentSource, check_checksums, draw_latent
from dar_jax.data.order import Order
from dar_jax.data.sources import open_source, read, suited
from dar_jax.pretrained.vae import read_header

_MAX_THREADS = 16


def train_iterator(
    data: ConfigDict,
    *,
    space: str,
    channels: int,
    batch_size: int,
    seed: int,
    kind: Kind | None = None,
    first_step: int = 0,
    rows: np.ndarray | None = None,
    image_size: int | None = None,
) -> grain.DatasetIterator:
    """Iterates over this process's rows of the training batches, without end.

    The order of the examples is `order.Order`; its groups are the buckets of `data.buckets`, if there are any. Each
    example is flipped, if the config says so, by a generator keyed with its step and row. Prepared latents are drawn
    from their distribution by the same generator, anew in each epoch. Embeddings of captions are padded for a batch as
    a whole, to one of `conditions.Embeddings.lengths`.

    So a run resumes bit for bit, in any number of processes, by the number of steps it has taken: `first_step`.

    Args:
      data: `config.data`.
      space: "pixels" or "latents": what x1 is. Prepared data may hold both.
      channels: 1 (grey) or 3 (RGB), to which images are converted; or those of latents.
      batch_size: examples per step over all processes.
      seed: of the order and the flips, 0 <= seed.
      kind: makes the condition of an example; None: its label.
      first_step: steps to leave out.
      rows: which rows of every batch to read, int [b] ascending (`sharding.local_rows`); None for all.
      image_size: side of the images that are read beside latents, or instead of them and before their encoding; None
        if they are not asked for.

    Returns:
      A grain iterator of {"x1": float32 [b, S, S, channels], "condition": of b examples}, S = data.image_size, or the
      height and width of the bucket of the batch: images in [-1, 1], or scaled latents. With `image_size` also "image",
      uint8 [b, image_size, image_size, 3], which is flipped where x1 is.

    Raises:
      UserError: the split cannot be opened, prepared data do not fit `space`, channels or `data.vae`, a shard is
        damaged, or with buckets an image. `next` raises it for a damaged image, or a label that is no class.
    """
    is_latent, kind = space == "latents", kind or Labels(0)
    rows = np.arange(batch_size) if rows is None else rows
    source, flip = suited(open_source(data, data.train_split), channels, kind), data.flip
    if data.source == "latents":
        _check_latents(source, data, space, channels, image_size, batch_size, rows)
    sizes = parse_buckets(data.buckets, "config.data.buckets") or ((data.image_size, data.image_size),)
    if data.source == "latents":
        groups = source.groups
    else:
        groups = assign(source, sizes) if data.buckets else np.zeros(len(source), np.int8)
    order = Order(seed, batch_size, groups)

    def load(i: int) -> dict[str, Any]:
        step, row = divmod(i, len(rows))
        row = int(rows[row])
        bucket, indices = order.batch(step)
        rng = np.random.default_rng((seed, step * batch_size + row, 1))  # Order's have two numbers
        example = read(source, int(indices[row]))
        mirrored = flip and rng.random() < 0.5
        if is_latent and "moments" in example:
            x1 = draw_latent(example["moments"][int(mirrored)], source.shift, source.scale, rng)
        else:
            image = (
                example["image"] if is_latent else center_crop(to_channels(example["image"], channels), sizes[bucket])
            )
            x1 = image[:, ::-1] if mirrored else image
        if isinstance(kind, Embeddings):
            example |= {"empty": source.texts.empty, "length": kind.padded_length(source.texts.longest(indices))}
        loaded = {"x1": x1, "condition": kind.encode(example)}
        if image_size is None:
            return loaded
        image = example["image"] if is_latent else image
        return {**loaded, "image": image[:, ::-1] if mirrored else image}

    def scale(batch: dict[str, Any]) -> dict[str, Any]:
        x1 = batch["x1"]
        return {**batch, "x1": to_float(x1) if x1.dtype == np.uint8 else x1}

    stream = grain.MapDataset.range(first_step * len(rows), sys.maxsize).map(load)
    stream = stream.batch(len(rows), drop_remainder=True).map(scale)
    # Grain prefetches whole batches: its default, 500 of them, would fill the memory of a host.
    threads = 1 if data.num_workers else min(os.cpu_count() or 1, _MAX_THREADS)
    batches = stream.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if data.num_workers:
        if not flags.FLAGS.is_parsed():  # as in a notebook; grain's workers inherit flags
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=data.num_workers)
        batches = batches.mp_prefetch(options, worker_init_fn=_end_with_the_run)
    return iter(batches)


def _end_with_the_run(worker: int, workers: int) -> None:
    """In a worker process: ends it when the run ends, however that is killed."""
    run = multiprocessing.parent_process()

    def watch() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _check_latents(
    source: LatentSource,
    data: ConfigDict,
    space: str,
    channels: int,
    image_size: int | None,
    batch_size: int,
    rows: np.ndarray,
) -> None:
    fingerprint = None
    if data.vae:
        fingerprint = read_header(data.vae, "config.data.vae")["fingerprint"]
    source.check(space, data.image_size, channels, fingerprint, tuple(data.buckets))
    if image_size:
        source.check_images(image_size)
    if data.verify:
        # Each shard goes with one row of the batch, so that processes, whatever rows they have, check all together.
        shards = source.manifest["shards"]
        check_checksums(source.directory, [s for i, s in enumerate(shards) if i * batch_size // len(shards) in rows])


def image_batches(
    data: ConfigDict, split: str, *, channels: int, batch_size: int, limit: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields a split, or an evenly spaced part of it, for evaluation: centre-cropped, never flipped.

    Args:
      data: `config.data`.
      split: the name of the split.
      channels: 1 (grey) or 3 (RGB); images are converted.
      batch_size: images at a time; the last batch may be smaller.
      limit: at most this many images, in source order: of n images, number i * n // limit for each i < limit.

    Yields:
      Images, uint8 [b, S, S, channels] with S = data.image_size, and labels, int32 [b].

    Raises:
      UserError: the split cannot be opened, or an image is damaged.
    """
    source = open_source(data, split)
    if data.source == "latents":
        source.check("pixels", data.image_size, channels, None)
    count = len(source) if limit is None else min(limit, len(source))

    def load(i: int) -> tuple[np.ndarray, int]:
        example = source[i * len(source) // count]
        return center_crop(to_channels(example["image"], channels), data.image_size), example["label"]

    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as pool:
        for start in range(0, count, batch_size):
            examples = list(pool.map(load, range(start, min(start + batch_size, count))))
            images, labels = zip(*examples, strict=True)
            yield np.stack(images), np.array(labels, np.int32)


def load_images(
    data: ConfigDict, split: str, *, channels: int, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """All of `image_batches` at once: images, uint8 [N, S, S, channels], and labels, int32 [N]."""
    batches = image_batches(data, split, channels=channels, batch_size=1000, limit=limit)
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)
