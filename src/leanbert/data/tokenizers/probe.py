"""Foreign tokenizers in a way that survives them: panics of the Rust library, aborts, endless work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from leanbert.errors import UserError

PROBE_SECONDS = 20
PROBE_BYTES = 2 << 30
"""Time and memory that a foreign tokenizer may take for being read and for a few words."""

_HARMLESS = {
    *("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "StripAccents", "Strip", "Sequence"),
    *("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"),
    *("BertProcessing", "RobertaProcessing", "TemplateProcessing", "WordPiece", "BPEDecoder", "ByteFallback", "Fuse"),
}
"""Parts that take no pattern and no table from the file; of templates see `_is_harmless`."""

_HARMLESS_PATTERNS = (" {2,}",)

_TEXTS = (
    *("", " ", "a", "The Mill, 1905!", "\u00e9l\u00e8ve \ufb01 \u0130", "e\u0301\u200d\ufeff\x00\x1f"),
    *("\u6771\u4eac \u0e44\u0e17\u0e22 \U0001f600", "ab " * 2000, "a" * 5000),
)

_PROGRAM = f"""
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, 2 * (int(sys.argv[1]),))
except ImportError:
    pass
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_str(sys.stdin.buffer.read().decode())
for text in {_TEXTS!r}:
    tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
"""


@contextmanager
def explained(source: str, problem: str = "not a tokenizer that can be read") -> Iterator[None]:
    """Turn whatever the Rust library and wrong types raise, its panics included, into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # The library raises bare Exception, and for a panic an heir of BaseException that has no public name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: {problem} ({reason}). Copy or make it again") from error


def parse_tokenizer(text: str, source: str) -> Tokenizer:
    """Return the tokenizer of the text of a tokenizer.json; what could end the process is tried in another one.

    Raises `UserError` if it cannot be read, or encodes no text without failing.
    """
    with explained(source, "not a tokenizer.json"):
        if not _is_harmless(json.loads(text)) and (failure := _failure(text)):
            raise UserError(f"{source}: a tokenizer that {failure}. Copy or make it again, or choose another one")
        return Tokenizer.from_str(text)


def _is_harmless(parsed: Any) -> bool:
    """Tell whether all parts are of the kinds that can neither panic nor run away."""

    def holds(part: Any) -> bool:
        if isinstance(part, list):
            return all(map(holds, part))
        if not isinstance(part, dict):
            return True
        kind = part.get("type", "Sequence")
        if kind == "Replace":
            return part.get("pattern") in [{"Regex": pattern} for pattern in _HARMLESS_PATTERNS]
        if kind == "TemplateProcessing" and not set(_written(part)) <= set(part.get("special_tokens") or ()):
            return False
        return kind in _HARMLESS and all(map(holds, part.values()))

    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return not isinstance(parsed, dict) or holds([parsed.get(part) for part in parts])


def _written(template: dict[str, Any]) -> Iterator[str]:
    """Yield the special tokens that a template writes: the library looks them up without asking."""
    for pieces in (template.get("single"), template.get("pair")):
        for piece in pieces if isinstance(pieces, list) else []:
            if isinstance(piece, dict) and isinstance(piece.get("SpecialToken"), dict):
                yield str(piece["SpecialToken"].get("id"))


@lru_cache(maxsize=4)  # a process reads the same one several times
def _failure(text: str) -> str:
    """Return how a process ends that reads the tokenizer and encodes a few texts; "" if it ends well."""
    command = [sys.executable, "-I", "-c", _PROGRAM, str(PROBE_BYTES)]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"takes more than {PROBE_SECONDS} s for a few words"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"ends the process (signal {-done.returncode})"
    last = done.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
    return f"cannot be read or used ({last[:200]})"
