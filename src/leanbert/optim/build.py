"""Optimizers by name, and parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanbert.errors import UserError
from leanbert.measure.trace import phase
from leanbert.models.heads import Output
from leanbert.optim.adafactor import Adafactor
from leanbert.optim.adamw import SlicedAdamW
from leanbert.optim.closures import with_gradients
from leanbert.optim.muon import Muon
from leanbert.optim.quantized_state import draw_int16, write_bfloat16
from leanbert.ranges import NOT_NEGATIVE, RATE, check_ranges
from leanbert.shards import own, own_start

OptimizerName = Literal["sgd", "momentum", "adam", "adamw", "adamw8bit", "adamw4bit", "adafactor", "muon"]
STATE_BITS = {"adamw8bit": 8, "adamw4bit": 4}
"""Bits of an element of each moment in the optimizers that quantize them."""
STAYING = ("betas", "eps", "momentum", "weight_decay")
"""Options of a parameter group that no checkpoint changes."""


@dataclass
class OptimizerConfig:
    """Which optimizer, and its settings."""

    name: OptimizerName = "muon"
    """sgd, momentum (SGD with momentum), adam, adamw, adamw8bit, adamw4bit, adafactor, or muon (on hidden matrices;
    AdamW on the rest)."""
    lr: float = 3e-3
    """Peak learning rate; with muon the rate of embeddings, norms and biases."""
    matrix_lr: float = 0.02
    """Peak learning rate of the hidden matrices; muon only."""
    weight_decay: float = 0.01
    """Decay of matrices and embeddings, never of norms and biases; an L2 term in sgd, momentum and adam."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of Adam's moments (adam, adamw, muon)."""
    eps: float = 1e-8
    """Adam's denominator offset (adam, adamw, muon)."""
    momentum: float = 0.95
    """Momentum of momentum (SGD) and muon."""

    def __post_init__(self) -> None:
        """Raise UserError for a value that no optimizer takes."""
        sizes = dict.fromkeys(("lr", "matrix_lr", "weight_decay", "eps"), NOT_NEGATIVE)
        check_ranges("model.optimizer", vars(self), {**sizes, "betas": RATE, "momentum": RATE})


class CombinedOptimizer(Optimizer):
    """Optimizers over disjoint parameters as one: one `step`, one state, one schedule, one parameter at a time.

    Parameter groups are shared with the inner optimizers, in order, so a schedule that sets a group's `lr` is seen.
    Parameters in bfloat16 are updated in float32 and written back with stochastic rounding, by `SlicedAdamW` itself
    or through a float32 copy of one parameter at a time: no master copy of the weights exists.

    Args:
        optimizers: The inner optimizers.
        seed: Decides, with step and parameter, how bfloat16 parameters are rounded.
        name: Of `OptimizerConfig`; kept in the state, which no other optimizer takes.

    """

    def __init__(self, optimizers: list[Optimizer], seed: int = 0, name: str | None = None) -> None:
        self.optimizers, self.seed, self.name = optimizers, seed, name
        self.steps = 0
        super().__init__([group for inner in optimizers for group in inner.param_groups], {})
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for inner in self.optimizers for group in inner.param_groups]
        self._owner = {id(p): inner for inner in self.optimizers for p in _parameters(inner)}
        self._index = {id(p): index for index, p in enumerate(_parameters(self))}
        self.state.clear()
        for inner in self.optimizers:
            self.state.update(inner.state)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure once, then update every parameter that has a gradient; return the closure's result."""
        result = with_gradients(closure)
        with phase("optimizer"):
            for inner in self.optimizers:
                if isinstance(inner, SlicedAdamW) or all(p.dtype != torch.bfloat16 for p in _parameters(inner)):
                    inner.step()
                    continue
                for parameter in _parameters(inner):
                    if parameter.grad is not None:
                        self._update(inner, parameter)
        self.steps += 1
        self._share()  # the first step creates the state
        return result

    def update(self, parameter: Tensor) -> None:
        """Update one parameter from its gradient, as `step` does for all."""
        with phase("optimizer"):
            self._update(self._owner[id(parameter)], parameter)

    def accumulate(self, parameter: Tensor, *, first: bool, last: bool) -> None:
        """Fold the gradient of one micro-batch into the moments of its `SlicedAdamW`; after the last one update."""
        inner = self._owner[id(parameter)]
        assert isinstance(inner, SlicedAdamW)
        with phase("optimizer"):
            inner.accumulate(parameter, first=first)
            if last:
                inner.apply(parameter)

    def _update(self, inner: Optimizer, parameter: Tensor) -> None:
        if isinstance(inner, SlicedAdamW):
            inner.update(parameter)
            return
        wide = parameter
        if parameter.dtype == torch.bfloat16:
            wide = nn.Parameter(parameter.detach().float())
            assert parameter.grad is not None
            wide.grad = parameter.grad.float()
            if parameter in inner.state:
                inner.state[wide] = inner.state.pop(parameter)
        groups = [group["params"] for group in inner.param_groups]
        try:  # a step of the inner optimizer that sees this parameter only
            for group, parameters in zip(inner.param_groups, groups, strict=True):
                group["params"] = [wide] if any(parameter is p for p in parameters) else []
            inner.step()
        finally:
            for group, parameters in zip(inner.param_groups, groups, strict=True):
                group["params"] = parameters
        if wide is not parameter:
            if wide in inner.state:  # plain sgd has none
                inner.state[parameter] = inner.state.pop(wide)
            values, place = own(wide.detach()).view(-1), self._index[id(parameter)] + (own_start(parameter) << 16)
            draws = draw_int16(values.numel(), wide.device, self.seed, self.steps, place)
            write_bfloat16(values, draws, own(parameter.detach()).view(-1))

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups, as torch's optimizers do, the number of steps and the name."""
        self._share()
        return {**super().state_dict(), "steps": self.steps, "name": self.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, each inner optimizer its own groups, in the dtypes that were saved.

        What `STAYING` names stays as the optimizer was made with it: settings count, as those of the rate do.

        Raises:
            UserError: The state is of another optimizer or of other parameters.

        """
        groups, offset, saved = list(state_dict["param_groups"]), 0, state_dict.get("name")
        if saved is not None and saved != self.name:  # checkpoints of older code have no name
            raise UserError(
                f"model.optimizer.name: {self.name}, but the checkpoint is of {saved}. Set it to {saved}, or start "
                "from the checkpoint's weights with --model.init_from."
            )
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise UserError(
                "model.optimizer: the checkpoint's optimizer has other parameter groups. Resume with the optimizer "
                "that wrote it, or start from its weights with --model.init_from."
            )
        for inner in self.optimizers:
            own, groups = groups[: len(inner.param_groups)], groups[len(inner.param_groups) :]
            ids = [index for group in own for index in group["params"]]
            state = {index: state_dict["state"][index] for index in ids if index in state_dict["state"]}
            # inner optimizers number their parameters from 0
            local = [
                {
                    **there,
                    **{name: group[name] for name in STAYING if name in group},
                    "params": [index - offset for index in there["params"]],
                }
                for group, there in zip(inner.param_groups, own, strict=True)
            ]
            inner.load_state_dict({"state": {i - offset: s for i, s in state.items()}, "param_groups": local})
            for index, parameter in zip(ids, _parameters(inner), strict=True):
                _restore_dtypes(inner.state.get(parameter, {}), state.get(index, {}), parameter.device)
            offset += len(ids)
        self.steps = state_dict.get("steps", 0)
        self._share()


def _restore_dtypes(loaded: dict[str, Any], saved: dict[str, Any], device: torch.device) -> None:
    """Undo what torch's `load_state_dict` does: it casts all state to the dtype of the parameter."""
    for name, value in saved.items():
        if isinstance(value, Tensor) and name in loaded and loaded[name].dtype != value.dtype:
            loaded[name] = value.to(device, copy=True)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, seed: int = 0, sliced: bool = False
) -> CombinedOptimizer:
    """Return the optimizer named by `config` over the trainable parameters of `model`.

    Sources: torch.optim; Muon (Jordan et al. 2024), on the two-dimensional weights inside
    the network, with AdamW on embeddings, norms, biases and the output layer. AdamW with 8 or 4 bits of state, on
    bfloat16 parameters, or where `sliced` asks for it, is `SlicedAdamW`, which draws from `seed`.
    """
    decayed, plain, matrices = _split_parameters(model, muon=config.name == "muon")
    groups = [
        {"params": parameters, "weight_decay": weight_decay}
        for parameters, weight_decay in ((decayed, config.weight_decay), (plain, 0.0))
        if parameters
    ]
    first: list[Optimizer] = []
    if config.name == "muon":
        first = [Muon(matrices, lr=config.matrix_lr, momentum=config.momentum, weight_decay=config.weight_decay)]
    return CombinedOptimizer([*first, _inner_optimizer(groups, config, seed, sliced)], seed, config.name)


def _inner_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig, seed: int, sliced: bool) -> Optimizer:
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name in ("adamw", "muon", *STATE_BITS):
        bits = STATE_BITS.get(config.name, 32)
        if bits < 32 or sliced or any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
            return SlicedAdamW(groups, state_bits=bits, seed=seed, **adam)
        return torch.optim.AdamW(groups, fused=True, **adam)
    if config.name == "adam":
        return torch.optim.Adam(groups, fused=True, **adam)
    if config.name == "adafactor":
        return Adafactor(groups, lr=config.lr, foreach=False)  # which on CUDA would copy all gradients
    momentum = config.momentum if config.name == "momentum" else 0.0
    return torch.optim.SGD(groups, lr=config.lr, momentum=momentum, foreach=False)


def _split_parameters(model: nn.Module, *, muon: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return (decayed, not decayed, for Muon); a parameter shared by two modules is counted once."""
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | Output)}
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    matrices: list[Tensor] = []
    for parameter in trainable(model.parameters()):
        if parameter.ndim < 2:
            plain.append(parameter)
        elif muon and parameter.ndim == 2 and id(parameter) not in outer:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    return decayed, plain, matrices


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [parameter for parameter in parameters if parameter.requires_grad]
