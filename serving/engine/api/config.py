"""Everything an engine is started with. Flags of `serving.launch` and arguments of `LLM` are made from the fields here."""

from __future__ import annotations

import dataclasses

from serving.engine.api.settings import (
    COUNT,
    FILE,
    FOLDER,
    GIBIBYTES,
    INDEX,
    NAME,
    PAGE,
    SECONDS,
    SHARE,
    SIZE,
    SWITCH,
    TEXT,
    WHOLE,
    Kind,
    Scope,
    one_of,
    read_all,
    read_json_text,
    setting,
)
from serving.engine.api.speculative import SpeculativeConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
LORA_DTYPES = ("auto", "float32", "bfloat16")
QUANTIZATIONS = ("auto", "none", "int8", "int4")
POLICIES = ("fcfs", "priority")

MODEL = Kind("a file, a folder or a hub id", TEXT.read, "MODEL")
DRAFTS = Kind("an object, or its JSON", SpeculativeConfig.read, "JSON")
AXES = Kind("axes and their sizes, such as data=1,model=2", TEXT.read, "AXES")
JSON_TEXT = Kind("a JSON object", read_json_text, "JSON")
ADDRESS = Kind("host:port or auto", TEXT.read, "HOST:PORT")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Start-up configuration. Names and meanings are those vLLM's users know; None means "decide at start".

    What each field means is in its declaration, because flags show it too. Sizes may be given as text ("512MiB"), as on the
    command line; they are numbers here afterwards.

    Raises:
        ValueError: naming the setting, what it must be and what it was.
    """

    # -- model -----------------------------------------------------------------------------------------------------------

    model: str | None = setting(
        None, "GGUF file, Hugging Face or Orbax directory, or hub id (default: SmolLM2-135M-Instruct, fetched once)",
        MODEL, Scope.PROCESS, section="model", flag="",
    )  # fmt: skip
    tokenizer: str | None = setting(
        None, "take the tokenizer from here (default: --model)", MODEL, Scope.SERVER, section="model", flag=""
    )
    chat_template: str | None = setting(
        None, "Jinja file or text (default: the model's own)", FILE, Scope.SERVER, section="model", flag=""
    )
    generation_config: str = setting(
        "auto", "sampling defaults of requests that leave them open: auto takes the checkpoint's, vllm the API's",
        one_of("auto", "vllm"), Scope.SERVER, section="model", flag="",
    )  # fmt: skip
    dtype: str = setting(
        "auto", "what to compute in; auto is float32 on CPU and bfloat16 elsewhere",
        one_of(*DTYPES), Scope.PROGRAM, section="model", flag="", bundled=True,
    )  # fmt: skip
    quantization: str = setting(
        "auto",
        "of the weights; auto is int8 on a CPU with native kernels (when --dtype is auto too), or as stored where a checkpoint has "
        "300 million weights or more in blocks (int8 is then faster for many requests at once and for long prompts), on GPUs and "
        "TPUs as stored where most of a checkpoint is in few bits, and none elsewhere; int4 keeps blocks as they are and rounds "
        "other weights to four bits, some to six",
        one_of(*QUANTIZATIONS, none="none"), Scope.PROGRAM, section="model", flag="", bundled=True,
    )  # fmt: skip
    kv_cache_dtype: str = setting(
        "auto",
        "of the KV cache; auto is int8 beside rounded weights on a CPU with AVX-512 VNNI and bf16 where heads are powers of two, "
        "bfloat16 beside them on other CPUs with native kernels, and what --dtype is elsewhere",
        one_of(*KV_CACHE_DTYPES), Scope.PROGRAM, section="model", flag="", bundled=True,
    )  # fmt: skip
    seed: int = setting(
        0, "base of the seeds of requests that bring none", WHOLE, Scope.SERVER, section="model", flag=""
    )
    served_model_name: str | None = setting(
        None, "id under which the model is served (default: its own name)", NAME, Scope.SERVER, section="model"
    )

    # -- engine ----------------------------------------------------------------------------------------------------------

    max_model_len: int | None = setting(
        None, "longest prompt plus completion, in tokens (default: the model's own, cut to what the KV cache holds)",
        COUNT, Scope.PROGRAM, flag="", unit="tokens", bundled=True,
    )  # fmt: skip
    max_num_seqs: int | None = setting(
        None, "requests running at once (default: 64 on CPU, 256 elsewhere)",
        COUNT, Scope.PROGRAM, flag="", unit="requests", bundled=True,
    )  # fmt: skip
    max_num_batched_tokens: int | None = setting(
        None, "tokens of one step, prompts and completions together (default: 1024 on CPU, 4096 elsewhere)",
        COUNT, Scope.PROGRAM, flag="", unit="tokens", bundled=True,
    )  # fmt: skip
    page_size: int | None = setting(
        None, "token positions of a KV page (default: 16; 64 of int8 on a CPU)",
        PAGE, Scope.PROGRAM, flag="", unit="tokens", bundled=True,
    )  # fmt: skip
    kv_cache_memory: int | None = setting(
        None, "memory for the KV cache over all devices, such as 4GiB or 500MB (default: from the free memory)",
        SIZE, Scope.PROGRAM, flag="", unit="bytes", bundled=True,
    )  # fmt: skip
    gpu_memory_utilization: float | None = setting(
        None, "share of memory to use where kv_cache_memory is not given: of what is free on CPU, of all on accelerators, "
        "weights included (default: 0.9 there, a quarter of what is free and at most 2 GiB on CPU)",
        SHARE, Scope.ENGINE, flag="",  # of programs the sizes decide that it comes to
    )  # fmt: skip
    enable_prefix_caching: bool = setting(True, "share pages of equal prompt beginnings", SWITCH, Scope.SERVER, flag="")
    policy: str = setting(
        "fcfs", "order of waiting requests", one_of(*POLICIES), Scope.SERVER, flag="--scheduling-policy"
    )
    num_scheduler_steps: int | None = setting(
        None, "decode steps in one dispatch while nothing waits: less host work, coarser streaming (default: 1, and up to 8 "
        "while nobody looks at any running request before it has ended)",
        COUNT, Scope.PROGRAM, flag="", unit="steps",
    )  # fmt: skip
    prefix_first: bool = setting(
        False, "among waiting requests of equal priority, those with the longest cached prefix first",
        SWITCH, Scope.SERVER, flag="",
    )  # fmt: skip
    fair_share: bool = setting(
        False, "serve the least-served tenant (API key or metadata) first, within equal priority",
        SWITCH, Scope.SERVER, flag="",
    )  # fmt: skip
    speculative_config: SpeculativeConfig | None = setting(  # noqa: RUF009 - frozen as well
        None,
        'drafts of tokens to come, several of which a step verifies: \'{"method": "ngram", "num_speculative_tokens": 4}\'; '
        "methods are ngram, suffix, draft_model, mtp, eagle3 and auto (default: none)",
        DRAFTS, Scope.PROGRAM, flag="",
    )  # fmt: skip
    kv_offload_gb: float = setting(
        0.0, "host memory for pages evicted from the device, which come back on a hit",
        GIBIBYTES, Scope.PROGRAM, flag="", unit="GiB",
    )  # fmt: skip
    kv_events_config: str | None = setting(
        None, 'tell of pages that are cached and evicted, as vLLM does: {"enable_kv_cache_events": true, "endpoint": ...} '
        "(default: none is told)", JSON_TEXT, Scope.SERVER, flag="",
    )  # fmt: skip
    role: str | None = setting(
        None, "exchange KV pages with other engines: prefill computes prompts for others and gives their pages, decode takes them "
        "and goes on, both does both (default: no pages are exchanged)",
        one_of("prefill", "decode", "both"), Scope.PROGRAM, flag="",
    )  # fmt: skip
    kv_transfer_config: str | None = setting(
        None, 'with whom and how: {"peers": ["10.0.0.0/8"], "lease_s": 30, "timeout_s": 60}; vLLM\'s kv_role is taken for --role '
        "(default: with engines of this machine)", JSON_TEXT, Scope.SERVER, flag="",
    )  # fmt: skip
    kv_disk: str | None = setting(
        None, "folder for pages that leave host memory (--kv-offload-gb); they outlive the server (default: none)",
        FOLDER, Scope.PROCESS, flag="",
    )  # fmt: skip
    kv_disk_size: int = setting(
        10 * 2**30, "bytes of --kv-disk at most, such as 50GiB", SIZE, Scope.PROCESS, flag="", unit="bytes"
    )
    max_waiting_time: float | None = setting(
        None, "seconds a request may wait for its first step (default: no bound)",
        SECONDS, Scope.SERVER, flag="", unit="s",
    )  # fmt: skip
    max_running_time: float | None = setting(
        None, "seconds a request may run after its first step (default: no bound)",
        SECONDS, Scope.SERVER, flag="", unit="s",
    )  # fmt: skip
    max_num_queued_reqs: int | None = setting(
        None, "requests that may wait; more are refused with RESOURCE_EXHAUSTED (default: no bound)",
        COUNT, Scope.SERVER, flag="", unit="requests",
    )  # fmt: skip
    max_num_queued_tokens: int | None = setting(
        None, "prompt tokens that may wait (default: no bound)", COUNT, Scope.SERVER, flag="", unit="tokens"
    )
    async_scheduling: bool = setting(True, "prepare a step while the one before it runs", SWITCH, Scope.SERVER, flag="")
    compile_cache: str | None = setting(
        None, 'folder of compiled programs; "" for none (default: the user\'s cache folder)',
        FOLDER, Scope.PROCESS, flag="",
    )  # fmt: skip
    weight_cache: str | None = setting(
        None, 'folder of weights in the form in which this CPU computes with them, which a start maps instead of converting '
        'the checkpoint again; "" for none (default: the user\'s cache folder)',
        FOLDER, Scope.PROCESS, flag="", refusable=True,
    )  # fmt: skip
    weight_cache_gb: float = setting(
        32.0, "what that folder may hold; weights that were not used for longest go first",
        GIBIBYTES, Scope.PROCESS, flag="", unit="GiB",
    )  # fmt: skip
    compiled: str | None = setting(
        None, "run the programs that python -m serving.plan --save compiled, and compile nothing",
        FOLDER, Scope.PROCESS, flag="",
    )  # fmt: skip
    attention_backend: str | None = setting(
        None, "force one implementation of paged attention (default: the first that fits)",
        NAME, Scope.PROGRAM, flag="",
    )  # fmt: skip
    progress: bool = setting(True, "show progress bars at start", SWITCH, Scope.PROCESS, flag="")

    # -- images ----------------------------------------------------------------------------------------------------------

    language_model_only: bool = setting(
        False, "load nothing that reads images, and refuse them", SWITCH, Scope.PROGRAM, section="images", flag=""
    )
    mmproj: str | None = setting(
        None, 'file that reads images for a GGUF model (default: mmproj-*.gguf beside it, where there is one); "" for none',
        FILE, Scope.PROGRAM, section="images", flag="", refusable=True,
    )  # fmt: skip
    mm_encoder_cache_gb: float = setting(
        0.25, "device memory for embeddings of images, which are made once for all that send the same one",
        GIBIBYTES, Scope.PROGRAM, section="images", flag="", unit="GiB",
    )  # fmt: skip
    limit_mm_per_prompt: str | None = setting(
        None, 'images, videos and sounds that a request may have: {"image": 4, "video": 1, "audio": 2} (default: 64, 8 and 64)',
        JSON_TEXT, Scope.SERVER, section="images", flag="",
    )  # fmt: skip
    allowed_media_domains: str | None = setting(
        None, "hosts from which images are fetched, with commas between them; * for any public one (default: none, images come "
        "inside requests)", NAME, Scope.SERVER, section="images", flag="",
    )  # fmt: skip
    allowed_local_media_path: str | None = setting(
        None, "folder of which file:// URLs may name images (default: none)",
        FOLDER, Scope.SERVER, section="images", flag="",
    )  # fmt: skip

    # -- adapters --------------------------------------------------------------------------------------------------------

    enable_lora: bool = setting(
        False, "take LoRA adapters beside the model", SWITCH, Scope.PROGRAM, section="adapters", flag=""
    )
    max_loras: int = setting(
        4, "adapters on the devices at once, and so in one batch", COUNT, Scope.PROGRAM, section="adapters", flag=""
    )
    max_lora_rank: int = setting(16, "rank of an adapter at most", COUNT, Scope.PROGRAM, section="adapters", flag="")
    lora_dtype: str = setting(
        "auto", "what adapters' matrices are kept as; auto is float32 beside dense weights in float32, else bfloat16",
        one_of(*LORA_DTYPES), Scope.PROGRAM, section="adapters", flag="",
    )  # fmt: skip
    max_cpu_loras: int | None = setting(
        None, "adapters kept in host memory; others are read again when they are asked for (default: 4 times --max-loras)",
        COUNT, Scope.SERVER, section="adapters", flag="",
    )  # fmt: skip
    default_mm_loras: str | None = setting(
        None, 'adapters of requests that bring something along and name none: {"audio": "PATH"}, also image and video; each is the '
        "model of that name, too", JSON_TEXT, Scope.SERVER, section="adapters", flag="",
    )  # fmt: skip

    # -- devices ---------------------------------------------------------------------------------------------------------

    mesh: str = setting(
        "data=1,model=1",
        "axes of the device mesh and their sizes: data (replicas with pages and requests of their own, which share what the "
        "sizes here allow), model (tensor parallel), expert",
        AXES, Scope.PROGRAM, section="devices", flag="", bundled=True,
    )  # fmt: skip
    cpu_devices: int | None = setting(
        None, "split the CPU into this many devices (default: 1); of each process, where there are several",
        COUNT, Scope.ENGINE, section="devices", flag="",
    )  # fmt: skip
    coordinator: str | None = setting(
        None,
        "run as one of several processes that share the mesh: an address on which process 0 listens for the others, "
        "or auto to ask Cloud TPU, LeaderWorkerSet, Kubernetes, Slurm or Open MPI (default: a single process)",
        ADDRESS, Scope.ENGINE, section="devices", flag="",
    )  # fmt: skip
    num_processes: int | None = setting(
        None, "how many processes there are (default: found)", COUNT, Scope.ENGINE, section="devices", flag=""
    )
    process_id: int | None = setting(
        None, "which one this is: 0 schedules and serves, the others only compute (default: found)",
        INDEX, Scope.PROCESS, section="devices", flag="",
    )  # fmt: skip
    step_timeout: float = setting(
        10.0, "with several processes, seconds that a step may take before the engine counts as stuck and ends",
        SECONDS, Scope.ENGINE, section="devices", flag="", unit="s",
    )  # fmt: skip

    @property
    def adapter_slots(self) -> int:
        """Adapters on the devices at once; 0 where none are taken."""
        return self.max_loras if self.enable_lora else 0

    def __post_init__(self) -> None:
        read_all(self)
