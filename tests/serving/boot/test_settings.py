"""One declaration a setting: flags, arguments, checks and what decides a program follow it."""

from __future__ import annotations

import dataclasses
import inspect
import os

import pytest

from serving.boot.engine_flags import SETTINGS, in_flags
from serving.boot.flags.launch import build_parser, describe, engine_config
from serving.engine.api.config import EngineConfig
from serving.engine.api.settings import SECTIONS, Scope
from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.device.programs.bundle import FIXED, NOT_HELD
from serving.engine.device.programs.fingerprint import PROGRAM_SETTINGS, fingerprint
from serving.llm import LLM
from serving.processes.facts import facts

OTHER = {  # another value than the default, of every setting that decides programs
    "dtype": "bfloat16", "quantization": "int8", "kv_cache_dtype": "int8", "max_model_len": 32, "max_num_seqs": 2,
    "max_num_batched_tokens": 64, "page_size": 32, "kv_cache_memory": "1MiB", "mesh": "model=2", "num_scheduler_steps": 4,
    "kv_offload_gb": 1.0, "attention_backend": "xla", "enable_lora": True, "max_loras": 3, "max_lora_rank": 8,
    "speculative_config": {"method": "ngram"}, "role": "both", "lora_dtype": "bfloat16",
    "language_model_only": True, "mm_encoder_cache_gb": 1.0, "mmproj": "eyes.gguf",
}  # fmt: skip


def test_every_field_is_declared():
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    assert list(SETTINGS) == names
    for name, known in SETTINGS.items():
        assert known.help and known.section in SECTIONS, name


def test_every_flag_is_the_settings():
    actions = {action.dest: action for action in build_parser()._actions}
    for name, known in SETTINGS.items():
        if known.flag is None:
            continue
        action = actions[name]
        assert known.flag in action.option_strings and action.help == known.help
        assert action.default == getattr(EngineConfig(), name)
    assert engine_config(build_parser().parse_args([])) == EngineConfig()


def test_llm_takes_every_setting():
    parameters = inspect.signature(LLM).parameters
    assert list(parameters) == list(SETTINGS) and parameters["page_size"].default is None
    with pytest.raises(TypeError, match="Did you mean max_num_seqs"):
        LLM(max_num_seq=3)


@pytest.mark.parametrize(
    "given,read",
    [
        ({"kv_cache_memory": "512MiB"}, 512 << 20),
        ({"kv_cache_memory": "1.5g"}, 3 << 29),
        ({"kv_cache_memory": 4096}, 4096),
        ({"max_num_seqs": "8"}, 8),
        ({"max_waiting_time": 3}, 3.0),
        ({"quantization": None}, "none"),
        ({"max_model_len": None}, None),
    ],
)
def test_values_and_their_texts_are_read_alike(given, read):
    (name,) = given
    assert getattr(EngineConfig(**given), name) == read


@pytest.mark.parametrize(
    "given,sentence",
    [
        ({"kv_cache_memory": "much"}, "kv_cache_memory must be a size such as 4GiB, 500MB or a number of bytes; got 'much'."),
        ({"kv_cache_memory": "0"}, "kv_cache_memory must be a size"),
        ({"kv_cache_memory": 1.5}, "kv_cache_memory must be a size"),
        ({"kv_cache_memory": True}, "kv_cache_memory must be a size"),
        ({"max_num_seqs": 0}, "max_num_seqs must be a whole number of at least 1; got 0."),
        ({"max_num_seqs": 2.5}, "max_num_seqs must be a whole number"),
        ({"process_id": -1}, "process_id must be a whole number of at least 0"),
        ({"page_size": 24}, "page_size must be a power of two from 8 to 256; got 24."),
        ({"page_size": 4}, "page_size must be a power of two"),
        ({"dtype": "float8"}, "dtype must be one of auto, float32, bfloat16, float16; got 'float8'."),
        ({"step_timeout": float("nan")}, "step_timeout must be seconds"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be true or false"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"speculative_config": "ngram"}, "speculative_config: it is no JSON"),
        ({"speculative_config": [1]}, "speculative_config: it must be an object"),
        ({"speculative_config": {}}, "method must be one of ngram, suffix, draft_model, mtp, eagle3, auto; got None."),
        ({"speculative_config": {"method": "n-gram"}}, "method must be one of"),
        ({"speculative_config": {"method": "medusa", "model": "x"}}, "method 'medusa' is not served here yet"),
        ({"speculative_config": {"method": "eagle3"}}, "method 'eagle3' needs a model: the head's checkpoint"),
        ({"speculative_config": {"method": "mtp", "model": "x"}}, "method 'mtp' takes no model"),
        ({"speculative_config": {"method": "draft_model"}}, "needs a model: the draft's checkpoint"),
        ({"speculative_config": {"method": "ngram", "model": "x"}}, "method 'ngram' takes no model"),
        ({"speculative_config": {"method": "ngram", "num_speculative_token": 3}}, "did you mean num_speculative_tokens"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 33}}, "from 1 to 32; got 33."),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": True}}, "from 1 to 32; got True."),
        ({"speculative_config": {"method": "suffix", "suffix_decoding_min_token_prob": 2}}, "a number from 0 to 1; got 2."),
        ({"speculative_config": {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3}}, "more than prompt_lookup"),
        ({"speculative_config": {"method": "auto", "rejection_sample_method": "block"}}, "can only be 'standard' here"),
        ({"speculative_config": "[" * 100_000}, "speculative_config: it is nested too deeply."),
        ({"speculative_config": "null"}, "it must be an object such as"),
        ({"speculative_config": {"method": None}}, "method must be one of"),
        ({"speculative_config": {"method": ["ngram"]}}, "auto; got ['ngram']."),
        ({"speculative_config": {"method": {"ngram": [[[1]]]}}}, "method must be one of"),
        ({"speculative_config": {"model": ""}}, "model must be a file, a folder or a hub id; got ''."),
        ({"speculative_config": {"model": [["a/b"]]}}, "model must be a file, a folder or a hub id; got [['a/b']]."),
        ({"speculative_config": {"method": "eagle3", "model": 7}}, "model must be a file, a folder or a hub id; got 7."),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": "4"}}, "from 1 to 32; got '4'."),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 0}}, "from 1 to 32; got 0."),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": [4]}}, "from 1 to 32; got [4]."),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 1e300}}, "from 1 to 32; got 1e+300."),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 10**5000}}, "from 1 to 32; got a int too large"),
        ({"speculative_config": {"method": "ngram", "prompt_lookup_min": -1}}, "prompt_lookup_min must be a whole number"),
        ({"speculative_config": {"method": "suffix", "suffix_decoding_min_token_prob": float("nan")}}, "from 0 to 1; got nan."),
        ({"speculative_config": {"method": "suffix", "suffix_decoding_max_spec_factor": 10**400}}, "a number from 0 to 64"),
        ({"speculative_config": {"method": "auto", "enable_adaptive_verification": 1}}, "must be true or false; got 1."),
        ({"speculative_config": {"method": "auto", "parallel_drafting": [[True]]}}, "can only be False here; got [[True]]."),
        ({"max_num_seqs": float("inf")}, "max_num_seqs must be a whole number of at least 1; got inf."),
        ({"max_num_seqs": 10**5000}, "max_num_seqs must be a whole number of at least 1; got a int too large to show."),
        ({"kv_transfer_config": '{"peers":' * 100_000}, "kv_transfer_config must be a JSON object"),
    ],
)  # fmt: skip
def test_wrong_values_are_a_sentence(given, sentence):
    with pytest.raises(ValueError) as caught:
        EngineConfig(**given)
    assert sentence in str(caught.value)


def test_a_speculative_config_is_read_as_vllm_reads_it(capsys):
    read = EngineConfig(speculative_config='{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}')
    how = read.speculative_config
    assert how == SpeculativeConfig("ngram", None, 3, 4, 4) and how.draft_tokens == 3
    assert EngineConfig(speculative_config=how) == read
    nothing = {"model": None, "num_speculative_tokens": None, "parallel_drafting": None}
    assert EngineConfig(speculative_config={"method": "suffix", **nothing}).speculative_config.draft_tokens == 8
    assert EngineConfig(speculative_config={"model": "a/b"}).speculative_config.method == "draft_model"
    assert EngineConfig(speculative_config={"method": "deepseek_mtp"}).speculative_config.method == "mtp"
    assert SpeculativeConfig("ngram").prompt_lookup_min == 5
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--speculative-config", '{"method": "auto", "k": 1}'])
    assert "--speculative-config: there is no field 'k'. Its fields are method, model," in capsys.readouterr().err


def test_what_decides_a_program_is_the_settings_scope():
    assert set(OTHER) == set(PROGRAM_SETTINGS) == set(FIXED) | set(NOT_HELD)
    plain = fingerprint(EngineConfig(), "model", "shapes", {})
    for name, value in OTHER.items():
        changed = dataclasses.replace(EngineConfig(), **{name: value})
        assert fingerprint(changed, "model", "shapes", {}) != plain, name
        assert fingerprint(changed, "model", "shapes", {name: getattr(EngineConfig(), name)}) == plain, name
    for name, known in SETTINGS.items():
        if known.scope is not Scope.PROGRAM and known.kind.read is str:
            assert fingerprint(dataclasses.replace(EngineConfig(), **{name: "other"}), "model", "shapes", {}) == plain


def test_keys_in_the_environment_decide_no_program(monkeypatch):
    plain = fingerprint(EngineConfig(), "model", "shapes", {})
    for name in ("JAXSERVE_API_KEY", "JAXSERVE_ADMIN_API_KEY", "JAXSERVE_TARGET_API_KEY", "JAXSERVE_CACHE"):
        monkeypatch.setenv(name, "secret")
    found = fingerprint(EngineConfig(), "model", "shapes", {})
    assert found == plain and "secret" not in found
    monkeypatch.setenv("JAXSERVE_NATIVE", "0" if os.environ.get("JAXSERVE_NATIVE") != "0" else "1")
    assert fingerprint(EngineConfig(), "model", "shapes", {}) != plain


def test_processes_compare_what_they_must_share(tmp_path):
    (tmp_path / "model").write_text("x")
    known = facts(EngineConfig(), tmp_path / "model")
    shared = {s.flag for s in SETTINGS.values() if s.scope in (Scope.PROGRAM, Scope.ENGINE)}
    assert {name for name in known if name.startswith("--")} == shared
    assert "--process-id" not in shared and "--scheduling-policy" not in shared and "--mesh" in shared


def test_start_up_shows_what_was_given():
    parser = build_parser()
    assert describe(parser.parse_args([])) == "every setting is the default; --help lists them"
    given = "--max-model-len 64 --no-progress --no-http --api-key s3cret --kv-cache-memory 1MiB"
    assert describe(parser.parse_args(given.split())) == (
        "given: --api-key (1 hidden), --kv-cache-memory 1048576 bytes, --max-model-len 64 tokens, --no-http, --no-progress"
    )


@pytest.mark.parametrize(
    "sentence,words",
    [
        ("max_num_seqs is 3; raise kv_cache_memory.", "--max-num-seqs is 3; raise --kv-cache-memory."),
        ("policy must be one of fcfs.", "--scheduling-policy must be one of fcfs."),
        ("the model has no policy.", "the model has no policy."),
        ("an API key takes printable characters.", "an API key takes printable characters."),
        ("ssl_keyfile and ssl_certfile go together.", "--ssl-keyfile and --ssl-certfile go together."),
        ("--max-num-seqs is 3.", "--max-num-seqs is 3."),
        ("no file my_model_dir here.", "no file my_model_dir here."),
    ],
)
def test_sentences_name_flags(sentence, words):
    assert in_flags(sentence, vars(build_parser().parse_args([])).keys()) == words
