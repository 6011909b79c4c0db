"""Scores samples: FID, sFID, Inception score, KID, precision and recall; or their fine detail; or a likelihood.

    python -m dar_jax.evaluate --workdir=runs/digits --num_samples=2000 --inception=inception.npz
    python -m dar_jax.evaluate --samples=samples.npz --reference=ref.npz --inception=inception.npz
    python -m dar_jax.evaluate --config=configs/digits.py --write_reference=ref.npz --inception=inception.npz
    python -m dar_jax.evaluate --workdir=runs/digits --detail --teacher_samples=teacher.npz --figure=detail.png
    python -m dar_jax.evaluate --workdir=runs/digits --likelihood --num_samples=256 --steps=50

The weights of a run are the EMA of its latest checkpoint; options left out are the run's own. A stopped evaluation of
a run goes on where it was when the same command is given again. Without --inception, small images of a run are scored
by a convnet (fd_convnet), which is not FID.

--detail measures power spectra, high-frequency energy, grids and sharpness instead, and patch FID if the images are
large enough and --inception is given. --likelihood measures bits per dimension of held-out images.
"""

from absl import flags
from ml_collections import config_flags

from dar_jax import cli, errors, files, runtime

WORKDIR = flags.DEFINE_string("workdir", None, "A run to sample from and score")
SAMPLES = flags.DEFINE_string("samples", None, "Or an .npz of samples, arr_0 uint8 [N, H, W, C]")
REFERENCE = flags.DEFINE_string("reference", None, "An .npz in the ADM layout; default: the run's eval.reference")
INCEPTION = flags.DEFINE_string("inception", None, "Weights by convert --kind=inception; default: eval.inception")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 50_000, "How many samples", lower_bound=2)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to load; default: the latest")
SAMPLER = flags.DEFINE_string("sampler", None, "euler | heun | dopri5 | sde_euler | sde_heun; default: the run's")
STEPS = flags.DEFINE_integer("steps", None, "Steps of the fixed-step samplers; default: the run's")
CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance scale, 1 = none; default: the run's")
CFG_SWEEP = flags.DEFINE_list("cfg_sweep", None, "Several guidance scales, a row of the table each: 1,1.25,1.5")
VAE = flags.DEFINE_string("vae", None, "A converted VAE, which decodes latents; default: the run's data.vae")
LABELS = flags.DEFINE_string("labels", None, "balanced | random class labels; default: eval.labels")
SEED = flags.DEFINE_integer("seed", None, "Seed of noise and random labels; default: the run's")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Samples at a time over all devices; default: eval.batch_size")
JSON = flags.DEFINE_string("json", None, "Also write the scores and all settings that affect them to this file")
SAMPLES_OUT = flags.DEFINE_string("samples_out", None, "Also write the samples to this .npz in the ADM layout")
DETAIL = flags.DEFINE_boolean("detail", False, "Measure fine detail instead: spectra, grids, sharpness, patch FID")
TEACHER_SAMPLES = flags.DEFINE_string("teacher_samples", None, "With --detail: an .npz of a teacher, same seeds")
BESIDE = flags.DEFINE_list("beside", None, "With --detail: more samples, same seeds, NAME=PATH.npz,NAME=PATH.npz")
FIGURE = flags.DEFINE_string("figure", None, "With --detail: spectra as .png and .pdf; default: that of --json")
LIKELIHOOD = flags.DEFINE_boolean("likelihood", False, "Measure bits per dimension of held-out images of a run instead")
CONFIG = config_flags.DEFINE_config_file("config", None, "With --write_reference: whose data to take")
SPLIT = flags.DEFINE_string("split", None, "With --write_reference: which split; default: data.eval_split")
WRITE_REFERENCE = flags.DEFINE_string("write_reference", None, "Write the reference .npz of a data set, score nothing")


def main(_):
    given = {"--workdir": WORKDIR.value, "--samples": SAMPLES.value, "--write_reference": WRITE_REFERENCE.value}
    if len([value for value in given.values() if value]) != 1:
        raise errors.UserError(f"give one of {', '.join(given)}; see --help.")
    if JSON.value is not None:
        files.check_output(JSON.value, "--json")
    others, figure = (_others(), _figure()) if DETAIL.value else (None, None)
    if not DETAIL.value:
        for flag in (TEACHER_SAMPLES, BESIDE, FIGURE):
            if flag.value is not None:
                raise errors.UserError(f"--{flag.name} needs --detail; add --detail, or leave out --{flag.name}.")
    if LIKELIHOOD.value and (DETAIL.value or not WORKDIR.value):
        raise errors.UserError("--likelihood is of a run and alone; give --workdir, and leave out --detail.")
    for flag in (SAMPLER, CFG_SCALE, CFG_SWEEP, REFERENCE, SAMPLES_OUT) if LIKELIHOOD.value else ():
        if flag.value is not None:
            raise errors.UserError(f"--likelihood draws no samples; leave out --{flag.name}.")
    runtime.start()
    if LIKELIHOOD.value:
        _measure_likelihood()
        return
    if WRITE_REFERENCE.value:
        _write_reference()
        return
    results = _evaluate_run(others) if WORKDIR.value else _evaluate_file(others)
    import jax

    from dar_jax.evaluation import detail, scoring, spectra, style

    if jax.process_index() > 0:
        return
    print(detail.table(results) if DETAIL.value else scoring.table(results))
    if figure is not None:
        with files.writing(figure, "--figure"):
            written = style.save(lambda: spectra.draw(results), files.path(figure))
        print("\n".join(f"wrote {path}" for path in written))
    if JSON.value is not None:
        files.write_json(JSON.value, results, indent=2)
        print(f"wrote {JSON.value}")
    if SAMPLES_OUT.value:
        print(f"wrote {SAMPLES_OUT.value}")


def _others() -> dict[str, str]:
    """The files of --teacher_samples and --beside by name."""
    if WRITE_REFERENCE.value or CFG_SWEEP.value:
        flag = "write_reference" if WRITE_REFERENCE.value else "cfg_sweep"
        raise errors.UserError(f"--detail is of one set of samples; leave out --{flag}.")
    found = {"teacher": TEACHER_SAMPLES.value} if TEACHER_SAMPLES.value else {}
    for word in BESIDE.value or ():
        name, _, path = word.partition("=")
        if not (name and path) or name in {"reference", "samples", "teacher", *found}:
            raise errors.UserError(
                f'--beside: "{word}" must be NAME=PATH.npz, and the name another than reference, samples, teacher or '
                "one given before."
            )
        found[name] = path
    return found


def _figure() -> str | None:
    """Where the figure goes, None for nowhere. Both its files can be written."""
    path = FIGURE.value or (JSON.value and JSON.value.removesuffix(".json") + ".png")
    if path:
        files.check_output(path, "--figure", ".png")
        files.check_output(path.removesuffix(".png") + ".pdf", "--figure")
    return path


def _measure_likelihood() -> None:
    import jax

    from dar_jax.evaluation import likelihood
    from dar_jax.validate import validate

    config = _config_of_run()
    validate(config)
    found = likelihood.likelihood_of_run(config, WORKDIR.value, STEP.value)
    if jax.process_index() == 0:
        print(likelihood.table(found))
        if JSON.value is not None:
            files.write_json(JSON.value, found, indent=2)
            print(f"wrote {JSON.value}")


def _config_of_run():
    """The config of --workdir with the flags that were given."""
    from dar_jax.checkpoint import load_config

    config = load_config(WORKDIR.value)
    config.eval.num_samples = NUM_SAMPLES.value
    for section, field, flag in (
        (config.sampler, "method", SAMPLER),
        (config.sampler, "num_steps", STEPS),
        (config.sampler, "cfg_scale", CFG_SCALE),
        (config.eval, "labels", LABELS),
        (config.eval, "batch_size", BATCH_SIZE),
        (config.eval, "inception", INCEPTION),
        (config.eval, "reference", REFERENCE),
        (config, "seed", SEED),
        (config.data, "vae", VAE),
    ):
        if flag.value is not None:
            section[field] = flag.value
    return config


def _evaluate_run(others: dict[str, str] | None) -> list[dict]:
    from dar_jax.evaluation import scoring
    from dar_jax.validate import validate

    config = _config_of_run()
    sweep = CFG_SWEEP.value
    scales = [config.sampler.cfg_scale] if sweep is None else cli.parse_numbers("cfg_sweep", sweep)
    for scale in scales:
        config.sampler.cfg_scale = scale
        validate(config)
    if others is not None:
        return scoring.detail_of_run(config, WORKDIR.value, STEP.value, others, SAMPLES_OUT.value)
    return scoring.evaluate_run(config, WORKDIR.value, STEP.value, scales, SAMPLES_OUT.value)


def _evaluate_file(others: dict[str, str] | None) -> list[dict]:
    from dar_jax.evaluation import scoring

    cli.require_flags(reference=REFERENCE.value)
    inception, count = INCEPTION.value or "", NUM_SAMPLES.value
    if others is not None:
        return scoring.detail_of_file(SAMPLES.value, REFERENCE.value, others, inception, count)
    return [scoring.evaluate_file(SAMPLES.value, REFERENCE.value, inception, count)]


def _write_reference() -> None:
    from dar_jax.evaluation import scoring
    from dar_jax.logs import say
    from dar_jax.validate import validate

    cli.require_flags(config=CONFIG.value)
    config = CONFIG.value
    validate(config)
    config.eval.inception = INCEPTION.value or config.eval.inception
    count = scoring.write_reference(config, SPLIT.value or config.data.eval_split, WRITE_REFERENCE.value)
    say(f"wrote {WRITE_REFERENCE.value} of {count} images")


if __name__ == "__main__":
    cli.run(main)
