"""Memory of each process while a model is built in shards, beside the arithmetic, on 1, 2 and 4 processes.

    python benchmarks/building.py    # BERT-large, and one of 8 ranks of 10 billion parameters: 6 GiB, 5 minutes

Weights are drawn, or come from a Hugging Face folder. Measured is how far the resident memory of a process rises, but
for what is mapped from files: the pages of the folder are there once for all processes, and go when memory is short.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from threading import Event, Thread

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import DeviceMesh

from leanbert.distributed.parallelize import parallelize
from leanbert.distributed.sharding import lay_out, pretend_group
from leanbert.memory.allocator import return_freed_pages
from leanbert.models.config import EncoderConfig
from leanbert.models.mlm import MaskedLanguageModel
from leanbert.pretrained.build import build_model
from leanbert.pretrained.huggingface.convert import write_huggingface
from report import table, write_section
from subcommands import train_py

TOKENS = 30_522
LARGE = EncoderConfig(num_layers=24, hidden_size=1024, num_heads=16)
HUGE = EncoderConfig(num_layers=48, hidden_size=4096, num_heads=32)
MANY = 8
"""Ranks of the huge model, of which one is there."""


def own_bytes() -> int:
    """Return the resident bytes of this process that are not mapped from files."""
    found = psutil.Process().memory_info()
    return int(found.rss - found.shared)


def build(config: EncoderConfig, mesh: DeviceMesh, source: Path | None, result: Path) -> None:
    """Build on this process; write by how many bytes its memory rose, the seconds, and the sizes of all weights."""
    torch.set_num_threads(1)
    return_freed_pages()  # else memory that is free counts, too
    before, start, ready = own_bytes(), time.perf_counter(), Event()
    highest = [before]

    def watch() -> None:
        while not ready.wait(0.001):
            highest[0] = max(highest[0], own_bytes())

    def make() -> MaskedLanguageModel:
        torch.manual_seed(0)
        return build_model(config, TOKENS, init_from=source)

    watcher = Thread(target=watch)
    watcher.start()
    model = parallelize(make, lambda model: None, mesh)
    ready.set()
    watcher.join()
    seconds, sizes = time.perf_counter() - start, [parameter.nbytes for parameter in model.parameters()]
    result.write_text(json.dumps([highest[0] - before, seconds, sizes]))


def build_with_others(rank: int, ranks: int, folder: Path, source: Path | None) -> None:
    """Build the large model on one of several processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    mesh = lay_out("cpu", ranks, 1)
    dist.barrier()
    build(LARGE, mesh, source, folder / f"{rank}.json")
    dist.barrier()
    dist.destroy_process_group()


def build_alone(rank: int, folder: Path) -> None:
    """Build the huge model on one of `MANY` ranks; of the others nothing is received."""
    with pretend_group(MANY) as mesh:
        build(HUGE, mesh, None, folder / f"{rank}.json")


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def row(weights: str, ranks: int, folder: Path) -> list[str]:
    """Return the row of the processes that wrote into a folder."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    sizes, rises = found[0][2], " ".join(mib(rise) for rise, *_ in found)
    shards, seconds = sum(sizes) / ranks, max(seconds for _, seconds, _ in found)
    parameters = f"{sum(sizes) / 4e6:,.0f}"
    return [parameters, weights, str(ranks), mib(shards), mib(shards + max(sizes)), rises, f"{seconds:.0f}"]


def measured(counts: list[int], root: Path) -> str:
    """Return the table of both sources and each number of processes, and of the huge model."""
    write_huggingface(build_model(LARGE, TOKENS), root / "model")
    rows = []
    for name, source in (("drawn", None), ("from a folder", root / "model")):
        for ranks in counts:
            folder = root / f"{name} {ranks}"
            folder.mkdir()
            torch.multiprocessing.spawn(build_with_others, (ranks, folder, source), nprocs=ranks)
            rows.append(row(name, ranks, folder))
    folder = root / "huge"
    folder.mkdir()
    torch.multiprocessing.spawn(build_alone, (folder,))
    rows.append(row("drawn, on one of the processes", MANY, folder))
    header = [
        "million parameters", "weights", "processes", "shards, MiB", "and the largest tensor", "measured on each",
        "seconds",
    ]  # fmt: skip
    return table(header, rows)


def planned(root: Path) -> str:
    """Return what a plan of the huge model says, and what it takes itself; no process was started before."""
    sizes = [f"--model.encoder.{name}={getattr(HUGE, name)}" for name in ("num_layers", "hidden_size", "num_heads")]
    start, output = time.perf_counter(), root / "plan.json"
    train_py(
        "plan", "mlm", *sizes, f"--data.vocab_size={TOKENS}", f"--devices={MANY}", "--target=cuda", f"--json={output}",
        f"--trainer.default_root_dir={root}", log=root / "plan.log", one_thread=True,
    )  # fmt: skip
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    devices = json.loads(output.read_text())["devices"]
    needs = {name: f"{devices[name]['predicted_peak_bytes'] / 2**30:.1f} GiB" for name in ("ddp", "fsdp2")}
    return (
        f"`plan --devices {MANY}` of the last model takes {seconds:.0f} s and {mib(peak)} MiB: a step of "
        f"`configs/mlm.yaml` needs {needs['fsdp2']} of live tensors on each device, and {needs['ddp']} with `ddp`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = planned(Path(folder))
        write_section(
            "building", "Building a model in shards", f"{measured(options.processes, Path(folder))}\n\n{plan}"
        )


if __name__ == "__main__":
    main()
