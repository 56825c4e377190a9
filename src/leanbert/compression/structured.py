"""Structured pruning: whole blocks, attention heads and feed-forward neurons leave the model. Approximate.

What stays are smaller dense matrices, so parameters, gradients, optimizer state, activations and time all fall.
Encoder and decoder attend to themselves, and the decoder to the encoder: all these attentions are pruned.

Shapes: A attentions, F feed-forwards, D hidden, H heads, d head size, I intermediate.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanbert.errors import UserError
from leanbert.models.attention import Attention
from leanbert.models.base import EncoderModel
from leanbert.models.config import ResolvedConfig
from leanbert.models.encoder import FeedForward

log = logging.getLogger(__name__)


class Importance(NamedTuple):
    """How much would be lost with each head [A, H] and each neuron [F, I], float32; compared within a row only.

    Rows are in the order of the model's modules; what two blocks share has one.
    """

    heads: Tensor
    neurons: Tensor


class Cut(NamedTuple):
    """Rows (dimension 0) or columns (dimension 1) of a linear layer that stay, int64 [kept]."""

    layer: nn.Linear
    dim: int
    kept: Tensor


@torch.no_grad()
def head_importance(model: EncoderModel) -> Tensor:
    """Return the Frobenius norm of each head's value matrix times its part of the output projection, [A, H].

    A bound on what the head can add to the residual stream, whatever it looks at (Elhage et al. 2021, "A mathematical
    framework for transformer circuits", call the product the OV circuit).
    """
    norms = []
    for attention in _attentions(model):
        *_, (layer, stacked) = attention.projections()  # values come last
        value = layer.weight.float().unflatten(0, (stacked, attention.num_heads, -1))[-1]  # [H, d, D]
        output = attention.output.weight.float().unflatten(1, (attention.num_heads, -1)).transpose(0, 1)  # [H, D, d]
        squares = (value @ value.mT) * (output.mT @ output)  # |OV|^2 is the sum: the product [D, D] is never made
        norms.append(squares.sum((1, 2)).clamp_(min=0.0).sqrt_())
    return torch.stack(norms)


@torch.no_grad()
def neuron_importance(model: EncoderModel) -> Tensor:
    """Return the norm of each neuron's input weights (both halves if gated) times its output weights' norm, [F, I].

    The input's bias counts as one more weight: with it alone a neuron is a constant, not nothing.
    """
    norms = []
    for feed_forward in _feed_forwards(model):
        layer = feed_forward.input
        rows = layer.weight if layer.bias is None else torch.cat((layer.weight, layer.bias[:, None]), dim=1)
        inward = rows.float().norm(dim=1).unflatten(0, (_halves(feed_forward), -1)).prod(dim=0)  # [I]
        norms.append(inward * feed_forward.output.weight.float().norm(dim=0))
    return torch.stack(norms)


def weight_importance(model: EncoderModel) -> Importance:
    """Return `head_importance` and `neuron_importance`, which need no data."""
    return Importance(head_importance(model), neuron_importance(model))


@torch.no_grad()
def taylor_importance(model: EncoderModel) -> Importance:
    """Return the change of the loss, to first order, if a head or neuron were switched off, from `.grad`.

    |sum of weight x gradient| over the output weights that belong to it, which is the derivative by a gate on its
    output: Michel et al. 2019, arXiv 1905.10650; Molchanov et al. 2019, arXiv 1906.10771. Add it up over steps.
    Raises `UserError` if there are no gradients.
    """
    heads, neurons = [], []
    for attention in _attentions(model):
        columns = _weight_times_gradient(attention.output)  # [H * d]
        heads.append(columns.unflatten(0, (attention.num_heads, -1)).sum(dim=1).abs())
    for feed_forward in _feed_forwards(model):
        neurons.append(_weight_times_gradient(feed_forward.output).abs())
    return Importance(torch.stack(heads), torch.stack(neurons))


def add_importance(total: Importance | None, more: Importance) -> Importance:
    """Return the sum of both, on the devices of `more`."""
    return more if total is None else Importance(*(a.to(b.device) + b for a, b in zip(total, more, strict=True)))


def _weight_times_gradient(layer: nn.Linear) -> Tensor:
    if layer.weight.grad is None:
        raise UserError(
            "StructuredPruning.importance: taylor needs gradients at the end of a step, but they are freed in the "
            "backward pass. Choose weight."
        )
    return (layer.weight.float() * layer.weight.grad.float()).sum(dim=0)


def sizes_kept(config: ResolvedConfig, fraction_heads: float, fraction_neurons: float) -> tuple[int, int]:
    """Return the heads and neurons that stay in each block when these fractions leave; at least one of each.

    Raises `UserError` if the fractions are too small to remove anything.
    """
    heads = max(1, config.num_heads - round(fraction_heads * config.num_heads))
    neurons = max(1, config.intermediate_size - round(fraction_neurons * config.intermediate_size))
    if (heads, neurons) == (config.num_heads, config.intermediate_size):
        raise UserError(
            f"{fraction_heads} of {heads} heads and {fraction_neurons} of {neurons} neurons "
            "is less than one. Give larger shares."
        )
    return heads, neurons


@torch.no_grad()
def prune_structured(
    model: EncoderModel,
    heads_kept: int,
    neurons_kept: int,
    importance: Importance | None = None,
    optimizer: Optimizer | None = None,
) -> None:
    """Shrink each attention to its `heads_kept` most important heads, each feed-forward to `neurons_kept` neurons.

    Parameters stay the same objects with smaller tensors, so that optimizers and hooks keep them. Call it between
    two steps. Nothing is read back from a tensor: it also shrinks a model on the meta device, or one whose weights
    are loaded afterwards.

    Args:
        model: The model; its `config` is replaced.
        heads_kept: Heads of each attention afterwards.
        neurons_kept: Neurons of each feed-forward afterwards.
        importance: What decides who stays; None: `weight_importance`.
        optimizer: Its state is cut along. State that does not line up with its parameter (quantized) starts afresh,
            which is logged as a warning.

    Raises:
        UserError: The model has fewer heads or neurons than are to stay, or none are.

    """
    config = model.config
    for setting, kept, size in (
        ("heads_kept", heads_kept, config.num_heads),
        ("neurons_kept", neurons_kept, config.intermediate_size),
    ):
        if not 1 <= kept <= size:
            raise UserError(f"{setting}: {kept} of {size} cannot stay. Give 1 to {size}.")
    scores = importance or weight_importance(model)
    cuts: list[Cut] = []
    for attention, heads in zip(_attentions(model), scores.heads, strict=True):
        cuts += _cuts_of_heads(attention, _highest(heads, heads_kept))
        attention.num_heads = heads_kept
    for feed_forward, neurons in zip(_feed_forwards(model), scores.neurons, strict=True):
        cuts += _cuts_of_neurons(feed_forward, _highest(neurons, neurons_kept))
    afresh = sum(_cut(cut, optimizer) for cut in cuts)
    if afresh:
        log.warning("The optimizer's state of %d pruned parameters is quantized: it starts afresh", afresh)
    _set_config(model, num_heads=heads_kept, intermediate_size=neurons_kept)


def remove_blocks(model: EncoderModel, fraction: float) -> None:
    """Remove this fraction of each stack's blocks; evenly chosen ones stay, the first of all among them.

    So DistilBERT begins (Sanh et al. 2019, arXiv 1910.01108). Nothing of a tensor is read or copied. Raises `UserError`
    if no block would leave, or a decoder that shares its weights would no longer find them.
    """
    depths = [len(stack.blocks) for stack in model.stacks]
    kept = [max(1, depth - round(fraction * depth)) for depth in depths]
    stuck = [depth for depth, stay in zip(depths, kept, strict=True) if depth == stay > 1]
    if stuck or kept == depths:
        fix = "Give more" if stuck else "A single one has to stay"
        raise UserError(f"{fraction} of {max(depths)} blocks is less than one. {fix}")
    for stack, depth, stay in zip(model.stacks, depths, kept, strict=True):
        chosen = [number * depth // stay for number in range(stay)]
        _check_windows(model.config, chosen)
        stack.blocks = nn.ModuleList(stack.blocks[number] for number in chosen)
    for number, block in enumerate(model.blocks):
        block.layer = number
    _set_config(model, num_layers=len(model.encoder.blocks))
    model.check_sharing()


def _set_config(model: EncoderModel, **sizes: int) -> None:
    """Let a model and its stacks have a configuration with these sizes."""
    model.config = replace(model.config, **sizes)  # type: ignore[arg-type]
    for stack in model.stacks:
        stack.config = model.config


def _check_windows(config: ResolvedConfig, chosen: list[int]) -> None:
    """Raise `UserError` if a block that attends globally would come to where blocks attend locally, or the reverse."""
    for place, number in enumerate(chosen):
        if config.is_local(place) != config.is_local(number):
            raise UserError(
                f"block {number} would come to place {place}, where attention is "
                f"{'local' if config.is_local(place) else 'global'}. Give a fraction such as 0.5, or another student"
            )


def _attentions(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def _feed_forwards(model: nn.Module) -> list[FeedForward]:
    return [module for module in model.modules() if isinstance(module, FeedForward)]


def _halves(feed_forward: FeedForward) -> int:
    return 2 if feed_forward.gated else 1


def _highest(scores: Tensor, kept: int) -> Tensor:
    """Return the indices of the highest scores in ascending order; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:kept].sort().values


def _cuts_of_heads(attention: Attention, heads: Tensor) -> Iterator[Cut]:
    """Yield what stays of an attention's layers for the `heads` that stay; nothing where all do."""
    if len(heads) < attention.num_heads:
        inner = attention.output.in_features  # H * d
        size = inner // attention.num_heads
        columns = _spread(heads * size, torch.arange(size, device=heads.device))
        for layer, stacked in attention.projections():
            yield Cut(layer, 0, _spread(torch.arange(stacked, device=heads.device) * inner, columns))
        yield Cut(attention.output, 1, columns)


def _cuts_of_neurons(feed_forward: FeedForward, neurons: Tensor) -> Iterator[Cut]:
    """Yield what stays of a feed-forward's layers for the `neurons` that stay; nothing where all do."""
    size = feed_forward.output.in_features
    if len(neurons) < size:
        stacked = torch.arange(_halves(feed_forward), device=neurons.device) * size
        yield Cut(feed_forward.input, 0, _spread(stacked, neurons))
        yield Cut(feed_forward.output, 1, neurons)


def _spread(starts: Tensor, offsets: Tensor) -> Tensor:
    return (starts[:, None] + offsets).flatten()


def _cut(cut: Cut, optimizer: Optimizer | None) -> int:
    """Cut a layer's weight, and its bias with rows; return how many parameters lost the optimizer's state."""
    layer, dim, kept = cut
    if dim == 0:
        layer.out_features = len(kept)
    else:
        layer.in_features = len(kept)
    afresh = 0
    for parameter in (layer.weight, layer.bias if dim == 0 else None):
        if parameter is None:
            continue
        if optimizer is not None and parameter in optimizer.state:
            afresh += not _cut_state(optimizer.state[parameter], parameter.shape, dim, kept)
        parameter.grad = None
        parameter.data = parameter.index_select(dim, kept.to(parameter.device))
    return afresh


def _cut_state(state: dict[str, Any], shape: torch.Size, dim: int, kept: Tensor) -> bool:
    """Cut one parameter's state, in place, as inner optimizers share it; clear it and return False if it cannot be."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
    if not all(_lines_up(value, shape) for value in tensors.values()):
        state.clear()
        return False
    for name, value in tensors.items():
        if value.shape[dim] == shape[dim]:  # else one number for all of them, as in Adafactor's factors
            state[name] = value.index_select(dim, kept.to(value.device))
    return True


def _lines_up(value: Tensor, shape: torch.Size) -> bool:
    """Whether a state tensor has a number per weight, row or column; packed codes and their scales do not."""
    plain = type(value) is Tensor and value.is_floating_point() and value.ndim == len(shape)
    return plain and all(size in (1, whole) for size, whole in zip(value.shape, shape, strict=True))
