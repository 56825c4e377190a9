import random

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from leanbert.tasks.output_metrics import OutputMetrics, bleu, bleu_signature, chrf

TEXT = """the a two men woman dog's ball red-haired street, plays runs over 3.5 km in 2016 "quoted" (green) &amp; it's
café Straße naïve U.S. end. 1,000 near and with it-self mid-air 50% of him; what? yes! Größe über e-mail"""
WORDS = TEXT.split()


def noisy(sentence: list[str], chance: random.Random, rate: float) -> str:
    """Drop, double, swap and change words, letters too."""
    words = []
    for word in sentence:
        drawn = chance.random()
        if drawn < rate:
            words += chance.choice([[], [word, word], [chance.choice(WORDS)], [word[::-1]], [word.upper()]])
        else:
            words.append(word)
    if len(words) > 2 and chance.random() < rate:
        place = chance.randrange(len(words) - 1)
        words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)


def made_up(references: int | None, count=500, rate=0.3):
    """Outputs with `references` references each, or 1 to 4 of them; some outputs are empty, some much too long."""
    chance = random.Random(1)
    outputs, right = [], []
    for number in range(count):
        sentence = [chance.choice(WORDS) for _ in range(chance.randint(1, 25))]
        own = references or 1 + number % 4
        right.append([noisy(sentence, chance, 0.15) or "it" for _ in range(own)])
        outputs.append("" if number % 50 == 7 else noisy(sentence, chance, rate) * (1 + (number % 40 == 3)))
    return outputs, right


def streams(references):
    """References as sacrebleu takes them: None where there is none."""
    most = max(map(len, references))
    return [[own[place] if place < len(own) else None for own in references] for place in range(most)]


@pytest.mark.parametrize("references", [1, 3, None])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_bleu_and_chrf_equal_sacrebleus(references, rate):
    outputs, right = made_up(references, rate=rate)
    metrics = OutputMetrics("bleu")
    for start in range(0, 500, 64):
        metrics.update(outputs[start : start + 64], right[start : start + 64])
    found = metrics.compute()
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(outputs, streams(right)).score, abs=1e-4)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(outputs, streams(right)).score, abs=1e-4)
    assert 5 < found["bleu"] < 95


@pytest.mark.parametrize("references", [1, 3, None])
def test_rouge_equals_rouge_scores(references):
    outputs, right = made_up(references)
    metrics = OutputMetrics("rouge")
    metrics.update(outputs, right)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    each = [scorer.score_multi(own, output) for output, own in zip(outputs, right, strict=True)]
    for name, value in metrics.compute().items():
        assert value == pytest.approx(100 * sum(score[name].fmeasure for score in each) / 500, abs=1e-4)


def test_each_rouge_has_its_own_best_reference():
    """Words of the first reference, order of the second."""
    output, right = "a b c d", ["d c b a", "a b x y"]
    metrics = OutputMetrics("rouge")
    metrics.update([output], [right])
    expected = RougeScorer(["rouge1", "rouge2", "rougeL"]).score_multi(right, output)
    assert {name: pytest.approx(100 * score.fmeasure) for name, score in expected.items()} == metrics.compute()
    assert expected["rouge2"].fmeasure > 0


@pytest.mark.parametrize(
    ("output", "references"),
    [
        ("the cat sat on a mat", ["a cat was sitting there"]),  # no 3-gram, no 4-gram is right
        ("on the cat the mat", ["the mat or cat or on"]),  # no 2-gram either
        (
            "one two three four five",
            ["one two three four five six", "one two three four"],
        ),  # the shorter is nearest too
        ("nothing right", ["all wrong"]),
        ("one", ["one"]),  # no 4-gram at all
        ("", ["empty output"]),
    ],
)
def test_smoothing_and_lengths_are_sacrebleus(output, references):
    theirs = sacrebleu.corpus_bleu([output], [[text] for text in references]).score
    assert bleu([output], [references]) == pytest.approx(theirs, abs=1e-4)
    assert chrf([output], [references]) == pytest.approx(
        sacrebleu.corpus_chrf([output], [[text] for text in references]).score, abs=1e-4
    )


def test_compute_starts_afresh():
    metrics = OutputMetrics("bleu")
    metrics.update(["all wrong here now"], [["something else"]])
    assert metrics.compute()["bleu"] == 0.0
    metrics.update(["this is quite right"], [["this is quite right"]])
    assert metrics.compute() == {"bleu": pytest.approx(100.0), "chrf": pytest.approx(100.0)}
    with pytest.raises(ValueError, match="no output"):
        metrics.compute()


def test_the_signature_counts_references():
    assert bleu_signature([["a"], ["b"]]).startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|")
    assert bleu_signature([["a", "b"], ["c"]]).startswith("nrefs:var|")
    metric = sacrebleu.BLEU()
    metric.corpus_score(["a b c d"], [["a b c d"]])
    assert bleu_signature([["a"]]).split("|")[:5] == str(metric.get_signature()).split("|")[:5]
