"""Lightning's Trainer with the subcommands that Lightning does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch import LightningDataModule, LightningModule

from leanbert.errors import UserError


class Trainer(pl.Trainer):
    """Lightning's Trainer, with `prepare` and `export`."""

    def prepare(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Build tokenizer and token cache only; needs no accelerator, so it suits a login node.

        Args:
            model: The task.
            datamodule: The data.
            ckpt_path: Checkpoint whose tokenizer is used.
            weights_only: Not used; `fit` saves it in the configuration.
        """
        datamodule.prepare_data()

    def export(
        self,
        model: LightningModule,
        output: str,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        format: Literal["hf"] = "hf",
    ) -> None:
        """Write a trained model in a standard format.

        Args:
            model: The task.
            output: Folder to write; it is created.
            datamodule: Not used.
            ckpt_path: Checkpoint file, or `last` or `best` of the newest run; else --model.init_from is exported.
            weights_only: Not used; `fit` saves it in the configuration.
            format: hf: config.json, model.safetensors and the tokenizer, as `transformers` loads them.

        """
        from leanbert.api import load

        source = ckpt_path or getattr(model, "init_from", None)
        if source is None:
            raise UserError("export: nothing to export. Give --ckpt_path (a file, last or best) or --model.init_from.")
        load(source).export(Path(output))
