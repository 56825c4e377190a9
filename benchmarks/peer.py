"""The peer: `transformers.Trainer` with `BertForMaskedLM`, set up as the library's run_mlm example does it.

Text is tokenised, concatenated and cut into blocks (`group_texts`); masks come from
`DataCollatorForLanguageModeling`. Run as a process of its own, so that its peak memory is its own:

    python benchmarks/peer.py --tokenizer FOLDER --train TEXT --steps 60 --out result.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

WARMUP_STEPS = 10


class Clock(TrainerCallback):
    """Time of each step; evaluation is not counted."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.curve: list[tuple[int, float, float]] = []
        self.begin = self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self.started)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        self.curve.append((state.global_step, metrics["eval_loss"], time.perf_counter() - self.begin))


def blocks(path: str, tokenizer: Any, length: int, limit: int | None) -> list[dict[str, list[int]]]:
    """Return the text as blocks of `length` tokens, at most `limit` of them."""
    opener = gzip.open if path.endswith(".gz") else open
    rows: list[dict[str, list[int]]] = []
    buffer: list[int] = []
    with opener(path, "rt", encoding="utf-8") as file:
        for document in file.read().rstrip("\n").split("\n\n"):
            buffer += tokenizer(document)["input_ids"]
            while len(buffer) >= length:
                rows.append({"input_ids": buffer[:length]})
                buffer = buffer[length:]
            if limit is not None and len(rows) >= limit:
                return rows[:limit]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val")
    parser.add_argument("--out", required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--eval-every", type=int)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    train = blocks(options.train, tokenizer, options.length, options.batch * options.steps)
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.hidden,
        max_position_embeddings=max(512, options.length),
        attention_probs_dropout_prob=options.attention_dropout,
    )
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(Path(options.out).with_suffix("")),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        max_steps=options.steps,
        learning_rate=options.lr,
        warmup_steps=options.warmup,
        bf16=options.bf16,
        torch_compile=options.compile,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps" if options.eval_every else "no",
        eval_steps=options.eval_every,
        prediction_loss_only=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=BertForMaskedLM(config),
        args=arguments,
        train_dataset=train,
        eval_dataset=blocks(options.val, tokenizer, options.length, None) if options.val else None,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        callbacks=[clock],
    )
    trainer.train()
    timed = sorted(clock.step_seconds[WARMUP_STEPS:])
    result = {
        "step_seconds": timed[len(timed) // 2],
        "tokens_per_second": options.batch * options.length * len(timed) / sum(timed),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "curve": clock.curve,
    }
    Path(options.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
