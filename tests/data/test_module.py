"""What decides the data decides the name of the cache: whatever setting changes, a cache that is there does no harm."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from leanbert import files as storage
from leanbert.data.classification import ClassificationData
from leanbert.data.mlm import MaskedLMData
from leanbert.data.module import RowData
from leanbert.data.pairs import PairData
from leanbert.data.token_labels import SemanticRoleData, TokenLabelData
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from tests.data.corpora import ENGLISH, sentences, write_corpus

TEXTS = sentences(ENGLISH, 24, length=6)


def _record(number: int, text: str) -> dict[str, Any]:
    words = text.split()
    roles = [["B-V" if at == verb else "O" for at in range(len(words))] for verb in (1, 2)]
    tags = [["B-X", *["O"] * (len(words) - 1)], ["O", *["B-Y"] * (len(words) - 1)]]
    return {
        "text": text, "text2": text[::-1], "label": number % 3, "label2": number % 2,
        "source": text, "source2": text[::-1], "target": text.lower(), "target2": text[3:], "more": [text],
        "tokens": words, "tokens2": words[::-1], "labels": tags[0], "labels2": tags[1],
        "predicate": 1, "predicate2": 2, "roles": roles[0], "roles2": roles[0],
    }  # fmt: skip


def _conll(text: str) -> str:
    return "\n".join(f"{word} {word[::-1]} {'B-X' if at == 0 else 'O'} O" for at, word in enumerate(text.split()))


def _roles(text: str) -> str:
    rows = enumerate(text.split())
    return "\n".join(f"{w} {w[::-1]} {'x' if at == 1 else '-'} {'(V*)' if at == 1 else '*'} (V*)" for at, w in rows)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, texts in (("train", TEXTS), ("val", TEXTS[:6]), ("other", TEXTS[3:])):
        lines = (json.dumps(_record(number, text)) + "\n" for number, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("".join(lines))
        write_corpus(folder / f"{name}.txt", [text.replace(" ", "\n", 1) for text in texts])
        (folder / f"{name}.lines.txt").write_text("\n".join(texts) + "\n")
        (folder / f"{name}.conll").write_text("\n\n".join(map(_conll, texts)) + "\n")
        (folder / f"{name}.roles.conll").write_text("\n\n".join(map(_roles, texts)) + "\n")
    for size in (120, 150):
        TextTokenizer.train(lambda: TEXTS, vocab_size=size).save(folder / f"tokenizer{size}")
    return folder


CASES: dict[str, tuple[type[RowData], str, dict[str, Any]]] = {
    "text": (MaskedLMData, ".txt", {"tokenizer": None, "val_files": None, "val_share": 0.3}),
    "records of text": (MaskedLMData, ".jsonl", {}),
    "classes": (ClassificationData, ".jsonl", {}),
    "pairs of texts": (ClassificationData, ".jsonl", {"pair_field": "text2"}),
    "numbers": (ClassificationData, ".jsonl", {"problem": "regression"}),
    "tags": (TokenLabelData, ".jsonl", {}),
    "columns of tags": (TokenLabelData, ".conll", {"label_column": 2}),
    "roles": (SemanticRoleData, ".jsonl", {"labels_field": "roles"}),
    "columns of roles": (SemanticRoleData, ".roles.conll", {"word_column": 0, "role_columns": 3}),
    "pairs": (PairData, ".jsonl", {"sample": "summarization"}),
    "lines": (PairData, ".lines.txt", {"tokenizer": None, "target_tokenizer": "train"}),
}
FILES = {"train_files": "other", "val_files": "other", "train_target_files": "train", "val_target_files": "val"}
VALUES: dict[str, list[Any]] = {
    "pair_field": [None, "text2", "label"],
    "references_field": ["more"],
    "val_share": [0.5],
    "vocab_size": [130],
    "document_separator": ["line"],
    "word_column": [0, 1],
    "label_column": [3],
    "role_columns": [4],
    "max_length": [8, 10],
    "max_target_length": [8],
    "target_vocab_size": [130],
}


def _settings(kind: type[RowData]) -> dict[str, Any]:
    """Return the annotations of all settings that a kind of data takes."""
    found: dict[str, Any] = {}
    for parent in reversed(kind.__mro__):
        if issubclass(parent, RowData) and "__init__" in vars(parent):
            hints = get_type_hints(parent.__init__)
            names = (p.name for p in inspect.signature(parent.__init__).parameters.values() if p.kind != p.VAR_KEYWORD)
            found |= {name: hints.get(name) for name in names if name != "self"}
    return {name: hint for name, hint in found.items() if name not in ("cache_dir", "predict_files")}


def _changes(name: str, hint: Any, base: dict[str, Any], folder: Path, ending: str) -> list[Any]:
    """Return other values of a setting."""
    if name in FILES:
        return [str(folder / f"{FILES[name]}{ending}"), *([None] if name == "val_files" else [])]
    if name.endswith("tokenizer"):
        return [None, str(folder / "tokenizer150")]
    if name in VALUES:
        return VALUES[name]
    choices = [value for value in get_args(hint) if isinstance(value, str)]
    if choices:
        return choices
    if name.endswith("_field"):
        return [f"{base.get(name, name.removesuffix('_field'))}2"]
    return [True, False] if hint is bool else []


def _outcome(make: Callable[[], Any]) -> Any:
    """Return all that is prepared, as lists, or the message of what is wrong."""
    try:
        data = make()
        data.prepare()
    except UserError as error:
        return str(error)
    found = [
        [cache.notes, {c: [v.tolist() for v in cache.read(c, [range(cache.count)])[0]] for c in cache.dtypes}]
        for cache in data.caches.values()
    ]
    return [found, [tokenizer.to_json() for tokenizer in data.tokenizers.values()]]


@pytest.mark.parametrize("case", CASES)
def test_whatever_setting_changes_a_warm_cache_gives_what_a_cold_one_does(
    case: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_flush_to_disk", lambda path: None)  # of what hundreds of builds write
    kind, ending, own = CASES[case]
    base = {
        "train_files": str(files / f"train{ending}"), "val_files": str(files / f"val{ending}"),
        "tokenizer": str(files / "tokenizer120"), "vocab_size": 140, **own,
    }  # fmt: skip
    if case == "lines":
        base |= {f"{part}_target_files": base[f"{part}_files"] for part in ("train", "val")}

    def outcome(folder: str, **changes: Any) -> Any:
        return _outcome(lambda: kind(**{**base, **changes, "cache_dir": str(tmp_path / folder)}))

    first = outcome("warm")
    assert not isinstance(first, str), first
    different, tried = set(), 0
    for name, hint in _settings(kind).items():
        for value in _changes(name, hint, base, files, ending):
            tried += 1
            warm = outcome("warm", **{name: value})
            assert warm == outcome(f"cold{tried}", **{name: value}), (name, value)
            if warm != first:
                different.add(name)
    assert len(different) >= 4, different  # else the changes are none


def test_no_kind_of_data_inherits_from_more_than_two_others() -> None:
    for kind in {case[0] for case in CASES.values()}:
        assert len([parent for parent in kind.__mro__ if parent.__module__.startswith("leanbert.")]) <= 3
