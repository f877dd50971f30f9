"""Whether a prompt is better computed by another engine than by the one that goes on with it, and by which.

A prompt that is computed where streams run holds each of them up for as long as it takes. Elsewhere it costs a transfer, and a wait
where others are being computed. Both are learned from what was done: seconds a token of a prompt, and how much later than its last
piece the first token came. Gateways and the simulator decide by this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, TypeVar

LEAST_TOKENS = 256
"""Prompts with fewer tokens to compute stay where they are: a step of that many is hardly longer than one of decode rows."""
LEARN = 0.2
"""Weight of what was measured last."""
DOUBT = 0.9
"""What is left of a measured lag each time that it alone kept a prompt here."""
POLICIES = ("auto", "always")


class Helping(Protocol):
    """An engine that computes prompts for others.

    Attributes:
        queued: prompt tokens that it was given and has not computed.
        served: prompts.
    """

    queued: int
    served: int


H = TypeVar("H", bound=Helping)


@dataclasses.dataclass
class Costs:
    """What was measured; None until then.

    Attributes:
        token_s: seconds that a prompt's token takes.
        lag_s: seconds from the end of a prompt at its helper to the first token at the engine that goes on.
    """

    token_s: float | None = None
    lag_s: float | None = None

    def learn(self, name: str, value: float) -> None:
        """Takes in one measurement."""
        known = getattr(self, name)
        setattr(self, name, value if known is None else known + LEARN * (value - known))

    def doubt(self) -> None:
        """Nobody was asked because of what was once measured: after some times it is measured again."""
        if self.lag_s is not None:
            self.lag_s *= DOUBT

    def pays(self, suffix: int, running: int, queued: int) -> bool:
        """Whether a prompt is better computed elsewhere: the streams that it would hold up lose more time together than it loses.

        Args:
            suffix: its tokens to compute.
            running: requests at the engine that would do it itself.
            queued: tokens before it at the other one.
        """
        if not running:
            return False
        if self.token_s is None or self.lag_s is None:
            return True  # to learn it
        return queued * self.token_s + self.lag_s < running * suffix * self.token_s


class Weighing:
    """Decides for one gateway, or one simulation.

    Args:
        policy: "auto" asks helpers where it pays, "always" wherever it can be done.
        least_tokens: a prompt must have so many to compute.
    """

    def __init__(self, policy: str = "auto", least_tokens: int = LEAST_TOKENS) -> None:
        self.policy = policy
        self.least_tokens = least_tokens
        self.costs = Costs()

    def choose(self, helpers: Sequence[H], suffix: int, running: int, page_size: int) -> tuple[H | None, str]:
        """Who of `helpers` (not empty) computes a prompt of which `suffix` tokens are to be computed; None: the engine that goes on
        with it, where `running` others are. With the reason: apart, short, alone (nobody is held up), busy (they have more to
        do)."""
        if suffix < max(self.least_tokens, page_size + 1):
            return None, "short"
        helper = min(helpers, key=lambda one: (one.queued, one.served))
        if self.policy == "always" or self.costs.pays(suffix, running, helper.queued):
            return helper, "apart"
        if running and not helper.queued:
            self.costs.doubt()
        return None, "busy" if running else "alone"
