"""BLEU, chrF and ROUGE of whole generated sets, each with any number of references, as the reference packages count."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torchmetrics
from torchmetrics.text.sacre_bleu import SacreBLEUScore

from leanbert.tasks.output_tokens import BleuTokens, RougeTokens, bleu_kind, bleu_tokenizer
from leanbert.tasks.rouge import rouge

Quality = Literal["bleu", "rouge"]

CHARACTER_ORDER, RECALL_WEIGHT = 6, 2.0
"""chrF's longest n-gram, and how many times recall counts as much as precision."""


def output_scores(
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    quality: Quality,
    bleu_tokens: BleuTokens = "auto",
    rouge_tokens: RougeTokens = "auto",
) -> dict[str, float]:
    """Return BLEU and chrF, or ROUGE, of a whole set by name, from 0 to 100. Raises ValueError if it is empty.

    BLEU is sacreBLEU's (Post 2018, arXiv 1804.08771), cased, with tokens as `bleu_tokenizer` and `bleu_kind` say. chrF
    (Popović 2015) is counted as by sacreBLEU (chrF2); ROUGE-1, 2, L and Lsum (Lin 2004) as by rouge-score, with tokens
    of `rouge_tokens`, of several references the best.
    """
    if not outputs:
        raise ValueError("there is no output")
    if quality == "rouge":
        return rouge(outputs, references, rouge_tokens)
    return {"bleu": bleu(outputs, references, bleu_tokens), "chrf": chrf(outputs, references)}


def bleu_signature(references: Sequence[Sequence[str]], tokens: BleuTokens = "auto") -> str:
    """Return how `bleu` counts, in sacreBLEU's terms."""
    kind = bleu_kind(tokens, (text for own in references for text in own))
    counts = {len(own) for own in references}
    number = counts.pop() if len(counts) == 1 else "var"
    return f"nrefs:{number}|case:mixed|eff:no|tok:{kind}|smooth:exp|version:torchmetrics-{torchmetrics.__version__}"


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]], tokens: BleuTokens = "auto") -> float:
    """Return the BLEU of a whole set.

    The n-grams are counted by torchmetrics, whose score is 0 as soon as no 4-gram is right, and whose reference length
    is, of two equally near ones, the first: sacreBLEU smooths exponentially (Lin and Och 2004) and takes the shorter.
    """
    cut = bleu_tokenizer(bleu_kind(tokens, (text for own in references for text in own)))
    metric = SacreBLEUScore(tokenize="none")  # which divides at spaces
    right_ones = [[" ".join(tokens) for tokens in sorted(map(cut, own), key=len)] for own in references]
    metric.update([" ".join(cut(text)) for text in outputs], right_ones)
    length, wanted = float(metric.preds_len), float(metric.target_len)
    right, total = metric.numerator.tolist(), metric.denominator.tolist()
    if not any(right) or not all(total):
        return 0.0
    missing, logarithm = 0, 0.0
    for hits, count in zip(right, total, strict=True):
        missing += hits == 0
        logarithm += math.log(hits / count if hits else 1.0 / (2**missing * count)) / len(total)
    brevity = min(0.0, 1.0 - wanted / length)
    return 100.0 * math.exp(logarithm + brevity)


def chrf(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the chrF2 of a whole set: character n-grams without spaces, of each output against its best reference.

    Precision and recall are averaged over the orders before they are combined, as in sacreBLEU; torchmetrics averages
    the F-scores of the orders.
    """
    sums = [[0, 0, 0] for _ in range(CHARACTER_ORDER)]
    for output, own in zip(outputs, references, strict=True):
        grams = _character_grams(output)
        best = max((_matches(grams, _character_grams(text)) for text in own), key=_combined)
        sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums, best, strict=True)]
    return 100.0 * _combined(sums)


def _character_grams(text: str) -> list[Counter[str]]:
    bare = "".join(text.split())
    return [
        Counter(bare[start : start + order] for start in range(len(bare) - order + 1))
        for order in range(1, CHARACTER_ORDER + 1)
    ]


def _matches(output: list[Counter[str]], reference: list[Counter[str]]) -> list[list[int]]:
    """Return for each order the n-grams of the output (0 if the reference has none), the reference, and both."""
    return [
        [own.total() if there else 0, there.total(), sum(min(n, there[gram]) for gram, n in own.items())]
        for own, there in zip(output, reference, strict=True)
    ]


def _combined(counts: Sequence[Sequence[int]]) -> float:
    used = [(own, there, both) for own, there, both in counts if own and there]
    if not used:
        return 0.0
    precision = sum(both / own for own, _, both in used) / len(used)
    recall = sum(both / there for _, there, both in used) / len(used)
    if precision + recall == 0.0:
        return 0.0
    weight = RECALL_WEIGHT**2
    return (1.0 + weight) * precision * recall / (weight * precision + recall)
