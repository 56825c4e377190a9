"""Sentences of words with a tag each: named entities and the like, and the roles of a predicate's arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from leanbert.data.batches.sentences import Mark, Sentence
from leanbert.data.formats.conll import read_columns, read_roles
from leanbert.data.formats.span_labels import PREDICATE
from leanbert.data.labelled import LabelledData
from leanbert.data.sentence_reader import SentenceReader, Tagged
from leanbert.errors import UserError
from leanbert.ranges import WHOLE, Range

TAGS = ("tokens_field", "labels_field", "word_column", "label_names")
"""Settings by which words and tags are read."""


class TokenLabelData(LabelledData):
    """Sentences of words with a BIO tag each, such as named entities: .jsonl, or .conll files of columns.

    Args:
        tokens_field: JSON field of the list of words.
        labels_field: JSON field of the list of tags.
        word_column: Column of the word in .conll files, counted from 0.
        label_column: Column of the tag in .conll files; negative ones count from the last.
        settings: See `LabelledData`.

    """

    sample = "srl"
    of_words: ClassVar = True
    read_by: ClassVar = (*TAGS, "label_column")
    mark: Mark = "tokens"

    def __init__(
        self,
        tokens_field: str = "tokens",
        labels_field: str = "labels",
        word_column: int = 0,
        label_column: int = -1,
        **settings: Any,
    ) -> None:
        WHOLE.check("data.word_column", word_column)
        Range(whole=True).check("data.label_column", label_column)
        super().__init__(
            tokens_field=tokens_field, labels_field=labels_field, word_column=word_column, label_column=label_column,
            **settings,
        )  # fmt: skip

    @property
    def reader(self) -> SentenceReader:
        """How sentences are read and encoded."""
        return SentenceReader(self.hparams, self._columns, self.named)

    def _columns(self, files: Sequence[str]) -> Iterator[Tagged]:
        for where, rows in read_columns(files, (self.hparams["word_column"], self.hparams["label_column"])):
            yield where, Sentence([row[0] for row in rows]), [row[1] for row in rows]


class SemanticRoleData(LabelledData):
    """Sentences with a predicate and the BIO tags of its arguments: .jsonl, or .conll files as of CoNLL-2005 and 2012.

    Args:
        tokens_field: JSON field of the list of words.
        labels_field: JSON field of the list of tags.
        predicate_field: JSON field of the predicate's place among the words.
        mark: How the model sees the predicate: between two separator tokens, or by segment 1 (with an encoder that
            has segments).
        find_predicates: Train also to find the predicates, in sentences without a mark, so that `predict` takes plain
            text.
        word_column: Column of the word in .conll files, counted from 0: 3 in CoNLL-2012, 0 in CoNLL-2005.
        role_columns: First column of roles in .conll files, one column for each predicate, in brackets as (A0* and *).
        last_column: Whether the last column holds roles as well (CoNLL-2005), or coreference (CoNLL-2012).
        settings: See `LabelledData`.

    """

    sample = "srl"
    of_words: ClassVar = True
    fixed: ClassVar = (*LabelledData.fixed, "mark", "find_predicates")
    read_by: ClassVar = (*TAGS, "predicate_field", "mark", "find_predicates", "role_columns", "last_column")

    def __init__(
        self,
        tokens_field: str = "tokens",
        labels_field: str = "labels",
        predicate_field: str = "predicate",
        mark: Mark = "tokens",
        find_predicates: bool = True,
        word_column: int = 3,
        role_columns: int = 11,
        last_column: bool = False,
        **settings: Any,
    ) -> None:
        WHOLE.check("data.word_column", word_column)
        WHOLE.check("data.role_columns", role_columns)
        super().__init__(
            tokens_field=tokens_field, labels_field=labels_field, predicate_field=predicate_field, mark=mark,
            find_predicates=find_predicates, word_column=word_column, role_columns=role_columns,
            last_column=last_column, **settings,
        )  # fmt: skip

    @property
    def mark(self) -> Mark:
        """How the predicate is marked."""
        return self.hparams["mark"]

    @property
    def reader(self) -> SentenceReader:
        """How sentences are read and encoded."""
        return SentenceReader(self.hparams, self._columns, self.named)

    def _columns(self, files: Sequence[str]) -> Iterator[Tagged]:
        layout = (self.hparams[name] for name in ("word_column", "role_columns", "last_column"))
        for where, words, labels in read_roles(files, *layout):
            if f"B-{PREDICATE}" not in labels:
                raise UserError(f"{where}: no (V*) in a column of roles. Set data.role_columns to the first of them")
            yield where, Sentence(words, labels.index(f"B-{PREDICATE}")), labels
