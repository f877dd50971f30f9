"""What vision transformers share: attention among an image's patches, and the pre-norm block around it
(Dosovitskiy et al. 2020, arXiv:2010.11929)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.layers import Build, GatedMLP, LayerNorm, Linear, Norm, RMSNorm, child_recipes, mlp_of
from models.recipes import Recipes, deal, one, pieces, split, under
from ops.activation import activation
from ops.linear import PackedInt8Weight
from ops.paged_attention import whole
from ops.rope import cos_sin, rope

MASKED = -1e30
SCORES = 1 << 22
"""Query times key positions whose scores are in memory at once: of 16 heads in float32, 268 MB."""


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """A vision transformer. Sizes in elements, lengths in patches. Hashable and static.

    Attributes:
        num_layers, embed_dim, ffw_dim, num_heads: L, D, F, H.
        patch_dim: X, numbers of a patch as it comes.
        out_dim: width of the embeddings it makes, the decoder's.
        max_patches: of one image, at most.
        tile: patches of a tile, where an image is one or several of them, none of which sees another; 0 where it is one grid of
            any size.
        first: tokens in front of a tile's patches.
        merge: side of the square of patches that become one embedding.
        norm: "layer" or "rms".
        norm_eps: added to the variance before the root.
        activation: of the feed-forward block, by the names of `ops.activation`.
        gated: whether that has a gate.
        rope_theta: base of the frequencies by which a head's channels turn with row and column; None where they do not.
        windows: of each layer, the side of the squares of the grid within which patches see each other; None for all.
        attn_bias: whether q, k, v and what comes out of attention have biases, in that order.
        taps: layers behind which embeddings are made besides, which are added to what enters the decoder's second layer, third, ...
        picked, lines: as in `MediaShape`, of towers whose embeddings are not simply their rows.
        together: whether an image's tokens in the decoder attend to each other, also to those behind them.
        ears: what hears beside it; None for nothing.
        extra: what only one family needs; hashable values.
    """

    num_layers: int
    embed_dim: int
    ffw_dim: int
    num_heads: int
    patch_dim: int
    out_dim: int
    max_patches: int
    tile: int = 0
    first: int = 0
    merge: int = 1
    norm: str = "layer"
    norm_eps: float = 1e-6
    activation: str = "gelu"
    gated: bool = False
    mlp_bias: bool = True
    attn_bias: tuple[bool, bool] = (True, True)
    rope_theta: float | None = None
    windows: tuple[int | None, ...] = ()
    taps: tuple[int, ...] = ()
    picked: int = 0
    lines: int = 0
    together: bool = False
    ears: VitConfig | None = None
    extra: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_layers", "embed_dim", "ffw_dim", "num_heads", "patch_dim", "out_dim", "max_patches", "merge"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"the vision configuration has {name} = {value!r}; it must be a whole number from 1.")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"the vision configuration has {self.num_heads} heads, which do not divide its width {self.embed_dim}."
            )
        if self.tile < 0 or (self.tile and self.max_patches % self.tile):
            raise ValueError(
                f"the vision configuration has tiles of {self.tile} patches, not a part of {self.max_patches}."
            )
        activation(self.activation)
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)

    @property
    def width(self) -> int:
        """Numbers of an embedding, with those that later layers are given."""
        return self.out_dim * (1 + len(self.taps))

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    def get(self, name: str, default: Any = None) -> Any:
        """A value of `extra`."""
        return dict(self.extra).get(name, default)


def make_norm(config: VitConfig, width: int | None = None) -> RMSNorm | LayerNorm:
    """The tower's kind of norm."""
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(width or config.embed_dim, config.norm_eps)


def attend_patches(
    q_PHh: jax.Array,
    k_PHh: jax.Array,
    v_PHh: jax.Array,
    real_P: jax.Array,
    window_P: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Every patch attends to all real ones, or to those of its window: out_PHh. Rows that are not real are arbitrary.

    Args:
        real_P: bool; the others are padding.
        window_P: int32, the window of each.
        scale: of the scores; None for 1 / sqrt(h).
    """
    P, H, h = q_PHh.shape
    factor = h**-0.5 if scale is None else scale
    window_P = jnp.zeros(P, jnp.int32) if window_P is None else window_P

    def attend(q_QHh: jax.Array, window_Q: jax.Array) -> jax.Array:
        scores = jnp.einsum("qhd,shd->hqs", q_QHh, k_PHh, preferred_element_type=jnp.float32) * factor
        seen_QP = real_P & (window_Q[:, None] == window_P)
        weights = jax.nn.softmax(jnp.where(seen_QP, scores, MASKED), axis=-1)
        return jnp.einsum("hqs,shd->qhd", weights.astype(v_PHh.dtype), v_PHh)

    block = max(16, SCORES // P)
    if block >= P or P % block:
        return attend(q_PHh, window_P)
    blocks = (q_PHh.reshape(P // block, block, H, h), window_P.reshape(-1, block))
    return jax.lax.map(lambda one: attend(*one), blocks).reshape(P, H, h)


def axial_frequencies(theta: float, head_dim: int, alternating: bool = False) -> np.ndarray:
    """float32 [2, h / 2] for `ops.rope.rope`: the first half of the pairs turns with the row, the second with the column.

    Args:
        alternating: the two share one series of frequencies, each taking every other one (Pixtral); else both have the same.
    """
    half = head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    row, column = (
        (np.float32(1.0) / np.power(np.float32(theta), exponents + np.float32(shift))).astype(np.float32)
        for shift in (0.0, 1 / half if alternating else 0.0)
    )
    still = np.zeros_like(row)
    return np.stack([np.concatenate([row, still]), np.concatenate([still, column])])


class PatchAttention(nnx.Module):
    """Attention among patches; q, k and v are one projection, laid out [H, 3, h].

    Args:
        names: of the projections in checkpoints: of q, k and v (one name where they are one tensor), and of what comes out.
    """

    def __init__(
        self, config: VitConfig, layer: int, build: Build, names: tuple[tuple[str, ...], str] = (("qkv",), "proj")
    ):
        H, h, D = config.num_heads, config.head_dim, config.embed_dim
        axis = build.axis("heads", H)
        self.heads, self.names = (H, h), names
        self.window, self.theta = config.windows[layer], config.rope_theta
        self.alternating = bool(config.get("alternating"))
        self.tile = config.tile and config.first + config.tile
        self.qkv = Linear(D, 3 * D, build, (axis, "embed"), bias=config.attn_bias[0])
        self.out = Linear(D, D, build, ("embed", axis), bias=config.attn_bias[1])

    def __call__(
        self,
        x_PD: jax.Array,
        place_P2: jax.Array,
        real_P: jax.Array,
        norm: Norm | None = None,
        residual_PD: jax.Array | None = None,
    ) -> jax.Array:
        """attn(norm(x)) + residual."""
        (P, D), (H, h) = x_PD.shape, self.heads
        turns = None if self.theta is None else axial_frequencies(self.theta, h, self.alternating)
        if self._by_kernel():
            size = self.tile or P
            count_R = jnp.full(P // size, size, jnp.int32) if self.tile else jnp.sum(real_P, dtype=jnp.int32)[None]
            angles = None if turns is None else cos_sin(place_P2.T, turns)
            qkv = self.qkv(x_PD, norm=norm).reshape(-1, size, H, 3, h)
            out = whole.attend_all(qkv, count_R, scale=h**-0.5, angles=angles)
            return self.out(out.reshape(P, D).astype(x_PD.dtype), residual_TO=residual_PD)
        q_PHh, k_PHh, v_PHh = jnp.moveaxis(self.qkv(x_PD, norm=norm).reshape(P, H, 3, h), 2, 0)
        if turns is not None:
            q_PHh, k_PHh = (rope(x, place_P2.T, turns) for x in (q_PHh, k_PHh))
        if self.tile and self.tile < P:
            tiles = tuple(x.reshape(-1, self.tile, H, h) for x in (q_PHh, k_PHh, v_PHh))
            out_NSHh = jax.lax.map(lambda qkv: attend_patches(qkv[0], qkv[1], qkv[2], jnp.ones(self.tile, bool)), tiles)
            return self.out(out_NSHh.reshape(P, D), residual_TO=residual_PD)
        window_P = None
        if self.window is not None:
            row_P, column_P = (place_P2 // self.window).T
            window_P = row_P * 65536 + column_P
        out_PHh = attend_patches(q_PHh, k_PHh, v_PHh, real_P, window_P)
        return self.out(out_PHh.reshape(P, D), residual_TO=residual_PD)

    def _by_kernel(self) -> bool:
        """Whether the CPU's kernels attend, in bfloat16: beside products that are rounded to int8. Real patches come first."""
        packed = isinstance(self.qkv.weight.get_value(), PackedInt8Weight)
        return packed and self.window is None and whole.supports(*self.heads, "cpu")

    def recipes(self, name: str) -> Recipes:
        H, h = self.heads
        D, (parts, out) = H * h, self.names
        if len(parts) == 1:
            weights = split(one(f"{name}.{parts[0]}.weight", 3 * D, D), D, D, D)
            biases = split(one(f"{name}.{parts[0]}.bias", 3 * D), D, D, D)
        else:
            weights = pieces([f"{name}.{part}.weight" for part in parts], *((D, D),) * 3)
            biases = pieces([f"{name}.{part}.bias" for part in parts], *((D,),) * 3)
        recipes: Recipes = {"qkv.weight": deal(H, *weights)}
        if self.qkv.bias is not None:
            recipes["qkv.bias"] = deal(H, *biases)
        return recipes | under("out", self.out.recipes(f"{name}.{out}"))


class PatchMLP(nnx.Module):
    """down(act(up(norm(x)))) + residual."""

    def __init__(self, config: VitConfig, build: Build, names: tuple[str, str] = ("fc1", "fc2")):
        axis = build.axis("ffw", config.ffw_dim)
        self.names, self.activation = names, config.activation
        self.up = Linear(config.embed_dim, config.ffw_dim, build, (axis, "embed"), bias=True)
        self.down = Linear(config.ffw_dim, config.embed_dim, build, ("embed", axis), bias=True)

    def __call__(self, x_PD: jax.Array, norm: Norm | None = None, residual_PD: jax.Array | None = None) -> jax.Array:
        return mlp_of(self.up, self.down, self.activation, x_PD, norm, residual_PD)

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, {"up": self.names[0], "down": self.names[1]}, name)


class VitBlock(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    names: ClassVar[dict[str, str]] = {"attn_norm": "norm1", "attn": "attn", "mlp_norm": "norm2", "mlp": "mlp"}
    attention_names: ClassVar[tuple[tuple[str, ...], str]] = (("qkv",), "proj")
    mlp_names: ClassVar[tuple[str, str]] = ("fc1", "fc2")

    def __init__(self, config: VitConfig, layer: int, build: Build):
        self.attn_norm, self.mlp_norm = make_norm(config), make_norm(config)
        self.attn = PatchAttention(config, layer, build, self.attention_names)
        gated: Any = config  # it has the fields of a ModelConfig that this block reads
        self.mlp = GatedMLP(gated, build) if config.gated else PatchMLP(config, build, self.mlp_names)

    def __call__(self, x_PD: jax.Array, place_P2: jax.Array, real_P: jax.Array) -> jax.Array:
        x_PD = self.attn(x_PD, place_P2, real_P, self.attn_norm, x_PD)
        if isinstance(self.mlp, GatedMLP):
            return self.mlp(x_PD, None, self.mlp_norm, x_PD)[0]
        return self.mlp(x_PD, self.mlp_norm, x_PD)

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, self.names, name)


def run_block(block: nnx.Module, x_PD: jax.Array, *beside: jax.Array) -> jax.Array:
    """One block as a function of its own: equal blocks are traced once."""
    return _run(*nnx.split(block), x_PD, *beside)


def squares(x_PD: jax.Array, side: int, merge: int) -> jax.Array:
    """[N, merge^2 D] of tiles of side x side patches, row by row: those of each square side by side, row by row."""
    if merge == 1:
        return x_PD
    D, m = x_PD.shape[-1], merge
    x = x_PD.reshape(-1, side // m, m, side // m, m, D).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, m * m * D)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef: Any, state: Any, *inputs: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(*inputs)
