"""What a float model loses in few bits, beside llama.cpp's own rounding:
`python scripts/compare_rounding.py --text FILE --model FILE --ggml LIBRARY [--schemes int4 q4_k_m int8]`.

Takes any Llama- or Qwen2-shaped checkpoint, a quantized one too. Its channels are put in another order first, which changes nothing
of what it computes, and leaves no block of the file a block: so a model in four bits, as packages have them, is a float model like
any other, with real weights. For each scheme: bits of a weight, the mean over positions of KL(float32 || scheme) in 1e-3 nats,
how much perplexity rises, and how often the likeliest token is the same; products and rounded activations as the server has them.

`q4_k_m` is llama.cpp's: its quantizers (any shared library that exports `ggml_quantize_chunk`, llama.cpp's own or a package's) and
its rule for which tensors get Q6_K. Rows that are no multiple of 256 are padded, where llama.cpp itself would take larger types.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.perplexity import log_probabilities

HALF_OF_THE_LAYERS = ("v_proj", "down_proj")  # that Q4_K_M has in Q6_K


class View:
    """A `Checkpoint` seen otherwise."""

    def __init__(self, inner: Any):
        self.inner = inner

    @property
    def own_names(self) -> Collection[str]:
        return self.inner.own_names

    def canonical(self, name: str) -> str:
        return self.inner.canonical(name)

    def locate(self, name: str) -> str | None:
        return self.inner.locate(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(name)

    def release(self, name: str) -> None:
        self.inner.release(name)

    def read(self, name: str) -> np.ndarray:
        return self.inner.read(name)


class Reordered(View):
    """The same function with residual channels, hidden units, heads and the channels of v in another order; in float32."""

    def __init__(self, inner: Any, hf: Mapping[str, Any]):
        super().__init__(inner)
        rng = np.random.default_rng(0)
        D, F, layers = hf["hidden_size"], hf["intermediate_size"], hf["num_hidden_layers"]
        H, K = hf["num_attention_heads"], hf.get("num_key_value_heads") or hf["num_attention_heads"]
        h = hf.get("head_dim") or D // H
        self.residual, self.orders = rng.permutation(D), []
        for _ in range(layers):
            heads, queries, hidden = rng.permutation(K), rng.permutation(H // K), rng.permutation(F)
            within = np.stack([rng.permutation(h) for _ in range(K)])
            of_q = (heads[:, None] * (H // K) + queries).reshape(-1, 1) * h
            orders = {"q_proj": of_q + np.arange(h), "k_proj": heads[:, None] * h + np.arange(h)}
            orders |= {"v_proj": heads[:, None] * h + within, "o_proj": of_q + np.repeat(within, H // K, axis=0)}
            orders = {name: order.reshape(-1) for name, order in orders.items()}
            self.orders.append(orders | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden))

    def read(self, name: str) -> np.ndarray:
        array = np.asarray(self.inner.read(name), np.float32)
        part = re.match(r"model\.layers\.(\d+)\.\w+\.(\w+_proj)\.(weight|bias)$", name)
        if part is None:
            return np.ascontiguousarray(array[..., self.residual])
        order = self.orders[int(part[1])][part[2]]
        if part[2] in ("o_proj", "down_proj"):
            return np.ascontiguousarray(array[self.residual][:, order] if part[3] == "weight" else array[self.residual])
        return np.ascontiguousarray(array[order][:, self.residual] if part[3] == "weight" else array[order])


class KQuants(View):
    """Every matrix in Q4_K or Q6_K, as llama.cpp rounds it."""

    def __init__(self, inner: Any, hf: Mapping[str, Any], library: Path):
        super().__init__(inner)
        # Names that the library needs of Python, if it is a module, are in this process.
        self._quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._layers = hf["num_hidden_layers"]
        self._head = "model.embed_tokens.weight" if hf.get("tie_word_embeddings") else "lm_head.weight"

    def _is_six(self, name: str) -> bool:
        part = re.match(r"model\.layers\.(\d+)\.\w+\.(\w+)\.weight$", name)
        if part is None:
            return name == self._head
        layer, eighth = int(part[1]), self._layers // 8
        more = layer < eighth or layer >= 7 * self._layers // 8 or (layer - eighth) % 3 == 2
        return more and part[2] in HALF_OF_THE_LAYERS

    def is_coded(self, name: str, turned: bool = False) -> bool:
        return len(self.shape(name)) == 2 and not turned

    def coded(self, name: str, turned: bool = False) -> Any:
        from ops.linear.weights.block_pack import GGUF, SIZES, CodedRows

        if not self.is_coded(name, turned):
            return None
        kind = 14 if self._is_six(name) else 12
        (block, size), (O, I) = SIZES[kind], self.shape(name)
        x_OI = np.pad(self.read(name), ((0, 0), (0, -I % block)))
        rows_RB = np.empty((O, x_OI.shape[1] // block * size), np.uint8)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (x_OI, rows_RB))
        sizes = (ctypes.c_int64(n) for n in (0, O, x_OI.shape[1]))
        if self._quantize(ctypes.c_int(kind), *pointers, *sizes, None) != rows_RB.nbytes:
            raise ValueError(f"the library rounds {name} to another number of bytes than GGUF has.")
        return CodedRows(GGUF[kind][1], I, rows_RB, kind), None


def bits_of(model: Any) -> float:
    """Bits of a weight, over all matrices."""
    import jax

    from models.parameters import parameters_of

    values, used = 0, 0
    for _, parameter in parameters_of(model):
        value = parameter.get_value()
        if len(value.shape) > 1:
            values += math.prod(value.shape)
            used += sum(leaf.nbytes for leaf in jax.tree.leaves(value))
    return 8 * used / values


def compare(
    wanted: list[tuple[list[int], np.ndarray]], model: Any, tokens: list[int], context: int
) -> dict[str, float]:
    """A model's predictions against those of another, which are kept."""
    nats, same, risen, count = [], 0, 0.0, 0
    for (piece, wanted_TV), (_, got) in zip(wanted, log_probabilities(model, tokens, context), strict=True):
        n = len(piece) - 1
        got_TV, after = np.asarray(got[:n]), (np.arange(n), np.asarray(piece[1:]))
        nats.append((np.exp(wanted_TV) * (wanted_TV - got_TV)).sum(-1))
        same += int((wanted_TV.argmax(-1) == got_TV.argmax(-1)).sum())
        risen += float((wanted_TV[after] - got_TV[after]).sum())
        count += n
    nats_T = np.concatenate(nats)
    return {
        "nats_1e-3": 1e3 * float(nats_T.mean()),
        "standard_error": 1e3 * float(nats_T.std()) / count**0.5,
        "median_1e-3": 1e3 * float(np.median(nats_T)),
        "perplexity_percent": 100 * (math.exp(risen / count) - 1),
        "agreement": same / count,
    }


def main() -> None:
    """Command line; prints one JSON object a scheme."""
    from models.loading.load import load_model, resolve
    from models.loading.opening import open_checkpoint
    from serving.boot.startup import load_text_side

    parser = argparse.ArgumentParser(prog="scripts/compare_rounding.py", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--model", required=True, help="GGUF file, directory or hub id")
    parser.add_argument("--ggml", type=Path, help="a shared library that exports ggml_quantize_chunk; for q4_k_m")
    parser.add_argument("--schemes", nargs="+", default=["int4", "int8"], choices=("int4", "int8", "q4_k_m"))
    parser.add_argument("--context", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="read at most this many tokens (default: 1024)")
    arguments = parser.parse_args()
    if "q4_k_m" in arguments.schemes and arguments.ggml is None:
        parser.error("q4_k_m needs --ggml.")
    try:
        source = resolve(arguments.model)
        opened = open_checkpoint(source)
        text = arguments.text.read_text(encoding="utf-8")
        tokens = load_text_side(source).tokenizer.encode(text)[: arguments.max_tokens]
        plain: Any = Reordered(opened.checkpoint, opened.hf_config)

        def load(checkpoint: Any, scheme: str | None) -> Any:
            seen = dataclasses.replace(opened, checkpoint=checkpoint)
            length = {"dtype": "float32", "max_model_len": arguments.context}
            return load_model(source, opened=seen, quantization=scheme, progress=False, **length).model

        windows = log_probabilities(load(plain, None), tokens, arguments.context)
        wanted = [(piece, np.asarray(logprob_TV[: len(piece) - 1])) for piece, logprob_TV in windows]
        for scheme in arguments.schemes:
            by_llama_cpp = scheme == "q4_k_m"
            checkpoint = KQuants(plain, opened.hf_config, arguments.ggml) if by_llama_cpp else plain
            model = load(checkpoint, "int4" if by_llama_cpp else scheme)
            found = compare(wanted, model, tokens, arguments.context)
            print(json.dumps({"scheme": scheme, "bits": bits_of(model)} | found), flush=True)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
