"""launch/slurm.sh against an sbatch that runs the job at once and an srun that runs one of its processes."""

import os
import socket
import subprocess
import sys

import pytest

TRAIN = ["--", "--config=configs/sit_xl_dar.py", "--workdir=/scratch/xl"]
AWKWARD = ["--config.a=two words", '--config.b=it\'s "$HOME" `x` $(x) \\ * ; & # é', "--config.c=", "--config.d=a\nb"]


def test_job_is_submitted_and_starts_one_process_per_gpu(world):
    result = world.run("slurm.sh", "--nodes=2", "--gpus_per_node=4", "--sbatch=--partition=gpu --time=1:00:00", *TRAIN)
    assert result.returncode == 0, result.stderr
    (job,) = world.calls("sbatch")
    shape = {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"}
    assert shape <= set(job["args"])
    assert {"--exclusive", "--requeue", "--signal=TERM@120", "--partition=gpu", "--time=1:00:00"} <= set(job["args"])
    (step,) = world.calls("srun")
    assert shape <= set(step["args"]) and "--gpu-bind=none" in step["args"]
    assert step["cwd"] == str(world.checkout)
    assert "JAX_LOCAL_DEVICE_IDS" not in step["env"]
    assert not world.calls("scontrol")
    assert (world.folder / "job.log").read_text() == "training: 0\n"


def test_one_process_per_host_drives_all_its_gpus(world):
    world.run("slurm.sh", "--per=host", "--gpus_per_node=4", *TRAIN)
    (step,) = world.calls("srun")
    assert "--ntasks-per-node=1" in step["args"] and "--gpus-per-node=4" in step["args"]
    assert step["env"]["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"


@pytest.mark.parametrize("per, devices", [("gpu", "2"), ("host", "0,1,2,3")])
def test_jax_makes_of_it_what_the_script_means(world, per, devices):
    """JAX itself, told to start in the environment of local process 2, says which GPUs it would use."""
    world.run("slurm.sh", f"--per={per}", "--gpus_per_node=4", *TRAIN)
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "localhost", "NTASKS": "1", "PROCID": "0", "LOCALID": "2"}
    with socket.create_server(("localhost", 0)) as free:
        port = {"JAX_COORDINATOR_PORT": str(free.getsockname()[1])}
    env = os.environ | world.calls("srun")[0]["env"] | {f"SLURM_{key}": value for key, value in slurm.items()} | port
    code = "import jax; jax.distributed.initialize(); print(jax.config.values['jax_cuda_visible_devices'])"
    result = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=60)
    assert result.stdout.strip() == devices, result.stderr


def test_arguments_arrive_unchanged(world):
    assert world.run("slurm.sh", *TRAIN, *AWKWARD).returncode == 0
    (call,) = world.trained()
    assert call["args"] == ["-m", "dar_jax.main", "--distributed=on", *TRAIN[1:], *AWKWARD]


def test_relative_directories_are_those_of_the_caller(world):
    result = world.run("slurm.sh", "--venv=checkout/.venv", "--logs=mine", *TRAIN)  # from the folder above the checkout
    assert result.returncode == 0, result.stderr
    assert f"--output={world.folder}/mine/%x-%j.log" in world.calls("sbatch")[0]["args"]
    assert f"{world.folder}/checkout/.venv/bin/python" in world.calls("srun")[0]["args"]


def test_inside_an_allocation_it_runs_at_once(world):
    result = world.run("slurm.sh", *TRAIN, SLURM_JOB_ID="9", XLA_FLAGS="--mine=1")
    assert result.returncode == 0 and result.stdout == "training: 0\n"
    assert not world.calls("sbatch") and not world.calls("scontrol")
    flags = world.calls("srun")[0]["env"]["XLA_FLAGS"].split()
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags and flags[-1] == "--mine=1"


def test_job_stopped_by_a_signal_goes_back_into_the_queue(world):
    world.set(runs="signal\n0")
    (world.folder / "job.log").write_text("of the run before\n")
    assert world.run("slurm.sh", *TRAIN).returncode == 0
    assert [call["args"] for call in world.calls("scontrol")] == [["requeue", "7"]]
    log = (world.folder / "job.log").read_text()
    assert log.startswith("of the run before\n") and "stopped by a signal" in log


def test_failed_run_fails_the_job_and_is_not_queued_again(world):
    world.set(runs="3")
    assert world.run("slurm.sh", *TRAIN).returncode == 3
    assert not world.calls("scontrol")


def test_dry_run_prints_commands_and_calls_nothing(world):
    submit = world.run("slurm.sh", "--dry_run", *TRAIN, *AWKWARD)
    start = world.run("slurm.sh", "--dry_run", *TRAIN, *AWKWARD, SLURM_JOB_ID="9")
    assert submit.returncode == start.returncode == 0 and not (world.folder / "calls").read_text()
    assert submit.stdout.startswith("sbatch ") and not (world.checkout / "runs").exists()
    subprocess.run(["bash", "-c", start.stdout], env=world.env, check=True)  # what is printed is a command
    assert world.trained()[0]["args"][-4:] == AWKWARD


@pytest.mark.parametrize(
    "words, names",
    [
        (["--node=2", *TRAIN], ["--node is unknown"]),
        (["--nodes", *TRAIN], ["--nodes has no value"]),
        (["--nodes=two", *TRAIN], ["--nodes=two"]),
        (["--gpus_per_node=0", *TRAIN], ["--gpus_per_node=0"]),
        (["--per=node", *TRAIN], ["--per=node", "--per=gpu"]),
        (["--venv=/nowhere", *TRAIN], ["--venv=/nowhere"]),
        (["run", *TRAIN], ['"run"']),
        ([], ["--config"]),
        (["--", "--config=c.py"], ["--workdir"]),
        (["--", "--config=c.py", "--workdir=s3://b/x"], ["s3://b/x"]),
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_mistakes_are_one_line_before_anything_is_called(world, words, names):
    world.refuse("slurm.sh", words, names)
