"""A grammar of English sentences and their translation into a toy language.

The toy language has a stem for each English lemma. To find a word, more than its own source word is needed:

- Its verb stands at the end, behind objects; the time comes first, the place before the object, with a postposition.
- Nouns have one of two classes (vowel o or a), a plural (-r) and an object case (-n). Articles and adjectives take the
  endings of their noun; the adjective follows it.
- The verb has a tense (past -iv, present -el) and agrees in number with its subject (plural -r). "not" precedes it.
"""

from __future__ import annotations

from typing import NamedTuple

from leanbert.data.samples.draw import Draw, entries

NOUNS = entries(
    "dog, cat, horse, bird, farmer, teacher, doctor, king, girl, boy, house, garden, river, tree, table, "
    "door, window, book, letter, road, boat, lamp, stone, flower, apple, cup"
)
ADJECTIVES = entries("old, young, red, green, small, big, happy, tired, strong, quiet")
TRANSITIVE = (  # base, third person, past
    "see sees saw, find finds found, like likes liked, paint paints painted, carry carries carried, "
    "hear hears heard, follow follows followed, clean cleans cleaned, buy buys bought, draw draws drew"
)
INTRANSITIVE = "sleep sleeps slept, sing sings sang, wait waits waited, run runs ran, laugh laughs laughed"
TIMES = ("today", "yesterday", "often", "never", "now")
PLACES = ("in", "near", "behind", "under")
PRONOUNS = {"he": False, "she": False, "they": True}  # whether they are plural
JOINTS = ("and", "because", "but")

_STEMS = entries("b, d, f, g, k, l, m, n, p, r, s, t, v, z")
_VOWELS = "aeiou"


class _Verb(NamedTuple):
    base: str
    third: str
    past: str


class _Phrase(NamedTuple):
    source: str
    target: str
    plural: bool


def _verbs(table: str) -> tuple[_Verb, ...]:
    return tuple(_Verb(*forms.split()) for forms in entries(table))


def _lexicon() -> dict[str, str]:
    """Return a two-syllable stem for each lemma; which one depends on the lemma's place only."""
    verbs = [verb.base for verb in _verbs(TRANSITIVE) + _verbs(INTRANSITIVE)]
    lemmas = [*NOUNS, *ADJECTIVES, *verbs, *TIMES, *PLACES, *PRONOUNS, *JOINTS, "the", "a", "two", "some", "not"]
    syllables = [consonant + vowel for consonant in _STEMS for vowel in _VOWELS]  # 70
    stems = {}
    for place, lemma in enumerate(lemmas):  # 29 and 70 have no common factor: 70 different first syllables in a row
        first, second = (place * 29) % len(syllables), (place * 11 + place // len(syllables) * 3) % len(syllables)
        stems[lemma] = syllables[first] + syllables[second] + _STEMS[place % len(_STEMS)]
    return stems


_VERBS = {True: _verbs(TRANSITIVE), False: _verbs(INTRANSITIVE)}
_TARGET = _lexicon()
_CLASS = {noun: "oa"[place % 3 == 0] for place, noun in enumerate(NOUNS)}


def translation_pair(draw: Draw) -> dict[str, str]:
    """Return a sentence of one or two clauses, {"source", "target"}; words and the full stop are apart by a space."""
    source, target = _clause(draw)
    if draw.chance(0.25):
        joint = draw.one_of(JOINTS)
        more_source, more_target = _clause(draw)
        source, target = f"{source} {joint} {more_source}", f"{target} {_TARGET[joint]} {more_target}"
    return {"source": f"{source} .", "target": f"{target} ."}


def _clause(draw: Draw) -> tuple[str, str]:
    subject = _subject(draw)
    transitive = draw.chance(0.7)
    verb = _verb(draw, draw.one_of(_VERBS[transitive]), subject.plural)
    source, target = [subject.source, verb.source], [subject.target]
    if transitive:
        thing = _noun_phrase(draw, case="n")
        source.append(thing.source)
        target.append(thing.target)
    if draw.chance(0.35):
        place, ground = draw.one_of(PLACES), _noun_phrase(draw)
        source += [place, ground.source]
        target[1:1] = [ground.target, _TARGET[place]]
    if draw.chance(0.3):
        time = draw.one_of(TIMES)
        source.append(time)
        target.insert(0, _TARGET[time])
    return " ".join(source), " ".join([*target, verb.target])


def _subject(draw: Draw) -> _Phrase:
    if draw.chance(0.2):
        pronoun = draw.one_of(tuple(PRONOUNS))
        return _Phrase(pronoun, _TARGET[pronoun], PRONOUNS[pronoun])
    return _noun_phrase(draw)


def _noun_phrase(draw: Draw, case: str = "") -> _Phrase:
    """Return article, perhaps adjective, and noun; in the target noun and adjective, all with the noun's endings."""
    noun, plural = draw.one_of(NOUNS), draw.chance(0.4)
    article = draw.one_of(("the", "the", "two", "some") if plural else ("the", "a"))
    ending = _CLASS[noun] + "r" * plural + case
    source, target = [article], [_TARGET[article] + ending, _TARGET[noun] + ending]
    if draw.chance(0.5):
        adjective = draw.one_of(ADJECTIVES)
        source.append(adjective)
        target.append(_TARGET[adjective] + ending)
    source.append(noun + "s" * plural)
    return _Phrase(" ".join(source), " ".join(target), plural)


def _verb(draw: Draw, verb: _Verb, plural: bool) -> _Phrase:
    past, negated = draw.chance(0.5), draw.chance(0.2)
    target = _TARGET[verb.base] + ("iv" if past else "el") + "r" * plural
    if negated:
        auxiliary = "did" if past else "do" if plural else "does"
        return _Phrase(f"{auxiliary} not {verb.base}", f"{_TARGET['not']} {target}", plural)
    return _Phrase(verb.past if past else verb.base if plural else verb.third, target, plural)
