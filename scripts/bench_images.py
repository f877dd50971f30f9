"""What images cost, beside transformers: `python scripts/bench_images.py` (extras `multimodal` and `transformers`).

No trained model is needed: a random checkpoint of Qwen2-VL's architecture and SmolLM2's width is written to a temporary folder.
Prints, as JSON: tokens a second of prompts without images, with the tower loaded and without it (`language_model_only`), in turns;
and seconds until the first token of a prompt with one image, here and in transformers (in float32 and in bfloat16; each sees
another image each time). Here weights and products are what a server chooses (`--quantization none`: float32).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WORDS = 4000
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def write(folder: Path) -> Any:
    """The checkpoint; returns transformers' model."""
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers

    ids = {name: WORDS + SPECIAL.index(token) for name, token in (
        ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"), ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    )}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    text = {
        "vocab_size": WORDS + 96, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1, "rope_parameters": rope,
    }  # fmt: skip
    vision = {"depth": 8, "embed_dim": 384, "num_heads": 6, "hidden_size": 576, "mlp_ratio": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval().float()
    model.save_pretrained(folder)
    transformers.Qwen2VLImageProcessorPil(max_pixels=28 * 28 * 320).save_pretrained(folder)
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL])
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w1", "chat_template": TEMPLATE}))
    return model


def picture(seed: int) -> Any:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (480, 640, 3), np.uint8)
    return Image.fromarray(pixels)


def start(folder: Path, **settings: Any) -> Any:
    from serving.llm import LLM

    if settings.get("quantization") == "none":
        settings["dtype"] = "float32"
    return LLM(str(folder), max_model_len=1024, max_num_seqs=8, kv_cache_memory="512MiB", progress=False, **settings)


def text_rate(llm: Any, seed: int) -> float:
    """Tokens a second of eight prompts of 64 words, 64 tokens each."""
    from serving.engine.api.sampling_params import SamplingParams

    random = np.random.default_rng(seed)
    prompts = [" ".join(f"w{i}" for i in random.integers(3, WORDS, 64)) for _ in range(8)]
    params = SamplingParams(max_tokens=64, min_tokens=64, temperature=0.0)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return sum(len(one.outputs[0].token_ids) for one in outputs) / (time.perf_counter() - began)


def first_token_here(llm: Any, seed: int) -> float:
    from serving.engine.api.sampling_params import SamplingParams

    content = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": "w5 w6 w7"}]
    began = time.perf_counter()
    llm.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)
    return time.perf_counter() - began


def first_token_there(model: Any, seed: int) -> float:
    import torch
    import transformers

    processor = transformers.Qwen2VLImageProcessorPil(max_pixels=28 * 28 * 320)
    config, image = model.config, picture(seed)
    began = time.perf_counter()
    given = dict(processor(images=[image], return_tensors="pt"))
    count = int(given["image_grid_thw"].prod()) // 4
    ids = [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id, 5, 6, 7, WORDS]
    tokens = torch.tensor([ids])
    kinds = (tokens == config.image_token_id).int()
    with torch.no_grad():
        model.generate(tokens, max_new_tokens=1, do_sample=False, mm_token_type_ids=kinds, **given)
    return time.perf_counter() - began


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantization", default="auto", help="of our weights")
    args = parser.parse_args()
    rounds, how = args.rounds, {"quantization": args.quantization}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        model = write(path)
        seeing, blind = start(path, **how), start(path, language_model_only=True, **how)
        rates: dict[str, list[float]] = {"with the tower": [], "without": []}
        for seed in range(rounds + 1):
            for name, llm in (("with the tower", seeing), ("without", blind))[:: 1 if seed % 2 else -1]:
                rate = text_rate(llm, seed)
                rates[name] += [rate] if seed else []
        blind.shutdown()
        here = statistics.median([first_token_here(seeing, seed) for seed in range(rounds + 1)][1:])
        seeing.shutdown()
        there = {}
        for dtype in ("float32", "bfloat16"):
            other = model.to(getattr(torch, dtype))
            there[dtype] = statistics.median([first_token_there(other, seed) for seed in range(rounds + 1)][1:])
    ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(json.dumps({
        "text, tokens/s": medians, "ratio": ratio, "first token with an image, s": {"here": here, "transformers": there},
        "times faster": {dtype: seconds / here for dtype, seconds in there.items()},
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
