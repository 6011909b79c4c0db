"""Runs under random faults: whatever happens, nothing is lost, silently wrong, or hangs.

    python benchmarks/soak.py --rounds=500 --results=soak.jsonl         # appends a line for each fault
    python benchmarks/soak.py --rounds=0 --results=soak.jsonl --summary=docs/soak.json     # adds them up

Round i of a seed breaks something in one way, repeats the command until it is done, and compares with runs that nothing
disturbed: losses, gradient norms and scores of all steps, arrays of the last checkpoint, sample grids, best.json. They
must be equal bit for bit. Or the command must end with exit code 2 and one line that names what is wrong.

Rounds that the file of results has are left out, so that several sittings add up. The exit code is 1 if anything was
lost, wrong, unclear or hanging. The processes are forked from one that has imported the libraries, which saves most of
their start, except for one in ten, which starts afresh. Run this from the root of a clone, with the extra `test`.
"""

import argparse
import atexit
import collections
import contextlib
import filecmp
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
os.environ.update(JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", OPENBLAS_NUM_THREADS="1")
os.environ.update(XLA_FLAGS="--xla_backend_optimization_level=0", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
os.environ["PYTHONPATH"] = str(ROOT)
sys.path.insert(0, str(ROOT))
CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = ("dar_jax.training.loop", "dar_jax.validate", "dar_jax.evaluation.scoring", "dar_jax.data.prepare")
IMPORTED += ("dar_jax.pretrained.vae", "clu.metric_writers", "clu.parameter_overview", "ml_collections.config_flags")
IMPORTED += ("tests.training.tiny", "grain", "jax.experimental.multihost_utils")

CONFIG = """
from tests.training import tiny

def get_config():
    config = tiny.make_config()
    config.train.num_steps, config.checkpoint.every_steps = 40, 5
    config.eval.update(every_steps=20, num_samples=16, final_samples=24, grid_size=2)
    return config
"""
LATENT_CONFIG = """
from tests.integration.test_latent_run import latent_config

def get_config():
    config = latent_config(**{"data.path": "DATA", "data.vae": "VAE", "data.flip": True})
    config.train.num_steps, config.checkpoint.every_steps = 20, 5
    config.eval.update(every_steps=10, num_samples=0, grid_size=2)
    return config
"""
SPEED = ("steps_per_second", "images_per_second", "model_tflops_per_second")  # of which no two runs have the same
SILENCE = 60  # seconds without a line after which a process hangs
MARK = "soak: "  # of lines that a forked process sends back
BAD = ("lost", "wrong", "unclear", "hung")
NUMBERS = ("nan", "inf", "-inf", "1e400", "-1", "0", "-0.5", "1e-400", str(2**31), str(2**32), str(2**63), str(10**30))
SIGNED = ("config.mesh.", "config.sampler.cfg_scale", "config.diffusion.time_mean")  # may be -1


class Fault(NamedTuple):
    """A fault and what came of it: "recovered", "refused" in one line, or one of `BAD`."""

    what: str
    verdict: str
    detail: str = ""


# Processes


def _forked(output, function: Callable, args: tuple) -> None:
    """What a forked process does: `function`, with its output in a pipe."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        function(*args)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # as the interpreter does; multiprocessing leaves without


def _door(module: str, flags: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.argv = [module, *flags]
    runpy.run_module(f"dar_jax.{module}", run_name="__main__")


class Process:
    """A process whose output is collected."""

    def __init__(self, function: Callable, *args: Any):
        self._start(lambda output: CONTEXT.Process(target=_forked, args=(output, function, args)))
        self.poll = lambda: self.process.exitcode

    def _start(self, make: Callable) -> None:
        reader, writer = CONTEXT.Pipe(duplex=False)
        self.text, self.heard, self.process = "", time.monotonic(), make(writer)
        if isinstance(self.process, CONTEXT.Process):
            self.process.start()
        writer.close()
        self.reading = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self.reading.start()

    def _read(self, reader) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(reader.fileno(), 1 << 16):
                self.text += data.decode(errors="replace")
                self.heard = time.monotonic()

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill(self) -> bool:
        """SIGKILL; whether that was what ended it."""
        self.send(signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def wait(self, limit: float = 600) -> int | None:
        """The exit code; None if it says nothing for a minute, or runs for longer than `limit`, and is killed."""
        start = time.monotonic()
        while (code := self.poll()) is None:
            now = time.monotonic()
            if now - self.heard > SILENCE or now - start > limit:
                self.send(signal.SIGKILL)
                return None
            time.sleep(0.01)
        self.reading.join(5)
        return code

    def end(self, limit: float = 600) -> tuple[str, str]:
        """ "done", "refused", "unclear" or "hung", and its line of error or last words."""
        code = self.wait(limit)
        lines = self.text.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        tail = " | ".join(lines[-4:])[-600:]
        if code is None:
            return "hung", tail
        if "Traceback" in self.text or "Fatal Python" in self.text:
            return "unclear", tail
        if code == 0:
            return "done", tail
        return ("refused", errors[0]) if code == 2 and len(errors) == 1 else ("unclear", f"exit code {code}: {tail}")


class Door(Process):
    """One of the doors of dar_jax; `fresh` starts it as a user does."""

    def __init__(self, module: str, *flags: str, fresh: bool = False, **environment: str):
        if not fresh:
            super().__init__(_door, module, list(flags), environment)
            return
        command, environment = [sys.executable, "-m", f"dar_jax.{module}", *flags], {**os.environ, **environment}
        pipes = {"stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "env": environment, "cwd": ROOT}
        self._start(lambda output: subprocess.Popen(command, stdout=output.fileno(), **pipes))
        self.poll = self.process.poll


def ask(function: Callable, *args: Any) -> Any:
    """What `function` returns in a process of its own, as JSON."""
    process = Process(_answer, function, args)
    if process.wait() != 0:
        raise RuntimeError(f"{function.__name__}: {process.text}")
    return json.loads(process.text.rpartition(MARK)[2].partition("\n")[0])


def _answer(function: Callable, args: tuple) -> None:
    _send(function(*args))


def _send(answer: Any) -> None:
    """Writes a line to whom started this process, at once, because other threads print too."""
    os.write(1, f"\n{MARK}{json.dumps(answer)}\n".encode())


# What a run has come to


def observe(workdir: str) -> dict[str, Any]:
    """All that must be equal in two runs, by name. Reads by orbax and json, not by dar_jax."""
    folder, found = pathlib.Path(workdir), {}
    for line in (folder / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            line = json.loads(line)
            checksum = line.pop("crc32")
            if checksum != zlib.crc32(json.dumps(line, sort_keys=True).encode()):
                continue
        except (ValueError, KeyError, AttributeError):
            continue
        found |= {f"metrics {line['step']} {key}": value for key, value in line.items() if key not in SPEED}
    step = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    found["last checkpoint"] = [step, state_digest(folder / "checkpoints" / str(step))]
    found |= {f"grid {path.name}": digest(path) for path in (folder / "samples").glob("*.png")}
    best = folder / "best.json"
    return found | ({"best": json.loads(best.read_text())["step"]} if best.exists() else {})


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state_digest(path: pathlib.Path) -> str:
    import orbax.checkpoint.experimental.v1 as ocp

    return tree_digest(ocp.load_checkpointables(path))


def tree_digest(tree: Any) -> str:
    import jax
    import numpy as np

    leaves = [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in jax.tree.leaves_with_path(tree)]
    parts = [f"{path} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes() for path, leaf in leaves]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def compare(found: dict[str, Any], wanted: dict[str, Any], said: str = "") -> tuple[str, str]:
    """The verdict on what a run has come to. What is missing is no loss if the run has said that it was damaged."""
    if wrong := [key for key in wanted if key in found and found[key] != wanted[key]]:
        return "wrong", f"{len(wrong)} values: {wrong[0]} is {found[wrong[0]]}, not {wanted[wrong[0]]}"
    if missing := [key for key in wanted if key not in found]:
        told = "damaged" in said or "cannot be made up for" in said
        return "recovered" if told else "lost", f"{len(missing)} values: {missing[0]}"
    return "recovered", ""


# Damage


def damage(rng: random.Random, folder: pathlib.Path, only: str = "**/*") -> str:
    """Damages one file of a folder, of any of its kinds alike, and says how."""
    kinds = collections.defaultdict(list)
    for path in sorted(folder.glob(only)):
        if path.is_file():
            kinds[path.relative_to(folder).parts[0], path.suffix, "/ema/" in f"{path}", len(path.name) > 30].append(
                path
            )
    path = rng.choice(kinds[rng.choice(sorted(kinds))])
    how = rng.choice(["bit"] * 4 + ["bytes", "cut", "empty", "gone", "garbage", "directory"])
    content = bytearray(path.read_bytes())
    if how == "bit" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "bytes" and content:
        start = rng.randrange(len(content))
        content[start : start + 16] = rng.randbytes(len(content[start : start + 16]))
    elif how == "cut":
        content = content[: rng.randrange(len(content) + 1)]
    elif how == "garbage":
        content = rng.randbytes(rng.randrange(1, 1000))
    elif how == "empty":
        content = b""
    path.unlink()
    if how == "directory":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(content)
    return f"{how} {path.relative_to(folder)}"


def names(line: str, what: str, folder: pathlib.Path) -> bool:
    """Whether an error names what was damaged: the file, or the folder that it is in."""
    return any(part in line for part in (str(folder), *pathlib.Path(what.split(" ", 1)[1]).parts))


def read_run(workdir: str, latest: bool = True) -> dict[str, Callable[[], Any]]:
    """How the doors read a workdir."""
    from dar_jax import checkpoint, logs

    folder = pathlib.Path(workdir)

    def state():
        step = checkpoint.set_damaged_aside(workdir)
        return step, step and state_digest(folder / "checkpoints" / str(step))

    def best():
        return checkpoint.Checkpoints(workdir, 2)._best.record

    return {
        "config.json": lambda: checkpoint.load_config(workdir).to_json(),
        "metrics.jsonl": lambda: {f"{x['step']} {set(x) - set(SPEED)}": x for x in logs.read_metrics(workdir)},
        "best.json": best,
        "checkpoints": state,
    }


def read_data(path: str) -> dict[str, Callable[[], Any]]:
    """How training and `prepare` read prepared data."""
    from dar_jax.data import latents

    def records():
        source = latents.LatentSource(pathlib.Path(path))
        latents.check_checksums(source.path, source.manifest["shards"])
        content = [
            {k: str(v.tolist()) if hasattr(v, "tolist") else v for k, v in x.items()}
            for x in map(source.__getitem__, range(len(source)))
        ]
        return [source.scale, source.num_classes, str(source.dtype), content]

    return {"data": records}


def read_vae(path: str) -> dict[str, Callable[[], Any]]:
    """How training, `prepare` and `sample` read a VAE."""
    from dar_jax.pretrained import vae

    def weights():
        loaded = vae.load(path, "--vae")
        return [tree_digest(loaded.params), loaded.scale, loaded.fingerprint, str(loaded.model)]

    return {"vae": weights}


def read_damaged(read: Callable, original: str, place: str, seed: str, count: int) -> None:
    """Damages copies of a folder and reads each in this process, as the doors do. Prints a JSON line for each."""
    from dar_jax.errors import UserError

    rng, place = random.Random(seed), pathlib.Path(place)

    def copy() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(original, place)

    copy()
    wanted = {name: reader() for name, reader in read(str(place)).items()}
    steps = [path for path in pathlib.Path(original).glob("checkpoints/*") if path.name.isdigit()]
    states = [(int(path.name), state_digest(path)) for path in steps]
    for _ in range(count):
        copy()
        what = damage(rng, place)
        _send(["trying", what, ""])
        verdict, detail = "recovered", ""
        for name, reader in read(str(place)).items():
            try:
                found = reader()
            except UserError as error:
                verdict, detail = "refused", str(error)
                if "\n" in detail or not names(detail, what, place):
                    verdict = "unclear"
            except Exception as error:
                verdict, detail = "unclear", f"{name}: {type(error).__name__}: {error}"
            else:
                if name == "metrics.jsonl":
                    wrong = any(wanted[name].get(key) != value for key, value in found.items())
                elif name == "checkpoints":
                    wrong = found not in states
                else:
                    wrong = found is not None and found != wanted[name]
                if wrong:
                    verdict, detail = "wrong", f"{name} reads {str(found)[:300]}"
            if verdict in BAD:
                break
        _send([what, verdict, detail])


# The soak


class Soak:
    """What nothing has disturbed, made once in `directory`, and the faults."""

    def __init__(self, directory: pathlib.Path):
        sources = b"".join(path.read_bytes() for path in sorted((ROOT / "dar_jax").rglob("*.py")))
        self.code = hashlib.sha256(sources).hexdigest()[:8]
        self.directory = directory.absolute() / self.code
        self.directory.mkdir(parents=True, exist_ok=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory.absolute() / "cache")
        CONTEXT.set_forkserver_preload(list(IMPORTED))
        self.data, self.vae, self.images = (self.directory / name for name in ("data", "vae", "images"))
        self.configs = {"pixels": self.directory / "config.py", "latents": self.directory / "latent_config.py"}
        self.configs["pixels"].write_text(CONFIG)
        latent = LATENT_CONFIG.replace("DATA", str(self.data)).replace("VAE", str(self.vae))
        self.configs["latents"].write_text(latent)
        if not (self.data / "train" / "manifest.json").exists():
            ask(_write_inputs, str(self.images), str(self.vae))
            self._must(self.prepare(self.data / "train"))

    def _must(self, door: Door) -> str:
        if (ending := door.end())[0] != "done":
            raise RuntimeError(f"without any fault: {ending}\n{door.text}")
        return door.text

    # Commands

    def train(self, workdir: pathlib.Path, kind: str = "pixels", *flags: str, **options) -> Door:
        return Door("main", f"--config={self.configs[kind]}", f"--workdir={workdir}", *flags, **options)

    def prepare(self, out: pathlib.Path, *flags: str, **options) -> Door:
        words = [f"--source=folder:{self.images}", "--image_size=8", f"--vae={self.vae}", "--shard_size=6"]
        return Door("prepare", *words, f"--out={out}", *flags, **options)

    def evaluate(self, workdir: pathlib.Path, out: pathlib.Path, **options) -> Door:
        words = ["--num_samples=3000", "--batch_size=250", f"--json={out}.json", f"--samples_out={out}.npz"]
        return Door("evaluate", f"--workdir={workdir}", *words, **options)

    def sample(self, workdir: pathlib.Path, out: pathlib.Path, *flags: str, **options) -> Door:
        words = ["--num_per_label=8", "--batch_size=16", f"--out={out}"]
        return Door("sample", f"--workdir={workdir}", *words, *flags, **options)

    # References

    @functools.cache  # noqa: B019
    def run(self, kind: str) -> pathlib.Path:
        """A run that nothing disturbed."""
        workdir = self.directory / f"run_{kind}"
        if not (workdir / "samples").exists():
            self._must(self.train(workdir, kind))
        return workdir

    @functools.cache  # noqa: B019
    def wanted(self, kind: str) -> dict[str, Any]:
        return ask(observe, str(self.run(kind)))

    @functools.cache  # noqa: B019
    def scores(self) -> tuple[Any, str]:
        """Of the door `evaluate`, and the checksum of its samples."""
        out = self.directory / "evaluated"
        self._must(self.evaluate(self.run("pixels"), out))
        return self.read_scores(out)

    def read_scores(self, out: pathlib.Path) -> tuple[Any, str]:
        import numpy as np

        with np.load(f"{out}.npz") as file:
            samples = hashlib.sha256(b"".join(file[name].tobytes() for name in sorted(file))).hexdigest()
        return [result["scores"] for result in json.loads(pathlib.Path(f"{out}.json").read_text())], samples

    @functools.cache  # noqa: B019
    def grid(self, kind: str) -> pathlib.Path:
        out = self.directory / f"grid_{kind}.png"
        self._must(self.sample(self.run(kind), out))
        return out

    def scratch(self, original: pathlib.Path | None = None) -> pathlib.Path:
        """An empty place, or a copy."""
        place = self.directory / "scratch" / (original.name if original else "run")
        for old in place.parent.glob("*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        place.parent.mkdir(exist_ok=True)
        return shutil.copytree(original, place) if original else place

    def finish(self, workdir: pathlib.Path, kind: str, damaged: tuple | None = None) -> tuple[str, str]:
        """Repeats the command of a run and compares what it has come to. An error must name what was damaged."""
        door = self.train(workdir, kind)
        ending, detail = door.end()
        if ending == "refused":
            if damaged is None:
                return "lost", detail
            return "refused" if names(detail, *damaged) else "unclear", detail
        return (
            compare(ask(observe, str(workdir)), self.wanted(kind), door.text) if ending == "done" else (ending, detail)
        )

    # Faults: each yields what it did and what came of it

    def kill_training(self, rng: random.Random) -> Iterator[Fault]:
        """Several signals to one run, each at a moment of its own; most are kill -9."""
        kind = rng.choice(["pixels", "pixels", "latents"])
        self.wanted(kind)
        workdir, faults, last = self.scratch(), [], 0
        workdir.mkdir()
        if kind == "pixels" and rng.random() < 0.8:  # else the first start trains it
            shutil.copy(self.run(kind) / "convnet.npz", workdir)
        for _ in range(8):
            door = self.train(workdir, kind, fresh=rng.random() < 0.1)
            moment = rng.choice(["start", "training", "save", "save", "evaluation"])
            _await(moment, door, workdir, rng)
            number = rng.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], [6, 1, 1])[0]
            door.send(number)
            code, saved = door.wait(), ask(saved_steps, str(workdir))
            name = f"{number.name} in {moment}"
            if code is None:
                yield Fault(name, "hung", door.text[-300:])
                return
            if code not in (0, -number) or "Traceback" in door.text:
                yield Fault(name, "unclear", f"exit code {code}: {door.text[-600:]}")
                return
            if max(saved, default=0) < last:
                yield Fault(name, "lost", f"the checkpoint of step {last}; {saved} are left")
                return
            if code == 0 and "stopped by a signal" not in door.text:
                break
            last = max(saved, default=0)
            faults.append(name)
        verdict, detail = self.finish(workdir, kind)
        yield from (Fault(name, verdict, detail) for name in faults)

    def kill_door(self, rng: random.Random) -> Iterator[Fault]:
        """kill -9 of `prepare`, `evaluate` or `sample`, several times."""
        module = rng.choice(["prepare", "evaluate", "sample"])
        if module == "prepare":
            place, duration = self.scratch(), 3.0
            start = functools.partial(self.prepare, place)
        else:
            place = self.scratch(self.run("pixels"))
            out = place.parent / ("scores" if module == "evaluate" else "grid.png")
            start, duration = functools.partial(getattr(self, module), place, out), 6.0
            self.scores() if module == "evaluate" else self.grid("pixels")
        faults = []
        for _ in range(4):
            door = start(fresh=rng.random() < 0.1)
            time.sleep(rng.uniform(0, duration))
            if not door.kill():
                break
            faults.append(f"SIGKILL of {module}")
        verdict, detail = start().end()
        if verdict == "done":
            verdict = "recovered"
            if module == "prepare":
                left = filecmp.dircmp(place, self.data / "train")
                different = filecmp.cmpfiles(place, self.data / "train", left.common_files, shallow=False)[1:]
                if left.right_only or any(different):
                    verdict, detail = "wrong", str((left.right_only, different))
            elif module == "evaluate" and self.read_scores(out) != self.scores():
                verdict, detail = "wrong", str((self.read_scores(out), self.scores()))
            elif module == "sample" and digest(out) != digest(self.grid("pixels")):
                verdict, detail = "wrong", "the grid differs"
        elif verdict == "refused":
            verdict = "lost"
        yield from (Fault(name, verdict, detail) for name in faults)

    def replace_weights(self, rng: random.Random) -> Iterator[Fault]:
        """A stopped `evaluate` goes on over other weights of the same step."""
        other = self.directory / "run_other"
        if not (other / "samples").exists():
            self._must(self.train(other, "pixels", "--config.optimizer.learning_rate=3e-3"))
        fresh = self.scratch(other)
        self._must(self.evaluate(fresh, fresh.parent / "others"))
        wanted = self.read_scores(fresh.parent / "others")
        place = self.scratch(self.run("pixels"))
        out = place.parent / "scores"
        door = self.evaluate(place, out)
        while door.poll() is None and not list(place.glob("evaluation/*/*.npz")):
            time.sleep(0.01)
        door.kill()
        shutil.rmtree(place / "checkpoints")
        shutil.copytree(other / "checkpoints", place / "checkpoints")
        verdict, detail = self.evaluate(place, out).end()
        if verdict == "done":
            found = self.read_scores(out)
            verdict, detail = ("recovered", "") if found == wanted else ("wrong", f"{found[0]}, not {wanted[0]}")
        yield Fault("weights replaced after a part of evaluate", verdict, detail)

    def damage_read(self, rng: random.Random) -> Iterator[Fault]:
        """Many damaged copies of a workdir, prepared data or a VAE, each read in one process as the doors do."""
        read, original = rng.choice(
            [(read_run, self.run("pixels")), (read_data, self.data / "train"), (read_vae, self.vae)]
        )
        place, count = self.scratch(), 20
        process = Process(read_damaged, read, str(original), str(place), str(rng.random()), count)
        process.wait()
        lines = [json.loads(line[len(MARK) :]) for line in process.text.splitlines() if line.startswith(MARK)]
        done = [Fault(f"{original.name}: {what}", *rest) for what, *rest in lines if what != "trying"]
        yield from done
        if len(done) < count:
            verdict = "hung" if process.poll() in (None, -signal.SIGKILL) else "unclear"
            yield Fault(f"{original.name}: {lines[-1][1] if lines else ''}", verdict, process.text[-600:])

    def damage_run(self, rng: random.Random) -> Iterator[Fault]:
        """One damaged file of a workdir, finished or killed, and then the door that trains, samples or evaluates."""
        kind = rng.choice(["pixels", "latents"])
        workdir = self.scratch(self.run(kind))
        if rng.random() < 0.5:
            workdir = self.scratch()
            door = self.train(workdir, kind)
            while door.poll() is None and len(list(workdir.glob("checkpoints/*/checksums.json"))) < 2:
                time.sleep(0.002)
            door.kill()
        what = damage(rng, workdir)
        door = rng.choice(["main", "main", "sample"]) if (workdir / "best.json").exists() else "main"
        if door == "main":
            verdict, detail = self.finish(workdir, kind, (what, workdir))
        else:
            out = workdir.parent / "grid.png"
            wanted, process = digest(self.grid(kind)), self.sample(workdir, out)
            verdict, detail = process.end()
            if verdict == "done":
                same, older = digest(out) == wanted, "is damaged" in process.text
                verdict, detail = ("recovered", "") if same or older else ("wrong", "the grid differs")
        yield Fault(f"{door}: {what}", verdict, detail)

    def damage_inputs(self, rng: random.Random) -> Iterator[Fault]:
        """A damaged file of prepared data, of its images or of a VAE, and then a door that reads it."""
        backup = self.directory / "backup"
        original = rng.choice([self.data, self.vae])
        shutil.rmtree(backup, ignore_errors=True)
        shutil.copytree(original, backup)
        self.wanted("latents"), self.grid("latents")
        try:
            what = damage(rng, original)
            if original == self.vae and rng.random() < 0.5:
                out = self.directory / "damaged.png"
                verdict, detail = self.sample(self.run("latents"), out).end()
                if verdict == "done":
                    same = digest(out) == digest(self.grid("latents"))
                    verdict, detail = ("recovered", "") if same else ("wrong", "the grid differs")
            elif original == self.data and rng.random() < 0.5:
                verdict, detail = Door("prepare", f"--out={self.data / 'train'}", "--verify").end()
                if verdict == "done":
                    whole = "/progress/" in f"/{what}"  # which a finished set no longer needs
                    verdict, detail = ("recovered", "") if whole else ("wrong", "--verify passes it")
            else:
                verdict, detail = self.finish(self.scratch(), "latents", (what, original))
        finally:
            shutil.rmtree(original)
            backup.rename(original)
        yield Fault(f"{original.name}: {what}", verdict, detail)

    def bad_number(self, rng: random.Random) -> Iterator[Fault]:
        """A random number in a random field of the config."""
        import ml_collections

        from dar_jax.config import default

        def fields(section, prefix):
            for key, value in section.items():
                if isinstance(value, ml_collections.ConfigDict):
                    yield from fields(value, f"{prefix}.{key}")
                elif isinstance(value, int | float) and not isinstance(value, bool):
                    yield f"{prefix}.{key}", type(value)

        kinds = dict(fields(default(), "config"))
        for _ in range(10):
            field, value = rng.choice(sorted(kinds)), rng.choice(NUMBERS)
            workdir = self.scratch()
            few = ("--config.train.num_steps=2", "--config.eval.num_samples=0")
            door = self.train(workdir, "pixels", *few, f"--{field}={value}")
            verdict, detail = door.end(180)
            if verdict == "done":
                number, largest = float(value), 2**32 if field == "config.seed" else 2**31
                senseless = not math.isfinite(number) or (number < 0 and not field.startswith(SIGNED))
                senseless |= kinds[field] is int and number >= largest
                verdict, detail = ("wrong", "accepted") if senseless else ("recovered", "")
            elif verdict == "refused" and field.split(".")[-1] not in detail and "is not finite" not in detail:
                verdict = "unclear"
            yield Fault(f"{field}={value}", verdict, detail)

    def full_disk(self, rng: random.Random) -> Iterator[Fault]:
        """No file may grow from a random moment on; then there is room again."""
        kind, faults = rng.choice(["pixels", "latents"]), []
        self.wanted(kind)
        workdir = self.scratch()
        for _ in range(3):
            door, moment, size = (
                self.train(workdir, kind),
                rng.choice(["start", "training", "save"]),
                rng.choice([0, 100, 8192]),
            )
            _await(moment, door, workdir, rng)
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(door.process.pid, resource.RLIMIT_FSIZE, (size, size))
            ending, detail = door.end()
            if ending == "done":
                break
            faults.append((f"no file beyond {size} bytes in {moment}", ending, detail))
        verdict, detail = self.finish(workdir, kind)
        for name, ending, words in faults:
            yield Fault(name, *((verdict, detail) if ending == "refused" else (ending, words)))

    def two_runs(self, rng: random.Random) -> Iterator[Fault]:
        """The same command a second time while the first runs."""
        kind = rng.choice(["pixels", "latents"])
        self.wanted(kind)
        workdir = self.scratch()
        first = self.train(workdir, kind)
        _await(rng.choice(["start", "training", "save"]), first, workdir, rng)
        second = self.train(workdir, kind)
        endings = [second.end(), first.end()]
        bad = [ending for ending in endings if ending[0] in BAD]
        verdict, detail = bad[0] if bad else self.finish(workdir, kind)
        refused = any(ending == "refused" for ending, _ in endings)
        alone = refused or "nothing to do" in second.text or "nothing to do" in first.text
        if verdict == "recovered" and not alone:
            verdict, detail = "wrong", "both ran"
        yield Fault("two runs on one workdir", verdict, detail)

    def hosts_disagree(self, rng: random.Random) -> Iterator[Fault]:
        """Two processes of one job that differ in something, or of which one is killed: both end within a minute."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        workdir = self.scratch()
        what = rng.choice(["workdir", "config", "steps", "number", "killed", "missing", "flags", "XLA_FLAGS"])
        flags, environments = [["--join_seconds=20"], ["--join_seconds=20"]], [{}, {}]
        workdirs, odd = [workdir, workdir], rng.randrange(2)
        if what == "workdir":
            workdirs[odd] = workdir.with_name("other")
        elif what == "config":
            number = rng.choice(["seed=1", "optimizer.learning_rate=2e-3", "model.depth=4", "mesh.fsdp=2"])
            flags[odd].append(f"--config.{number}")
        elif what == "steps":
            flags[odd].append("--config.train.num_steps=45")
        elif what == "flags":
            flags[odd].append("--profile=3")
        elif what == "XLA_FLAGS":
            environments[odd]["XLA_FLAGS"] = "--xla_backend_optimization_level=1"
        doors = []
        for index in range(2):
            count = "3" if what == "number" and index == odd else "2"
            job = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": count,
                "JAX_PROCESS_ID": str(index),
            }
            if not (what == "missing" and index == odd):
                doors.append(self.train(workdirs[index], "pixels", *flags[index], **job, **environments[index]))
        if what == "killed":
            _await(rng.choice(["start", "training", "save"]), doors[0], workdir, rng)
            doors[odd].kill()
            del doors[odd]
        since = time.monotonic()
        endings = [door.end(SILENCE) for door in doors]
        bad = [
            ending for ending in endings if ending[0] != "refused" and not (what == "killed" and ending[0] == "done")
        ]
        verdict, detail = ("refused", endings[0][1]) if not bad else bad[0]
        if verdict == "done":
            verdict = "wrong"
        yield Fault(f"hosts: {what}", verdict, f"{time.monotonic() - since:.0f} s: {detail}")


def _await(moment: str, door: Process, workdir: pathlib.Path, rng: random.Random) -> None:
    """Returns at a random time within a part of a run."""

    def saves() -> set[str]:
        try:
            return {name for name in os.listdir(workdir / "checkpoints") if name[0].isdigit()}
        except OSError:
            return set()

    before, skip = saves(), rng.randrange(4)
    signs = {
        "start": lambda: True,
        "training": lambda: door.text.count("\nstep ") > skip,
        "save": lambda: len(saves() - before) > skip % 2,
        "evaluation": lambda: "\nstep 20/" in door.text or "\nstep 40/" in door.text or "making up" in door.text,
    }
    after = {"start": 2.0, "training": 0.4, "save": 0.1, "evaluation": 1.0}
    while door.poll() is None and not signs[moment]():
        time.sleep(0.001)
    time.sleep(rng.uniform(0, after[moment]))


def saved_steps(workdir: str) -> list[int]:
    """Steps whose save is complete."""
    paths = pathlib.Path(workdir).glob("checkpoints/*/checksums.json")
    return [int(path.parent.name) for path in paths if path.parent.name.isdigit()]


def _write_inputs(images: str, vae: str) -> None:
    from dar_jax.pretrained import vae as vae_lib
    from tests.data.prepared import tiny_vae, write_folder

    write_folder(pathlib.Path(images), 48)
    vae_lib.write(vae, tiny_vae())


FAULTS = {
    "kill": Soak.kill_training,
    "kill_door": Soak.kill_door,
    "replace_weights": Soak.replace_weights,
    "damage_read": Soak.damage_read,
    "damage_run": Soak.damage_run,
    "damage_inputs": Soak.damage_inputs,
    "bad_number": Soak.bad_number,
    "full_disk": Soak.full_disk,
    "two_runs": Soak.two_runs,
    "hosts": Soak.hosts_disagree,
}
WEIGHTS = {"kill": 4, "kill_door": 3, "replace_weights": 0.3, "damage_run": 4, "damage_inputs": 3, "full_disk": 2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("/tmp/dar_jax_soak"))
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("soak.jsonl"))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default=",".join(FAULTS), help="the classes to draw from")
    options = parser.parse_args()
    chosen = options.faults.split(",")
    lines = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    done, soak = {(line["seed"], line["round"]) for line in lines}, Soak(options.directory)
    bad = 0
    for number in range(options.rounds):
        if (options.seed, number) in done:
            continue
        rng = random.Random(f"{options.seed} {number}")
        (name,) = rng.choices(chosen, [WEIGHTS.get(name, 1) for name in chosen])
        start = time.monotonic()
        for fault in FAULTS[name](soak, rng):
            bad += fault.verdict in BAD
            line = {"seed": options.seed, "round": number, "class": name, **fault._asdict()}
            line |= {"seconds": round(time.monotonic() - start, 1), "code": soak.code}
            with open(options.results, "a") as file:
                file.write(json.dumps(line) + "\n")
            detail = fault.detail[:300] if fault.verdict in BAD else ""
            print(f"{number:4d} {name:15} {fault.verdict:10} {fault.what}  {detail}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
