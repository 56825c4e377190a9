"""A grammar of English sentences in which it is known who does what to whom.

Roles are those of PropBank. The same noun phrase is ARG0 in the active and, after "by", in the passive; a recipient
stands bare before the thing or after "to"; subjects are shared by two verbs, relative clauses stand between subject and
verb, and what is said is a clause: so a label depends on the predicate and on words far from it.
"""

from __future__ import annotations

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

Phrase = tuple[int, int]
"""The first word of a phrase and the one after its last."""
Frame = dict[str, Phrase]
"""The phrases that fill the roles of a predicate, which is "V" itself."""


def role_records(draw: Draw) -> list[dict[str, Any]]:
    """Return a record {"tokens", "predicate", "labels"} for each predicate of a sentence, in their order."""
    sentence = _Sentence(draw)
    sentence.clause(depth=0)
    if draw.chance(0.12):
        sentence.add("and")
        sentence.clause(depth=0)
    sentence.add(".")
    records = []
    for frame in sorted(sentence.frames, key=lambda frame: frame["V"]):
        labels = ["O"] * len(sentence.tokens)
        for role, (start, end) in frame.items():
            labels[start:end] = [f"B-{role}"] + [f"I-{role}"] * (end - start - 1)
        records.append({"tokens": list(sentence.tokens), "predicate": frame["V"][0], "labels": labels})
    return records


class _Sentence:
    """The words so far and the predicates among them; `depth` counts the clauses around what is added."""

    def __init__(self, draw: Draw) -> None:
        self.one_of, self.chance = draw.one_of, draw.chance
        self.tokens, self.frames = list[str](), list[Frame]()

    def add(self, words: str) -> Phrase:
        start = len(self.tokens)
        self.tokens += words.split()
        return start, len(self.tokens)

    def frame(self, **roles: Phrase) -> Frame:
        self.frames.append(roles)
        return roles

    def clause(self, depth: int) -> None:
        """Add subject and predicate, the time before them or not."""
        frame = self.frame()
        time_first = self.chance(0.15)
        if time_first:
            frame["ARGM-TMP"] = self.add(self.one_of(TIMES))
            self.add(",")
        if depth == 0 and self.chance(0.12):
            frame["ARG0"] = self.person(depth=1)
            self.verb(frame, self.one_of(REPORTING))
            start, _ = self.add("that")
            self.clause(depth=1)
            frame["ARG1"] = start, len(self.tokens)
        elif self.chance(0.3):
            frame["ARG1"] = self.thing(depth)
            self.passive(frame, self.one_of(_WITH_THING))
            self.circumstances(frame, time=not time_first)
        else:
            frame["ARG0"] = self.person(depth)
            self.active(frame, self.one_of(VERBS))
            self.circumstances(frame, time=not time_first)
            if depth == 0 and self.chance(0.15):
                self.add("and")
                second = self.frame(ARG0=frame["ARG0"])
                self.active(second, self.one_of(VERBS))
                self.circumstances(second)

    def active(self, frame: Frame, verb: Verb) -> None:
        self.verb(frame, verb)
        recipient_first = verb.recipient and self.chance(0.5)
        if recipient_first:
            frame["ARG2"] = self.noun(PEOPLE)
        if verb.thing:
            frame["ARG1"] = self.noun(THINGS)
        if verb.recipient and not recipient_first and self.chance(0.8):
            frame["ARG2"] = self.noun(PEOPLE, after="to")

    def passive(self, frame: Frame, verb: Verb) -> None:
        self.verb(frame, verb, passive=True)
        if verb.recipient and self.chance(0.6):
            frame["ARG2"] = self.noun(PEOPLE, after="to")
        if self.chance(0.7):
            frame["ARG0"] = self.noun(PEOPLE, after="by")

    def verb(self, frame: Frame, verb: Verb, passive: bool = False) -> None:
        """Add modal or auxiliary, negation and the verb in the form that they ask for."""
        modal, negated = self.chance(0.2), self.chance(0.15)
        if modal:
            frame["ARGM-MOD"] = self.add(self.one_of(MODALS))
        elif passive or negated:
            self.add("was" if passive else "did")
        if negated:
            frame["ARGM-NEG"] = self.add("not")
        if passive and modal:
            self.add("be")
        frame["V"] = self.add(verb.participle if passive else verb.base if modal or negated else verb.past)

    def circumstances(self, frame: Frame, time: bool = True) -> None:
        if self.chance(0.3):
            frame["ARGM-LOC"] = self.add(self.one_of(PLACES))
        if time and self.chance(0.3):
            frame["ARGM-TMP"] = self.add(self.one_of(TIMES))

    def person(self, depth: int) -> Phrase:
        """Add a person, perhaps with a relative clause of which it is the subject ("who broke the lamp")."""
        person = self.noun(PEOPLE)
        if depth == 0 and self.chance(0.15):
            frame = self.frame(ARG0=person)
            frame["R-ARG0"] = self.add("who")
            self.active(frame, self.one_of(VERBS))
        return person[0], len(self.tokens)

    def thing(self, depth: int) -> Phrase:
        """Add a thing, perhaps with a relative clause of which it is the object ("that the boy broke")."""
        thing = self.noun(THINGS)
        if depth == 0 and self.chance(0.15):
            frame = self.frame(ARG1=thing)
            frame["R-ARG1"] = self.add("that")
            frame["ARG0"] = self.noun(PEOPLE)
            self.verb(frame, self.one_of(_WITH_THING))
        return thing[0], len(self.tokens)

    def noun(self, nouns: tuple[str, ...], after: str = "") -> Phrase:
        """Add article, perhaps adjective, and noun, after a preposition."""
        adjective = self.one_of(ADJECTIVES) if self.chance(0.3) else ""
        article = self.one_of(("the", "the", "my", "her"))
        return self.add(f"{after} {article} {adjective} {self.one_of(nouns)}")
