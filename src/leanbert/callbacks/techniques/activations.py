"""Less stored activation: checkpointing, offload, layer-major execution, chunked head."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.errors import UserError
from leanbert.ranges import COUNT
from leanbert.tasks.techniques import Techniques


class ActivationCheckpointing(TechniqueCallback):
    """Compute activations of blocks again in the backward pass instead of keeping them (exact).

    Args:
        keep: `input`: only what goes into the block, for about a third more compute; `products`: also the outputs
            of matrix products and of attention, so that only cheap operations run twice.
        every: Checkpoint every n-th block, from the first.

    """

    def __init__(self, keep: Literal["input", "products"] = "input", every: int = 1) -> None:
        COUNT.check("ActivationCheckpointing.every", every)
        self.keep, self.every = keep, every

    def register(self, techniques: Techniques) -> None:
        """Ask for what is kept."""
        techniques.keep, techniques.keep_every = self.keep, self.every


class ActivationOffload(TechniqueCallback):
    """Let activations wait for the backward pass elsewhere than on the device (exact; costs their transfer).

    Args:
        to: `disk`: in an unnamed file; `host`: in page-locked memory of an accelerator's host.
        folder: Folder of that file. Default: trainer.default_root_dir.

    """

    def __init__(self, to: Literal["disk", "host"] = "disk", folder: str | None = None) -> None:
        self.to, self.folder = to, folder
        self._folder = Path(folder or ".")
        if folder is not None and to == "host":
            raise UserError("ActivationOffload.folder: has no effect with to=host. Leave it out.")

    def register(self, techniques: Techniques) -> None:
        """Ask for the storage."""
        techniques.storage = "host" if self.to == "host" else self._folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder, and register."""
        if stage == "fit" and self.to == "disk":
            self._folder = Path(self.folder or trainer.default_root_dir)
            self._folder.mkdir(parents=True, exist_ok=True)
        super().setup(trainer, pl_module, stage)


class LayerMajor(TechniqueCallback):
    """Run each block over all slices of the batch before the next block (exact; computes each block once more).

    Keeps the inputs of blocks only, like checkpointing, but gradients are whole block by block: with
    OptimizerInBackward they are freed at once, whatever the number of slices.

    Args:
        micro_batch: Sequences that go through a block at a time, on each device.

    """

    def __init__(self, micro_batch: int = 4) -> None:
        COUNT.check("LayerMajor.micro_batch", micro_batch)
        self.micro_batch = micro_batch

    def register(self, techniques: Techniques) -> None:
        """Ask for the slices."""
        techniques.slice_rows = self.micro_batch


class ChunkedHead(TechniqueCallback):
    """Make the vocabulary's logits for some targets at a time (exact).

    Args:
        targets: Targets whose logits exist at the same time.

    """

    def __init__(self, targets: int = 256) -> None:
        COUNT.check("ChunkedHead.targets", targets)
        self.targets = targets

    def register(self, techniques: Techniques) -> None:
        """Ask for the chunk."""
        techniques.head_chunk = self.targets
