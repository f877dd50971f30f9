"""Sounds through a whole engine, against transformers: 32 greedy tokens, whatever else is in the batch."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.errors import RequestError
from tests.models import tiny_audio, tiny_conformers, tiny_granite
from tests.models.hearing import MADE_BY
from tests.models.tiny_audio import PLACE, START, TAIL
from tests.models.tiny_vision import picture
from tests.models.tiny_whisper import sound, wav
from tests.serving.media.small_engine import SmallEngine

GREEDY = SamplingParams(max_tokens=tiny_audio.STEPS, min_tokens=tiny_audio.STEPS, temperature=0.0)
SHORT, LONG = sound(0.7, 1), sound(3.1, 2)


def turn(*parts) -> tuple[list[dict], list[int], list]:
    """(messages, ids of the prompt before it is expanded, its sounds) of words' numbers and sounds."""
    content, ids, sounds = [], [START], []
    for one in parts:
        if isinstance(one, int):
            content.append({"type": "text", "text": f"w{one} "})
            ids.append(one)
        else:
            content.append({"type": "audio", "audio": (one, 16_000)})
            ids.append(PLACE)
            sounds.append(one)
    return [{"role": "user", "content": content}], ids + TAIL, sounds


class Served(SmallEngine):
    """A model in a small engine: pages for one long request and a half, room for the embeddings of one window, and steps of 32
    tokens, so that prompts are cut inside sounds."""

    def __init__(self, name: str, folder, **settings) -> None:
        self.name, self.made = name, MADE_BY[name]
        self.model = self.made.save(name, folder)
        pages = FEWER.get(name) or 18 * self.model.config.get_text_config().num_hidden_layers
        how = {"kv_cache_memory": pages * 4096, "max_model_len": 192, "max_num_batched_tokens": 32}
        super().__init__(folder, GREEDY, **how | settings)

    def expected(self, ids, *media):
        return self.made.expected(self.name, self.model, ids, *media)


FEWER = {"Ultravox": 26, "Ultravox 0.4": 26, "Gemma 3n": 17, "Gemma 4, heard": 18, "Granite Speech": 26}
"""Pages, of one layer, of families of which a sound takes less, or whose layers keep windows or share pages."""
FAMILIES = [pytest.param(name, marks=() if name == "Qwen2-Audio" else pytest.mark.slow) for name in sorted(MADE_BY)]


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    made = Served(request.param, tmp_path_factory.mktemp("audio") / "model")
    yield made
    with contextlib.closing(made.engine.runner.guard):
        made.engine.runner.guard.check()  # nothing was compiled for any length
    made.llm.shutdown()


def test_sounds_and_texts_in_one_batch_cut_and_preempted(served):
    before = served.llm.stats().num_preemptions
    served.check(turn(10, SHORT, 11), turn(LONG, 20, 21, SHORT, 22), turn(30, 31), turn(40, LONG, 41, 42))
    assert served.llm.stats().num_preemptions > before, "pages were short"
    served.media.check()


def test_a_prefix_is_found_up_to_inside_a_sound_and_never_anothers(served):
    window = (sound(4.0, 5), SHORT) if served.name == "Gemma 3n" else (sound(4.0, 5),)  # one alone takes few pages
    (first,) = served.check(turn(50, 51, *window, 52))
    (again,) = served.check(turn(50, 51, *window, 53))
    end = len(first.prompt_token_ids) - len(TAIL) - 1
    assert 16 <= again.num_cached_tokens < end and again.num_cached_tokens % 16 == 0, "ends inside the sound"
    (other,) = served.check(turn(50, 51, sound(4.0, 6), 52))
    assert other.num_cached_tokens == 0, "the first page has places of the sound"


def test_one_sound_of_16_requests_is_encoded_once(served):
    one, before = sound(0.9, 17), served.media.misses
    served.check(turn(60, one, 70))
    served.chat(*[turn(61 + i, one, 70) for i in range(15)])
    assert served.media.misses == before + 1


def test_any_length_and_any_way_of_sending(served):
    for seconds in (0.01, 0.03, 2.5, 4.0, 4.01):
        if served.made is not tiny_audio and seconds < 0.04:
            continue  # transformers fails for sounds without a frame
        served.check(turn(90, sound(seconds, 3), 91))
    messages, ids, _ = turn(90, SHORT, 91)
    _, tokens = served.expected(ids, [SHORT])
    for part in (
        {"type": "audio", "audio": wav(SHORT)},
        {"type": "audio", "audio": SHORT},
        {"type": "audio", "audio": (np.stack([SHORT, SHORT], 1).astype(np.float64), 16_000.0)},
    ):
        messages[0]["content"][1] = part
        (output,) = served.llm.chat([messages], GREEDY, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == tokens


def test_a_bad_sound_ends_its_own_request_alone(served):
    with pytest.raises(RequestError, match="cannot be read as sound"):
        served.llm.chat(
            [{"role": "user", "content": [{"type": "audio", "audio": b"nonsense"}]}], GREEDY, use_tqdm=False
        )
    served.check(turn(80, SHORT, 81))


@pytest.mark.slow
def test_pictures_beside_sounds(tmp_path):
    """Of a model with eyes and ears."""
    made = Served("Gemma 4, heard", tmp_path / "model")
    try:
        small, large = picture(140, 84, 1), picture(200, 150, 2)
        mixed = (
            both(10, SHORT, small, 11), both(large, 20, LONG, 21), both(30, SHORT, 31), both(40, small, 41), both(50, 51),
        )  # fmt: skip
        made.check(*mixed)
        made.check(mixed[0], mixed[1])
        assert set(made.llm._service.info.modalities) >= {"image", "audio"}
        made.engine.runner.guard.check()
    finally:
        made.llm.shutdown()


@pytest.mark.slow
def test_an_adapter_for_requests_with_sounds_alone(tmp_path):
    """As Granite Speech has one beside it."""
    made = Served("Granite Speech", tmp_path / "model", enable_lora=True, max_loras=1)
    try:
        heard, read = turn(10, SHORT, 11), turn(30, 31)
        (plain, _) = made.check(heard, read)
        tiny_granite.adapt(made.model, tmp_path / "model")
        adapters = made.llm._service.adapters
        adapters.load("audio", str(tmp_path / "model"))
        adapters.by_sense = {"audio": "audio"}
        # Longer prompts make the random model say the sound's own token, which transformers then takes for token 0.
        (adapted, _) = made.check(heard, read)
        assert adapted.outputs[0].token_ids != plain.outputs[0].token_ids
        made.engine.runner.guard.check()
    finally:
        made.llm.shutdown()


def both(*parts) -> tuple[list[dict], list[int], list, list]:
    """As `turn`, of words' numbers, sounds and pictures."""
    messages, ids, sounds = turn(*(START if hasattr(one, "convert") else one for one in parts))
    pictures = [one for one in parts if hasattr(one, "convert")]
    for index, one in enumerate(parts):
        if hasattr(one, "convert"):
            messages[0]["content"][index] = {"type": "image", "image": one}
            ids[index + 1] = tiny_conformers.PICTURE
    return messages, ids, sounds, pictures


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MADE_BY))
def test_on_two_devices(name, tmp_path):
    """In a process of its own: the number of CPU devices is fixed at its start."""
    made = MADE_BY[name]
    model = made.save(name, tmp_path / name)
    command = [sys.executable, "-m", "tests.serving.media.audio_mesh_run", str(tmp_path), "model=2", "data=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])[name]
    turns = (turn(10, SHORT, 11), turn(LONG, 20, 21, SHORT, 22), turn(30, 31), turn(40, sound(4.01, 4), 41))
    wanted = [made.expected(name, model, *one[1:]) for one in turns]
    for mesh, said in found.items():
        assert said["prompts"] == [prompt for prompt, _ in wanted]
        assert said["tokens"] == [tokens for _, tokens in wanted], mesh
        assert len(said["encoded"]) == (2 if "data" in mesh else 1) and min(said["encoded"]) > 0
