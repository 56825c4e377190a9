"""Text to token ids and back, around one `tokenizers.Tokenizer`; training one is in `tokenizer_training`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from leanbert.data.storage import expand, write_text_atomically
from leanbert.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Of the tokenizers trained here, with ids 0 to 4."""

_ROLES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "unk": ("[UNK]", "<unk>", "<|unk|>"),
    "cls": ("[CLS]", "<s>", "<cls>", "<|cls|>"),
    "sep": ("[SEP]", "</s>", "<sep>", "<eos>", "<|sep|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
}

_WORD_MARKS = ("Ġ", "Ċ", "ĉ", "č")
"""How byte-level BPE spells space, line feed, tab and carriage return."""


class TextTokenizer:
    """A tokenizer with its special tokens found and its own template (such as `[CLS] ... [SEP]`) respected.

    `source` is named in errors. Raises `UserError` if it has no mask token, which this project needs.
    """

    def __init__(self, tokenizer: Tokenizer, source: str = "data.tokenizer") -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.pad_token = self._find("pad")
        self.unk_token = getattr(tokenizer.model, "unk_token", None) or self._find("unk")
        self.cls_token = self._find("cls")
        self.sep_token = self._find("sep")
        mask_token = self._find("mask")
        if mask_token is None:
            raise UserError(f"{source}: the tokenizer has no mask token ([MASK] or <mask>). Choose another one")
        self.mask_token: str = mask_token

    @classmethod
    def from_file(cls, path: str | Path, name: str = "tokenizer") -> TextTokenizer:
        """Read tokenizer.json, vocab.txt (WordPiece with BERT's template), a folder with one, or a .ckpt.

        `name` is that of the setting: with "target_tokenizer" it is that of targets if folder or .ckpt has such a one.
        Raises `UserError` if there is none, or it cannot be read.
        """
        path = expand(path, f"data.{name}")
        if name != "tokenizer" and (path / name).is_dir():
            path = path / name
        if path.is_dir():
            path = _inside(path, name)
        if not path.is_file():
            raise UserError(f"data.{name}: {path} does not exist. Give a tokenizer.json or vocab.txt")
        if path.suffix == ".ckpt":
            return cls.from_json(_checkpoint_json(path, name), source=str(path))
        text = _read_text(path)
        if path.suffix == ".json":
            return cls.from_json(text, source=str(path))
        return cls(_bert_tokenizer(text, path), source=str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "tokenizer") -> TextTokenizer:
        """Make a tokenizer of the text of a tokenizer.json."""
        try:
            return cls(Tokenizer.from_str(text), source)
        except UserError:
            raise
        except Exception as error:  # the Rust library raises bare Exception
            raise UserError(f"{source}: not a tokenizer.json ({str(error)[:200]}). Copy or make it again") from error

    @classmethod
    def train(cls, texts: Any, **settings: Any) -> TextTokenizer:
        """Train a tokenizer: see `tokenizer_training.train_tokenizer`, which this calls."""
        from leanbert.data.tokenizer_training import train_tokenizer

        return cls(train_tokenizer(texts, **settings))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def pad_id(self) -> int:
        """Id that fills padding; 0 if the tokenizer has no pad token (padding is never looked at)."""
        index = self._id(self.pad_token)
        return 0 if index is None else index

    @property
    def unk_id(self) -> int | None:
        """Id of unknown text; None where there is none, as in byte-level BPE."""
        return self._id(self.unk_token)

    @property
    def cls_id(self) -> int | None:
        """Id of the token before a document, if any."""
        return self._id(self.cls_token)

    @property
    def sep_id(self) -> int | None:
        """Id of the token after a document, if any."""
        return self._id(self.sep_token)

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        index = self._id(self.mask_token)
        assert index is not None
        return index

    @cached_property
    def special_ids(self) -> list[int]:
        """Ids that are never chosen for prediction, ascending."""
        added = self._tokenizer.get_added_tokens_decoder()
        named = (self._id(token) for token in (self.pad_token, self.unk_token, self.cls_token, self.sep_token))
        special = {i for i, token in added.items() if token.special} | {i for i in named if i is not None}
        return sorted(special | {self.mask_id})

    @cached_property
    def template(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer itself puts before and after a text."""
        probe = next(text for text in ("a", *self._tokenizer.get_vocab()) if self.encode_bare([text])[0])
        encoding = self._tokenizer.encode(probe, add_special_tokens=True)
        start = encoding.special_tokens_mask.index(0)
        return encoding.ids[:start], encoding.ids[start + len(self.encode_bare([probe])[0]) :]

    def continuation_table(self) -> np.ndarray:
        """Return bool [V], for whole-word masking: whether the token continues the word before it."""
        model = self._tokenizer.model
        continues = np.zeros(self.vocab_size, dtype=bool)
        prefix = getattr(model, "continuing_subword_prefix", None)
        if isinstance(model, models.Unigram) or "Metaspace" in str(self._tokenizer.pre_tokenizer):
            marks: tuple[str, ...] = ("▁",)
        else:
            marks = _WORD_MARKS
        for token, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            continues[index] = token.startswith(prefix) if prefix else not token.startswith(marks)
        continues[self.special_ids] = False
        return continues

    def encode_batch(self, texts: Sequence[str], literal: bool = False) -> list[list[int]]:
        """Return the ids of each text, in the tokenizer's template.

        `literal` reads "[MASK]" and the like in the text as text, not as special tokens: a corpus may hold them.
        """
        before, after = self.template
        return [before + ids + after for ids in self.encode_bare(texts, literal)]

    def encode_bare(self, texts: Sequence[str], literal: bool = True) -> list[list[int]]:
        """Return the ids of each text without the template; runs on all cores, outside Python's lock."""
        # Said explicitly, the library neither warns nor changes its mind when data workers are forked later.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self._tokenizer.encode_special_tokens = literal
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return the ids of each word as inside a sentence; at least one: the unknown token's, or padding."""
        spaced = not isinstance(self._tokenizer.model, models.WordPiece | models.WordLevel)
        found = self.encode_bare([f" {word}" if spaced else word for word in words])
        nothing = [self.pad_id if self.unk_id is None else self.unk_id]
        return [ids or nothing for ids in found]

    @property
    def separator_id(self) -> int:
        """Id of a token that stands in no text: that after a document, else the mask's."""
        return self.mask_id if self.sep_id is None else self.sep_id

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def token(self, index: int) -> str:
        """Return the token with this id, as the vocabulary spells it ("" for an id that no token has)."""
        return self._tokenizer.id_to_token(int(index)) or ""

    def to_json(self) -> str:
        """Return the text of tokenizer.json: the same for the same tokenizer, in any process."""
        return str(self._tokenizer.to_str(pretty=True))

    def save(self, folder: str | Path, segments: bool = False) -> None:
        """Write tokenizer.json and the tokenizer_config.json that `AutoTokenizer` of transformers reads.

        With `segments` it says there which of two texts each token is of, for a model that takes this in.
        """
        named = {
            "pad_token": self.pad_token,
            "unk_token": self.unk_token,
            "cls_token": self.cls_token,
            "sep_token": self.sep_token,
            "mask_token": self.mask_token,
        }
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **{k: v for k, v in named.items() if v}}
        if segments:
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        write_text_atomically(Path(folder) / "tokenizer.json", self.to_json())
        write_text_atomically(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def _find(self, role: str) -> str | None:
        known = (token for token in _ROLES[role] if self._tokenizer.token_to_id(token) is not None)
        return next(known, None)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)


def bert_pipeline(model: Any, lowercase: bool) -> Tokenizer:
    """Return a tokenizer with BERT's normaliser (Chinese characters apart) and pre-tokenizer around `model`."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def add_bert_template(tokenizer: Tokenizer) -> None:
    """Make the tokenizer write `[CLS] a [SEP]`, and `[CLS] a [SEP] b [SEP]` with segments 0 and 1."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )


def _inside(folder: Path, setting: str) -> Path:
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"data.{setting}: {folder} holds neither tokenizer.json nor vocab.txt. Give a folder that does")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Give a tokenizer.json or vocab.txt") from error


def _bert_tokenizer(text: str, path: Path) -> Tokenizer:
    from tokenizers import decoders

    vocabulary: dict[str, int] = {}
    for index, token in enumerate(text.splitlines() if "\r" in text else text.rstrip("\n").split("\n")):
        if token in vocabulary:
            raise UserError(f"{path}:{index + 1}: token {token!r} is there twice. Remove one")
        vocabulary[token] = index
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise UserError(f"{path}: no {' '.join(missing)} in it. Give the vocab.txt of a BERT, one token a line")
    tokenizer = bert_pipeline(models.WordPiece(vocabulary, unk_token="[UNK]"), _lowercases(path, vocabulary))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    add_bert_template(tokenizer)
    return tokenizer


def _lowercases(path: Path, vocabulary: Iterable[str]) -> bool:
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        stated = json.loads(_read_text(config)).get("do_lower_case")
        if stated is not None:
            return bool(stated)
    return not any(token != token.lower() for token in vocabulary if token not in SPECIAL_TOKENS and token[:1] != "[")


def _checkpoint_json(path: Path, name: str) -> str:
    from leanbert.models.weights import load_pickled  # only here: tokenising must not pay for torch

    try:
        kept = load_pickled(path, "Give another one.")["leanbert"]
        return str(kept[name] if name in kept else kept["tokenizer"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: no tokenizer in this checkpoint. Give the tokenizer with data.{name}") from error
