"""The engine against transformers on one GPU: the same random weights, prompts and number of tokens."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMOKE = LLAMA_1B | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "torch_dtype": "float32",
}  # fmt: skip


def missing(*packages: str) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def write_checkpoint(folder: pathlib.Path, config: dict[str, Any]) -> None:
    """A Hugging Face folder of random weights."""
    import ml_dtypes
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    dtype = np.float32 if config["torch_dtype"] == "float32" else ml_dtypes.bfloat16
    D, F, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    H, K = config["num_attention_heads"] * h, config["num_key_value_heads"] * h

    def matrix(out: int, into: int) -> np.ndarray:
        return (rng.standard_normal((out, into), np.float32) * into**-0.5).astype(dtype)

    tensors = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], D),
        "lm_head.weight": matrix(config["vocab_size"], D),
        "model.norm.weight": np.ones(D, dtype),
    }
    for i in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (H, D), "self_attn.k_proj": (K, D), "self_attn.v_proj": (K, D),
            "self_attn.o_proj": (D, H), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
        }  # fmt: skip
        tensors |= {f"model.layers.{i}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {
            f"model.layers.{i}.{name}.weight": np.ones(D, dtype)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


OURS = """
import json, sys, time
sys.path[:0] = json.loads(sys.argv[1])["path"]
job = json.loads(sys.argv[1])
from benchmarks.local import Local
from serving.engine.api.config import EngineConfig
from serving.boot.start import start_engine
from serving.simulator.trace import TraceRequest
began = time.monotonic()
config = EngineConfig(model=job["model"], dtype=job["dtype"], quantization="none", max_num_seqs=job["requests"],
    max_model_len=job["prompt"] + job["output"] + 16, progress=False, enable_prefix_caching=False, compile_cache="",
    max_num_batched_tokens=job["budget"])
local = Local(start_engine(config), time.monotonic() - began)
trace = [TraceRequest(0.0, job["prompt"], job["output"])] * job["requests"]
prompts = job["prompts"]
for _ in range(2):
    began = time.monotonic()
    done = local.run(trace, prompts, ignore_eos=True, temperature=0.0)
    took = time.monotonic() - began
local.close()
print(json.dumps({"seconds": took, "start": local.startup_s}))
"""
THEIRS = """
import json, sys, time
job = json.loads(sys.argv[1])
import torch
from transformers import AutoModelForCausalLM
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).to(device).eval()
prompts = torch.tensor(job["prompts"], device=device)
for _ in range(2):
    began = time.monotonic()
    with torch.inference_mode():
        model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0,
            min_new_tokens=job["output"], max_new_tokens=job["output"])
    if device == "cuda":
        torch.cuda.synchronize()
    took = time.monotonic() - began
print(json.dumps({"seconds": took}))
"""


def compare(requests: int, prompt: int, output: int, smoke: bool, limit_s: int) -> dict[str, Any]:
    """Output tokens a second of each, both in a process of their own; or why there is no number."""
    lacking = missing("flax", "safetensors", "tokenizers", "orbax", "platformdirs", "tqdm")
    if lacking:
        return {"ours": f"not measured: {', '.join(lacking)} not installed"}
    config = SMOKE if smoke else LLAMA_1B
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(pathlib.Path(folder), config)
        job = {
            "model": folder, "dtype": config["torch_dtype"], "requests": requests, "prompt": prompt, "output": output,
            "budget": 256 if smoke else 4096,
            "prompts": rng.integers(3, config["vocab_size"], (requests, prompt)).tolist(),
            "path": [str(pathlib.Path(__file__).resolve().parents[2]), str(pathlib.Path(__file__).resolve().parents[1])],
        }  # fmt: skip
        found: dict[str, Any] = {"requests": requests, "prompt": prompt, "output": output}
        lacking = missing("torch", "transformers")
        for name, code in (("ours", OURS), ("transformers", THEIRS)):
            if name == "transformers" and lacking:
                found[name] = f"not measured: {', '.join(lacking)} not installed"
                continue
            try:
                done = subprocess.run(
                    [sys.executable, "-c", code, json.dumps(job)],
                    capture_output=True, text=True, timeout=limit_s, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                found[name] = f"not measured: took over {limit_s} s"
                continue
            if done.returncode:
                found[name] = (
                    f"failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
                )
            else:
                result = json.loads(done.stdout.strip().splitlines()[-1])
                found[name] = requests * output / result["seconds"]
    return found
