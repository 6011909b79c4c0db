"""How a door starts jax: the other processes of its job, and the cache of compiled programs."""

import os
import pathlib

from absl import flags

from dar_jax.errors import UserError

DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "One run of many processes: auto if a TPU pod, Slurm, MPI or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
    "JAX_PROCESS_ID say so; on makes it an error if none does; off runs alone",
)
CACHE = pathlib.Path("~/.cache/dar_jax/xla")


def start() -> int:
    """Joins the other processes of the job by --distributed, and returns how many there are.

    Compiled programs are kept for later runs in ~/.cache/dar_jax/xla, or in JAX_COMPILATION_CACHE_DIR (empty: nowhere).
    To be called before anything else of jax. Raises UserError if --distributed=on finds no job, or the environment of
    the job makes no sense.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(CACHE.expanduser()))
    if DISTRIBUTED.value != "off":
        _join_job()
    return jax.process_count()


def _join_job() -> None:
    import jax

    by_hand = {}
    for name in ("num_processes", "process_id"):
        text = os.environ.get(f"JAX_{name.upper()}")
        if text is not None and not text.isdecimal():
            raise UserError(f'JAX_{name.upper()} = "{text}" in the environment is no number.')
        by_hand |= {} if text is None else {name: int(text)}
    if by_hand and (len(by_hand) < 2 or "JAX_COORDINATOR_ADDRESS" not in os.environ):
        raise UserError("set all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or none.")
    try:
        jax.distributed.initialize(**by_hand)
    except ValueError as error:
        if "JAX_COORDINATOR_ADDRESS" in os.environ or DISTRIBUTED.value == "on":
            raise UserError(
                f"--distributed={DISTRIBUTED.value}: no job of several processes was found ({error}) Start it with "
                "launch/tpu_pod.sh or launch/slurm.sh, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID."
            ) from error
