"""Which body of each op runs on which platform, read out of the ops' own lists: `python scripts/platforms.py` writes
docs/platforms.md.

What bodies there are, and for which instruction sets the native ones are compiled, the code says. What no list can say, how a body
has been seen to work, is `SEEN`; a body without an entry, or an entry without a body, is an error.
"""

from __future__ import annotations

import pathlib
import re
import sys
from typing import get_args

REPO = pathlib.Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "platforms.md"
sys.path.insert(0, str(REPO))

PLATFORMS = ("CPU", "NVIDIA GPU", "AMD GPU", "TPU")
NATIVE = {
    "attention": "attention_step.cc", "recurrent": "recurrent.cc", "int8": "int8_generic.cc", "blocks": "blocks/blocks_generic.cc",
    "lora": "lora.cc", "sampling": "sampling.cc",
}  # fmt: skip
"""The files of ops/native in which a kernel is chosen by the instruction set."""
ISAS = {"kBf16": "AVX-512 bf16", "kVnni": "AVX-512 VNNI", "kAvx512": "AVX-512", "kAvx2": "AVX2"}

RUNS, COMPILED, LOWERED, PLAIN = "runs", "compiled", "lowered", "XLA"
"""Tests run it there; a compiler for that platform takes it, on a machine without one; JAX lowers it, and no compiler has seen it;
plain XLA, which JAX has for every platform."""

SEEN: dict[str, dict[str, dict[str, str]]] = {
    "attention over pages": {
        "native": {"CPU": RUNS},
        "pallas_gpu": {"NVIDIA GPU": COMPILED, "AMD GPU": LOWERED},
        "pallas_tpu": {"TPU": COMPILED},
        "xla": {"CPU": RUNS, "NVIDIA GPU": PLAIN, "AMD GPU": PLAIN, "TPU": PLAIN},
    },
    "recurrent layers": {
        "native": {"CPU": RUNS},
        "xla": {"CPU": RUNS, "NVIDIA GPU": PLAIN, "AMD GPU": PLAIN, "TPU": PLAIN},
    },
    "sampling": {
        "native": {"CPU": RUNS},
        "xla": {"CPU": RUNS, "NVIDIA GPU": PLAIN, "AMD GPU": PLAIN, "TPU": PLAIN},
    },
    "products": {
        "DenseWeight": {"CPU": RUNS, "NVIDIA GPU": PLAIN, "AMD GPU": PLAIN, "TPU": PLAIN},
        "Int8Weight": {"CPU": RUNS, "NVIDIA GPU": PLAIN, "AMD GPU": PLAIN, "TPU": PLAIN},
        "PackedInt8Weight": {"CPU": RUNS},
        "BlockWeight": {"CPU": RUNS},
        "GroupedWeight, pallas_tpu": {"TPU": COMPILED},
        "GroupedWeight, pallas_gpu": {"NVIDIA GPU": COMPILED, "AMD GPU": LOWERED},
        "GroupedWeight, xla": {"CPU": RUNS, "NVIDIA GPU": PLAIN, "AMD GPU": PLAIN, "TPU": PLAIN},
    },
    "adapters beside products": {
        "native": {"CPU": RUNS},
        "xla": {"CPU": RUNS, "NVIDIA GPU": PLAIN, "AMD GPU": PLAIN, "TPU": PLAIN},
    },
}
KERNELS = {
    ("attention over pages", "native"): "attention",
    ("recurrent layers", "native"): "recurrent",
    ("sampling", "native"): "sampling",
    ("products", "PackedInt8Weight"): "int8",
    ("products", "BlockWeight"): "blocks",
    ("adapters beside products", "native"): "lora",
}
"""Which kernels a native body is made of."""


def bodies() -> dict[str, list[str]]:
    """The bodies of each op, best first, as the ops list them."""
    from ops import paged_attention, recurrent, sampling
    from ops.linear.weights import DenseWeight, grouped
    from ops.linear.weights.plain import KINDS

    return {
        "attention over pages": list(paged_attention.BACKENDS),
        "recurrent layers": list(recurrent.BACKENDS),
        "sampling": list(get_args(sampling.Body)),
        "products": [
            DenseWeight.__name__,
            *(kind.__name__ for kind in KINDS.values()),
            *(f"{grouped.GroupedWeight.__name__}, {body}" for body in grouped.BODIES),
        ],
        "adapters beside products": ["native", "xla"],
    }


def levels(kernels: str) -> list[str]:
    """Instruction sets that kernels are compiled for, best first; "any CPU" last."""
    text = (REPO / "ops" / "native" / NATIVE[kernels]).read_text(encoding="utf-8")
    found = [ISAS[name] for name in re.findall(r"isa\(\) >= Isa::(\w+)", text)]
    if not found:
        raise ValueError(f"{NATIVE[kernels]} chooses no kernels by the instruction set any more.")
    return [*dict.fromkeys(found), "any CPU"]


def rows() -> list[tuple[str, str, str, str, str, str]]:
    """(op, body, how on each platform).

    Raises:
        ValueError: a body that nothing is known of, or something known of a body that there is not.
    """
    out = []
    listed = bodies()
    if listed.keys() != SEEN.keys():
        raise ValueError(f"ops without an entry, or the other way round: {sorted(listed.keys() ^ SEEN.keys())}.")
    for op, names in listed.items():
        if set(names) != SEEN[op].keys():
            raise ValueError(
                f"{op}: bodies without an entry, or the other way round: {sorted(set(names) ^ SEEN[op].keys())}."
            )
        for name in names:
            how = dict(SEEN[op][name])
            if (op, name) in KERNELS:
                how["CPU"] += f" ({', '.join(levels(KERNELS[op, name]))})"
            out.append((op, name, *(how.get(platform, "–") for platform in PLATFORMS)))
    return out


def page() -> str:
    """docs/platforms.md."""
    lines = [
        "# What runs where",
        "",
        "Written by `python scripts/platforms.py` from the ops' own lists; a test holds the two together.",
        "",
        "Of an op's bodies the first one that can runs; plain XLA is always under them, so every model runs on every platform",
        "that JAX has. **Runs**: tests run it there, at each instruction set that the machine has. **Compiled**: the platform's",
        "compiler takes it on a machine without one (A100 and H200, `tests/ops/test_pallas_gpu_lowered.py`; v5e, v5p and v6e,",
        "`tests/ops/test_pallas_tpu_compiled.py`), and interpreted on a CPU it gives the right numbers. **Lowered**: JAX makes",
        "that platform's code of it, which nothing has compiled or run. **XLA**: JAX's own operations, for every platform alike.",
        "",
        f"| op | body | {' | '.join(PLATFORMS)} |",
        f"|---|---|{'---|' * len(PLATFORMS)}",
        *(f"| {op} | `{name}` | {' | '.join(how)} |" for op, name, *how in rows()),
        "",
        "A CPU without a C++ compiler, or with `JAXSERVE_NATIVE=0`, and meshes of CPUs have the XLA bodies alone; what a",
        "checkpoint has in blocks becomes int8 there. On GPUs and TPUs it is a `GroupedWeight`, and so are float8 weights with",
        "scales: an integer or a small float a value with the checkpoint's own scales, on meshes too. Norms, rotary embeddings",
        "and activations are XLA's everywhere, and so are experts on accelerators, which are written out for a step's products.",
        "",
        "AMD GPUs: the extra `rocm` takes JAX's ROCm plugin. No part of it has been run on one.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
