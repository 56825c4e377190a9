"""Whether loss and gradients of a step are finite; a step in which they are not leaves the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from leanbert.measure.target import target_type
from leanbert.shards import own


class StepCheck:
    """The loss of a step, and the largest norm of a parameter's gradient, on the device that computes them.

    A norm that overflows counts as not finite, as it does in clipping: Adam's second moment would overflow too.
    """

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.norm: Tensor | None = None

    def reset(self) -> None:
        """Forget the step before."""
        self.loss = self.norm = None

    @property
    def values(self) -> Tensor:
        """Loss and norm, shape [2], where the gradients are; of what has not been looked at 0."""
        known = [value for value in (self.loss, self.norm) if value is not None]
        zero = known[-1].new_zeros(()) if known else torch.zeros(())
        return torch.stack([zero if value is None else value.to(zero.device) for value in (self.loss, self.norm)])

    def look(self, parameters: Iterable[Tensor], sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take the gradients into account that are there; of sharded ones this rank's part.

        Ranks that have parts of the gradients agree by `sum_over_ranks`, which adds their largest norms.
        """
        gradients = [own(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if gradients:
            norm = torch.stack(torch._foreach_norm(gradients)).max()
            self.norm = norm if self.norm is None else torch.maximum(self.norm, norm)
        if sum_over_ranks is not None and self.norm is not None:
            self.norm = sum_over_ranks(self.norm)

    def guard(self, parameters: Iterable[Tensor], sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> None:
        """Look at the gradients, and keep them from the update if they or the loss are not finite; see `look`.

        On a CPU they are dropped, and the update leaves weights and moments as they are. Elsewhere that would have to
        wait for the device in each step: there they are zero, so that the moments decay and the update is theirs.
        """
        held = [parameter for parameter in parameters if parameter.grad is not None]
        self.look(held, sum_over_ranks)
        finite = self.values.isfinite().all()
        if target_type(finite) != "cpu":
            for parameter in held:
                own(parameter.grad).masked_fill_(~finite, 0.0)  # type: ignore[arg-type]
        elif not finite:
            for parameter in held:
                parameter.grad = None
