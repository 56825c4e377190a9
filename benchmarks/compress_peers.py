r"""A trained classifier in 8 bits, by LeanBERT and by its peers: bytes, answers and time, of all in turns.

    python -m venv peers && peers/bin/pip install "optimum-onnx[onnxruntime]"
    pip install torchao
    python benchmarks/compress_peers.py --data DATA --peer-python peers/bin/python    # about 15 minutes on 2 cores

DATA has train.jsonl.gz and val.jsonl.gz of a classification (SST-2). The model is the original BERT, for which
transformers has a class; it is trained first, unless that has finished. optimum-onnx needs an older transformers, hence
an interpreter of its own, which writes files; onnxruntime computes them here.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import leanbert
from leanbert.api import Pretrained
from leanbert.compression.onnx.quantization import quantize_plainly
from leanbert.compression.onnx.runtime import SLOW, OnnxModel, Session, read_onnx
from leanbert.compression_report.measuring import LONG, MANY, SHORT, bytes_of, prepared, time_in_turns
from leanbert.data.formats.examples import read_records
from leanbert.measure.torch_compat import cpu_computes_int8
from report import table, write_section

ROOT = Path(__file__).parents[1]
OURS = "LeanBERT, int8"
BATCHES = ((1, SHORT), (MANY, LONG))


@dataclass
class Contender:
    """A model in 8 bits, or beside those; `answering`: the same, where that is compiled for texts of any length."""

    name: str
    model: Any
    size_bytes: int
    answering: Any = None
    accuracy: float = 0.0
    agreement: float = 0.0
    seconds: tuple[float, ...] = ()


class PeerSession(Session):
    """An ONNX file that does not say what model it is, with as many threads as LeanBERT's."""

    def __init__(self, path: Path, said: dict[str, Any], disabled: Sequence[str]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
        self.said = said
        self.inputs = [given.name for given in self._session.get_inputs()]
        self.outputs = [given.name for given in self._session.get_outputs()]


def trained(options: argparse.Namespace) -> Path:
    """Train the model, unless it has finished, and return its best checkpoint."""
    data = [f"--data.{part}_files={options.data / part}.jsonl.gz" for part in ("train", "val")]
    model = {"preset": "bert", "num_layers": options.layers, "hidden_size": options.hidden}
    words = [f"--model.encoder.{name}={value}" for name, value in model.items()]
    words += [f"--trainer.max_steps={options.steps}", f"--trainer.val_check_interval={max(1, options.steps // 5)}"]
    words += [f"--trainer.default_root_dir={options.runs}", "--ckpt_path=auto"]
    start = [sys.executable, "train.py", "fit", "--config=configs/classification.yaml"]
    subprocess.run([*start, *data, *words], cwd=ROOT, check=True)
    return options.runs / "classification/version_0/checkpoints/best.ckpt"


def by_onnxruntime(original: Pretrained, folder: Path) -> list[Contender]:
    """Return the model in PyTorch and in ONNX, LeanBERT's variant of 8 bits, and onnxruntime's own."""
    original.export(folder / "hf")
    original.export(folder / "onnx", "onnx")
    original.export(folder / "int8", "onnx", "int8")
    plain = folder / "plain"
    plain.mkdir(exist_ok=True)
    quantize_plainly(folder / "onnx/model.onnx", plain / "model.onnx")
    return [
        Contender("LeanBERT, PyTorch float32", original.model, bytes_of(folder / "hf")),
        Contender("LeanBERT, ONNX float32", read_onnx(folder / "onnx"), bytes_of(folder / "onnx")),
        Contender(OURS, read_onnx(folder / "int8"), bytes_of(folder / "int8")),
        *opened("onnxruntime's quantizer", plain, folder),
    ]


def by_optimum(folder: Path, python: str) -> list[Contender]:
    """Return the model as optimum exports it, and that in 8 bits."""
    processor = "avx512_vnni" if cpu_computes_int8() else "avx2"
    script = Path(__file__).with_name("compress_optimum.py")
    words = [python, str(script), str(folder / "hf"), str(folder / "optimum"), "--processor", processor]
    subprocess.run(words, check=True)
    return [
        *opened("optimum, ONNX float32", folder / "optimum/onnx", folder),
        *opened(f"optimum, int8 ({processor})", folder / "optimum/int8", folder),
    ]


def opened(name: str, path: Path, folder: Path) -> list[Contender]:
    """Return a peer's model.onnx as onnxruntime opens it where nothing is set, and as LeanBERT does."""
    said, size = read_onnx(folder / "onnx").session.said, bytes_of(path)
    return [
        Contender(words, OnnxModel(PeerSession(path / "model.onnx", said, disabled), path), size)
        for words, disabled in ((name, ()), (f"{name}, opened as LeanBERT's", SLOW))
    ]


def by_torchao(original: Pretrained) -> list[Contender]:
    """Return the PyTorch model quantized by torchao, as it is and compiled."""
    small = copy.deepcopy(original.model)
    quantize_(small, Int8DynamicActivationInt8WeightConfig())
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    size = file.tell()
    torch._inductor.config.freezing = True  # weights are constants: one text takes a third of the time
    torch._inductor.config.force_disable_caches = True  # what it takes to compile shall count
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would go on without being compiled
    fixed, free = (torch.compile(small, dynamic=dynamic) for dynamic in (False, True))
    begin = time.perf_counter()
    for batch in BATCHES:
        prepared(fixed, *batch)()
    compiling = f"{time.perf_counter() - begin:.0f} s to compile"
    return [
        Contender("torchao, PyTorch", small, size),
        Contender(f"torchao, torch.compile ({compiling})", fixed, size, answering=free),
    ]


def time_all(contenders: Sequence[Contender], seconds: float) -> None:
    """Give each its seconds for the batches, medians of all in turns."""
    for batch in BATCHES:
        calls = {each.name: prepared(each.model, *batch) for each in contenders}
        found = time_in_turns(calls, seconds, iter)
        for each in contenders:
            each.seconds += (statistics.median(found[each.name]),)


def judge_all(contenders: Sequence[Contender], original: Pretrained, file: Path) -> None:
    """Give each its accuracy, and the part of texts for which its label is that of the first contender."""
    records = [record for _, record in read_records([str(file)], "--data", ("label",), ["text"])]
    texts, truth = ([record[field] for record in records] for field in ("text", "label"))
    reference: list[str] = []
    for each in contenders:
        model = each.model if each.answering is None else each.answering
        answers = Pretrained(model, original.tokenizer, original.metadata).classify(texts, MANY)
        labels = [answer["label"] for answer in answers]
        reference = reference or labels
        each.accuracy, each.agreement = (
            sum(map(str.__eq__, labels, others)) / len(labels) for others in (truth, reference)
        )


def table_of(contenders: Sequence[Contender]) -> str:
    """Return the table; its last column says at what a row is better than LeanBERT's variant."""

    def figures(each: Contender) -> dict[str, float]:
        """Return what counts, less of which is better."""
        alone, many = each.seconds
        return {"bytes": each.size_bytes, "accuracy": -each.accuracy, "ms": alone, "texts/s": many}

    ours = figures(next(each for each in contenders if each.name == OURS))
    rows = []
    for each in contenders:
        better = [name for name, value in figures(each).items() if value < ours[name]]
        alone, many = each.seconds
        rows.append([
            each.name, f"{each.size_bytes:,}", f"{each.accuracy:.4f}", f"{each.agreement:.2%}", f"{1e3 * alone:.2f}",
            f"{MANY / many:,.0f}", ", ".join(better),
        ])  # fmt: skip
    header = [
        "by", "bytes", "accuracy", "labels as float32", f"1 x {SHORT}, ms", f"{MANY} x {LONG}, texts/s",
        f"better than {OURS} in",
    ]  # fmt: skip
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer-python", required=True, help="interpreter of an environment with optimum-onnx")
    parser.add_argument("--runs", type=Path, default=Path("runs/compress_peers"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each call")
    options = parser.parse_args()
    options.data, options.runs = options.data.absolute(), options.runs.absolute()
    original = leanbert.load(trained(options))
    folder = options.runs / "variants"
    contenders = [
        *by_onnxruntime(original, folder), *by_optimum(folder, options.peer_python), *by_torchao(original),
    ]  # fmt: skip
    time_all(contenders, options.seconds)
    judge_all(contenders, original, options.data / "val.jsonl.gz")
    peer = json.loads((folder / "optimum/versions.json").read_text())
    note = (
        f"Original BERT, {options.layers} x {options.hidden}, after {options.steps} steps; accuracy on validation, the "
        f"same batches for all. Times are medians, of all in turns, with {torch.get_num_threads()} threads each. Bytes "
        "are the weights' file; torchao's is written by `torch.save`, and has embeddings of 32 bits. onnxruntime's "
        "quantizer, with nothing set, has LeanBERT's float32 file. LeanBERT opens files without "
        f"`{SLOW[0]}` of onnxruntime. `torch.compile` compiles for each shape, with constant weights (`freezing`).\n\n"
        f"onnxruntime {version('onnxruntime')}, torchao {version('torchao')}; optimum's environment: "
        + ", ".join(f"{name} {number}" for name, number in peer.items()) + "."
    )  # fmt: skip
    write_section("compress-peers", "Eight bits against peers", f"{table_of(contenders)}\n\n{note}")


if __name__ == "__main__":
    main()
