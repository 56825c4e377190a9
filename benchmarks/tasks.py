r"""Quality of the tasks on real data: from scratch, and from an encoder that LeanBERT has pretrained.

    python benchmarks/tasks.py --data DATA --runs runs/tasks --jobs 1    # hours, as docs/benchmarks.md says

DATA has the folders mlm (text), translation (Multi30k), summarization (AESLC) and srl (PropBank on EWT). Pretraining
reads mlm and the e-mails of summarization's training part. With several jobs each has one thread; what has finished is
not repeated. Multi30k and SRL are evaluated on test, AESLC, whose test has no subjects, on validation.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sacrebleu

from report import table, write_section
from subcommands import train_py

PRETRAINING = "pretraining"
FROM_PRETRAINED = [
    "--model.init_from={runs}/pretraining/mlm/version_0/checkpoints/best.ckpt",
    "--model.optimizer.lr=1.5e-3", "--model.optimizer.matrix_lr=0.01",
]  # fmt: skip


@dataclass(frozen=True)
class Training:
    """A run of `fit`, and which of its weights are evaluated."""

    task: str
    config: str
    arguments: tuple[str, ...]
    weights: str = "best"
    needs: str | None = None


SRL = (
    "--data.train_files={data}/srl/train.jsonl.gz", "--data.val_files={data}/srl/val.jsonl.gz",
    "--data.test_files={data}/srl/test.jsonl.gz", "--data.find_predicates=false", "--data.batch_size=24",
    "--trainer.max_steps=900", "--trainer.val_check_interval=300",
)  # fmt: skip
AESLC = (
    "--data.train_files={data}/summarization/train.jsonl.gz", "--data.val_files={data}/summarization/val.jsonl.gz",
    "--data.test_files={data}/summarization/val.jsonl.gz", "--data.source_field=document",
    "--data.target_field=summary", "--data.max_length=64", "--data.max_target_length=24", "--data.batch_size=48",
    "--trainer.max_steps=2400", "--trainer.val_check_interval=200",
)  # fmt: skip
MULTI30K = (
    *(f"--data.{part}{side}_files={{data}}/translation/{name}.{language}.gz"
      for part, name in (("train", "train"), ("val", "val"), ("test", "test2016"))
      for side, language in (("", "en"), ("_target", "de"))),
    "--model.encoder.hidden_size=192", "--data.batch_size=24", "--data.vocab_size=6000",
)  # fmt: skip
TRAININGS = {
    PRETRAINING: Training(
        "mlm", "mlm",
        ('--data.train_files=["{data}/mlm/train.txt.gz","{runs}/emails.txt"]',
         "--data.val_files={data}/mlm/val.txt.gz", "--trainer.max_steps=3600", "--trainer.limit_val_batches=20"),
    ),
    "translation": Training(
        "seq2seq", "translation",
        (*MULTI30K, "--trainer.max_steps=1700", "--trainer.val_check_interval=170",
         "--checkpoint.average_last=4"),
        "average",
    ),
    "srl-scratch": Training("srl", "srl", SRL),
    "srl": Training("srl", "srl", (*SRL, *FROM_PRETRAINED), needs=PRETRAINING),
    "summarization-scratch": Training("seq2seq", "summarization", AESLC),
    "summarization": Training("seq2seq", "summarization", (*AESLC, *FROM_PRETRAINED), needs=PRETRAINING),
}  # fmt: skip


def write_emails(options: argparse.Namespace) -> None:
    """Write the different bodies of the training e-mails, a document a block."""
    with gzip.open(f"{options.data}/summarization/train.jsonl.gz", "rt", encoding="utf-8") as lines:
        bodies = dict.fromkeys(json.loads(line)["document"].strip() for line in lines)
    texts = ("\n".join(line for line in body.split("\n") if line.strip()) for body in bodies)
    Path(options.runs, "emails.txt").write_text("".join(f"{text}\n\n" for text in texts), encoding="utf-8")


def run_of(name: str, options: argparse.Namespace) -> Path:
    """Return the folder of a run."""
    return Path(options.runs, name, TRAININGS[name].task, "version_0")


def summary_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a run says of itself; without it, that it has not finished."""
    path = run_of(name, options) / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else {"status": "not run"}


def command(subcommand: str, name: str, options: argparse.Namespace, *more: str) -> str:
    """Run a subcommand of `train.py` with a run's settings; return what it printed."""
    training = TRAININGS[name]
    own = [text.replace("{data}", options.data).replace("{runs}", options.runs) for text in training.arguments]
    root = f"--trainer.default_root_dir={options.runs}/{name}"
    log = Path(options.runs, f"{name}-{subcommand}.log")
    return train_py(subcommand, training.config, *own, root, *more, log=log, one_thread=options.jobs > 1)


def train(name: str, options: argparse.Namespace) -> None:
    """Train, or go on with, a run that has not finished."""
    status = summary_of(name, options)["status"]
    if status != "finished":
        print(f"{name}: training", file=sys.stderr, flush=True)
        command("fit", name, options, *([] if status == "not run" else ["--ckpt_path=last"]))


def evaluate(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the metrics of test, which are kept."""
    kept = Path(options.runs, f"{name}.json")
    if not kept.is_file():
        print(f"{name}: evaluation", file=sys.stderr, flush=True)
        metrics = json.loads(command("test", name, options, f"--ckpt_path={TRAININGS[name].weights}"))
        if name == "translation":
            metrics["test/bleu_lowercase"] = lowercased_bleu(name, options)
        kept.write_text(json.dumps(metrics))
    return dict(json.loads(kept.read_text()))


def lowercased_bleu(name: str, options: argparse.Namespace) -> float:
    """Return BLEU of lowercased outputs, tokenised by 13a, as published figures of Multi30k are counted."""
    folder = Path(options.data, "translation")
    answers = command("predict", name, options, "--ckpt_path=average", f"--data.predict_files={folder}/test2016.en.gz")
    outputs = [json.loads(line)["output"] for line in answers.splitlines()]
    with gzip.open(folder / "test2016.de.gz", "rt", encoding="utf-8") as lines:
        references = [line.rstrip("\n") for line in lines]
    return float(sacrebleu.corpus_bleu(outputs, [references], lowercase=True).score)


def row(name: str, metrics: dict[str, float], options: argparse.Namespace) -> list[str]:
    """Return a row of the table."""
    summary = summary_of(name, options)
    tags = ["f1", "bleu", "bleu_lowercase", "chrf", "rouge1", "rouge2", "rougeL", "loss"]
    points = {tag: metrics[f"test/{tag}"] * (100 if tag == "f1" else 1) for tag in tags if f"test/{tag}" in metrics}
    shown = [f"{tag} {value:.2f}" for tag, value in points.items()]
    start = "pretrained encoder" if TRAININGS[name].needs else "scratch"
    return [name.removesuffix("-scratch"), start, f"{summary['parameters']:,}", f"{summary['steps']:,}",
            f"{summary['seconds'] / 60:.0f}", ", ".join(shown)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", default="runs/tasks")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with several, each has one thread")
    parser.add_argument("--only", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    options = parser.parse_args()
    options.data, options.runs = str(Path(options.data).absolute()), str(Path(options.runs).absolute())
    Path(options.runs).mkdir(parents=True, exist_ok=True)
    write_emails(options)
    first = [name for name in options.only if TRAININGS[name].needs is None]
    then = [name for name in options.only if name not in first]
    with ThreadPoolExecutor(options.jobs) as pool:
        for names in (first, then):  # what needs the pretrained encoder comes after it
            list(pool.map(lambda name: train(name, options), names))
        asked = [name for name in options.only if name != PRETRAINING]
        found = dict(zip(asked, pool.map(lambda name: evaluate(name, options), asked), strict=True))
    rows = [row(name, metrics, options) for name, metrics in found.items()]
    header = ["", "from", "parameters", "steps", "minutes of training", "result"]
    pretraining = summary_of(PRETRAINING, options)
    note = (
        f"{options.jobs} run(s) at a time. Pretraining: {pretraining.get('steps', 0):,} steps, "
        f"{pretraining.get('tokens', 0) / 1e6:.1f} M tokens, {pretraining.get('seconds', 0) / 60:.0f} minutes, "
        f"validation loss {pretraining.get('metrics', {}).get('val/loss', float('nan')):.2f}. BLEU and chrF are "
        "sacreBLEU's (beam 5, test2016, average of the last validations), cased, and lowercased. ROUGE: all validation "
        "e-mails of AESLC, beam 5, against the original subject. F1: strict spans of EWT test, predicate given, V not "
        "counted."
    )
    write_section("tasks", "Tasks on real data", f"{table(header, rows)}\n\n{note}")


if __name__ == "__main__":
    main()
