"""Towers that hear for a decoder: Whisper's encoder (Radford et al. 2022, arXiv:2212.04356), of whose rows several become one
embedding. Qwen2-Audio (Chu et al. 2024, arXiv:2407.10759), Qwen2.5-Omni (Xu et al. 2025, arXiv:2503.20215), Audio Flamingo 3 (Goel
et al. 2025, arXiv:2507.08128), Voxtral (Mistral 2025, arXiv:2507.13264), Ultravox (Fixie 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.encoders.audio.whisper import SoundTrunk
from models.encoders.vit import VitConfig
from models.layers import Build, Linear, RMSNorm
from models.recipes import Recipes, under
from ops.activation import activation

SOUND, SILENCE = 1, 2
"""Of a frame, in the second column of its place: there is sound; or there is none, but rows are made of it, which others do not
attend to. 0 is padding."""
POSITIONS = 1500


def audio_config(hf: Mapping[str, Any], stack: int, mean: bool = False, **extra: Any) -> VitConfig:
    """What config.json says of the encoder.

    Args:
        stack: rows of the encoder's that become one embedding.
        mean: by their mean instead of side by side.
        extra: what stands behind the encoder.
    """
    said = hf.get("audio_config")
    if not isinstance(said, Mapping):
        raise ValueError("config.json has no audio_config: without it the encoder's sizes are not known.")

    def number(default: int, *names: str) -> int:
        found = next((said[name] for name in names if said.get(name) is not None), default)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise ValueError(f"config.json: audio_config.{names[0]} is {found!r}; it must be a whole number from 1.")
        return found

    if said.get("scale_embedding"):
        raise ValueError("config.json: audio_config.scale_embedding is true; no published encoder has it.")
    positions = number(POSITIONS, "max_source_positions")
    rows = -(-positions // stack)
    return VitConfig(
        num_layers=number(32, "encoder_layers", "num_hidden_layers"),
        embed_dim=number(1280, "d_model", "hidden_size"),
        ffw_dim=number(5120, "encoder_ffn_dim", "intermediate_size"),
        num_heads=number(20, "encoder_attention_heads", "num_attention_heads"),
        patch_dim=number(128, "num_mel_bins"),
        out_dim=hf["hidden_size"],
        max_patches=2 * stack * rows,
        norm_eps=1e-5,
        activation=said.get("activation_function", "gelu"),
        extra=(("positions", positions), ("stack", stack), ("mean", mean), *extra.items()),
    )


def qwen2_audio(hf: Mapping[str, Any]) -> VitConfig:
    return audio_config(hf, 2, mean=True)


def omni_audio(hf: Mapping[str, Any]) -> VitConfig:
    """Qwen2.5-Omni's: rows see those of their own two seconds alone."""
    chunk = 2 * int((hf.get("audio_config") or {}).get("n_window") or 100)
    if chunk % 4 or 2 * POSITIONS % chunk:
        raise ValueError(
            f"config.json: audio_config.n_window is {chunk // 2}; a window of 30 s must be whole chunks of it."
        )
    made = audio_config({**hf, "audio_config": {**hf["audio_config"], "max_source_positions": POSITIONS}}, 2, mean=True)
    extra = (*made.extra, ("chunk", chunk), ("made_positions", True), ("names", ("ln_post", "audio_tower.proj")))
    return dataclasses.replace(made, windows=(chunk // 2,) * made.num_layers, extra=extra)


def flamingo3_audio(hf: Mapping[str, Any]) -> VitConfig:
    act = hf.get("projector_hidden_act", "gelu")
    return audio_config(hf, 2, mean=True, act=act, hidden=hf["hidden_size"], bias=bool(hf.get("projector_bias", True)))


def voxtral_audio(hf: Mapping[str, Any]) -> VitConfig:
    said = hf.get("audio_config") or {}
    width = said.get("hidden_size") or said.get("d_model") or 1280
    joined = said.get("intermediate_size") or said.get("encoder_ffn_dim") or 5120
    if joined % width:
        raise ValueError(f"config.json: audio_config: rows of {width} numbers cannot be joined to {joined}.")
    act = hf.get("projector_hidden_act", "gelu")
    return audio_config(hf, joined // width, act=act, hidden=hf["hidden_size"], bias=False, whole=True)


def ultravox_audio(hf: Mapping[str, Any]) -> VitConfig:
    text, act = hf.get("text_config"), hf.get("projector_act", "swiglu")
    if not isinstance(text, Mapping):
        raise ValueError(
            "config.json has no text_config: this Ultravox leaves its language model in another repository "
            f"({hf.get('text_model_id')}). Save both in one folder (UltravoxModel.save_pretrained with all weights)."
        )
    norm = "middle" if hf.get("projector_ln_mid") else "end"
    hidden = int((hf.get("beside_text") or hf)["hidden_size"])  # the text's width has the same name
    return audio_config(hf, int(hf.get("stack_factor", 8)), act=act, hidden=hidden, bias=False, norm=norm)


class AudioTower(SoundTrunk):
    """`models.api.ImageEncoder` whose patches are frames of a log-mel spectrogram. Of each `stack` rows of the encoder one
    embedding is made: by their mean, before the last norm, and one product (or two with an activation between them); or side by
    side, by two products."""

    def __init__(self, config: VitConfig, build: Build):
        super().__init__(config, build)
        stacked = config.embed_dim * (1 if config.get("mean") else config.get("stack"))
        hidden, O, norm = config.get("hidden"), config.out_dim, config.get("norm")
        self.front = RMSNorm(stacked, 1e-6) if norm else None
        bias = hidden is None or bool(config.get("bias"))
        inner = stacked if hidden is None else hidden // 2 if config.get("act") == "swiglu" else hidden
        self.up = Linear(stacked, hidden, build, (None, "embed"), bias=bias) if hidden is not None else None
        self.down = Linear(inner, O, build, (None, "embed"), bias=bias)
        self.middle = RMSNorm(inner, 1e-6) if norm == "middle" else None
        self.end = RMSNorm(O, 1e-6) if norm == "end" else None

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors that are not read."""
        return (r"^audio_tower\.(audio_bos_eos_token|positional_embedding)\.",)

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        stack, kind_S = self.config.get("stack"), place_P2[::2, 1]
        real_S = None if self.config.get("whole") else kind_S == SOUND
        x_SD = self.hear(patches_PX, place_P2, real_S, place_P2[:, 1] > 0)
        N = len(kind_S) // stack
        kept_S = kind_S[: len(x_SD)] > 0
        x_SD = jnp.where(kept_S[:, None], x_SD, 0)
        x_SD = jnp.pad(x_SD, ((0, N * stack - len(x_SD)), (0, 0)))
        x_NSD = x_SD.reshape(N, stack, -1)
        if self.config.get("mean"):
            return self._projected(self.norm(x_NSD.mean(1).astype(x_SD.dtype)))
        normed_SD = jnp.where(jnp.pad(kept_S, (0, N * stack - len(kept_S)))[:, None], self.norm(x_SD), 0)
        return self._projected(normed_SD.reshape(N, -1))

    def _projected(self, x_NS: jax.Array) -> jax.Array:
        x_NS = x_NS if self.front is None else self.front(x_NS)
        if self.up is None:
            return self.down(x_NS)
        x_NF = self.up(x_NS)
        if (act := self.config.get("act")) == "swiglu":
            x_NF, gate_NF = jnp.split(x_NF, 2, axis=-1)
            x_NF = jax.nn.silu(gate_NF) * x_NF
        else:
            x_NF = activation(act)(x_NF)
        x_NO = self.down(x_NF if self.middle is None else self.middle(x_NF))
        return x_NO if self.end is None else self.end(x_NO)

    def recipes(self) -> Recipes:
        name = "multi_modal_projector"
        norm, linear = self.config.get("names", ("layer_norm", f"{name}.linear"))
        recipes = self.trunk_recipes("audio_tower", norm)
        if self.up is None:
            return recipes | under("down", self.down.recipes(linear))
        for part, own in (
            ("front", "ln_pre"),
            ("up", "linear_1"),
            ("middle", "ln_mid"),
            ("down", "linear_2"),
            ("end", "ln_post"),
        ):
            if (module := getattr(self, part)) is not None:
                recipes |= under(part, module.recipes(f"{name}.{own}"))
        return recipes
