"""Memory of each process while a model is built in shards, beside the arithmetic, on 1, 2 and 4 processes.

    python benchmarks/building.py    # BERT-large with 30,522 tokens, 3 minutes

Weights are drawn, or come from a Hugging Face folder. Measured is how far the resident memory of a process rises, but
for what is mapped from files: the pages of the folder are there once for all processes, and go when memory is short.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from threading import Event, Thread

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing

from leanbert.distributed.parallelize import parallelize
from leanbert.distributed.sharding import lay_out
from leanbert.models.config import EncoderConfig
from leanbert.models.mlm import MaskedLanguageModel
from leanbert.pretrained.build import build_model
from leanbert.pretrained.huggingface.convert import write_huggingface
from report import table, write_section

LARGE = EncoderConfig(num_layers=24, hidden_size=1024, num_heads=16)
TOKENS = 30_522


def own_bytes() -> int:
    """Return the resident bytes of this process that are not mapped from files."""
    found = psutil.Process().memory_info()
    return int(found.rss - found.shared)


def build(rank: int, ranks: int, folder: Path, source: Path | None) -> None:
    """Build on one of the processes; write by how many bytes its memory rose, and the seconds that it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    mesh = lay_out("cpu", ranks, 1)
    dist.barrier()
    before, start, ready = own_bytes(), time.perf_counter(), Event()
    highest = [before]

    def watch() -> None:
        while not ready.wait(0.001):
            highest[0] = max(highest[0], own_bytes())

    def make() -> MaskedLanguageModel:
        torch.manual_seed(0)
        return build_model(LARGE, TOKENS, init_from=source)

    watcher = Thread(target=watch)
    watcher.start()
    parallelize(make, lambda model: None, mesh)
    ready.set()
    watcher.join()
    seconds = time.perf_counter() - start
    (folder / f"{rank}.json").write_text(json.dumps([highest[0] - before, seconds]))
    dist.barrier()
    dist.destroy_process_group()


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def measured(counts: list[int]) -> str:
    """Return the table of both sources and each number of processes."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = build_model(LARGE, TOKENS)
        sizes = [parameter.nbytes for parameter in model.parameters()]
        write_huggingface(model, root / "model")
        del model
        for name, source in (("drawn", None), ("from a folder", root / "model")):
            for ranks in counts:
                folder = root / f"{name}-{ranks}"
                folder.mkdir()
                torch.multiprocessing.spawn(build, (ranks, folder, source), nprocs=ranks)
                found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
                shards, largest = sum(sizes) / ranks, max(sizes)
                rows.append([
                    name, str(ranks), mib(shards), mib(shards + largest), " ".join(mib(rise) for rise, _ in found),
                    f"{max(seconds for _, seconds in found):.0f}",
                ])  # fmt: skip
    header = ["weights", "processes", "shards, MiB", "and the largest tensor", "measured on each", "seconds"]
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    write_section("building", "Building a model in shards", measured(parser.parse_args().processes))


if __name__ == "__main__":
    main()
