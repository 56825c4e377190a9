"""A task with one batch per step, run by Lightning's trainer, for callbacks that change weights."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

from leanbert.compression.pruning import prunable, sparsity_of
from leanbert.compression.structured import prune_structured
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.tasks.techniques import Techniques
from tests.tiny import PlainTask, tiny_model, unequal_batch


class Module(pl.LightningModule):
    """A task with one batch per step, a function of the step; `shrink` is what a resumed run does before it loads."""

    def __init__(self, shrink=None, optimizer="muon"):
        super().__init__()
        self.techniques = Techniques()
        self.optimizer_config = OptimizerConfig(name=optimizer, lr=1e-2, matrix_lr=0.2)
        self.model = tiny_model(dtype=torch.float32)
        if shrink:
            prune_structured(self.model, *shrink)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(1000), batch_size=None)

    def training_step(self, batch, batch_idx):
        return PlainTask(self.model).loss_sum(unequal_batch(seed=self.global_step)) / 28

    def optimizer_step(self, epoch, batch_idx, optimizer, closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        optimizer.zero_grad(set_to_none=True)  # as leanbert's tasks do

    def configure_optimizers(self):
        return build_optimizer(self.model, self.optimizer_config)


class Watch(Callback):
    """Notes after each step what the next forward pass will see."""

    def __init__(self):
        self.sparsity, self.zeros = {}, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = prunable(pl_module.model)
        self.sparsity[trainer.global_step] = sparsity_of(weights)
        zeros = torch.cat([(weight == 0).flatten() for weight in weights.values()])
        assert self.zeros is None or (zeros | ~self.zeros).all(), "a pruned weight came back"
        self.zeros = zeros


class Logger(DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_metrics(self, metrics, step):
        self.logged[step] = metrics


def fit(*callbacks, module=None, steps=10, folder=None, save_every=0, ckpt_path=None, logger=False):
    module = module or Module()
    saving = [ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=save_every)] if save_every else []
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[*callbacks, *saving],
        logger=logger,
        enable_checkpointing=bool(saving),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=4,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return module


def state(module):
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
