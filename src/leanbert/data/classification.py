"""Texts, or pairs of texts, with their labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from leanbert.data.batches.batch import PredictBatch
from leanbert.data.batches.labelled import Encoded
from leanbert.data.batches.texts import encode_groups, encode_texts
from leanbert.data.formats.documents import document_hash
from leanbert.data.formats.examples import prediction_texts, read_records
from leanbert.data.formats.fields import text_of
from leanbert.data.labelled import LabelledData
from leanbert.data.labels import LabelReader, Numbering, Problem
from leanbert.data.settings import Part, given_files
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.models.stored import ModelMetadata


@dataclass(frozen=True)
class TextReader:
    """Reads and encodes the texts in some fields, one or two, with the label or labels in another."""

    fields: list[str]
    label: str
    trained: int
    """Texts of each example that the model was trained on."""

    def read(self, files: list[str], low: float, high: float) -> Iterator[tuple[str, list[str], Any]]:
        """Yield ("file:line", texts, label or labels as written) of the texts that hash to [low, high)."""
        for where, record in read_records(files, "data.train_files", (self.label,), self.fields):
            texts = [text_of(where, record, field) for field in self.fields]
            if low <= document_hash("\t".join(texts)) < high:
                yield where, texts, record[self.label]

    def texts(self, examples: Iterator[tuple[str, list[str], Any]]) -> Iterator[str]:
        """Yield both texts of each example."""
        return (text for _, texts, _ in examples for text in texts)

    def encode(self, examples: list[list[str]], tokenizer: TextTokenizer, length: int) -> list[Encoded]:
        """Encode texts and pairs of texts for rows of `length` tokens."""
        return encode_texts(examples, tokenizer, length)

    def inputs(self, files: list[str]) -> Iterator[list[str]]:
        """Yield texts, or pairs of them, between which a line has a tab."""
        return prediction_texts(files, self.fields, self.trained)

    def batch(self, inputs: list[list[str]], tokenizer: TextTokenizer, length: int) -> tuple[PredictBatch, int]:
        """Return texts as a batch, and how many were cut."""
        return encode_groups(inputs, tokenizer, length)


class ClassificationData(LabelledData):
    """Texts with labels, from .jsonl, .csv and .tsv files; by default which library a docstring is of.

    Args:
        problem: single: each text has one of the labels; multi: any number of them, a list or a text with "," between
            them, or a list that says of each label whether it is given (1.0 or 0.0, true or false); regression: a
            number, or a list of numbers.
        text_field: Field of the text.
        pair_field: Field of a second text, such as a hypothesis; unset: there is none.
        label_field: Field of the label or labels.
        settings: See `LabelledData`.

    """

    sample = "classification"
    fixed: ClassVar = (*LabelledData.fixed, "problem")
    read_by: ClassVar = ("problem", "text_field", "pair_field", "label_field", "label_names")

    def __init__(
        self,
        problem: Problem = "single",
        text_field: str = "text",
        pair_field: str | None = None,
        label_field: str = "label",
        **settings: Any,
    ) -> None:
        super().__init__(
            problem=problem, text_field=text_field, pair_field=pair_field, label_field=label_field, **settings
        )
        self._trained: int | None = None

    @property
    def problem(self) -> Problem:
        """What kind of labels there are."""
        return self.hparams["problem"]

    @property
    def slots(self) -> int:
        """Examples in a row, at most: short texts share one."""
        return max(1, int(self.hparams["max_length"]) // 8)

    @property
    def reader(self) -> TextReader:
        """How texts are read and encoded."""
        fields = [name for name in (self.hparams["text_field"], self.hparams["pair_field"]) if name is not None]
        return TextReader(fields, self.hparams["label_field"], self._trained or len(fields))

    def metadata(self, task: str) -> ModelMetadata:
        """Return besides how many texts an example has."""
        return replace(super().metadata(task), texts=len(self.reader.fields))

    def adopt(self, metadata: ModelMetadata) -> None:
        """Remember besides how many texts an example has that the model was trained on."""
        super().adopt(metadata)
        self._trained = metadata.texts

    def numbering(self, part: Part) -> Numbering:
        """Return a reader of the label field: what it means may depend on other examples."""
        files, train, read = self.files(part), given_files(self.hparams, "train"), self.reader.read

        def values() -> Iterator[Any]:
            return (value for some in (files, train) if some for _, _, value in read(some, 0.0, 1.0))

        return LabelReader(self.problem, self.hparams["label_field"], self.named, self.hparams["label_names"], values)
