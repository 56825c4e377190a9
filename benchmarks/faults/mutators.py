"""Damage to bytes, lines, tables, JSON, YAML, archives and folders, drawn from a generator."""

from __future__ import annotations

import copy
import gzip
import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CANARY = "executed"
"""The file that damaged input creates if something of it is executed."""
ODD_TEXTS = (
    "", " ", "\0", "\r", "\r\r", "\ufeff", "\u2028", "\x85", "\x1a", '"', "'", ",", "\t", ";", "#", "# comment", "\\",
    "nan", "inf", "1e400", "-1", "null", "None", "[]", "{}", "0.0", "true", "=1+1", "I-X", "B-", "-DOCSTART- -X- O O",
    "\ud7ff", "🙂", "é", "e\u0301", "ﬁ", "İ", "日本語", "x" * 50_000, "a b " * 9_000,
)  # fmt: skip
ODD_VALUES = (
    None, True, False, 0, -1, 1, 3.5, -0.0, 1e30, 1e400, float("nan"), 2**31, 2**63, 10**30, "", "text", "1", "nan", [],
    {}, [1], [[]], [None], {"a": 1}, "x" * 9_000, "../../etc/passwd",
)  # fmt: skip
SETTING_VALUES = (
    "nan", "inf", "-inf", "-1", "0", "1", "2", "1e400", "1e30", "-0.0", "0.5", "''", "true", "[]", "[1, 2]", "{}",
    "null", "text", "1e-400", "3.7", "999999999999", "9999999999999999999999", "1_000", "\uff11", "1,5", "5e-324",
)  # fmt: skip
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


class _Bomb:
    """Unpickling it creates the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({CANARY!r}, 'w').close()",)


def bomb() -> bytes:
    """Return a pickle that executes code."""
    return pickle.dumps(_Bomb(), protocol=2)


def damage(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes with one kind of damage that needs no knowledge of their format."""
    return chance.choice(BYTE_DAMAGE)(data, chance)


def flip(data: bytes, chance: random.Random) -> bytes:
    """Change up to eight bytes."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 8) if found else 0):
        found[chance.randrange(len(found))] = chance.randrange(256)
    return bytes(found)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _zeros(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data) + 1)
    return data[:place] + b"\0" * (len(data) - place)


def _twice(data: bytes, chance: random.Random) -> bytes:
    return data + data


def _tail(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randint(1, 64))


def _nothing(data: bytes, chance: random.Random) -> bytes:
    return chance.choice((b"", b"\n", b"\n\n \n", b"\0", LFS_POINTER, b"<!DOCTYPE html><html></html>\n"))


BYTE_DAMAGE: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, flip, _cut, _zeros, _twice, _tail, _nothing)


def change_text(text: str, chance: random.Random) -> str:
    """Return a text file with an odd character, line, cell or line end."""
    lines = text.splitlines(keepends=True) or [""]
    for _ in range(chance.choice((1, 1, 1, 3))):
        place = chance.randrange(len(lines))
        line, odd = lines[place], chance.choice(ODD_TEXTS)
        column = chance.randrange(len(line) + 1)
        end = line[len(line.rstrip("\r\n")) :]
        lines[place] = chance.choice(
            (
                line[:column] + odd + line[column:],
                line[:column] + line[column + 1 :],
                odd + end,
                odd + line,
                line.rstrip("\r\n") + chance.choice(",\t; ") + odd + end,
                line.replace(chance.choice(" ,\t"), chance.choice(",;\t "), 1),
                line + line,
                "",
                f'"{line.rstrip()}{end}',
            )
        )
    ends = chance.choice(("\n",) * 7 + ("\r\n", "\r", ""))
    return "".join(line.replace("\n", ends) for line in lines)


def encode(text: str, chance: random.Random) -> bytes:
    """Return the bytes of a text, mostly in UTF-8."""
    coding = chance.choice(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "latin-1", "cp1252", "shift_jis"))
    return text.encode(coding, "replace" if coding != "utf-8" else "surrogatepass")


def compress(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes compressed with gzip, now and then damaged after it, or in two members."""
    half = len(data) // 2
    packed = chance.choice((gzip.compress(data), gzip.compress(data[:half]) + gzip.compress(data[half:])))
    return damage(packed, chance) if chance.random() < 0.3 else packed


def change_value(value: Any, chance: random.Random) -> Any:
    """Return a JSON value of which a part is odd, missing, doubled or of another type."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return chance.choice(ODD_VALUES)
    for _ in range(chance.choice((1, 1, 2))):
        holder, key = chance.choice(places)
        action = chance.randrange(5)
        if action == 0 and isinstance(holder, dict):
            holder.pop(key, None)
        elif action == 1 and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key, None)
        elif action == 2:
            _set(holder, key, nested(chance.choice((3, 60, 5000))))
        else:
            _set(holder, key, chance.choice(ODD_VALUES))
    return value


def nested(depth: int) -> Any:
    """Return lists in lists."""
    found: Any = []
    for _ in range(min(depth, 400)):  # what json writes; deeper ones are spelt
        found = [found]
    return found


def change_json(data: bytes, chance: random.Random) -> bytes:
    """Return a JSON file with a changed value, or with damage to its bytes."""
    if chance.random() < 0.3:
        return damage(data, chance)
    if chance.random() < 0.1:
        return b"[" * 100_000 if chance.random() < 0.5 else b'{"a":' * 50_000
    return json.dumps(change_value(json.loads(data), chance)).encode()


def change_archive(data: bytes, chance: random.Random) -> bytes:
    """Return a checkpoint with its pickle exchanged, a record removed or bytes damaged, or one that executes code."""
    action = chance.randrange(6)
    if action == 0:
        return bomb()
    if action <= 2:
        return damage(data, chance)
    if action == 3:  # the directory at the end
        return data[:-600] + flip(data[-600:], chance)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    if action == 4:  # other tensors with checksums of their own would be another checkpoint
        records[next(name for name in records if name.endswith("data.pkl"))] = chance.choice((bomb(), b""))
    else:
        del records[chance.choice([name for name in records if "/data" in name])]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return stream.getvalue()


def change_yaml(text: str, chance: random.Random) -> str:
    """Return a configuration with an odd value, tag, line or indentation."""
    lines = text.splitlines()
    place = chance.randrange(len(lines))
    key, colon, value = lines[place].partition(":")
    odd = chance.choice((*SETTING_VALUES, *ODD_TEXTS[:40]))
    hostile = f"!!python/object/apply:builtins.exec [\"open('{CANARY}', 'w')\"]"
    bombs = "\n".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9) if n else 'x'}]" for n in range(9))
    action = chance.randrange(9)
    if action == 8:
        return damage(text.encode(), chance).decode("utf-8", "surrogateescape")
    lines[place] = (
        f"{key}{colon} {odd}", f"{key}_{colon}{value}", f" {lines[place]}", f"\t{lines[place]}",
        f"{lines[place]}\n{lines[place]}", f"{key}: {hostile}", f"{bombs}\n{lines[place]}", f"{key}: {'[' * 3000}",
    )[action]  # fmt: skip
    return "\n".join(lines) + "\n"


def change_folder(folder: Path, chance: random.Random) -> str:
    """Damage one file of a model's or tokenizer's folder, and return its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = chance.choice(files)
    data, action = path.read_bytes(), chance.randrange(12)
    if action == 0:
        path.unlink()
    elif action == 1:
        path.unlink()
        path.mkdir()
    elif action == 2:
        path.write_bytes(LFS_POINTER)
    elif path.suffix == ".json":
        path.write_bytes(change_json(data, chance))
    elif path.suffix == ".txt":
        path.write_bytes(encode(change_text(data.decode(), chance), chance))
    elif path.suffix == ".safetensors" and action == 3:
        path.rename(path.with_name("pytorch_model.bin"))
        path.with_name("pytorch_model.bin").write_bytes(bomb())
    elif path.suffix == ".safetensors" and action <= 7:
        path.write_bytes(flip(data[:600], chance) + data[600:])
    else:
        path.write_bytes(damage(data, chance))
    return path.name


def _places(value: Any) -> Any:
    """Yield (holder, key) of each place in a value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _set(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, dict) or key < len(holder):
        holder[key] = value
