"""Shows what the layers of a trained model do: magnitudes, gradients, similarity, sources by time, a probe of t.

    python -m dar_jax.diagnose --workdir=runs/digits_residual --compare=runs/digits --out=diagnosis

The weights are the EMA of the latest checkpoint, the images those of the run's config.data.eval_split. --out gets
report.html (which needs no other file), every figure as PNG and PDF, and diagnosis.json with every number.
"""

from absl import flags

from dar_jax import cli, runtime

WORKDIR = flags.DEFINE_string("workdir", None, "A directory that dar_jax.main wrote, residual or routed")
COMPARE = flags.DEFINE_string("compare", None, "Another one, to show beside it")
OUT = flags.DEFINE_string("out", None, "Directory of the report, the figures and the numbers; created if missing")
SPLIT = flags.DEFINE_string("split", None, "Which images of the runs' data; default: their data.eval_split")
NUM_IMAGES = flags.DEFINE_integer("num_images", 4096, "Images, each with one noise for all times", lower_bound=8)
TIMESTEPS = flags.DEFINE_list("timesteps", None, "Times from 0 (noise) to 1 (data): 0,0.5,1; default: eleven, evenly")
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Images at a time over all devices; default: a train step's", lower_bound=1
)
CANONICAL = flags.DEFINE_boolean("canonical", False, "Also freeze routing weights to their mean over t, and score it")
ABLATE = flags.DEFINE_boolean("ablate", False, "Also measure losses with t shuffled in queries and without each source")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "Samples it scores; default: eval.num_samples", lower_bound=0)


def main(_):
    cli.require_flags(workdir=WORKDIR.value, out=OUT.value)
    times = None if TIMESTEPS.value is None else cli.parse_numbers("timesteps", TIMESTEPS.value)
    runtime.start()
    from dar_jax.checkpoint import load_config
    from dar_jax.diagnosis.runs import diagnose
    from dar_jax.logs import say
    from dar_jax.validate import validate

    workdirs = [workdir for workdir in (WORKDIR.value, COMPARE.value) if workdir]
    configs = [load_config(workdir) for workdir in workdirs]
    for config in configs:
        config.data.eval_split = SPLIT.value or config.data.eval_split
        config.eval.num_samples = config.eval.num_samples if NUM_SAMPLES.value is None else NUM_SAMPLES.value
        config.eval.every_steps = 0  # what a run could not evaluate can still be diagnosed
        validate(config)
    written = diagnose(
        configs,
        workdirs,
        OUT.value,
        num_images=NUM_IMAGES.value,
        timesteps=times,
        batch_size=BATCH_SIZE.value,
        canonical=CANONICAL.value,
        ablations=ABLATE.value,
    )
    for path in written:
        say(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
