"""Conversion of public data sets, as they are downloaded, to the files that LeanBERT reads. `fetch.py` uses it."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator
from html import unescape
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from leanbert.errors import UserError

Record = dict[str, Any]
Downloads = dict[str, Path]
"""The files of a data set by their names."""

WMT_CORPORA = {
    "training-parallel-nc-v12.tgz": "news-commentary-v12.de-en",
    "training-parallel-europarl-v7.tgz": "europarl-v7.de-en",
    "training-parallel-commoncrawl.tgz": "commoncrawl.de-en",
}
"""What the archives of training data call their English-German part."""


def aeslc_record(name: str, text: str) -> Record:
    """Return {"id", "document", "summary"} of an e-mail; "references", subject first, where annotators wrote some."""
    document, _, rest = text.partition("\n@subject\n")
    subject, *annotated = (part.strip() for part in re.split(r"\n@ann\d+\n", rest))
    record = {"id": name, "document": _lines(document), "summary": subject}
    return record | ({"references": [subject, *filter(None, annotated)]} if annotated else {})


def xsum_record(name: str, text: str) -> Record:
    """Return {"id", "document", "summary"}: the article without its first sentence, and that sentence."""
    _, *parts = re.split(r"\[SN\]([A-Z-]+)\[SN\]", text)  # name, text, name, text ...
    fields = dict(zip(parts[::2], parts[1::2], strict=True))
    return {"id": name, "document": _lines(fields["RESTBODY"]), "summary": _lines(fields["FIRST-SENTENCE"])}


def story_record(name: str, text: str) -> Record:
    """Return {"id", "document", "summary"} of a CNN or Daily Mail story; each highlight is a line of the summary."""
    article, *highlights = re.split(r"^@highlight$", text, flags=re.MULTILINE)
    summary = "\n".join(_with_full_stop(_lines(highlight)) for highlight in highlights if highlight.strip())
    return {"id": name, "document": _lines(article), "summary": summary}


def propbank_records(text: str) -> Iterator[Record]:
    """Yield {"sent_id", "tokens", "predicate", "roleset", "labels"} for each predicate of a CoNLL-U Plus file.

    Universal PropBank marks the head word of an argument. Its span here is the part of the head's subtree that lies
    around it without a gap, without other arguments, the predicate and punctuation at the ends: an approximation.
    """
    for block in re.split(r"\n\s*\n", text.strip()):
        name = re.search(r"^# sent_id = (.+)$", block, re.MULTILINE)
        rows = [line.split("\t") for line in block.split("\n") if re.match(r"\d+\t", line)]  # no 1-2, no 8.1
        predicates = [index for index, row in enumerate(rows) if len(row) > 10 and row[10] != "_"]
        for column, predicate in enumerate(predicates, start=11):
            heads = {index: row[column] for index, row in enumerate(rows) if row[column] not in ("_", "V")}
            yield {
                "sent_id": name.group(1).strip() if name else "",
                "tokens": [row[1] for row in rows],
                "predicate": predicate,
                "roleset": rows[predicate][10],
                "labels": _span_labels(rows, predicate, heads),
            }


def _span_labels(rows: list[list[str]], predicate: int, heads: dict[int, str]) -> list[str]:
    """Return BIO tags of the predicate and of the arguments, given as {index of the head: role}."""
    parents = [int(row[6]) - 1 for row in rows]  # -1: root
    barriers = {predicate, *heads}
    owners = [_owner(index, parents, barriers) for index in range(len(rows))]
    labels = ["O"] * len(rows)
    for head, role in heads.items():
        if head == predicate:
            continue
        start = end = head
        while start > 0 and owners[start - 1] == head:
            start -= 1
        while end + 1 < len(rows) and owners[end + 1] == head:
            end += 1
        while start < head and rows[start][3] == "PUNCT":
            start += 1
        while end > head and rows[end][3] == "PUNCT":
            end -= 1
        labels[start : end + 1] = [f"B-{role}"] + [f"I-{role}"] * (end - start)
    labels[predicate] = "B-V"
    return labels


def _owner(index: int, parents: list[int], barriers: set[int]) -> int:
    """Return the nearest of `barriers` at or above a word in the tree; -1 if there is none."""
    for _ in parents:  # a tree is no deeper than it has words; a circle ends too
        if index == -1 or index in barriers:
            return index
        index = parents[index]
    return -1


def sgm_lines(text: str) -> list[str]:
    """Return the segments of an SGML file of the WMT test sets."""
    return [_one_line(unescape(line)) for line in re.findall(r"<seg[^>]*>(.*?)</seg>", text, re.DOTALL)]


def _lines(text: str) -> str:
    """Return the lines that are not blank, each with its runs of spaces made one."""
    return "\n".join(line for line in map(_one_line, text.split("\n")) if line)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _with_full_stop(text: str) -> str:
    return text if text.endswith((".", "!", "?", '"', "'", ")")) else f"{text}."


def convert_multi30k(downloads: Downloads, folder: Path) -> None:
    """Write {train,val,test2016}.{en,de}."""
    for split, source in {"train": "train", "val": "val", "test2016": "test_2016_flickr"}.items():
        sides = [_gzip_lines(downloads[f"{source}.{language}.gz"]) for language in ("en", "de")]
        write_parallel(zip(*sides, strict=True), folder, split)


def convert_wmt(downloads: Downloads, folder: Path) -> None:
    """Write train.{en,de} of all training archives, val (newstest2013) and test (newstest2014)."""
    corpora = [name for name in WMT_CORPORA if name in downloads]
    pairs = (_archived_pairs(downloads[name], f"{WMT_CORPORA[name]}.en", f"{WMT_CORPORA[name]}.de") for name in corpora)
    write_parallel(chain.from_iterable(pairs), folder, "train")
    write_parallel(_archived_pairs(downloads["dev.tgz"], "newstest2013.en", "newstest2013.de"), folder, "val")
    names = ("newstest2014-deen-src.en.sgm", "newstest2014-deen-ref.de.sgm")
    sides = [sgm_lines(_member(downloads["test-full.tgz"], name)) for name in names]
    write_parallel(zip(*sides, strict=True), folder, "test")


def convert_aeslc(downloads: Downloads, folder: Path) -> None:
    """Write {train,val,test}.jsonl."""
    names = {"train": "train", "dev": "val", "test": "test"}
    found = (
        (names[path.parent.name], aeslc_record(path.stem, text))
        for path, text in _members(downloads["AESLC.tar.gz"], ".subject")
        if path.parent.name in names
    )
    write_splits(found, folder, list(names.values()))


def convert_xsum(downloads: Downloads, folder: Path) -> None:
    """Write {train,val,test}.jsonl."""
    listed = json.loads(downloads["XSum-split.json"].read_text(encoding="utf-8"))
    names = {"train": "train", "validation": "val", "test": "test"}
    splits = {article: names[split] for split, articles in listed.items() for article in articles}
    archive = downloads["XSUM-EMNLP18-Summary-Data-Original.tar.gz"]
    articles = ((path.stem, text) for path, text in _members(archive, ".summary") if path.stem in splits)
    write_splits(((splits[name], xsum_record(name, text)) for name, text in articles), folder, list(names.values()))


def convert_cnn_dailymail(downloads: Downloads, folder: Path) -> None:
    """Write {train,val,test}.jsonl; a story's name is the SHA-1 of its address, by which the splits are listed."""
    splits = {
        hashlib.sha1(address.strip().encode()).hexdigest(): split
        for split in ("train", "val", "test")
        for address in downloads[f"all_{split}.txt"].read_text(encoding="utf-8").splitlines()
    }
    archives = (downloads["cnn_stories.tgz"], downloads["dailymail_stories.tgz"])
    stories = (story for archive in archives for story in _members(archive, ".story"))
    found = ((splits[path.stem], story_record(path.stem, text)) for path, text in stories if path.stem in splits)
    write_splits(found, folder, ["train", "val", "test"])


def convert_propbank(downloads: Downloads, folder: Path) -> None:
    """Write {train,val,test}.jsonl."""
    for split, source in {"train": "train", "val": "dev", "test": "test"}.items():
        text = downloads[f"en_ewt-up-{source}.conllu"].read_text(encoding="utf-8")
        write_splits(((split, record) for record in propbank_records(text)), folder, [split])


def write_parallel(pairs: Iterable[tuple[str, str]], folder: Path, split: str) -> None:
    """Write `SPLIT.en` and `SPLIT.de`, without the pairs of which a side is blank. Raises UserError if none is left."""
    count = 0
    with (
        (folder / f"{split}.en").open("w", encoding="utf-8", newline="\n") as english,
        (folder / f"{split}.de").open("w", encoding="utf-8", newline="\n") as german,
    ):
        for source, target in ((_one_line(source), _one_line(target)) for source, target in pairs):
            if source and target:
                count += 1
                english.write(f"{source}\n")
                german.write(f"{target}\n")
    _report(folder, split, count, "pairs")


def write_splits(found: Iterable[tuple[str, Record]], folder: Path, splits: list[str]) -> None:
    """Write each (split, record) to `SPLIT.jsonl`, without those of which document or summary is empty.

    Raises UserError if a split stays empty.
    """
    files = {split: (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") for split in splits}
    counts = dict.fromkeys(splits, 0)
    try:
        for split, record in found:
            if record.get("document", True) and record.get("summary", True):
                files[split].write(json.dumps(record, ensure_ascii=False) + "\n")
                counts[split] += 1
    finally:
        for file in files.values():
            file.close()
    for split, count in counts.items():
        _report(folder, split, count, "records")


def _report(folder: Path, split: str, count: int, what: str) -> None:
    if not count:
        raise UserError(f"{split}: nothing was found in the downloads. Their layout has changed: see data/README.md")
    print(f"{split}: {count:,} {what}", file=sys.stderr)


def _gzip_lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        yield from lines


def _members(path: Path, ending: str) -> Iterator[tuple[PurePosixPath, str]]:
    """Yield (name, text) of the files of an archive whose names end so. Nothing is unpacked to disk."""
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(ending) and (file := archive.extractfile(member)):
                yield PurePosixPath(member.name), file.read().decode("utf-8").replace("\r\n", "\n")


def _member(path: Path, file_name: str) -> str:
    """Return the text of the file of that name in an archive, in whatever folder. Raises KeyError if there is none."""
    for name, text in _members(path, file_name):
        if name.name == file_name:
            return text
    raise KeyError(f"{path.name} has no {file_name}")


def _archived_pairs(path: Path, english: str, german: str) -> Iterator[tuple[str, str]]:
    yield from zip(*(_member(path, name).split("\n") for name in (english, german)), strict=True)
