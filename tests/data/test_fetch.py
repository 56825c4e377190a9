from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import re
import tarfile
import threading
import urllib.request

import pytest

from leanbert.data.formats.span_labels import TagReader
from leanbert.errors import UserError
from tests.data.scripts import load_script

script = load_script("fetch")
conversion = script.conversion

EMAIL = """Hi Phil,  see you on\tMonday.

Thanks

@subject
Meeting on Monday

@ann0
meeting

@ann1
monday's meeting
"""

ARTICLE = """[SN]URL[SN]
http://news/1

[SN]TITLE[SN]
A title

[SN]FIRST-SENTENCE[SN]
The first  sentence.

[SN]RESTBODY[SN]
A line.
"Another line."
"""

STORY = """(CNN) -- It began.

It went on.

@highlight

It began

@highlight

It "went on."
"""

# "The man who sang , saw the old dog in May ." with a third predicate that is a noun and has no argument
PROPBANK = """# sent_id = s-1
# text = The man who sang, saw the old dog in May.
1\tThe\tthe\tDET\tDT\t_\t2\tdet\t_\t_\t_\t_\t_\t_
2\tman\tman\tNOUN\tNN\t_\t6\tnsubj\t_\t_\t_\tARG0\tARG0\t_
3\twho\twho\tPRON\tWP\t_\t4\tnsubj\t_\t_\t_\tR-ARG0\t_\t_
4\tsang\tsing\tVERB\tVBD\t_\t2\tacl:relcl\t_\t_\tsing.01\tV\t_\t_
5\t,\t,\tPUNCT\t,\t_\t2\tpunct\t_\t_\t_\t_\t_\t_
6\tsaw\tsee\tVERB\tVBD\t_\t0\troot\t_\t_\tsee.01\t_\tV\t_
6.1\tx\tx\tX\tX\t_\t_\t_\t_\t_\t_\t_\t_\t_
7-8\tthe old\t_\t_\t_\t_\t_\t_\t_\t_\t_\t_\t_\t_
7\tthe\tthe\tDET\tDT\t_\t9\tdet\t_\t_\t_\t_\t_\t_
8\told\told\tADJ\tJJ\t_\t9\tamod\t_\t_\t_\t_\t_\t_
9\tdog\tdog\tNOUN\tNN\t_\t6\tobj\t_\t_\tdog.01\t_\tARG1\tV
10\tin\tin\tADP\tIN\t_\t11\tcase\t_\t_\t_\t_\t_\t_
11\tMay\tMay\tPROPN\tNNP\t_\t9\tnmod\t_\t_\t_\t_\tARGM-TMP\t_
12\t.\t.\tPUNCT\t.\t_\t6\tpunct\t_\t_\t_\t_\t_\t_

# sent_id = s-2
1\tYes\tyes\tINTJ\tUH\t_\t0\troot\t_\t_\t_

# sent_id = s-3
1\tMen\tman\tNOUN\tNN\t_\t0\troot\t_\t_\t_\tARG0
2\tsinging\tsing\tVERB\tVBG\t_\t1\tacl\t_\t_\tsing.01\tV
3\there\there\tADV\tRB\t_\t2\tadvmod\t_\t_\t_\t_
"""


def _archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            content = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def _rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_emails():
    record = {"id": "a_1", "document": "Hi Phil, see you on Monday.\nThanks", "summary": "Meeting on Monday"}
    references = ["Meeting on Monday", "meeting", "monday's meeting"]
    assert conversion.aeslc_record("a_1", EMAIL) == record | {"references": references}
    assert conversion.aeslc_record("a_1", EMAIL[: EMAIL.index("\n@ann0")]) == record


def test_articles_and_stories():
    assert conversion.xsum_record("1", ARTICLE) == {
        "id": "1", "document": 'A line.\n"Another line."', "summary": "The first sentence."
    }  # fmt: skip
    assert conversion.xsum_record("1", ARTICLE.split("\nA line")[0])["document"] == ""
    assert conversion.story_record("1", STORY) == {
        "id": "1", "document": "(CNN) -- It began.\nIt went on.", "summary": 'It began.\nIt "went on."'
    }  # fmt: skip


def test_roles_at_head_words_become_spans():
    *records, last = conversion.propbank_records(PROPBANK)
    words = ["The", "man", "who", "sang", ",", "saw", "the", "old", "dog", "in", "May", "."]
    assert [record["tokens"] for record in records] == [words] * 3
    assert [(record["sent_id"], record["predicate"], record["roleset"]) for record in records] == [
        ("s-1", 3, "sing.01"), ("s-1", 5, "see.01"), ("s-1", 8, "dog.01")
    ]  # fmt: skip
    sing, see, dog = (record["labels"] for record in records)
    # below "man" are the predicate and its "who": neither belongs to the argument
    assert sing == ["B-ARG0", "I-ARG0", "B-R-ARG0", "B-V", "O", "O", "O", "O", "O", "O", "O", "O"]
    # the comma at the end of the subject is cut off; "in May", below "dog", is an argument of its own
    see_labels = "B-ARG0 I-ARG0 I-ARG0 I-ARG0 O B-V B-ARG1 I-ARG1 I-ARG1 B-ARGM-TMP I-ARGM-TMP O"
    assert see == see_labels.split()
    assert dog == ["O"] * 8 + ["B-V"] + ["O"] * 3
    assert [TagReader().read("", labels) for labels in (sing, see, dog)] == [sing, see, dog]
    assert last["labels"] == ["B-ARG0", "B-V", "O"]  # what is below the predicate is not below its argument


def test_segments_of_test_sets():
    text = '<doc>\n<seg id="1">A &amp; B </seg>\n<seg id="2">Two\nlines</seg>\n</doc>'
    assert conversion.sgm_lines(text) == ["A & B", "Two lines"]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Make the downloads of all sets, tiny, and let the addresses lead to them."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for split in ("train", "val", "test_2016_flickr"):
        for language, lines in (
            ("en", f"A  dog of {split} .\n\nTwo\n"),
            ("de", f"Ein Hund von {split} .\nLeer\nZwei\n"),
        ):
            (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(lines.encode()))
    for archive, name in conversion.WMT_CORPORA.items():
        hidden = {f"x/._{name}.en": "-"}  # as macOS adds
        _archive(folder / archive, hidden | {f"x/{name}.en": f"{name}\n\n", f"x/{name}.de": "Satz\nLeer\n"})
    _archive(folder / "dev.tgz", {f"dev/newstest2013.{language}": f"{language}\n" for language in ("en", "de")})
    sgm = {f"t/newstest2014-deen-{side}.sgm": f'<seg id="1">{side}</seg>' for side in ("src.en", "ref.de", "src.de")}
    _archive(folder / "test-full.tgz", sgm)
    emails = {f"AESLC-master/enron_subject_line/{split}/{split}_1.subject": EMAIL for split in ("train", "dev", "test")}
    _archive(folder / "AESLC.tar.gz", emails | {"AESLC-master/README.md": "text"})
    articles = {f"bbc-summary-data/{name}.summary": ARTICLE for name in "12345"}
    articles["bbc-summary-data/4.summary"] = ARTICLE.split("\nA line")[0]
    _archive(folder / "XSUM-EMNLP18-Summary-Data-Original.tar.gz", articles)
    (folder / "XSum-split.json").write_text(json.dumps({"train": ["1", "4"], "validation": ["2"], "test": ["3"]}))
    stories = {split: f"http://{split}" for split in ("train", "val", "test")}
    for split, address in stories.items():
        (folder / f"all_{split}.txt").write_text(f"{address}\n")
    names = {split: hashlib.sha1(address.encode()).hexdigest() for split, address in stories.items()}
    _archive(folder / "cnn_stories.tgz", {f"cnn/stories/{names[split]}.story": STORY for split in ("train", "val")})
    _archive(folder / "dailymail_stories.tgz", {f"d/{names['test']}.story": STORY, "d/00.story": STORY})
    for split in ("train", "dev", "test"):
        (folder / f"en_ewt-up-{split}.conllu").write_text(PROPBANK)
    for name, chosen in script.DATA_SETS.items():
        files = {file: script.Source((folder / file).as_uri()) for file in chosen.files}
        monkeypatch.setitem(script.DATA_SETS, name, dataclasses.replace(chosen, files=files))
    return folder


def test_parallel_files(sources, tmp_path):
    assert script.main(["multi30k", str(tmp_path / "m")]) == 0
    assert (tmp_path / "m" / "test2016.en").read_text() == "A dog of test_2016_flickr .\nTwo\n"
    assert (tmp_path / "m" / "test2016.de").read_text() == "Ein Hund von test_2016_flickr .\nZwei\n"
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "test2016.de", "test2016.en", "train.de", "train.en", "val.de", "val.en"
    ]  # fmt: skip
    assert script.main(["wmt", str(tmp_path / "w")]) == script.main(["wmt-small", str(tmp_path / "small")]) == 0
    assert (tmp_path / "small" / "train.en").read_text() == "news-commentary-v12.de-en\n"
    training = "news-commentary-v12.de-en\neuroparl-v7.de-en\ncommoncrawl.de-en\n"
    assert (tmp_path / "w" / "train.en").read_text() == training
    assert (tmp_path / "w" / "train.de").read_text() == "Satz\n" * 3
    assert (tmp_path / "w" / "val.de").read_text() == "de\n"
    assert [(tmp_path / "w" / f"test.{x}").read_text() for x in ("en", "de")] == ["src.en\n", "ref.de\n"]


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("aeslc", {"train": ["train_1"], "val": ["dev_1"], "test": ["test_1"]}),
        ("xsum", {"train": ["1"], "val": ["2"], "test": ["3"]}),  # 4 has no document, 5 is in no split
        ("cnn-dailymail", None),
        ("propbank", None),
    ],
)
def test_json_lines(sources, tmp_path, name, ids):
    assert script.main([name, str(tmp_path / "out")]) == 0
    for split in ("train", "val", "test"):
        rows = _rows(tmp_path / "out" / f"{split}.jsonl")
        if ids is not None:
            assert [row["id"] for row in rows] == ids[split]
        assert len(rows) == (4 if name == "propbank" else 1)


def test_checksums_are_recorded_and_checked(sources, tmp_path, capsys):
    expected = hashlib.sha256((sources / "AESLC.tar.gz").read_bytes()).hexdigest()
    wrong = expected[::-1]
    assert script.main(["aeslc", str(tmp_path / "out"), "--sha256", f"AESLC.tar.gz={wrong}"]) == 2
    assert f"SHA-256 is {expected}, but --sha256 says {wrong}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert script.main(["aeslc", str(tmp_path / "out"), "--sha256", f"AESLC.tar.gz={expected}"]) == 0
    record = tmp_path / "out-downloads" / "AESLC.tar.gz.sha256"
    assert record.read_text() == f"{expected}  AESLC.tar.gz\n"
    archive = tmp_path / "out-downloads" / "AESLC.tar.gz"
    archive.write_bytes(archive.read_bytes() + b"more")  # since the record was made
    with pytest.raises(UserError, match=r"AESLC\.tar\.gz\.sha256 says"):
        script.fetch(script.Source("file:///not/fetched/again"), archive)


def test_no_neighbour_is_touched_and_nothing_is_written_elsewhere(sources, tmp_path, monkeypatch):
    """Members of archives are read, not unpacked: a name that leads elsewhere leads nowhere."""
    out = tmp_path / "deep" / "out"
    neighbours = [out.with_name(name) for name in ("out.tmp-mine", ".out.tmp-0123abcd", "out.tmp", "out-2")]
    for folder in neighbours:
        folder.mkdir(parents=True)
        (folder / "mine").touch()
    names = ["../../train/evil.subject", "/train/absolute.subject", "train/train_1.subject", "dev/d.subject"]
    _archive(sources / "AESLC.tar.gz", {name: EMAIL for name in [*names, "test/t.subject"]})
    before = {path for path in tmp_path.rglob("*") if out.parent not in path.parents}
    assert script.main(["aeslc", str(out)]) == 0
    assert [row["id"] for row in _rows(out / "train.jsonl")] == ["evil", "absolute", "train_1"]
    assert all((folder / "mine").exists() for folder in neighbours)
    assert {path for path in tmp_path.rglob("*") if out.parent not in path.parents} == before
    assert sorted(path.name for path in out.parent.glob("out-downloads/*")) == [
        "AESLC.tar.gz", "AESLC.tar.gz.sha256", "converted.lock"
    ]  # fmt: skip


def test_errors_are_one_line_and_leave_nothing(sources, tmp_path, capsys):
    def error(*arguments):
        assert script.main(list(arguments)) == 2
        printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(printed) == 1
        return printed[0]

    out = str(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "there is something in it" in error("aeslc", str(tmp_path / "full"))
    assert "there is something in it" in error("aeslc", str(tmp_path / "full" / "file"))
    assert "folder: is empty" in error("aeslc", "")
    assert "there is no such user" in error("aeslc", "~nosuchuser/x")
    assert "cannot be written (Not a directory)" in error("aeslc", str(tmp_path / "full" / "file" / "deep"))
    assert "--sha256: aeslc has no file x. It has AESLC.tar.gz" in error("aeslc", out, "--sha256", f"x={'0' * 64}")
    (sources / "AESLC.tar.gz").write_bytes(b"no archive")
    assert "a file is damaged" in error("aeslc", out)
    _archive(sources / "dev.tgz", {"dev/other.en": "text"})
    assert "the layout of the files has changed" in error("wmt", out)
    (sources / "val.de.gz").write_bytes(gzip.compress(b"one line\n"))
    assert "the layout of the files has changed" in error("multi30k", str(tmp_path / "lengths"))
    (sources / "XSum-split.json").unlink()
    message = error("xsum", str(tmp_path / "gone"))
    assert "cannot be fetched" in message
    assert f"download it by other means to {tmp_path / 'gone-downloads' / 'XSum-split.json'}" in message
    assert not [path for path in tmp_path.rglob("*") if ".tmp-" in path.name]
    assert not [path for path in tmp_path.iterdir() if path.name in ("out", "lengths", "gone")]


# ---- a server

CONTENT = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends CONTENT as the server's `manner` says, and notes the ranges that are asked for."""

    def do_GET(self):
        manner, tag, asked = self.server.manner, self.server.tag, self.headers.get("Range")
        self.server.asked.append(asked)
        begin = 0
        if asked and self.headers.get("If-Range") == tag:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
        if begin >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if manner not in ("endless", "chunked"):
            self.send_header("Content-Length", str(len(CONTENT) - begin))
        if manner == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        self.send_header("ETag", tag)
        self.end_headers()
        sent = CONTENT[begin:] if manner == "whole" else CONTENT[begin : begin + 3000]
        self.wfile.write(f"{len(sent):x}\r\n".encode() + sent + b"\r\n" if manner == "chunked" else sent)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.manner, running.tag, running.asked = "whole", '"1"', []
        running.url = f"http://127.0.0.1:{running.server_port}/file"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_download_that_broke_off_goes_on(server, tmp_path):
    path, source = tmp_path / "file", script.Source(server.url)
    server.manner = "breaks off"
    for sent in (3000, 6000):
        with pytest.raises(UserError, match=rf"broke off after {sent:,} of 10,240 bytes.*again to go on"):
            script.fetch(source, path)
        assert not path.exists()
    server.manner = "whole"
    script.fetch(source, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=3000-", "bytes=6000-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.sha256"]


@pytest.mark.parametrize(("tag", "asked"), [('"2"', "bytes=3000-"), ('W/"1"', None)])
def test_halves_of_two_files_are_not_joined(server, tmp_path, tag, asked):
    server.manner, first = "breaks off", tag if tag.startswith("W/") else '"1"'
    server.tag = first
    with pytest.raises(UserError, match="broke off"):
        script.fetch(script.Source(server.url), tmp_path / "file")
    server.manner, server.tag = "whole", tag
    script.fetch(script.Source(server.url), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [None, asked]


def test_a_part_that_was_whole_is_fetched_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[::-1])
    (tmp_path / "file.part.version").write_text('"1"')
    script.fetch(script.Source(server.url), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == ["bytes=10240-", None]


@pytest.mark.parametrize(
    ("manner", "message"), [("chunked", "cannot be fetched .*go on"), ("endless", "does not say how long it is")]
)
def test_what_breaks_off_without_a_length_is_not_taken_for_whole(server, tmp_path, manner, message):
    server.manner = manner
    with pytest.raises(UserError, match=message):
        script.fetch(script.Source(server.url), tmp_path / "file")
    wrong = script.Source(server.url, hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(UserError, match=f"{message}|It is deleted. Fetch it again"):
        script.fetch(wrong, tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_checksums_of_the_list_hold_unless_one_is_given(server, tmp_path, kind):
    path, right = tmp_path / "file", hashlib.new(kind, CONTENT).hexdigest()
    wrong = script.Source(server.url, right[::-1])
    with pytest.raises(UserError, match=rf"is {right}, but the list in data/fetch\.py says {right[::-1]}"):
        script.fetch(wrong, path)
    assert list(tmp_path.iterdir()) == []
    script.fetch(script.Source(server.url, right), path)
    with pytest.raises(UserError, match=r"the list in data/fetch\.py says"):
        script.fetch(wrong, path)
    script.fetch(wrong, path, hashlib.sha256(CONTENT).hexdigest())


def test_nothing_is_taken_from_an_open_line_and_who_stops_is_told(tmp_path, monkeypatch, capsys):
    class Answer(io.BytesIO):
        url = "http://elsewhere"

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Answer())
    with pytest.raises(UserError, match=r"https://x: leads to http://elsewhere"):
        script.fetch(script.Source("https://x"), tmp_path / "file")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(urllib.request, "urlopen", interrupt)
    assert script.main(["aeslc", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Stopped. Give the command again to go on"


def test_the_list_is_of_https_and_checksums_look_like_some():
    sources = [source for chosen in script.DATA_SETS.values() for source in chosen.files.values()]
    assert all(source.url.startswith("https://") for source in sources)
    assert all(re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", source.checksum) for source in sources if source.checksum)
    assert sum(source.checksum is not None for source in sources) == 17


def test_every_set_states_its_licence(capsys):
    assert script.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("\n  licence: ") == len(script.DATA_SETS) == 7
    with pytest.raises(SystemExit) as error:
        script.main(["xsum"])
    assert error.value.code == 2
