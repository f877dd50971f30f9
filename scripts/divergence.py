"""How far a scheme's predictions are from float32's: `python scripts/divergence.py --text FILE [--model ...] [--quantization ...]`.

The mean over positions of KL(float32 || scheme), in nats: for a calibrated model what the mean loss rises by, and steadier than
a perplexity, which moves by 0.3 % over a few thousand tokens for no reason. Prints one JSON object: both perplexities, and how far
nats and the ratio of perplexities vary with the text (windows drawn again and again). `--only down head` has the scheme in these
products alone and float32 in the others: it tells which roundings a divergence comes from.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.perplexity import log_probabilities

SITES = ("qkv", "out", "gate_up", "down", "head")
"""Products of a decoder's layer, and its head."""


def divergence(reference: Any, other: Any, tokens: list[int], context: int) -> dict[str, float]:
    """Of two models of one vocabulary over the same windows.

    Returns:
        nats; the perplexity of each; agreement: the share of positions whose likeliest token is the same; the standard errors of
        nats and of the ratio of perplexities, over windows.
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def compare(wanted_TV: jax.Array, got_TV: jax.Array) -> tuple[jax.Array, jax.Array]:
        nats_T = (jnp.exp(wanted_TV) * (wanted_TV - got_TV)).sum(-1)
        return nats_T, wanted_TV.argmax(-1) == got_TV.argmax(-1)

    nats, same, losses, count = 0.0, 0, np.zeros(2), 0
    of_windows: list[tuple[float, float, int]] = []
    pairs = zip(*(log_probabilities(model, tokens, context) for model in (reference, other)), strict=True)
    for (piece, wanted_TV), (_, got_TV) in pairs:
        n = len(piece) - 1
        nats_T, same_T = compare(wanted_TV, got_TV)
        before = nats, losses[1] - losses[0]
        nats += float(np.asarray(nats_T[:n], np.float64).sum())
        same += int(same_T[:n].sum())
        for index, logprob_TV in enumerate((wanted_TV, got_TV)):
            losses[index] -= float(np.asarray(logprob_TV[np.arange(n), np.asarray(piece[1:])], np.float64).sum())
        count += n
        of_windows.append((nats - before[0], losses[1] - losses[0] - before[1], n))
    all_WX = np.array(of_windows)
    drawn_DX = all_WX[np.random.default_rng(0).integers(0, len(all_WX), (2000, len(all_WX)))].sum(1)
    nats_error, ratio_error = (drawn_DX[:, :2] / drawn_DX[:, 2:]).std(0).tolist()
    return {
        "nats": nats / count,
        "reference_perplexity": math.exp(losses[0] / count),
        "perplexity": math.exp(losses[1] / count),
        "ratio": math.exp((losses[1] - losses[0]) / count),
        "agreement": same / count,
        "nats_error": nats_error,
        "ratio_error": ratio_error,
    }


def keep_only(model: Any, reference: Any, sites: Sequence[str]) -> None:
    """Gives a decoder the reference's weights in all products but these.

    Args:
        sites: some of SITES.
    """
    for mine, exact in zip(model.layers, reference.layers, strict=True):
        for part, name in (("attn", "qkv"), ("attn", "out"), ("mlp", "gate_up"), ("mlp", "down")):
            if name not in sites:
                setattr(getattr(mine, part), name, getattr(getattr(exact, part), name))
    if "head" not in sites:
        model.embed, model.head = reference.embed, reference.head


def main() -> None:
    """Command line; prints one JSON object."""
    from models.loading.load import load_model, resolve
    from serving.boot.startup import load_text_side

    parser = argparse.ArgumentParser(prog="scripts/divergence.py", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--model", help="GGUF file, directory or hub id; default: the default model")
    parser.add_argument(
        "--quantization", default="int8", help="a scheme of the server's --quantization (default: int8)"
    )
    parser.add_argument("--only", nargs="+", choices=SITES, help="products that have the scheme (default: all)")
    parser.add_argument("--context", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="read at most this many tokens (default: 4096)")
    arguments = parser.parse_args()
    try:
        source = resolve(arguments.model)
        tokenizer = load_text_side(source).tokenizer
        tokens = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: arguments.max_tokens]
        length = {"dtype": "float32", "max_model_len": arguments.context}
        reference = load_model(source, **length)
        other = load_model(source, quantization=arguments.quantization, **length)
        if arguments.only:
            keep_only(other.model, reference.model, arguments.only)
        found = divergence(reference.model, other.model, tokens, arguments.context)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps({"model": other.model_id, "quantization": arguments.quantization, "tokens": len(tokens)} | found))


if __name__ == "__main__":
    main()
