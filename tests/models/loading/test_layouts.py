"""Names and layouts that tools give to the tensors of one and the same network."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.loading.files.canonical import canonical_name
from models.loading.files.experts import ExpertLayouts
from models.loading.load import load_model, resolve
from models.parameters import parameters_of
from ops.linear.weights.block_pack import CodedRows
from ops.linear.weights.blocks import Form
from tests.models.loading.test_load import HF, tensors
from tests.models.tiny import DEEPSEEK, MOE
from tests.models.tiny_base import BASE

E, F, D = 3, 4, 6
LAYER = "model.layers.0"


class Tensors(dict):
    """A `Checkpoint` of arrays."""

    own_names = property(dict.keys)

    def canonical(self, name):
        return name

    def locate(self, name):
        return name if name in self else None

    def shape(self, name):
        return self[name].shape

    def read(self, name):
        return self[name]

    def release(self, name):
        pass


GATE, UP, DOWN = (
    np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate([(E, F, D), (E, F, D), (E, D, F)])
)
GATE_BIAS, UP_BIAS, DOWN_BIAS = (
    np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate([(E, F), (E, F), (E, D)])
)
ROUTER = np.random.default_rng(9).standard_normal((E, D))


def one_by_one(module, gate, up, down, bias=False):
    out = {}
    for e in range(E):
        base = f"{LAYER}.{module}.experts.{e}"
        out |= {f"{base}.{gate}.weight": GATE[e], f"{base}.{up}.weight": UP[e], f"{base}.{down}.weight": DOWN[e]}
        if bias:
            biases = zip((gate, up, down), (GATE_BIAS, UP_BIAS, DOWN_BIAS), strict=True)
            out |= {f"{base}.{name}.bias": values[e] for name, values in biases}
    return out


def fused(gate, up):
    return np.concatenate([gate, up], axis=1)


def alternating(gate, up):
    return np.stack([gate, up], axis=2).reshape(E, 2 * F, *gate.shape[2:])


ASKED = {
    "Mixtral": one_by_one("block_sparse_moe", "w1", "w3", "w2") | {f"{LAYER}.block_sparse_moe.gate.weight": ROUTER},
    "Qwen, DeepSeek": one_by_one("mlp", "gate_proj", "up_proj", "down_proj") | {f"{LAYER}.mlp.gate.weight": ROUTER},
    "Granite": {
        f"{LAYER}.block_sparse_moe.input_linear.weight": fused(GATE, UP),
        f"{LAYER}.block_sparse_moe.output_linear.weight": DOWN,
        f"{LAYER}.block_sparse_moe.router.layer.weight": ROUTER,
    },
    "Llama 4": {
        f"{LAYER}.feed_forward.experts.gate_up_proj": fused(GATE, UP).swapaxes(1, 2),
        f"{LAYER}.feed_forward.experts.down_proj": DOWN.swapaxes(1, 2),
        f"{LAYER}.feed_forward.router.weight": ROUTER,
    },
    "GPT-OSS": {
        f"{LAYER}.mlp.experts.gate_up_proj": alternating(GATE, UP).swapaxes(1, 2),
        f"{LAYER}.mlp.experts.gate_up_proj_bias": alternating(GATE_BIAS, UP_BIAS),
        f"{LAYER}.mlp.experts.down_proj": DOWN.swapaxes(1, 2),
        f"{LAYER}.mlp.experts.down_proj_bias": DOWN_BIAS,
        f"{LAYER}.mlp.router.weight": ROUTER,
    },
}
"""What families ask for."""

STORED = {
    "one by one, as Mixtral": ASKED["Mixtral"],
    "one by one": ASKED["Qwen, DeepSeek"],
    "one by one, Llama 4": one_by_one("feed_forward", "gate_proj", "up_proj", "down_proj")
    | {f"{LAYER}.feed_forward.router.weight": ROUTER},
    "one by one with biases": one_by_one("mlp", "gate_proj", "up_proj", "down_proj", bias=True)
    | {f"{LAYER}.mlp.router.weight": ROUTER},
    "fused by transformers 5": {
        f"{LAYER}.mlp.experts.gate_up_proj": fused(GATE, UP),
        f"{LAYER}.mlp.experts.down_proj": DOWN,
        f"{LAYER}.mlp.gate.weight": ROUTER,
    },
    "fused, in Granite's block": {
        f"{LAYER}.block_sparse_moe.experts.gate_up_proj": fused(GATE, UP),
        f"{LAYER}.block_sparse_moe.experts.down_proj": DOWN,
        f"{LAYER}.block_sparse_moe.router.weight": ROUTER,
    },
    "stacked by MLX": {
        f"{LAYER}.mlp.switch_mlp.gate_proj.weight": GATE,
        f"{LAYER}.mlp.switch_mlp.up_proj.weight": UP,
        f"{LAYER}.mlp.switch_mlp.down_proj.weight": DOWN,
        f"{LAYER}.mlp.gate.weight": ROUTER,
    },
}
# Two layouts of one name: which of them a file has is not told by its names.
SAME_NAMES = {("Llama 4", "fused by transformers 5"), ("GPT-OSS", "fused by transformers 5")}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("asked", ASKED)
def test_experts_in_any_layout(asked, stored):
    if (asked, stored) in SAME_NAMES or (asked == "GPT-OSS" and "biases" not in stored):
        return
    view = ExpertLayouts(Tensors(STORED[stored]), alternating=asked == "GPT-OSS")
    used = set()
    for name, values in ASKED[asked].items():
        own = view.locate(name)
        assert own is not None, name
        used.add(own)
        assert view.shape(name) == values.shape
        np.testing.assert_array_equal(view.read(name), values)
    if "biases" not in stored or asked == "GPT-OSS":
        assert set(view.own_names) <= used  # nothing is left over


class Coded(Tensors):
    """The same tensors as if their rows were in blocks: bytes of a row's numbers."""

    def is_coded(self, name, turned=False):
        return self.shape(name)[-1] == D and not turned

    def coded(self, name, turned=False):
        rows = np.ascontiguousarray(self.read(name), np.float32).reshape(-1, self.shape(name)[-1])
        return (CodedRows(Form(8), rows.shape[1], rows.view(np.uint8)), None) if self.is_coded(name, turned) else None


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("asked", ASKED)
def test_experts_in_blocks_in_any_layout(asked, stored):
    """Gates and ups, whose inputs here are D: their rows come out in the order in which the family has them."""
    if (asked, stored) in SAME_NAMES or (asked == "GPT-OSS" and "biases" not in stored):
        return
    view = ExpertLayouts(Coded(STORED[stored]), alternating=asked == "GPT-OSS")
    for name, values in ASKED[asked].items():
        if "bias" in name or "down" in name or ".w2." in name or "output" in name:
            continue
        turned = "gate_up_proj" in name
        assert view.is_coded(name, turned) and not view.is_coded(name, not turned), name
        code, order = view.coded(name, turned)
        rows = code.rows_RB if order is None else code.rows_RB[order]
        wanted = values.swapaxes(-1, -2) if turned else values
        np.testing.assert_array_equal(rows.view(np.float32), wanted.reshape(-1, D).astype(np.float32), err_msg=name)


@pytest.mark.parametrize(
    ("config", "model", "fields"),
    [
        ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", MOE | {"head_dim": 16}),
        ("GraniteMoeConfig", "GraniteMoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK),
    ],
)
def test_as_transformers_keeps_them(tmp_path, config, model, fields):
    """Saved in transformers 5's own layout, not the authors'."""
    transformers = pytest.importorskip("transformers")
    network = getattr(transformers, model)(getattr(transformers, config)(**BASE | fields))
    loaded = []
    for original in (True, False):
        folder = tmp_path / str(original)
        network.save_pretrained(folder, save_original_format=original)
        loaded.append(dict(parameters_of(load_model(resolve(str(folder)), progress=False).model)))
    assert (
        load_file(tmp_path / "True" / "model.safetensors").keys()
        != load_file(tmp_path / "False" / "model.safetensors").keys()
    )
    for path, parameter in loaded[0].items():
        np.testing.assert_array_equal(np.asarray(parameter[...]), np.asarray(loaded[1][path][...]), err_msg=path)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("model.layers.0.", "model.layers.0._checkpoint_wrapped_module."),
        lambda name: name.replace("model.", "model.text_model."),
        lambda name: name.replace("model.", "model.language_model."),
        lambda name: f"language_model.{name}",
        lambda name: name.replace("model.", "language_model."),
        lambda name: f"llm.{name}",
        lambda name: f"model.{name}",
    ],
)
def test_what_was_wrapped_around_a_network(tmp_path, rename):
    arrays = tensors(np.random.default_rng(0))
    (tmp_path / "config.json").write_text(json.dumps(HF))
    stray = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "model.rotary_emb.original_inv_freq": np.ones(2, np.float32),
        "model.layers.0.self_attn.k_scale": np.ones((), np.float32),
        "model.layers.0.self_attn.attn.v_scale": np.ones((), np.float32),
        "model.layers.0.self_attn.k_proj.k_scale": np.ones((), np.float32),
    }
    save_file({rename(name): array for name, array in (arrays | stray).items()}, tmp_path / "model.safetensors")
    model = load_model(resolve(str(tmp_path)), progress=False).model
    np.testing.assert_array_equal(model.embed.weight[...], arrays["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.layers[0].mlp.down.weight[...], arrays["model.layers.0.mlp.down_proj.weight"])
    np.testing.assert_array_equal(model.head.weight[...], arrays["lm_head.weight"])


def test_towers_of_other_senses_are_beside_the_network(tmp_path, caplog):
    arrays = {f"_orig_mod.{name}": array for name, array in tensors(np.random.default_rng(0)).items()}
    save_file(arrays | {"_orig_mod.visual.patch.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HF))
    load_model(resolve(str(tmp_path)), progress=False)
    assert "visual: not a part of the network" in caplog.text


def test_plain_names_stay():
    for name in ("model.layers.0.x", "lm_head.weight", "transformer.h.0.x", "encoder.layer.0.x", "layers.0.module.x"):
        assert canonical_name(name) == name


def test_an_index_with_folders(tmp_path):
    arrays = tensors(np.random.default_rng(0))
    (tmp_path / "shards").mkdir()
    save_file(arrays, tmp_path / "shards" / "one.safetensors")
    index = {"weight_map": dict.fromkeys(arrays, "shards/one.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(HF))
    model = load_model(resolve(str(tmp_path)), progress=False).model
    np.testing.assert_array_equal(model.embed.weight[...], arrays["model.embed_tokens.weight"])


def consolidated(arrays):
    """Mistral's names, and the rows of q and k in neighbouring pairs."""
    names = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.layers": "layers",
        "self_attn": "attention",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    } | {f"{part}_proj": f"w{part}" for part in "qkvo"}
    out = {}
    for name, array in arrays.items():
        for head, part in ((4, "q_proj"), (2, "k_proj")):
            if part in name:
                array = array.reshape(head, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        out[name] = array
    return out


PARAMS = {"dim": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 24, "vocab_size": 32, "norm_eps": 1e-5}
PARAMS |= {"rope_theta": 10000.0, "head_dim": 4, "max_seq_len": 131072}


@pytest.mark.parametrize("beside", [False, True])
def test_mistrals_own_layout(tmp_path, beside):
    arrays = tensors(np.random.default_rng(0))
    if beside:  # with a config.json, and the same weights in shards: those are read
        save_file(arrays, tmp_path / "model-00001-of-00001.safetensors")
        (tmp_path / "config.json").write_text(
            json.dumps(HF | {"architectures": ["MistralForCausalLM"], "sliding_window": None})
        )
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    save_file(consolidated(arrays), tmp_path / "consolidated.safetensors")
    loaded = load_model(resolve(str(tmp_path)), progress=False)
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(HF | {"architectures": ["MistralForCausalLM"], "sliding_window": None})
    )
    plain = load_model(resolve(str(tmp_path)), progress=False)
    assert loaded.config == plain.config
    for (path, one), (_, other) in zip(parameters_of(loaded.model), parameters_of(plain.model), strict=True):
        np.testing.assert_array_equal(np.asarray(one[...]), np.asarray(other[...]), err_msg=path)


def test_mistrals_float8(tmp_path):
    import ml_dtypes

    arrays = consolidated(tensors(np.random.default_rng(0)))
    packed, dense = {}, {}
    for name, array in arrays.items():
        base = name.removesuffix(".weight")
        if ".attention.w" in name or ".feed_forward.w" in name:
            packed |= {
                name: (array * 4).astype(ml_dtypes.float8_e4m3fn),
                f"{base}.qscale_weight": np.array(0.25, np.float32),
            }
            packed[f"{base}.qscale_act"] = np.array(1.0, np.float32)
            dense[name] = packed[name].astype(np.float32) * 0.25
        else:
            packed[name] = dense[name] = array
    loaded = []
    for folder, stored, said in (
        ("dense", dense, {}),
        ("packed", packed, {"quantization": {"qformat_weight": "fp8_e4m3"}}),
    ):
        (tmp_path / folder).mkdir()
        save_file(stored, tmp_path / folder / "consolidated.safetensors")
        (tmp_path / folder / "params.json").write_text(json.dumps(PARAMS | said))
        loaded.append(dict(parameters_of(load_model(resolve(str(tmp_path / folder)), progress=False).model)))
    for path, parameter in loaded[0].items():
        np.testing.assert_array_equal(np.asarray(parameter[...]), np.asarray(loaded[1][path][...]), err_msg=path)
