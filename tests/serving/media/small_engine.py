"""A model that reads images or sounds in a small engine, whose prompts and answers are compared with transformers'."""

from __future__ import annotations

from typing import Any

from serving.engine.api.sampling_params import SamplingParams
from serving.llm import LLM
from tests.tiny import one_width


class SmallEngine:
    """Prompts are cut by its steps, and its pages are few.

    Args:
        folder: of a checkpoint.
        greedy: how its chats are answered.
        settings: of the engine; four requests at once, in float32.
    """

    def __init__(self, folder: Any, greedy: SamplingParams, **settings: Any) -> None:
        with one_width():
            self.llm = LLM(
                str(folder), dtype="float32", quantization="none", max_num_seqs=4, progress=False,
                **{"mm_encoder_cache_gb": 0.0} | settings,
            )  # fmt: skip
        self.engine = self.llm._started.engine
        self._greedy = greedy

    def expected(self, ids: list[int], *media: Any) -> tuple[list[int], list[int]]:
        """transformers' token ids of a prompt, and of its answer."""
        raise NotImplementedError

    def chat(self, *turns: Any) -> list[Any]:
        return self.llm.chat([one[0] for one in turns], self._greedy, use_tqdm=False)

    def check(self, *turns: Any) -> list[Any]:
        """All at once; each one's prompt and tokens are transformers'."""
        outputs = self.chat(*turns)
        for output, (_, ids, *media) in zip(outputs, turns, strict=True):
            prompt, tokens = self.expected(ids, *media)
            assert list(output.prompt_token_ids) == prompt
            assert list(output.outputs[0].token_ids) == tokens
        return outputs

    @property
    def media(self) -> Any:
        return self.engine.scheduler.kv.managers[0].media
