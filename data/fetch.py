"""Download a public data set and convert it to the files that LeanBERT reads. Needs an internet connection.

    python data/fetch.py multi30k corpora/multi30k
    python data/fetch.py xsum corpora/xsum --sha256 XSUM-EMNLP18-Summary-Data-Original.tar.gz=HEX

Archives are kept in FOLDER-downloads; a download that broke off goes on when the command is given again. What is
downloaded must have the checksum that is listed here or given with --sha256; where neither is, the SHA-256 is recorded
in NAME.sha256 the first time and checked from then on. FOLDER is written whole or not at all. Read the licence of a
data set (--list) before you use it.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import conversion
from conversion import Downloads
from download import Source, fetch

from leanbert.errors import UserError
from leanbert.files import expand, explain_disk_errors, locked, replaced_folder


@dataclass(frozen=True)
class DataSet:
    """What is downloaded, by file name, and the function that makes files in a folder of it."""

    title: str
    licence: str
    files: dict[str, Source]
    convert: Callable[[Downloads, Path], None]


# ---- the sets; data/README.md says whose the checksums are ----

_MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
_ABISEE = "https://raw.githubusercontent.com/abisee/cnn-dailymail/master/url_lists"
_STORIES = "https://huggingface.co/datasets/ccdv/cnn_dailymail/resolve/main"
_UP = "https://raw.githubusercontent.com/UniversalPropositions/UP-1.0/master/UP_English-EWT"
_XSUM = "https://huggingface.co/datasets/EdinburghNLP/xsum/resolve/main/data"
_XSUM_SPLIT = "https://raw.githubusercontent.com/EdinburghNLP/XSum/master/XSum-Dataset"

_MULTI30K_MD5 = {
    "train.en.gz": "0065d13af80720a55ca8153d126e6627",
    "train.de.gz": "81ff90b99829c0cd4b1b587d394afd39",
    "val.en.gz": "2b69aa9253948ac9f67e94917272dd40",
    "val.de.gz": "6e0e229eb049e3fc99a1ef02fb2d5f91",
    "test_2016_flickr.en.gz": "ff2c0fcb4893a13bd73414306bc250ae",
    "test_2016_flickr.de.gz": "efd67d314d98489b716b145475101932",
}
_WMT_SMALL = {
    "training-parallel-nc-v12.tgz": Source(
        "https://data.statmt.org/wmt17/translation-task/training-parallel-nc-v12.tgz",
        "2b45f30ef1d550d302fd17dd3a5cbe19134ccc4c2cf50c2dae534aee600101a2",
    ),
    "dev.tgz": Source("https://data.statmt.org/wmt17/translation-task/dev.tgz"),
    "test-full.tgz": Source("https://www.statmt.org/wmt14/test-full.tgz"),
}
_WMT = _WMT_SMALL | {
    "training-parallel-europarl-v7.tgz": Source(
        "https://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz",
        "0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
    ),
    "training-parallel-commoncrawl.tgz": Source(
        "https://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz",
        "c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
    ),
}
_WMT_LICENCE = (
    "no single licence: the organisers release the data for research; see the page of each corpus at statmt.org"
)
_NEWS_LICENCE = "no licence for the texts is stated: they belong to their publishers; use them for research"

DATA_SETS = {
    "multi30k": DataSet(
        "Multi30k, task 1, English and German (Elliott et al., 2016)",
        "none named for the texts; derived from Flickr30k, for non-commercial research and education",
        {name: Source(f"{_MULTI30K}/{name}", checksum) for name, checksum in _MULTI30K_MD5.items()},
        conversion.convert_multi30k,
    ),
    "wmt-small": DataSet("WMT English-German: News Commentary v12", _WMT_LICENCE, _WMT_SMALL, conversion.convert_wmt),
    "wmt": DataSet(
        "WMT English-German: News Commentary v12, Europarl v7, Common Crawl", _WMT_LICENCE, _WMT, conversion.convert_wmt
    ),
    "aeslc": DataSet(
        "AESLC, subject lines of e-mails (Zhang and Tetreault, 2019)",
        "CC BY-NC-SA 4.0; real e-mails, with names",
        {"AESLC.tar.gz": Source("https://github.com/ryanzhumich/AESLC/archive/refs/heads/master.tar.gz")},
        conversion.convert_aeslc,
    ),
    "xsum": DataSet(
        "XSum, BBC articles and their first sentences (Narayan et al., 2018)",
        _NEWS_LICENCE,
        {
            "XSUM-EMNLP18-Summary-Data-Original.tar.gz": Source(
                f"{_XSUM}/XSUM-EMNLP18-Summary-Data-Original.tar.gz",
                "10b48aa187fc9c904b30f76ca97e2da0de8d3a1238acc26acadef93e2001af90",
            ),
            "XSum-split.json": Source(
                f"{_XSUM_SPLIT}/XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json",
                "9c0c5d8f048a90bd68b19a34e4c30577ed270d3247b2119fa06a04ef46292068",
            ),
        },
        conversion.convert_xsum,
    ),
    "cnn-dailymail": DataSet(
        "CNN/DailyMail, articles and highlights (Hermann et al., 2015; splits of See et al., 2017)",
        _NEWS_LICENCE,
        {
            "all_train.txt": Source(
                f"{_ABISEE}/all_train.txt", "a5cee49f3a6c862c26ce29308236d2a99625ab6c86a43be22d5206b2790d8029"
            ),
            "all_val.txt": Source(
                f"{_ABISEE}/all_val.txt", "81887e982b045083409c6ee838aede8ff4b97291605bcfb21bffc456a16991db"
            ),
            "all_test.txt": Source(
                f"{_ABISEE}/all_test.txt", "c4f5efb5ec2126430a5c156efbd13d0e9c4cb490169e552c38b4a51981a009bd"
            ),
            "cnn_stories.tgz": Source(
                f"{_STORIES}/cnn_stories.tgz", "e8fbc0027e54e0a916abd9c969eb35f708ed1467d7ef4e3b17a56739d65cb200"
            ),
            "dailymail_stories.tgz": Source(
                f"{_STORIES}/dailymail_stories.tgz", "ad69010002210b7c406718248ee66e65868b9f6820f163aa966369878d14147e"
            ),
        },
        conversion.convert_cnn_dailymail,
    ),
    "propbank": DataSet(
        "Universal PropBank 1.0, English-EWT: roles at head words, here made spans (approximate)",
        "CC BY-SA 4.0 (annotation); texts of the LDC English Web Treebank from various sources",
        {f"en_ewt-up-{split}.conllu": Source(f"{_UP}/en_ewt-up-{split}.conllu") for split in ("train", "dev", "test")},
        conversion.convert_propbank,
    ),
}


# ---- command line ----


def make(name: str, folder: Path, expected: dict[str, str]) -> None:
    """Download and convert the data set `name` into `folder`. Raises UserError."""
    chosen = DATA_SETS[name]
    if unknown := set(expected) - set(chosen.files):
        raise UserError(f"--sha256: {name} has no file {sorted(unknown)[0]}. It has {', '.join(chosen.files)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something in it. Choose a new folder, or delete it")
    store = folder.with_name(f"{folder.name}-downloads")
    converted = store / "converted"
    with explain_disk_errors(store), locked(converted):
        downloads = {file: store / file for file in chosen.files}
        for file, source in chosen.files.items():
            fetch(source, downloads[file], expected.get(file))
        try:
            with replaced_folder(converted) as building:
                chosen.convert(downloads, building)
        except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise UserError(f"{store}: a file is damaged ({error}). Delete the folder and fetch again") from error
        except (KeyError, IndexError, StopIteration, RuntimeError, ValueError) as error:
            raise UserError(
                f"{store}: the layout of the files has changed ({error!r}). See data/README.md for the sources"
            ) from error
        os.replace(converted, folder)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 2 with one line on standard error where it is impossible."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.list:
        for name, chosen in DATA_SETS.items():
            print(f"{name}\n  {chosen.title}\n  licence: {chosen.licence}")
            print("".join(f"  {source.url}\n" for source in chosen.files.values()))
        return 0
    if given.name is None or given.folder is None:
        parser.error("name the data set and the folder, or ask for --list")
    print(f"{DATA_SETS[given.name].title}\nlicence: {DATA_SETS[given.name].licence}", file=sys.stderr)
    try:
        make(given.name, Path(os.path.abspath(expand(given.folder, "folder"))), dict(given.sha256))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Give the command again to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=list(DATA_SETS), help="the data set")
    parser.add_argument("folder", nargs="?", help="a new folder for the converted files")
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
