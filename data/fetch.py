"""Download a public data set and convert it to the files that LeanBERT reads. Needs an internet connection.

    python data/fetch.py multi30k corpora/multi30k
    python data/fetch.py xsum corpora/xsum --sha256 XSUM-EMNLP18-Summary-Data-Original.tar.gz=HEX

Archives are kept in FOLDER-downloads. The SHA-256 of each is recorded beside it, in NAME.sha256, the first time, and
checked from then on; a checksum that you were given by someone you trust is checked with --sha256. FOLDER is written
whole or not at all. Read the licence of a data set (--list) before you use it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import re
import sys
import tarfile
import urllib.error
import urllib.request
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import conversion
from conversion import Downloads
from tqdm import tqdm

from leanbert.data.storage import explain_disk_errors, locked, replaced_folder, write_text_atomically
from leanbert.errors import UserError

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class DataSet:
    """What is downloaded (name: address), and the function that makes files in a folder of it."""

    title: str
    licence: str
    files: dict[str, str]
    convert: Callable[[Downloads, Path], None]


# ---- the sets ----

_MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
_ABISEE = "https://raw.githubusercontent.com/abisee/cnn-dailymail/master/url_lists"
_STORIES = "https://huggingface.co/datasets/ccdv/cnn_dailymail/resolve/main"
_UP = "https://raw.githubusercontent.com/UniversalPropositions/UP-1.0/master/UP_English-EWT"
_XSUM_SPLIT = "https://raw.githubusercontent.com/EdinburghNLP/XSum/master/XSum-Dataset"

_WMT_SMALL = {
    "training-parallel-nc-v12.tgz": "https://data.statmt.org/wmt17/translation-task/training-parallel-nc-v12.tgz",
    "dev.tgz": "https://data.statmt.org/wmt17/translation-task/dev.tgz",
    "test-full.tgz": "https://www.statmt.org/wmt14/test-full.tgz",
}
_WMT = _WMT_SMALL | {
    name: f"https://www.statmt.org/wmt13/{name}"
    for name in ("training-parallel-europarl-v7.tgz", "training-parallel-commoncrawl.tgz")
}
_WMT_LICENCE = (
    "no single licence: the organisers release the data for research; see the page of each corpus at statmt.org"
)
_NEWS_LICENCE = "no licence for the texts is stated: they belong to their publishers; use them for research"

DATA_SETS = {
    "multi30k": DataSet(
        "Multi30k, task 1, English and German (Elliott et al., 2016)",
        "none named for the texts; derived from Flickr30k, for non-commercial research and education",
        {
            f"{split}.{language}.gz": f"{_MULTI30K}/{split}.{language}.gz"
            for split in ("train", "val", "test_2016_flickr")
            for language in ("en", "de")
        },
        conversion.convert_multi30k,
    ),
    "wmt-small": DataSet("WMT English-German: News Commentary v12", _WMT_LICENCE, _WMT_SMALL, conversion.convert_wmt),
    "wmt": DataSet(
        "WMT English-German: News Commentary v12, Europarl v7, Common Crawl", _WMT_LICENCE, _WMT, conversion.convert_wmt
    ),
    "aeslc": DataSet(
        "AESLC, subject lines of e-mails (Zhang and Tetreault, 2019)",
        "CC BY-NC-SA 4.0; real e-mails, with names",
        {"AESLC.tar.gz": "https://github.com/ryanzhumich/AESLC/archive/refs/heads/master.tar.gz"},
        conversion.convert_aeslc,
    ),
    "xsum": DataSet(
        "XSum, BBC articles and their first sentences (Narayan et al., 2018)",
        _NEWS_LICENCE,
        {
            "XSUM-EMNLP18-Summary-Data-Original.tar.gz": "http://bollin.inf.ed.ac.uk/public/direct/"
            "XSUM-EMNLP18-Summary-Data-Original.tar.gz",
            "XSum-split.json": f"{_XSUM_SPLIT}/XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json",
        },
        conversion.convert_xsum,
    ),
    "cnn-dailymail": DataSet(
        "CNN/DailyMail, articles and highlights (Hermann et al., 2015; splits of See et al., 2017)",
        _NEWS_LICENCE,
        {f"all_{split}.txt": f"{_ABISEE}/all_{split}.txt" for split in ("train", "val", "test")}
        | {name: f"{_STORIES}/{name}" for name in ("cnn_stories.tgz", "dailymail_stories.tgz")},
        conversion.convert_cnn_dailymail,
    ),
    "propbank": DataSet(
        "Universal PropBank 1.0, English-EWT: roles at head words, here made spans (approximate)",
        "CC BY-SA 4.0 (annotation); texts of the LDC English Web Treebank from various sources",
        {f"en_ewt-up-{split}.conllu": f"{_UP}/en_ewt-up-{split}.conllu" for split in ("train", "dev", "test")},
        conversion.convert_propbank,
    ),
}


# ---- download ----


def fetch(url: str, path: Path, expected: str | None) -> None:
    """Download to `path` unless it is there, and check or record its SHA-256.

    Raises UserError if it cannot be fetched, broke off or is not what it should be; nothing half-written is kept.
    """
    record = path.with_name(f"{path.name}.sha256")
    if not path.exists():
        building = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            with explain_disk_errors(path.parent):
                _download(url, building, path)
                os.replace(building, path)
        finally:
            building.unlink(missing_ok=True)
    found = sha256(path)
    known = record.read_text(encoding="utf-8").split()[0] if record.exists() else None
    for wanted, where in ((expected, "--sha256"), (known, str(record))):
        if wanted is not None and wanted.lower() != found:
            raise UserError(
                f"{path}: SHA-256 is {found}, but {where} says {wanted}. Delete both files if the source has changed"
            )
    if known is None:
        write_text_atomically(record, f"{found}  {path.name}\n")  # as sha256sum writes and checks it
        print(f"{path.name}: SHA-256 {found} recorded", file=sys.stderr)


def _download(url: str, building: Path, path: Path) -> None:
    advice = f"Check the connection, or download it by other means to {path}"
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "leanbert-fetch"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            with (
                building.open("wb") as file,
                tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while chunk := answer.read(CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        raise UserError(f"{url}: cannot be fetched ({error}). {advice}") from error
    if size and building.stat().st_size != size:
        raise UserError(f"{url}: broke off after {building.stat().st_size:,} of {size:,} bytes. {advice}")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def make(name: str, folder: Path, expected: dict[str, str]) -> None:
    """Download and convert the data set `name` into `folder`. Raises UserError."""
    chosen = DATA_SETS[name]
    if unknown := set(expected) - set(chosen.files):
        raise UserError(f"--sha256: {name} has no file {sorted(unknown)[0]}. It has {', '.join(chosen.files)}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: there is something in it. Choose a new folder, or delete it")
    store = folder.with_name(f"{folder.name}-downloads")
    with locked(store / "fetch"):
        downloads = {file: store / file for file in chosen.files}
        for file, url in chosen.files.items():
            fetch(url, downloads[file], expected.get(file))
        try:
            with replaced_folder(folder) as building:
                chosen.convert(downloads, building)
        except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise UserError(f"{store}: a file is damaged ({error}). Delete the folder and fetch again") from error
        except (KeyError, IndexError, StopIteration, RuntimeError, ValueError) as error:
            raise UserError(
                f"{store}: the layout of the files has changed ({error!r}). See data/README.md for the sources"
            ) from error


# ---- command line ----


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 2 with one line on standard error where it is impossible."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.list:
        for name, chosen in DATA_SETS.items():
            print(f"{name}\n  {chosen.title}\n  licence: {chosen.licence}")
            print("".join(f"  {url}\n" for url in chosen.files.values()))
        return 0
    if given.name is None or given.folder is None:
        parser.error("name the data set and the folder, or ask for --list")
    print(f"{DATA_SETS[given.name].title}\nlicence: {DATA_SETS[given.name].licence}", file=sys.stderr)
    try:
        make(given.name, given.folder, dict(given.sha256))
    except (UserError, OSError) as error:
        print(f"error: {error}".replace(" with --data.cache_dir", ""), file=sys.stderr)  # a setting of train.py
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=list(DATA_SETS), help="the data set")
    parser.add_argument("folder", nargs="?", type=Path, help="a new folder for the converted files")
    parser.add_argument("--list", action="store_true", help="say title, licence and addresses of all sets, and stop")
    parser.add_argument("--sha256", metavar="FILE=HEX", type=_checksum, action="append", default=[],
                        help="checksum that a download must have; once for each file")  # fmt: skip
    return parser


def _checksum(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise argparse.ArgumentTypeError(f'"{text}" is not FILE=HEX with 64 hexadecimal digits')
    return name, value


if __name__ == "__main__":
    sys.exit(main())
