"""What Gemma 4 (Google 2026) hears with: the Universal Speech Model's conformer, of which every row becomes an embedding, 25 a
second."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from models.encoders.audio.conformer import SHRINK, Conformer, ConformerTrunk, number
from models.encoders.vit import VitConfig
from models.layers import Build, Linear
from models.recipes import Recipes, under
from ops.norm import rms_norm

LONGEST = 3000
"""Frames of 30 s, which no sound has more of."""
NAMES = {
    "start": "feed_forward1", "finish": "feed_forward2", "convolution": "lconv1d", "norm": "norm_out", "attn": "self_attn",
    "attn_norm": "norm_pre_attn", "attn_out_norm": "norm_post_attn", "attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj",
    "attn.out": "post", "attn.scale": "per_dim_scale", "attn.distance": "relative_k_proj",
}  # fmt: skip


def gemma4_audio(hf: Mapping[str, Any]) -> VitConfig | None:
    """Of config.json's audio_config; None where there is none: the larger sizes do not hear."""
    said = hf.get("audio_config")
    if not isinstance(said, Mapping):
        return None
    width, chunk = number(said, "hidden_size", 1024), number(said, "attention_chunk_size", 12)
    left, right = number(said, "attention_context_left", 13), int(said.get("attention_context_right") or 0)
    if right > 1 or (chunk + left - 1 + right) // 2 != left - 1:
        raise ValueError(
            f"config.json: audio_config: rows that see {left - 1} back and {right} ahead in chunks of {chunk} are not served; "
            "published encoders see as far back as a chunk is long."
        )
    channels = tuple(said.get("subsampling_conv_channels") or (128, 32))
    conformer = Conformer(
        channels=(channels[0], channels[1]),
        ahead=1,
        cumulative=False,
        norm_eps=float(said.get("rms_norm_eps") or 1e-6),
        chunk=chunk,
        before=left - 2,  # the row at the bound itself is not seen, nor with `right` of 1 the next one
        behind=0,
        first=left - 1,
        count=left,
        k_scale=math.log(1 + math.e) / math.log(2),
        cap=float(said.get("attention_logit_cap") or 50.0),
        taps=number(said, "conv_kernel_size", 5),
        share=float(said.get("residual_weight", 0.5)),
        bound=float(said.get("gradient_clipping") or 1e10),
        names=tuple(NAMES.items()),
        bounded=True,
        layers="layers",
    )
    return VitConfig(
        num_layers=number(said, "num_hidden_layers", 12),
        embed_dim=width,
        ffw_dim=4 * width,
        num_heads=number(said, "num_attention_heads", 8),
        patch_dim=channels[0] // 4 * 4,  # as many as the first convolution has channels, in transformers
        out_dim=hf["hidden_size"],
        max_patches=LONGEST,
        norm_eps=float(said.get("rms_norm_eps") or 1e-6),
        activation=said.get("hidden_act") or "silu",
        extra=(
            ("conformer", conformer), ("per", SHRINK), ("bounded", bool(said.get("use_clipped_linears", True))),
            ("middle", number(said, "output_proj_dims", 1536)),
        ),
    )  # fmt: skip


class Gemma4Audio(ConformerTrunk):
    """`models.api.ImageEncoder` whose patches are frames of a spectrogram."""

    def __init__(self, config: VitConfig, build: Build):
        super().__init__(config, build)
        middle = config.get("middle")
        self.out = Linear(config.embed_dim, middle, build, (None, "embed"), bias=True)
        self.project = Linear(middle, config.out_dim, build, ("embed", None))

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        x_SM = self.out(self.hear(patches_PX, count))
        return self.project(rms_norm(x_SM, None, self.config.norm_eps))

    def recipes(self) -> Recipes:
        recipes = self.trunk_recipes(("layer0", "layer1")) | under("out", self.out.recipes("audio_tower.output_proj"))
        return recipes | under("project", self.project.recipes("model.embed_audio.embedding_projection"))
