"""Texts and pairs of texts as ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from leanbert.data.batches.batch import PredictBatch
from leanbert.data.batches.labelled import Encoded, pad_encoded
from leanbert.data.formats.examples import check_count
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.models.packed_inputs import PackedInputs


def encode_texts(texts: list[list[str]], tokenizer: TextTokenizer, length: int) -> list[Encoded]:
    """Encode single texts, or pairs, in the tokenizer's template; the labelled place is the first.

    A pair is `before a after b after` with segments 0 and 1, as `[CLS] a [SEP] b [SEP]`; of one that is too long the
    longer text is cut first.
    """
    before, after = tokenizer.template
    flat = iter(tokenizer.encode_bare([text for group in texts for text in group]))
    found = []
    for group in texts:
        whole = [next(flat) for _ in group]
        frame = len(before) + len(after) * len(group)
        needed, room = frame + sum(map(len, whole)), max(0, length - frame)
        pieces = [ids[:room] for ids in whole]
        while sum(map(len, pieces)) > room:
            max(pieces, key=len).pop()
        ids, segments = list(before), [0] * len(before)
        for number, piece in enumerate(pieces):
            ids += [*piece, *after]
            segments += [number] * (len(piece) + len(after))
        found.append(Encoded(ids, segments, [0], needed))
    return found


def given_list(values: Sequence[Any]) -> list[Any]:
    """Return what a program gives as a list. Raises `UserError` for one text alone."""
    if isinstance(values, str):
        raise UserError(f"{values[:40]!r} is one text. Give a list of texts")
    return list(values)


def given_texts(values: Sequence[Any]) -> list[str]:
    """Return the texts that a program gives. Raises `UserError`, naming it by its number, for what is none."""
    texts = given_list(values)
    for number, value in enumerate(texts):
        if not isinstance(value, str):
            raise UserError(f"text {number}: {value!r:.40} is no text. Give a str")
    return texts


def given_groups(values: Sequence[Any], trained: int | None) -> list[list[str]]:
    """Return the texts and pairs of texts that a program gives. Raises as `given_texts` and `check_count`."""
    groups = []
    for number, value in enumerate(given_list(values)):
        group = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
        if len(group) not in (1, 2) or not all(isinstance(text, str) for text in group):
            raise UserError(f"text {number}: {value!r:.40} is neither a text nor a pair of texts. Give one of them")
        check_count(f"text {number}", group, trained, "Give such")
        groups.append(group)
    return groups


def encode_groups(groups: list[list[str]], tokenizer: TextTokenizer, length: int) -> tuple[PredictBatch, int]:
    """Return texts and pairs of texts as a padded batch [B, S <= length], and how many were cut to fit."""
    encoded = encode_texts(groups, tokenizer, length)
    rows = pad_encoded(encoded, tokenizer.pad_id)
    texts = ["\t".join(group) for group in groups]
    return PredictBatch(PackedInputs.from_arrays(*rows), texts), sum(one.needed > length for one in encoded)
