"""Adapters on a running engine: every request with its own, alone and all mixed, against transformers with peft."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from serving import LLM, LoRARequest, SamplingParams
from tests.models.adapters.make import SIZES, write_adapter, write_base
from tests.tiny_checkpoint import VOCAB

STEPS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
ATTENTION = tuple(name for name in SIZES if name.startswith("self_attn"))
ADAPTERS = {
    "all": {"rank": 4},
    "small": {"rank": 1, "targets": ("self_attn.q_proj", "self_attn.v_proj"), "seed": 1},
    "wide": {
        "rank": 8,
        "targets": ("mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj"),
        "seed": 2,
        "use_rslora": True,
    },
    "attention": {"rank": 6, "targets": ATTENTION, "seed": 3, "alpha_pattern": {"q_proj": 3}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    base = write_base(folder / "base")
    return base, {name: write_adapter(folder / name, **fields) for name, fields in ADAPTERS.items()}


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    shared = rng.integers(3, VOCAB, 40).tolist()  # more than a page, so that prefixes could be shared
    return [shared + rng.integers(3, VOCAB, n).tolist() for n in (5, 21, 1)]


@pytest.fixture(scope="module")
def expected(made, prompts):
    """Greedy tokens of the base (None) and of each adapter, by transformers and peft."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base, adapters = made
    found = {}
    for name, path in [(None, None), *adapters.items()]:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if path is not None:
            model = peft.PeftModel.from_pretrained(model, path)
        model.eval()
        with torch.no_grad():
            for i, prompt in enumerate(prompts):
                ids = model.generate(
                    input_ids=torch.tensor([prompt]),
                    max_new_tokens=STEPS,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                found[name, i] = ids[0, len(prompt) :].tolist()
    return found


def start(base, **settings):
    options = {
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 64,
        "progress": False,
    }
    return LLM(str(base), enable_lora=True, max_lora_rank=8, **{"kv_cache_memory": "8MiB", **options, **settings})


@pytest.fixture(scope="module")
def llm(made):
    engine = start(made[0], max_loras=4)
    yield engine
    engine.shutdown()
    gc.collect()


def request(made, name):
    return None if name is None else LoRARequest(name, 1, str(made[1][name]))


def ids(prompts):
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def test_each_adapter_alone(llm, made, prompts, expected):
    for name in (None, *ADAPTERS):
        outputs = llm.generate(ids(prompts), GREEDY, use_tqdm=False, lora_request=[request(made, name)] * len(prompts))
        for i, out in enumerate(outputs):
            assert out.outputs[0].token_ids == expected[name, i], (name, i)
    assert len({tuple(expected[name, 0]) for name in (None, *ADAPTERS)}) == 5, "the adapters say something else each"


def test_all_mixed_with_the_base_and_no_page_shared(llm, made, prompts, expected):
    names = ([*(None, *ADAPTERS)] * 7)[:32]
    for _ in range(2):  # the second time every prefix is cached, of each adapter's own
        outputs = llm.generate(
            ids(prompts[i // 5 % 3] for i in range(32)),
            GREEDY,
            use_tqdm=False,
            lora_request=[request(made, n) for n in names],
        )
        for i, out in enumerate(outputs):
            assert out.outputs[0].token_ids == expected[names[i], i // 5 % 3], (names[i], i)
    assert outputs[0].num_cached_tokens > 0 and outputs[1].num_cached_tokens > 0


@pytest.fixture(scope="module")
def narrow(made):
    """Fewer slots than adapters, fewer pages than requests, and host memory behind them."""
    engine = start(made[0], max_loras=2, max_num_seqs=4, kv_cache_memory="192KiB", kv_offload_gb=0.002)
    yield engine
    engine.shutdown()
    gc.collect()


def test_more_adapters_than_slots_and_no_compilation(narrow, made, prompts, expected):
    guard = narrow._started.engine.runner.guard
    order = [*ADAPTERS, None, *reversed(ADAPTERS)] * 2
    outputs = narrow.generate(
        ids([prompts[0]] * len(order)), GREEDY, use_tqdm=False, lora_request=[request(made, name) for name in order]
    )
    for name, out in zip(order, outputs, strict=True):
        assert out.outputs[0].token_ids == expected[name, 0], name
    guard.check()
    scheduler = narrow._started.engine.scheduler
    assert scheduler.adapters.running == frozenset()
    loaded = scheduler.adapters.num_loaded
    assert loaded >= len(ADAPTERS)
    for name in ADAPTERS:  # two at least were given up for the others
        (out,) = narrow.generate(ids(prompts[:1]), GREEDY, use_tqdm=False, lora_request=request(made, name))
        assert out.outputs[0].token_ids == expected[name, 0], name
    assert scheduler.adapters.num_loaded > loaded
    guard.check()


def test_preempted_pages_and_those_in_host_memory_are_each_adapters_own(narrow, made, prompts, expected):
    tier = narrow._started.engine.scheduler.kv.managers[0].host_tier
    before, restored = narrow.stats().num_preemptions, tier.num_restored
    names = [None, *ADAPTERS] * 2
    for _ in range(2):
        for i in range(len(prompts)):
            outputs = narrow.generate(
                ids([prompts[i]] * 10), GREEDY, use_tqdm=False, lora_request=[request(made, name) for name in names]
            )
            for name, out in zip(names, outputs, strict=True):
                assert out.outputs[0].token_ids == expected[name, i], (name, i)
    assert narrow.stats().num_preemptions > before and tier.num_restored > restored
    narrow._started.engine.runner.guard.check()


@pytest.mark.parametrize("level", [1, 2])
def test_after_a_sleep_adapters_are_loaded_anew(narrow, made, prompts, expected, level):
    lifecycle = narrow._started.engine.lifecycle
    lifecycle.sleep(level)
    lifecycle.wake()
    for name in (None, "wide", "all"):
        (out,) = narrow.generate(ids(prompts[:1]), GREEDY, use_tqdm=False, lora_request=request(made, name))
        assert out.outputs[0].token_ids == expected[name, 0], name


def test_vectors_and_scores_are_those_of_the_adapter(llm, made, prompts):
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base, adapters = made
    wanted = {}
    for name in (None, "all"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        model = model if name is None else peft.PeftModel.from_pretrained(model, adapters[name]).eval()
        with torch.no_grad():
            hidden = [model(torch.tensor([p]), output_hidden_states=True).hidden_states[-1][0].mean(0) for p in prompts]
        wanted[name] = [(one / one.norm()).numpy() for one in hidden]
    who = [None, "all", "all"]
    for output, name, i in zip(
        llm.embed(ids(prompts), pooling="mean", use_tqdm=False, lora_request=[request(made, n) for n in who]),
        who, range(3), strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(output.outputs.embedding, wanted[name][i], atol=1e-5)
    texts = ["w3 w4", "w5 w6 w7"]
    own = np.array(
        [one.outputs.embedding for one in llm.embed(texts, use_tqdm=False, lora_request=request(made, "all"))]
    )
    (score,) = llm.score(*texts, lora_request=request(made, "all"))
    assert score == pytest.approx(own[0] @ own[1], abs=1e-5) and score != pytest.approx(llm.score(*texts)[0], abs=1e-4)


def test_a_path_is_read_once_whatever_it_is_written_like(llm, made, monkeypatch):
    path, store = str(made[1]["all"]), llm._started.engine.runner.adapters
    loads, load = [], store.load
    monkeypatch.setattr(store, "load", lambda *args, **more: (loads.append(args), load(*args, **more))[1])
    monkeypatch.setattr(store, "locate", lambda given: made[1]["all"])  # as a hub id leads to files in a cache
    for _ in range(2):
        llm.generate(["w3"], GREEDY, use_tqdm=False, lora_request=LoRARequest("odd", 1, "owner/odd"))
    assert len(loads) == 1
    llm.generate(["w3"], GREEDY, use_tqdm=False, lora_request=LoRARequest("odd", 1, path))
    assert len(loads) == 2, "another path is another adapter"
    again = LoRARequest(lora_name="odd", lora_int_id=1, lora_path=path, base_model_name="x", load_inplace=True)
    llm.generate(["w3"] * 3, GREEDY, use_tqdm=False, lora_request=again)
    assert len(loads) == 3, "once a call"


def test_the_same_name_with_other_content_shares_nothing(llm, made, prompts, expected):
    first = LoRARequest("changing", 1, str(made[1]["all"]))
    second = LoRARequest("changing", 1, str(made[1]["wide"]))
    for given, name in ((first, "all"), (second, "wide"), (first, "all")):
        (out,) = llm.generate(ids(prompts[:1]), GREEDY, use_tqdm=False, lora_request=given)
        assert out.outputs[0].token_ids == expected[name, 0]


def test_what_does_not_fit_is_refused(llm, made, tmp_path):
    with pytest.raises(ValueError, match="rank 9; --max-lora-rank is 8"):
        llm.generate(
            ["w3"], GREEDY, use_tqdm=False, lora_request=LoRARequest("r", 1, str(write_adapter(tmp_path / "r", rank=9)))
        )
    from safetensors.numpy import load_file, save_file

    folder = write_adapter(tmp_path / "other")
    tensors = load_file(folder / "adapter_model.safetensors")
    moved = {name.replace("layers.1", "layers.7"): value for name, value in tensors.items()}
    save_file(moved, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"7 of its 14 matrices change no weight .*layers\.7"):
        llm.generate(["w3"], GREEDY, use_tqdm=False, lora_request=LoRARequest("o", 1, str(folder)))
    wrong = {
        name: np.ascontiguousarray(value[:, :-1]) if "q_proj.lora_A" in name else value
        for name, value in tensors.items()
    }
    save_file(wrong, folder / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"q_proj.weight are for a weight of \[96, 47\]; the served model's is \[96, 48\]"
    ):
        llm.generate(["w3"], GREEDY, use_tqdm=False, lora_request=LoRARequest("s", 1, str(folder)))
    plain = llm.generate(["w3"], GREEDY, use_tqdm=False)
    assert len(plain[0].outputs[0].token_ids) == STEPS


def test_without_room_adapters_are_refused(made, tmp_path):
    engine = LLM(
        str(made[0]),
        dtype="float32",
        max_model_len=64,
        max_num_seqs=1,
        max_num_batched_tokens=32,
        kv_cache_memory="4MiB",
        progress=False,
    )
    try:
        with pytest.raises(ValueError, match="enable_lora=True"):
            engine.generate(["w3"], GREEDY, use_tqdm=False, lora_request=request(made, "all"))
    finally:
        engine.shutdown()
