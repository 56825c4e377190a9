"""One model on several devices: memory of each, what it sends and waits for, beside what `plan --devices` foretells.

    python benchmarks/scale.py                    # 1 and 2 processes on this machine, 12 configurations, 12 minutes
    python benchmarks/scale.py --devices 1 2 4    # and 4, where there are cores for them

Each device has the same number of sequences, so that a step of n devices is n times as large. Figures of a step are of
a sampled one (`CommunicationMonitor`, `MemoryMonitor`); live bytes are those of the first device, which has the largest
shards. The last table goes beyond what was run: a model of links and devices, which it states.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leanbert.data.samples.docstrings import embedded_corpus
from report import table, write_section
from subcommands import train_py

STRATEGIES = ("ddp", "fsdp", "hsdp")
PLAIN = ("--trainer.precision=32-true", "--model.optimizer.name=adamw", "--model.optimizer.lr=1e-3")
SMALL = ("--config=configs/size/mini.yaml", "--data.max_length=64", "--data.vocab_size=8192")
CONFIGURATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ddp": ("ddp", PLAIN),
    "ddp, checkpointing, micro-batches": ("ddp", (*PLAIN, "checkpointing", "accumulation")),
    "ddp, 8-bit AdamW": ("ddp", (*PLAIN, "adamw_8bit")),
    "fsdp": ("fsdp", PLAIN),
    "fsdp, clipped": ("fsdp", (*PLAIN, "--trainer.gradient_clip_val=1.0")),
    "fsdp, checkpointing, micro-batches": ("fsdp", (*PLAIN, "checkpointing", "accumulation")),
    "fsdp, updates in the backward pass": ("fsdp", (*PLAIN, "optimizer_in_backward")),
    "fsdp, 8-bit AdamW": ("fsdp", (*PLAIN, "adamw_8bit")),
    "fsdp, 4-bit AdamW, chunked head": ("fsdp", (*PLAIN, "adamw_4bit", "chunked_head")),
    "fsdp, Adafactor": ("fsdp", (*PLAIN, "adafactor")),
    "fsdp, pruning": ("fsdp", (*PLAIN, "pruning")),
    "fsdp, Muon": ("fsdp", ("--trainer.precision=32-true",)),
}
"""Strategy, and arguments or techniques, of each whose peak is foretold."""

FAR = (8, 64, 1024)
LINKS = {"10 Gbit/s Ethernet": 1.25e9, "400 Gbit/s InfiniBand": 50e9, "NVLink, 450 GB/s": 450e9}
"""Bytes a second that a device sends."""
FLOPS = 400e12
"""Operations a second of each far device: 40 % of the bf16 peak of an H100."""


def words(arguments: Iterable[str]) -> list[str]:
    """Return arguments, with overlays for names of techniques."""
    return [each if each.startswith("--") else f"--config=configs/memory/{each}.yaml" for each in arguments]


def fit(root: Path, strategy: str | None, devices: int, rows: int, more: Iterable[str], steps: int) -> dict[str, Any]:
    """Train on some devices; return the run's summary and the last scalars of its communication page."""
    where = [f"--config=configs/strategy/{strategy}.yaml"] if strategy else []
    if strategy == "hsdp":
        groups = json.dumps({"class_path": "FullySharded", "init_args": {"replicas": 2}})
        where.append(f"--trainer.strategy={groups}")
    train_py(
        "fit", "mlm", *more, *where, f"--trainer.devices={devices}", "--trainer.accelerator=cpu",
        f"--data.batch_size={rows * devices}", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=1",
        f"--trainer.default_root_dir={root}", log=root / "fit.log", one_thread=True,
    )  # fmt: skip
    run = max((root / "mlm").iterdir(), key=lambda path: int(path.name.split("_")[1]))
    events = EventAccumulator(str(run))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("communication/", "memory/fullest"))]
    *_, update = re.findall(r"^optimizer +([\d,. ]+)$", (root / "fit.log").read_text(), re.MULTILINE)  # of this run
    held = [float(cell.replace(",", "")) for cell in update.split()[1:4]]  # parameters, optimizer, gradients
    found = {**json.loads((run / "summary.json").read_text()), "held_mib": sum(held)}
    return {**found, **{tag: events.Scalars(tag)[-1].value for tag in tags}}


def plan(root: Path, strategy: str, devices: int, rows: int, more: Iterable[str]) -> dict[str, Any]:
    """Return what `plan` foretells of each device, and the FLOPs of its step."""
    output = root / "plan.json"
    where = [f"--config=configs/strategy/{strategy}.yaml", f"--data.batch_size={rows * devices}"]
    train_py(
        "plan", "mlm", *more, *where, f"--devices={devices}", "--prepare=true", f"--json={output}",
        f"--trainer.default_root_dir={root}", log=root / "plan.log", one_thread=True,
    )  # fmt: skip
    found = json.loads(output.read_text())
    return {**found["devices"]["ddp" if strategy == "ddp" else "fsdp2"], "flops": found["flops_per_step"]}


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def balance(root: Path, counts: list[int], text: str) -> str:
    """Return the table of strategies and numbers of devices."""
    rows = []
    given = [*SMALL, *PLAIN, text]
    for devices in counts:
        for strategy in (None,) if devices == 1 else STRATEGIES if devices % 2 == 0 and devices > 2 else STRATEGIES[:2]:
            found = fit(root, strategy, devices, 16, given, 30)
            told = plan(root, strategy, devices, 16, given) if strategy in ("ddp", "fsdp") else {}
            held = found["by_category"]
            state = held["parameters"] + held["gradients"] + held["optimizer"]
            sent = found.get("communication/bytes_per_step", 0)
            rows.append([
                str(devices), strategy or "", mib(found["peak_bytes"]),
                mib(told["predicted_peak_bytes"]) if told else "", mib(state), f"{found['held_mib']:,.1f}", mib(sent),
                mib(told["sent_bytes_per_step"]) if told else "", f"{found.get('communication/wait_share', 0):.0%}",
                f"{found['tokens_per_second']:,.0f}",
            ])  # fmt: skip
    header = [
        "devices", "strategy", "live at the peak, MiB", "foretold", "parameters, gradients, state at the peak",
        "in the update", "sent a step, MiB", "foretold", "waiting", "tokens/s, all",
    ]  # fmt: skip
    return table(header, rows)


def peaks(root: Path, text: str) -> str:
    """Return the table of configurations: the peak of a device, foretold and measured."""
    rows = []
    for name, (strategy, arguments) in CONFIGURATIONS.items():
        given = [*SMALL, text, *words(arguments)]
        told, found = plan(root, strategy, 2, 16, given), fit(root, strategy, 2, 16, given, 4)
        predicted, measured = told["predicted_peak_bytes"], found["peak_bytes"]
        rows.append([name, mib(predicted), mib(measured), f"{predicted / measured - 1:+.2%}"])
    return table(["2 devices", "foretold, MiB", "measured, MiB", "error"], rows)


def beyond(root: Path, text: str) -> str:
    """Return the table of devices that nobody has run: steps that compute and send without overlap."""
    rows = []
    given = ["--config=configs/size/large.yaml", "--data.max_length=512", *PLAIN, text]
    for devices in FAR:
        for strategy in ("ddp", "fsdp"):
            told = plan(root, strategy, devices, 32, given)
            compute = told["flops"] / FLOPS
            shares = (compute / (compute + told["sent_bytes_per_step"] / speed) for speed in LINKS.values())
            sizes = (f"{told[name] / 2**30:.2f}" for name in ("predicted_peak_bytes", "sent_bytes_per_step"))
            rows.append([str(devices), strategy, *sizes, f"{compute * 1e3:.0f}", *(f"{share:.0%}" for share in shares)])
    return table(["devices", "strategy", "peak, GiB", "sent a step, GiB", "compute, ms", *LINKS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="processes on this machine")
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        text = f"--data.train_files={embedded_corpus(root)}"
        parts = [
            f"A mini model (16 sequences of 64 tokens on each device, AdamW, float32), one thread a process:\n\n"
            f"{balance(root, options.devices, text)}",
            f"Peaks of live tensors of the first device, as planned and as traced:\n\n{peaks(root, text)}",
            f"Not measured but calculated: BERT-large, 32 sequences of 512 tokens on each device, float32 AdamW, "
            f"{FLOPS / 1e12:.0f} TFLOP/s each. Share of a step that is left for computing where nothing overlaps, by "
            f"what a device can send:\n\n{beyond(root, text)}",
        ]
    write_section("scale", "Several devices", "\n\n".join(parts))


if __name__ == "__main__":
    main()
