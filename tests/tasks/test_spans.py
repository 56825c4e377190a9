from __future__ import annotations

import itertools
import random
import warnings

import pytest
import torch
from seqeval.metrics.v1 import precision_recall_fscore_support
from seqeval.scheme import IOB2

from leanbert.data.formats.span_labels import Argument, Span, arguments, spans
from leanbert.tasks.spans import OTHER_ROLES, BioDecoder, SpanScore, score_spans

LABELS = ["I-B", "O", "B-A", "B-B", "I-A", "B-C", "I-D"]  # no I-C, and an I-D that nothing can begin


def test_spans_are_a_beginning_and_what_follows_it_without_a_gap():
    found = spans(["B-A", "I-A", "O", "I-A", "B-B", "B-B", "I-A", "I-B", "B-C-A", "I-C-A"])
    assert found == [Span("A", 0, 2), Span("B", 4, 5), Span("B", 5, 6), Span("C-A", 8, 10)]
    assert spans([]) == spans(["O", "I-A"]) == []


def test_continuations_join_the_last_argument_of_their_role():
    found = arguments(["B-A", "B-B", "B-C-A", "I-C-A", "O", "B-A", "B-C-B", "B-C-A", "B-C-R-A", "B-R-A", "B-C-R-A"])
    assert found == [
        Argument("A", ((0, 1), (2, 4))),
        Argument("B", ((1, 2), (6, 7))),
        Argument("A", ((5, 6), (7, 8))),  # the second A is the last one
        Argument("R-A", ((8, 9),)),  # nothing to continue: an argument itself
        Argument("R-A", ((9, 10), (10, 11))),
    ]


def _best_by_brute_force(scores, labels):
    legal = [path for path in itertools.product(range(len(labels)), repeat=len(scores)) if _legal(path, labels)]
    return max(legal, key=lambda path: sum(float(scores[word, label]) for word, label in enumerate(path)))


def _legal(path, labels):
    tags = ["O", *(labels[index] for index in path)]
    return all(after[0] != "I" or before in (after, f"B-{after[2:]}") for before, after in itertools.pairwise(tags))


def test_decoding_equals_brute_force():
    torch.manual_seed(1)
    lengths = [5, 1, 3, 5, 4, 2, 5, 5]
    scores = torch.randn(len(lengths), 5, len(LABELS), dtype=torch.float64)
    scores[:, :, [0, 4, 6]] += 1.5  # draw towards what is often illegal
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    chosen = BioDecoder(LABELS).decode(scores, valid)
    assert chosen.dtype == torch.int64
    for row, length in enumerate(lengths):
        assert tuple(chosen[row, :length].tolist()) == _best_by_brute_force(scores[row, :length], LABELS)
        assert chosen[row, length:].tolist() == [-100] * (5 - length)
    assert [tuple(row[:5]) for row in scores.argmax(-1).tolist() if _legal(row, LABELS)] == []  # a rule was needed


def test_what_is_no_word_is_passed_over_wherever_it_stands():
    torch.manual_seed(2)
    scores = torch.randn(4, 6, len(LABELS))
    valid = torch.tensor([[0, 1, 1, 0, 1, 1]] * 4, dtype=torch.bool)
    decoder = BioDecoder(LABELS)
    gapped = decoder.decode(scores, valid)
    dense = decoder.decode(scores[:, [1, 2, 4, 5]], torch.ones(4, 4, dtype=torch.bool))
    assert gapped[valid].tolist() == dense.flatten().tolist()
    assert (gapped[~valid] == -100).all()
    assert decoder.decode(scores, torch.zeros_like(valid)).eq(-100).all()
    assert decoder.decode(scores[:, :0], valid[:, :0]).shape == (4, 0)


def test_scores_in_16_bits_are_summed_in_32():
    scores = torch.zeros(1, 300, 2, dtype=torch.bfloat16)
    scores[0, :, 0] = 1.0  # 257 is no bfloat16: the sum of 300 ones would stop at 256
    scores[0, 299, 1] = 2.0
    chosen = BioDecoder(["O", "B-A"]).decode(scores, torch.ones(1, 300, dtype=torch.bool))
    assert chosen[0].tolist() == [0] * 299 + [1]


@pytest.mark.parametrize("labels", [["O", "A"], ["O", "O"], ["I-A"], ["O", "B-"]])
def test_labels_that_cannot_be_decoded_are_refused(labels):
    with pytest.raises(ValueError, match=r"label"):
        BioDecoder(labels)


def _random_sentences(seed, tags):
    generator = random.Random(seed)
    return [generator.choices(tags, k=generator.randint(1, 12)) for _ in range(200)]


@pytest.mark.parametrize("seed", range(3))
def test_the_strict_count_equals_seqeval(seed):
    tags = ["O", "B-A", "I-A", "I-A", "B-B", "I-B", "B-C-A", "I-C-A", "B-D"]  # any order: illegal sequences too
    gold = _random_sentences(seed, tags)
    generator = random.Random(seed)
    guess = [[tag if generator.random() < 0.8 else generator.choice(tags) for tag in row] for row in gold]
    scores = score_spans(guess, gold, tags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"scheme": IOB2, "zero_division": 0}
        micro = precision_recall_fscore_support(gold, guess, average="micro", **options)
        by_role = precision_recall_fscore_support(gold, guess, average=None, **options)
    assert list(scores.roles) == ["A", "B", "C-A", "D"]
    assert 0.2 < scores.overall.f1 < 0.9
    assert micro[:3] == pytest.approx((scores.overall.precision, scores.overall.recall, scores.overall.f1))
    for place, score in enumerate(scores.roles.values()):
        expected = [column[place] for column in by_role]
        assert expected == pytest.approx([score.precision, score.recall, score.f1, score.gold])


# gold, predicted, and what srl-eval.pl counts: role: (correct, predicted, gold)
CONLL_2005 = {
    "all right, V does not count": ("B-A B-V O B-B I-B", "B-A B-V O B-B I-B", {"A": (1, 1, 1), "B": (1, 1, 1)}),
    "V wrong does not count": ("B-A B-V O", "B-A O B-V", {"A": (1, 1, 1)}),
    "C-V belongs to V": ("B-V B-A B-C-V", "B-V B-A O", {"A": (1, 1, 1)}),
    "C-V without V is V": ("B-V O O", "B-C-V O B-C-V", {}),
    "two pieces right": ("B-A O B-C-A I-C-A", "B-A O B-C-A I-C-A", {"A": (1, 1, 1)}),
    "second piece missed": ("B-A O B-C-A I-C-A", "B-A O O O", {"A": (0, 1, 1)}),
    "second piece too short": ("B-A O B-C-A I-C-A", "B-A O B-C-A O", {"A": (0, 1, 1)}),
    "piece as an argument of its own": ("B-A O B-C-A", "B-A O B-A", {"A": (0, 2, 1)}),
    "piece too many": ("B-A O O", "B-A O B-C-A", {"A": (0, 1, 1)}),
    "same ends, other pieces": ("B-A O B-C-A O B-C-A", "B-A O O O B-C-A", {"A": (0, 1, 1)}),
    "continuation of another role is an argument": ("B-A O B-B", "B-A O B-C-B", {"A": (1, 1, 1), "B": (1, 1, 1)}),
    "C-X before X begins an X": ("B-A O B-A", "B-C-A O B-A", {"A": (2, 2, 2)}),
    "C-X continues the last X": ("B-A B-A O B-C-A", "B-A B-A O B-C-A", {"A": (2, 2, 2)}),
    "pieces split in two": ("B-A B-C-A", "B-A I-A", {"A": (0, 1, 1)}),
    "reference is a role": ("B-A B-R-A B-V", "B-A B-A B-V", {"A": (1, 2, 1), "R-A": (0, 0, 1)}),
    "nothing predicted": ("B-A B-V B-B", "O B-V O", {"A": (0, 0, 1), "B": (0, 0, 1)}),
    "role wrong": ("B-A I-A B-V", "B-B I-B B-V", {"A": (0, 0, 1), "B": (0, 1, 0)}),
}
ALL_TAGS = [f"{prefix}-{role}" for role in ("A", "B", "C-A", "C-B", "R-A", "V", "C-V") for prefix in "BI"]


@pytest.mark.parametrize("case", CONLL_2005)
def test_counts_follow_the_rules_of_the_conll_2005_script(case):
    gold, guess, expected = CONLL_2005[case]
    scores = score_spans([guess.split()], [gold.split()], ALL_TAGS, join_continuations=True, ignored=["V"])
    assert scores.roles == expected


def test_the_overall_score_is_the_micro_average():
    gold, guess = ([case[column].split() for case in CONLL_2005.values()] for column in (0, 1))
    overall = score_spans(guess, gold, ALL_TAGS, join_continuations=True, ignored=["V"]).overall
    assert overall == SpanScore(correct=12, predicted=21, gold=22)
    assert overall.precision == pytest.approx(12 / 21)
    assert overall.recall == pytest.approx(12 / 22)
    assert overall.f1 == pytest.approx(2 * 12 / 43)
    nothing = score_spans([], [], ALL_TAGS)
    assert nothing == ((0, 0, 0), {})
    assert nothing.overall.f1 == nothing.overall.precision == 0.0


def test_roles_never_seen_in_training_are_missed_spans():
    guess, gold = [["B-A", "O", "O", "B-C-B"]], [["B-A", "B-R-X", "B-Y", "B-B"]]
    scores = score_spans(guess, gold, ["O", "B-A", "I-A", "B-C-B"], join_continuations=True)
    assert scores.roles == {"A": (1, 1, 1), "B": (1, 1, 1), OTHER_ROLES: (0, 0, 2)}  # an orphan C-B is a B
    assert list(scores.roles) == ["A", "B", OTHER_ROLES]
    assert scores.overall.recall == 0.5


def test_roles_to_ignore_can_be_chosen():
    tags = ["B-V", "B-A"]
    rows = [["B-V", "B-A"]]
    for join, ignored, expected in ((False, [], 2), (False, ["V"], 1), (True, ["V"], 1), (True, [], 2)):
        assert score_spans(rows, rows, tags, join, ignored).overall.correct == expected


def test_tags_of_another_length_are_refused():
    with pytest.raises(ValueError, match="1 predicted tags of 2 words"):
        score_spans([["O"]], [["O", "O"]], ["B-A"])
