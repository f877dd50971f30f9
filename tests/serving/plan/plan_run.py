"""Run as `python -m tests.serving.plan.plan_run`: plans for CPU meshes, compiled whole and extrapolated. Prints JSON."""

from __future__ import annotations

import dataclasses
import json

from serving.plan import chips, topology

TARGET = chips.parse_target("cpu:2")
HF = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip

WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"], "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "num_mel_bins": 80, "max_source_positions": 1500, "max_target_positions": 40, "vocab_size": 100,
}  # fmt: skip


def main() -> None:
    topology.prepare([TARGET])
    from serving.plan.memory import tower_bytes
    from serving.plan.planner import Request, make_plan
    from serving.plan.report import sweep_text, to_json, to_text
    from sharding.mesh import make_mesh

    few = Request(
        hf=HF, target=TARGET, mesh="model=2", dtype="float32", max_num_seqs=4, max_num_batched_tokens=64,
        page_size=16, max_model_len=256, context=100, prompt=40,
    )  # fmt: skip
    adapters = dataclasses.replace(few, full_depth=True, adapter_slots=3, max_lora_rank=8)
    plans = [make_plan(few), make_plan(adapters)]
    quick = dataclasses.replace(plans[0], ttft_seconds=None, request=dataclasses.replace(few, decode_only=True))
    texts = [to_text(plans[0]), sweep_text([(p, "") for p in plans]), to_text(quick), sweep_text([(quick, "")])]
    texts.append(to_text(plans[1]))
    kinds = ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2
    windows = HF | {"architectures": ["MistralForCausalLM"], "sliding_window": 32, "layer_types": kinds}
    mixed = make_plan(dataclasses.replace(few, hf=windows, full_depth=True, decode_only=True))
    one = HF | {"num_hidden_layers": 1}
    drafted = make_plan(dataclasses.replace(few, hf=one, draft_hf=one, draft_tokens=3, max_num_batched_tokens=32))
    mesh = make_mesh("model=2", topology.devices(TARGET))
    tower = {
        name: tower_bytes(hf, mesh, "float32", None, 0.5) for name, hf in (("tower_alone", WHISPER), ("no_tower", HF))
    }
    last = to_json(mixed) | tower
    print(json.dumps([to_json(plan) for plan in plans] + texts + [to_text(drafted), to_json(drafted), last]))


if __name__ == "__main__":
    main()
