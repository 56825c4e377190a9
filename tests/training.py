"""Training through the command line's own code, in this process: fast enough for many small runs."""

from __future__ import annotations

import gc
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leanbert.cli.app import CLI, quiet_libraries

TINY = [
    "--model.encoder.num_layers=2",
    "--model.encoder.hidden_size=32",
    "--model.encoder.num_heads=2",
    "--data.max_length=32",
    "--data.batch_size=8",
    "--data.vocab_size=300",
    "--trainer.log_every_n_steps=1",
    "--trainer.precision=32-true",  # by default it is the processor's
]

PLAIN = "trainer: {precision: 32-true}\nmodel: {init_args: {optimizer: {name: adamw, lr: 0.001}}}\n"
"""Plain training in float32 with AdamW."""


def fit(folder: Path, *arguments: str, overlays: tuple[str, ...] = (), steps: int = 4) -> CLI:
    """Train a tiny model on `folder/train.txt` with `configs/memory/NAME.yaml` for each overlay."""
    quiet_libraries()
    plain = folder / "plain.yaml"
    plain.write_text(PLAIN)
    configs = ["configs/mlm.yaml", str(plain), *(f"configs/memory/{name}.yaml" for name in overlays)]
    return CLI(
        ["fit", *(f"--config={config}" for config in configs), *TINY,
         "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
         f"--data.train_files={folder / 'train.txt'}", f"--data.cache_dir={folder / 'cache'}",
         f"--trainer.default_root_dir={folder / 'runs'}",
         f"--trainer.max_steps={steps}", *arguments]
    )  # fmt: skip


def scalars(cli: CLI) -> dict[str, dict[int, float]]:
    """Return the logged values of a run by tag and step."""
    gc.collect()
    return read_scalars(str(cli.trainer.log_dir))


def read_scalars(run_folder: Path | str) -> dict[str, dict[int, float]]:
    """Return the values of a run by tag and step; of a step logged twice (before and after a kill) the last."""
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
