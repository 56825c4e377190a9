"""What a device needs beyond live tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leanbert.measure.counters import rss_bytes
from leanbert.planning.profile import Profile
from leanbert.tasks.techniques import Techniques
from leanbert.units import MIB

DeviceType = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Target:
    """A device that a plan is made for.

    Args:
        device_type: cpu, cuda or mps.
        base_bytes: What is there without a single tensor: the process, or the device's context.
        slack: Fraction of live bytes that the allocator holds on top, when freed memory is kept.
        slack_returned: The same when freed pages go back to the system (`ReturnFreedPages`, CPU only).

    """

    device_type: DeviceType
    base_bytes: int
    slack: float
    slack_returned: float

    def needs(self, live_bytes: int, techniques: Techniques) -> int:
        """Return the bytes that a run with this peak of live tensors needs of the device."""
        slack = self.slack_returned if techniques.returns_pages else self.slack
        return self.base_bytes + round(live_bytes * (1 + slack))


GROWTH_BYTES = 128 * MIB
"""What a process grows by after its imports: loader, loggers, kernels' buffers, the library that draws its figures."""


def target_of(device_type: DeviceType, profile: Profile | None = None) -> Target:
    """Return what a kind of device needs; call it right after the imports, whose memory counts on a CPU.

    `profile`: what was measured on such an accelerator; None: what is taken for one that nobody has measured.
    """
    if device_type == "cpu":
        return Target("cpu", rss_bytes() + GROWTH_BYTES, slack=0.25, slack_returned=0.05)
    if profile is not None:
        return Target(device_type, profile.base_bytes, profile.slack, profile.slack)
    return Target(device_type, 700 * MIB, slack=0.1, slack_returned=0.1)
