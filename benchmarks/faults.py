r"""Faults on purpose: kills, damaged inputs, two processes at once, signals; and numbers computed again.

    python benchmarks/faults.py kills mutations concurrent signals recompute restarts

On two cores that takes 25, 12, 10, 15, 1 and 10 minutes.

Each experiment is one line of the output; what is there for the same code, seed and number is not repeated, so that a
part that was stopped goes on. Processes are forked from one that has imported everything, which is why a training
command takes less than a second. Prints a table and ends with 1 if an experiment went wrong. One alone, with what it
leaves: --number 17 --work FOLDER.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import shutil
import sys
import tempfile
import traceback
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tqdm import tqdm

from faults import forks
from report import table, write_section

PARTS = {"kills": 500, "mutations": 5000, "concurrent": 500, "signals": 700, "recompute": 36, "restarts": 10}
"""How many experiments a part does by default."""
SHOWN = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", choices=PARTS, nargs="+")
    parser.add_argument("--count", type=int, nargs="+", help="experiments of each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time, one thread each")
    parser.add_argument("--kind", help="only experiments of this kind")
    parser.add_argument("--number", type=int, help="only the experiment of this number")
    parser.add_argument("--output", type=Path, default=Path("faults.jsonl"), help="file to append results to")
    parser.add_argument("--work", type=Path, help="folder that keeps what went wrong; default: one that is deleted")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()
    forks.import_all()
    results = []
    folder = Path(tempfile.mkdtemp())  # a TemporaryDirectory would go when the first of the forked processes ends
    try:
        for part, count in zip_longest(options.parts, options.count or ()):
            results += carry_out(part, count or PARTS[part], options, (options.work or folder).resolve())
    finally:
        shutil.rmtree(folder)
    if options.docs:
        write_section("faults", "Faults on purpose", summary(results))
    else:
        print(summary(results))
    sys.exit(any(result.get("wrong") for result in results))


def carry_out(part: str, count: int, options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Return the results of the chosen experiments, those that the output has and those that are done now."""
    work.mkdir(parents=True, exist_ok=True)
    run = {"part": part, "seed": options.seed, "code": code_digest()}
    drawn = importlib.import_module(f"faults.{part}").experiments(count, options.seed)
    chosen = [
        {**experiment, "number": number}
        for number, experiment in enumerate(drawn)
        if options.kind in (None, experiment["kind"]) and options.number in (None, number)
    ]
    done = {result["number"]: result for result in read_results(options.output) if result.items() >= run.items()}
    left = [experiment for experiment in chosen if experiment["number"] not in done]
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(options.jobs, fork) as pool, options.output.open("a", encoding="utf-8") as file:
        waiting = [pool.submit(one, part, experiment, work) for experiment in left]
        for finished in tqdm(as_completed(waiting), part, len(waiting)):
            result = {**run, **finished.result()}
            done[result["number"]] = result
            file.write(json.dumps(result) + "\n")
            file.flush()
    return [done[experiment["number"]] for experiment in chosen]


def one(part: str, experiment: dict[str, Any], work: Path) -> dict[str, Any]:
    """Return an experiment with what came out of it; a fault of the experiment itself is one that went wrong."""
    try:
        return {**experiment, **importlib.import_module(f"faults.{part}").run(experiment, work)}
    except Exception:
        return {**experiment, "wrong": f"the experiment failed: {traceback.format_exc()[-600:]}"}


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the results of a file, which may end with half a line."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def code_digest() -> str:
    """Return a digest of the code and the configurations that the experiments are about."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in ("src", "configs", "benchmarks/faults"):
        for path in sorted((forks.ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def summary(results: list[dict[str, Any]]) -> str:
    """Return a table of counts by kind, and the first that went wrong of each."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        kinds[result["kind"]].append(result)
    rows, named = [], []
    for kind, found in sorted(kinds.items()):
        wrong = [result for result in found if result.get("wrong")]
        skipped = sum("skipped" in result for result in found)
        kills = sum(result.get("kills", 0) for result in found)
        right = len(found) - len(wrong) - skipped
        rows.append([kind, *(f"{value:,}" for value in (len(found), kills, right, len(wrong), skipped))])
        named += [f"{kind} {result['number']}: {result['wrong']}" for result in wrong[:SHOWN]]
    parts = [table(["kind", "experiments", "kills", "right", "wrong", "not possible"], rows), "", *named]
    if any("ours" in result for result in results):
        names = ("kind", "name", "ours", "theirs")
        parts += ["", table(names, [[str(result.get(name, "")) for name in names] for result in results])]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
