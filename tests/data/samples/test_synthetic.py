from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter

import pytest

from leanbert.data.formats.span_labels import TagReader, spans
from leanbert.data.samples.synthetic import synthetic_roles, synthetic_translation
from leanbert.data.samples.translation import ADJECTIVES, NOUNS


@pytest.fixture(scope="module")
def pairs():
    return synthetic_translation()


@pytest.fixture(scope="module")
def roles():
    return synthetic_roles()


def _digest(data):
    return hashlib.blake2b(json.dumps(data).encode(), digest_size=6).hexdigest()


def test_the_seed_decides(pairs, roles):
    # figures that are published depend on these very sentences
    assert (_digest(pairs), _digest(roles)) == ("75f4d8fedaec", "387494493578")
    assert synthetic_translation(20, 5, 5, seed=0)["train"] == pairs["train"][:20]
    assert synthetic_translation(20, 5, 5, seed=1)["train"] != pairs["train"][:20]
    assert synthetic_roles(20, 5, 5, seed=1)["train"][:5] != roles["train"][:5]


def test_sizes(pairs, roles):
    assert {name: len(rows) for name, rows in pairs.items()} == {"train": 4000, "val": 200, "test": 200}
    assert {name: len(rows) for name, rows in roles.items()} == {"train": 3000, "val": 200, "test": 202}
    assert 120 <= len({word for row in pairs["train"] for word in row["source"].split()}) <= 160
    assert 130 <= len({word for row in roles["train"] for word in row["tokens"]}) <= 170


def test_no_sentence_is_in_two_splits(pairs, roles):
    sources = [row["source"] for rows in pairs.values() for row in rows]
    assert len(set(sources)) == len(sources)
    sentences = [{tuple(row["tokens"]) for row in rows} for rows in roles.values()]
    assert len(set.union(*sentences)) == sum(map(len, sentences))


def test_what_is_asked_for_was_in_training(pairs, roles):
    for rows, words in (
        (pairs, lambda row: (row["source"] + " " + row["target"]).split()),
        (roles, lambda r: r["labels"]),
    ):
        known = {word for row in rows["train"] for word in words(row)}
        unknown = [word for name in ("val", "test") for row in rows[name] for word in words(row) if word not in known]
        assert len(unknown) <= 3  # rare combinations of stem and endings


def test_the_toy_language_needs_reordering_and_agreement(pairs):
    by_source = {row["source"]: row["target"] for rows in pairs.values() for row in rows}
    nouns = {noun + ending for noun in NOUNS for ending in ("", "s")}
    articles, moved = Counter(), 0
    for source, target in by_source.items():
        words, translated = source.split(), target.split()
        assert (words[-1], translated[-1]) == (".", ".")
        articles.update(word for word, english in zip(translated, words, strict=False) if english == words[0] == "the")
        moved += any(word in ADJECTIVES and after in nouns for word, after in itertools.pairwise(words))
    assert len(articles) >= 4  # "the" at the beginning alone has several translations
    assert moved > len(by_source) / 2  # adjective and noun change places


def test_translations_by_hand(pairs):
    by_source = {row["source"]: row["target"] for row in pairs["train"]}
    # class a of "dog", class o of "road", plural -r, object -n; the(kules) dog(babab) old(sudev), two(firov)
    # road(vezul) happy(gobik), paint(fedut) in the past, plural like its subject
    painted = by_source["the old dogs painted two happy roads ."]
    assert painted == "kulesar bababar sudevar firovorn vezulorn gobikorn fedutivr ."
    # today(duber) comes first, not(babob) before the verb in the present
    assert by_source["the old dog does not sleep today ."] == "duber kulesa bababa sudeva babob bugekel ."
    # near(pozid) follows what it governs, which is no object
    assert by_source["he does not run near a strong king ."] == "vamak sonito vodino dekumo pozid babob kerunel ."


def test_labels_are_legal_and_mark_the_predicate(roles):
    for rows in roles.values():
        for row in rows:
            tokens, labels = row["tokens"], row["labels"]
            assert len(tokens) == len(labels)
            assert TagReader().read("", labels) == labels
            assert [index for index, label in enumerate(labels) if label.endswith("-V")] == [row["predicate"]]
            roles_found = [span.role for span in spans(labels)]
            assert len(set(roles_found)) == len(roles_found)  # one argument of a role


def test_all_roles_and_constructions_occur(roles):
    train = roles["train"]
    counts = Counter(span.role for row in train for span in spans(row["labels"]))
    assert set(counts) == {
        "V",
        "ARG0",
        "ARG1",
        "ARG2",
        "ARGM-TMP",
        "ARGM-LOC",
        "ARGM-NEG",
        "ARGM-MOD",
        "R-ARG0",
        "R-ARG1",
    }
    assert min(counts.values()) >= 50
    by_sentence = Counter(tuple(row["tokens"]) for row in train)
    assert sum(count > 1 for count in by_sentence.values()) > 500
    agents = [(row, span) for row in train for span in spans(row["labels"]) if span.role == "ARG0"]
    passive = [row for row, span in agents if row["tokens"][span.start] == "by"]
    assert len(passive) > 200
    assert all(row["predicate"] < row["labels"].index("B-ARG0") for row in passive)


def test_shared_words_have_a_label_for_each_predicate(roles):
    row = next(row for row in roles["train"] if "who" in row["tokens"] and "B-R-ARG0" in row["labels"])
    others = [other for other in roles["train"] if other["tokens"] == row["tokens"] and other is not row]
    who = row["tokens"].index("who")
    assert row["labels"][who - 1] == "I-ARG0"
    assert any(other["labels"][who - 1] == other["labels"][who] for other in others)  # all of it one argument
