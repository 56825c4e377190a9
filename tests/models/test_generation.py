import math
from functools import cache
from itertools import product

import pytest
import torch

from leanbert.errors import UserError
from leanbert.models import generation
from leanbert.models.decoding_cache import Cache
from leanbert.models.generation import (
    RANGES,
    GenerationConfig,
    SpecialTokens,
    draw,
    generate,
    repeated,
    top_continuations,
)
from tests.pretrained.pairs import BEGIN, END, pack, some_pairs, source_inputs, tiny_seq2seq

PRESETS = pytest.mark.parametrize("preset", ["bert", "modern"])
COPY = pytest.mark.parametrize("copy", [False, True])
TOKENS = SpecialTokens(BEGIN, END, [0, 1, BEGIN, 4])


@cache
def model_that_ends(preset, targets=None, copy=False):
    """A model in float64 that has half learned to write its source backwards: outputs differ, and most of them end.

    With `targets` several tokens of sources are one of the fewer that targets have.
    """
    model = tiny_seq2seq(preset=preset, vocabulary=30, noise=0.0, targets=targets, copy=copy)
    backwards = [
        (source, [BEGIN, *(5 + (token - 5) % ((targets or 30) - 5) for token in source[-2:0:-1]), END])
        for source, _ in some_pairs(128, 7, 30)
    ]
    batch = pack([backwards[start : start + 3] for start in range(0, 126, 3)], 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        model.loss_sum(batch.inputs, batch.decoder_inputs, batch.targets, 0.1 * (not copy)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def sources(count=12, vocabulary=30, seed=0):
    return [source for source, _ in some_pairs(count, seed, vocabulary)]


def all_ids(found):
    return [output.ids for output in found]


def assert_equal(found, expected):
    assert all_ids(found) == all_ids(expected)
    assert [output.score for output in found] == pytest.approx([output.score for output in expected], rel=1e-9)


@torch.no_grad()
def log_probs(model, source, output, ngram=0):
    """Log-probabilities of the next token by the whole model, without a cache, float32 as in decoding."""
    batch = pack([[(source, [BEGIN, *output, END])]], len(source), len(output) + 1)
    logits = model(batch.inputs, batch.decoder_inputs)[0, -1].float()
    logits[TOKENS.suppressed] = -torch.inf
    if ngram:
        logits[repeated(output, ngram)] = -torch.inf
    return logits.log_softmax(-1)


def limit_of(source, config):
    return int(len(source) * config.length_ratio) + config.length_more


def uncached_greedy(model, source, config):
    output, score = [], 0.0
    while len(output) < limit_of(source, config):
        values = log_probs(model, source, output, config.no_repeat_ngram)
        output.append(int(values.argmax()))
        score += float(values.max())
        if output[-1] == END:
            break
    score /= len(output) ** config.length_penalty
    return output[:-1] if output[-1] == END else output, score


@PRESETS
@pytest.mark.parametrize(
    ("ngram", "targets", "copy"), [(0, None, False), (2, None, False), (0, 22, False), (2, None, True)]
)
def test_cached_and_uncached_decoding_agree(preset, ngram, targets, copy):
    model, config = model_that_ends(preset, targets, copy), GenerationConfig(no_repeat_ngram=ngram)
    texts = sources()
    found = generate(model, source_inputs(texts), TOKENS, config)
    for text, output in zip(texts, found, strict=True):
        ids, score = uncached_greedy(model, text, config)
        assert output.ids == ids
        assert output.score == pytest.approx(score, rel=1e-5)
    lengths = [len(output.ids) for output in found]
    assert len(set(lengths)) > 3
    assert len({tuple(output.ids) for output in found}) > 8
    assert max(max(output.ids, default=0) for output in found) < (targets or 30)
    ended = [len(o.ids) < limit_of(text, config) for text, o in zip(texts, found, strict=True)]
    assert any(ended)


@PRESETS
@COPY
def test_logits_of_the_cache_are_the_models_after_beams_have_changed(preset, copy):
    """Hypotheses that go on from each other, and sentences that are dropped: each sees its own past."""
    model, texts = model_that_ends(preset, copy=copy), sources(4)
    beams, chance = 3, torch.Generator().manual_seed(0)
    with torch.inference_mode():
        cache = Cache(model, source_inputs(texts), beams, 8)
        outputs = [[[] for _ in range(beams)] for _ in texts]
        tokens = torch.full((len(texts) * beams,), BEGIN)
        for step in range(6):
            logits = cache.step(tokens)
            for number, (text, own) in enumerate(zip(texts, outputs, strict=True)):
                for beam, output in enumerate(own):
                    logits[number * beams + beam, TOKENS.suppressed] = -torch.inf
                    found = logits[number * beams + beam].log_softmax(-1)
                    torch.testing.assert_close(found, log_probs(model, text, output), rtol=1e-5, atol=1e-5)
            parents = torch.randint(beams, (len(texts), beams), generator=chance)
            new = torch.randint(5, 30, (len(texts), beams), generator=chance)
            cache.reorder(parents)
            outputs = [
                [[*own[p], t] for p, t in zip(parents[n].tolist(), new[n].tolist(), strict=True)]
                for n, own in enumerate(outputs)
            ]
            if step in (1, 3):
                kept = [0, 2, 3] if step == 1 else [1, 2]
                cache.select(torch.tensor(kept))
                texts, outputs, new = [texts[n] for n in kept], [outputs[n] for n in kept], new[kept]
            tokens = new.flatten()


@PRESETS
@pytest.mark.parametrize("ngram", [0, 2])
def test_one_beam_is_greedy(preset, ngram):
    """In the beam search's own code too, which `beams: 1` never enters, where length does not count.

    With a length penalty it would go on with the second best token after an end.
    """
    model, batch = model_that_ends(preset), source_inputs(sources())
    config = GenerationConfig(beams=1, no_repeat_ngram=ngram, length_penalty=0.0)
    greedy = generate(model, batch, TOKENS, config)
    limits = [limit_of(source, config) for source in sources()]
    with torch.inference_mode():
        found = generation._beam_search(
            Cache(model, batch, 1, max(limits)), limits, TOKENS, config, torch.device("cpu")
        )
    assert all_ids(found) == all_ids(greedy)
    assert [o.score for o in found] == pytest.approx([o.score for o in greedy], rel=1e-5)


def brute_force(model, source, config, vocabulary):
    """The best of all outputs: those that end, and if config says so none other, by score."""
    limit, words = limit_of(source, config), [i for i in range(vocabulary) if i not in (*TOKENS.suppressed, END)]
    found = []
    for length in range(limit):
        for output in product(words, repeat=length):
            total, output = 0.0, list(output)
            for place in range(length):
                total += float(log_probs(model, source, output[:place], config.no_repeat_ngram)[output[place]])
            if total == -float("inf"):
                continue
            total += float(log_probs(model, source, output, config.no_repeat_ngram)[END])
            found.append((total / (length + 1) ** config.length_penalty, output))
    return max(found)


@PRESETS
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("ngram", [0, 1])
def test_enough_beams_find_the_best_of_all_outputs(preset, penalty, ngram):
    """Three words and the end, at most four tokens: 3^3 hypotheses at most."""
    vocabulary = 8
    for seed in range(3):
        model = tiny_seq2seq(preset=preset, vocabulary=vocabulary, seed=seed, noise=0.3).eval()
        texts = sources(3, vocabulary, seed)
        config = GenerationConfig(
            beams=40, length_penalty=penalty, early=False, length_ratio=0.0, length_more=4, no_repeat_ngram=ngram
        )
        found = generate(model, source_inputs(texts), TOKENS, config)
        for text, output in zip(texts, found, strict=True):
            score, ids = brute_force(model, text, config, vocabulary)
            assert output.score == pytest.approx(score, rel=1e-5)
            assert output.ids == ids


@PRESETS
def test_more_beams_find_better_outputs_than_greedy(preset):
    model, batch = model_that_ends(preset), source_inputs(sources(30))
    one, five = (generate(model, batch, TOKENS, GenerationConfig(beams=beams, length_penalty=0.0)) for beams in (1, 5))
    gains = [better.score - own.score for own, better in zip(one, five, strict=True)]
    assert sum(gains) > 0.1
    assert sum(gain > -1e-6 for gain in gains) >= 27


@PRESETS
def test_stopping_late_finds_the_longer_outputs_that_a_length_penalty_favours(preset):
    model, batch = model_that_ends(preset), source_inputs(sources(30))
    found = {
        early: generate(model, batch, TOKENS, GenerationConfig(beams=2, length_penalty=2.0, early=early))
        for early in (True, False)
    }
    gains = [late.score - soon.score for soon, late in zip(found[True], found[False], strict=True)]
    assert min(gains) >= 0
    assert sum(gain > 0.001 for gain in gains) >= 3


@PRESETS
@COPY
@pytest.mark.parametrize("beams", [1, 4])
def test_order_padding_and_batch_size_do_not_change_outputs(preset, copy, beams):
    model, texts = model_that_ends(preset, copy=copy), sources(12)
    config = GenerationConfig(beams=beams)
    expected = generate(model, source_inputs(texts), TOKENS, config)
    assert_equal(generate(model, source_inputs(texts[::-1]), TOKENS, config)[::-1], expected)
    assert_equal(generate(model, source_inputs(texts, extra=9), TOKENS, config), expected)
    for size in (1, 5):
        parts = [source_inputs(texts[start : start + size]) for start in range(0, 12, size)]
        assert_equal([output for part in parts for output in generate(model, part, TOKENS, config)], expected)


@PRESETS
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("share", [1, 8, 10**6])
def test_dropping_what_has_ended_has_no_effect(monkeypatch, preset, beams, share):
    """At once, in groups, or at a million times the least share: at once too."""
    model, batch, config = model_that_ends(preset), source_inputs(sources(12)), GenerationConfig(beams=beams)
    monkeypatch.setattr(generation, "DROPPED_TOGETHER", 1)  # when all have ended: never
    expected, counts = generate(model, batch, TOKENS, config), []
    monkeypatch.setattr(generation, "DROPPED_TOGETHER", share)
    select = Cache.select
    monkeypatch.setattr(Cache, "select", lambda cache, kept: (counts.append(len(kept)), select(cache, kept)))
    assert_equal(generate(model, batch, TOKENS, config), expected)
    assert counts[-1] == 0
    assert (len(counts) == 1) == (share == 1)


@PRESETS
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_no_ngram_is_repeated(preset, beams, ngram):
    model, texts = tiny_seq2seq(preset=preset, noise=0.2, vocabulary=30).eval(), sources()
    with torch.no_grad():
        model.head.bias[5:8] += 3.0  # left alone it repeats itself, and does not end
        model.head.bias[END] -= 1.0

    def repeats(output):
        grams = [tuple(output[i : i + ngram]) for i in range(len(output) - ngram + 1)]
        return len(grams) - len(set(grams))

    free = generate(model, source_inputs(texts), TOKENS, GenerationConfig(beams=beams))
    bound = generate(model, source_inputs(texts), TOKENS, GenerationConfig(beams=beams, no_repeat_ngram=ngram))
    assert sum(repeats(output.ids) for output in free) > 10
    assert [repeats(output.ids) for output in bound] == [0] * 12
    assert sum(len(output.ids) for output in bound) > 50


def test_tokens_that_would_repeat():
    assert repeated([5, 6, 7, 5, 6], 3) == [7]
    assert repeated([5, 6, 5, 7, 5], 2) == [6, 7]
    assert repeated([5, 6], 1) == [5, 6]
    assert repeated([5], 3) == []
    assert repeated([], 1) == []


@pytest.mark.parametrize("beams", [1, 3])
def test_the_longest_output_follows_from_the_length_of_the_source(beams):
    model, texts = tiny_seq2seq().eval(), sources(8, 100)
    with torch.no_grad():
        model.head.bias[END] = -50.0
    config = GenerationConfig(beams=beams, length_ratio=1.5, length_more=2)
    found = generate(model, source_inputs(texts, extra=4), TOKENS, config)
    assert [len(output.ids) for output in found] == [int(1.5 * len(text)) + 2 for text in texts]
    for output in found:
        assert not set(output.ids) & {0, 1, BEGIN, 4, END}
    config = GenerationConfig(beams=beams, length_ratio=100.0)
    assert {len(output.ids) for output in generate(model, source_inputs(texts), TOKENS, config)} == {32}


@PRESETS
def test_sampling_from_one_token_is_greedy(preset):
    model, batch = model_that_ends(preset), source_inputs(sources())
    sampled = generate(model, batch, TOKENS, GenerationConfig(sample=True, top_k=1))
    assert_equal(sampled, generate(model, batch, TOKENS, GenerationConfig()))


def test_sampling_is_a_function_of_the_seed():
    model, batch, config = model_that_ends("bert"), source_inputs(sources()), GenerationConfig(sample=True)

    def sampled(seed):
        torch.manual_seed(seed)
        return all_ids(generate(model, batch, TOKENS, config))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    forbidden = set(TOKENS.suppressed)
    assert not any(forbidden & set(ids) for ids in sampled(3))


def drawn(probabilities, **settings):
    """Shares of the tokens in 20,000 draws."""
    torch.manual_seed(0)
    logits = torch.tensor(probabilities).log().expand(20_000, -1)
    counts = draw(logits, GenerationConfig(sample=True, **settings)).bincount(minlength=len(probabilities))
    return (counts / 20_000).tolist()


def test_draws_have_the_probabilities_that_are_asked_for():
    own = [0.1, 0.4, 0.2, 0.3]
    assert drawn(own) == pytest.approx(own, abs=0.02)
    assert drawn(own, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.02)
    assert drawn(own, top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.02)  # 0.4 is too little, 0.7 enough
    assert drawn(own, top_p=0.75) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.02)
    assert drawn(own, top_p=0.01) == [0, 1, 0, 0]
    assert drawn(own, temperature=0.5) == pytest.approx([1 / 30, 16 / 30, 4 / 30, 9 / 30], abs=0.02)
    assert drawn([0.0, 0.5, 0.5, 0.0], top_k=3)[0] == 0


@pytest.mark.parametrize("vocabulary", [7, 64, 1000])
@pytest.mark.parametrize("count", [2, 10])
def test_top_continuations_are_those_of_a_sort(vocabulary, count):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, generator=generator)
    scores[0, 1:] = scores[2, 3] = -torch.inf
    values = torch.randn(15, vocabulary, generator=generator).log_softmax(-1)
    values[:, 2] = -torch.inf
    values[1] = torch.nan  # of a hypothesis that is none
    sums = scores[:, :, None] + values.view(3, 5, -1)
    sums = sums.masked_fill(sums.isnan(), -torch.inf).flatten(1)
    expected = sums.sort(dim=1, descending=True)
    total, parents, tokens = top_continuations(scores, values.clone(), count)
    finite = expected.values[:, :count] > -torch.inf
    assert torch.equal(total[finite], expected.values[:, :count][finite])
    assert torch.equal((parents * vocabulary + tokens)[finite], expected.indices[:, :count][finite])
    assert total.shape == (3, count)
    assert not total.isnan().any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample": True, "beams": 2}, r"^model\.generation\.sample: draws one output"),
        *(
            ({name: value}, rf"^model\.generation\.{name}: .* is out of range\. Give ")
            for name in RANGES
            for value in (-101, math.nan, math.inf, "1", None, [1], True)
        ),
        ({"beams": 0}, r"^model\.generation\.beams: 0 is out of range\. Give a whole number from 1 to 1000\.$"),
        ({"length_more": 0}, r"^model\.generation\.length_more: "),
        ({"top_p": 0.0}, r"^model\.generation\.top_p: "),
        ({"temperature": 0.0}, r"^model\.generation\.temperature: "),
        ({"early": 1}, r"^model\.generation\.early: 1 is neither true nor false"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**settings)
