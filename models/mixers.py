"""What layers have in place of attention: the numbers of each kind. Sizes in elements, the state a sequence in brackets."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464).

    Attributes:
        key_heads, key_dim: of q and of k, normalized [value_heads, key_dim, value_dim].
        value_heads, value_dim: neighbouring ones read the same key head.
        conv_width: taps of the convolution over q, k and v [conv_width - 1 of their channels].
        activation: behind the convolution, by the names of `ops.activation`.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    conv_width: int = 4
    activation: str = "silu"

    def __post_init__(self) -> None:
        _positive(self)
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"the model's configuration has {self.value_heads} linear value heads, not a multiple of its {self.key_heads} "
                "linear key heads."
            )


@dataclasses.dataclass(frozen=True)
class Mamba2:
    """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060).

    Attributes:
        heads, head_dim: of x [heads, state_dim, head_dim].
        state_dim: of B and of C.
        groups: B and C that there are; each serves neighbouring heads.
        conv_width: taps of the convolution over x, B and C [conv_width - 1 of their channels].
        conv_bias, bias: whether the convolution, and both projections, have one.
        norm: whether the result is normalized, in groups, behind its gate; else it is gated alone.
        norm_before_gate: the other order.
        norm_groups: channels are normalized in so many groups.
        dt_limits: steps are clipped to these.
        activation: behind the convolution, by the names of `ops.activation`.
    """

    heads: int
    head_dim: int
    state_dim: int
    groups: int = 1
    conv_width: int = 4
    conv_bias: bool = True
    bias: bool = False
    norm: bool = True
    norm_before_gate: bool = False
    norm_groups: int = 1
    dt_limits: tuple[float, float] = (0.0, float("inf"))
    activation: str = "silu"

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "state_dim", "groups", "conv_width", "norm_groups"):
            _positive_number(self, name)
        if self.heads % self.groups:
            raise ValueError(
                f"the model's configuration has {self.heads} Mamba heads, not a multiple of its {self.groups} groups."
            )


@dataclasses.dataclass(frozen=True)
class Mamba1:
    """Mamba (Gu & Dao 2023, arXiv:2312.00752).

    Attributes:
        inner: channels [inner, state_dim].
        state_dim: of B and of C.
        rank: of the step sizes' projection.
        conv_width: taps of the convolution [conv_width - 1 of the channels].
        conv_bias, bias: whether the convolution, and both projections, have one.
        norms: of step sizes, B and C: "" for none, "plain" without scales (Falcon Mamba), "scaled" (Jamba).
        norm_eps: theirs.
        activation: behind the convolution, by the names of `ops.activation`.
    """

    inner: int
    state_dim: int
    rank: int
    conv_width: int = 4
    conv_bias: bool = True
    bias: bool = False
    norms: str = ""
    norm_eps: float = 1e-6
    activation: str = "silu"

    def __post_init__(self) -> None:
        for name in ("inner", "state_dim", "rank", "conv_width"):
            _positive_number(self, name)


@dataclasses.dataclass(frozen=True)
class ShortConv:
    """A gated short convolution (Liquid AI 2025, LFM2) [width - 1 of the embedding].

    Attributes:
        width: taps.
        bias: whether convolution and projections have one.
    """

    width: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        _positive_number(self, "width")


@dataclasses.dataclass(frozen=True)
class KDA:
    """Kimi Delta Attention (Kimi Team 2025, arXiv:2510.26692).

    Attributes:
        heads, head_dim: of q, k and v [heads, head_dim, head_dim].
        conv_width: taps of the convolution over them [conv_width - 1 of their channels].
        activation: behind the convolution, by the names of `ops.activation`.
    """

    heads: int
    head_dim: int
    conv_width: int = 4
    activation: str = "silu"

    def __post_init__(self) -> None:
        _positive(self)


Mixer = DeltaNet | Mamba1 | Mamba2 | ShortConv | KDA


def _positive(mixer: Mixer) -> None:
    for field in dataclasses.fields(mixer):
        if field.name != "activation":
            _positive_number(mixer, field.name)


def _positive_number(mixer: Mixer, name: str) -> None:
    value = getattr(mixer, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"the model's configuration has {name} = {value!r}; it must be a whole number from 1.")
