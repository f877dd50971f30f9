"""Parameters that stay as the checkpoint stores them, against the same recipe over dequantized values."""

from __future__ import annotations

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from models import registry
from models.layers import Build, weight
from models.loading.coded import coded, count_coded
from models.loading.gguf.checkpoint import GGUFCheckpoint, half_split_rows
from models.loading.gguf.file import GGUFFile
from models.loading.load import fill
from models.parameters import finer, parameters_of, quantizable, rounded_by
from models.recipes import Piece, Stack, deal, one
from ops import native
from ops.linear import Int8Weight
from ops.linear.weights.block_pack import GGUF, CodedRows
from ops.linear.weights.blocks import BlockWeight

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())
I = 256


class Stored:
    """Tensors of one GGUF type each; those in `order` with their rows permuted, as GGUF's converter leaves q and k."""

    def __init__(self, kinds: dict[str, tuple[str, int]], order: dict[str, int] | None = None):
        self.order, self.codes, self.values = order or {}, {}, {}
        for seed, (name, (kind, rows)) in enumerate(kinds.items()):
            number = gguf.GGMLQuantizationType[kind]
            dense = np.random.default_rng(seed).normal(size=(rows, I)).astype(np.float32)
            blocks = gguf.quants.quantize(dense, number)
            self.codes[name] = CodedRows(GGUF[number.value][1], I, blocks, number.value)
            self.values[name] = gguf.quants.dequantize(blocks, number)
            if name in self.order:
                self.values[name] = half_split_rows(self.values[name], self.order[name])

    def coded(self, name: str, turned: bool = False) -> tuple[CodedRows, np.ndarray | None] | None:
        if not self.is_coded(name, turned):
            return None
        rows = len(self.codes[name].rows_RB)
        return self.codes[name], half_split_rows(np.arange(rows), self.order[name]) if name in self.order else None

    def is_coded(self, name: str, turned: bool = False) -> bool:
        return name in self.codes and not turned


def parameter(rows: int, **metadata: object):
    return weight((rows, I), jnp.float32, (None, None), **metadata)


def test_heads_of_several_types():
    checkpoint = Stored({"q": ("Q4_0", 128), "k": ("Q4_0", 32), "v": ("Q8_0", 32)}, {"q": 4, "k": 2})
    recipe = deal(2, Piece("q", (128, I)), Piece("k", (32, I)), Piece("v", (32, I)))
    made = coded(recipe, parameter(192), checkpoint)
    assert made is not None and [stretch.panels for stretch in made.stretches] == [5, 1, 5, 1]
    np.testing.assert_array_equal(made.dequantize(), recipe.make(checkpoint.values.__getitem__))


def test_rows_of_one_type_may_meet_within_a_panel():
    checkpoint = Stored({"a": ("Q5_1", 24), "b": ("Q5_1", 8)})
    recipe = deal(4, Piece("a", (24, I)), Piece("b", (8, I)))
    made = coded(recipe, parameter(32), checkpoint)
    assert made is not None
    np.testing.assert_array_equal(made.dequantize(), recipe.make(checkpoint.values.__getitem__))


def test_what_goes_by_way_of_floats():
    checkpoint = Stored({"a": ("Q4_0", 24), "b": ("Q8_0", 8)})
    a, b = Piece("a", (24, I)), Piece("b", (8, I))
    assert coded(deal(1, a, b), parameter(32), checkpoint) is None, "a panel of two types"
    assert coded(one("a", 24, I, turned=True), parameter(24), checkpoint) is None
    assert coded(one("a", 24, I, assemble=lambda array: array), parameter(24), checkpoint) is None
    assert coded(Piece("c", (24, I)), parameter(24), checkpoint) is None, "not stored in blocks"
    assert coded(a, parameter(24, spread=object()), checkpoint) is None
    stack = weight((2, 24, I), jnp.float32, (None, None, None))
    assert coded(Stack((a, a)), stack, checkpoint) is None, "experts that are no whole panels"
    assert coded(a, parameter(24), object()) is None


def test_a_stack_of_experts():
    """As one matrix, gates and ups in turn; sorted inputs go by way of floats."""
    names = [f"{e}.{part}" for e in range(3) for part in ("gate", "up")]
    checkpoint = Stored(dict.fromkeys(names, ("Q4_0", 16)))
    recipe = Stack(tuple(deal(1, *(Piece(f"{e}.{part}", (16, I)) for part in ("gate", "up"))) for e in range(3)))
    stack = weight((3, 32, I), jnp.float32, (None, None, None), blocks=True)
    made = coded(recipe, stack, checkpoint)
    assert made is not None and made.shape == (96, I)
    np.testing.assert_array_equal(made.dequantize(), recipe.make(checkpoint.values.__getitem__).reshape(96, I))
    checkpoint.codes = {
        name: dataclasses.replace(code, order_I=np.arange(I)[::-1]) for name, code in checkpoint.codes.items()
    }
    assert coded(recipe, stack, checkpoint) is None


def test_experts_of_a_gguf_file(tmp_path):
    """All of a layer's lie in one tensor, of which each piece is an expert's rows."""
    path, kind = tmp_path / "moe.gguf", gguf.GGMLQuantizationType.Q8_0
    writer, dense = gguf.GGUFWriter(path, "qwen3moe"), np.random.default_rng(0).normal(size=(3, 16, 64))
    blocks = gguf.quants.quantize(dense.astype(np.float32), kind)
    writer.add_tensor("blk.0.ffn_gate_exps.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GGUFCheckpoint(GGUFFile(path), "qwen3moe", 1, None)
    name = "model.layers.0.mlp.experts.2.gate_proj.weight"
    found = checkpoint.coded(name)
    assert checkpoint.is_coded(name) and not checkpoint.is_coded(name.replace(".2.", ".3."))
    assert found is not None and found[1] is None and found[0].rows_RB.shape == (16, 68)
    np.testing.assert_array_equal(gguf.quants.dequantize(found[0].rows_RB, kind), checkpoint.read(name))


def test_a_damaged_tensor_is_named():
    checkpoint = Stored({"a": ("Q4_0", 16)})
    checkpoint.codes["a"].rows_RB[5, :2] = (0, 0x7E)
    with pytest.raises(ValueError, match=r"a: a block's scale is not a finite number"):
        coded(Piece("a", (16, I)), parameter(16), checkpoint)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of one layer, 64 wide, 4 query and 2 key heads of 16, with a head of its own, as a GGUF file in Q8_0."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    shapes = {"token_embd": (48, 64), "output": (48, 64), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64)}
    shapes |= {"blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_down": (64, 96)}
    shapes |= {"blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64)}
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFCheckpoint(GGUFFile(path), "llama", 1, (4, 2))


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 48, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def tiny(**fields):
    family, build = registry.find("LlamaForCausalLM"), Build(max_model_len=64)
    return family.build(family.config(CONFIG | fields), build), build


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_what_four_bits_would_cost_most_gets_six(kv_heads):
    """The head, products back from the hidden width in some layers, and v: the last rows of each of its heads'."""
    found = finer(tiny(num_hidden_layers=8, num_key_value_heads=kv_heads)[0])
    queries = 4 // kv_heads
    rows = {name: at for name, at in found.items() if "qkv" in name}
    assert set(rows.values()) == {((queries + 2) * 16, (queries + 1) * 16)}
    assert [int(name.split(".")[1]) for name in rows] == ([0, 3, 7] if kv_heads > 1 else [*range(8)])
    rest = {"head.weight", *(f"layers.{layer}.mlp.down.weight" for layer in (0, 3, 7))}
    assert {name for name, at in found.items() if at == (1, 0)} == rest
    tied = tiny(tie_word_embeddings=True)[0]
    assert finer(tied)["embed.weight"] == (1, 0) and "embed.weight" not in finer(tiny()[0])
    assert rounded_by(tiny()[0], "int4") - rounded_by(tiny()[0], "int8") == {"embed.weight"}


def test_what_stays_as_it_is_stored_is_counted(llama, monkeypatch):
    """Of headers alone; where less than half would stay, none counts."""
    model, _ = tiny()
    paths = set(quantizable(model))
    sizes = [int(np.prod(parameter.shape)) for path, parameter in parameters_of(model) if path in paths]
    assert count_coded(model, llama) == sum(sizes) > 0
    assert count_coded(model, object()) == 0
    for name, left in (
        ("ffn_down", sum(sizes) - 64 * 96),
        ("ffn_up", 0),
    ):  # with gates, whose rows are of one parameter
        halves = dataclasses.replace(llama.file.tensors[f"blk.0.{name}.weight"], kind=gguf.GGMLQuantizationType.F16)
        monkeypatch.setitem(llama.file.tensors, f"blk.0.{name}.weight", halves)
        assert count_coded(model, llama) == left


@pytest.mark.parametrize("scheme", ["int4", "stored"])
def test_without_kernels_blocks_become_int8(llama, scheme, monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "turned off"))
    model, build = tiny()
    fill(model, llama, build, quantization=scheme, progress=False)
    values = {path: parameter.get_value() for path, parameter in parameters_of(model)}
    assert all(isinstance(values[path], Int8Weight) for path in rounded_by(model, scheme))
    assert not any(isinstance(value, BlockWeight) for value in values.values())


@pytest.mark.parametrize("scheme", ["int8", "int4", "stored"])
def test_a_whole_model(llama, scheme):
    """int4 keeps all of it, int8 the table, which is only looked up."""
    model, build = tiny()
    fill(model, llama, build, quantization=scheme, progress=False)
    values = {path: parameter.get_value() for path, parameter in parameters_of(model)}
    blocks = {path for path, value in values.items() if isinstance(value, BlockWeight)}
    assert "embed.weight" in blocks
    assert blocks == ({path for path in values if path.endswith("weight")} if scheme != "int8" else {"embed.weight"})
    recipes = model.recipes()
    for path in blocks:
        np.testing.assert_array_equal(values[path].dequantize(), recipes[path].make(llama.read), err_msg=path)
