"""Text to token ids and back, around one `tokenizers.Tokenizer`; training one is in `training`."""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models

from leanbert.data.tokenizers.files import read_files
from leanbert.data.tokenizers.probe import explained, parse_tokenizer
from leanbert.errors import UserError
from leanbert.files import REST, expand, write_text_atomically

_NAMED_KEY = "leanbert_special_tokens"
"""Where `to_json` keeps special tokens whose names are not the usual ones."""

_LARGEST_GAP = 100_000
"""Ids may leave as many numbers unused as there are tokens, and these: rows of the embedding would be wasted."""

_STRANGE_TEXT = "Az 9 é\u0301 \u6771 \u0e44 \U0001f600 \U00013080 \x07"
"""What a tokenizer without an unknown token fails on, if it fails on anything."""

_ROLES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "unk": ("[UNK]", "<unk>", "<|unk|>"),
    "cls": ("[CLS]", "<s>", "<cls>", "<|cls|>"),
    "sep": ("[SEP]", "</s>", "<sep>", "<eos>", "<|sep|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
}

_WORD_MARKS = ("Ġ", "Ċ", "ĉ", "č")
"""How byte-level BPE spells space, line feed, tab and carriage return."""

_FLAGS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")


class TextTokenizer:
    """A tokenizer with its special tokens found and its own template (such as `[CLS] ... [SEP]`) respected.

    `pad_id` is 0 where there is no such token (padding is never looked at), `unk_id`, `cls_id` and `sep_id` are None;
    `special_ids`, ascending, are never chosen for prediction; `separator_id` stands in no text: the token after a
    document, else the mask; `vocab_size` is one more than the largest id.

    `named` are the special tokens that its files name, by role such as "mask_token"; the others are looked for under
    their usual names. `source` is named in errors. Raises `UserError` if it has no mask token, which this project
    needs, if it cannot encode text, or if its ids leave most of the numbers up to the largest one unused.
    """

    def __init__(
        self, tokenizer: Tokenizer, source: str = "data.tokenizer", named: Mapping[str, str] | None = None
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer, self._source = tokenizer, source
        usual = {role: next(filter(self._has, names), None) for role, names in _ROLES.items()}
        given = {role: (named or {}).get(f"{role}_token") for role in _ROLES}
        self._special = {role: token if self._has(token := given[role] or None) else usual[role] for role in _ROLES}
        self._renamed = {f"{role}_token": t for role, t in self._special.items() if t and t != usual[role]}
        mask_token = self._special["mask"]
        if mask_token is None:
            raise UserError(f"{source}: the tokenizer has no mask token ([MASK] or <mask>). Choose another one")
        self.mask_token: str = mask_token
        if mask_token not in self._added:  # a mask that text cannot spell would be none
            tokenizer.add_special_tokens([AddedToken(mask_token, special=True, normalized=False)])
        unknown = getattr(tokenizer.model, "unk_token", None) or self._special["unk"]
        tokens = (self._special["pad"], unknown, self._special["cls"], self._special["sep"], mask_token)
        ids = [None if token is None else tokenizer.token_to_id(token) for token in tokens]
        pad_id, self.unk_id, self.cls_id, self.sep_id, mask_id = ids
        assert mask_id is not None
        self.pad_id, self.mask_id = pad_id or 0, mask_id
        special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special_ids = sorted(special.union(index for index in ids if index is not None))
        self.separator_id = self.mask_id if self.sep_id is None else self.sep_id
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self._check()

    @classmethod
    def from_file(cls, path: str | Path, name: str = "tokenizer") -> TextTokenizer:
        """Read a Hugging Face folder, a tokenizer.json, a vocab.txt (WordPiece with BERT's template), or a .ckpt.

        A folder gives the ids that `AutoTokenizer` of transformers gives. `name` names the setting: with
        "target_tokenizer" the targets' tokenizer is read if folder or .ckpt has one.
        Raises `UserError` if there is none, or it cannot be read, or its ids could be other than transformers'.
        """
        path = expand(path, f"data.{name}")
        # os.path says "no" where a name is too long, which pathlib raises.
        if name != "tokenizer" and os.path.isdir(path / name):
            path = path / name
        if os.path.isfile(path / REST):
            path = path / REST
        if not os.path.isdir(path) and not os.path.isfile(path):
            raise UserError(f"data.{name}: {path} does not exist. Give a tokenizer.json or vocab.txt")
        if os.path.isfile(path) and (path.suffix == ".ckpt" or zipfile.is_zipfile(path)):
            return cls.from_json(_checkpoint_json(path, name), source=str(path))
        tokenizer, named = read_files(path, name)
        return cls(tokenizer, str(path), named)

    @classmethod
    def from_json(cls, text: str, source: str = "tokenizer") -> TextTokenizer:
        """Make a tokenizer of the text of a tokenizer.json, or of `to_json`."""
        named: dict[str, str] = {}
        if _NAMED_KEY in text:
            with explained(source):
                parsed = json.loads(text)
                named = dict(parsed.pop(_NAMED_KEY, {}))
                text = json.dumps(parsed)
        return cls(parse_tokenizer(text, source), source, named)

    @classmethod
    def train(cls, texts: Callable[[], Iterable[str]], **settings: Any) -> TextTokenizer:
        """Train a tokenizer: see `training.train_tokenizer`, which this calls."""
        from leanbert.data.tokenizers.training import train_tokenizer

        return cls(train_tokenizer(texts, **settings))

    @cached_property
    def template(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer itself puts before and after a text."""
        texts = ("a", *sorted(self._tokenizer.get_vocab())[:_LARGEST_GAP])
        probe = next((text for text in texts if self.encode_bare([text])[0]), None)
        if probe is None:
            raise UserError(f"{self._source}: the tokenizer makes no tokens of any text. Choose another one")
        encoding = self._tokenizer.encode(probe, add_special_tokens=True)
        start = encoding.special_tokens_mask.index(0)
        return encoding.ids[:start], encoding.ids[start + len(self.encode_bare([probe])[0]) :]

    def continuation_table(self) -> np.ndarray:
        """Return bool [V], for whole-word masking: whether the token continues the word before it.

        It does nowhere if the tokens do not tell, as with whole words or where a mark ends a word.
        """
        model = self._tokenizer.model
        continues = np.zeros(self.vocab_size, dtype=bool)
        prefix = getattr(model, "continuing_subword_prefix", None)
        pipeline = f"{self._tokenizer.normalizer} {self._tokenizer.pre_tokenizer}"
        marks: tuple[str, ...] = ()
        if isinstance(model, models.Unigram) or "▁" in pipeline:
            marks = ("▁",)
        elif "ByteLevel" in pipeline:
            marks = _WORD_MARKS
        if not prefix and not marks:
            return continues
        for token, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            continues[index] = token.startswith(prefix) if prefix else not token.startswith(marks)
        continues[list(self._tokenizer.get_added_tokens_decoder())] = False
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
        with explained(self._source, "the tokenizer fails on a text"):
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def whole_words(self, text: str) -> list[tuple[int, int, int]]:
        """Return (number of the token, start, end) of the words in `text`, only letters, that are one token each."""
        self._tokenizer.encode_special_tokens = True
        with explained(self._source, "the tokenizer fails on a text"):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        pieces = Counter(encoding.word_ids)
        found = []
        for number, (word, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
            letters = text[start:end].lstrip()  # some tokenizers count the space before as of the word
            if pieces[word] == 1 and letters.isalpha():
                found.append((number, end - len(letters), end))
        return found

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return the ids of each word as inside a sentence; at least one: the unknown token's, or padding."""
        spaced = not isinstance(self._tokenizer.model, models.WordPiece | models.WordLevel)
        found = self.encode_bare([f" {word}" if spaced else word for word in words])
        nothing = [self.pad_id if self.unk_id is None else self.unk_id]
        return [ids or nothing for ids in found]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        with explained(self._source, "the tokenizer fails on ids"):
            return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def token(self, index: int) -> str:
        """Return the token with this id, as the vocabulary spells it ("" for an id that no token has)."""
        return self._tokenizer.id_to_token(int(index)) or ""

    def to_json(self) -> str:
        """Return the text of tokenizer.json: the same for the same tokenizer, in any process.

        Special tokens that cannot be found by their usual names stand in an entry of its own, for `from_json`.
        """
        text = str(self._tokenizer.to_str(pretty=True))
        if not self._renamed:
            return text
        return f"{text[:-1].rstrip()},\n  {json.dumps(_NAMED_KEY)}: {json.dumps(self._renamed, sort_keys=True)}\n}}"

    def save(self, folder: str | Path, segments: bool = False, max_length: int | None = None) -> None:
        """Write tokenizer.json and the tokenizer_config.json that `AutoTokenizer` of transformers reads.

        With `segments` it says there which of two texts each token is of, for a model that takes this in; `max_length`
        is how many tokens it keeps of a text where truncation is asked for.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # With this entry transformers looks into no older file that may lie in the folder.
            "added_tokens_decoder": {
                index: {flag: getattr(token, flag) for flag in _FLAGS} for index, token in sorted(added.items())
            },
        }
        # It recognises in text what it finds named: a token that is not recognised here must not be there.
        config.update({f"{role}_token": token for role, token in self._special.items() if token in self._added})
        if segments:
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        if max_length is not None:
            config["model_max_length"] = max_length
        write_text_atomically(Path(folder) / "tokenizer.json", str(self._tokenizer.to_str(pretty=True)))
        write_text_atomically(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def _has(self, token: str | None) -> bool:
        return token is not None and self._tokenizer.token_to_id(token) is not None

    @property
    def _added(self) -> set[str]:
        return {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    def _check(self) -> None:
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        tokens = len(vocabulary)
        shared = [token for token, index in vocabulary.items() if index == self.mask_id and token != self.mask_token]
        if shared:
            raise UserError(f"{self._source}: {self.mask_token} has the id of {min(shared)!r}. Number the tokens anew")
        if self.vocab_size > 2 * tokens + _LARGEST_GAP:
            raise UserError(f"{self._source}: ids up to {self.vocab_size - 1:,} for {tokens:,} tokens. Renumber them")
        with explained(self._source):
            self.encode_bare([_STRANGE_TEXT])
            frame = [*self.template[0], *self.template[1]]
        if any(index >= self.vocab_size for index in frame):
            raise UserError(f"{self._source}: its template writes ids that no token has. Copy or make it again")


def _checkpoint_json(path: Path, name: str) -> str:
    from leanbert.untrusted import load_pickled  # only here: tokenising must not pay for torch

    try:
        kept = load_pickled(path, "Give another one.")["leanbert"]
        return str(kept[name] if name in kept else kept["tokenizer"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: no tokenizer in this checkpoint. Give the tokenizer with data.{name}") from error
