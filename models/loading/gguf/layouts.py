"""Tensors that GGUF's converter splits, joins or turns, put back into the shape that Hugging Face's names promise."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from models.loading.gguf.file import GGUFFile


@dataclasses.dataclass(frozen=True)
class Layout:
    """One tensor made from others of the file.

    Attributes:
        sources: the file's names, the first standing for all.
        shape: of the result.
        make: (the sources' values) -> the result.
        rows: where the result is rows of the only source, which; so packed ones can be taken as they are.
        matrix: where the sources are stacks of matrices and one of each is meant, which.
        join: where the result is all rows of the sources, (their rows [..., row, content]) -> its own, whatever rows are made of;
            so packed ones can be laid out as they are.
        turned: its rows are its last axis.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., np.ndarray]
    rows: np.ndarray | None = None
    matrix: int | None = None
    join: Callable[..., np.ndarray] | None = None
    turned: bool = False

    @classmethod
    def of_rows(cls, file: GGUFFile, source: str, rows: np.ndarray) -> Layout:
        """Some of a tensor's rows, in another order."""
        shape = (len(rows), *file.tensors[source].shape[1:])
        return cls((source,), shape, lambda array: array[rows], rows)

    @classmethod
    def as_it_is(cls, file: GGUFFile, source: str) -> Layout:
        """A tensor that has another name."""
        return cls.of_stacks(file, (source,), _same)

    @classmethod
    def of_stacks(
        cls, file: GGUFFile, sources: tuple[str, ...], join: Callable[..., np.ndarray], turned: bool = False
    ) -> Layout:
        """All rows of matrices or stacks of one shape, laid out by `join`; `turned`: with the last two axes swapped.

        Raises:
            ValueError: they are none, by name.
        """
        shapes = [file.tensors[source].shape for source in sources]
        if shapes.count(shapes[0]) < len(shapes) or (len(shapes[0]) < 2 and (turned or len(sources) > 1)):
            raise ValueError(
                f"{' and '.join(sources)} have shapes {[list(s) for s in shapes]}; matrices of one are expected."
            )
        if len(shapes[0]) < 2:
            return cls(sources, shapes[0], join)
        *stack, rows, inputs = shapes[0]
        if not turned:
            return cls(sources, (*stack, len(sources) * rows, inputs), join, join=join)
        shape = (*stack, inputs, len(sources) * rows)
        return cls(sources, shape, lambda *arrays: join(*arrays).swapaxes(-1, -2), join=join, turned=True)


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _one_behind_the_other(*stacks: np.ndarray) -> np.ndarray:
    """Of each matrix of a stack the first one's rows, then the second's."""
    return np.concatenate(stacks, axis=-2)


def _in_turn(*stacks: np.ndarray) -> np.ndarray:
    """Of each matrix of a stack the first one's row, the second's, the first one's next."""
    return np.stack(stacks, axis=-2).reshape(*stacks[0].shape[:-2], -1, stacks[0].shape[-1])


SECONDARY = {
    "gpt-oss": re.compile(r"\.ffn_up_exps\."),
    "llama4": re.compile(r"\.ffn_up_exps\."),
    "granitemoe": re.compile(r"\.ffn_up_exps\."),
    "granitehybrid": re.compile(r"\.ffn_up(_exps|_shexp)?\."),
    "deepseek2": re.compile(r"\.attn_v_b\."),
    "glm-dsa": re.compile(r"\.attn_v_b\."),
    "mistral4": re.compile(r"\.attn_v_b\."),
    "kimi-linear": re.compile(r"\.attn_v_b\."),
}
"""Tensors that only come in as a second source; they stand for no tensor of their own."""

_STACKED = re.compile(r"^model\.(altup(?:_unembed)?_projections)\.(\d+)\.weight$")
_HALF = re.compile(r"^model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(gate_proj|w1|up_proj|w3)\.weight$")
_LAYER = re.compile(r"^(?:model\.layers|transformer\.h)\.(\d+)\.(.+)$")


def layout(file: GGUFFile, architecture: str, name: str) -> Layout | None:
    """How `name` is made where the file does not have it as it is; None where it does (or does not have it at all)."""
    if stacked := _STACKED.match(name):
        return _of_stack(file, *stacked.groups())
    if (half := _HALF.match(name)) and (both := f"blk.{half[1]}.ffn_gate_up_exps.weight") in file.tensors:
        return _of_both(file, both, int(half[2]), half[3] in ("up_proj", "w3"))
    match = _LAYER.match(name)
    maker = _MAKERS.get(architecture)
    if match is None or maker is None:
        return None
    return maker(file, f"blk.{match.group(1)}", match.group(2))


def _of_stack(file: GGUFFile, which: str, index: str) -> Layout | None:
    """One of Gemma 3n's matrices between residual streams, which are one tensor."""
    source = {"altup_projections": "altup_proj.weight", "altup_unembed_projections": "altup_unembd_proj.weight"}[which]
    if source not in file.tensors:
        return None
    return Layout((source,), file.tensors[source].shape[1:], lambda array: array[int(index)])


def _of_both(file: GGUFFile, source: str, expert: int, up: bool) -> Layout | None:
    """An expert's gate or up, of files whose experts have both in one tensor, the gates' rows first."""
    E, both, D = file.tensors[source].shape
    if expert >= E:
        return None
    rows = np.arange(both // 2) + (both // 2 if up else 0)
    return Layout((source,), (len(rows), D), lambda array: array[rows], rows, expert)


def _gemma3n(file: GGUFFile, block: str, part: str) -> Layout | None:
    """A scale that Hugging Face has without a suffix."""
    source = f"{block}.altup_correct_scale.weight"
    return Layout.as_it_is(file, source) if part == "altup.correct_output_scale" and source in file.tensors else None


def _gpt2(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Conv1D matrices are stored [out, in]; Hugging Face has them [in, out]."""
    own = {
        "attn.c_attn.weight": "attn_qkv",
        "attn.c_proj.weight": "attn_output",
        "mlp.c_fc.weight": "ffn_up",
        "mlp.c_proj.weight": "ffn_down",
    }.get(part)
    source = f"{block}.{own}.weight"
    if own is None or source not in file.tensors:
        return None
    return Layout((source,), file.tensors[source].shape[::-1], lambda array: array.T)


def _gpt_oss(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Experts: gate and up apart and [out, in]; Hugging Face has them alternating and [in, out]."""
    kind = "bias" if part.endswith("_bias") else "weight"
    gate, up, down = (f"{block}.ffn_{name}_exps.{kind}" for name in ("gate", "up", "down"))
    if part == "self_attn.sinks" and f"{block}.attn_sinks.weight" in file.tensors:
        source = f"{block}.attn_sinks.weight"
        return Layout((source,), file.tensors[source].shape, lambda array: array)
    if part.startswith("mlp.experts.gate_up_proj") and gate in file.tensors and up in file.tensors:
        if kind == "weight":
            return Layout.of_stacks(file, (gate, up), _in_turn, turned=True)
        E, F = file.tensors[gate].shape
        return Layout((gate, up), (E, 2 * F), lambda *halves: np.stack(halves, axis=2).reshape(E, 2 * F))
    if part.startswith("mlp.experts.down_proj") and down in file.tensors:
        return Layout.of_stacks(file, (down,), _same, turned=kind == "weight")
    return None


def _llama4(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Experts: gate and up apart and [out, in]; Hugging Face has the gate first, then up, and [in, out]."""
    gate, up, down = (f"{block}.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))
    if part == "feed_forward.experts.gate_up_proj" and gate in file.tensors and up in file.tensors:
        return Layout.of_stacks(file, (gate, up), _one_behind_the_other, turned=True)
    if part == "feed_forward.experts.down_proj" and down in file.tensors:
        return Layout.of_stacks(file, (down,), _same, turned=True)
    return None


def _granitemoe(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Experts: gate and up apart; Hugging Face has the gate's rows first, then up's."""
    gate, up = (f"{block}.ffn_{name}_exps.weight" for name in ("gate", "up"))
    if part != "block_sparse_moe.input_linear.weight" or gate not in file.tensors or up not in file.tensors:
        return None
    return Layout.of_stacks(file, (gate, up), _one_behind_the_other)


def _choice_bias(file: GGUFFile, block: str, part: str) -> Layout | None:
    """The bias by which experts are chosen, which the table of names does not have."""
    source = f"{block}.exp_probs_b.bias"
    if not part.endswith((".e_score_correction_bias", ".expert_bias")) or source not in file.tensors:
        return None
    return Layout.as_it_is(file, source)


def _deepseek2(file: GGUFFile, block: str, part: str) -> Layout | None:
    """The latent's expansion is stored as one matrix a head for keys (turned) and one for values."""
    if (bias := _choice_bias(file, block, part)) is not None:
        return bias
    keys, values = f"{block}.attn_k_b.weight", f"{block}.attn_v_b.weight"
    if part == "self_attn.kv_b_proj.weight" and keys in file.tensors and values in file.tensors:
        (H, rank, nope), (_, v_dim, _) = file.tensors[keys].shape, file.tensors[values].shape

        def join(keys_Hrn: np.ndarray, values_Hvr: np.ndarray) -> np.ndarray:
            return np.concatenate([keys_Hrn.swapaxes(1, 2), values_Hvr], axis=1).reshape(-1, rank)

        return Layout((keys, values), (H * (nope + v_dim), rank), join)
    return None


def _qwen_delta(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Linear attention: decay rates instead of their logarithms, and in Qwen3.5 value heads in turns, the first of each key head,
    then the second ones; Hugging Face has those of a key head together."""
    if not part.startswith("linear_attn."):
        return None
    arch = file.metadata["general.architecture"]
    K, H, inner, n = (
        int(file.metadata[f"{arch}.ssm.{key}"]) for key in ("group_count", "time_step_rank", "inner_size", "state_size")
    )
    p = inner // H
    # heads[i]: where the file has Hugging Face's i-th value head.
    heads = np.arange(H) if arch == "qwen3next" else np.arange(H).reshape(H // K, K).T.reshape(-1)
    values = (heads[:, None] * p + np.arange(p)).reshape(-1)
    mixed = np.concatenate([np.arange(2 * K * n), 2 * K * n + values])
    own = part.removeprefix("linear_attn.")
    of_rows = {
        "in_proj_qkv.weight": ("attn_qkv.weight", mixed),
        "in_proj_z.weight": ("attn_gate.weight", values),
        "in_proj_b.weight": ("ssm_beta.weight", heads),
        "in_proj_a.weight": ("ssm_alpha.weight", heads),
        "dt_bias": ("ssm_dt.bias", heads),
    }
    both = f"{block}.ssm_ba.weight"
    if both in file.tensors and own in ("in_proj_b.weight", "in_proj_a.weight"):  # of each key head its b, then its a
        of_key_head = np.arange(2 * H).reshape(K, 2, -1)
        return Layout.of_rows(file, both, of_key_head[:, int("_a" in own)].reshape(-1))
    if own in of_rows:
        source, rows = of_rows[own]
        return Layout.of_rows(file, f"{block}.{source}", rows) if f"{block}.{source}" in file.tensors else None
    a, taps, out = f"{block}.ssm_a", f"{block}.ssm_conv1d.weight", f"{block}.ssm_out.weight"
    if own == "A_log" and a in file.tensors:
        return Layout((a,), (H,), lambda rate: np.log(-rate.astype(np.float32))[heads])
    if own == "conv1d.weight" and taps in file.tensors:
        shape = file.tensors[taps].shape
        return Layout((taps,), (shape[0], 1, shape[1]), lambda array: array[mixed][:, None])
    if own == "out_proj.weight" and out in file.tensors and arch != "qwen3next":
        return Layout((out,), file.tensors[out].shape, lambda array: np.ascontiguousarray(array[:, values]))
    return None


def _gemma4(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Scales have no place of their own in the table of names; experts' projections are as Hugging Face has them."""
    own = {
        "layer_scalar": "layer_output_scale.weight",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "router.proj.weight": "ffn_gate_inp.weight",
        "experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "experts.down_proj": "ffn_down_exps.weight",
    }.get(part)
    source = f"{block}.{own}"
    return Layout.as_it_is(file, source) if own is not None and source in file.tensors else None


def _mamba2(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Decay rates instead of their logarithms; skips and rates with an axis of one, norms with one for groups."""
    found = re.fullmatch(r"(?:mamba|mixer)\.(A_log|D|dt_bias|conv1d\.weight|norm\.weight)", part)
    own = (
        found
        and {
            "A_log": "ssm_a",
            "D": "ssm_d",
            "dt_bias": "ssm_dt.bias",
            "conv1d.weight": "ssm_conv1d.weight",
            "norm.weight": "ssm_norm.weight",
        }[found[1]]
    )
    source = f"{block}.{own}"
    if found is None or source not in file.tensors:
        return None
    if found[1] == "conv1d.weight":
        channels, width = file.tensors[source].shape
        return Layout((source,), (channels, 1, width), lambda array: array[:, None])
    size = math.prod(file.tensors[source].shape)
    log = found[1] == "A_log"
    return Layout(
        (source,), (size,), lambda array: np.log(-array.astype(np.float32)).reshape(-1) if log else array.reshape(-1)
    )


def _granite_hybrid(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Experts as in granitemoe; the dense block's gate and up apart, under another name where there are no experts."""
    if part == "shared_mlp.input_linear.weight":
        shared = f"{block}.ffn_gate_shexp.weight" in file.tensors
        halves = tuple(f"{block}.ffn_{name}{'_shexp' if shared else ''}.weight" for name in ("gate", "up"))
        if any(half not in file.tensors for half in halves):
            return None
        return Layout.of_stacks(file, halves, _one_behind_the_other)
    if part == "shared_mlp.output_linear.weight":
        source = next(
            (s for s in (f"{block}.ffn_down_shexp.weight", f"{block}.ffn_down.weight") if s in file.tensors), None
        )
        return None if source is None else Layout.as_it_is(file, source)
    return _granitemoe(file, block, part) or _mamba2(file, block, part)


def _nemotron_h(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Mamba-2's, and a mixture's."""
    return _choice_bias(file, block, part) or _mamba2(file, block, part)


def _lfm2(file: GGUFFile, block: str, part: str) -> Layout | None:
    """The convolution without its axis of one; a mixture's bias."""
    source = f"{block}.shortconv.conv.weight"
    if part != "conv.conv.weight" or source not in file.tensors:
        return _choice_bias(file, block, part)
    return _taps(file, source)


def _taps(file: GGUFFile, source: str) -> Layout:
    """A convolution's taps, whatever axes of one they have."""
    shape = file.tensors[source].shape
    channels, width = math.prod(shape[:-1]), shape[-1]
    return Layout((source,), (channels, 1, width), lambda array: array.reshape(channels, 1, width))


def _mamba1(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Decay rates instead of their logarithms; the convolution without its axis of one."""
    a, taps = f"{block}.ssm_a", f"{block}.ssm_conv1d.weight"
    if part in ("mamba.A_log", "mixer.A_log") and a in file.tensors:
        return Layout((a,), file.tensors[a].shape, lambda rate: np.log(-rate.astype(np.float32)))
    if part in ("mamba.conv1d.weight", "mixer.conv1d.weight") and taps in file.tensors:
        return _taps(file, taps)
    return None


def _kimi_linear(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Latent attention as in DeepSeek's; of linear attention the rates, not their logarithms, and other axes of one."""
    own = part.removeprefix("self_attn.")
    a, steps, taps = f"{block}.ssm_a", f"{block}.ssm_dt.bias", f"{block}.ssm_conv1d_{own[:1]}.weight"
    if own == "A_log" and a in file.tensors:
        shape = (1, 1, math.prod(file.tensors[a].shape), 1)
        return Layout((a,), shape, lambda rate: np.log(-rate.astype(np.float32)).reshape(shape))
    if own == "dt_bias" and steps in file.tensors:
        return Layout.as_it_is(file, steps)
    if own.endswith("_conv1d.weight") and taps in file.tensors:
        return _taps(file, taps)
    return _deepseek2(file, block, part)


_MAKERS: dict[str, Callable[[GGUFFile, str, str], Layout | None]] = {
    "gpt2": _gpt2,
    "gpt-oss": _gpt_oss,
    "llama4": _llama4,
    "granitemoe": _granitemoe,
    "deepseek2": _deepseek2,
    "glm-dsa": _deepseek2,
    "mistral4": _deepseek2,
    "glm4moe": _choice_bias,
    "minimax-m2": _choice_bias,
    "kimi-linear": _kimi_linear,
    "falcon-h1": _mamba2,
    "mamba2": _mamba2,
    "mamba": _mamba1,
    "jamba": _mamba1,
    "qwen3next": _qwen_delta,
    "qwen35": _qwen_delta,
    "qwen35moe": _qwen_delta,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "granitehybrid": _granite_hybrid,
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2,
}
