r"""What compression costs on real data: students with and without their teacher, and reports of `compress`.

    python benchmarks/compress.py --data DATA --runs runs/compress --jobs 2    # an hour on 2 cores

DATA has the folders classification (SST-2) and srl (PropBank on EWT), and for --tasks of these names translation
(Multi30k) and ner (WNUT-17, with an encoder that is pretrained on the folder mlm first, for it has few sentences); each
takes 20 minutes more. A teacher is trained for each task; then smaller models, which begin with its weights, with
several seeds. At last `compress` makes and measures variants of the teacher, one process at a time. With several jobs
trainings have one thread each. What has finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import table, write_section
from subcommands import train_py
from tasks import MULTI30K


@dataclass(frozen=True)
class Way:
    """How a smaller model is trained: what makes it smaller, whether the teacher teaches it, what is evaluated."""

    callback: str
    settings: dict[str, Any]
    taught: bool = True
    weights: str = "best"

    def overlay(self) -> dict[str, Any]:
        """Return the configuration of it beyond that of its task."""
        callback = {"class_path": self.callback, "init_args": self.settings}
        found: dict[str, Any] = {"trainer": {"callbacks+": [callback]}}
        if self.taught:
            found["model"] = {"init_args": {"distillation": {"teacher": "init_from", "logits": 0.5, "hidden": 1.0}}}
        return found


HALF_THE_BLOCKS = {"heads": 0.0, "neurons": 0.0, "blocks": 0.5}
STUDENTS = {
    "half the blocks, by the teacher": Way("StructuredPruning", HALF_THE_BLOCKS),
    "half the blocks, by labels alone": Way("StructuredPruning", HALF_THE_BLOCKS, taught=False),
}
PRUNED = {
    "half of heads and neurons": Way("StructuredPruning", {"heads": 0.5, "neurons": 0.5}),
    "2:4": Way("MagnitudePruning", {"scope": "2:4"}, weights="last"),
    "80 % zeros": Way("MagnitudePruning", {"final_sparsity": 0.8, "include_embeddings": True}, weights="last"),
}


@dataclass(frozen=True)
class Task:
    """A task: its configuration, its data, the metric that counts, steps of teacher, students and `compress`."""

    config: str
    arguments: tuple[str, ...]
    metric: str
    teacher_steps: int
    student_steps: int
    compress_steps: int
    ways: dict[str, Way]
    lists: tuple[tuple[str, ...], ...]
    """Steps of `compress`, of which each list is a report; without steps it tries what needs no training."""
    pretrained: bool = False
    """Whether the teacher starts from a masked language model."""


def files(folder: str, suffix: str = "jsonl") -> tuple[str, ...]:
    return tuple(f"--data.{part}_files={{data}}/{folder}/{part}.{suffix}.gz" for part in ("train", "val", "test"))


def hybrid(*more: str, scheme: str = "int8") -> tuple[str, ...]:
    return ("blocks=0.5", "structured_pruning=0.5", "train={}", *more, f"quantize={scheme}")


PRETRAINING = 3600
"""Steps of the masked language model that a teacher starts from."""

TASKS = {
    "classification": Task(
        "classification", files("classification"), "accuracy", 250, 200, 400, STUDENTS | PRUNED,
        (hybrid("low_rank_embedding=0.6"), ("structured_pruning=0.5", "train={}"), ("pruning=2:4", "train={}"),
         ("pruning=0.8", "train={}"), (), ("quantize=int8_static",),
         ("quantization_aware=int4", "train={}", "quantize=int4")),
    ),
    "srl": Task(
        "srl", (*files("srl"), "--data.find_predicates=false", "--data.batch_size=24"), "f1", 300, 200, 600, STUDENTS,
        (hybrid("low_rank_embedding=0.9"),),
    ),
    "ner": Task(
        "tagging", files("ner", "conll"), "f1", 300, 200, 300, {}, (hybrid("low_rank_embedding=0.9"),), pretrained=True
    ),
    "translation": Task("translation", MULTI30K, "bleu", 900, 450, 1800, {}, (hybrid(scheme="int8_int4"),)),
}  # fmt: skip


def call(name: str, subcommand: str, options: argparse.Namespace, *more: str, threads: bool = False) -> str:
    """Run a subcommand of `train.py` for a task and return what it printed."""
    task, log = TASKS[name], Path(options.runs, f"{name}-{subcommand}.log")
    own = [text.replace("{data}", options.data) for text in task.arguments]
    return train_py(subcommand, task.config, *own, *more, log=log, one_thread=options.jobs > 1 and not threads)


def trained(
    name: str, run: str, steps: int, options: argparse.Namespace, *more: str, weights: str = "best"
) -> tuple[Path, float]:
    """Train a run, unless it has finished, and return its best or last checkpoint and the metric of test."""
    root = Path(options.runs, name, run)
    kept = root / "test.json"
    if not kept.is_file():
        print(f"{name}: {run}", file=sys.stderr, flush=True)
        folder = f"--trainer.default_root_dir={root}"
        settings = (f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps // 5}", "--ckpt_path=auto")
        call(name, "fit", options, *more, folder, *settings)
        kept.write_text(call(name, "test", options, *more, folder, f"--ckpt_path={weights}"))
    [checkpoint] = root.glob("*/version_0/checkpoints/best.ckpt")
    return checkpoint, float(json.loads(kept.read_text())[f"test/{TASKS[name].metric}"])


def pretrained(options: argparse.Namespace) -> tuple[str, ...]:
    """Train a masked language model, unless it has finished, and return the settings of what starts from it."""
    root, files = Path(options.runs, "pretraining"), f"{options.data}/mlm"
    print("pretraining", file=sys.stderr, flush=True)
    train_py(
        "fit", "mlm", f"--data.train_files={files}/train.txt.gz", f"--data.val_files={files}/val.txt.gz",
        f"--trainer.max_steps={PRETRAINING}", "--trainer.limit_val_batches=20", f"--trainer.default_root_dir={root}",
        "--ckpt_path=auto", log=Path(options.runs, "pretraining.log"), one_thread=options.jobs > 1,
    )  # fmt: skip
    [checkpoint] = root.glob("*/version_0/checkpoints/best.ckpt")
    return (f"--model.init_from={checkpoint}", "--model.optimizer.lr=1.5e-3", "--model.optimizer.matrix_lr=0.01")


def students(name: str, teacher: Path, options: argparse.Namespace, pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    """Return the metric of smaller models by how they were trained, seed by seed."""

    def one(way: str, seed: int) -> float:
        run, chosen = re.sub(r"\W+", "-", f"{way} {seed}"), TASKS[name].ways[way]
        overlay = Path(options.runs, f"{name}-{run}.yaml")
        overlay.write_text(json.dumps(chosen.overlay()))
        more = (f"--config={overlay}", f"--model.init_from={teacher}", f"--seed_everything={seed}")
        return trained(name, run, TASKS[name].student_steps, options, *more, weights=chosen.weights)[1]

    seeds = range(1, 1 + options.seeds)
    asked = {way: [pool.submit(one, way, seed) for seed in seeds] for way in TASKS[name].ways}
    return {way: [future.result() for future in futures] for way, futures in asked.items()}


def reports(name: str, teacher: Path, options: argparse.Namespace) -> str:
    """Return the table of all variants, each list of steps in a report of its own."""
    task = TASKS[name]
    lines: list[list[str]] = []
    for number, steps in enumerate(task.lists[: options.reports]):
        texts = [step.format(task.compress_steps) for step in steps]
        output = Path(
            options.runs, name, "compress-" + "-".join(texts or ["untrained"]).replace("=", "-").replace(":", "of")
        )
        if not (output / "report.json").is_file():
            print(f"{name}: {texts}", file=sys.stderr, flush=True)
            call(name, "compress", options, f"--ckpt_path={teacher}", f"--output={output}",
                 f"--steps={json.dumps(texts or None)}", "--model.distillation.hidden=1", threads=True)  # fmt: skip
        found = json.loads((output / "report.json").read_text())["variants"]
        first = found[0]
        for row in found:
            is_reference = number == 0 and (not lines or row["name"] == "onnxruntime-int8")
            if row["metrics"] and (row["steps"] or is_reference):
                lines.append(line_of(row, first, task.metric))
    header = [
        "variant", "test", "change of val", "parameters", "not zero", "file", "of the model's", "MFLOP a token",
        "1 short row", "x", "32 long rows", "x",
    ]  # fmt: skip
    return table(header, list(dict.fromkeys(map(tuple, lines))))


def line_of(row: dict, first: dict, metric: str) -> list[str]:
    """Return a variant's row beside the model's, as measured in the same report."""
    return [
        row["name"], f"{row['metrics'][f'test/{metric}']:.4f}", f"{-row['drop']:+.2%}", f"{row['parameters']:,}",
        f"{row['nonzero']:,}", f"{row['size_bytes'] / 2**20:.1f} MiB", f"{row['size_bytes'] / first['size_bytes']:.1%}",
        f"{row['flops_per_token'] / 1e6:.2f}", f"{row['latency_p50'] * 1e3:.2f} ms",
        f"{first['latency_p50'] / row['latency_p50']:.1f}", f"{row['rows_per_second_long']:,.0f}/s",
        f"{row['rows_per_second_long'] / first['rows_per_second_long']:.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", default="runs/compress")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; with several, each has one thread")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--reports", type=int, default=None, help="of each task only so many; default: all")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["classification", "srl"])
    options = parser.parse_args()
    options.data, options.runs = str(Path(options.data).absolute()), str(Path(options.runs).absolute())
    Path(options.runs).mkdir(parents=True, exist_ok=True)
    start = pretrained(options) if any(TASKS[name].pretrained for name in options.tasks) else ()

    def teacher(name: str) -> tuple[Path, float]:
        more = start if TASKS[name].pretrained else ()
        return trained(name, "teacher", TASKS[name].teacher_steps, options, *more)

    with ThreadPoolExecutor(options.jobs) as pool:
        teachers = dict(zip(options.tasks, pool.map(teacher, options.tasks), strict=True))
        taught = {name: students(name, path, options, pool) for name, (path, _) in teachers.items()}
    rows = []
    for name, (_, score) in teachers.items():
        for way, scores in taught[name].items():
            mean = statistics.mean(scores)
            rows.append([name, f"{score:.4f}", way, ", ".join(f"{each:.4f}" for each in scores), f"{mean:.4f}",
                         f"{mean / score:.1%}"])  # fmt: skip
    header = ["task", "teacher", "smaller model", "seeds", "mean", "of the teacher"]
    parts = [table(header, rows)]
    for name, (path, _) in teachers.items():
        parts.append(f"{name}, {TASKS[name].metric}:\n\n{reports(name, path, options)}")
    asked = {name: TASKS[name] for name in options.tasks}
    steps = (
        f"{name} {each.teacher_steps}, {each.student_steps}, {each.compress_steps}" for name, each in asked.items()
    )
    note = (
        f"Steps of teachers, of the smaller models above and of `train`: {'; '.join(steps)}. Figures of test; x: by "
        "the model itself, in the same report."
    )
    write_section("compress", "Compression on real data", "\n\n".join([*parts, note]))


if __name__ == "__main__":
    main()
