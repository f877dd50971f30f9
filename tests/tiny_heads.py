"""Tiny random models with heads that guess further tokens, as checkpoints, and what the heads should say: transformers' own layers
under the formulas of the papers, written in torch."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models.tiny import TINY
from tests.models.tiny_base import BASE

MTP = {
    "deepseek v3": "layer",
    "glm-4.5": "layer",
    "glm-4.7 flash": "layer",
    "qwen3.5": "beside",
    "qwen3-next": "beside",
}
"""Families whose checkpoints have heads, and where: as the layer behind the last, or beside the model."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a head says, position by position.

    Attributes:
        hears: tokens [n] -> hidden states [n, H] that the head hears.
        step: (embeddings [n, D], hidden states [n, ...] or [n, D], True where they are the head's own) -> (hidden states for the
            logits, hidden states for the next position).
        model: tokens [n] -> the model's own logits behind the last one.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    hears: Callable[[torch.Tensor], torch.Tensor]
    combine: Callable[[torch.Tensor], torch.Tensor]
    step: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    logits: Callable[[torch.Tensor], torch.Tensor]
    model: Callable[[torch.Tensor], torch.Tensor]

    @torch.no_grad()
    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The likeliest tokens of the model itself."""
        found = list(tokens)
        for _ in range(count):
            found.append(int(self.model(torch.tensor(found)).argmax()))
        return found[len(tokens) :]

    @torch.no_grad()
    def said(self, tokens: list[int]) -> torch.Tensor:
        """Hidden states [n - 1, D] for the logits of each position's token after next."""
        ids = torch.tensor(tokens)
        hidden = self.combine(self.hears(ids))[:-1]
        return self.step(self.embed(ids[1:]), hidden)[0]

    @torch.no_grad()
    def guesses(self, tokens: list[int], count: int) -> list[int]:
        """The likeliest tokens behind these, each behind the one before it."""
        ids = torch.tensor(tokens)
        hidden, embedded = self.combine(self.hears(ids))[:-1], self.embed(ids[1:])
        found: list[int] = []
        while True:
            said, following = self.step(embedded, hidden)
            found.append(int(self.logits(said[-1:]).argmax()))
            if len(found) == count:
                return found
            hidden = torch.cat([hidden, following[-1:]])
            embedded = torch.cat([embedded, self.embed(torch.tensor(found[-1:]))])


def write_mtp(folder: pathlib.Path, name: str, seed: int = 0) -> Reference:
    """A model of tests.models.tiny with one more layer, which is its head.

    Args:
        name: one of MTP.
    """
    tiny, beside = TINY[name], MTP[name] == "beside"
    torch.manual_seed(seed)
    fields = {key: value for key, value in (BASE | dict(tiny.fields)).items() if value is not None}
    layers = fields["num_hidden_layers"]
    more = {"num_hidden_layers": layers + 1}
    if beside:
        more["layer_types"] = [
            *("full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)),
            "full_attention",
        ]
    if "mlp_layer_types" in fields:
        more["mlp_layer_types"] = [*fields["mlp_layer_types"], "sparse"]
    config = getattr(transformers, tiny.config)(**(fields | more))
    config._attn_implementation = "eager"
    whole = getattr(transformers, tiny.model)(config).eval().float()
    D = config.hidden_size
    _randomize(whole, seed)
    # A model that repeats itself lets its head be right now and then.
    parts = {part: torch.randn(D) * 0.1 + (0.0 if beside else 1.0) for part in ("embed_norm", "hidden_norm", "norm")}
    join = torch.randn(D, 2 * D) * (2 * D) ** -0.5
    whole.save_pretrained(folder)
    _rewrite(folder, layers, parts, join, beside, whole.lm_head.weight.detach())
    base, block = _only(whole, range(layers)), _only(whole, range(layers, layers + 1))
    block.model.norm.weight.data = parts["norm"]
    eps = config.rms_norm_eps

    def norm(x: torch.Tensor, part: str) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * (parts[part] + (1.0 if beside else 0.0))

    inner: list[torch.Tensor] = []
    block.model.norm.register_forward_pre_hook(lambda module, args: inner.append(args[0]))

    def step(embedded: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([norm(embedded, "embed_norm"), norm(hidden, "hidden_norm")], -1) @ join.T
        said = block.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
        return said, said if beside else inner.pop()[0]

    return Reference(
        embed=whole.model.embed_tokens,
        hears=lambda ids: base.model(ids[None], use_cache=False).last_hidden_state[0],
        combine=lambda heard: heard,
        step=step,
        logits=whole.lm_head,
        model=lambda ids: whole.lm_head(base.model(ids[None], use_cache=False).last_hidden_state[0, -1]),
    )


EAGLE = {"intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


def write_eagle3(
    folder: pathlib.Path, model: Any, speculators: bool = False, seed: int = 3, **options: Any
) -> Reference:
    """A head for a transformers model, in EAGLE's own format or in speculators'.

    Args:
        options: "rows" of logits, "own_table", and switches of the config.json.
    """
    torch.manual_seed(seed)
    rows, own_table = options.pop("rows", 100), options.pop("own_table", False)
    vocab, D = model.config.vocab_size, model.config.hidden_size
    sizes = EAGLE | {"hidden_size": D}
    config = transformers.LlamaConfig(**sizes, vocab_size=vocab, num_hidden_layers=1, max_position_embeddings=64)
    config._attn_implementation = "eager"
    llama = transformers.LlamaForCausalLM(config).eval().float()
    _randomize(llama, seed)
    layer = llama.model.layers[0]
    for part in ("q_proj", "k_proj", "v_proj"):
        width = getattr(layer.self_attn, part).weight.shape[0]
        setattr(layer.self_attn, part, nn.Linear(2 * D, width, bias=False))
    n = model.config.num_hidden_layers
    taps = options.get("eagle_aux_hidden_state_layer_ids") or (2, n // 2, n - 3)
    fc = torch.randn(D, 3 * D) * (3 * D) ** -0.5
    head = torch.randn(rows, D) * D**-0.5 * 4
    norms = {part: torch.randn(D) * 0.1 + 1.0 for part in ("input", "hidden", "post", "last")}
    row_of = torch.randperm(vocab)[:rows].sort().values
    table = torch.randn(vocab, D) if own_table else model.model.embed_tokens.weight.detach()
    name = "layers.0" if speculators else "midlayer"
    tensors = {f"{name}.{part}": value for part, value in layer.state_dict().items() if "layernorm" not in part}
    tensors |= {
        f"{name}.input_layernorm.weight": norms["input"],
        f"{name}.hidden_norm.weight": norms["hidden"],
        f"{name}.post_attention_layernorm.weight": norms["post"],
        "norm.weight": norms["last"],
        "fc.weight": fc,
        "lm_head.weight": head,
    }
    if rows != vocab:
        mask = torch.zeros(vocab, dtype=torch.bool)
        mask[row_of] = True
        tensors |= {"d2t": row_of - torch.arange(rows), "t2d": mask}
    if own_table:
        tensors["embed_tokens.weight"] = table
    folder.mkdir(parents=True)
    save_file(
        {key: value.detach().clone().contiguous() for key, value in tensors.items()}, folder / "model.safetensors"
    )
    layer_config = {**sizes, "vocab_size": vocab, "num_hidden_layers": 1, "rms_norm_eps": config.rms_norm_eps}
    layer_config |= {"max_position_embeddings": 64, "model_type": "llama", "rope_theta": 10000.0}
    said: dict[str, Any] = {**layer_config, "architectures": ["LlamaForCausalLMEagle3"]}
    if speculators:
        said = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "somewhere"}},
            "transformer_layer_config": layer_config,
        }
    (folder / "config.json").write_text(json.dumps(said | {"draft_vocab_size": rows} | options))

    def norm(x: torch.Tensor, part: str) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * norms[part]

    def hears(ids: torch.Tensor) -> torch.Tensor:
        states = model(ids[None], use_cache=False, output_hidden_states=True).hidden_states
        return torch.cat([states[tap][0] for tap in taps], -1)

    def step(embedded: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = norm(hidden, "hidden")
        x = normed if options.get("norm_before_residual") else hidden
        position = torch.arange(len(x))[None]
        mask = torch.full((len(x), len(x)), float("-inf")).triu(1)[None, None]
        both = torch.cat([norm(embedded, "input"), normed], -1)[None]
        rotary = llama.model.rotary_emb(both, position)
        x = x + layer.self_attn(hidden_states=both, position_embeddings=rotary, attention_mask=mask)[0][0]
        x = x + layer.mlp(norm(x, "post"))
        return norm(x, "last"), x

    def logits(said: torch.Tensor) -> torch.Tensor:
        found = torch.full((len(said), vocab), float("-inf"))
        found[:, row_of if rows != vocab else slice(None)] = said @ head.T
        return found

    return Reference(
        embed=lambda ids: table[ids],
        hears=hears,
        combine=lambda heard: heard @ fc.T,
        step=step,
        logits=logits,
        model=lambda ids: model(ids[None], use_cache=False).logits[0, -1],
    )


def write_base(folder: pathlib.Path, layers: int = 6, seed: int = 0) -> Any:
    """A tiny Llama for EAGLE-3, as a checkpoint; the transformers model."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**(BASE | {"num_hidden_layers": layers}))
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).eval().float()
    _randomize(model, seed)
    model.save_pretrained(folder)
    return model


def _randomize(model: nn.Module, seed: int) -> None:
    """Weights large enough that logits differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "conv1d" not in name:
            scale = parameter.shape[-1] ** -0.5 * (4.0 if "lm_head" in name else 1.0)
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def _only(model: Any, layers: range) -> Any:
    """The model with some of its layers."""
    part = copy.deepcopy(model)
    part.model.layers = nn.ModuleList([part.model.layers[i] for i in layers])
    for index, layer in enumerate(part.model.layers):
        for mixer in ("self_attn", "linear_attn"):
            if hasattr(layer, mixer):
                getattr(layer, mixer).layer_idx = index
    part.config.num_hidden_layers = len(layers)
    if getattr(part.config, "layer_types", None):
        part.config.layer_types = [part.config.layer_types[i] for i in layers]
    return part


def _rewrite(
    folder: pathlib.Path,
    layers: int,
    parts: dict[str, torch.Tensor],
    join: torch.Tensor,
    beside: bool,
    head: torch.Tensor,
) -> None:
    """The last layer of a checkpoint becomes its head."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    own = f"model.layers.{layers}."
    if beside:
        names = {"embed_norm": "mtp.pre_fc_norm_embedding", "hidden_norm": "mtp.pre_fc_norm_hidden", "norm": "mtp.norm"}
        tensors = {name.replace(own, "mtp.layers.0."): tensor for name, tensor in tensors.items()}
        tensors["mtp.fc.weight"] = join
    else:
        names = {"embed_norm": f"{own}enorm", "hidden_norm": f"{own}hnorm", "norm": f"{own}shared_head.norm"}
        tensors[f"{own}eh_proj.weight"] = join
        tensors[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{own}shared_head.head.weight"] = head.clone()
    tensors |= {f"{names[part]}.weight": value for part, value in parts.items()}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = layers
    for field in ("layer_types", "mlp_layer_types"):
        if config.get(field):
            config[field] = config[field][:layers]
    if not beside:
        config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
