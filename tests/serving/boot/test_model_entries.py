"""Several models by flags and by file: what each gets, and what is refused."""

from __future__ import annotations

import json

import pytest

from serving.boot.flags.launch import parse

YAML = """
memory: 4GiB
models:
  - name: chat
    model: ./chat.gguf
    aliases: [gpt-4o-mini]
    pinned: true
    max-model-len: 1024
    kv_cache_memory: 512MiB
    tool_call_parser: hermes
  - name: embed
    model: org/minilm
    keep_alive: 60
    sleep_level: 1
    tenants: [alice]
"""
TOML = '[models.chat]\nmodel = "./chat.gguf"\npinned = true\n[models.embed]\nmodel = "org/minilm"\n'


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        parse(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_one_model_is_no_fleet_and_may_be_given_a_name(tmp_path):
    args, config = parse([])
    assert args.entries == () and config.model is None
    args, config = parse(["--model", "org/name"])
    assert args.entries == () and config.model == "org/name" and not args.served_model_name
    args, config = parse(["--model", "mine=org/name"])
    assert config.model == "org/name" and args.served_model_name == ["mine"]
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert parse(["--model", str(odd)])[1].model == str(odd)


def test_model_several_times_shares_the_other_flags():
    args, _ = parse(["--model", "a=x.gguf", "--model", "/models/Some Thing.gguf", "--max-num-seqs", "8"])
    assert [(one.name, one.config.model, one.config.max_num_seqs) for one in args.entries] == [
        ("a", "x.gguf", 8), ("Some-Thing", "/models/Some Thing.gguf", 8),
    ]  # fmt: skip
    assert [one.config.served_model_name for one in args.entries] == ["a", "Some-Thing"]


@pytest.mark.parametrize(("ending", "text"), [("yaml", YAML), ("toml", TOML), ("json", None)])
def test_a_file_of_each_kind(tmp_path, ending, text):
    (tmp_path / "chat.gguf").write_bytes(b"")
    if text is None:
        text = json.dumps(
            {
                "models": [
                    {"name": "chat", "path": "./chat.gguf", "pinned": True},
                    {"name": "embed", "model": "org/minilm"},
                ]
            }
        )
    file = tmp_path / f"models.{ending}"
    file.write_text(text)
    args, _ = parse(["--models", str(file), "--api-key", "sk-0123456789abcdef", "--max-model-len", "256"])
    chat, embed = args.entries
    assert (chat.name, chat.pinned, chat.config.model) == ("chat", True, str(tmp_path / "chat.gguf"))
    assert (embed.name, embed.pinned, embed.config.model, embed.config.max_model_len) == (
        "embed",
        False,
        "org/minilm",
        256,
    )
    if ending == "yaml":
        assert (chat.aliases, chat.config.max_model_len, chat.config.kv_cache_memory) == (
            ("gpt-4o-mini",),
            1024,
            512 << 20,
        )
        assert (chat.tool_call_parser, embed.keep_alive, embed.level("cpu"), embed.tenants) == (
            "hermes",
            60.0,
            1,
            ("alice",),
        )
        assert chat.level("cpu") == 2 and chat.level("gpu") == 1


def test_adapters_of_a_model_lie_beside_the_file(tmp_path):
    (tmp_path / "pirate").mkdir()
    both = [{"name": "pirate", "path": "pirate"}, "org=owner/adapter"], {"pirate": "pirate", "org": "owner/adapter"}
    for given in both:
        file = tmp_path / "models.json"
        file.write_text(json.dumps({"models": [{"name": "a", "enable_lora": True, "lora_modules": given}]}))
        (entry,) = parse(["--models", str(file)])[0].entries
        found = [(one.lora_name, one.lora_path) for one in entry.lora_modules]
        assert found == [("pirate", str(tmp_path / "pirate")), ("org", "owner/adapter")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: []", "must have 'models'"),
        ("models: [{name: a, modle: x}]", "'modle', which is no setting of a model; model?"),
        ("models: [{name: a, model: x}, {name: b, aliases: [a]}]", "cannot be called 'a': 'a' answers to it already"),
        ("models: [{name: default, model: x}]", "it means the first one"),
        ("models: [{name: '../x', model: x}]", "a name must be letters"),
        ("models: [{name: a, keep_alive: soon}]", "a: keep_alive must be seconds"),
        ("models: [{name: a, max_model_len: none}]", "a: --max-model-len must be a whole number"),
        ("models: [{name: a, tenants: [alice]}]", "without API keys nobody is told from others"),
        ("models: [{name: a, coordinator: auto}]", "no setting of a model"),
        ("models: [{name: a, enable_lora: true, default_mm_loras: {audio: .}}]", "no setting of a model"),
        ("models: [{name: a}]\nmemory: lots", "memory must be a size"),
        ("models: [{name: a}]\nport: 80", "there is no 'port'"),
        ("models: [", "while parsing"),
        ("models: [{name: a, enable_lora: true, lora_modules: b}]", "a: --lora-modules must be a list"),
        ("models: [{name: a, enable_lora: true, lora_modules: [b]}]", "--lora-modules: each must be name=path"),
        ("models: [{name: a, enable_lora: true, lora_modules: [b=/nowhere/at all]}]", "no directory, no file"),
        ("models: [{name: a, lora_modules: [b=.]}]", "it needs --enable-lora too"),
        ("models: [{name: a, enable_lora: true, lora_modules: [a=.]}]", "cannot be called 'a'"),
        (
            "models: [{name: a, enable_lora: true, lora_modules: [{name: b, path: ., tenants: [alice]}]}]",
            "told from others",
        ),
    ],
)
def test_wrong_files_are_told_in_a_sentence(tmp_path, capsys, text, said):
    file = tmp_path / "models.yaml"
    file.write_text(text)
    assert said in refused(capsys, "--models", str(file))


def test_what_is_for_one_model_is_refused(capsys, tmp_path):
    two = ["--model", "a=x", "--model", "b=y"]
    assert "--served-model-name is for one model" in refused(capsys, *two, "--served-model-name", "c")
    assert "is for one model" in refused(capsys, *two, "--coordinator", "auto")
    assert "cannot be read" in refused(capsys, "--models", str(tmp_path / "none.yaml"))
