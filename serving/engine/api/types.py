"""What goes into an engine and what comes out: plain data, shared by every front end and both clients."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from serving.engine.api.constraint import TokenConstraint
from serving.engine.api.media import Media
from serving.engine.api.peers.stats import TransferStats
from serving.engine.api.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class TransferParams:
    """One side of a request that two engines share, and what the other has to know; vLLM's kv_transfer_params.

    Attributes:
        remote_decode: another engine goes on with it: its pages are kept for that.
        remote_prefill: another engine computes its prompt, or has: its pages are fetched from there.
        host, port: of that engine's gRPC; with remote_prefill.
        ticket: names what is shared, for both; "" lets the engine that keeps the pages make one.
    """

    remote_decode: bool = False
    remote_prefill: bool = False
    host: str = ""
    port: int = 0
    ticket: str = ""

    @property
    def address(self) -> str:
        """host:port, as gRPC takes it."""
        host = f"[{self.host}]" if ":" in self.host and not self.host.startswith("[") else self.host
        return f"{host}:{self.port}"


class FinishReason(enum.Enum):
    """Why a completion ended. The value is the word that clients see."""

    STOP = "stop"  # end-of-sequence, a stop token, a stop string, or a finished grammar
    LENGTH = "length"  # max_tokens or the context's end
    ABORT = "abort"  # the client went away or asked for it
    DEADLINE = "deadline"  # its deadline passed, or could no longer be met
    REFUSED = "refused"  # it cannot go on, and its author can mend that (a grammar that grew too complex)
    ERROR = "error"  # we failed it (NaN logits, a grammar's own failure)


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """One sequence to complete. `params.n` is ignored here: the service fans out.

    Attributes:
        request_id: unique among live requests.
        prompt_token_ids: at least one id, each in [0, vocab).
        params: already validated; `max_tokens` may be None (to the context's end).
        eos_token_ids: ids that end the completion unless `params.ignore_eos`.
        priority: lower runs first (policy `priority`).
        constraint: a compiled grammar, or None. In-process only: the remote client sends `params.structured_outputs`.
        arrival_time: time.monotonic() seconds at the front end.
        deadline: time.monotonic() seconds by which it must be finished, or None.
        ttft_deadline: time.monotonic() seconds by which its first token must be out, or None.
        cache_salt: requests share KV pages only with requests of the same salt.
        tenant: fair-share key, or None.
        bad_words_token_ids: token sequences that may not be completed.
        adapter: digest of the adapter it runs with (`AdapterInfo.digest`); part of the prefix identity.
        turn_ends: prompt positions behind which a turn of a conversation ends: where other sequences may part from this one.
        pooling: "last" or "mean": no completion, but the pooled hidden states of the prompt (after the final norm).
        transfer: which part of it another engine does; None for none.
        media: images whose embeddings stand in some of the prompt's places. In-process only, for engines whose
            `EngineInfo.modalities` say so.
        whole: nobody looks at its tokens before it has ended. Those behind the first come with its last output, and a dispatch
            may hold several steps of it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    constraint: TokenConstraint | None = None
    arrival_time: float = 0.0
    deadline: float | None = None
    ttft_deadline: float | None = None
    cache_salt: str | None = None
    tenant: str | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    adapter: str | None = None
    pooling: str | None = None
    turn_ends: tuple[int, ...] = ()
    transfer: TransferParams | None = None
    media: Media | None = None
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class TokenPair:
    """Two texts as one sequence, for a cross-encoder: [CLS] first [SEP] second [SEP], or what the model takes instead.

    Attributes:
        token_ids: both texts with the special tokens around them.
        segment_ids: which text each token is of (Hugging Face's token_type_ids), as long as `token_ids`.
    """

    token_ids: tuple[int, ...]
    segment_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities (natural log, of the distribution before temperature and filters) at one position.

    Attributes:
        token_id, logprob, rank: the token that is there, and how many tokens are likelier, plus one.
        top: (token id, logprob) of the likeliest tokens, likeliest first; as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class RequestTimes:
    """time.monotonic() seconds of a request's milestones; 0.0 where not reached."""

    arrival: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


@dataclasses.dataclass(frozen=True)
class EngineOutput:
    """What is new about a request since its last output. The last one has `finish_reason`.

    Attributes:
        token_ids: new completion tokens, in order. A final end-of-sequence or stop token is included.
        logprobs: one entry a token in `token_ids` where asked for, else None.
        prompt_logprobs: in the first output only, where asked for: None for the first prompt token, then one each.
        finish_reason: set on the last output.
        stop_reason: the stop token id that ended it (None for end-of-sequence).
        error: a sentence, when finish_reason is REFUSED or ERROR; which limit it was, when DEADLINE.
        num_cached_tokens: prompt tokens whose KV was already there.
        num_preemptions: times the request was put back to waiting; told with the last output.
        accepted_drafts, rejected_drafts: of the drafts that were verified for it; told with the last output.
        pooled: float32 [embed], with the last output of a request that asked for pooling.
        transfer: with the last output of a request with `remote_decode`: what the engine that goes on is to be told.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    times: RequestTimes = RequestTimes()
    pooled: np.ndarray | None = None
    num_preemptions: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0
    transfer: TransferParams | None = None


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """Facts about a running engine that front ends and clients may show or check against.

    Attributes:
        tasks: what it can do: "transcribe", "generate", "embed" (see EmbeddingClient), "score" (see ScoringClient), "classify" (see
            ClassifyingClient).
        pooling: how its embeddings are made where a request does not say.
        prompts: (name, text) of what its authors put in front of texts to embed.
        default_prompt: the text that goes in front where a request does not name one; "" for none.
        labels: names of what a classifier tells apart.
        role: "prefill", "decode" or "both", where it exchanges pages with other engines; "" where it does not.
        modalities: what it reads besides text: "image", "video", "audio", or "sound" instead of it.
        media_patches: of one image or window of sound, that it takes at most.
        kv_cache_dtype: what pages hold; "" where there are none.
    """

    model_id: str
    architecture: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    dtype: str
    quantization: str | None
    mesh: str
    platform: str
    version: str
    num_parameters: int = 0
    tasks: tuple[str, ...] = ("generate", "embed")
    pooling: str = "last"
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str = ""
    labels: tuple[str, ...] = ()
    role: str = ""
    modalities: tuple[str, ...] = ()
    media_patches: int = 0
    kv_cache_dtype: str = ""


STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of the buckets of `EngineStats.step_tokens`; vLLM's."""


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine's counters and gauges. Counters count since start.

    Attributes:
        num_deferred: of those that wait, the ones that would not start if there were room: the engine is paused, or they
            were preempted with a token still on its way.
        step_tokens: how many steps computed up to each bound of STEP_TOKEN_BOUNDS, and more than the last; None where it is
            not known.
        num_bucket_tokens_total: rows that steps were padded to; num_scheduled_tokens_total over it is how full buckets are.
        host_time_s_total: seconds that the engine thread worked: scheduled, packed, dispatched, handed tokens out.
        device_wait_time_s_total: seconds that it waited for a step's tokens. With asynchronous stepping the device works
            during both.
        num_drafts: rows of steps that had drafts; num_draft_tokens: drafts verified; num_accepted_tokens: of them, those accepted;
            accepted_per_pos: the same by place in their row. None where nothing is drafted.
        running_adapters, waiting_adapters: digests of the adapters that running and that waiting requests have.
        expert_loads: int64 [layers with experts, E]: tokens that visited each expert; None for models without experts, and
            where it is not known. Not to be changed.
        transfers: pages given to other engines and taken from them; None where there is none of that.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_deferred: int = 0
    num_pages_free: int = 0
    num_pages_total: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # of them, found
    media_queries: int = 0  # images, and windows of sound, that pieces of prompts needed
    media_hits: int = 0  # of them, those whose embeddings were there
    media_time_s_total: float = 0.0  # seconds that making the others' took
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_steps: int = 0
    num_scheduled_tokens_total: int = 0
    num_bucket_tokens_total: int = 0
    num_recompilations: int = 0
    num_failed_steps: int = 0  # tried again, in smaller company
    num_nonfinite: int = 0  # requests that NaN or infinite logits ended
    last_step_s: float = 0.0
    host_step_s: float = 0.0
    expert_loads: np.ndarray | None = dataclasses.field(default=None, compare=False)
    host_time_s_total: float = 0.0
    device_wait_time_s_total: float = 0.0
    step_tokens: tuple[int, ...] | None = None
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_pos: tuple[int, ...] | None = None
    running_adapters: frozenset[str] = frozenset()
    waiting_adapters: frozenset[str] = frozenset()
    transfers: TransferStats | None = None

    @property
    def kv_usage(self) -> float:
        """Fraction of pages in use by live requests, 0..1."""
        return 1.0 - self.num_pages_free / self.num_pages_total if self.num_pages_total else 0.0
