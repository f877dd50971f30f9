"""Perplexity of a model on a text file: `python scripts/perplexity.py --text FILE [--model ...] [--dtype ...]`.

The text is cut into windows of `--context` tokens; each token is predicted from those before it in its window. With
`--reference` the same windows also go through transformers (needs torch) in float32, and the ratio is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def perplexity(model: Any, tokens: list[int], context: int, kv_dtype: Any = None) -> float:
    """exp of the mean negative log-likelihood, in nats, of every token but each window's first.

    Args:
        model: a `models.api.CausalLM`.
        tokens: at least two ids.
        context: tokens a window.
        kv_dtype: of the pages; None for float32.
    Raises:
        ValueError: too few tokens, or a context below 2.
    """
    total, predicted = 0.0, 0
    for piece, logprob_TV in log_probabilities(model, tokens, context, kv_dtype):
        chosen_T = np.asarray(logprob_TV[np.arange(len(piece) - 1), np.asarray(piece[1:])], np.float64)
        total -= float(chosen_T.sum())
        predicted += len(piece) - 1
    return math.exp(total / predicted)


def log_probabilities(
    model: Any, tokens: list[int], context: int, kv_dtype: Any = None
) -> Iterator[tuple[list[int], Any]]:
    """(the window's tokens, logprob_TV float32) of one window after the other: row t is of the token behind token t.

    Rows behind the window's last token hold anything. Arguments and errors are those of `perplexity`.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from models.api import Step
    from ops.paged_attention import Q_BLOCK, AttentionBatch, allocate

    if len(tokens) < 2 or context < 2:
        raise ValueError(f"perplexity needs at least two tokens and a context of two; got {len(tokens)} and {context}.")
    page, padded = 16, -(-context // Q_BLOCK) * Q_BLOCK
    pages = -(-padded // page)
    graphdef, state = nnx.split(model)
    kv = tuple(allocate(spec, pages + 1, page, kv_dtype or jnp.float32) for spec in model.kv_specs())

    @jax.jit
    def window(state, tokens_T, count, kv):
        position_T = jnp.arange(padded, dtype=jnp.int32)
        real_T = position_T < count
        one = {"chunk_start_R": jnp.zeros(1, jnp.int32), "chunk_qlen_R": count[None], "chunk_len_R": count[None]}
        batch = AttentionBatch(
            kv_index_T=jnp.where(real_T, position_T + page, 0),
            decode_pages_BP=jnp.zeros((0, pages), jnp.int32),
            decode_len_B=jnp.zeros(0, jnp.int32),
            chunk_pages_RP=1 + jnp.arange(pages, dtype=jnp.int32)[None],
            chunk_row_N=jnp.where(position_T[::Q_BLOCK] < count, 0, 1),
            **one,
        )
        merged = nnx.merge(graphdef, state)
        result = merged.forward(Step(tokens_T, jnp.where(real_T, position_T, 0), batch), kv)
        logprob_TV = jax.nn.log_softmax(merged.logits(result.hidden_TD))
        return logprob_TV, result.cache

    for start in range(0, len(tokens), context):
        piece = tokens[start : start + context]
        if len(piece) < 2:
            break
        row = np.zeros(padded, np.int32)
        row[: len(piece)] = piece
        logprob_TV, kv = window(state, row, np.int32(len(piece)), kv)
        yield piece, logprob_TV


def reference(source: Any, tokens: list[int], context: int) -> float:
    """The same by transformers, in float32 on CPU."""
    import torch
    import transformers

    where: dict[str, Any] = {"gguf_file": source.path.name} if source.kind == "gguf" else {}
    folder = source.path.parent if where else source.path
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
    total, predicted = 0.0, 0
    for start in range(0, len(tokens), context):
        piece = torch.tensor([tokens[start : start + context]])
        if piece.shape[1] < 2:
            break
        with torch.no_grad():
            logits = model(piece).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum"))
        predicted += piece.shape[1] - 1
    return math.exp(total / predicted)


def main() -> None:
    """Command line; prints one JSON object."""
    from models.loading.load import load_model, resolve
    from serving.boot.startup import load_text_side

    parser = argparse.ArgumentParser(prog="scripts/perplexity.py", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--model", help="GGUF file, directory or hub id; default: the default model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: float32")
    parser.add_argument("--quantization", help="a scheme of the server's --quantization")
    parser.add_argument("--kv-cache-dtype", help="of the pages, a dtype of the server's flag (default: --dtype's)")
    parser.add_argument("--context", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--max-tokens", type=int, default=8192, help="read at most this many tokens (default: 8192)")
    parser.add_argument("--reference", action="store_true", help="compare with transformers in float32")
    arguments = parser.parse_args()
    try:
        source = resolve(arguments.model)
        tokenizer = load_text_side(source).tokenizer
        tokens = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: arguments.max_tokens]
        loaded = load_model(
            source, dtype=arguments.dtype, quantization=arguments.quantization, max_model_len=arguments.context
        )
        ours = perplexity(loaded.model, tokens, arguments.context, arguments.kv_cache_dtype or arguments.dtype)
        result = {"model": loaded.model_id, "dtype": arguments.dtype, "tokens": len(tokens), "perplexity": ours}
        if arguments.reference:
            theirs = reference(source, tokens, arguments.context)
            result |= {"reference": theirs, "ratio": ours / theirs}
    except (ValueError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
