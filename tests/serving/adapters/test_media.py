"""Images beside adapters: an adapter of the language model reads them as transformers with peft does, and no page of an image is
shared with the base.

Slow: what places an image's embeddings, and what an adapter changes behind them, do not know of each other.
"""

from __future__ import annotations

import pytest

from serving import LoRARequest
from tests.models import tiny_vision
from tests.models.tiny_vision import picture
from tests.serving.media.test_images import GREEDY, Served, turn

pytestmark = pytest.mark.slow


def test_images_with_an_adapter_are_those_of_peft(tmp_path):
    import peft
    import torch

    made = Served("Qwen2.5-VL", tmp_path / "model", enable_lora=True, max_loras=2, max_lora_rank=8)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*language_model\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.down_proj)"
    )  # fmt: skip
    wrapped = peft.get_peft_model(made.model, config)  # changes the model itself
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    try:
        image = picture(140, 84, 1)
        turns, who = [turn(10, image, 11), turn(20, image, 21, 22), turn(10, image, 11)], [adapter, adapter, None]
        for _ in range(2):  # the second time from cached pages
            outputs = made.llm.chat([one[0] for one in turns], GREEDY, use_tqdm=False, lora_request=who)
            said = [list(output.outputs[0].token_ids) for output in outputs]
            for found, (_, ids, images, _), one in zip(said, turns, who, strict=True):
                if one is None:
                    with wrapped.disable_adapter():
                        _, tokens = tiny_vision.expected(made.name, made.model, ids, images)
                else:
                    _, tokens = tiny_vision.expected(made.name, made.model, ids, images)
                assert found == tokens
            assert said[0] != said[2]
        made.engine.runner.guard.check()
    finally:
        made.llm.shutdown()
