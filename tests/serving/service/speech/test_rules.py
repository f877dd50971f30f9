"""The rules of Whisper's tokens against transformers' processors, on random histories and scores."""

import jax.numpy as jnp
import numpy as np

from ops.sampling import prefer_times
from serving.service.speech.rules import SpeechRules, SpeechTokens
from tests.models import tiny_whisper
from tests.models.tiny_whisper import DE, EN, END, GENERATION, NO_TIMES, START, TIMES, TRANSCRIBE, VOCAB

TOKENS = SpeechTokens.of(GENERATION, {})
HEAD = [START, EN, TRANSCRIBE]


def allowed(rules: SpeechRules) -> tuple[np.ndarray, np.ndarray]:
    """(mask, the same as bools)."""
    mask = np.zeros(-(-VOCAB // 32), np.int32)
    rules.fill_mask(mask)
    return mask, np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB].astype(bool)


def oracle(said: list[int], scores: np.ndarray, timed: bool) -> np.ndarray:
    """What transformers leaves of the scores."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation import logits_process as processes

    config = GenerationConfig(**GENERATION)
    ids, found = torch.tensor([[*HEAD, *said]]), torch.tensor(scores)[None]
    begin = len(HEAD)
    steps = [
        processes.SuppressTokensAtBeginLogitsProcessor(GENERATION["begin_suppress_tokens"], begin),
        processes.SuppressTokensLogitsProcessor(GENERATION["suppress_tokens"]),
        *([processes.WhisperTimeStampLogitsProcessor(config, begin)] if timed else []),
    ]
    for step in steps:
        found = step(ids, found)
    return found[0].numpy()


def test_what_may_come_is_what_transformers_allows():
    random = np.random.default_rng(0)
    forced = 0
    for round_ in range(60):
        timed = round_ % 4 != 0
        rules, said = SpeechRules(TOKENS, VOCAB, timed), []
        for _ in range(12):
            scores = random.normal(0, 3, VOCAB).astype(np.float32)
            scores[TIMES:] -= random.uniform(0, 12)
            mask, may = allowed(rules)
            found = np.where(
                may, np.asarray(prefer_times(jnp.asarray(scores)[None], jnp.asarray(mask)[None], TIMES))[0], -np.inf
            )
            wanted = oracle(said, scores, timed)
            np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted), err_msg=f"{said}")
            forced += int(np.isfinite(np.where(may, scores, -np.inf)).sum() != np.isfinite(found).sum())
            token = int(random.choice(np.flatnonzero(np.isfinite(wanted))))
            assert rules.accept(token)
            said.append(token)
    assert forced > 20, "times were preferred now and then"


def test_rows_that_want_no_times_are_left_alone():
    scores = np.zeros((2, VOCAB), np.float32)
    scores[:, TIMES:] = 5.0
    everything = jnp.full((2, -(-VOCAB // 32)), -1, jnp.int32)
    np.testing.assert_array_equal(prefer_times(jnp.asarray(scores), everything, TIMES), scores)


def test_a_language_is_one_of_them():
    _, may = allowed(SpeechRules(TOKENS, VOCAB, False, only=[EN, DE]))
    assert np.flatnonzero(may).tolist() == [EN, DE]


def test_what_a_checkpoint_says_of_its_tokens():
    assert (TOKENS.end, TOKENS.start, TOKENS.times, TOKENS.languages) == (
        END,
        START,
        NO_TIMES + 1,
        {"en": EN, "de": DE},
    )
    bare = {
        k: v for k, v in GENERATION.items() if k not in ("lang_to_id", "no_timestamps_token_id", "prev_sot_token_id")
    }
    names = dict(zip(tiny_whisper.SPECIAL, range(END, TIMES), strict=True))
    assert SpeechTokens.of(bare, names) == TOKENS
