"""A grammar of English sentences in which it is known who does what to whom.

Roles are those of PropBank. The same noun phrase is ARG0 in the active and, after "by", in the passive; a recipient
stands bare before the thing or after "to"; subjects are shared by two verbs, relative clauses stand between subject and
verb, and what is said is a clause: so a label depends on the predicate and on words far from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from leanbert.data.samples.draw import Draw, entries

PEOPLE = entries(
    "teacher, doctor, farmer, student, lawyer, painter, nurse, pilot, king, queen, neighbour, child, woman, "
    "man, girl, boy, singer, guard, baker, driver"
)
THINGS = entries(
    "letter, book, picture, house, boat, table, lamp, bicycle, ring, cake, coat, basket, flower, box, key, "
    "map, report, song, door, wall"
)
ADJECTIVES = entries("old, young, red, green, small, big, new, tall, quiet, famous")
TIMES = entries(
    "yesterday, today, last week, in the morning, after the meeting, before the war, every day, on Monday, "
    "in 1990, at noon"
)
PLACES = entries(
    "in the garden, at school, in the kitchen, near the river, behind the church, at the station, in London, "
    "on the roof"
)
MODALS = entries("will, may, should, could, must")


class Verb(NamedTuple):
    """Forms of a verb, and whether it has a thing, and a recipient too."""

    base: str
    past: str
    participle: str
    thing: bool
    recipient: bool


def _verbs(table: str, thing: bool = True, recipient: bool = False) -> tuple[Verb, ...]:
    rows = (forms.split() for forms in entries(table))
    return tuple(Verb(base, past, participle, thing, recipient) for base, past, participle in rows)


_WITH_THING = _verbs(
    "see saw seen, paint painted painted, repair repaired repaired, break broke broken, find found found, "
    "take took taken, clean cleaned cleaned, steal stole stolen, watch watched watched, hide hid hidden"
) + _verbs(
    "give gave given, send sent sent, show showed shown, sell sold sold, offer offered offered, bring brought brought",
    recipient=True,
)
VERBS = _WITH_THING + _verbs(
    "sleep slept slept, sing sang sung, laugh laughed laughed, wait waited waited", thing=False
)
REPORTING = _verbs("say said said, think thought thought, know knew known")

Words = tuple[int, int]
"""The first word of a phrase and the one after its last."""


@dataclass
class _Frame:
    """A predicate and the phrases that fill its roles."""

    predicate: int = -1
    roles: list[tuple[str, Words]] = field(default_factory=list)

    def labels(self, length: int) -> list[str]:
        tags = ["O"] * length
        for role, (start, end) in [*self.roles, ("V", (self.predicate, self.predicate + 1))]:
            tags[start:end] = [f"B-{role}"] + [f"I-{role}"] * (end - start - 1)
        return tags


@dataclass
class _Sentence:
    """The words so far and the predicates among them."""

    draw: Draw
    tokens: list[str] = field(default_factory=list)
    frames: list[_Frame] = field(default_factory=list)

    def add(self, words: str) -> Words:
        start = len(self.tokens)
        self.tokens += words.split()
        return start, len(self.tokens)

    def frame(self) -> _Frame:
        self.frames.append(_Frame())
        return self.frames[-1]


def role_records(draw: Draw) -> list[dict[str, Any]]:
    """Return a record {"tokens", "predicate", "labels"} for each predicate of a sentence, in their order."""
    sentence = _Sentence(draw)
    _clause(sentence, depth=0)
    if draw.chance(0.12):
        sentence.add("and")
        _clause(sentence, depth=0)
    sentence.add(".")
    frames = sorted(sentence.frames, key=lambda frame: frame.predicate)
    tokens = sentence.tokens
    return [
        {"tokens": list(tokens), "predicate": frame.predicate, "labels": frame.labels(len(tokens))} for frame in frames
    ]


def _clause(sentence: _Sentence, depth: int) -> None:
    """Add subject and predicate, the time before them or not; `depth` counts the clauses around this one."""
    draw, frame = sentence.draw, sentence.frame()
    time_first = draw.chance(0.15)
    if time_first:
        frame.roles.append(("ARGM-TMP", sentence.add(draw.one_of(TIMES))))
        sentence.add(",")
    if depth == 0 and draw.chance(0.12):
        _report(sentence, frame)
        return
    passive = draw.chance(0.3)
    subject = _thing(sentence, depth) if passive else _person(sentence, depth)
    frame.roles.append(("ARG1" if passive else "ARG0", subject))
    verb = draw.one_of(_WITH_THING if passive else VERBS)
    (_passive if passive else _active)(sentence, frame, verb)
    _circumstances(sentence, frame, time=not time_first)
    if not passive and depth == 0 and draw.chance(0.15):
        sentence.add("and")
        second = sentence.frame()
        second.roles.append(("ARG0", subject))
        _active(sentence, second, draw.one_of(VERBS))
        _circumstances(sentence, second)


def _report(sentence: _Sentence, frame: _Frame) -> None:
    """Add who says that something is so."""
    frame.roles.append(("ARG0", _person(sentence, depth=1)))
    _auxiliaries(sentence, frame, sentence.draw.one_of(REPORTING))
    start, _ = sentence.add("that")
    _clause(sentence, depth=1)
    frame.roles.append(("ARG1", (start, len(sentence.tokens))))


def _active(sentence: _Sentence, frame: _Frame, verb: Verb) -> None:
    draw = sentence.draw
    _auxiliaries(sentence, frame, verb)
    recipient_first = verb.recipient and draw.chance(0.5)
    if recipient_first:
        frame.roles.append(("ARG2", _noun(sentence, PEOPLE)))
    if verb.thing:
        frame.roles.append(("ARG1", _noun(sentence, THINGS)))
    if verb.recipient and not recipient_first and draw.chance(0.8):
        frame.roles.append(("ARG2", _after("to", sentence)))


def _passive(sentence: _Sentence, frame: _Frame, verb: Verb) -> None:
    _auxiliaries(sentence, frame, verb, passive=True)
    if verb.recipient and sentence.draw.chance(0.6):
        frame.roles.append(("ARG2", _after("to", sentence)))
    if sentence.draw.chance(0.7):
        frame.roles.append(("ARG0", _after("by", sentence)))


def _auxiliaries(sentence: _Sentence, frame: _Frame, verb: Verb, passive: bool = False) -> None:
    """Add modal or auxiliary, negation and the verb in the form that they ask for."""
    draw = sentence.draw
    modal, negated = draw.chance(0.2), draw.chance(0.15)
    if modal:
        frame.roles.append(("ARGM-MOD", sentence.add(draw.one_of(MODALS))))
    elif passive or negated:
        sentence.add("was" if passive else "did")
    if negated:
        frame.roles.append(("ARGM-NEG", sentence.add("not")))
    if passive and modal:
        sentence.add("be")
    form = verb.participle if passive else verb.base if modal or negated else verb.past
    frame.predicate, _ = sentence.add(form)


def _circumstances(sentence: _Sentence, frame: _Frame, time: bool = True) -> None:
    draw = sentence.draw
    if draw.chance(0.3):
        frame.roles.append(("ARGM-LOC", sentence.add(draw.one_of(PLACES))))
    if time and draw.chance(0.3):
        frame.roles.append(("ARGM-TMP", sentence.add(draw.one_of(TIMES))))


def _person(sentence: _Sentence, depth: int) -> Words:
    """Add a person, perhaps with a relative clause of which it is the subject ("who broke the lamp")."""
    start, end = _noun(sentence, PEOPLE)
    if depth == 0 and sentence.draw.chance(0.15):
        frame = sentence.frame()
        frame.roles += [("ARG0", (start, end)), ("R-ARG0", sentence.add("who"))]
        _active(sentence, frame, sentence.draw.one_of(VERBS))
    return start, len(sentence.tokens)


def _thing(sentence: _Sentence, depth: int) -> Words:
    """Add a thing, perhaps with a relative clause of which it is the object ("that the boy broke")."""
    start, end = _noun(sentence, THINGS)
    if depth == 0 and sentence.draw.chance(0.15):
        frame = sentence.frame()
        frame.roles += [("ARG1", (start, end)), ("R-ARG1", sentence.add("that")), ("ARG0", _noun(sentence, PEOPLE))]
        _auxiliaries(sentence, frame, sentence.draw.one_of(_WITH_THING))
    return start, len(sentence.tokens)


def _after(preposition: str, sentence: _Sentence) -> Words:
    start, _ = sentence.add(preposition)
    return start, _noun(sentence, PEOPLE)[1]


def _noun(sentence: _Sentence, nouns: tuple[str, ...]) -> Words:
    draw = sentence.draw
    adjective = f"{draw.one_of(ADJECTIVES)} " if draw.chance(0.3) else ""
    article = draw.one_of(("the", "the", "my", "her"))
    return sentence.add(f"{article} {adjective}{draw.one_of(nouns)}")
