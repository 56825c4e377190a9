"""Records out of files, and pairs of lines: the examples of tasks that are trained on answers, and what to answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from leanbert.data.formats.corpora import Corpus, expanded, has_fields, records_of
from leanbert.data.formats.documents import Skipped
from leanbert.data.formats.fields import Record, text_of, value_of
from leanbert.data.formats.readers import lines_of, whole_lines
from leanbert.errors import UserError


def read_records(
    files: Sequence[str],
    setting: str,
    wanted: Sequence[str] = (),
    texts: Sequence[str] = (),
    optional: Sequence[str] = (),
    hint: str = "",
) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", record) of files and data sets with fields, in the order of their paths.

    Cells of tables are texts; a field of JSON or of a column may be anything. A `wanted` field has something in it, and
    is found in the record by its whole name, `a.b` too. A record that is blank in one of its `texts` is left out, and
    counted in a line. Other fields may be missing. Raises UserError: a pattern matches no file; a file has no such
    fields, or cannot be read. Names file and line, and of a file without fields what else, as the `hint`, is taken.
    """
    skipped = Skipped()
    for name in Corpus(tuple(files), setting=setting, suffixes=("",)).names:
        if not has_fields(name):
            taken = ".jsonl .csv .tsv, each also with .gz, .parquet and hf: names"
            raise UserError(f"{name}: has no fields. {setting} takes {taken}{hint}")
        for where, record in records_of(name, (*texts, *wanted), optional):
            for field in wanted:
                record[field] = value_of(where, record, field)
                if record[field] is None:
                    raise UserError(f'{where}: no field "{field}" but null. Set the name of the field, or fill it')
            if not skipped.lacks(where, *(text_of(where, record, field) for field in texts)):
                yield where, record
    skipped.tell()


def prediction_names(files: Sequence[str]) -> list[str]:
    """Return the files and data sets of what is to be answered, pattern by pattern; "-" is standard input."""
    return [name for one in files for name in (["-"] if one == "-" else expanded([one], "data.predict_files"))]


def prediction_inputs(
    files: Sequence[str], wanted: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, str | Record]]:
    """Yield ("file:line", what to answer) as it comes: records of formats that have fields, lines of other files.

    "-" is standard input, which has lines. They come without line ends, and blank ones too.
    """
    for name in prediction_names(files):
        if has_fields(name):
            yield from records_of(name, wanted, optional)
            continue
        standard = name == "-"
        lines = whole_lines(sys.stdin.buffer, "standard input") if standard else lines_of(name)
        for number, line in lines:
            yield f"{'standard input' if standard else name}:{number}", line.removesuffix("\n")


def prediction_texts(files: Sequence[str], fields: Sequence[str], trained: int = 1) -> Iterator[list[str]]:
    """Yield the texts of all that is to be answered: those in the `fields`, or between the tabs of a line.

    Raises UserError, naming file and line, where there are not as many as the model was `trained` on: 1, or 2 of pairs.
    """
    for where, found in prediction_inputs(files, fields):
        if isinstance(found, str):
            texts = found.split("\t", 1) if max(trained, len(fields)) > 1 else [found]
        else:
            texts = [text_of(where, found, field) for field in fields]
        fix = "Put a tab between the two" if isinstance(found, str) else "Name the second in data.pair_field"
        check_count(where, texts, trained, fix if trained > 1 else "Leave data.pair_field out")
        yield texts


def check_count(where: str, texts: Sequence[str], trained: int | None, fix: str) -> None:
    """Raise UserError unless there are as many texts as the model was `trained` on; None: it does not say."""
    if trained not in (None, len(texts)):
        here, there = ("a pair", "single texts") if trained == 1 else ("one text", "pairs of texts")
        raise UserError(f"{where}: is {here}, but the model was trained on {there}. {fix}")


def parallel_lines(sources: list[str], targets: list[str], part: str) -> Iterator[tuple[str, str, str]]:
    """Yield ("file:line", source, target) of text files, in the order in which they are given.

    Any name will do, such as train.en: they are lines of text. Pairs with a blank side are left out, and counted.
    Raises UserError: there are more files, or lines, on one side. Names the setting or the line.
    """
    here, there = expanded(sources, f"data.{part}_files"), expanded(targets, f"data.{part}_target_files")
    if len(here) != len(there):
        raise UserError(f"data.{part}_target_files: {len(there)} files for {len(here)} of sources. Give one for each")
    skipped = Skipped()
    for source, target in zip(here, there, strict=True):
        for number, (one, other) in enumerate(zip_longest(_texts(source), _texts(target)), start=1):
            if one is None or other is None:
                longer, shorter = (source, target) if other is None else (target, source)
                raise UserError(
                    f"{longer}:{number}: the other file ({shorter}) has no such line. "
                    "Give files with a line for each pair"
                )
            if not skipped.lacks(f"{source}:{number}", one, other):
                yield f"{source}:{number}", one, other
    skipped.tell()


def _texts(name: str) -> Iterator[str]:
    return (line.rstrip("\n") for _, line in lines_of(name))
