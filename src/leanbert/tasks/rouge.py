"""ROUGE-1, 2, L and Lsum (Lin 2004), as rouge-score counts them, over tokens of any script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from leanbert.tasks.output_tokens import RougeTokens, rouge_tokens

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(
    outputs: Sequence[str], references: Sequence[Sequence[str]], tokens: RougeTokens = "auto"
) -> dict[str, float]:
    """Return the mean F-scores, from 0 to 100, by name; of several references each score takes its best one.

    rougeLsum looks at the sentences of a summary, a line each: their order does not count.
    """
    sums = dict.fromkeys(ROUGE, 0.0)
    for output, own in zip(outputs, references, strict=True):
        scores = [_scores(output, reference, tokens) for reference in own]
        for number, name in enumerate(ROUGE):
            sums[name] += max(score[number] for score in scores)
    return {name: 100.0 * total / len(outputs) for name, total in sums.items()}


def _scores(output: str, reference: str, tokens: RougeTokens) -> tuple[float, ...]:
    """Return the F-scores of one pair in the order of `ROUGE`."""
    own, there = ([rouge_tokens(line, tokens) for line in text.split("\n") if line] for text in (output, reference))
    words, right = (list(chain.from_iterable(sentences)) for sentences in (own, there))
    found = (
        _overlap(words, right, 1),
        _overlap(words, right, 2),
        (len(_common(right, words)), len(words), len(right)),
        (_summary_hits(own, there), len(words), len(right)),
    )
    return tuple(_f_score(*counts) for counts in found)


def _f_score(hits: int, output: int, reference: int) -> float:
    return 2.0 * hits / (output + reference) if hits else 0.0  # the harmonic mean of hits / output, hits / reference


def _overlap(output: Sequence[str], reference: Sequence[str], length: int) -> tuple[int, int, int]:
    """Return how many n-grams both have, the output and the reference."""
    own, there = (
        Counter(tuple(words[start : start + length]) for start in range(len(words) - length + 1))
        for words in (output, reference)
    )
    return (own & there).total(), own.total(), there.total()


def _common(reference: Sequence[str], output: Sequence[str]) -> list[int]:
    """Return the indices in the reference of a longest common subsequence, ascending."""
    table = [[0] * (len(output) + 1)]  # lengths for the first words of both
    for word in reference:
        above, row = table[-1], [0]
        for index, other in enumerate(output):
            row.append(above[index] + 1 if word == other else max(row[index], above[index + 1]))
        table.append(row)
    indices, i, j = [], len(reference), len(output)
    while i and j:
        if reference[i - 1] == output[j - 1]:
            i, j = i - 1, j - 1
            indices.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return indices[::-1]


def _summary_hits(output: Sequence[Sequence[str]], reference: Sequence[Sequence[str]]) -> int:
    """Return the words of the reference's sentences that are in a common subsequence with any of the output's.

    A word counts at most as often as either summary has it.
    """
    own, there = (Counter(word for sentence in sentences for word in sentence) for sentences in (output, reference))
    union = Counter(
        sentence[index]
        for sentence in reference
        for index in {index for other in output for index in _common(sentence, other)}
    )
    return (union & own & there).total()
