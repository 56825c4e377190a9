"""Preparation of a large corpus: memory, speed against `datasets.map`, and what a kill leaves behind.

    python benchmarks/prepare.py --source corpus.txt --mib 1024

Prints a table. Added memory is the peak of resident memory, summed over the process tree, above that of a
process that has imported the code and done nothing.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from leanbert.units import format_size
from report import table, write_section

PREPARE = """
import sys
from leanbert.data.mlm import MaskedLMData
if len(sys.argv) > 1:
    settings = dict(tokenizer=sys.argv[3]) if len(sys.argv) > 3 else {}
    MaskedLMData(train_files=[sys.argv[1]], cache_dir=sys.argv[2], vocab_size=16384, **settings).prepare()
else:
    sys.stdin.read()
"""

DATASETS_MAP = """
import sys
import datasets
from transformers import AutoTokenizer

def encode(batch):
    return tokenizer(batch["text"], return_special_tokens_mask=True)

datasets.disable_progress_bars()
if len(sys.argv) > 1:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[3])
    data = datasets.load_dataset("text", data_files=sys.argv[1], sample_by="paragraph", cache_dir=sys.argv[2])
    data.map(encode, batched=True, remove_columns=["text"])
else:
    sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source", type=Path, required=True, help="text file (.txt or .txt.gz) that is repeated, changed"
    )
    parser.add_argument("--mib", type=int, default=100, help="size of the corpus to build")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(options.source, options.mib, Path(folder))


def report(source: Path, mib: int, folder: Path) -> None:
    corpus = folder / "corpus.txt"
    write_corpus(source, corpus, mib << 20)
    seconds, added = measure(PREPARE, corpus, folder / "whole")
    tokenizer = save_tokenizer(folder / "whole", folder / "tokenizer")
    ours = measure(PREPARE, corpus, folder / "given", tokenizer)
    theirs = measure(DATASETS_MAP, corpus, folder / "datasets", tokenizer)
    for share in (0.2, 0.6):
        kill_after(share * seconds, corpus, folder / "killed")
    measure(PREPARE, corpus, folder / "killed")
    same = digests(folder / "killed") == digests(folder / "whole")
    figures = {
        "LeanBERT, tokenizer trained": (seconds, added),
        "LeanBERT, tokenizer given": ours,
        "datasets.map, batched, fast tokenizer": theirs,
    }
    rows = [[name, f"{s:.0f}", f"{mib / s:.1f}", format_size(b)] for name, (s, b) in figures.items()]
    write_section(
        "prepare",
        f"Preparation of a corpus of {mib} MiB",
        f"{table(['', 'seconds', 'MiB/s', 'added memory'], rows)}\n\n"
        f"With the same tokenizer {theirs[0] / ours[0]:.2f} times as fast as `datasets.map`. Added memory is the peak "
        "of resident memory, over the process tree, above that of the imports. Killed twice and prepared again: "
        f"{'the same bytes' if same else 'NOT the same bytes'} as undisturbed.",
    )


def write_corpus(source: Path, target: Path, size_bytes: int) -> None:
    """Write the documents of `source` again and again, each time with other words replaced by numbers."""
    data = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    documents = data.decode("utf-8").split("\n\n")
    generator = random.Random(0)
    with target.open("w", encoding="utf-8", newline="\n") as out:
        while out.tell() < size_bytes:
            for document in documents:
                words = document.split(" ")
                for _ in range(max(1, len(words) // 50)):
                    words[generator.randrange(len(words))] = f"{generator.randrange(10**6)}"
                out.write(" ".join(words) + "\n\n")
                if out.tell() >= size_bytes:
                    break


def measure(program: str, *arguments: Path) -> tuple[float, int]:
    """Run a program; return seconds, and peak bytes of resident memory above one that only imports."""
    base = idle_bytes(program)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])
    peak = max((tree_bytes(process.pid) for _ in ticks(process)), default=0)
    if process.returncode:
        raise SystemExit(f"the measured program failed ({process.returncode})")
    return time.perf_counter() - start, peak - base


def idle_bytes(program: str) -> int:
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    sizes = [0, 1]
    while sizes[-1] != sizes[-2] or sizes[-1] < 20 << 20:
        time.sleep(1.0)
        sizes.append(tree_bytes(process.pid))
    process.communicate()
    return sizes[-1]


def ticks(process: subprocess.Popen) -> Iterator[None]:
    while process.poll() is None:
        yield
        time.sleep(0.05)


def tree_bytes(pid: int) -> int:
    total = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def kill_after(seconds: float, corpus: Path, folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PREPARE, str(corpus), str(folder)])
    time.sleep(seconds)
    process.kill()
    process.wait()


def save_tokenizer(cache_dir: Path, folder: Path) -> Path:
    from leanbert.data.tokenizers.tokenizer import TextTokenizer

    trained = next((cache_dir / "tokenizers").glob("*/tokenizer.json"))
    TextTokenizer.from_file(trained).save(folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = (path for kind in ("tokens", "tokenizers") for path in sorted((folder / kind).rglob("*")))
    return {
        str(path.relative_to(folder)): hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
        for path in files
        if path.is_file() and path.suffix != ".lock"
    }


if __name__ == "__main__":
    main()
