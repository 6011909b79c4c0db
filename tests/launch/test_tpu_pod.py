"""launch/tpu_pod.sh against a gcloud that records its calls and runs what it is asked to run on "hosts" here."""

import pathlib
import re
import shlex
import subprocess
import time

import pytest

from tests.launch.conftest import World

NAME = ["--name=pod", "--zone=us-west4-a"]
TPU = [*NAME, "--type=v5litepod-16"]
TRAIN = ["run", "--", "--config=configs/sit_xl_dar.py", "--workdir=gs://mine/xl"]
AWKWARD = ["--config.a=two words", '--config.b=it\'s "$HOME" `x` $(x) \\ * ; & # é', "--config.c=", "--config.d=a\nb"]


def verbs(world):
    """What gcloud was told to do, without the questions: [["tpu-vm", "create"], ...]."""
    calls = [call["args"][2:4] for call in world.calls("gcloud")]
    return [call for call in calls if call[1] not in ("describe", "ssh", "scp")]


def words_of(world, verb):
    """The arguments of the only call with this verb, its flags sorted."""
    (words,) = [call["args"] for call in world.calls("gcloud") if verb in call["args"]]
    return words[:5], sorted(words[5:])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A first run on a TPU that does not exist yet, and what it printed."""
    world = World(tmp_path_factory.mktemp("first"))
    (world.checkout / ".gitignore").write_text("changed")
    (world.checkout / "untracked").write_text("")
    world.set(hosts="2")
    return world, world.run("tpu_pod.sh", *TPU, "--project=p", *TRAIN, *AWKWARD, LIBTPU_INIT_ARGS="--mine=1 --its=2")


def test_missing_tpu_is_created_and_the_run_starts_on_all_hosts(first):
    world, result = first
    assert result.returncode == 0, result.stderr
    command, flags = words_of(world, "create")
    assert command == ["compute", "tpus", "tpu-vm", "create", "pod"]
    kind, version = "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"
    assert flags == [kind, "--project=p", version, "--zone=us-west4-a"]
    assert {call["env"]["HOME"][-5:] for call in world.trained()} == {"host0", "host1"}
    assert "training: 0" in result.stdout and "the run has finished" in result.stdout
    assert verbs(world) == [["tpu-vm", "create"]]


def test_arguments_arrive_unchanged(first):
    for call in first[0].trained():
        assert call["args"] == ["-m", "dar_jax.main", "--distributed=on", *TRAIN[2:], *AWKWARD]
        assert call["cwd"].endswith("/dar_jax")  # where configs/ is


def test_flags_of_the_compiler_are_set_and_those_of_the_user_come_last(first):
    for call in first[0].trained():
        flags = call["env"]["LIBTPU_INIT_ARGS"].split()
        assert any(flag.startswith("--xla_") for flag in flags) and flags[-2:] == ["--mine=1", "--its=2"]


def test_uncommitted_changes_are_copied_and_untracked_files_are_not(first):
    world, result = first
    assert "copying uncommitted changes on commit" in result.stdout
    for host in ("host0", "host1"):
        assert (world.folder / host / "dar_jax" / ".gitignore").read_text() == "changed"
        assert not (world.folder / host / "dar_jax" / "untracked").exists()


def test_package_is_installed_on_every_host(first):
    installs = [call for call in first[0].calls("python") if "install" in call["args"]]
    assert [call["args"] for call in installs] == [["-m", "pip", "install", "--quiet", "-e", ".[tpu,gcs]"]] * 2
    assert all(call["cwd"].endswith("/dar_jax") for call in installs)


@pytest.mark.parametrize("kind", ["v4-128", "v5p-64", "v6e-16"])
def test_software_version_follows_the_type(world, kind):
    """Google's table, https://cloud.google.com/tpu/docs/runtimes (2026-11)."""
    versions = {"v4-128": "tpu-ubuntu2204-base", "v5p-64": "v2-alpha-tpuv5", "v6e-16": "v2-alpha-tpuv6e"}
    result = world.run("tpu_pod.sh", *NAME, f"--type={kind}", "--dry_run", *TRAIN)
    assert f"--version={versions[kind]} " in result.stdout
    result = world.run("tpu_pod.sh", *NAME, f"--type={kind}", "--dry_run", "--version=v9", *TRAIN)
    assert "--version=v9 " in result.stdout


def test_tpu_that_is_there_is_used_and_a_share_mounted(world):
    world.set(state="READY")
    (world.folder / "host0").mkdir()
    result = world.run(
        "tpu_pod.sh", *NAME, "--type=v4-16", "--nfs=10.0.0.2:/share", *TRAIN[:-1], "--workdir=/mnt/shared/x"
    )
    assert result.returncode == 0, result.stderr
    assert verbs(world) == [] and len(world.trained()) == 1
    mounts = [call["args"] for call in world.calls("sudo") if call["args"][0] == "mount"]
    assert mounts == [["mount", "-t", "nfs", "10.0.0.2:/share", "/mnt/shared"]]


def test_queued_resource_is_waited_for(world):
    result = world.run("tpu_pod.sh", *TPU, "--queued", "--spot", *TRAIN)
    assert result.returncode == 0, result.stderr
    command, flags = words_of(world, "create")
    assert command == ["compute", "tpus", "queued-resources", "create", "pod"]
    kind, version = "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"
    assert flags == [kind, "--node-id=pod", version, "--spot", "--zone=us-west4-a"]
    assert "pod is WAITING_FOR_RESOURCES: waiting" in result.stdout and "pod is PROVISIONING: waiting" in result.stdout
    assert len(world.trained()) == 1


@pytest.mark.parametrize("queued", [[], ["--queued"]], ids=["tpu-vm", "queued-resources"])
def test_preempted_tpu_is_made_again_and_the_same_command_starts(world, queued):
    world.set(runs="preempt\n0")
    result = world.run("tpu_pod.sh", *TPU, *queued, *TRAIN)
    assert result.returncode == 0, result.stderr
    kind = "queued-resources" if queued else "tpu-vm"
    assert verbs(world) == [[kind, "create"], [kind, "delete"], [kind, "create"]]
    before, after = world.trained()
    assert before == after


def test_preempted_before_the_start_is_made_again(world):
    world.set(state="PREEMPTED")
    assert world.run("tpu_pod.sh", *TPU, *TRAIN).returncode == 0
    assert verbs(world) == [["tpu-vm", "delete"], ["tpu-vm", "create"]]


def test_run_stopped_by_a_signal_nobody_asked_for_starts_again(world):
    world.set(runs="signal\n0")
    result = world.run("tpu_pod.sh", *TPU, *TRAIN)
    assert result.returncode == 0 and "interrupted" in result.stdout
    assert len(world.trained()) == 2
    assert verbs(world) == [["tpu-vm", "create"]]


def test_failed_run_is_an_error_and_does_not_start_again(world):
    world.set(runs="3")
    result = world.run("tpu_pod.sh", *TPU, *TRAIN)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: the run has failed with exit code 3")
    assert len(world.trained()) == 1


def test_running_run_is_followed_and_stops_when_asked(world):
    """One command starts it, another follows, a third stops it: SIGTERM reaches the process, which saves."""
    world.set(runs="wait")
    command = world.command("tpu_pod.sh", *TPU, *TRAIN)
    followers = []
    for _ in range(2):
        process = subprocess.Popen(command, env=world.env, stdout=subprocess.PIPE, text=True)
        while "training: wait" not in process.stdout.readline():
            assert process.poll() is None
        followers.append(process)
    assert "running" in world.run("tpu_pod.sh", *NAME, "status").stdout
    assert world.run("tpu_pod.sh", *NAME, "stop").returncode == 0
    for process in followers:
        output = process.communicate(timeout=30)[0]
        assert process.returncode == 0
        assert "stopped by a signal at step 3, saved" in output and "the run has stopped" in output
    assert len(world.trained()) == 1
    assert "stopped" in world.run("tpu_pod.sh", *NAME, "status").stdout


@pytest.mark.parametrize(
    "queued, words",
    [
        ([], ["tpu-vm", "delete", "pod", "--quiet"]),
        (["--queued"], ["queued-resources", "delete", "pod", "--force", "--quiet"]),
    ],
)
def test_delete(world, queued, words):
    assert world.run("tpu_pod.sh", *NAME, *queued, "delete").returncode == 0
    assert [call["args"] for call in world.calls("gcloud")] == [["compute", "tpus", *words, "--zone=us-west4-a"]]


@pytest.mark.parametrize("command", [TRAIN, ["status"], ["log"], ["stop"], ["delete"]], ids=lambda words: words[0])
def test_dry_run_prints_commands_and_calls_nothing(world, command):
    result = world.run("tpu_pod.sh", *TPU, "--queued", "--dry_run", *command)
    assert result.returncode == 0 and not (world.folder / "calls").read_text()
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert lines and all(line[0] in ("gcloud", "git") for line in lines)


def test_dry_run_prints_what_a_run_does(first):
    """The commands of a dry run, but for its temporary file, are those that a real run gives to gcloud."""
    world, _ = first
    command = world.command("tpu_pod.sh", *TPU, "--project=p", "--dry_run", *TRAIN, *AWKWARD)
    env = world.env | {"LIBTPU_INIT_ARGS": "--mine=1 --its=2"}
    text = subprocess.run(command, env=env, text=True, capture_output=True, check=True).stdout
    printed = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("git "))
    script = f'gcloud() {{ printf "%s\\0" "$@"; printf "\\0"; }}\n{printed}'  # bash reads its own quoting
    read = subprocess.run(["bash", "-c", script], env=world.env, capture_output=True, text=True, check=True).stdout
    printed = [words.split("\0") for words in read.removesuffix("\0\0").split("\0\0")]
    called = [call["args"] for call in world.calls("gcloud")]
    called = [words for words in called if words[3] != "describe" and not any("outcome" in word for word in words)]
    assert [[re.sub(r"^/tmp\S*", "", word) for word in words] for words in printed] == [
        [re.sub(r"^/tmp\S*", "", word) for word in words] for words in called
    ]


@pytest.mark.parametrize(
    "words, names",
    [
        ([*TPU, "--zoen=x", *TRAIN], ["--zoen"]),
        (["--name", "--zone=z", "status"], ["--name has no value"]),
        (["--name=", "--zone=z", "status"], ["--name has no value"]),
        ([*NAME, "--spot=yes", "status"], ["--spot=yes", "write --spot"]),
        (["--zone=z", "status"], ["--name is required"]),
        ([*NAME, *TRAIN], ["--type is required"]),
        (NAME, ["run, status, log, stop, delete"]),
        ([*NAME, "begin"], ['"begin"']),
        ([*NAME, "stop", "delete"], ['"delete"', '"stop"']),
        ([*TPU, "run"], ["--config"]),
        ([*TPU, "run", "--", "--config=c.py"], ["--workdir"]),
        ([*TPU, "run", "--", "--config=c.py", "--workdir=s3://b/x"], ["s3://b/x", "gs://BUCKET/NAME"]),
        ([*TPU, "run", "--", "--config=c.py", "--workdir=runs/x"], ["--workdir=runs/x", "gs://BUCKET/NAME"]),
        ([*TPU, "run", "--", "--config=c.py", "--workdir=/mnt/shared/x"], ["--workdir=/mnt/shared/x", "--nfs"]),
        ([*TPU, *TRAIN, "--distributed=off"], ["--distributed=off"]),
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_mistakes_are_one_line_before_anything_is_called(world, words, names):
    world.refuse("tpu_pod.sh", words, names)


@pytest.mark.parametrize("state, names", [("DENIED", "PERMISSION_DENIED"), ("FAILED", "FAILED")])
def test_state_that_nothing_follows_from_is_an_error(world, state, names):
    world.set(state=state)
    result = world.run("tpu_pod.sh", *TPU, *TRAIN)
    assert result.returncode == 2 and names in result.stderr.splitlines()[-1] and verbs(world) == []


def test_no_capacity_is_an_error_that_names_the_queue(world):
    world.set(no_capacity="")
    result = world.run("tpu_pod.sh", *TPU, *TRAIN)
    assert result.returncode == 2 and "--queued" in result.stderr


def test_start_ends_what_is_left_of_a_broken_run(world):
    """The host whose run is still there when another host's has died: it holds the chips."""
    world.set(runs="wait\n0")
    home = world.folder / "host0"
    (home / "dar_jax_venv" / "bin").mkdir(parents=True)
    (home / "dar_jax_venv" / "bin" / "python").symlink_to(world.folder / "bin" / "python")
    (home / "dar_jax").symlink_to(world.checkout)

    def worker(*words):
        command = ["bash", "dar_jax/launch/tpu_worker.sh", *words]
        return subprocess.run(
            command, cwd=home, env=world.env | {"HOME": str(home)}, text=True, capture_output=True
        ).stdout

    assert worker("outcome") == "none\n"
    worker("start")
    first = (home / "dar_jax_run" / "pid").read_text()
    while not (home / "dar_jax_run" / "log").read_text():
        time.sleep(0.05)
    assert worker("outcome") == "running\n"
    worker("start")
    assert worker("follow").endswith("training: 0\n") and worker("outcome") == "finished\n"
    # Fields of /proc/PID/stat after the name: state, parent, process group. Z is a process that has ended.
    stats = [path.read_text().rsplit(")", 1)[1].split() for path in pathlib.Path("/proc").glob("[0-9]*/stat")]
    assert not [stat for stat in stats if stat[2] == first.strip() and stat[0] != "Z"]
