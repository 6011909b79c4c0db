"""Draws samples: python -m dar_jax.sample --workdir=runs/digits --labels=0,1,2 --cfg_scale=2 --out=grid.png
Of captions: python -m dar_jax.sample --workdir=runs/emoji --prompts="tiger face;woman firefighter: dark skin tone"

A model of embeddings needs --text_encoder, unless the prompts are captions of the run's prepared eval_split.

The weights are the EMA of the latest checkpoint. With --out=x.npz the images are written in the ADM layout: arr_0
uint8 [N, H, W, C] and, as arr_1, the labels int64 [N] or the captions. Without --vae, a model of latents gives them as
float32.
"""

from absl import flags

from dar_jax import cli, errors, runtime

WORKDIR = flags.DEFINE_string("workdir", None, "A directory that dar_jax.main wrote")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to load; default: the latest")
LABELS = flags.DEFINE_list("labels", None, "Class labels, one column of the grid each; default: all, at most 10")
PROMPTS = flags.DEFINE_string("prompts", None, "Captions with ; between them, one column of the grid each")
NUM_PER_LABEL = flags.DEFINE_integer("num_per_label", 8, "Samples of each, the rows of the grid", 1, 10_000)
SAMPLER = flags.DEFINE_string("sampler", None, "euler | heun | dopri5 | sde_euler | sde_heun; default: the run's")
STEPS = flags.DEFINE_integer("steps", None, "Steps of the fixed-step samplers; default: the run's")
CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance scale, 1 = none; default: the run's")
VAE = flags.DEFINE_string("vae", None, "A converted VAE, which decodes latents; default: the run's config.data.vae")
TEXT_ENCODER = flags.DEFINE_string("text_encoder", None, "Directory of the text encoder of a model of embeddings")
SEED = flags.DEFINE_integer("seed", None, "Seed of the noise; default: the run's")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Samples per batch over all devices; default: eval.batch_size")
OUT = flags.DEFINE_string("out", "samples.png", "A .png grid or an .npz of images and labels")


def main(_):
    cli.require_flags(workdir=WORKDIR.value)
    runtime.start()
    from dar_jax.checkpoint import load_config
    from dar_jax.evaluation.sampling import sample_to_file
    from dar_jax.logs import say
    from dar_jax.validate import validate

    config = load_config(WORKDIR.value)
    for section, field, flag in (
        (config.sampler, "method", SAMPLER),
        (config.sampler, "num_steps", STEPS),
        (config.sampler, "cfg_scale", CFG_SCALE),
        (config.eval, "batch_size", BATCH_SIZE),
        (config, "seed", SEED),
        (config.data, "vae", VAE),
        (config.data, "text_encoder", TEXT_ENCODER),
    ):
        if flag.value is not None:
            section[field] = flag.value
    validate(config)
    names = LABELS.value
    if config.model.family == "sit":
        errors.require(PROMPTS.value is None, "--prompts: the model takes class labels; give --labels.")
    else:
        errors.require(LABELS.value is None, "--labels: the model takes captions; give --prompts.")
        names = [name.strip() for name in (PROMPTS.value or "").split(";") if name.strip()]
    sample_to_file(config, WORKDIR.value, STEP.value, names, NUM_PER_LABEL.value, OUT.value)
    say(f"wrote {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
