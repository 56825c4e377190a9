"""Tagged spans: the best legal sequence of BIO tags, and counts of right spans.

Shapes: N sequences, W words of the longest, L labels (BIO tags), R roles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from leanbert.data.batches.batch import IGNORED
from leanbert.data.formats.span_labels import CONTINUATION, OUTSIDE, Argument, Span, arguments, role_of, spans

OTHER_ROLES = "(other roles)"
"""Where roles are counted that the labels of the model do not know."""


class SpanScore(NamedTuple):
    """Numbers of spans: predicted ones that are right, predicted ones, and those that should be found."""

    correct: int
    predicted: int
    gold: int

    @property
    def precision(self) -> float:
        """Share of the predicted spans that are right; 0 if there are none."""
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the gold spans that were found; 0 if there are none."""
        return self.correct / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 if no span is right."""
        return 2 * self.correct / (self.predicted + self.gold) if self.correct else 0.0


class SpanScores(NamedTuple):
    """The score over all spans (micro average), and by role: of the roles that were seen, sorted by name."""

    overall: SpanScore
    roles: dict[str, SpanScore]


def score_spans(
    predicted: Sequence[Sequence[str]],
    gold: Sequence[Sequence[str]],
    labels: Iterable[str],
    join_continuations: bool = False,
    ignored: Collection[str] = (),
) -> SpanScores:
    """Count predicted, gold and right spans of sentences by role. A span is right if its role and all its words are.

    Two ways to count:

    - As `seqeval` does with `mode="strict", scheme=IOB2`: each span by itself, C-X a role of its own.
    - As srl-eval.pl does (`join_continuations`): the pieces of an argument are one, see `arguments`; it is right
      only if all pieces are.

    Args:
        predicted: BIO tags of the words of each sentence.
        gold: The right ones.
        labels: BIO tags that the model can predict. Spans of all other roles are counted together, as
            `OTHER_ROLES`: gold ones that no prediction can meet lower the recall.
        join_continuations: Count as srl-eval.pl does.
        ignored: Roles that do not count, after joining: without `V`, the predicate, neither C-V counts.

    Raises:
        ValueError: A sentence has another number of predicted tags than of gold ones.

    """
    find: Callable[[Sequence[str]], Sequence[Span | Argument]] = arguments if join_continuations else spans
    known = {role_of(label).removeprefix(CONTINUATION if join_continuations else "") for label in labels}
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])  # right, predicted, gold
    for guess, truth in zip(predicted, gold, strict=True):
        if len(guess) != len(truth):
            raise ValueError(f"{len(guess)} predicted tags of {len(truth)} words")
        found, true = ({item for item in find(tags) if item.role not in ignored} for tags in (guess, truth))
        for column, items in enumerate((found & true, found, true)):
            for item in items:
                counts[item.role if item.role in known else OTHER_ROLES][column] += 1
    overall = SpanScore(*(sum(row[column] for row in counts.values()) for column in range(3)))
    order = sorted(counts, key=lambda role: (role == OTHER_ROLES, role))
    return SpanScores(overall, {role: SpanScore(*counts[role]) for role in order})


class BioDecoder(nn.Module):
    """Finds the legal sequence of BIO tags with the highest sum of scores (Viterbi, 1967).

    Only I-x has a condition: it follows B-x or I-x. So a step takes the best of all labels for the others and the
    better of two for I-x: O(L) a word, not O(L^2).

    Args:
        labels: The BIO tags, in the order of the scores; at least one of them O or B-x. Each occurs once.

    Raises:
        ValueError: Labels that are not BIO tags, or none that a sequence may begin with.

    """

    inside: Tensor  # bool [L]: I-x
    begin: Tensor  # int64 [L]: of I-x the index of B-x, of others their own
    stay: Tensor  # int64 [L + 1]: each state's own index

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        index = {label: place for place, label in enumerate(labels)}
        strange = [label for label in labels if label != OUTSIDE and not role_of(label)]
        if strange or len(index) < len(labels):
            raise ValueError(f"labels must be different BIO tags, O, B-x or I-x: {', '.join(strange or labels)}")
        inside = [label.startswith("I-") for label in labels]
        if all(inside):
            raise ValueError("no label can begin a sequence: add O or a B-x")
        # an I-x without B-x has only itself before it and is never reached
        begin = [index.get(f"B-{role_of(label)}", place) for label, place in index.items()]
        self.register_buffer("inside", torch.tensor(inside), persistent=False)
        self.register_buffer("begin", torch.tensor(begin), persistent=False)
        self.register_buffer("stay", torch.arange(len(labels) + 1), persistent=False)

    @torch.no_grad()
    def decode(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the index of each word's label, int64 [N, W], -100 where there is no word.

        Args:
            scores: Of each label at each word, [N, W, L], logits or log-probabilities of any float type.
            valid: Where a word is, bool [N, W]. What is no word is passed over, wherever it stands.

        """
        count, width, labels = scores.shape
        scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        best = scores.new_full((count, labels + 1), -torch.inf)  # of sequences so far that end in a label
        best[:, -1] = 0.0  # the state before the first word
        origins = []
        for word in range(width):
            here = valid[:, word, None]  # [N, 1]
            reached, origin = self._step(best, scores[:, word])
            best = torch.where(here, reached, best)
            origins.append(torch.where(here, origin, self.stay))
        label = best.argmax(-1)  # [N]
        path = []
        for origin in reversed(origins):
            path.append(label)
            label = origin.gather(1, label[:, None])[:, 0]
        chosen = torch.stack(path[::-1], dim=1) if path else self.stay.new_empty((count, 0))  # [N, W]
        return torch.where(valid, chosen, IGNORED)

    def _step(self, best: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best sums after one more word, [N, L + 1], and from which state each comes."""
        any_best, any_origin = best.max(-1, keepdim=True)  # [N, 1]
        begun, going_on = best[:, self.begin], best[:, :-1]  # [N, L]
        before = torch.where(self.inside, torch.maximum(begun, going_on), any_best)
        same_span = torch.where(begun >= going_on, self.begin, self.stay[:-1])
        origin = torch.where(self.inside, same_span, any_origin)
        reached = nn.functional.pad(before + scores, (0, 1), value=-torch.inf)
        return reached, nn.functional.pad(origin, (0, 1))
