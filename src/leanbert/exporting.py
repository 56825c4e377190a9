"""Folders of trained models: of Hugging Face, with ONNX files, or of LeanBERT's own, each with its tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from leanbert.compression.onnx.folder import write_onnx
from leanbert.compression.onnx.graphs import DECODER, ENCODER, MODEL
from leanbert.compression.onnx.quantization import SCHEMES, STATIC, Scheme, Seen
from leanbert.compression.onnx.runtime import OnnxModel
from leanbert.compression.sparse import SparseLinear
from leanbert.data.pairs import TARGET
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.files import expand, write_text_atomically
from leanbert.pretrained.huggingface.convert import write_huggingface
from leanbert.pretrained.huggingface.tasks import generation_settings
from leanbert.pretrained.sparse import write_sparse
from leanbert.pretrained.weights import SETTINGS_FILES
from leanbert.tasks.seq2seq import special_tokens

if TYPE_CHECKING:
    from leanbert.api import Pretrained

Format = Literal["hf", "onnx", "sparse"]


def write_folder(
    trained: Pretrained, folder: str | Path, format: Format, quantize: Scheme | None, exceptions: Sequence[str],
    seen: Sequence[Seen], float32: Path | None = None,
) -> None:  # fmt: skip
    """Write a folder with a model and its tokenizers: see `Pretrained.export`, and for `float32` `write_onnx`."""
    model = trained.model
    if isinstance(model, OnnxModel):
        raise UserError("export: this model is in ONNX files already. Load the checkpoint that they are of")
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise UserError("export: this model was loaded with weights='sparse'. Load it with 'dense'")
    if format not in get_args(Format):
        raise UserError(f"export: format {format!r} is unknown. Give {', '.join(get_args(Format))}")
    if quantize not in (None, *SCHEMES):
        raise UserError(f"export: quantize {quantize!r} is unknown. Give {', '.join(SCHEMES)}")
    if quantize is not None and format != "onnx":
        raise UserError(f"export: --quantize {quantize} is of ONNX files. Give --format onnx")
    if exceptions and quantize is None:
        raise UserError("export: exceptions are of what --quantize does. Give it too")
    if quantize == STATIC and not seen:
        steps = f"'[\"quantize={STATIC}\"]'"
        raise UserError(f"export: {STATIC} needs data to calibrate on. Use compress, with --steps {steps}")
    if seen and quantize != STATIC:
        raise UserError(f"export: seen is what {STATIC} is calibrated on. Leave it out")
    if any(len(rows) != len(model.stacks) for rows in seen):
        raise UserError("export: seen has a tuple of rows for each batch, with those of the targets for a decoder")
    folder = expand(folder, "output")
    _refuse_other_models(folder, format, trained.task)
    if format == "onnx":
        write_onnx(model, folder, trained.metadata, quantize, exceptions, seen, float32)
    elif format == "sparse":
        write_sparse(model, folder, trained.metadata)
    else:
        _write_huggingface(trained, folder)
    segments = trained.task != "seq2seq" and model.config.type_vocab_size > 1
    positions = model.config.max_positions
    longest = positions if trained.task == "mlm" else trained.max_length  # what our own answers are cut to
    trained.tokenizer.save(folder, segments=segments, max_length=longest)
    if trained.target_tokenizer is not trained.tokenizer:
        trained.target_tokenizer.save(folder / TARGET)


def _refuse_other_models(folder: Path, format: Format, task: str) -> None:
    """Raise `UserError` for a model that would stay in the folder, beside the new one and with the new tokenizer."""
    onnx = (ENCODER, DECODER) if task == "seq2seq" else (MODEL,)
    own = {"hf": ("config.json",), "sparse": ("leanbert.json",), "onnx": onnx}[format]
    for name in (*SETTINGS_FILES, MODEL, ENCODER, DECODER):
        if name not in own and (folder / name).is_file():
            raise UserError(f"{folder}: has a model of another format ({name}). Choose another folder")


def _write_huggingface(trained: Pretrained, folder: Path) -> None:
    tokenizer, targets = trained.tokenizer, trained.target_tokenizer
    ids = _special_ids(targets)
    if trained.task == "seq2seq":
        tokens = special_tokens(targets)
        ids |= {"decoder_start_token_id": tokens.bos, "eos_token_id": tokens.eos}
    source_ids = None if targets is tokenizer else _special_ids(tokenizer)
    write_huggingface(trained.model, folder, ids, trained.metadata, source_ids)
    if trained.task == "seq2seq":
        searching = generation_settings(trained.metadata, ids, tokens.suppressed, trained.max_length)
        write_text_atomically(folder / "generation_config.json", json.dumps(searching, indent=2) + "\n")


def _special_ids(tokenizer: TextTokenizer) -> dict[str, int | None]:
    ids = {"pad_token_id": tokenizer.pad_id, "cls_token_id": tokenizer.cls_id, "sep_token_id": tokenizer.sep_id}
    return {name: index for name, index in ids.items() if index is not None}
