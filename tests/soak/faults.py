"""The faults: each breaks something in one way and says what came of it."""

import contextlib
import filecmp
import functools
import hashlib
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.soak.oracle import BAD, compare, damage, digest, names, observe, read_damaged, read_data, read_run, read_vae
from tests.soak.processes import MARK, ROOT, SILENCE, Door, Process, ask, set_up

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
# Values for the fields of a config, and the fields that may be negative.
NUMBERS = ("nan", "inf", "-inf", "1e400", "-1", "0", "-0.5", "1e-400", str(2**31), str(2**32), str(2**63), str(10**30))
SIGNED = ("config.mesh.", "config.sampler.cfg_scale", "config.diffusion.time_mean")


class Fault(NamedTuple):
    """A fault and what came of it: "recovered", "refused" in one line, or one of `BAD`."""

    what: str
    verdict: str
    detail: str = ""


class Soak:
    """What nothing has disturbed, made once in `directory`, and the faults."""

    def __init__(self, directory: pathlib.Path):
        paths = sorted(path for folder in ("dar_jax", "tests/soak") for path in (ROOT / folder).rglob("*.py"))
        sources = b"".join(path.read_bytes() for path in paths)  # results of another oracle are told apart too
        self.code = hashlib.sha256(sources).hexdigest()[:8]
        self.directory = directory.absolute() / self.code
        self.directory.mkdir(parents=True, exist_ok=True)
        set_up(directory.absolute() / "cache")
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

    def kill_training(self, rng: random.Random, times: int = 8, kind: str | None = None) -> Iterator[Fault]:
        """Several signals to one run, each at a moment of its own; most are kill -9."""
        kind = kind or rng.choice(["pixels", "pixels", "latents"])
        self.wanted(kind)
        workdir, faults, last = self.scratch(), [], 0
        workdir.mkdir()
        if kind == "pixels" and rng.random() < 0.8:  # else the first start trains it
            shutil.copy(self.run(kind) / "convnet.npz", workdir)
        for _ in range(times):
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

    def damage_read(self, rng: random.Random, kind: str | None = None, count: int = 20) -> Iterator[Fault]:
        """Many damaged copies of a workdir, prepared data or a VAE, each read in one process as the doors do."""
        kind, place = kind or rng.choice(["run", "data", "vae"]), self.scratch()
        read = {"run": read_run, "data": read_data, "vae": read_vae}[kind]
        original = {"run": lambda: self.run("pixels"), "data": lambda: self.data / "train", "vae": lambda: self.vae}[
            kind
        ]()
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

    def bad_number(self, rng: random.Random, count: int = 10) -> Iterator[Fault]:
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
        for _ in range(count):
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


# By class: the faults, and how often they are drawn.
CLASSES = {
    "kill or stop a run": (Soak.kill_training, 4),
    "kill prepare, evaluate or sample": (Soak.kill_door, 3),
    "other weights under a stopped evaluate": (Soak.replace_weights, 0.3),
    "read a damaged workdir, data or VAE": (Soak.damage_read, 1),
    "go on in a damaged workdir": (Soak.damage_run, 4),
    "use damaged data or a damaged VAE": (Soak.damage_inputs, 3),
    "a bad number in the config": (Soak.bad_number, 1),
    "a full disk": (Soak.full_disk, 2),
    "two runs on one workdir": (Soak.two_runs, 1),
    "hosts that disagree, or are lost": (Soak.hosts_disagree, 2),
}
