"""Decoding with a cache of keys and values: greedy, beam search, sampling.

Shapes: N sentences, K beams, Q = N * K hypotheses, S source tokens, P places of the cache, t tokens so far, V
vocabulary, H heads, d head size, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanbert.errors import UserError
from leanbert.models.attention import product_dtype, rotate
from leanbert.models.decoder import DecoderBlock
from leanbert.models.seq2seq import Seq2SeqModel


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

    def check(self) -> GenerationConfig:
        """Return itself. Raises UserError for what cannot work, naming the setting."""
        least = {"beams": 1, "no_repeat_ngram": 0, "length_more": 1, "top_k": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UserError(f"model.generation.{name}: {getattr(self, name)} is too small. Set at least {lowest}")
        if self.sample and self.beams > 1:
            raise UserError("model.generation.sample: draws one output. Set beams to 1")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.length_ratio < 0:
            raise UserError("model.generation: temperature is above 0, top_p in (0, 1], length_ratio not negative")
        return self


class Generated(NamedTuple):
    """An output: its tokens without begin and end, and its score, the sum of log-probabilities over length^penalty."""

    ids: list[int]
    score: float


class Tokens(NamedTuple):
    """Ids that begin and end an output, and those that none may contain."""

    begin: int
    end: int
    never: list[int]


class _Layer:
    """Keys and values of one block: of the target so far [Q, H, P, d], and of the source [N, H, S, d]."""

    def __init__(self, block: DecoderBlock, memory: Tensor, beams: int, places: int) -> None:
        self.block = block
        self.source_key, self.source_value = block.cross_attention.project(memory)
        count, heads, _, size = self.source_key.shape
        shape = (count * beams, heads, places, size)
        self.key = self.source_key.new_empty(shape)
        self.value = self.source_key.new_empty(shape)

    def attend(self, hidden: Tensor, place: int, angles: Any) -> Tensor:
        """Self-attention of the newest token [Q, 1, D], whose key and value are added at `place`."""
        attention: Any = self.block.attention
        fused = attention.qkv(hidden).view(len(hidden), 1, 3, attention.num_heads, -1)
        query_key, value = fused.split((2, 1), dim=2)
        if angles is not None:
            query_key = rotate(query_key, angles)
        query, key = query_key.transpose(1, 3).unbind(2)  # [Q, H, 1, d]
        self.key[:, :, place], self.value[:, :, place] = key[:, :, 0], value[:, 0, 0]
        keys, values = self.key[:, :, : place + 1], self.value[:, :, : place + 1]
        mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        return attention.output(mixed.transpose(1, 2).flatten(2))

    def step(self, hidden: Tensor, place: int, angles: Any, mask: Tensor) -> Tensor:
        """Run the block on the newest token [Q, 1, D]; `mask` [N, 1, 1, S] is added to the scores of the source."""
        block, count = self.block, len(self.source_key)
        cross: Any = block.cross_attention

        def look(x: Tensor) -> Tensor:
            # the beams of a sentence are the rows of one product with its source: [N, K, D]
            grouped = x.view(count, -1, x.shape[-1])
            return cross(grouped, self.source_key, self.source_value, mask).view(len(x), 1, -1)

        return block.run(hidden, lambda x: self.attend(x, place, angles), look)

    def reorder(self, rows: Tensor, place: int) -> None:
        """Keep the hypotheses `rows` (int64 [Q']), of the first `place` places."""
        for cache in (self.key, self.value):
            cache[: len(rows), :, :place] = cache[rows, :, :place]

    def keep(self, sentences: Tensor, rows: Tensor) -> None:
        """Keep the sentences [N'] and their hypotheses [Q'] only."""
        self.source_key, self.source_value = self.source_key[sentences], self.source_value[sentences]
        self.key, self.value = self.key[rows], self.value[rows]


class Cache:
    """What decoding one more token needs of those before it, and of the sources.

    Args:
        model: The model.
        input_ids: Sources, int64 [N, S].
        position_ids: Their positions, int64 [N, S].
        document_ids: 0 on tokens and -1 on padding, int64 [N, S].
        beams: Hypotheses of each.
        places: Tokens of the longest output.

    """

    def __init__(
        self,
        model: Seq2SeqModel,
        input_ids: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        beams: int,
        places: int,
    ) -> None:
        memory = model.encode(input_ids, position_ids=position_ids, document_ids=document_ids)
        self.model, self.place = model, 0
        padding = (document_ids < 0)[:, None, None, :]  # [N, 1, 1, S]
        self.mask = torch.zeros(padding.shape, dtype=product_dtype(memory), device=memory.device)
        self.mask.masked_fill_(padding, float("-inf"))
        self.layers = [_Layer(block, memory, beams, places) for block in model.decoder.blocks]  # type: ignore[arg-type]

    def step(self, tokens: Tensor) -> Tensor:
        """Return the logits [Q, V] after the tokens [Q], float32."""
        decoder = self.model.decoder
        positions = torch.full((1, 1), self.place, device=tokens.device)
        table = self.model.encoder.embeddings.token.weight
        hidden = decoder.embeddings(tokens[:, None], positions, None, table)  # [Q, 1, D]
        angles = decoder.angles(positions, hidden)
        for layer in self.layers:
            hidden = layer.step(hidden, self.place, angles, self.mask)
        self.place += 1
        if decoder.final_norm is not None:
            hidden = decoder.final_norm(hidden)
        return self.model.logits(hidden)[:, 0].float()

    def reorder(self, rows: Tensor) -> None:
        """Let hypothesis q be what hypothesis `rows[q]` was."""
        for layer in self.layers:
            layer.reorder(rows, self.place)

    def keep(self, sentences: Tensor, beams: int) -> None:
        """Drop all sentences but these (int64, ascending)."""
        rows = (sentences[:, None] * beams + torch.arange(beams, device=sentences.device)).flatten()
        self.mask = self.mask[sentences]
        for layer in self.layers:
            layer.keep(sentences, rows)


@torch.inference_mode()
def generate(model: Seq2SeqModel, batch: Any, tokens: Tokens, config: GenerationConfig) -> list[Generated]:
    """Return the best output for each source of a batch.

    Args:
        model: The model, in evaluation mode.
        batch: Has `input_ids`, `position_ids` and `document_ids`, int64 [N, S].
        tokens: Ids with a meaning.
        config: How to search.

    """
    real = (batch.document_ids >= 0).sum(1)  # [N]
    limits = (real * config.length_ratio).long() + config.length_more
    limits = limits.clamp(max=model.config.max_positions)  # the first token is `begin`, the last `end`
    cache = Cache(
        model, batch.input_ids, batch.position_ids, batch.document_ids, config.beams, int(limits.max())
    )  # fmt: skip
    search = _one_by_one if config.beams == 1 else _beam_search
    return search(cache, limits, tokens, config)


def _one_by_one(cache: Cache, limits: Tensor, tokens: Tokens, config: GenerationConfig) -> list[Generated]:
    """Take the likeliest token, or draw one, until each output has ended; those that have are dropped."""
    count, device = len(limits), limits.device
    found: list[Generated] = [Generated([], 0.0)] * count
    running = torch.arange(count, device=device)  # numbers of the sentences that have not ended
    outputs = torch.full((count, 1), tokens.begin, device=device)
    scores = torch.zeros(count, device=device)
    while len(running):
        logits = forbid(cache.step(outputs[:, -1]), outputs, tokens, config.no_repeat_ngram)
        chosen = draw(logits, config) if config.sample else logits.argmax(-1)
        scores = scores + logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        outputs = torch.cat((outputs, chosen[:, None]), dim=1)
        over = (chosen == tokens.end) | (outputs.shape[1] > limits[running])
        if over.any():
            for place in over.nonzero()[:, 0].tolist():
                ids = outputs[place, 1:].tolist()
                score = float(scores[place]) / len(ids) ** config.length_penalty
                found[int(running[place])] = Generated(ids[:-1] if ids[-1] == tokens.end else ids, score)
            still = (~over).nonzero()[:, 0]
            running, outputs, scores = running[still], outputs[still], scores[still]
            cache.keep(still, 1)
    return found


def _beam_search(cache: Cache, limits: Tensor, tokens: Tokens, config: GenerationConfig) -> list[Generated]:
    """Keep the K best hypotheses of each sentence until K outputs that ended are better than any that may still end."""
    beams, device = config.beams, limits.device
    finished: list[list[Generated]] = [[] for _ in limits]
    running = torch.arange(len(limits), device=device)
    outputs = torch.full((len(limits) * beams, 1), tokens.begin, device=device)  # [Q, t]
    scores = torch.full((len(limits), beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all hypotheses are the same at first: one is looked at
    while len(running):
        logits = forbid(cache.step(outputs[:, -1]), outputs, tokens, config.no_repeat_ngram)
        vocabulary = logits.shape[-1]
        sums = scores[:, :, None] + logits.log_softmax(-1).view(len(running), beams, vocabulary)
        best = sums.flatten(1).topk(min(2 * beams, beams * vocabulary), dim=1)  # [N, 2 K]: enough if K of them end
        parents, chosen = best.indices // vocabulary, best.indices % vocabulary
        length = outputs.shape[1]
        ends = chosen == tokens.end
        _collect(finished, running, outputs, best.values, parents, ends, length, config)
        # those that do not end come first, in the order of their scores
        order = ends.int().argsort(dim=1, stable=True)[:, :beams]  # [N, K]
        scores = best.values.gather(1, order).masked_fill(ends.gather(1, order), -torch.inf)
        rows = torch.arange(len(running), device=device)[:, None] * beams + parents.gather(1, order)
        outputs = torch.cat((outputs[rows.flatten()], chosen.gather(1, order).view(-1, 1)), dim=1)
        cache.reorder(rows.flatten())
        over = _over(finished, running, outputs, scores, limits, config)
        if over.any():
            still = (~over).nonzero()[:, 0]
            running, scores = running[still], scores[still]
            outputs = outputs.view(len(over), beams, -1)[still].flatten(0, 1)
            cache.keep(still, beams)
    return [max(candidates, key=lambda candidate: candidate.score) for candidates in finished]


def _collect(
    finished: list[list[Generated]], running: Tensor, outputs: Tensor, sums: Tensor, parents: Tensor, ends: Tensor,
    length: int, config: GenerationConfig,
) -> None:  # fmt: skip
    """Add the hypotheses that end, if they are among the K best."""
    beams = config.beams
    for sentence, rank in ends[:, :beams].nonzero().tolist():
        if float(sums[sentence, rank]) == -torch.inf:
            continue
        ids = outputs[sentence * beams + int(parents[sentence, rank]), 1:].tolist()
        score = float(sums[sentence, rank]) / length**config.length_penalty
        kept = finished[int(running[sentence])]
        kept.append(Generated(ids, score))
        kept.sort(key=lambda candidate: -candidate.score)
        del kept[beams:]


def _over(
    finished: list[list[Generated]], running: Tensor, outputs: Tensor, scores: Tensor, limits: Tensor,
    config: GenerationConfig,
) -> Tensor:  # fmt: skip
    """Return the sentences that need no more steps, bool [N]; at the longest length hypotheses count as they are."""
    over = torch.zeros(len(running), dtype=torch.bool, device=scores.device)
    length = outputs.shape[1]  # of the outputs if they ended with the next token
    for place, (sentence, best) in enumerate(zip(running.tolist(), scores.max(1).values.tolist(), strict=True)):
        kept, limit = finished[sentence], int(limits[sentence])
        if length > limit:
            if not kept:
                row = place * config.beams + int(scores[place].argmax())
                kept.append(Generated(outputs[row, 1:].tolist(), best / (length - 1) ** config.length_penalty))
            over[place] = True
        elif len(kept) >= config.beams or best == -torch.inf:
            # the sum of log-probabilities only falls; over a longer length it can still become better
            longest = length if config.early or config.length_penalty <= 0 else limit
            over[place] = best / longest**config.length_penalty <= kept[-1].score
    return over


def forbid(logits: Tensor, outputs: Tensor, tokens: Tokens, ngram: int) -> Tensor:
    """Return logits [Q, V] with -inf at special tokens and at those that would repeat an `ngram` of outputs [Q, t]."""
    logits[:, tokens.never] = -torch.inf
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
        least = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p < 1.0:
        ordered, places = logits.softmax(-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of the likelier ones
        unlikely = torch.zeros_like(before, dtype=torch.bool).scatter(1, places, before >= config.top_p)
        logits = logits.masked_fill(unlikely, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]
