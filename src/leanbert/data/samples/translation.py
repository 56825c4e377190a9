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

_VERBS = {
    has_object: [forms.split() for forms in entries(table)]
    for has_object, table in ((True, TRANSITIVE), (False, INTRANSITIVE))
}
_CLASS = {noun: "oa"[number % 3 == 0] for number, noun in enumerate(NOUNS)}


def _lexicon() -> dict[str, str]:
    """Return a two-syllable stem for each lemma; which one depends on the lemma's number only."""
    verbs = [base for base, _, _ in _VERBS[True] + _VERBS[False]]
    lemmas = [*NOUNS, *ADJECTIVES, *verbs, *TIMES, *PLACES, *PRONOUNS, *JOINTS, "the", "a", "two", "some", "not"]
    consonants = "bdfgklmnprstvz"
    syllables = [consonant + vowel for consonant in consonants for vowel in "aeiou"]  # 70
    stems = {}
    for number, lemma in enumerate(lemmas):  # 29 and 70 have no common factor: 70 different first syllables in a row
        first, second = number * 29 % 70, (number * 11 + number // 70 * 3) % 70
        stems[lemma] = syllables[first] + syllables[second] + consonants[number % len(consonants)]
    return stems


_TARGET = _lexicon()


class _Phrase(NamedTuple):
    source: str
    target: str
    plural: bool


def translation_pair(draw: Draw) -> dict[str, str]:
    """Return a sentence of one or two clauses, {"source", "target"}; words and the full stop are apart by a space."""
    source, target = _clause(draw)
    if draw.chance(0.25):
        joint = draw.one_of(JOINTS)
        more_source, more_target = _clause(draw)
        source, target = f"{source} {joint} {more_source}", f"{target} {_TARGET[joint]} {more_target}"
    return {"source": f"{source} .", "target": f"{target} ."}


def _clause(draw: Draw) -> tuple[str, str]:
    if draw.chance(0.2):
        pronoun = draw.one_of(tuple(PRONOUNS))
        subject = _Phrase(pronoun, _TARGET[pronoun], PRONOUNS[pronoun])
    else:
        subject = _noun_phrase(draw)
    transitive = draw.chance(0.7)
    verb, translated = _verb(draw, draw.one_of(_VERBS[transitive]), subject.plural)
    source, target = [subject.source, verb], [subject.target]
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
    return " ".join(source), " ".join([*target, translated])


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


def _verb(draw: Draw, forms: list[str], plural: bool) -> tuple[str, str]:
    base, third, simple_past = forms
    past, negated = draw.chance(0.5), draw.chance(0.2)
    target = _TARGET[base] + ("iv" if past else "el") + "r" * plural
    if negated:
        return f"{'did' if past else 'do' if plural else 'does'} not {base}", f"{_TARGET['not']} {target}"
    return simple_past if past else base if plural else third, target
