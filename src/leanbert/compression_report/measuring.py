"""What a model needs: weights, bytes, operations, time and memory. All are counted or measured here and now.

Letters: B rows, S tokens of each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanbert.measure.trace import LiveBytes
from leanbert.models.base import EncoderModel
from leanbert.models.packed_inputs import PackedInputs

SHORT, LONG, MANY = 32, 128, 32
"""Tokens of rows, and rows of a large batch."""

OUTPUT_TOKENS = 16
"""Tokens that a sequence-to-sequence model writes for each row, greedily."""

FEWEST_ROUNDS = 5
PAUSE_SECONDS = 0.03

# not by `leanbert.load`, whose libraries take seconds to import
_MEMORY = """
import json, sys
from pathlib import Path
import onnxruntime
import leanbert.compression_report.measuring as measuring
from leanbert.compression.onnx.runtime import holds_onnx, read_onnx
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.measure.counters import peak_rss_bytes
from leanbert.pretrained.build import read_model, rebuild
before, path = peak_rss_bytes(), Path(sys.argv[1])
tokenizer = TextTokenizer.from_file(path)
model = read_onnx(path) if holds_onnx(path) else rebuild(read_model(path), tokenizer.vocab_size).eval()
loaded = peak_rss_bytes()
measuring.prepared(model, int(sys.argv[2]), int(sys.argv[3]))()
print(json.dumps([loaded - before, peak_rss_bytes() - before]))
"""


def prepared(model: Any, rows: int, length: int, bf16: bool = False) -> Callable[[], None]:
    """Return what computes the scores of all tokens of drawn rows [B, S] (of texts: of each text).

    Of sequence to sequence it writes `OUTPUT_TOKENS`. The rows are drawn here, not in the call.
    """
    compute = _computation(model, rows, length)

    def call() -> None:
        with torch.inference_mode(), autocast(bf16):
            compute()

    return call


def autocast(bf16: bool) -> AbstractContextManager[object]:
    """Return what has a model on the CPU computed in 16 bits, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


def _computation(model: Any, rows: int, length: int) -> Callable[[], object]:
    length = min(length, model.config.max_positions)
    ids = torch.randint(_tokens(model), (rows, length), generator=torch.Generator().manual_seed(0))
    inputs, index = PackedInputs.whole_rows(ids), torch.arange(length).expand_as(ids)

    def write() -> None:
        decoding, tokens = model.start_decoding(inputs, 1, OUTPUT_TOKENS), ids[:, 0]
        for _ in range(min(OUTPUT_TOKENS, model.config.max_positions)):
            tokens = decoding.step(tokens).argmax(-1)

    if model.task == "seq2seq":
        return write
    return partial(model, inputs, index[:, :1] if getattr(model, "of", "word") == "text" else index)


def weights_of(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters there are, shared ones once, and how many of them are not zero."""
    parameters: list[Tensor] = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters)


def flops_per_token(model: EncoderModel) -> float:
    """Return the operations of matrix products and attention for each token of a row of `LONG`, counted in a run."""
    compute = _computation(model, 1, LONG)
    with torch.no_grad(), LiveBytes(model) as trace:
        compute()
    return trace.flops.total() / min(LONG, model.config.max_positions)


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], seconds: float, progress: Callable[[Iterable[int]], Iterable[int]]
) -> dict[str, list[float]]:
    """Return the seconds of each call, all in turns, so that what else the machine does is alike for all.

    There are as many rounds as take `seconds` for each call, five at least. In each a call runs twice, after a pause:
    threads of the call before it still look for work for a while, and take the cores; the second time counts.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}

    def turn() -> float:
        begin = time.perf_counter()
        for name, call in calls.items():
            time.sleep(PAUSE_SECONDS)
            call()
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
        return time.perf_counter() - begin

    rounds = max(FEWEST_ROUNDS, round(seconds * len(calls) / turn())) - 1
    for _ in progress(range(rounds)):
        turn()
    return found


def peak_memory(path: Path) -> tuple[int, int]:
    """Return the bytes by which the resident memory of a new process grows to load a model, and to run it besides.

    `path` is a checkpoint or a folder; it runs `MANY` rows of `LONG` tokens. The libraries are there before.
    """
    words = [sys.executable, "-c", _MEMORY, str(path), str(MANY), str(LONG)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    loaded, ran = json.loads(done.stdout.splitlines()[-1])
    return loaded, ran


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in a folder, by name."""
    return sorted(file for suffix in ("onnx", "safetensors") for file in folder.glob(f"*.{suffix}"))


def bytes_of(folder: Path) -> int:
    """Return the bytes of these files."""
    return sum(file.stat().st_size for file in weight_files(folder))


def _tokens(model: Any) -> int:
    """Return how many tokens there are in all vocabularies of the model."""
    own = getattr(model, "target_vocab_size", None)
    return min(model.config.vocab_size, own or model.config.vocab_size)
