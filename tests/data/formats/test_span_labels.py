"""Tags of the usual schemes as BIO."""

import random

import pytest
from seqeval.scheme import BILOU, IOB1, IOBES, Entities

from leanbert.data.formats.span_labels import Span, TagReader, spans
from leanbert.errors import UserError

MIXED = "but at f:1 I- begins a span (IOB1). Use one scheme in a file"


def read(*sentences):
    reader = TagReader()
    return [
        " ".join(reader.read(f"f:{number}", text.split())) for number, text in enumerate(sentences, start=1)
    ], reader


@pytest.mark.parametrize(
    ("written", "meant", "scheme"),
    [
        ("O B-A I-A I-A B-A B-C-A I-C-A O", "O B-A I-A I-A B-A B-C-A I-C-A O", "BIO"),
        ("", "", "BIO"),
        ("I-A I-A O I-B", "B-A I-A O B-B", "IOB1"),
        ("I-A B-A I-A I-B I-B", "B-A B-A I-A B-B I-B", "IOB1"),
        ("S-A B-A E-A O B-B I-B E-B S-B", "B-A B-A I-A O B-B I-B I-B B-B", "IOBES"),
        ("U-A B-A L-A O B-B I-B L-B", "B-A B-A I-A O B-B I-B I-B", "BILOU"),
    ],
)
def test_tags_of_each_scheme_are_read_as_the_spans_that_they_mean(written, meant, scheme):
    found, reader = read(written)
    assert (found, reader.scheme) == ([meant], scheme)


@pytest.mark.parametrize(
    ("sentences", "fault"),
    [
        (["B-A I-A O I-A"], 'f:1: tag 3 is "I-A" after "O". Begin the span with "B-A"'),
        (["B-A I-B"], 'f:1: tag 1 is "I-B" after "B-A". Begin the span with "B-B"'),
        (["B-A I-A I-C-A"], 'f:1: tag 2 is "I-C-A" after "I-A". Begin the span with "B-C-A"'),
        (["B-A", "O", "I-A"], 'f:3: tag 0 is "I-A" after "O". Begin the span with "B-A"'),
        (["I-A", "O B-A"], f'f:2: tag 1 is "B-A" after "O", {MIXED}'),
        (["I-A", "I-B B-A"], f'f:2: tag 1 is "B-A" after "I-B", {MIXED}'),
        (["B-A E-A I-A"], 'f:1: tag 2 is "I-A" after "E-A". Begin the span with "B-A"'),
        (["O E-A"], 'f:1: tag 1 is "E-A" after "O". Begin the span with "B-A"'),
        (["I-A", "S-A"], f'f:2: tag 0 is "S-A" after "O", {MIXED}'),
        (["O A"], 'f:1: tag 1 is "A". Tags are O, B-x or I-x, where x is a role'),
        (["O B- O"], 'f:1: tag 1 is "B-". Tags are O, B-x or I-x, where x is a role'),
        (["X-A"], 'f:1: tag 0 is "X-A". Tags are O, B-x or I-x, where x is a role'),
        (["b-A"], 'f:1: tag 0 is "b-A". Tags are O, B-x or I-x, where x is a role'),
        (
            ["0"],
            'f:1: tag 0 is "0". Tags are O, B-x or I-x, where x is a role. Set data.label_names to the names '
            "of numbers",
        ),
    ],
)
def test_the_first_illegal_tag_is_named(sentences, fault):
    with pytest.raises(UserError) as raised:
        read(*sentences)
    assert str(raised.value) == fault


@pytest.mark.parametrize("scheme", [IOB1, IOBES, BILOU])
def test_random_spans_are_those_that_seqeval_reads(scheme):
    generator = random.Random(3)
    written = []
    for _ in range(100):
        tags, role = [], ""
        while len(tags) < 8:
            size, before, role = generator.randint(1, 3), role, generator.choice(["", "A", "B"])
            if not role:
                tags += ["O"]
            elif scheme is IOB1:
                tags += [f"{'B' if role == before else 'I'}-{role}", *[f"I-{role}"] * (size - 1)]
            else:
                one, last = ("S", "E") if scheme is IOBES else ("U", "L")
                tags += [f"{one}-{role}"] if size == 1 else [f"B-{role}", *[f"I-{role}"] * (size - 2), f"{last}-{role}"]
        written.append(tags)
    reader = TagReader()
    found = [spans(reader.read("f:1", tags)) for tags in written]
    theirs = [[Span(e.tag, e.start, e.end) for e in row] for row in Entities(written, scheme).entities]
    assert found == theirs
    assert sum(map(len, found)) > 100
    assert reader.scheme == scheme.__name__
