"""What transformers' models call of ours while they are recorded, in place of attention and experts; and the models
themselves, on parameters without values."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.integrations import moe
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from models.bridge import masks
from models.bridge.graph import Refused
from models.bridge.record import options

NAME = "jaxserve"
"""Of our attention and experts in transformers' registries."""

UNHEEDED = {
    "dropout", "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_embeddings", "tgt_len", "training", "max_position_embeddings", "return_dict",
    "num_key_value_groups", "enable_gqa", "deterministic", "is_decoder",
}  # fmt: skip
"""What attention may be told and need not know."""


def attention(
    module: torch.nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **told: Any
) -> tuple[torch.Tensor, None]:
    """Attention over pages, as transformers calls its attention functions: q [1, H, T, h], k and v [1, K, T, h] -> [1, T, H, h].

    Raises:
        Refused: it is told something that pages do not do.
    """
    scaling, softcap = told.pop("scaling", None), told.pop("softcap", None)
    window, sinks, causal = told.pop("sliding_window", None), told.pop("s_aux", None), told.pop("is_causal", None)
    unknown = sorted(
        name for name, said in told.items() if name not in UNHEEDED and said is not None and said is not False
    )
    if unknown:
        raise Refused(f"its attention is told of {', '.join(unknown)}")
    if (getattr(module, "is_causal", True) if causal is None else causal) is False:
        raise Refused("its attention looks at later positions too")
    chunk = mask = None
    if isinstance(attention_mask, masks.Mask):
        if window is not None and attention_mask.window != window:
            raise Refused(f"its mask has a window of {attention_mask.window}, its attention one of {window}")
        window, chunk = attention_mask.window, attention_mask.chunk
    elif attention_mask is not None:
        mask = attention_mask
    (_, heads, tokens, size), (_, kv_heads, keys, _) = query.shape, key.shape
    if keys != tokens or tuple(value.shape[:3]) != (1, kv_heads, keys) or heads % kv_heads or query.shape[0] != 1:
        raise Refused("its attention reads other keys than those of its tokens")
    scale = scaling if scaling is not None else getattr(module, "scaling", None)
    scale = float(scale) if isinstance(scale, int | float) else size**-0.5
    said = options(scale=scale, window=window, softcap=softcap, chunk=chunk)
    return torch.ops.jaxserve.attend(query, key, value, sinks, said, mask), None


def torch_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attention as torch calls it: the result is [1, H, T, h]."""
    if attn_mask is None and not is_causal:
        raise Refused("its attention looks at later positions too")
    said = query.shape[-1] ** -0.5 if scale is None else scale
    out, _ = attention(torch.nn.Identity(), query, key, value, attn_mask, scaling=said)
    return out.transpose(1, 2)


def flash_attention(
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    query_length: int = 0,
    is_causal: bool = True,
    **told: Any,
) -> torch.Tensor:
    """Attention as older models call flash attention: q, k, v and the result are [1, T, H, h]."""
    q, k, v = (one.transpose(1, 2) for one in (query, key, value))
    told["scaling"] = told.pop("softmax_scale", None)
    for name in ("use_top_left_mask", "attn_implementation", "implementation"):
        told.pop(name, None)
    return attention(torch.nn.Identity(), q, k, v, attention_mask, is_causal=is_causal, **told)[0]


def experts(module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A mixture's experts, as transformers calls its functions for them.

    Raises:
        Refused: they are not stacked gated blocks without biases.
    """
    if (
        not (module.has_gate and module.is_concatenated and _gated_plainly(module))
        or module.is_transposed
        or module.has_bias
    ):
        raise Refused("its experts are of a kind that is not known here")
    if module.has_post_expert_norm:
        raise Refused("its experts are normalized one by one")
    said = options(activation=_activation(module))
    return torch.ops.jaxserve.experts(hidden, ids, weights, module.gate_up_proj, module.down_proj, said)


def _gated_plainly(module: Any) -> bool:
    """Whether what is done between an expert's products is `activation(gate) * up`."""
    if type(module)._apply_gate is moe._default_apply_gate:
        return True
    with _disable_current_modes(), torch.no_grad():
        both = torch.linspace(-8.0, 8.0, 64).reshape(2, 32)
        gate, up = both.chunk(2, dim=-1)
        try:
            return torch.allclose(module._apply_gate(both), module.act_fn(gate) * up, atol=1e-6)
        except Exception:
            # A model's own code, given numbers that it may not want: whatever it raises, it is of a kind that is not known here.
            return False


def _activation(module: Any) -> str:
    """The name under which our activations have the experts'."""
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        told = getattr(module.config, name, None)
        if isinstance(told, str) and type(ACT2FN[told]) is type(module.act_fn):
            return told
    raise Refused("the activation of its experts has no name in its configuration")


FLASH = "_flash_attention_forward"

_OURS = {
    "create_causal_mask": masks.causal,
    "create_sliding_window_causal_mask": masks.windowed,
    "create_chunked_causal_mask": masks.chunked,
    "create_bidirectional_mask": masks.both_ways,
    "create_bidirectional_sliding_window_mask": masks.both_ways,
    FLASH: flash_attention,
}
"""What is ours in the namespaces of transformers' models while they are recorded."""


@contextlib.contextmanager
def installed(model: Any) -> Generator[None]:
    """Within it, a model makes our masks, and what calls flash attention calls ours. Attention and experts of ours are in the
    registries for good: under our name."""
    modules = {sys.modules[kind.__module__] for part in model.modules() for kind in type(part).__mro__[:-1]}
    theirs = [module for module in modules if module.__name__.startswith("transformers.models.")]
    # Where flash attention is not installed its function is not there, and its classes still are.
    names = [(module, name) for module in theirs for name in _OURS if hasattr(module, name) or name == FLASH]
    kept = [(module, name, vars(module).get(name)) for module, name in names]
    model.warn_if_padding_and_no_attention_mask = lambda *_, **__: None  # looks at the tokens' values
    try:
        for module, name in names:
            setattr(module, name, _OURS[name])
        yield
    finally:
        for module, name, value in kept:
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)


def make(hf: Mapping[str, Any], fake: FakeTensorMode, dtype: torch.dtype) -> Any:
    """A model of transformers', its parameters without values.

    Args:
        hf: a `config.json` dictionary.
        dtype: of parameters and activations.
    Raises:
        Refused: transformers has no such model for texts.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
    kind, config = model_class(hf), configuration(hf)
    for part in {id(one): one for one in (config, config.get_text_config())}.values():
        part._attn_implementation = NAME
        part._experts_implementation = NAME
    with _meta_parameters(), _default_dtype(dtype), _tables(kind):
        try:
            model = kind(config)
        except Refused:
            raise
        except Exception as e:  # its constructor may raise anything about attention that it does not know
            raise Refused(f"its constructor says {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}") from e
    model.eval()
    model.tie_weights()
    saved = set(model.state_dict())
    same: dict[int, torch.nn.Parameter] = {}
    with fake:
        for path, module in model.named_modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    if id(parameter) not in same:
                        same[id(parameter)] = torch.nn.Parameter(
                            torch.empty(parameter.shape, dtype=dtype), requires_grad=False
                        )
                    module._parameters[name] = same[id(parameter)]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and (f"{path}.{name}" if path else name) in saved:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def configuration(hf: Mapping[str, Any]) -> Any:
    """transformers' configuration of a `config.json` dictionary."""
    told = {name: value for name, value in hf.items() if name not in ("quantization_config", "torch_dtype", "dtype")}
    kind = told.pop("model_type", None)
    if kind not in transformers.CONFIG_MAPPING:
        raise Refused(f"it has no configuration of the type {kind!r}")
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(told)
    except Exception as e:  # its configurations check themselves, each in its own way
        raise Refused(f"its configuration says {type(e).__name__}: {e}") from e


def model_class(hf: Mapping[str, Any]) -> Any:
    """transformers' class of an architecture.

    Raises:
        Refused: there is none, or it does not write texts.
    """
    architecture = hf["architectures"][0]
    listed = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    known = {name for names in listed for name in ([names] if isinstance(names, str) else names)}
    if architecture not in known or not hasattr(transformers, architecture):
        raise Refused("it has no model for text generation of that name")
    return getattr(transformers, architecture)


@contextlib.contextmanager
def _tables(kind: Any) -> Generator[None]:
    """Older models choose a class for attention by its name: within it, ours is the one for flash attention, or the plainest one
    where layers see differently far."""
    module = sys.modules[kind.__module__]
    tables = [
        one for name, one in vars(module).items() if name.endswith("_ATTENTION_CLASSES") and "flash_attention_2" in one
    ]
    for table in tables:
        eager = table.get("eager")
        windows = eager is not None and "attention_type" in inspect.signature(eager.__init__).parameters
        table[NAME] = eager if windows else table["flash_attention_2"]  # which has not always the windows
    try:
        yield
    finally:
        for table in tables:
            del table[NAME]


@contextlib.contextmanager
def _meta_parameters() -> Generator[None]:
    """Within it parameters are made without memory; buffers that are computed keep their values."""
    base: Any = torch.nn.Module
    original = base.register_parameter

    def register(module: Any, name: str, parameter: torch.nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    base.register_parameter = register
    try:
        with no_init_weights():
            yield
    finally:
        base.register_parameter = original


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def parameters(model: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) of what a checkpoint gives: parameters, and buffers that are saved. A tied one comes once, under the name that
    others are tied to."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    seen: set[int] = set()
    told = model.state_dict(keep_vars=True).items()
    for name, tensor in sorted(told, key=lambda one: one[0] in tied):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
