"""Tags of words: spans such as named entities, and the arguments of predicates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from leanbert.data.batches.batch import IGNORED, LabelledBatch, WordBatch
from leanbert.data.batches.sentences import Mark, Sentence, word_batch
from leanbert.data.formats.span_labels import OUTSIDE, PREDICATE, TO_FIND, spans
from leanbert.data.settings import Part
from leanbert.data.token_labels import SemanticRoleData
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.models.classifier import Classifier
from leanbert.tasks.base import Answer
from leanbert.tasks.labelling import Labelling, gather_documents
from leanbert.tasks.spans import BioDecoder, SpanScores, score_spans
from leanbert.tasks.tables import markdown_table

Sentences = list[tuple[list[int], list[int], list[int]]]
"""Predicted tags, true tags, and the tags of words that were cut, of each sentence."""
Tagged = list[tuple[list[str], list[str]]]
"""Predicted and true tags of all words of each sentence."""


class TokenClassification(Labelling[Sentences]):
    """Give each word a tag by its first piece; the best legal sequence of BIO tags is chosen (Viterbi)."""

    name: ClassVar[str] = "tagging"
    of: ClassVar = "word"
    example: ClassVar[str] = "The cook gave the guest a cake yesterday ."

    def build_metrics(self) -> None:
        """Make the decoder besides."""
        super().build_metrics()
        self.decoder = BioDecoder(self._data.labels)

    def predictions(self, scores: Tensor, batch: LabelledBatch) -> Tensor:
        """Return the tags of the best legal sequences of each document, int64 [B, M]."""
        documents = gather_documents(batch)
        begins = documents != documents.roll(1, dims=1)
        begins[:, 0] = True
        scores = scores.float().masked_fill(begins[..., None] & self.decoder.inside, -torch.inf)
        return self.decoder.decode(scores, batch.targets != IGNORED)

    def kept(self, scores: Tensor, batch: LabelledBatch) -> Sentences:
        """Return the tags of each sentence; see `sentences_of`."""
        return list(sentences_of(self.predictions(scores, batch), batch.targets, gather_documents(batch), batch.cut))

    def evaluate(self, part: Part, kept: list[Sentences]) -> dict[str, float]:
        """Return precision, recall and F1 of spans, over all and by role, and how many words were cut, if any were.

        Words that were cut are predicted to be in no span, as in answers.
        """
        names = self._data.names(part)
        tagged = [
            ([*(names[tag] for tag in guess), *(OUTSIDE for _ in cut)], [names[tag] for tag in (*truth, *cut)])
            for sentences in kept
            for guess, truth, cut in sentences
        ]
        words = self._data.cache(part).notes.cut_words
        return {**self.scores(tagged), **({"cut_words": float(words)} if words else {})}

    def scores(self, tagged: Tagged) -> dict[str, float]:
        """Return the metrics by name."""
        return by_name(self.counted(tagged))

    def counted(self, tagged: Tagged, join_continuations: bool = False, ignored: Collection[str] = ()) -> SpanScores:
        """Return the scores of spans; see `score_spans`."""
        predicted, gold = [guess for guess, _ in tagged], [truth for _, truth in tagged]
        return score_spans(predicted, gold, self.model.labels, join_continuations, ignored)

    def predict_step(self, batch: WordBatch, batch_idx: int) -> list[Answer]:
        """Return `{"tokens", "labels", "text"}` for each sentence."""
        return tag_sentences(self.model, self.decoder, batch)

    def samples(self, batch: LabelledBatch) -> dict[str, str]:
        """Return a table of sentences with their spans in brackets, the true ones and the ones that the model finds."""
        guesses = self.predictions(self(batch), batch).cpu()
        names = self._data.names("val")
        rows = []
        for row in range(len(batch)):
            part = slice(row, row + 1)
            kept = (guesses[part], batch.targets[part], gather_documents(batch)[part])
            for words, (guess, truth, _) in zip(self._words(batch, row), sentences_of(*kept), strict=True):
                rows.append([bracketed(words, [names[tag] for tag in tags]) for tags in (truth, guess)])
        return {"samples/labels": markdown_table(("truth", "model"), rows[:12])}

    def _words(self, batch: LabelledBatch, row: int) -> list[list[str]]:
        """Return the words of each sentence of a row, as the tokenizer spells them."""
        places = batch.target_index[row][batch.targets[row] != IGNORED].tolist()
        ids, documents = batch.inputs.input_ids[row].tolist(), batch.inputs.document_ids[row].tolist()
        sentences: dict[int, list[str]] = {}
        for place, following in zip(places, [*places, len(documents)][1:], strict=True):
            pieces = [ids[at] for at in range(place, following) if documents[at] == documents[place]]
            sentences.setdefault(documents[place], []).append(self._data.tokenizer.decode(pieces).strip())
        return list(sentences.values())


class SemanticRoleLabelling(TokenClassification):
    """Find the arguments of a predicate (Shi and Lin 2019, arXiv 1904.05255) and, in unmarked sentences, predicates.

    F1 is counted as by CoNLL-2005: strict, pieces of an argument joined, the predicate itself left out.
    """

    name: ClassVar[str] = "srl"
    _data: SemanticRoleData

    def scores(self, tagged: Tagged) -> dict[str, float]:
        """Return the metrics of arguments, and of predicates if there were sentences in which to find them."""
        with_predicate, without = (
            [pair for pair in tagged if (f"B-{TO_FIND}" in pair[1]) is to_find] for to_find in (False, True)
        )
        roles = self.counted(with_predicate, join_continuations=True, ignored=(PREDICATE, TO_FIND))
        predicates = self.counted(without)
        found = overall(predicates) if predicates.roles else {}
        return {**by_name(roles), **{f"predicate_{name}": value for name, value in found.items()}}

    def predict_step(self, batch: WordBatch, batch_idx: int) -> list[Answer]:
        """Return `{"tokens", "predicate", "labels", "text"}` for each predicate; those not given are found first."""
        data = self._data
        return label_roles(
            self.model, self.decoder, batch.sentences, data.tokenizer, data.hparams["max_length"], data.mark
        )


def by_name(scores: SpanScores) -> dict[str, float]:
    """Return the scores by name; a role has `f1_role/NAME`."""
    roles = {f"f1_role/{role}": score.f1 for role, score in scores.roles.items()}
    return {**overall(scores), **roles}


def overall(scores: SpanScores) -> dict[str, float]:
    """Return F1, precision and recall over all roles."""
    score = scores.overall
    return {"f1": score.f1, "precision": score.precision, "recall": score.recall}


def sentences_of(
    guesses: Tensor, truths: Tensor, documents: Tensor, cut: Sequence[Sequence[list[int]]] = ()
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Yield (predicted tags, true tags, tags of words that were cut) of each document of packed rows.

    The tensors are int64 [B, M]; `cut` has the last by row and document, or is empty.
    """
    rows = zip(guesses.tolist(), truths.tolist(), documents.tolist(), cut or [[]] * len(guesses), strict=True)
    for guess, truth, document, beyond in rows:
        found: dict[int, tuple[list[int], list[int], list[int]]] = {
            number: ([], [], tags) for number, tags in enumerate(beyond)
        }
        for one, other, number in zip(guess, truth, document, strict=True):
            if number >= 0:
                tags = found.setdefault(number, ([], [], []))
                tags[0].append(one)
                tags[1].append(other)
        yield from found.values()


def tag(model: Classifier, decoder: BioDecoder, batch: WordBatch) -> list[list[str]]:
    """Return the tags of each sentence; words that did not fit are O."""
    scores = model(batch.inputs, batch.target_index)
    best = decoder.decode(scores.float(), batch.targets != IGNORED).tolist()
    found = [[model.labels[tag] for tag in row if tag != IGNORED] for row in best]
    return [
        tags + [OUTSIDE] * (len(sentence.tokens) - len(tags))
        for sentence, tags in zip(batch.sentences, found, strict=True)
    ]


def tag_sentences(model: Classifier, decoder: BioDecoder, batch: WordBatch) -> list[Answer]:
    """Return `{"tokens", "labels", "text"}` for each sentence."""
    return [
        {"tokens": sentence.tokens, "labels": labels, "text": bracketed(sentence.tokens, labels)}
        for sentence, labels in zip(batch.sentences, tag(model, decoder, batch), strict=True)
    ]


def label_roles(
    model: Classifier,
    decoder: BioDecoder,
    sentences: Sequence[Sentence],
    tokenizer: TextTokenizer,
    length: int,
    mark: Mark,
) -> list[Answer]:
    """Return `{"tokens", "predicate", "labels", "text"}` for each predicate of each sentence, in order.

    Sentences without a predicate are looked at first, and those in which none is found have no answer but
    `"predicate": null` with all tags O.
    """
    device = model.device

    def tags(some: Sequence[Sentence]) -> list[list[str]]:
        return tag(model, decoder, word_batch(some, tokenizer, length, mark).to(device)) if some else []

    unmarked = [sentence for sentence in sentences if sentence.predicate is None]
    found = iter(tags(unmarked))
    marked: list[Sentence] = []
    for sentence in sentences:
        if sentence.predicate is not None:
            marked.append(sentence)
        else:
            places = [place for place, label in enumerate(next(found)) if label == f"B-{TO_FIND}"]
            marked += [Sentence(sentence.tokens, place) for place in places] or [sentence]
    roles = iter(tags([sentence for sentence in marked if sentence.predicate is not None]))
    answers = []
    for sentence in marked:
        labels = ["O"] * len(sentence.tokens) if sentence.predicate is None else next(roles)
        answers.append(
            {"tokens": sentence.tokens, "predicate": sentence.predicate, "labels": labels,
             "text": bracketed(sentence.tokens, labels)}
        )  # fmt: skip
    return answers


def bracketed(tokens: Sequence[str], labels: Sequence[str]) -> str:
    """Return the sentence with its spans in brackets, as `[ARG0 The cook] [V gave] ...`."""
    begins = {span.start: span for span in spans(labels)}
    words, place = [], 0
    while place < len(tokens):
        span = begins.get(place)
        end = place + 1 if span is None else span.end
        text = " ".join(tokens[place:end])
        words.append(text if span is None else f"[{span.role} {text}]")
        place = end
    return " ".join(words)
