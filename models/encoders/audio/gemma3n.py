"""What Gemma 3n (Google 2025) hears with: the Universal Speech Model's conformer, of which every fourth row becomes an embedding.
All sounds have as many, however short: what is missing is the embedding of the audio vocabulary's last token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.encoders.audio.conformer import SHRINK, Conformer, ConformerTrunk, number
from models.encoders.vit import VitConfig
from models.layers import Build, Linear, RMSNorm, weight
from models.recipes import Computed, Recipe, Recipes, one, under
from ops.norm import rms_norm

LONGEST = 2997
"""Frames of 30 s, which no sound has more of."""
NAMES = {
    "start": "ffw_layer_start", "finish": "ffw_layer_end", "convolution": "lconv1d", "norm": "norm", "attn": "attention",
    "attn_norm": "attention.pre_attn_norm", "attn_out_norm": "attention.post_norm", "attn.q": "attn.q_proj",
    "attn.k": "attn.k_proj", "attn.v": "attn.v_proj", "attn.out": "post", "attn.scale": "attn.per_dim_scale",
    "attn.distance": "attn.relative_position_embedding.pos_proj",
}  # fmt: skip


def gemma3n_audio(hf: Mapping[str, Any]) -> VitConfig:
    """Of config.json's audio_config."""
    said = hf.get("audio_config")
    if not isinstance(said, Mapping):
        raise ValueError("config.json has no audio_config: without it the encoder's sizes are not known.")
    for name, wanted in (("sscp_conv_kernel_size", [[3, 3]] * 2), ("sscp_conv_stride_size", [[2, 2]] * 2)):
        if (found := [list(one) for one in said.get(name) or wanted]) != wanted:
            raise ValueError(f"config.json: audio_config.{name} is {found}; {wanted} is served.")
    width, chunk = number(said, "hidden_size", 1536), number(said, "conf_attention_chunk_size", 12)
    before = number(said, "conf_attention_context_left", 13) - 1
    behind = int(said.get("conf_attention_context_right") or 0)
    fewer, always = number(said, "conf_reduction_factor", 4), number(hf, "audio_soft_tokens_per_image", 188)
    first, second = said.get("sscp_conv_channel_size") or (128, 32)
    conformer = Conformer(
        channels=(first, second),
        ahead=2,
        cumulative=True,
        norm_eps=float(said.get("sscp_conv_group_norm_eps") or 1e-3),
        chunk=chunk,
        before=before,
        behind=behind,
        first=before,
        count=before + behind + 1,
        k_scale=1.0,
        cap=float(said.get("conf_attention_logit_cap") or 50.0),
        taps=number(said, "conf_conv_kernel_size", 5),
        share=float(said.get("conf_residual_weight", 0.5)),
        bound=float(said.get("gradient_clipping") or 1e10),
        names=tuple(NAMES.items()),
        bounded=False,
        layers="conformer",
    )
    per = SHRINK * fewer
    return VitConfig(
        num_layers=number(said, "conf_num_hidden_layers", 12),
        embed_dim=width,
        ffw_dim=4 * width,
        num_heads=number(said, "conf_num_attention_heads", 8),
        patch_dim=number(said, "input_feat_size", 128),
        out_dim=hf["hidden_size"],
        max_patches=per * min(always, -(-LONGEST // per)),
        norm_eps=float(said.get("rms_norm_eps") or 1e-6),
        activation="silu",
        extra=(
            ("conformer", conformer), ("per", per), ("always", always), ("fewer", fewer),
            ("tokens", number(said, "vocab_size", 128)),
            ("silence", hf["vocab_size"] - 1 - number(said, "vocab_offset", 262_272)),
        ),
    )  # fmt: skip


def hard_embeddings(name: str, rows: int, width: int, out: int, eps: float, first: int, end: int) -> Recipe:
    """Of the tokens that a tower has embeddings of: float32 [end - first, out], as they enter the decoder.

    Args:
        name: of the embedder.
        rows, width: of its table.
        first, end: of its rows, those that are wanted.
    """

    def make(table_VD: np.ndarray, scale_D: np.ndarray, project_OD: np.ndarray) -> np.ndarray:
        table_VD, scale_D, project_OD = (x.astype(np.float32) for x in (table_VD, scale_D, project_OD))
        return _normed(_normed(table_VD[first:end], eps) * scale_D @ project_OD.T, eps)

    sources = (
        one(f"{name}.embedding.weight", rows, width),
        one(f"{name}.hard_embedding_norm.weight", width),
        one(f"{name}.embedding_projection.weight", out, width),
    )
    return Computed(sources, make)


def _normed(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + np.float32(eps))


class Gemma3nAudio(ConformerTrunk):
    """`models.api.ImageEncoder` whose patches are frames of a spectrogram."""

    def __init__(self, config: VitConfig, build: Build):
        super().__init__(config, build)
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.project = Linear(config.embed_dim, config.out_dim, build, (None, "embed"))
        self.silence = weight((1, config.out_dim), jnp.float32, (None, None))

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        """All of a sound's embeddings, whatever the frames."""
        config = self.config
        x_ND = self.hear(patches_PX, count)[:: config.get("fewer")]
        x_NO = rms_norm(self.project(self.norm(x_ND)), None, config.norm_eps)
        x_NO = jnp.pad(x_NO, ((0, max(0, config.get("always") - len(x_NO))), (0, 0)))[: config.get("always")]
        there_N = jnp.arange(len(x_NO)) < (count + config.get("per") - 1) // config.get("per")
        return jnp.where(there_N[:, None], x_NO, self.silence[...].astype(x_NO.dtype))

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors that are not read here."""
        return (r"^(model\.)?embed_audio\.(embedding|hard_embedding_norm)\.",)

    def recipes(self) -> Recipes:
        config, name = self.config, "model.embed_audio"
        at = config.get("silence")
        recipes = self.trunk_recipes(("conv_0", "conv_1"))
        recipes |= under("norm", self.norm.recipes(f"{name}.soft_embedding_norm"))
        recipes |= under("project", self.project.recipes(f"{name}.embedding_projection"))
        recipes["silence"] = hard_embeddings(
            name, config.get("tokens"), config.embed_dim, config.out_dim, config.norm_eps, at, at + 1
        )
        return recipes
