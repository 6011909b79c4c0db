"""Stands in for gcloud, sbatch, srun and what they reach: one file under many names, all of them on PATH.

Every call is one line of JSON in $FAKE/calls: the name it was called by, its arguments and some of its environment.
What the outside world does is in more files: `hosts`, how many the TPU has; `state`, what gcloud says of it (one line
for each time it is asked; the last one stays); `runs`, what becomes of python -m dar_jax.main on the first host (one
line each): an exit code, "signal" (it is stopped by one), "wait" (until it is), "preempt" (the TPU is taken away).
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

FAKE = pathlib.Path(os.environ["FAKE"])


def write(path, text):
    """At once: others may read meanwhile."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def next_line(path, keep_last=False):
    lines = path.read_text().splitlines()
    write(path, "\n".join(lines[1:] if len(lines) > 1 or not keep_last else lines))
    return lines[0]


def value(args, name):
    return next((word.split("=", 1)[1] for word in args if word.startswith(f"--{name}=")), None)


def gcloud(args):
    kind, verb = args[2:4]
    state = FAKE / "state"
    if verb == "describe":
        now = next_line(state, keep_last=True)
        if now in ("MISSING", "DENIED"):
            print("NOT_FOUND: no such resource" if now == "MISSING" else "PERMISSION_DENIED: ask", file=sys.stderr)
            return 1
        print(now)
    elif verb == "create":
        if (FAKE / "no_capacity").exists():
            return 1
        for worker in range(int((FAKE / "hosts").read_text())):
            shutil.rmtree(FAKE / f"host{worker}", ignore_errors=True)
            (FAKE / f"host{worker}").mkdir()
        write(state, "READY" if kind == "tpu-vm" else "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE")
    elif verb == "delete":
        write(state, "MISSING")
    elif state.read_text() not in ("READY", "ACTIVE"):
        return 255  # nobody answers
    else:
        hosts = sorted(FAKE.glob("host[0-9]"))[: None if value(args, "worker") == "all" else 1]
        return max(on_host(verb, args, host) for host in hosts)


def on_host(verb, args, home):
    if verb == "scp":
        shutil.copy(args[4], home)
        return 0
    env = {"PATH": os.environ["PATH"], "FAKE": str(FAKE), "HOME": str(home)}  # ssh takes nothing else along
    return subprocess.run(["bash", "-c", value(args, "command")], env=env, cwd=home).returncode


def uv(args):
    """`uv venv ... DIR`: an environment whose python is this file."""
    python = pathlib.Path(args[-1], "bin", "python")
    python.parent.mkdir(parents=True)
    python.symlink_to(FAKE / "bin" / "python")


def sbatch(args):
    """The job starts at once, from the script on stdin, with its output in a file as SLURM has it."""
    with (FAKE / "job.log").open("a") as log:
        script = sys.stdin.read()
        return subprocess.run(
            ["bash", "-c", script], env={**os.environ, "SLURM_JOB_ID": "7"}, stdout=log, stderr=log
        ).returncode


def srun(args):
    command = next(i for i, word in enumerate(args) if not word.startswith("--"))
    return subprocess.run(args[command:]).returncode


def python(args):
    if args[:2] != ["-m", "dar_jax.main"]:
        return 0
    what = next_line(FAKE / "runs") if os.environ.get("HOME", "").endswith(("host0", "user")) else "0"
    print(f"training: {what}", flush=True)
    if what == "preempt":
        queued = any("queued-resources" in line for line in (FAKE / "calls").read_text().splitlines())
        write(FAKE / "state", "SUSPENDED" if queued else "PREEMPTED")
    if what == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("stopped by a signal at step 3, saved", flush=True)))
        time.sleep(60)
    if what == "signal":
        print("stopped by a signal at step 3, saved", flush=True)
    return int(what) if what.isdigit() else 0


def main():
    name, args = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
    kept = {
        key: os.environ[key]
        for key in ("HOME", "LIBTPU_INIT_ARGS", "XLA_FLAGS", "JAX_LOCAL_DEVICE_IDS")
        if key in os.environ
    }
    with (FAKE / "calls").open("a") as calls:
        calls.write(json.dumps({"name": name, "args": args, "env": kept, "cwd": os.getcwd()}) + "\n")
    if name == "mountpoint":
        return 1  # nothing is mounted yet
    act = {"gcloud": gcloud, "uv": uv, "sbatch": sbatch, "srun": srun, "python": python}.get(name)
    return act(args) if act else 0


if __name__ == "__main__":
    sys.exit(main())
