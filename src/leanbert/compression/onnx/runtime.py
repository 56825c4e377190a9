"""Models in ONNX files, computed by onnxruntime on the CPU: in the place of models of our own where answers are made.

Shapes: N sentences, K beams, Q = N * K hypotheses, B packed rows, S, T their lengths, M targets of each, D hidden, L
labels, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanbert.compression.onnx.graphs import DECODER, ENCODER, KEY, MODEL, PAST
from leanbert.errors import UserError, first_line
from leanbert.models.kernels.loss import cross_entropy_sum
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.stored import read_description

FIX = "Export the model again."

SLOW = ["SkipLayerNormFusion"]
"""Optimizations of onnxruntime that cost time: LayerNorm that adds takes three times as long as the two alone."""

FEW_BYTES = 2**27
"""Of a decoder's file, below which it has one thread: in steps of one token for each row several wait for each other
longer than they compute. On 2 cores a step took 1.3 to 3 times as long with both, with 1 row as with 32; only with 32
rows of a file of 400 MB both were faster, by 1.4."""


class Session:
    """One ONNX file, opened: nothing in it can execute code but the operators of onnxruntime.

    It has as many threads as torch, or those that are given. Raises `UserError` if onnxruntime is not installed, or the
    file is damaged or not of LeanBERT.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f'{path}: needs onnxruntime. Run: pip install "leanbert[compress]"') from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW
            )
            self.said: dict[str, Any] = json.loads(self._session.get_modelmeta().custom_metadata_map[KEY])
        except KeyError:
            raise UserError(f"{path}: not a model of LeanBERT, which says what it is in the file. {FIX}") from None
        except Exception as error:  # onnxruntime has a class of its own for each problem
            raise UserError(f"{path}: cannot be read ({first_line(error)}). {FIX}") from None
        self.inputs = [given.name for given in self._session.get_inputs()]
        self.outputs = [given.name for given in self._session.get_outputs()]

    def __call__(self, tensors: dict[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return outputs by name, all or those that are asked for; of `tensors` those count that are inputs."""
        given = {name: tensors[name].contiguous().numpy() for name in self.inputs}
        names = list(self.outputs if outputs is None else outputs)
        return dict(zip(names, map(torch.from_numpy, self._session.run(names, given)), strict=True))


class OnnxModel(nn.Module):
    """A model of any task but sequence to sequence, in one file. It has no parameters, and cannot be trained.

    Packed rows are taken apart, for a graph takes one document a row.
    """

    device = torch.device("cpu")

    def __init__(self, session: Session, path: Path) -> None:
        super().__init__()
        self.session = session
        self.config, self.metadata = read_description(session.said, path, FIX)
        self.task = self.metadata.task
        self.labels = self.metadata.labels or []
        self.of = "text" if self.task == "classification" else "word"

    def forward(self, inputs: PackedInputs, target_index: Tensor) -> Tensor:
        """Return scores [B, M, L or V] at `target_index` (int64 [B, M], positions in the packed rows)."""
        apart = inputs.unpacked()
        logits = self.run(apart.inputs, "logits")
        row = apart.row.gather(1, target_index)
        return logits[row] if self.of == "text" else logits[row, apart.place.gather(1, target_index)]

    def encode(self, inputs: PackedInputs) -> Tensor:
        """Return the last hidden states [B, S, D]; those of padding have no meaning."""
        apart = inputs.unpacked()
        return self.run(apart.inputs, "last_hidden_state")[apart.row, apart.place]

    def loss_sum(
        self, inputs: PackedInputs, target_index: Tensor, targets: Tensor,
        criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy_sum,
    ) -> Tensor:  # fmt: skip
        """Return the sum of `criterion(scores, targets)` over the targets, shape []."""
        return criterion(self(inputs, target_index), targets)

    def run(self, inputs: PackedInputs, output: str) -> Tensor:
        """Return an output of the graph for rows of one document."""
        return self.session(input_feed(inputs), [output])[output]


class OnnxSeq2Seq(OnnxModel):
    """A sequence-to-sequence model, in two files."""

    def __init__(self, encoder: Session, decoder: Session, path: Path) -> None:
        super().__init__(encoder, path)
        self.decoder = decoder
        self.target_vocab_size = self.metadata.target_vocab_size

    def forward(self, inputs: PackedInputs, decoder_inputs: PackedInputs) -> Tensor:  # type: ignore[override]
        """Return logits [B, T, V] of the next tokens; each document of the targets is that of a source, in order."""
        sources, targets = inputs.unpacked(), decoder_inputs.unpacked()
        decoding = OnnxDecoding(self, sources.inputs, beams=1)
        return decoding.run(targets.inputs.input_ids)[targets.row, targets.place]

    def start_decoding(self, inputs: PackedInputs, beams: int, positions: int) -> OnnxDecoding:
        """Return what decodes token by token sources of one document a row."""
        return OnnxDecoding(self, inputs, beams)


class OnnxDecoding:
    """Decoding, token by token: what the decoder takes of the source, and keys and values of the targets so far."""

    def __init__(self, model: OnnxSeq2Seq, inputs: PackedInputs, beams: int) -> None:
        self._decoder, self._beams = model.decoder, beams
        given = input_feed(inputs)
        source = {**model.session(given), "attention_mask": given["attention_mask"], "source_ids": given["input_ids"]}
        used = source.keys() & self._decoder.inputs
        self._source = {name: source[name].repeat_interleave(beams, 0) for name in used}
        heads, size = model.config.num_heads, model.config.head_size
        empty = torch.empty(len(inputs) * beams, heads, 0, size)
        self._past = {name: empty for name in self._decoder.inputs if name.startswith(PAST)}

    def feed(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return what the decoder reads before and with the tokens [Q, T], by name."""
        return {**self._source, **self._past, "input_ids": tokens}

    def run(self, tokens: Tensor) -> Tensor:
        """Return the logits [Q, T, V] after the tokens [Q, T], which become part of the past."""
        found = self._decoder(self.feed(tokens))
        self._past = {name: found[name.removeprefix("past_")] for name in self._past}
        return found["logits"]

    def step(self, tokens: Tensor) -> Tensor:
        """Return the logits [Q, V] after the tokens [Q], float32."""
        return self.run(tokens[:, None])[:, -1]

    def reorder(self, parents: Tensor) -> None:
        """Let beam k of each sentence go on from what was beam `parents[n, k]` (int64 [N, K])."""
        chosen = (parents + torch.arange(len(parents))[:, None] * self._beams).flatten()
        self._past = {name: tensor[chosen] for name, tensor in self._past.items()}

    def select(self, sentences: Tensor) -> None:
        """Drop all sentences but these (int64, ascending)."""
        chosen = (sentences[:, None] * self._beams + torch.arange(self._beams)).flatten()
        self._source, self._past = (
            {name: tensor[chosen] for name, tensor in tensors.items()} for tensors in (self._source, self._past)
        )


def holds_onnx(folder: Path) -> bool:
    """Whether there is a model in ONNX files in `folder`."""
    return any((folder / name).is_file() for name in (MODEL, ENCODER))


def read_onnx(folder: Path) -> OnnxModel:
    """Open the model in a folder that `holds_onnx`. Raises `UserError` as `Session`, or if a half is missing."""
    if (path := folder / MODEL).is_file():
        return OnnxModel(Session(path), path)
    path, decoder = folder / ENCODER, folder / DECODER
    if not decoder.is_file():
        raise UserError(f"{folder}: there is {ENCODER}, but no {DECODER}. {FIX}")
    threads = 1 if decoder.stat().st_size < FEW_BYTES else None
    return OnnxSeq2Seq(Session(path), Session(decoder, threads), path)


def check_tokens(model: OnnxModel, path: Path, tokens: int, target_tokens: int | None = None) -> None:
    """Raise `UserError` if the tokenizers beside a model have more tokens than it knows; onnxruntime would fail."""
    for known, given in ((model.config.vocab_size, tokens), (model.metadata.target_vocab_size, target_tokens)):
        if given is not None and given > (known or 0):
            raise UserError(f"{path}: the model knows {known} tokens, the tokenizer has {given}. Copy its own there")


def input_feed(inputs: PackedInputs) -> dict[str, Tensor]:
    """Return what a graph reads of rows of one document each, by name, int64 [B, S]."""
    segments = torch.zeros_like(inputs.input_ids) if inputs.segment_ids is None else inputs.segment_ids
    return {"input_ids": inputs.input_ids, "attention_mask": inputs.real.long(), "token_type_ids": segments}
