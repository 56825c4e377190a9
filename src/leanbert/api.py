"""Answers from Python: `leanbert.load(path).fill_mask(texts)`, `.classify(texts)`, `.translate(texts)` and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from leanbert.checkpoints import BEST
from leanbert.compression.onnx.quantization import Scheme, Seen
from leanbert.compression.onnx.runtime import OnnxModel, check_tokens, holds_onnx, read_onnx
from leanbert.compression.sparse import make_sparse
from leanbert.data.batches.batch import PredictBatch
from leanbert.data.batches.loading import encode_lines, in_batches
from leanbert.data.batches.sentences import Sentence, word_batch
from leanbert.data.batches.texts import encode_groups, given_groups, given_texts
from leanbert.data.pairs import TARGET
from leanbert.data.sentence_reader import given_sentences
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.exporting import Format, write_folder
from leanbert.files import expand
from leanbert.models.base import EncoderModel
from leanbert.models.generation import GenerationConfig
from leanbert.models.stored import ModelMetadata, Stored
from leanbert.pretrained.build import read_model, rebuild
from leanbert.pretrained.weights import holds_model
from leanbert.ranges import COUNT
from leanbert.runs import Run
from leanbert.shard_files import holds_shards
from leanbert.tasks.classification import classify
from leanbert.tasks.mlm import fill_masks
from leanbert.tasks.seq2seq import generate_texts
from leanbert.tasks.spans import BioDecoder
from leanbert.tasks.tagging import label_roles, tag_sentences

Item = TypeVar("Item")
One = TypeVar("One")
Answers = list[dict[str, Any]]
Weights = Literal["dense", "sparse"]

METHODS = {
    "mlm": "fill_mask",
    "classification": "classify",
    "tagging": "tag",
    "srl": "label_roles",
    "seq2seq": "translate or summarize",
}
"""What a model of each task is asked by; `encode` is there for all."""


class Pretrained:
    """A trained model with its tokenizer, on the CPU until `to` moves it.

    Args:
        model: The model; its `task` decides which methods answer, the others raise `UserError`.
        tokenizer: Its tokenizer.
        metadata: What else was kept with it, such as the length of the rows that it was trained on.
        target_tokenizer: The tokenizer of what a sequence-to-sequence model writes; None: it has one for both.

    """

    def __init__(
        self, model: EncoderModel | OnnxModel, tokenizer: TextTokenizer, metadata: ModelMetadata | None = None,
        target_tokenizer: TextTokenizer | None = None,
    ) -> None:  # fmt: skip
        self.target_tokenizer = tokenizer if target_tokenizer is None else target_tokenizer
        self.model: Any = model.eval()  # of its task's class
        self.tokenizer, self.task = tokenizer, model.task
        self.metadata = metadata or ModelMetadata(model.task)
        positions = model.config.max_positions
        self.max_length = min(self.metadata.max_length or positions, positions)

    def to(self, device: str | torch.device) -> Pretrained:
        """Move the model and return self. Raises `UserError` for one in ONNX files, which stays on the CPU."""
        if isinstance(self.model, OnnxModel) and torch.device(device).type != "cpu":
            raise UserError(f"to: {device}, but a model in ONNX files is computed on the CPU. Load the checkpoint")
        self.model.to(device)
        return self

    def fill_mask(self, texts: Sequence[str], top_k: int = 5, batch_size: int = 32) -> Answers:
        """Return for each text with `[MASK]` in it `{"text", "masks": [[{"token", "probability"}, ...], ...]}`.

        Texts longer than the model's positions are cut.
        """
        self._require("fill_mask", "mlm")
        COUNT.check("top_k", top_k)

        def answer(part: list[str]) -> Answers:
            return fill_masks(self.model, self.tokenizer, self._lines(part), top_k)

        return self._answers(given_texts(texts), batch_size, answer)

    def encode(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Return one vector per text, float32 [N, D]: the mean of the encoder's last hidden states over its tokens.

        A model of any task has them. Texts longer than the model's positions are cut.
        """
        vectors = self._answers(given_texts(texts), batch_size, lambda part: self._mean(self._lines(part)))
        return torch.stack(vectors).cpu() if vectors else torch.empty(0, self.model.config.hidden_size)

    def classify(self, texts: Sequence[str | Sequence[str]], batch_size: int = 32) -> Answers:
        """Return for each text, or each pair of a model that was trained on pairs, `{"text", "label", "probability"}`.

        A model for several labels gives `{"text", "labels": [{"label", "probability"}, ...]}`, best first, one for
        numbers `{"text", "values": [...]}`. The end of texts longer than in training is cut.
        """
        self._require("classify", "classification")
        groups = given_groups(texts, self.metadata.texts)
        problem, threshold = self.metadata.problem or "single", self.metadata.threshold

        def answer(part: list[list[str]]) -> Answers:
            batch = encode_groups(part, self.tokenizer, self.max_length)[0].to(self.model.device)
            return classify(self.model, batch, problem, 0.5 if threshold is None else threshold)

        return self._answers(groups, batch_size, answer)

    def tag(self, sentences: Sequence[str | Sequence[str]], batch_size: int = 32) -> Answers:
        """Return for each sentence, a text with spaces between its words or a list of words, its tags.

        `{"tokens", "labels", "text"}`, where the text has the tagged spans in brackets. Words beyond the length of the
        training are O.
        """
        decoder = self._decoder("tag", "tagging")

        def answer(part: list[Sentence]) -> Answers:
            batch = word_batch(part, self.tokenizer, self.max_length, "tokens").to(self.model.device)
            return tag_sentences(self.model, decoder, batch)

        return self._answers(given_sentences(sentences), batch_size, answer)

    def label_roles(
        self, sentences: Sequence[str | Sequence[str] | Mapping[str, Any]], batch_size: int = 32
    ) -> Answers:
        """Return the arguments of each predicate: `{"tokens", "predicate", "labels", "text"}`.

        A sentence is a text with spaces between its words, a list of words, or `{"tokens": [...], "predicate": 1}`.
        Where no predicate is given all are found, and each has an answer; without any it is one with `None`.
        """
        decoder, mark = self._decoder("label_roles", "srl"), self.metadata.mark or "tokens"
        return self._answers(
            given_sentences(sentences), batch_size,
            lambda part: label_roles(self.model, decoder, part, self.tokenizer, self.max_length, mark),
        )  # fmt: skip

    def translate(
        self, texts: Sequence[str], beams: int | None = None, batch_size: int = 128, **generation: Any
    ) -> Answers:
        """Return `{"source", "output", "score"}` for each text.

        `beams` and further settings of `GenerationConfig` (such as `length_penalty`) are by default as in
        training. Texts longer than in training are cut.
        """
        return self._generate("translate", texts, batch_size, {**generation, "beams": beams})

    def summarize(
        self, texts: Sequence[str], beams: int | None = None, batch_size: int = 128, **generation: Any
    ) -> Answers:
        """Return `{"source", "output", "score"}` for each text; see `translate`."""
        return self._generate("summarize", texts, batch_size, {**generation, "beams": beams})

    def export(
        self, folder: str | Path, format: Format = "hf", quantize: Scheme | None = None,
        exceptions: Sequence[str] = (), seen: Sequence[Seen] = (),
    ) -> None:  # fmt: skip
        """Write a folder with the model and its tokenizer.

        A tokenizer of targets alone goes to its subfolder `target_tokenizer`.

        Args:
            folder: The folder, which is created.
            format: hf: `config.json` and `model.safetensors` of Hugging Face. onnx: `model.onnx`, or
                `encoder_model.onnx` and `decoder_model.onnx`, which onnxruntime computes and `leanbert.load` loads.
                sparse: `leanbert.json` and `model.safetensors`, in which zeros take one bit, for `leanbert.load`.
            quantize: `int8`, `int4`, or `int8_int4`: products in 8 bits, embeddings in 4; onnx only.
            exceptions: Layers that stay in 32 bits, such as `encoder.blocks.0.attention.qkv`.
            seen: Of each batch a tuple of rows of one document each, for a decoder the targets' too: of what is
                computed of them `int8_static` takes the ranges.

        Raises:
            UserError: No class of transformers expresses the model, or onnxruntime computes something else; the folder
                has a model in another format, of which a file would be replaced; an exception is not quantized.

        """
        write_folder(self, folder, format, quantize, exceptions, seen)

    def _require(self, method: str, task: str) -> None:
        if self.task != task:
            raise UserError(f"{method}: this is a model of task {self.task}. Call {METHODS[self.task]}, or encode")

    def _generate(self, method: str, texts: Sequence[str], batch_size: int, changes: dict[str, Any]) -> Answers:
        """Generate with texts of about the same length together, and answer in their order."""
        self._require(method, "seq2seq")
        changes = {name: value for name, value in changes.items() if value is not None}
        known = {field.name for field in fields(GenerationConfig)}
        if strange := sorted(changes.keys() - known):
            raise UserError(f"{strange[0]}: no setting of generation. There are {', '.join(sorted(known))}")
        stored = {name: value for name, value in (self.metadata.generation or {}).items() if name in known}
        config = replace(GenerationConfig(**stored), **changes)
        texts = given_texts(texts)
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))

        def answer(part: list[str]) -> Answers:
            batch, _ = encode_lines(part, self.tokenizer, self.max_length, masks=False)
            return generate_texts(self.model, self.target_tokenizer, batch.to(self.model.device), config)

        found = dict(zip(order, self._answers([texts[index] for index in order], batch_size, answer), strict=True))
        return [found[index] for index in range(len(texts))]

    @torch.inference_mode()
    def _answers(
        self, items: list[Item], batch_size: int, answer: Callable[[list[Item]], Iterable[One]]
    ) -> list[One]:  # fmt: skip
        COUNT.check("batch_size", batch_size)
        return [each for part in in_batches(items, batch_size) for each in answer(part)]

    def _lines(self, texts: list[str]) -> PredictBatch:
        masks = self.task == "mlm"
        batch, _ = encode_lines(texts, self.tokenizer, self.model.config.max_positions, masks=masks)
        return batch.to(self.model.device)

    def _mean(self, batch: PredictBatch) -> Tensor:
        hidden = self.model.encode(batch.inputs)  # [B, S, D]
        real = batch.inputs.real.unsqueeze(-1)  # [B, S, 1]
        return (hidden * real).sum(1).float() / real.sum(1)

    def _decoder(self, method: str, task: str) -> BioDecoder:
        self._require(method, task)
        try:
            return BioDecoder(self.model.labels)
        except ValueError as error:
            raise UserError(f"{method}: {error}. Load a model with such labels") from None


def load(path: str | Path, weights: Weights = "dense") -> Pretrained:
    """Load a trained model of any task. Nothing in its files is executed.

    Args:
        path: A run's folder (its best checkpoint is taken), a checkpoint, or a folder that `export` has written.
        weights: sparse: linear layers that are smaller so, of any path but ONNX files, hold only what is not zero
            (`SparseLinear`).

    Raises:
        UserError: The path is none of these, or is damaged; no layer would be smaller with sparse weights.

    """
    if weights not in get_args(Weights):
        raise UserError(f"weights: {weights!r} is unknown. Give {' or '.join(get_args(Weights))}")
    path = expand(path, "path")
    stored: Stored | OnnxModel
    if holds_onnx(path):
        stored = read_onnx(path)
    else:
        if not holds_model(path):
            if (path / "checkpoints").is_dir():
                run = Run(path)
                path = best if (best := run.checkpoints / BEST).is_file() else run.find("last").path
            if not path.is_file() and not holds_shards(path):
                raise UserError(f"{path}: no run, checkpoint or exported folder. Give the path of one.")
        stored = read_model(path)
    tokenizer, targets = TextTokenizer.from_file(path), None
    if stored.metadata.target_vocab_size is not None:
        if path.is_dir() and not (path / TARGET).is_dir() and not holds_shards(path):
            raise UserError(
                f"{path}: the decoder has tokens of its own, but there is no {TARGET} with them. Save it there"
            )
        targets = TextTokenizer.from_file(path, TARGET)
    if isinstance(stored, OnnxModel):
        if weights == "sparse":
            raise UserError(f"weights: sparse, but {path} is in ONNX files. Load the checkpoint that they are of")
        check_tokens(stored, path, tokenizer.vocab_size, None if targets is None else targets.vocab_size)
        return Pretrained(stored, tokenizer, stored.metadata, targets)
    model = rebuild(stored, tokenizer.vocab_size, None if targets is None else targets.vocab_size)
    if weights == "sparse":
        make_sparse(model)
    return Pretrained(model, tokenizer, stored.metadata, targets)
