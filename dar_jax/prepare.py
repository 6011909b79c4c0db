"""Encodes a data set once: python -m dar_jax.prepare --source=tfds:imagenet2012 --image_size=256 --vae=vae --out=DIR

--out becomes a directory of ArrayRecord shards and a manifest.json, which config.data.source = "latents" reads; the
record is described in dar_jax/data/latents.py. The images of each host are encoded on all its devices. A command that
was stopped goes on when it is repeated, and gives the same bytes. Several hosts that share a file system share the
work: --worker=0/4 on the first of four, --worker=3/4 on the last. --verify reads a finished set and compares checksums.
With --text_encoder the captions of --source are encoded as well, once, by the text encoder of Qwen-Image.
"""

import os
import re

from absl import flags

from dar_jax import cli, errors

SOURCE = flags.DEFINE_string(
    "source", None, "tfds:NAME (prepared as array_record) | folder:PATH | captions:PATH | idx:PATH"
)
DATA_DIR = flags.DEFINE_string("data_dir", "", "tfds: where the set is; default: the tfds default")
SPLIT = flags.DEFINE_string("split", "train", 'Split of the source; of a folder, its sub folder or "."')
IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Pixels, height = width, after the crop")
BUCKETS = flags.DEFINE_list("buckets", [], "Sizes of the crops in place of squares, as 512x512,448x576: height x width")
VAE = flags.DEFINE_string("vae", None, "A directory that dar_jax.convert wrote, or none to keep pixels only")
TEXT_ENCODER = flags.DEFINE_string("text_encoder", None, "The folder of Qwen-Image, or of Qwen2.5-VL: encodes captions")
OUT = flags.DEFINE_string("out", None, "The directory to write, to go on with, or to verify")
DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "Of moments and embeddings")
KEEP_IMAGES = flags.DEFINE_bool("keep_images", False, "Keep the pixels (uint8) beside the moments")
SHARD_SIZE = flags.DEFINE_integer("shard_size", 8192, "Images per shard: what a kill can cost", lower_bound=1)
MAX_SKIPPED = flags.DEFINE_integer("max_skipped", 10, "Images that cannot be read and are left out", lower_bound=0)
WORKER = flags.DEFINE_string("worker", "0/1", "i/n: this process is number i of the n that share the shards")
VERIFY = flags.DEFINE_bool("verify", False, "Check the finished set in --out and do nothing else")


def main(_):
    cli.require_flags(out=OUT.value)
    if VERIFY.value:
        _verify()
        return
    cli.require_flags(source=SOURCE.value, vae=VAE.value)
    worker = re.fullmatch(r"(\d+)/(\d+)", WORKER.value)
    if not worker or int(worker[1]) >= int(worker[2]):
        raise errors.UserError(f'--worker = "{WORKER.value}" must be i/n with 0 <= i < n, as 0/4.')
    from dar_jax.data.prepare import describe, prepare

    source, vae, text_encoder = _open_source(), None, None
    if TEXT_ENCODER.value:
        # PyTorch and jax share a GPU, of which jax would take most at once.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from dar_jax.pretrained import qwen_text

        text_encoder = qwen_text.load(TEXT_ENCODER.value, "--text_encoder")
    if VAE.value != "none":
        from dar_jax.pretrained.vae import load

        vae = load(VAE.value, "--vae")
    settings = describe(
        source,
        SOURCE.value,
        SPLIT.value,
        IMAGE_SIZE.value,
        vae,
        DTYPE.value,
        KEEP_IMAGES.value,
        SHARD_SIZE.value,
        text_encoder,
        BUCKETS.value,
    )
    prepare(
        source,
        settings,
        vae,
        OUT.value,
        max_skipped=MAX_SKIPPED.value,
        worker=int(worker[1]),
        workers=int(worker[2]),
        text_encoder=text_encoder,
        say=lambda line: print(line, flush=True),
    )


def _open_source():
    from dar_jax.config import default, schema
    from dar_jax.data.sources import open_source

    errors.check_number("--image_size", IMAGE_SIZE.value, int, schema().data.image_size.interval)

    kind, _, place = SOURCE.value.partition(":")
    if kind not in ("tfds", "folder", "captions", "idx") or not place:
        raise errors.UserError(
            f'--source = "{SOURCE.value}" must be tfds:NAME, folder:PATH, captions:PATH or idx:PATH.'
        )
    data = default().data
    data.source = kind
    data.update({"name": place, "path": DATA_DIR.value} if kind == "tfds" else {"path": place})
    try:
        return open_source(data, SPLIT.value)
    except errors.UserError as error:  # which names the fields of a config
        raise errors.UserError(f"--source = {SOURCE.value}: {error}") from error


def _verify():
    from dar_jax import files
    from dar_jax.data.prepare import verify

    path = files.path(OUT.value)
    manifest = verify(path)
    print(f"{path} is whole: {manifest['num_examples']:,} examples in {len(manifest['shards'])} shards")


if __name__ == "__main__":
    cli.run(main)
