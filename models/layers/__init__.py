"""The parts that models are built from. Weights are `[out, in]`; parameters carry the logical axes they shard by.

Modules are constructed abstractly: a parameter starts as a `jax.ShapeDtypeStruct`, and a loader puts the array there.
`recipes(name)` says from which checkpoint tensors, `name` being the module's in Hugging Face's naming.
"""

from models.layers.attention import Attention, attention_of, heads_of
from models.layers.build import Build, Weight, child_recipes, weight
from models.layers.embedding import Embedding
from models.layers.layer import Layer
from models.layers.linear import Linear
from models.layers.mlp import MLP, GatedMLP, mlp_of
from models.layers.norms import LayerNorm, Norm, RMSNorm, taken
from models.layers.rotary import layer_frequencies

__all__ = [
    "MLP",
    "Attention",
    "Build",
    "Embedding",
    "GatedMLP",
    "Layer",
    "LayerNorm",
    "Linear",
    "Norm",
    "RMSNorm",
    "Weight",
    "attention_of",
    "child_recipes",
    "heads_of",
    "layer_frequencies",
    "mlp_of",
    "taken",
    "weight",
]
