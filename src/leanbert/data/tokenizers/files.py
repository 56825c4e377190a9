"""Tokenizer files and folders, with the ids that `AutoTokenizer` of transformers 5 gives them, without transformers.

A folder is several files that speak of the same tokens, and which of them counts depends on the tokenizer's class:
`TokenizersBackend` takes tokenizer.json as it is; BERT's, RoBERTa's and GPT-2's take its vocabulary alone and make
normaliser and pre-tokenizer anew from tokenizer_config.json. Other classes are refused: their ids would be a guess.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from leanbert.data.tokenizers.classes import BERT, FAMILIES, FILE_CLASSES, FILE_MODELS, MODELS, SPECIAL_TOKENS, Family
from leanbert.data.tokenizers.probe import explained, parse_tokenizer
from leanbert.errors import UserError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that files name by their role, in the order in which transformers adds missing ones."""

Read = tuple[Tokenizer, dict[str, str]]
"""A tokenizer, and the special tokens that its files name, by role such as "mask_token"."""

_LFS_POINTER = "version https://git-lfs.github.com/spec/"
_SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def read_files(path: Path, setting: str) -> Read:
    """Read a folder, a tokenizer.json as it is, or a vocab.txt with the configuration beside it.

    Raises `UserError` where ids could differ from those in transformers, and for whatever cannot be read.
    """
    if path.is_dir():
        return _read_folder(path, setting)
    config = _settings(path.parent)
    if path.suffix == ".json":
        return parse_tokenizer(read_text(path), str(path)), _named(config)
    family = _family(path.parent, setting, config)
    if family not in (None, BERT):
        raise UserError(f"data.{setting}: {path} is a part of a tokenizer. Give its folder, {path.parent}")
    return _rebuilt(family, path.parent, (path,), config)


def read_text(path: Path) -> str:
    """Return the text of a file of a tokenizer, without a byte order mark. Raises `UserError`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Give a tokenizer.json or vocab.txt") from error
    if text.startswith(_LFS_POINTER):
        raise UserError(f"{path}: a git-lfs pointer in place of the file. Run git lfs pull in its folder")
    return text


# ---- folders


def _read_folder(folder: Path, setting: str) -> Read:
    config = _settings(folder)
    family = _family(folder, setting, config)
    whole = folder / "tokenizer.json"
    if whole.is_file():
        if family is not None:
            return _rebuilt(family, folder, (whole,), config)
        tokenizer = parse_tokenizer(read_text(whole), str(whole))
        with explained(str(folder)):
            _complete(tokenizer, config)
        return tokenizer, _named(config)
    files = tuple(folder / name for name in (family or BERT).files)
    if all(path.is_file() for path in files):
        return _rebuilt(family, folder, files, config)
    if pieces := next((name for name in _SENTENCEPIECE if (folder / name).is_file()), None):
        raise UserError(
            f"data.{setting}: {folder} holds {pieces} alone, and SentencePiece models are not read here. "
            f"Save it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    names = " and ".join(path.name for path in files)
    raise UserError(f"data.{setting}: {folder} holds neither tokenizer.json nor {names}. Give one that does")


def _family(folder: Path, setting: str, config: Mapping[str, Any]) -> Family | None:
    """Return the class that transformers would take; None: tokenizer.json as it is, or BERT's if there is none."""
    if config.get("split_special_tokens"):
        raise UserError(f"data.{setting}: {folder} has split_special_tokens, with which no text holds a mask. Unset it")
    model = _object(folder / "config.json")
    inner = model.get("encoder")
    if model.get("model_type") == "encoder-decoder" and isinstance(inner, dict):
        model = inner
    kind = model.get("model_type")
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if kind in FILE_MODELS or (named is None and kind is None):
        return None
    if isinstance(config.get("auto_map"), (dict, list)) and "AutoTokenizer" in config["auto_map"]:
        raise UserError(f"data.{setting}: the tokenizer of {folder} is code, which is not run. {_way_out(folder)}")
    known = str(named).removesuffix("Fast") if named else MODELS.get(str(kind), str(kind))
    if known in FILE_CLASSES:
        return None
    if known not in FAMILIES:
        why = "splits words with MeCab, which is not read here" if "Japanese" in known else "is not known here"
        raise UserError(f"data.{setting}: the tokenizer class of {folder}, {known}, {why}. {_way_out(folder)}")
    return FAMILIES[known]


def _way_out(folder: Path) -> str:
    if (folder / "tokenizer.json").is_file():
        return f"To take its tokenizer.json as it is, give {folder / 'tokenizer.json'}"
    return "Give a folder with a tokenizer.json"


def _settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json with what the older files beside it add, as transformers puts them together.

    "added" holds the added tokens by the ids that files give them (their order counts, and not the number), "own" the
    special tokens that have a name but no role, "further" those without a name.
    """
    config = _object(folder / "tokenizer_config.json")
    with explained(str(folder)):
        if "additional_special_tokens" in config and not config.get("extra_special_tokens"):
            config["extra_special_tokens"] = config.pop("additional_special_tokens")
        own = _named_extras(config)
        if "added_tokens_decoder" in config:
            added = {int(index): _added(token) for index, token in config["added_tokens_decoder"].items()}
        else:
            config.update(_special_tokens_map(folder, config))
            own.update(_named_extras(config))
            added = _added_tokens(folder, config)
        further = config.get("extra_special_tokens", config.get("additional_special_tokens")) or []
        config = {key: _token(value) if key.endswith("_token") else value for key, value in config.items()}
        own.update({key: value for key, value in config.items() if key.endswith("_token") and key not in NAMED})
        config |= {"added": added, "own": list(map(_token, own.values())), "further": list(map(_token, further))}
        by_name = {str(token): token for token in added.values()}
        config.update({role: by_name.get(str(config[role]), config[role]) for role in NAMED if config.get(role)})
    return config


def _named_extras(config: dict[str, Any]) -> dict[str, Any]:
    """Take special tokens that have a name out of the further ones."""
    extra = config.get("extra_special_tokens")
    return config.pop("extra_special_tokens") if isinstance(extra, dict) else {}


def _special_tokens_map(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    special = _object(folder / "special_tokens_map.json")
    found = {key: _token(value, special=True) for key, value in special.items() if key != "extra_special_tokens"}
    extra = special.get("extra_special_tokens")
    if isinstance(extra, list):
        given = list(config.get("extra_special_tokens") or [])
        extra = given + [token for token in (_token(item, special=True) for item in extra) if token not in given]
    return found if extra is None else {**found, "extra_special_tokens": extra}


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    # An entry that is spelled out in tokenizer_config.json is not yet a token where transformers looks for these.
    roles = (config.get(role) for role in NAMED)
    special = {str(token) for token in (*roles, *(config.get("extra_special_tokens") or []))}
    added: dict[int, AddedToken] = {}
    for name, index in _object(folder / "added_tokens.json").items():
        added[int(index)] = AddedToken(name, normalized=name not in special, special=name in special)
    for entry in _object(folder / "tokenizer.json").get("added_tokens", []):
        index = int(entry.pop("id"))
        added[index] = AddedToken(**entry)
    return added


def _added(value: Any) -> AddedToken:
    return AddedToken(**{key: field for key, field in value.items() if key != "__type"})


def _token(value: object, **flags: bool) -> Any:
    """Return an entry of a file as a token if it is one; tokens by name alone stay as they are."""
    return _added({**value, **flags}) if isinstance(value, dict) and "content" in value else value


def _rebuilt(family: Family | None, folder: Path, files: tuple[Path, ...], config: dict[str, Any]) -> Read:
    """Return the tokenizer that the class makes of a vocabulary and its settings; None: BERT, cased by its looks."""
    source = _source(files)
    if family is None:
        family = BERT
        words = (token for token in source["vocab"] if token not in SPECIAL_TOKENS and token[:1] != "[")
        config.setdefault("do_lower_case", all(token == token.lower() for token in words))
    _require(family, source["vocab"], config, files[0])
    config = {**family.defaults, **config}
    with explained(str(folder)):
        tokenizer = family.build(source, config)
        _complete(tokenizer, config)
        family.frame(tokenizer, source, config)
    return tokenizer, _named(config)


def _require(family: Family, vocabulary: dict[str, int], config: dict[str, Any], path: Path) -> None:
    """Raise `UserError` where transformers would add tokens that no model knows, or fail on unknown words."""
    for role in {"unk_token", "cls_token", "sep_token"} & set(family.defaults):
        if config.get(role, "") is None:
            raise UserError(f"{path.with_name('tokenizer_config.json')}: {role} is null. Name the token")
    present = {*vocabulary, *map(str, config["added"].values())}
    absent = [token for role, token in family.defaults.items() if role not in config and token not in present]
    unknown = str(config.get("unk_token", family.defaults["unk_token"]))
    if family is BERT and unknown not in vocabulary:
        absent = [unknown, *(token for token in absent if token != unknown)]
    if absent:
        raise UserError(f"{path}: no {' '.join(absent)} in it. Give the vocabulary of the class, or name its tokens")


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    return {role: str(config[role]) for role in NAMED if config.get(role)}


def _complete(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that the files name and the tokenizer lacks, and give those it has the files' flags."""
    tokens: list[Any] = [token for _, token in sorted(config["added"].items())]
    have = {*map(str, tokens), *(token.content for token in tokenizer.get_added_tokens_decoder().values())}
    # transformers adds special tokens in this order: by role, of the model, further ones.
    for token in (*(config.get(role) for role in NAMED), *config["own"], *config["further"]):
        if isinstance(token, (str, AddedToken)) and str(token) not in have and token not in tokens:
            tokens.append(token)
    roles = set(_named(config).values())
    tokens = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for token in tokens:
        token.special = token.special or str(token) in roles
    tokenizer.add_tokens(tokens)


def _source(files: tuple[Path, ...]) -> dict[str, Any]:
    """Return "vocab", "merges" and, of a tokenizer.json, its "text", as the files of a class hold them."""
    first, *rest = files
    if first.name == "tokenizer.json":
        model = _object(first).get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
            raise UserError(f"{first}: no vocabulary for the class of this folder. Copy or make it again")
        with explained(str(first)):
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
        return {"vocab": model["vocab"], "merges": list(map(tuple, merges)), "text": read_text(first)}
    if rest:
        lines = [line for line in read_text(rest[0]).split("\n") if line and not line.startswith("#version")]
        return {"vocab": _object(first), "merges": [tuple(line.removesuffix("\r").split(" ")) for line in lines]}
    # Ids are numbers of lines, the later of two equal lines counts: leaving one out would move all after it.
    lines = read_text(first).removesuffix("\n").split("\n")
    return {"vocab": {line.rstrip(_WHITE_SPACE): index for index, line in enumerate(lines)}}


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if there is no file. Raises `UserError` for anything else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({str(error)[:200]}). Copy or make it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object. Copy or make it again")
    return found
