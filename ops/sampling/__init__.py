"""From logits to tokens: pure functions that the compiled sampling program is made of."""

from ops.sampling.draw import GREEDY_TEMPERATURE, sample
from ops.sampling.logits import apply_bias, apply_penalties, apply_token_mask
from ops.sampling.logprobs import logprobs

__all__ = ["GREEDY_TEMPERATURE", "apply_bias", "apply_penalties", "apply_token_mask", "logprobs", "sample"]
