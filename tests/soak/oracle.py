"""What a run has come to, what is damaged, and what the doors read of it."""

import collections
import hashlib
import json
import pathlib
import random
import shutil
import zlib
from collections.abc import Callable
from typing import Any

from tests.soak.processes import send

SPEED = ("steps_per_second", "images_per_second", "model_tflops_per_second")  # of which no two runs have the same
BAD = ("lost", "wrong", "unclear", "hung")


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

    return tree_digest({name: ocp.load_checkpointables(path, {name: None})[name] for name in ("ema", "train")})


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


def damage(rng: random.Random, folder: pathlib.Path) -> str:
    """Damages one file of a folder, of any of its kinds alike, and says how. Pictures that nothing reads are spared."""
    kinds = collections.defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".png" and "tfevents" not in path.name:
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


def read_run(workdir: str) -> dict[str, Callable[[], Any]]:
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
        "metrics.jsonl": lambda: {f"{x['step']} {key}": x[key] for x in logs.read_metrics(workdir) for key in x},
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
        send(["trying", what, ""])
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
                    wrong = any(found.get(key, value) != value for key, value in wanted[name].items())
                elif name == "checkpoints":
                    wrong = found not in states
                else:
                    wrong = found is not None and found != wanted[name]
                if wrong:
                    verdict, detail = "wrong", f"{name} reads {str(found)[:300]}"
            if verdict in BAD:
                break
        send([what, verdict, detail])


def summarise(lines: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many faults of each class have come to what, of the lines of a file of results."""
    found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for line in lines:
        found[line["class"]][line["verdict"]] += 1
    return {
        name: {verdict: found[name][verdict] for verdict in ("recovered", "refused", *BAD)} for name in sorted(found)
    }


def table(summary: dict[str, dict[str, int]]) -> str:
    """The counts as Markdown."""
    total = {verdict: sum(counts[verdict] for counts in summary.values()) for verdict in ("recovered", "refused", *BAD)}
    rows = [
        "| fault | tried | recovered | one line | lost | silently wrong | unclear | hung |",
        "|---" + "|--:" * 7 + "|",
    ]
    for name, counts in (*summary.items(), ("all", total)):
        rows.append(f"| {name} | " + " | ".join(map(str, (sum(counts.values()), *counts.values()))) + " |")
    return "\n".join(rows)
