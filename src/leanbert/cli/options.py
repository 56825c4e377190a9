"""The options of each subcommand, beside the settings of model, data, trainer and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leanbert.compression_report.request import CompressRequest
from leanbert.planning.request import PlanRequest


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `prepare`."""

    ckpt_path: str | None = None
    """Whose tokenizer is used: a checkpoint, `last`, `best` or `average` of the newest run, or a folder of `export`."""
    weights_only: bool | None = None
    """Not used: checkpoints never execute code."""


@dataclass(frozen=True, kw_only=True)
class FitOptions(Options):
    """Options of `fit`."""

    ckpt_path: str | None = None
    """Checkpoint to go on from: a file, or `last` or `best` of the newest run; auto: last, or a new run where there is
    none."""
    budget: str | None = None
    """Memory that the run may need, such as 8GiB: the cheapest set of techniques that fits is applied, as `plan` shows
    it. auto: what the device has free, less a tenth. On a CPU it is resident memory."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """Options of `validate` and `test`."""

    ckpt_path: str | None = None
    """What to evaluate: a checkpoint, `last`, `best` or `average` of the newest run, or a folder that `export` or
    `compress` has written, ONNX files too; else --model.init_from."""
    verbose: bool = True
    """Not used: the metrics are one JSON line."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Options):
    """Options of `predict`."""

    ckpt_path: str | None = None
    """What answers: a checkpoint, `last`, `best` or `average` of the newest run, or a folder that `export` or
    `compress` has written, ONNX files too; else --model.init_from."""
    return_predictions: bool | None = None
    """Not used: answers are written as they come."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(PlanRequest, Options):
    """Options of `plan`."""

    ckpt_path: str | None = None
    """Whose architecture counts: a checkpoint, `last`, `best` or `average` of the newest run, or a folder of
    `export`."""
    target: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device, which need not be here. auto: cuda with --device, but what --measure times is here; else that of
    trainer.accelerator."""
    nodes: int | None = None
    """Machines that share the batch. Default: trainer.num_nodes."""
    devices: int | None = None
    """Devices of each. Default: trainer.devices. With more than one in all the plan says what each needs and sends
    under DDP and FSDP2, and with a budget, that of each device, chooses between them."""
    prepare: bool = False
    """Prepare the corpus first, so that the size of the tokenizer trained on it counts instead of data.vocab_size."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Options of `export`."""

    ckpt_path: str | None = None
    """What to export: a checkpoint, `last`, `best` or `average` of the newest run, or a folder of `export`; else
    --model.init_from."""
    output: str
    """Folder to write; it is created."""
    format: Literal["hf", "onnx", "sparse"] = "hf"
    """hf: config.json, model.safetensors and the tokenizer, as `transformers` loads them. onnx: model.onnx (of sequence
    to sequence encoder_model.onnx and decoder_model.onnx) and the tokenizer; compared with the model when written.
    sparse: leanbert.json, model.safetensors and the tokenizer, for LeanBERT: of pruned tensors one bit a weight and the
    weights that are left."""
    quantize: Literal["int8", "int4", "int8_int4", "int8_static"] | None = None
    """Weights in fewer bits; of ONNX files only. int8: products of 8 bits. int4: weights of 4 bits, slower. int8_int4:
    products as int8, embeddings as int4. int8_static: needs data, so `compress` makes it. Default: 32 bits."""
    exceptions: list[str] | None = None
    """Layers whose weights stay in 32 bits, such as encoder.blocks.0.attention.qkv; see `compress --sensitivity`."""


@dataclass(frozen=True, kw_only=True)
class CompressOptions(CompressRequest, Options):
    """Options of `compress`."""

    ckpt_path: str | None = None
    """What to compress: a checkpoint, `last`, `best` or `average` of the newest run, or a folder of `export`; else
    --model.init_from."""


OPTIONS: dict[str, type[Options]] = {
    "fit": FitOptions,
    "validate": EvaluateOptions,
    "test": EvaluateOptions,
    "predict": PredictOptions,
    "prepare": Options,
    "plan": PlanOptions,
    "export": ExportOptions,
    "compress": CompressOptions,
}
"""Options by subcommand."""
