import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.config import ModelConfig, RopeConfig
from models.dummy import random_model
from models.layers import Build
from models.loading import orbax
from models.loading.load import load_model, resolve
from models.loading.opening import open_checkpoint
from models.parameters import parameters_of
from ops import native
from ops.linear import PackedInt8Weight

HF = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}


def tensors(rng) -> dict[str, np.ndarray]:
    layer = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16)}
    layer |= {
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16),
        "mlp.up_proj": (24, 16),
        "mlp.down_proj": (16, 24),
    }
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {f"model.layers.0.{n}_layernorm.weight": (16,) for n in ("input", "post_attention")}
    shapes |= {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "lm_head.weight": (32, 16)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tiny-llama").mkdir()
    save_file(tensors(np.random.default_rng(0)), tmp_path / "tiny-llama" / "model.safetensors")
    (tmp_path / "tiny-llama" / "config.json").write_text(json.dumps(HF))
    return tmp_path / "tiny-llama"


def change(directory, **changed):
    arrays = dict(load_file(directory / "model.safetensors"))
    for name, value in changed.items():
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value
    save_file(arrays, directory / "model.safetensors")


def load(directory, **options):
    return load_model(resolve(str(directory)), progress=False, **options)


def test_layouts(directory):
    loaded = load(directory)
    wanted = load_file(directory / "model.safetensors")
    assert loaded.model_id == "tiny-llama"
    assert loaded.generation_config == {"eos_token_id": 2}
    attention = loaded.model.layers[0].attn
    qkv = np.asarray(attention.qkv.weight[...]).reshape(2, 4, 4, 16)  # K, G + 2, h, D
    q, k = (wanted[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qk")
    np.testing.assert_array_equal(qkv[1, :2], q.reshape(2, 2, 4, 16)[1])
    np.testing.assert_array_equal(qkv[1, 2], k.reshape(2, 4, 16)[1])
    gate_up = np.asarray(loaded.model.layers[0].mlp.gate_up.weight[...])
    np.testing.assert_array_equal(gate_up[:24], wanted["model.layers.0.mlp.gate_proj.weight"])


def test_bfloat16_keeps_norms_in_float32(directory):
    parameters = dict(parameters_of(load(directory, dtype=jnp.bfloat16).model))
    assert parameters["layers.0.attn.out.weight"].dtype == jnp.bfloat16
    assert parameters["norm.scale"].dtype == jnp.float32


def test_quantized(directory):
    model = load(directory, quantization="int8").model
    down = model.layers[0].mlp.down.weight.get_value()
    assert not isinstance(down, jax.Array)
    assert down.shape == (16, 24)
    assert isinstance(model.embed.weight.get_value(), jax.Array)  # not tied: only the head is a matrix product
    assert model.head.weight.get_value().dtype == jnp.int8


def test_generation_config_wins(directory):
    (directory / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 7]}')
    assert load(directory).generation_config == {"temperature": 0.6, "eos_token_id": [2, 7]}


def test_a_bare_network(directory):
    """Embedding models are saved without a head, and without the name that the network has inside of one with a head."""
    whole = load(directory).model
    arrays = load_file(directory / "model.safetensors")
    del arrays["lm_head.weight"]
    save_file({name.removeprefix("model."): array for name, array in arrays.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(HF | {"architectures": ["LlamaModel"]}))
    bare = load(directory).model
    assert bare.head is None
    parameters = dict(parameters_of(whole))
    for path, parameter in parameters_of(bare):
        np.testing.assert_array_equal(np.asarray(parameter[...]), np.asarray(parameters[path][...]))


def rewrite_config(directory, **changed):
    (directory / "config.json").write_text(json.dumps(HF | changed))


def test_a_tied_head_with_other_values_is_used(directory, caplog):
    """As transformers 5 does, which warns too."""
    rewrite_config(directory, tie_word_embeddings=True)
    loaded = load(directory)
    np.testing.assert_array_equal(
        loaded.model.head.weight[...], load_file(directory / "model.safetensors")["lm_head.weight"]
    )
    assert "the head is used" in caplog.text


@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, {}])
def test_a_head_that_is_the_table_is_tied(directory, said, caplog):
    change(directory, **{"lm_head.weight": load_file(directory / "model.safetensors")["model.embed_tokens.weight"]})
    rewrite_config(directory, **said)
    assert load(directory).model.head is None
    assert not caplog.records


def test_tied_embeddings_saved_as_the_head_alone(directory):
    head = load_file(directory / "model.safetensors")["lm_head.weight"]
    change(directory, **{"model.embed_tokens.weight": None})
    rewrite_config(directory, tie_word_embeddings=True)
    loaded = load(directory)
    assert loaded.model.head is None
    np.testing.assert_array_equal(loaded.model.embed.weight[...], head)
    rewrite_config(directory, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"no tensor 'model\.embed_tokens\.weight'"):
        load(directory)


def test_missing_tensor_is_named(directory):
    change(directory, **{"model.layers.0.mlp.up_proj.weight": None})
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        load(directory)


def test_extra_tensor_is_named(directory):
    change(directory, **{"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)})
    with pytest.raises(ValueError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(directory)


def test_what_hangs_beside_the_network_is_left_out(directory, caplog):
    """A value head that training left there, in a shard that the index does not even mention it in."""
    change(directory, **{"v_head.summary.weight": np.zeros((1, 16), np.float32)})
    arrays = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    index = {"weight_map": dict.fromkeys((name for name in arrays if "v_head" not in name), "part.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": np.zeros(1, np.float32)}, directory / "consolidated.safetensors")  # of another format's copy
    load(directory)
    assert "v_head" in caplog.text


def test_wrong_shape_is_named(directory):
    change(directory, **{"model.norm.weight": np.zeros(17, np.float32)})
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has the shape \[17\]; .* \[16\]"):
        load(directory)


def test_tables_that_are_computed_are_ignored(directory):
    change(directory, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)})
    load(directory)


def test_unknown_architecture_is_named_with_what_is_supported(directory):
    (directory / "config.json").write_text(json.dumps(HF | {"architectures": ["NobodysForCausalLM"]}))
    with pytest.raises(ValueError, match=r"'NobodysForCausalLM' is not supported.*LlamaForCausalLM"):
        load(directory)


def test_incomplete_config(directory):
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' has the shape \[32, 16\]; .* \[32000, 4096\]"):
        load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load(directory)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": "LlamaForCausalLM"}, "no list of names"),
        ({"architectures": [5]}, "no list of names"),
        ({"quantization_config": "awq"}, "quantization_config that is no object"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "transform_config": [1]}},
            "transform_config that is",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "sparsity_config": "dense"}},
            "sparsity_config that is no object",
        ),
    ],
)
def test_fields_of_another_kind_are_told(directory, change, said):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        open_checkpoint(resolve(str(directory)))


def test_a_configuration_without_bottom_is_told(directory):
    (directory / "config.json").write_text('{"a":' * 50_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        open_checkpoint(resolve(str(directory)))


def test_more_layers_than_any_model_has(directory):
    llama4 = HF | {"architectures": ["Llama4ForCausalLM"], "num_hidden_layers": 10**18}  # its reader lists them
    (directory / "config.json").write_text(json.dumps(llama4))
    with pytest.raises(ValueError, match="10000 is the most"):
        load(directory)


@pytest.mark.parametrize("text", ["./no/such/file.gguf", "nothing", "./here"])
def test_no_such_model(text):
    with pytest.raises(ValueError, match="no such file or directory"):
        resolve(text)


def test_what_is_not_a_model(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"hello")
    with pytest.raises(ValueError, match="not a GGUF file"):
        resolve(str(tmp_path / "x.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither"):
        resolve(str(tmp_path / "empty"))


def test_orbax_round_trip(directory, tmp_path):
    source = resolve(str(directory))
    loaded, opened = load_model(source, progress=False), open_checkpoint(source)
    (directory / "tokenizer.json").write_text("{}")
    orbax.save(
        tmp_path / "saved",
        dict(parameters_of(loaded.model)),
        model_id=loaded.model_id,
        hf_config=opened.hf_config,
        generation_config=loaded.generation_config,
        tokenizer_from=directory,
    )
    again = load(tmp_path / "saved")
    assert (again.model_id, again.generation_config, again.config) == ("tiny-llama", {"eos_token_id": 2}, loaded.config)
    for (path, ours), (_, theirs) in zip(parameters_of(again.model), parameters_of(loaded.model), strict=True):
        np.testing.assert_array_equal(np.asarray(ours[...]), np.asarray(theirs[...]), err_msg=path)
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="exists already"):
        orbax.save(tmp_path / "saved", {}, model_id="", hf_config={}, generation_config={})
    config = json.loads((tmp_path / "saved" / "config.json").read_text()) | {"intermediate_size": 48}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp"):
        load(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "arrays")


def test_random_model():
    config = ModelConfig("LlamaForCausalLM", 32, 1, 16, 24, 4, 2, 4, 64, 1e-5, rope=RopeConfig(10000.0, 4))
    model = random_model(config, Build(dtype=jnp.bfloat16))
    assert all(isinstance(parameter.get_value(), jax.Array) for _, parameter in parameters_of(model))
    assert float(model.norm.scale[0]) == 1.0


@pytest.mark.parametrize("mesh", [None, "data=1,model=1"])
def test_one_cpu_device_takes_the_hosts_memory_over(directory, mesh, monkeypatch):
    """No copy on the way from the buffer that is filled to the device's array, with a mesh of one device or without."""
    from models.loading import load
    from ops import buffers
    from sharding.mesh import make_mesh

    filled = {}

    def owned(array, dtype):
        out = buffers.owned(array, dtype)
        filled[out.ctypes.data] = out
        return out

    monkeypatch.setattr(load, "owned", owned)
    devices = None if mesh is None else make_mesh(mesh)
    for dtype in ("float32", "bfloat16"):
        model = load_model(resolve(str(directory)), dtype=dtype, mesh=devices, progress=False).model
        for path, parameter in parameters_of(model):
            pointer = parameter.get_value().unsafe_buffer_pointer()
            assert pointer in filled, path
            assert pointer % buffers.ALIGNMENT == 0


@pytest.mark.skipif(not native.available(), reason="no native kernels")
@pytest.mark.parametrize("mesh", [None, "data=1,model=1"])
def test_int8_is_packed_on_the_way(directory, mesh, monkeypatch):
    from models.loading import load
    from sharding.mesh import make_mesh

    monkeypatch.setattr(load, "quantize", None)  # nothing is left for the device to do
    devices = None if mesh is None else make_mesh(mesh)
    model = load_model(resolve(str(directory)), mesh=devices, quantization="int8", progress=False).model
    assert isinstance(model.layers[0].attn.qkv.weight.get_value(), PackedInt8Weight)
    assert isinstance(model.head.weight.get_value(), PackedInt8Weight)
