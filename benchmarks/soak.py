"""Runs under random faults: whatever happens, nothing is lost, silently wrong, or hangs.

    python benchmarks/soak.py --rounds=500 --results=soak.jsonl      # appends a line for each fault
    python benchmarks/soak.py --rounds=0 --results=soak.jsonl --summary=docs/soak.json      # adds up, prints a table

Round i breaks something in one way (tests/soak/faults.py), repeats the command until it is done, and compares
with runs that nothing disturbed: losses, gradient norms and scores of all steps, arrays of the last checkpoint, sample
grids, best.json. They must be equal bit for bit. Or the command must end with exit code 2 and one line that names what
is wrong.

Rounds that the file of results has are left out, so that several sittings add up. The exit code is 1 if anything was
lost, wrong, unclear or hanging. Most processes are forked from one that has imported the libraries, which saves most of
their start; one in ten that are killed starts afresh. Run this from the root of a clone, with the extra `test`.
"""

import json
import pathlib
import random
import sys
import time

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tests.soak.faults import CLASSES, Soak
from tests.soak.oracle import BAD, summarise, table

# Forked doors import this file too, so no flag may have the name of one of theirs.
ROUNDS = flags.DEFINE_integer("rounds", 100, "How many rounds the sitting has; those in the results are left out")
SITTING = flags.DEFINE_integer("sitting", 0, "Seed of the faults")
RESULTS = flags.DEFINE_string("results", "soak.jsonl", "JSON lines, one for each fault, to go on with")
SUMMARY = flags.DEFINE_string("summary", None, "Write the counts of all results to this JSON file")
DIRECTORY = flags.DEFINE_string("directory", "/tmp/dar_jax_soak", "For runs and data, of one soak at a time")


def main(_):
    results = pathlib.Path(RESULTS.value)
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(line["sitting"], line["round"]) for line in lines}
    soak = Soak(pathlib.Path(DIRECTORY.value)) if ROUNDS.value else None
    for number in range(ROUNDS.value):
        if (SITTING.value, number) not in done:
            lines += one_round(soak, results, SITTING.value, number)
    if SUMMARY.value:
        pathlib.Path(SUMMARY.value).write_text(json.dumps(summarise(lines), indent=1) + "\n")
    print(table(summarise(lines)))
    sys.exit(any(line["verdict"] in BAD for line in lines))


def one_round(soak: Soak, results: pathlib.Path, sitting: int, number: int) -> list[dict]:
    """The faults of a round, which are also appended to `results`."""
    rng, start = random.Random(f"{sitting} {number}"), time.monotonic()
    (name,) = rng.choices(list(CLASSES), [weight for _, weight in CLASSES.values()])
    lines = []
    for fault in CLASSES[name][0](soak, rng):
        seconds = round(time.monotonic() - start, 1)
        lines.append(
            {
                "sitting": sitting,
                "round": number,
                "class": name,
                **fault._asdict(),
                "seconds": seconds,
                "code": soak.code,
            }
        )
        print(f"{number:4d} {name}: {fault.what}: {fault.verdict} {fault.detail[:300]}", flush=True)
    with open(results, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    return lines


if __name__ == "__main__":
    app.run(main)
