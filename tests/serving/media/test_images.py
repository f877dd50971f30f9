"""Images and videos through a whole engine, against transformers: 32 greedy tokens, whatever else is in the batch."""

import contextlib

import numpy as np
import pytest

from serving.engine.api.sampling_params import SamplingParams, StructuredOutputs
from serving.errors import RequestError
from serving.service import GenerateInput
from tests.models import tiny_vision
from tests.models.tiny_video import clip
from tests.models.tiny_vision import END, IMAGE, START, TINY, VIDEO, picture
from tests.serving.media.images import part, uri
from tests.serving.media.small_engine import SmallEngine

GREEDY = SamplingParams(max_tokens=tiny_vision.STEPS, min_tokens=tiny_vision.STEPS, temperature=0.0)
TAIL = [END, START, 6]
SMALL, LARGE = picture(140, 84, 1), picture(333, 217, 2)


def turn(*parts) -> tuple[list[dict], list[int], list, list]:
    """(messages, ids of the prompt before it is expanded, its images, its videos) of words' numbers, images, and pairs of frames
    with how many there are a second."""
    content, ids, images, videos = [], [START], [], []
    for one in parts:
        if isinstance(one, int):
            content.append({"type": "text", "text": f"w{one} "})
            ids.append(one)
        elif isinstance(one, tuple):
            content.append({"type": "video", "video": (one[0], {"fps": one[1]})})
            ids.append(VIDEO)
            videos.append(one)
        else:
            content.append({"type": "image", "image": one})
            ids.append(IMAGE)
            images.append(one)
    return [{"role": "user", "content": content}], ids + TAIL, images, videos


class Served(SmallEngine):
    """A model in a small engine: pages for one long request and a half, room for the embeddings of one large image, and steps of
    32 tokens, so that prompts are cut inside images."""

    def __init__(self, name: str, folder, **settings) -> None:
        self.name = name
        self.model = tiny_vision.save(name, folder)
        page = 4096 * self.model.config.get_text_config().num_hidden_layers
        pages = 10 if name == "Gemma 3" else 16  # half of its layers keep windows alone
        sizes = {"max_model_len": 160, "max_num_batched_tokens": 32, "kv_cache_memory": pages * page}
        super().__init__(folder, GREEDY, **sizes | TINY[name].engine | settings)

    def expected(self, ids, *media):
        return tiny_vision.expected(self.name, self.model, ids, *media)

    def embed(self, messages) -> np.ndarray:
        """Of the chat alone, without an answer's beginning, as over HTTP."""
        given = GenerateInput(messages=messages, add_generation_prompt=False)
        return self.llm._loop.run(self.llm._service.embed(given, pooling="last")).vector


ALWAYS = ("Gemma 3", "Qwen2.5-VL")
"""The engine is the same for all: these two families' tokens are compared in every run (positions of three numbers, images of any
size; tokens that attend to later ones, tiles, text around them), the others' towers are (tests/models)."""
FAMILIES = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in sorted(tiny_vision.TINY)]


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    made = Served(request.param, tmp_path_factory.mktemp("images") / "model")
    yield made
    with contextlib.closing(made.engine.runner.guard):
        made.engine.runner.guard.check()  # nothing was compiled for any size
    made.llm.shutdown()


def test_images_and_texts_in_one_batch_cut_and_preempted(served):
    before = served.llm.stats().num_preemptions
    served.check(turn(10, SMALL, 11), turn(LARGE, 20, 21, SMALL, 22), turn(30, 31), turn(40, LARGE, 41, 42))
    # Gemma 4's layers with windows give back more pages behind an image than answers need.
    assert served.llm.stats().num_preemptions > before or served.name == "Gemma 4", "pages were short"
    served.media.check()


def test_a_prefix_is_found_up_to_inside_an_image_and_never_anothers(served):
    (first,) = served.check(turn(50, 51, LARGE, 52))
    (again,) = served.check(turn(50, 51, LARGE, 53))
    if served.name.startswith("Qwen3.5"):
        return  # so short a prompt is worth no snapshot of its layers' state
    end = len(first.prompt_token_ids) - len(TAIL) - 1
    assert 16 <= again.num_cached_tokens < end and again.num_cached_tokens % 16 == 0, "ends inside the image"
    (other,) = served.check(turn(50, 51, picture(333, 217, 9), 52))
    assert other.num_cached_tokens == 0, "the first page has places of the image"


def test_one_image_of_32_requests_is_encoded_once(served):
    image, before = picture(140, 84, 17), served.media.misses
    one = turn(60, image, 70)
    (first,) = served.check(one)
    outputs = served.chat(*[turn(61 + i, image, 70) for i in range(31)], one)
    assert outputs[-1].outputs[0].token_ids == first.outputs[0].token_ids
    assert served.media.misses == before + 1


def test_an_embedding_of_a_chat_with_an_image(served):
    messages, ids, images, _ = turn(90, SMALL, 91)
    found = served.embed(messages)
    wanted = tiny_vision.embedding(served.name, served.model, [*ids[: -len(TAIL)], TAIL[0]], images)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_several_answers_log_probabilities_and_masks(served):
    one = turn(70, LARGE, 71)
    params = SamplingParams(n=2, max_tokens=1, top_k=1, logprobs=2, prompt_logprobs=0)
    (output,) = served.llm.chat([one[0]], params, use_tqdm=False)
    first, second = output.outputs
    assert first.token_ids == second.token_ids
    prompt, scores = tiny_vision.scores(served.name, served.model, one[1], one[2])
    assert list(output.prompt_token_ids) == prompt
    best = int(np.argmax(scores[-1]))
    assert list(first.token_ids) == [best] and abs(first.logprobs[0][best].logprob - scores[-1][best]) < 1e-3
    behind = len(prompt) - 2  # in the text behind the image
    assert abs(output.prompt_logprobs[behind][prompt[behind]].logprob - scores[behind - 1][prompt[behind]]) < 1e-3
    params = SamplingParams(max_tokens=1, temperature=0.0, allowed_token_ids=[50, 51])
    (output,) = served.llm.chat([one[0]], params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == [max((50, 51), key=lambda token: scores[-1][token])]


def test_an_answer_that_a_grammar_allows(served):
    one = turn(70, LARGE, 71)
    params = SamplingParams(max_tokens=4, temperature=0.0, structured_outputs=StructuredOutputs(choice=["w4", "w7"]))
    (output,) = served.llm.chat([one[0]], params, use_tqdm=False)
    _, scores = tiny_vision.scores(served.name, served.model, one[1], one[2])
    assert output.outputs[0].text == max(("w4", "w7"), key=lambda word: scores[-1][int(word[1:])])


def test_a_bad_image_ends_its_own_request_alone(served):
    with pytest.raises(RequestError, match="cannot be read"):
        served.llm.chat([{"role": "user", "content": [part(uri(b"nonsense"))]}], GREEDY, use_tqdm=False)
    served.check(turn(80, SMALL, 81))


def test_any_size(served):
    # transformers fails for an image of one embedding in Mistral 3.
    smallest = (40, 1) if served.name == "Mistral Small 3.1" else (1, 1)
    for size in (smallest, (5, 300), (640, 480)):
        served.check(turn(90, picture(*size, 3), 91))


def test_videos_beside_images_and_texts_and_a_prefix_that_ends_inside_one(served):
    if not TINY[served.name].videos:
        pytest.skip("it reads none")
    short, long = (clip(4, 60, 100, 1), 2.0), (clip(8, 140, 84, 2), 4.0)
    served.check(turn(10, short, 11), turn(long, 20, SMALL, 22), turn(30, 31))
    (first,) = served.check(turn(50, long, 52))
    (again,) = served.check(turn(50, long, 53))
    assert first.num_cached_tokens < 16 or served.name.startswith("Qwen3.5")
    assert again.num_cached_tokens >= 16 or served.name.startswith("Qwen3.5")
    (other,) = served.check(turn(50, (clip(8, 140, 84, 3), 4.0), 52))
    assert other.num_cached_tokens < 16, "the first page has places of the video"


@pytest.mark.slow
def test_drafts_change_no_token(tmp_path):
    """Guesses that are looked up, in texts with images in them."""
    how = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    made = Served("Qwen2.5-VL", tmp_path / "model", speculative_config=how | {"enable_adaptive_verification": False})
    try:
        made.check(turn(10, SMALL, 11), turn(LARGE, 20, 21, SMALL, 22), turn(30, 31), turn(40, LARGE, 41, 42))
        assert made.llm.stats().num_draft_tokens > 20
        made.engine.runner.guard.check()
    finally:
        made.llm.shutdown()
