import random

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from leanbert.tasks.output_metrics import bleu, bleu_signature, chrf, output_scores, rouge
from leanbert.tasks.output_tokens import rouge_tokens

NEWLINE = "\n"
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
    found = output_scores(outputs, right, "bleu")
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(outputs, streams(right)).score, abs=1e-4)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(outputs, streams(right)).score, abs=1e-4)
    assert 5 < found["bleu"] < 95


def lines(text):
    return "".join(f"{word}{NEWLINE if number % 10 in (3, 4) else ' '}" for number, word in enumerate(text.split()))


@pytest.mark.parametrize("references", [1, 3, None])
def test_rouge_equals_rouge_scores(references):
    """The third and fourth word in ten begins a line: sentences of a summary."""
    outputs, right = made_up(references)
    outputs, right = [lines(text) for text in outputs], [[lines(text) for text in own] for own in right]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    each = [scorer.score_multi(own, output) for output, own in zip(outputs, right, strict=True)]
    found = output_scores(outputs, right, "rouge", rouge_tokens="ascii")
    assert list(found) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    for name, value in found.items():
        assert value == pytest.approx(100 * sum(score[name].fmeasure for score in each) / 500, abs=1e-9)


def test_each_rouge_has_its_own_best_reference():
    """Words of the first reference, order of the second."""
    output, right = "a b c d", ["d c b a", "a b x y"]
    found = output_scores([output], [right], "rouge")
    expected = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"]).score_multi(right, output)
    assert {name: pytest.approx(100 * score.fmeasure) for name, score in expected.items()} == found
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


def test_scores_of_all_nothing_and_no_output():
    assert output_scores(["all wrong here now"], [["something else"]], "bleu")["bleu"] == 0.0
    text = "this is quite right"
    assert output_scores([text], [[text]], "bleu") == {"bleu": pytest.approx(100.0), "chrf": pytest.approx(100.0)}
    with pytest.raises(ValueError, match="no output"):
        output_scores([], [], "bleu")


def test_the_signature_counts_references():
    assert bleu_signature([["a"], ["b"]]).startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|")
    assert bleu_signature([["a", "b"], ["c"]]).startswith("nrefs:var|")
    metric = sacrebleu.BLEU()
    metric.corpus_score(["a b c d"], [["a b c d"]])
    assert bleu_signature([["a"]]).split("|")[:5] == str(metric.get_signature()).split("|")[:5]
    assert "|tok:zh|" in bleu_signature([["\u5c71\u6c34"]])
    assert "|tok:intl|" in bleu_signature([["\u5c71\u6c34"]], "intl")


SCRIPTS = {
    "latin": "die Brücke ist grün, und das Café heißt „Größe“ (seit 1,5 Jahren).",
    "cyrillic": "тихий рынок прячет письмо, №5 стоит 12,30 рубля",
    "devanagari": "नदी बहती है और बच्चे खेलते हैं।",
    "arabic": "القطة تجلس على السجادة، والكلب ينام.",
    "chinese": "山水月日风花雪夜人。家书有ABC三3.5个",
    "japanese": "すみません、私は東京へ行きます。カメラ",
    "thai": "นี่คือภาษาไทยที่ดี",
}


def test_words_in_ascii_are_those_of_rouge_score():
    outputs, right = made_up(1, count=100)
    outputs = [text.encode("ascii", "ignore").decode() for text in outputs]
    right = [[text.encode("ascii", "ignore").decode() for text in own] for own in right]
    assert rouge(outputs, right, "auto") == rouge(outputs, right, "ascii")


class Tokens:
    def __init__(self, kind):
        self.kind = kind

    def tokenize(self, text):
        return rouge_tokens(text, self.kind)


def shuffled(text, seed):
    """Return a text with some of its words, or characters where it has no words, changed and moved."""
    chance, parts = random.Random(seed), text.split(" ") if " " in text else list(text)
    parts = [part for part in parts if chance.random() < 0.8] * (1 + (seed % 7 == 0))
    place = chance.randrange(max(1, len(parts) - 2))
    return (" " if " " in text else "").join([*parts[:place], *parts[place + 1 :], *parts[place : place + 1]])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["auto", "ascii", "characters"])
def test_rouge_of_any_script_equals_rouge_scores_with_the_same_tokens(script, kind):
    right = [SCRIPTS[script]] * 20
    outputs = [shuffled(text, seed) for seed, text in enumerate(right)]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], tokenizer=Tokens(kind))
    each = [scorer.score(reference, output) for reference, output in zip(right, outputs, strict=True)]
    found = rouge(outputs, [[reference] for reference in right], kind)
    expected = {name: 100 * sum(score[name].fmeasure for score in each) / 20 for name in found}
    assert found == pytest.approx(expected, abs=1e-9)
    assert kind == "ascii" or 20 < found["rouge1"] < 100
    assert kind == "ascii" or set(rouge(right, [[text] for text in right], kind).values()) == {100.0}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["auto", "13a", "zh", "char", "intl", "none"])
def test_bleu_of_any_script_equals_sacrebleus(script, kind):
    right = [SCRIPTS[script]] * 20
    outputs = [shuffled(text, seed) for seed, text in enumerate(right)]
    resolved = {"chinese": "zh", "japanese": "char", "thai": "char"}.get(script, "13a") if kind == "auto" else kind
    expected = sacrebleu.corpus_bleu(outputs, [right], tokenize=resolved).score
    assert bleu(outputs, [[text] for text in right], kind) == pytest.approx(expected, abs=1e-4)
    assert f"|tok:{resolved}|" in bleu_signature([[text] for text in right], kind)


def test_scores_that_were_zero_or_wrong():
    german = rouge(["die brücke ist grün"], [["die brücke ist kühn"]])
    assert german == pytest.approx({"rouge1": 75.0, "rouge2": 200 / 3, "rougeL": 75.0, "rougeLsum": 75.0})
    chinese = ["山水月日风花雪夜人。", "家书车门马鱼鸟山水。", "风花雪夜人家书门。"]
    right = [["山水月日风花雪夜人家。"], ["家书车门马鱼鸟山水月。"], ["风花雪夜人家书车门。"]]
    assert bleu(chinese, right) == pytest.approx(78.848, abs=1e-3)
    late, met, bought = "The boat was late.", "Mira met Jonas at the market.", "They bought a lamp."
    found = rouge(["\n".join((late, met, bought))], [["\n".join((bought, late, met))]])
    assert found["rougeLsum"] == 100.0 > found["rougeL"]
