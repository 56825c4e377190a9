from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leanbert.data.tokenizers import probe as tokenizer_probe
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from tests.data.corpora import ENGLISH, sentences

VALUES = [None, True, -1, 0, 1, 2**31, 2**40, 1.5, 1e308, "", "x" * 50, "[MASK]", "\x00", [], {}, [[]], [0, 1]]
PARTS = [{"type": "Sequence"}, {"String": ""}, {"Regex": "("}, {"type": "BertNormalizer", "lowercase": 2}]


def trained(kind: str = "wordpiece") -> dict[str, Any]:
    documents = sentences(ENGLISH, 60)
    return json.loads(TextTokenizer.train(lambda: documents, kind=kind, vocab_size=300).to_json())


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Yield the paths to the parts of a JSON value; of long lists the first six entries'."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:6]:
        yield (*at, key)
        yield from places(inner, (*at, key))


def mutated(value: Any, generator: random.Random) -> str:
    """Return JSON with one part replaced or deleted, or its text cut or with a letter changed."""
    text = json.dumps(value)
    kind = generator.randrange(6)
    place = generator.randrange(len(text))
    if kind == 0:
        return (
            text[:place] + generator.choice(["", "\x00", "{", "]", "9", '"']) + text[place + generator.randrange(4) :]
        )
    if kind == 1:
        return text[:place]
    copied = inner = copy.deepcopy(value)
    *way, last = generator.choice(list(places(value)))
    for key in way:
        inner = inner[key]
    if kind == 2:
        del inner[last]
    else:
        inner[last] = generator.choice([*VALUES, *PARTS])
    return json.dumps(copied)


def use(tokenizer: TextTokenizer) -> None:
    tokenizer.decode(tokenizer.encode_batch(["The river, é [MASK] 京", ""])[0])
    tokenizer.encode_words(["a", ""])
    tokenizer.continuation_table()
    TextTokenizer.from_json(tokenizer.to_json())


def outcomes(attempts: Iterator[Any]) -> list[bool]:
    """Return whether each attempt worked; any error but a `UserError` of one line is let through."""
    worked, lines = [], []
    for attempt in attempts:
        try:
            use(attempt())
            worked.append(True)
        except UserError as error:
            worked.append(False)
            lines.append(str(error).count("\n"))
    assert not any(lines)
    return worked


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_mutated_files_work_or_are_refused(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    generator, value = random.Random(7), trained(kind)
    texts = [mutated(value, generator) for _ in range(150)]
    worked = outcomes(lambda text=text: TextTokenizer.from_json(text, "a.json") for text in texts)
    assert 10 < sum(worked) < 140
    assert "panicked" not in capfd.readouterr().err


def test_mutated_folders_work_or_are_refused(tmp_path: Path) -> None:
    generator, tokens = random.Random(8), list(trained()["model"]["vocab"])
    files = {
        "tokenizer_config": {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "mask_token": "[MASK]"},
        "special_tokens_map": {"pad_token": {"content": "[PAD]", "lstrip": False}, "unk_token": "[UNK]"},
        "added_tokens": {"zorblax": 300, "quindle": 301},
        "config": {"model_type": "bert", "encoder": {}},
    }
    (tmp_path / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")

    def attempts() -> Iterator[Any]:
        for _ in range(200):
            for name, value in files.items():
                text = mutated(value, generator) if generator.random() < 0.4 else json.dumps(value)
                (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
            yield lambda: TextTokenizer.from_file(tmp_path)

    assert 20 < sum(outcomes(attempts())) < 180


def spoiled(**parts: Any) -> str:
    return json.dumps({**trained(), **parts})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (spoiled(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "cannot be read or used"),
        (spoiled(normalizer={"type": "Precompiled", "precompiled_charsmap": "A" * 16}), "cannot be read or used"),
        (spoiled(pre_tokenizer={"type": "FixedLength", "length": 0}), "cannot be read or used"),
        (spoiled(normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}), "no tokens of any text"),
        (spoiled(post_processor={**trained()["post_processor"], "special_tokens": {}}), "cannot be read or used"),
    ],
    ids=["panics when read", "panics on text", "panics on length", "erases", "template"],
)
def test_what_would_end_the_process_is_refused(text: str, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=rf"a\.json: .*{says}") as caught:
        TextTokenizer.from_json(text, "a.json")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is limited on Linux")
def test_a_tokenizer_that_fills_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_probe, "PROBE_BYTES", 1 << 29)
    text = spoiled(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 2**18})
    with pytest.raises(UserError, match=r"ends the process \(signal 6\)"):
        TextTokenizer.from_json(text, "a.json")


def test_endless_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_probe, "PROBE_SECONDS", 0.01)
    with pytest.raises(UserError, match="takes more than"):
        TextTokenizer.from_json(spoiled(pre_tokenizer={"type": "FixedLength", "length": 5}), "a.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: model["vocab"].update({"far": 2**31}), "ids up to 2,147,483,648 for"),
        (lambda model: model.update(unk_token="[NONE]"), "the tokenizer fails on a text"),
        (lambda model: model["vocab"].pop("[MASK]"), r"\[MASK\] has the id of"),
    ],
)
def test_ids_and_unknown_tokens_are_checked(change: Any, says: str) -> None:
    value = trained()
    change(value["model"])
    with pytest.raises(UserError, match=says):
        TextTokenizer.from_json(json.dumps(value))
