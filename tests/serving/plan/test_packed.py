"""What a plan takes a packed checkpoint for, by its configuration alone."""

from __future__ import annotations

import pytest

from ops.linear.weights.group_pack import Packing
from serving.plan.packed import packing_of

FLOAT8 = "float8_e4m3fn"


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, Packing(4, 128, offsets=True)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, Packing(4, 128)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False}, Packing(8, 0, offsets=True)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Packing(8, 128, values=FLOAT8)),
        ({"quant_method": "fp8"}, Packing(8, 0, values=FLOAT8)),
        ({"quant_method": "mxfp4"}, Packing(4, 32, scale="bfloat16", table=True, experts=True)),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, Packing(4, 16, table=True)),
        (
            {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": False}}}},
            Packing(4, 32, offsets=True),
        ),
        ({"quant_method": "torchao"}, None),
        ({}, None),
    ],
)
def test_what_is_said(said, wanted):
    assert packing_of({"quantization_config": said}) == wanted


def test_weights_without_values():
    """The same arrays as those of a weight with them."""
    made = Packing(4, 128, offsets=True).like((256, 1024), "tpu", 1)
    assert made is not None and made.shape == (256, 1024)
    assert (made.values.shape, made.values.dtype) == ((512, 256), "int8")
    assert made.offset is not None and made.scale.shape == made.offset.shape == (8, 256)
    rows = Packing(8, 0, values=FLOAT8).like((256, 1024), "gpu", 2)
    assert rows is not None and rows.scale.shape == (2, 256)  # each device has a scale of its own part
    assert Packing(4, 128).like((256, 1000), "tpu", 1) is None
