"""Download of files that are whole, and the right ones, or are not kept. `fetch.py` uses it."""

from __future__ import annotations

import hashlib
import os
import ssl
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from leanbert.errors import UserError
from leanbert.files import write_text_atomically

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60


class Source(NamedTuple):
    """Where a file is, and its checksum where somebody published one: SHA-256, or MD5 (32 digits)."""

    url: str
    checksum: str | None = None


def fetch(source: Source, path: Path, expected: str | None = None) -> None:
    """Download to `path` unless it is there, check its checksum, and record its SHA-256.

    `expected`, a SHA-256, takes the place of the recorded and the source's own checksum. Raises UserError if the file
    cannot be fetched, broke off (NAME.part is gone on from next time) or is not what it should be.
    """
    record = path.with_name(f"{path.name}.sha256")
    recorded = record.read_text(encoding="utf-8", errors="replace").split()[:1] if record.exists() else []
    wanted = [(expected, "--sha256")] if expected else [(value, str(record)) for value in recorded]
    if source.checksum and not expected:
        wanted.append((source.checksum, "the list in data/fetch.py"))
    if path.exists():
        _check(path, wanted, "Delete it to fetch it again, or give its SHA-256 if the source has changed")
    else:
        part = path.with_name(f"{path.name}.part")
        _download(source.url, part, path, has_checksum=bool(wanted))
        try:
            _check(part, wanted, "It is deleted. Fetch it again, or give its SHA-256 if the source has changed")
        except UserError:
            part.unlink()
            raise
        os.replace(part, path)
    if expected or not recorded:
        found = digest(path, "sha256")
        write_text_atomically(record, f"{found}  {path.name}\n")  # as sha256sum writes and checks it
        print(f"{path.name}: SHA-256 {found} recorded", file=sys.stderr)


def _check(path: Path, wanted: list[tuple[str, str]], fix: str) -> None:
    for value, where in wanted:
        kind, name = ("md5", "MD5") if len(value) == 32 else ("sha256", "SHA-256")
        if (found := digest(path, kind)) != value.lower():
            raise UserError(f"{path}: {name} is {found}, but {where} says {value}. {fix}")


def _download(url: str, part: Path, path: Path, has_checksum: bool) -> None:
    """Download to `part`, from its end on if it is there and the server still has the same."""
    advice = f"Give the command again to go on, or download it by other means to {path}"
    version = part.with_name(f"{part.name}.version")
    try:
        with _open(url, part, version) as answer:
            begin = part.stat().st_size if answer.status == 206 else 0
            if begin and not answer.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
                raise ValueError("the server sent another part than it was asked for")
            length = answer.headers.get("Content-Length")
            if length is None and answer.headers.get("Transfer-Encoding") != "chunked" and not has_checksum:
                raise UserError(f"{url}: the server does not say how long it is. Download it by other means to {path}")
            size = None if length is None else begin + int(length)
            with part.open("ab" if begin else "wb") as file, _bar(size, begin, path.name) as bar:
                # Without a mark of the version that is sure, a second half could be that of another file.
                mark = answer.headers.get("ETag") or ""
                version.write_text("" if mark.startswith("W/") else mark, encoding="utf-8")
                while chunk := answer.read(CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (urllib.error.URLError, HTTPException, ssl.SSLError, TimeoutError, ConnectionError, ValueError) as error:
        raise UserError(f"{url}: cannot be fetched ({error}). {advice}") from error
    if size is not None and part.stat().st_size != size:
        raise UserError(f"{url}: broke off after {part.stat().st_size:,} of {size:,} bytes. {advice}")
    version.unlink()


def _open(url: str, part: Path, version: Path) -> Any:
    headers = {"User-Agent": "leanbert-fetch"}
    if part.exists() and version.exists() and (mark := version.read_text(encoding="utf-8")):
        headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": mark}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or "Range" not in headers:  # 416: there is nothing after what is there
            raise
        part.unlink()
        return _open(url, part, version)
    if url.startswith("https:") and not answer.url.startswith("https:"):
        raise UserError(f"{url}: leads to {answer.url}, which anybody on the way can change. Do without it")
    return answer


def _bar(size: int | None, begin: int, name: str) -> tqdm:
    return tqdm(total=size, initial=begin, unit="B", unit_scale=True, desc=name)


def digest(path: Path, kind: str) -> str:
    """Return a digest of a file in hexadecimal; the kind is one that hashlib knows."""
    found = hashlib.new(kind)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()
