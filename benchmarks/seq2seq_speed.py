r"""Training speed of translation against `Seq2SeqTrainer` of transformers, same model, pairs and tokenizer, in one run.

    T=DATA/translation
    python benchmarks/seq2seq_speed.py --sources $T/train.en.gz --targets $T/train.de.gz

The peer takes its defaults (pairs in random order, padded to the longest of a batch, AdamW) and as many pairs a step as
LeanBERT has in its packed rows. Each competitor is a process of its own; rounds alternate. The first steps of each are
not timed.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from decode import read
from leanbert.memory.precision import has_16_bit_products
from leanbert.units import format_size
from peer import Clock
from report import table, write_section

ROOT = Path(__file__).parents[1]
LAYERS, HIDDEN, HEADS, VOCABULARY, LENGTH = 3, 256, 4, 8_000, 64
UNTIMED = 5
"""Steps before the clock starts."""

SAME = ["--model.encoder.preset=bert", "--model.optimizer.name=adamw"]
COMPETITORS = {
    "Seq2SeqTrainer, default (fp32)": ["--peer"],
    "Seq2SeqTrainer, bf16": ["--peer", "--bf16"],
    "LeanBERT, BERT, AdamW, fp32": [*SAME, "--trainer.precision=32-true"],
    "LeanBERT, BERT, AdamW, bf16": [*SAME, "--trainer.precision=bf16-mixed"],
    "LeanBERT, default": [],
}
if not has_16_bit_products("cuda" if torch.cuda.is_available() else "cpu"):  # minutes a step
    COMPETITORS = {name: more for name, more in COMPETITORS.items() if not name.endswith("bf16")}


# ---- the peer, in a process of its own


def peer_model(tokenizer: Any) -> EncoderDecoderModel:
    """Return encoder and decoder of the size that LeanBERT trains, one token embedding for all, as LeanBERT's."""
    sizes = {
        "vocab_size": len(tokenizer), "num_hidden_layers": LAYERS, "hidden_size": HIDDEN,
        "num_attention_heads": HEADS, "intermediate_size": 4 * HIDDEN,
    }  # fmt: skip
    decoder = BertLMHeadModel(BertConfig(**sizes, is_decoder=True, add_cross_attention=True))
    model = EncoderDecoderModel(encoder=BertModel(BertConfig(**sizes)), decoder=decoder)
    decoder.bert.embeddings.word_embeddings = model.encoder.embeddings.word_embeddings
    decoder.tie_weights()
    model.config.decoder_start_token_id = tokenizer.cls_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def run_as_peer(options: argparse.Namespace) -> None:
    """Train with Seq2SeqTrainer and write the figures."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    wanted = options.pairs * (options.steps + UNTIMED)
    pairs = zip(read(options.sources, wanted), read(options.targets, wanted), strict=True)
    data = [
        {**tokenizer(source, truncation=True, max_length=LENGTH),
         "labels": tokenizer(target, truncation=True, max_length=LENGTH)["input_ids"][1:]}
        for source, target in pairs
    ]  # fmt: skip
    clock, model = Clock(), peer_model(tokenizer)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(Path(options.out).with_suffix("")), per_device_train_batch_size=options.pairs,
        max_steps=options.steps + UNTIMED, use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to=[],
        disable_tqdm=True, label_smoothing_factor=0.1, bf16=options.bf16,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=model, args=arguments, train_dataset=data, callbacks=[clock],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )  # fmt: skip
    trainer.train()
    result = {
        "step_seconds": statistics.fmean(clock.step_seconds[UNTIMED:]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    Path(options.out).write_text(json.dumps(result))


# ---- both


def run_peer(
    options: argparse.Namespace, flags: list[str], tokenizer: Path, pairs: int, folder: Path
) -> dict[str, Any]:
    """Return the figures of the peer."""
    out = folder / "peer.json"
    command = [
        sys.executable, __file__, *flags, f"--sources={options.sources}", f"--targets={options.targets}",
        f"--tokenizer={tokenizer}", f"--pairs={pairs}", f"--steps={options.steps}", f"--out={out}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(out.read_text())


def run_leanbert(options: argparse.Namespace, more: list[str], folder: Path) -> dict[str, Any]:
    """Return the figures of LeanBERT; pairs of a step are the mean of its rows."""
    command = [
        sys.executable, "train.py", "fit", "--config=configs/translation.yaml", f"--data.train_files={options.sources}",
        f"--data.train_target_files={options.targets}", f"--data.vocab_size={VOCABULARY}",
        "--data.tokenizer_kind=wordpiece", f"--data.max_length={LENGTH}", f"--data.batch_size={options.rows}",
        f"--trainer.max_steps={options.steps + UNTIMED}", "--trainer.limit_val_batches=0",
        "--trainer.log_every_n_steps=1", f"--trainer.default_root_dir={folder}", *more,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    run = max((folder / "seq2seq").iterdir(), key=lambda path: int(path.name.split("_")[1]))
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    speeds = [event.value for event in events.Scalars("train/tokens_per_second") if event.step > UNTIMED]
    counts = re.search(r"train +([\d,]+) documents, ([\d,]+) tokens .* ([\d,]+) rows", done.stderr)
    assert counts is not None, done.stderr
    documents, tokens, rows = (int(count.replace(",", "")) for count in counts.groups())
    summary = json.loads((run / "summary.json").read_text())
    model = re.search(r"([\d,]+) parameters", done.stderr)
    return {
        "step_seconds": statistics.fmean(options.rows * LENGTH / speed for speed in speeds),
        "pairs": options.rows * documents / rows,
        "tokens_per_pair": tokens / documents,
        "parameters": int(model[1].replace(",", "")) if model else 0,
        "peak_rss_bytes": summary["peak_rss_bytes"],
        "tokenizer": str(run / "tokenizer"),
    }


def compare(options: argparse.Namespace, folder: Path) -> str:
    """Return the table."""
    first = run_leanbert(options, ["--trainer.max_steps=6"], folder)  # trains the tokenizer, and is not counted
    pairs = round(first["pairs"])
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in COMPETITORS}
    for _ in range(options.rounds):
        for name, more in COMPETITORS.items():
            if "--peer" in more:
                found = {"pairs": pairs, **run_peer(options, more, Path(first["tokenizer"]), pairs, folder)}
            else:
                found = run_leanbert(options, more, folder)
            results[name].append(found)
            print(f"{name}: {found['pairs'] / found['step_seconds']:.0f} pairs/s", file=sys.stderr, flush=True)
    speeds = {
        name: statistics.median(run["pairs"] / run["step_seconds"] for run in runs) for name, runs in results.items()
    }
    base = speeds["Seq2SeqTrainer, default (fp32)"]
    rows = [
        [name, f"{results[name][0]['parameters']:,}", f"{speed:.0f}", f"{speed * first['tokens_per_pair']:,.0f}",
         f"{speed / base:.2f}", format_size(results[name][0]["peak_rss_bytes"])]
        for name, speed in speeds.items()
    ]  # fmt: skip
    header = ["", "parameters", "pairs/s", "tokens/s, both sides, no padding", "x Seq2SeqTrainer", "peak RSS"]
    note = (
        f"{LAYERS} + {LAYERS} blocks of width {HIDDEN}, vocabulary of {VOCABULARY:,}, {pairs} pairs a step "
        f"({options.rows} packed rows of {LENGTH} + {LENGTH} tokens), label smoothing 0.1, medians of {options.rounds} "
        "alternating rounds."
    )
    return f"{table(header, rows)}\n\n{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", required=True, help="text file, a sentence a line")
    parser.add_argument("--targets", required=True, help="text file, their translations")
    parser.add_argument("--rows", type=int, default=16, help="packed rows of LeanBERT's step")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("tokenizer", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, help=argparse.SUPPRESS)
    for name in ("peer", "bf16"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        run_as_peer(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_section("seq2seq-speed", "Training of translation against Seq2SeqTrainer", compare(options, Path(folder)))


if __name__ == "__main__":
    main()
