"""Measures one or two runs, draws the figures, writes numbers and report: what the door `diagnose` does."""

import json
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dar_jax import diffusion, files, models, sharding
from dar_jax.checkpoint import saved_steps
from dar_jax.config import micro_batch
from dar_jax.data.sources import open_source
from dar_jax.diagnosis import figures
from dar_jax.diagnosis.ablations import ablate
from dar_jax.diagnosis.canonical import compare_canonical
from dar_jax.diagnosis.pairs import Pairs, batches
from dar_jax.diagnosis.probes import LinearProbe, averages, make_measure, relative_entropy, source_mask, summary
from dar_jax.diagnosis.report import write_report
from dar_jax.errors import UserError
from dar_jax.evaluation.sampling import restore
from dar_jax.logs import say
from dar_jax.models import SiT

NUM_TIMES = 11  # of the default grid
HELD_OUT = 4  # the linear probe is scored on one pair in so many


def diagnose(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[str],
    out: str,
    *,
    num_images: int,
    timesteps: Sequence[float] | None,
    batch_size: int | None,
    canonical: bool,
    ablations: bool = False,
) -> list[files.Path]:
    """Diagnoses the EMA of the latest checkpoint of each run and writes figures, diagnosis.json and report.html.

    Args:
      configs: of one run, or of two to compare. The images are those of `data.eval_split`; for `canonical`,
        `eval.num_samples` samples are scored, 0 for losses only.
      workdirs: of these runs.
      out: directory to write to.
      num_images: of the split; all of it, if it has fewer.
      timesteps: times at which to measure; None: eleven over the range in which the model samples.
      batch_size: images at a time over all devices; None: of a train step (or microbatch) of the run.
      canonical: also freeze the weights of the routed runs to their mean over t (`canonical.compare_canonical`).
      ablations: also measure their losses without the time in the queries, and without each source
        (`ablations.ablate`).

    Returns:
      What was written, the report first.

    Raises:
      UserError: something does not fit, before anything is compiled.
    """
    wanted = [("canonical", "freezes routing weights")] if canonical else []
    wanted += [("ablate", "removes sources of routing")] if ablations else []
    for flag, what in wanted:
        if all(config.model.routing.kind != "dar" for config in configs):
            kinds = " or ".join(sorted({config.model.routing.kind for config in configs}))
            raise UserError(f"--{flag} {what}, and a {kinds} model has none; leave it out.")
        if any(config.model.family == "mmdit" for config in configs):
            raise UserError(f"--{flag} is not there for config.model.family = mmdit yet; leave it out.")
    plans = []
    for config, workdir in zip(configs, workdirs, strict=True):
        saved_steps(workdir)
        sharding.fit(config.mesh)
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(mesh, "--batch_size", batch_size or micro_batch(config))
        if canonical:
            _check_sampling(config)
        plans.append((config, workdir, mesh, _choose(config, workdir, num_images, timesteps, batch_size)))
    folder = files.path(out)
    for name in ("diagnosis.json", "report.html"):
        files.check_output(folder / name, "--out")

    results = [_measure_run(*plan, canonical, ablations) for plan in plans]
    if jax.process_index() > 0:
        return []
    numbers = folder / "diagnosis.json"
    files.write_text(numbers, json.dumps({"runs": _plain(results)}, indent=1, allow_nan=False) + "\n")
    drawn = figures.draw(results, folder)
    return [write_report(results, drawn, folder), numbers, *(path for figure in drawn for path in figure.paths)]


def _check_sampling(config: ConfigDict) -> None:
    scores, side = config.eval, config.data.image_size
    if not scores.num_samples:
        return
    if config.model.space == "pixels":
        lacking = not scores.inception and not 8 <= side <= 64 and f"config.eval.inception for images of {side} pixels"
    else:
        found = config.data.vae and scores.inception and scores.reference
        lacking = not found and "config.data.vae, eval.inception and eval.reference to score latents"
    if lacking:
        raise UserError(f"--canonical: the run lacks {lacking}; add --num_samples=0 for losses only.")


def _choose(config, workdir, num_images, timesteps, batch_size) -> Pairs:
    split = config.data.eval_split
    t0, t1 = diffusion.build(config.diffusion).prediction.time_range(sampling=True)
    times = np.linspace(t0, t1, NUM_TIMES) if timesteps is None else np.asarray(timesteps, np.float64)
    if len(np.unique(times)) < 2 or not ((t0 <= times) & (times <= t1)).all():
        raise UserError(
            f"--timesteps = {','.join(f'{t:g}' for t in times)} must be at least two times in [{t0:g}, {t1:g}]."
        )
    available = len(open_source(config.data, split))
    if num_images > available:
        say(f'{workdir}: split "{split}" has {available} images, fewer than --num_images={num_images}')
    return Pairs(split, min(num_images, available), batch_size or micro_batch(config), times)


def _measure_run(config: ConfigDict, workdir: str, mesh: Mesh, chosen: Pairs, canonical: bool, ablations: bool) -> dict:
    """All numbers of a run, arrays with the times leading; the entries are those of `make_measure` and more."""
    model = models.build(config.model)
    with sharding.use(mesh):
        params, step = restore(config, workdir, mesh, None)
        say(f"{workdir}: step {step}, {chosen.num_images} images at {len(chosen.times)} times")
        sums, probes = _stream(config, model, mesh, params, chosen)
        result = {
            "workdir": workdir,
            "step": step,
            "model": config.model.to_dict(),
            "split": chosen.split,
            "num_images": chosen.num_images,
            "timesteps": chosen.times,
            **averages(sums),
            "probe_r2": [probe.r2() for probe in probes[1:]],
            "probe_r2_x_t": probes[0].r2(),
        }
        result |= {"is_source": source_mask(model.depth, model.layout), "summary": summary(result)}
        if model.layout is not None:
            result["relative_entropy"] = relative_entropy(result["entropy"], result["is_source"])
            if canonical:
                result["canonical"] = compare_canonical(config, model, mesh, params, chosen, result["weights"], workdir)
            if ablations:
                result["ablations"] = ablate(config, model, mesh, params, chosen, result["is_source"])
    return result


def _stream(config: ConfigDict, model: SiT, mesh: Mesh, params: dict, chosen: Pairs) -> tuple[dict, list[LinearProbe]]:
    """Sums of `measure`, float64 with the times leading, and the probes of x_t and of every reader."""
    everywhere = NamedSharding(mesh, PartitionSpec())  # so that every process has the numbers
    measure = jax.jit(make_measure(config, model), out_shardings=everywhere)
    probes = [LinearProbe() for _ in range(2 * model.depth + 2)]
    rows_t = np.repeat(chosen.times, chosen.batch_size)
    times = np.float32(rows_t).reshape(-1, chosen.batch_size)
    sums, done = None, 0
    for batch in batches(config, chosen, mesh):
        measured = jax.device_get([measure(params, batch, t) for t in times])
        found, features = jax.tree.map(lambda *by_time: np.stack(by_time), *measured)
        found = jax.tree.map(np.float64, found)
        sums = found if sums is None else jax.tree.map(np.add, sums, found)

        counts = features["weight"].ravel() > 0
        held_out = features["index"].ravel() % HELD_OUT == 0
        readers = [features["x_t"], *np.moveaxis(features["states"], 1, 0)]  # each [times, B, F]
        for probe, x in zip(probes, readers, strict=True):
            probe.update(x.reshape(len(rows_t), -1)[counts], rows_t[counts], held_out[counts])
        before, done = done, min(done + chosen.batch_size, chosen.num_images)
        if 10 * done // chosen.num_images > 10 * before // chosen.num_images:
            say(f"{done} of {chosen.num_images} images")
    return sums, probes


def _plain(tree):
    """Arrays to nested lists, scalars to Python's."""
    if isinstance(tree, dict):
        return {name: _plain(x) for name, x in tree.items()}
    if isinstance(tree, list | tuple | np.ndarray):
        return [_plain(x) for x in tree]
    return tree.item() if isinstance(tree, np.generic) else tree
