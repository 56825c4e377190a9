"""Decoding with a cache of keys and values: greedy, beam search, sampling.

Shapes: N sentences, K beams, Q = N * K hypotheses, S source tokens, t tokens so far, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from leanbert.errors import UserError
from leanbert.models.config import ResolvedConfig
from leanbert.models.packed_inputs import PackedInputs
from leanbert.ranges import POSITIVE, WHOLE, Range

DROPPED_TOGETHER = 8
"""Sentences that have ended are dropped once they are one in so many."""

RANGES = {
    "beams": Range(least=1, most=1000, whole=True),
    "length_penalty": Range(least=-100, most=100),
    "no_repeat_ngram": WHOLE,
    "length_ratio": Range(least=0, most=1e6),
    "length_more": Range(least=1, most=10**9, whole=True),
    "temperature": POSITIVE,
    "top_k": WHOLE,
    "top_p": Range(above=0, most=1),
}


@dataclass
class GenerationConfig:
    """How outputs are searched for."""

    beams: int = 1
    """Hypotheses that are kept for each sentence; 1: greedy, the best next token each time."""
    length_penalty: float = 1.0
    """Beam search ranks by the sum of log-probabilities over length to this power; 0: by the sum."""
    early: bool = True
    """Beam search stops when what goes on looks worse than the outputs that ended; false: when it cannot become better,
    which takes longer."""
    no_repeat_ngram: int = 0
    """Forbid that so many tokens in a row occur twice in an output; 0: allow it."""
    length_ratio: float = 2.0
    """Longest output: this times the source's tokens, plus length_more."""
    length_more: int = 10
    """Tokens added to the longest output."""
    sample: bool = False
    """Draw each token by its probability instead of searching."""
    temperature: float = 1.0
    """Of drawing: below 1 prefers the likely tokens."""
    top_k: int = 0
    """Draw from so many likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this probability together (Holtzman et al. 2020, arXiv 1904.09751)."""

    def __post_init__(self) -> None:
        """Raise `UserError` for what cannot work, naming the setting."""
        for name, allowed in RANGES.items():
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"model.generation.{name}: {value!r} is out of range. Give {allowed}.")
        for name in ("early", "sample"):
            if not isinstance(value := getattr(self, name), bool):
                raise UserError(f"model.generation.{name}: {value!r} is neither true nor false. Give one of them.")
        if self.sample and self.beams > 1:
            raise UserError("model.generation.sample: draws one output. Set beams to 1")


class Generated(NamedTuple):
    """An output: its tokens without begin and end, and its score, the sum of log-probabilities over length^penalty."""

    ids: list[int]
    score: float


class SpecialTokens(NamedTuple):
    """Ids that begin and end an output, and those that none may contain."""

    bos: int
    eos: int
    suppressed: list[int]


class Decoding(Protocol):
    """Decodes N sentences with K beams each, token by token."""

    def step(self, tokens: Tensor) -> Tensor:
        """Return the logits [Q, V] after the tokens [Q], float32."""

    def reorder(self, parents: Tensor) -> None:
        """Let beam k of each sentence go on from what was beam `parents[n, k]` (int64 [N, K])."""

    def select(self, sentences: Tensor) -> None:
        """Drop all sentences but these (int64, ascending)."""


class Generator(Protocol):
    """What outputs can be generated with."""

    config: ResolvedConfig

    def start_decoding(self, inputs: PackedInputs, beams: int, positions: int) -> Decoding:
        """Return what decodes the sources `inputs` [N, S] into at most `positions` tokens."""


@torch.inference_mode()
def generate(
    model: Generator, inputs: PackedInputs, tokens: SpecialTokens, config: GenerationConfig
) -> list[Generated]:
    """Return the best output for each source, `inputs` [N, S], one a row; the model is in evaluation mode."""
    longest = (inputs.real.sum(1) * config.length_ratio).long() + config.length_more  # [N]
    limits = longest.clamp(max=model.config.max_positions).tolist()
    cache = model.start_decoding(inputs, config.beams, max(limits))
    search = _one_by_one if config.beams == 1 else _beam_search
    return search(cache, limits, tokens, config, inputs.input_ids.device)


class _Running:
    """Which sentences are still decoded: those that have ended are dropped in groups, for it takes a copy of the cache.

    `numbers` says which sentence of the batch a row is, `done` whether it has ended.
    """

    def __init__(self, count: int) -> None:
        self.numbers = list(range(count))
        self.done = [False] * count

    def drop_ended(self, cache: Decoding, outputs: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of outputs and scores to go on with, in the cache too: all until enough have ended."""
        if not all(self.done) and sum(self.done) * DROPPED_TOGETHER < len(self.done):
            return outputs, scores
        rows = [row for row, done in enumerate(self.done) if not done]
        self.numbers = [self.numbers[row] for row in rows]
        self.done = [False] * len(rows)
        remaining = torch.tensor(rows, dtype=torch.long, device=outputs.device)
        cache.select(remaining)
        return outputs[remaining], scores[remaining]


def _one_by_one(
    cache: Decoding, limits: list[int], tokens: SpecialTokens, config: GenerationConfig, device: torch.device
) -> list[Generated]:
    """Take the likeliest token, or draw one, until each output has ended."""
    found: list[Generated] = [Generated([], 0.0)] * len(limits)
    running = _Running(len(limits))
    outputs = torch.full((len(limits), max(limits) + 1), tokens.bos, device=device)
    scores = torch.zeros(len(limits), device=device)
    length = 1
    while running.numbers:
        logits = suppress(cache.step(outputs[:, length - 1]), outputs[:, :length], tokens, config.no_repeat_ngram)
        log_probs = logits.log_softmax(-1)
        chosen = draw(logits, config) if config.sample else log_probs.argmax(-1)
        scores = scores + log_probs.gather(1, chosen[:, None])[:, 0]
        outputs[:, length] = chosen
        for row, token in enumerate(chosen.tolist()):
            number = running.numbers[row]
            if not running.done[row] and (token == tokens.eos or length >= limits[number]):
                running.done[row] = True
                ids = outputs[row, 1 : length + 1].tolist()
                score = float(scores[row]) / length**config.length_penalty
                found[number] = Generated(ids[:-1] if token == tokens.eos else ids, score)
        length += 1
        outputs, scores = running.drop_ended(cache, outputs, scores)
    return found


def _beam_search(
    cache: Decoding, limits: list[int], tokens: SpecialTokens, config: GenerationConfig, device: torch.device
) -> list[Generated]:
    """Keep the K best hypotheses of each sentence until K outputs that ended are better than any that may still end."""
    beams, running = config.beams, _Running(len(limits))
    finished: list[list[Generated]] = [[] for _ in limits]
    outputs = torch.full((len(limits), beams, max(limits) + 1), tokens.bos, device=device)
    scores = torch.full((len(limits), beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all hypotheses are the same at first: one is looked at
    length = 1
    while running.numbers:
        before = outputs[:, :, :length]
        logits = cache.step(before[:, :, -1].flatten())
        logits = suppress(logits, before.flatten(0, 1), tokens, config.no_repeat_ngram)
        sums, parents, chosen = top_continuations(scores, logits.log_softmax(-1), 2 * beams)
        ends = chosen == tokens.eos  # [N, 2 K]: enough where K of them end
        _collect(finished, running, before, sums, parents, ends, config)
        # those that do not end come first, in the order of their scores
        order = ends.int().argsort(dim=1, stable=True)[:, :beams]  # [N, K]
        scores = sums.gather(1, order).masked_fill_(ends.gather(1, order), -torch.inf)
        parents = parents.gather(1, order)
        before.copy_(before.gather(1, parents[:, :, None].expand_as(before)))
        outputs[:, :, length] = chosen.gather(1, order)
        cache.reorder(parents)
        _close(finished, running, outputs[:, :, : length + 1], scores, limits, config)
        length += 1
        outputs, scores = running.drop_ended(cache, outputs, scores)
    return [max(candidates, key=lambda candidate: candidate.score) for candidates in finished]


def top_continuations(scores: Tensor, log_probs: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best `count` (at most K * V) continuations of each sentence's hypotheses, best first.

    `scores` [N, K] are the hypotheses' sums of log-probabilities, -inf where there is none, `log_probs` [N * K, V] the
    log-probabilities of their next tokens. Returns sums, the hypotheses' beams and the tokens: [N, count] each.
    """
    sentences, beams = scores.shape
    sums = log_probs.view(sentences, beams, -1).add_(scores[:, :, None])
    sums.masked_fill_((scores == -torch.inf)[:, :, None], -torch.inf)  # may have been no number
    vocabulary = sums.shape[-1]
    flat = sums.flatten(1)
    top = flat.topk(min(count, flat.shape[1]), dim=1)
    return top.values, top.indices // vocabulary, top.indices % vocabulary


def _collect(
    finished: list[list[Generated]], running: _Running, outputs: Tensor, sums: Tensor, parents: Tensor, ends: Tensor,
    config: GenerationConfig,
) -> None:  # fmt: skip
    """Add the hypotheses that end, if they are among the K best; `outputs` [N, K, t] are those they go on from."""
    beams, length = config.beams, outputs.shape[2]  # with the end, without the begin
    rows = ends[:, :beams].nonzero()[:, 0]
    values, beam = (x[:, :beams][ends[:, :beams]].tolist() for x in (sums, parents))
    for row, total, parent in zip(rows.tolist(), values, beam, strict=True):
        if total == -torch.inf or running.done[row]:
            continue
        candidates = finished[running.numbers[row]]
        candidates.append(Generated(outputs[row, parent, 1:].tolist(), total / length**config.length_penalty))
        candidates.sort(key=lambda candidate: -candidate.score)
        del candidates[beams:]


def _close(
    finished: list[list[Generated]], running: _Running, outputs: Tensor, scores: Tensor, limits: list[int],
    config: GenerationConfig,
) -> None:  # fmt: skip
    """Mark the sentences that need no more steps; at the longest length hypotheses count as they are."""
    length = outputs.shape[2]  # of the outputs if they ended with the next token
    best, beam = scores.max(1)
    for row, (total, which) in enumerate(zip(best.tolist(), beam.tolist(), strict=True)):
        candidates, limit = finished[running.numbers[row]], limits[running.numbers[row]]
        if running.done[row]:
            continue
        if length > limit:
            if not candidates:
                score = total / (length - 1) ** config.length_penalty
                candidates.append(Generated(outputs[row, which, 1:].tolist(), score))
            running.done[row] = True
        elif len(candidates) >= config.beams or total == -torch.inf:
            # the sum of log-probabilities only falls; over a longer length it can still become better
            longest = length if config.early or config.length_penalty <= 0 else limit
            running.done[row] = total / longest**config.length_penalty <= candidates[-1].score


def suppress(logits: Tensor, outputs: Tensor, tokens: SpecialTokens, ngram: int) -> Tensor:
    """Return logits [Q, V] with -inf at special tokens and at those that would repeat an `ngram` of outputs [Q, t]."""
    logits[:, tokens.suppressed] = -torch.inf
    if ngram:
        for row, output in enumerate(outputs.tolist()):
            logits[row, repeated(output[1:], ngram)] = -torch.inf
    return logits


def repeated(output: list[int], ngram: int) -> list[int]:
    """Return the tokens that would make the last `ngram` tokens of an output occur in it before."""
    tail = output[len(output) - ngram + 1 :] if ngram > 1 else []
    if len(tail) < ngram - 1:
        return []
    return [output[i + ngram - 1] for i in range(len(output) - ngram + 1) if output[i : i + ngram - 1] == tail]


def draw(logits: Tensor, config: GenerationConfig) -> Tensor:
    """Draw a token of each row of logits [Q, V], among the likeliest ones if so configured: int64 [Q]."""
    logits = logits / config.temperature
    if config.top_k:
        threshold = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if config.top_p < 1.0:
        probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
        before = probs.cumsum(-1) - probs  # probability of the likelier ones
        unlikely = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= config.top_p)
        logits = logits.masked_fill(unlikely, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]
