"""AdamW with small state, whose update needs little more than the state itself.

Weights of any size are updated in slices, in fp32 whatever their type, and bfloat16 weights are written with
stochastic rounding: neither an fp32 copy of the weights nor a temporary of the size of a large weight exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leanbert.errors import UserError
from leanbert.optim.closures import with_gradients
from leanbert.optim.quantized_state import BlockCode, draw_int16, write_bfloat16
from leanbert.ranges import NOT_NEGATIVE, RATE, check_ranges
from leanbert.shards import own, own_start
from leanbert.slices import parts, rounds

SLICE_ELEMENTS = 2**20
"""Elements updated at a time, a multiple of every block; smaller slices would start too many kernels on a GPU."""
QUANTIZED_ELEMENTS = 4096
"""Parameters with fewer elements (norms, biases) keep full state: they are sensitive, and nothing in size."""

MOMENTS = ("exp_avg", "exp_avg_sq")
CODES = {
    (8, "exp_avg"): BlockCode(8, signed=True, squarings=1),
    (8, "exp_avg_sq"): BlockCode(8, signed=False, squarings=2),
    (4, "exp_avg"): BlockCode(4, signed=True, squarings=1),
    (4, "exp_avg_sq"): BlockCode(4, signed=False, squarings=2),
}


class SlicedAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with moments of 32, 8 or 4 bits.

    Arithmetic is in fp32, in fp64 for fp64 parameters. `state_bits=32` equals `torch.optim.AdamW`; its moments are of
    the type of the arithmetic. 8 and 4 bits keep block-wise codes (`quantized_state`), 2.03 and 1.06 bytes a
    parameter for both moments.

    Random roundings are a function of (seed, step, parameter's place in the groups, slice), drawn from generators of
    their own: a resumed run draws the same, and no other randomness moves.

    Of a sharded parameter each device updates its part, with blocks of its own.

    Besides `step`, single parameters can be updated as soon as their gradient exists: `update`; or, with several
    micro-batches, `accumulate` after each and `apply` after the last, so that gradients need not live until then.

    Args:
        params: Parameters or groups, as any torch optimizer takes; fp32, fp64 or bfloat16, contiguous.
        lr: Learning rate, read from the groups at each update.
        betas: Decay rates of the two moments.
        eps: Offset of the denominator.
        weight_decay: Decoupled decay, times the learning rate.
        state_bits: Bits of each number of the moments: 32, 8 or 4.
        seed: Seed of the stochastic rounding.

    Raises:
        UserError: A setting is out of range, or a parameter is of a type or layout that cannot be updated.

    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        state_bits: int = 32,
        seed: int = 0,
    ) -> None:
        if state_bits not in (32, 8, 4):
            raise UserError(f"state_bits: {state_bits} is not supported. Give 32, 8 or 4.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        sizes = dict.fromkeys(("lr", "eps", "weight_decay"), NOT_NEGATIVE)
        check_ranges("SlicedAdamW", defaults, {**sizes, "betas": RATE})
        self._places: dict[Tensor, tuple[int, dict[str, Any]]] = {}
        super().__init__(params, {**defaults, "state_bits": state_bits, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; UserError for a parameter that cannot be updated."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                raise UserError(
                    f"trainer.precision: SlicedAdamW does not train {parameter.dtype} weights, whose range loses small "
                    f"updates. Take bf16-true, bf16-mixed or 32-true."
                )
            if not parameter.is_contiguous():
                raise UserError(
                    f"model.optimizer.name: SlicedAdamW cuts contiguous weights, and one of shape "
                    f"{tuple(parameter.shape)} is not. Make it contiguous or take adamw."
                )
        self._locate()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, then update every parameter that has a gradient; return the closure's result."""
        result = with_gradients(closure)
        for parameter in self._places:
            if parameter.grad is not None:
                self.update(parameter)
        return result

    def update(self, parameter: Tensor) -> None:
        """Update one parameter from its gradient; the gradient stays for the caller to free."""
        self._run(parameter, first=True, fold=True, write=True)

    def accumulate(self, parameter: Tensor, first: bool) -> None:
        """Fold the gradient of one micro-batch into the moments of `parameter`, which itself stays.

        Adam Accumulation (Zhang et al. 2023, arXiv 2305.19982): the second moment averages the sum of the squares of
        the micro-batches' gradients in place of the square of their sum. With one micro-batch, followed by `apply`,
        this is `update`.

        Args:
            parameter: One of this optimizer's, with a gradient that is this micro-batch's share of the step's.
            first: Whether this is the first micro-batch of a step, at which the moments decay.

        """
        self._run(parameter, first=first, fold=True, write=False)

    def apply(self, parameter: Tensor) -> None:
        """Update one parameter from the moments, once all micro-batches of the step are folded in."""
        self._run(parameter, first=False, fold=False, write=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, types kept: torch's own would cast codes and moments to the weights' type.

        Moments of few bits may be there as numbers too, float32 of the parameter's shape.

        Raises:
            UserError: The state was saved with other `state_bits`, or by another optimizer.

        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):  # torch checks lengths
            bits = saved.get("state_bits")
            if bits != group["state_bits"]:
                held = f"{bits}-bit state" if bits else "the state of another optimizer"
                raise UserError(
                    f"state_bits: {group['state_bits']}, but the checkpoint holds {held}. "
                    f"Go on with the settings of the run that saved it."
                )
        super().load_state_dict({**state_dict, "state": {}})
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(self._places, indices, strict=True):
            for name, value in _coded(state_dict["state"].get(index, {})).items():
                self.state[parameter][name] = value.to(parameter.device) if isinstance(value, Tensor) else value

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._locate()

    def _locate(self) -> None:
        """Note the place and the group of each parameter; groups are replaced when a state is loaded."""
        pairs = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        self._places = {parameter: (place, group) for place, (parameter, group) in enumerate(pairs)}

    @torch.no_grad()
    def _run(self, parameter: Tensor, *, first: bool, fold: bool, write: bool) -> None:
        place, group = self._places[parameter]
        state = self.state[parameter] or self._begin(parameter, group["state_bits"])
        if fold and parameter.grad is None:
            raise ValueError(f"The parameter of shape {tuple(parameter.shape)} has no gradient.")
        if not first and not state["micro_batches"]:
            raise ValueError("A step has to begin with accumulate(parameter, first=True).")
        state["step"] += first
        state["micro_batches"] = (0 if first else state["micro_batches"]) + fold
        gradient = own(parameter.grad).reshape(-1) if fold and parameter.grad is not None else None
        weights, begin = own(parameter.detach()).view(-1), own_start(parameter)
        dtype = torch.promote_types(weights.dtype, torch.float32)
        for span in rounds(parts(weights.numel(), SLICE_ELEMENTS), weights, alike=True):
            position = (group["seed"], state["step"], place, begin + span.start)
            moments = [_read(state, name, span, dtype) for name in MOMENTS]
            if gradient is not None:
                _fold(gradient[span], moments, group["betas"], first)
            if write:
                _write(weights[span], moments, group, state["step"], position)
            if gradient is not None:
                for use, name in enumerate(MOMENTS):  # popped: encoding the first frees it before the second
                    _store(state, name, span, moments.pop(0), (*position, state["micro_batches"], use))
        if write:
            state["micro_batches"] = 0

    def _begin(self, parameter: Tensor, bits: int) -> dict[str, Any]:
        """Create the state of a parameter; counts are Python integers, so that no update waits for the device."""
        state = self.state[parameter]
        state.update(step=0, micro_batches=0, bits=bits if parameter.numel() >= QUANTIZED_ELEMENTS else 32)
        for name in MOMENTS:
            if state["bits"] == 32:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                state[name] = torch.zeros_like(parameter, dtype=dtype)
            else:
                code = CODES[state["bits"], name]
                state[f"{name}_codes"], state[f"{name}_scales"] = code.zeros(own(parameter).numel(), parameter.device)
        return state


def decode_moment(state: dict[str, Any], name: str, elements: int) -> Tensor:
    """Return a moment that is kept in few bits, fp32 [elements], by its name among `MOMENTS`."""
    return _read(state, name, slice(0, elements), torch.float32)[:elements]


def encode_moment(values: Tensor, name: str, bits: int) -> dict[str, Tensor]:
    """Return what the state keeps of a moment [elements]: the nearest codes; of decoded ones the same again."""
    code = CODES[bits, name]
    codes, scales = code.zeros(len(values), values.device)
    blocks = torch.nn.functional.pad(values, (0, -len(values) % code.block)).view(-1, code.block)
    code.encode(blocks.clone(), blocks.new_zeros(blocks.shape, dtype=torch.int16), codes, scales)
    return {f"{name}_codes": codes, f"{name}_scales": scales}


def _coded(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter with codes in place of moments of few bits that are there as numbers."""
    if state.get("bits", 32) == 32 or MOMENTS[0] not in state:
        return state
    found = {name: value for name, value in state.items() if name not in MOMENTS}
    for name in MOMENTS:
        found |= encode_moment(own(state[name]).reshape(-1), name, state["bits"])
    return found


def _read(state: dict[str, Any], name: str, span: slice, dtype: torch.dtype) -> Tensor:
    """Return a slice of a moment, [elements]: the state itself, or decoded and then padded to whole blocks."""
    if state["bits"] == 32:
        return own(state[name]).view(-1)[span]
    code = CODES[state["bits"], name]
    rows = code.rows(span)
    return code.decode(state[f"{name}_codes"][rows], state[f"{name}_scales"][rows], dtype).view(-1)


def _store(state: dict[str, Any], name: str, span: slice, moment: Tensor, position: tuple[int, ...]) -> None:
    """Encode what `_read` returned, which is overwritten; the state itself is in place already."""
    if state["bits"] == 32:
        return
    code = CODES[state["bits"], name]
    rows = code.rows(span)
    draws = draw_int16(moment.numel(), moment.device, *position).view(-1, code.block)
    code.encode(moment.view(-1, code.block), draws, state[f"{name}_codes"][rows], state[f"{name}_scales"][rows])


def _fold(gradient: Tensor, moments: list[Tensor], betas: tuple[float, float], first: bool) -> None:
    """Add a gradient, [elements], and its square to the moments, which decay at the first of a step only."""
    average, average_sq = (moment[: gradient.numel()] for moment in moments)
    gradient = gradient.to(average.dtype)
    if first:
        average.mul_(betas[0])
        average_sq.mul_(betas[1])
    average.add_(gradient, alpha=1 - betas[0])
    average_sq.addcmul_(gradient, gradient, value=1 - betas[1])


def _write(weights: Tensor, moments: list[Tensor], group: dict[str, Any], step: int, position: tuple[int, ...]) -> None:
    """Update a slice of the weights, [elements], from its moments."""
    average, average_sq = (moment[: weights.numel()] for moment in moments)
    (beta1, beta2), lr = group["betas"], group["lr"]
    denominator = average_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    values = weights.to(average.dtype)  # the weights themselves unless they are bfloat16
    values.mul_(1 - lr * group["weight_decay"]).addcdiv_(average, denominator, value=-lr / (1 - beta1**step))
    if weights.dtype == torch.bfloat16:
        write_bfloat16(values, draw_int16(weights.numel(), weights.device, *position), weights)
