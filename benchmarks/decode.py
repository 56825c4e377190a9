r"""Speed of translation against `EncoderDecoderModel.generate` of transformers with the same weights, in one run.

Train a model of the bert preset, then translate a test set with it:

    T=DATA/translation
    python train.py fit --config configs/translation.yaml --model.encoder.preset=bert --trainer.max_steps=400 \
        --data.train_files=$T/train.en.gz --data.train_target_files=$T/train.de.gz --data.val_files=$T/val.en.gz \
        --data.val_target_files=$T/val.de.gz --data.vocab_size=10000 --data.batch_size=32
    python benchmarks/decode.py --model runs/seq2seq/version_0 --sources $T/test2016.en.gz --batch-size 128

Both tokenise, generate and spell out the same sentences, in batches of the same size, up to the same length. LeanBERT
puts sentences of about the same length together; the peer takes them as they come, and, in rows of their own, sorted
in the same way beforehand, and one at a time, as its pipelines do by default.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, EncoderDecoderModel

import leanbert
from leanbert.memory.allocator import keep_freed_pages
from report import table, write_section

LONGEST = 64
"""Tokens of an output, at most."""

Translate = Callable[[list[str]], list[str]]


def read(path: str, count: int) -> list[str]:
    """Return the first lines of a text file."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [line.strip() for line in file][:count]


def precision(name: str) -> AbstractContextManager[Any]:
    """Return the context of a precision, for both alike."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return nullcontext() if name == "fp32" else torch.autocast(device, torch.bfloat16)


def with_leanbert(model: Any, beams: int, kind: str, batch_size: int, texts: list[str]) -> list[str]:
    """Translate with LeanBERT."""
    with precision(kind):
        answers = model.translate(texts, beams, batch_size, length_ratio=0.0, length_more=LONGEST)
    return [answer["output"] for answer in answers]


class Peer:
    """The exported model in transformers; outputs are spelled out by the same tokenizer as LeanBERT's."""

    def __init__(self, folder: Path, spell: Callable[[list[int]], str]) -> None:
        self.model = EncoderDecoderModel.from_pretrained(folder).eval()
        if torch.cuda.is_available():
            self.model.cuda()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.spell = spell

    def translate(self, beams: int, kind: str, batch_size: int, sort: bool, texts: list[str]) -> list[str]:
        """Translate batch by batch."""
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place])) if sort else range(len(texts))
        found: dict[int, str] = {}
        for start in range(0, len(texts), batch_size):
            places = list(order)[start : start + batch_size]
            batch = self.tokenizer([texts[place] for place in places], padding=True, return_tensors="pt")
            batch = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            with torch.inference_mode(), precision(kind):
                rows = self.model.generate(**batch, num_beams=beams, do_sample=False, max_length=LONGEST + 1)
            found.update(zip(places, map(self._text, rows.tolist()), strict=True))
        return [found[place] for place in range(len(texts))]

    def _text(self, ids: list[int]) -> str:
        end = self.model.generation_config.eos_token_id
        own = ids[1:]  # without the token that begins
        return self.spell(own[: own.index(end)] if end in own else own)


def measure(competitors: dict[str, tuple[Translate, int]], texts: list[str], rounds: int) -> dict[str, Any]:
    """Return sentences per second (the median of alternating rounds) and outputs of each competitor."""
    speeds: dict[str, list[float]] = {name: [] for name in competitors}
    outputs: dict[str, list[str]] = {}
    for translate, _ in competitors.values():
        translate(texts[:32])  # not timed
    for _ in range(rounds):
        for name, (translate, count) in competitors.items():
            started = time.perf_counter()
            outputs[name] = translate(texts[:count])
            speeds[name].append(count / (time.perf_counter() - started))
            print(f"{name}: {speeds[name][-1]:.1f} sentences/s", file=sys.stderr, flush=True)
    return {name: (statistics.median(speeds[name]), outputs[name]) for name in competitors}


def compare(model: Any, peer: Peer, texts: list[str], beams: int, options: argparse.Namespace) -> list[list[str]]:
    """Return the rows of one way to search."""
    size = options.batch_size
    count = options.peer_beam_sentences if beams > 1 else len(texts)
    peers: dict[str, tuple[Translate, int]] = {
        f"transformers, {kind}{', sorted' * sort}": (partial(peer.translate, beams, kind, size, sort), count)
        for kind in ("fp32", "bf16")
        for sort in (False, True)
    }
    one = min(options.peer_alone_sentences, count)
    peers["transformers, fp32, one at a time"] = (partial(peer.translate, beams, "fp32", 1, False), one)
    own: dict[str, tuple[Translate, int]] = {
        f"LeanBERT, {kind}": (partial(with_leanbert, model, beams, kind, size), len(texts)) for kind in ("fp32", "bf16")
    }
    found = measure({**peers, **own}, texts, options.rounds)
    first, expected = found["transformers, fp32"]
    rows = []
    for name, (speed, outputs) in found.items():
        same = sum(a == b for a, b in zip(outputs, expected, strict=False))
        alike = found[name.replace("LeanBERT", "transformers")][0]
        rows.append([
            "greedy" if beams == 1 else f"beam {beams}", name, f"{speed:.1f}", f"{speed / first:.2f}",
            f"{speed / alike:.2f}" if name in own else "", f"{same} of {min(len(outputs), len(expected))}",
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run folder or checkpoint of task seq2seq, bert preset")
    parser.add_argument("--sources", required=True, help="text file, a sentence a line")
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--peer-beam-sentences", type=int, default=200, help="of the peer's beam search, which is slow")
    parser.add_argument("--peer-alone-sentences", type=int, default=100, help="of the peer without batches")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    keep_freed_pages()  # for both
    texts = read(options.sources, options.sentences)
    model = leanbert.load(options.model).to("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model.export(folder)
        peer = Peer(Path(folder), lambda ids: model.tokenizer.decode(ids).strip())
        for beams in (1, 5):
            rows += compare(model, peer, texts, beams, options)
    header = [
        "",
        "",
        "sentences/s",
        "x transformers, fp32",
        "x the same precision",
        "same output as transformers, fp32",
    ]
    config = model.model.config
    note = (
        f"{config.num_layers} + {len(model.model.decoder.blocks)} blocks of width {config.hidden_size}, vocabulary of "
        f"{config.vocab_size:,}, {len(texts):,} sentences (the peer's beam search: {options.peer_beam_sentences}, "
        f"one at a time: {options.peer_alone_sentences}), batches of {options.batch_size}, outputs of at most "
        f"{LONGEST} tokens; bf16 is autocast. Both tokenise, generate and spell out. LeanBERT puts sentences of about "
        "the same length together; 'sorted': so does the peer."
    )
    write_section("decode", "Translation against EncoderDecoderModel.generate", f"{table(header, rows)}\n\n{note}")


if __name__ == "__main__":
    main()
