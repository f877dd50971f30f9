"""Classes of flaws that were published against servers of language models, each shown not to be here; docs/security.md lists
them all and where the others are tested. It is a test of the whole, so it sits above the folders."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import socket
import sys

import numpy as np
import pytest

from serving.access.flags import access_of, is_loopback, tls_of, warnings_for
from serving.boot.flags import launch as flags
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.cache import kv_manager, prefixes
from serving.engine.cache.page_pool import PagePool
from serving.engine.requests.request import Request
from serving.engine.requests.slots import SlotTable
from serving.errors import RequestError
from serving.frontends.app import create_app
from serving.gateway import flags as gateway_flags
from serving.service import GenerateInput
from serving.service.replies.stop_strings import StopMatcher
from tests.mock_engine import MockEngine, mock_service

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("serving", "models", "ops", "sharding", "proto")

# Where something that could run foreign code is used, and why that is no way in.
ALLOWED = {
    (
        "serving/engine/device/programs/compiling.py",
        "pickle",
    ),  # programs that this user compiled, in a folder of mode 0700, owner checked
    ("serving/engine/device/programs/bundle.py", "pickle"),  # programs that the operator names with --compiled
    ("serving/text/template_process.py", "subprocess"),  # starts the worker that renders templates, by our own path
    ("models/loading/default_model.py", "subprocess"),  # pip, with fixed arguments, for the default model
    ("ops/native/build.py", "subprocess"),  # the C++ compiler, at start
    ("serving/reliability/supervisor.py", "subprocess"),  # the server itself
    ("serving/metrics/logs.py", "subprocess"),  # the script beside us that makes JSON of others' log lines
    ("serving/plan/__main__.py", "subprocess"),  # this very command again, which a compiler may end
    ("models/registry.py", "import_module"),  # our own families, and plug-ins that are installed
    (
        "models/bridge/family.py",
        "subprocess",
    ),  # our own recorder, by its module's name, of the installed transformers' code
    ("serving/media/video.py", "subprocess"),  # starts the process that decodes videos, by our own path
    ("serving/boot/flags/file.py", "yaml"),  # safe_load, of a file that the operator names with --models
    ("serving/command/__main__.py", "import_module"),  # its own files, by a table of words
    ("serving/__init__.py", "import_module"),  # our own modules, by name
}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {"import_module", "system", "popen", "exec_module", "marshal", "load_module"}
MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "yaml", "subprocess", "joblib"}


def _uses(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0]} & MODULES
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                found.add(node.func.id)
            if isinstance(node.func, ast.Attribute) and node.func.attr in ATTRIBUTES:
                found.add(node.func.attr)
            asked = {k.arg for k in node.keywords if not (isinstance(k.value, ast.Constant) and k.value.value is False)}
            if asked & {"shell", "trust_remote_code", "allow_pickle"}:
                found.add("shell or foreign code")
    return found


def test_nothing_unpickles_evaluates_or_runs_what_came_from_outside():
    """Over every file, so that a new one is in: sockets carry protobuf and JSON alone."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name]
    assert len(files) > 100
    found = {(path.relative_to(ROOT).as_posix(), use) for path in files for use in _uses(path)}
    assert not found - ALLOWED


def test_the_walk_sees_what_it_is_for(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import pickle\nfrom yaml import load\neval('1')\nnp.load(f, allow_pickle=True)\n")
    quiet = tmp_path / "quiet.py"
    quiet.write_text("np.load(f, allow_pickle=False)\n")
    assert not _uses(quiet)
    assert _uses(path) == {"pickle", "yaml", "eval", "shell or foreign code"}


def test_servers_listen_on_this_machine_alone_unless_told():
    args, _ = flags.parse([])
    assert is_loopback(args.host) and is_loopback(gateway_flags.parse(["--target", "x:1"]).host)
    assert not warnings_for(args.host, access_of(args), tls_of(args))
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        wide, _ = flags.parse(["--host", host])
        assert any("without an API key" in line for line in warnings_for(host, access_of(wide), None))
        keyed, _ = flags.parse(["--host", host, "--api-key", "sk-0123456789abcdef"])
        assert [line for line in warnings_for(host, access_of(keyed), None) if "without TLS" in line]


def test_keys_are_not_shown():
    args, _ = flags.parse(["--api-key", "sk-0123456789abcdef", "--admin-api-key", "sk-admin-0123456789"])
    text = flags.describe(args)
    assert "sk-" not in text and "(1 hidden)" in text


def test_code_in_a_model_folder_is_never_run(tmp_path):
    """A repository names its own classes (`auto_map`) and brings them along."""
    from models.loading.load import load_model
    from models.loading.source import resolve

    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('it ran')\n")
    config = {
        "architectures": ["EvilForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="EvilForCausalLM"):
        load_model(resolve(str(tmp_path)), progress=False)
    assert "modeling_evil" not in sys.modules


def test_pickled_weights_are_refused(tmp_path):
    from models.loading.load import load_model
    from models.loading.source import resolve

    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ValueError, match="pickle"):
        load_model(resolve(str(tmp_path)), progress=False)


def test_a_program_that_another_user_could_have_written_is_not_loaded(tmp_path, monkeypatch):
    from serving.engine.device.programs import compiling

    cache = compiling.ProgramCache(tmp_path / "programs", "x")
    assert (tmp_path / "programs").stat().st_mode & 0o077 == 0
    path = cache._path("p")
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    monkeypatch.setattr(compiling.os, "getuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(compiling.serialize_executable, "deserialize_and_load", lambda *a, **k: pytest.fail("loaded"))
    assert cache.load("p") is None


async def test_a_requests_own_template_is_not_used():
    from serving.frontends.openai.batches.runner import call_app

    engine = MockEngine(reply="a")
    app = create_app(mock_service(engine), page=False)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert (await call_app(app, "/v1/chat/completions", body, "a"))[0] == 200
    for extra in (
        {"chat_template": "{{ 7 * 7 }}"},
        {"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}},
        {"chat_template_kwargs": {"messages": "x"}},
        {"chat_template_kwargs": {"tokenizer": "x"}},
    ):
        await call_app(app, "/v1/chat/completions", {**body, **extra}, "b")
    prompts = {bytes(t for t in r.prompt_token_ids if t < 256) for r in engine.requests}
    assert prompts == {b"hi"}, "whatever came, the prompt is the server's template over the messages"


async def test_nothing_is_fetched_for_a_request(monkeypatch):
    """No media yet: a URL in a request is refused, or text; no name is resolved and nothing connected to."""
    from serving.frontends.openai.batches.runner import call_app

    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("a name was resolved"))
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("a connection was made"))
    app = create_app(mock_service(MockEngine(reply="a")), page=False)
    url = "http://169.254.169.254/latest/meta-data/"
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url}},
    ):
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
        status, reply = await call_app(app, "/v1/chat/completions", body, "a")
        assert status == 400 and "text" in reply["error"]["message"]
    schema = {"type": "object", "properties": {"a": {"$ref": url}}}
    body = {"prompt": "a", "max_tokens": 2, "structured_outputs": {"json": schema}}
    assert (await call_app(app, "/v1/completions", body, "a"))[0] in (400, 501)


def test_a_digest_collision_gives_nobody_anothers_pages():
    pool = PagePool(8, 8)
    (page,) = pool.allocate(1) or []
    pool.register(page, b"same digest", np.arange(8, dtype=np.int32).tobytes())
    assert pool.holds(b"same digest", np.arange(8, dtype=np.int32).tobytes())
    assert not pool.holds(b"same digest", np.arange(1, 9, dtype=np.int32).tobytes())


def test_a_request_gets_no_pages_of_a_digest_that_is_anothers(monkeypatch):
    monkeypatch.setattr(prefixes, "chain_digest", lambda parent, tokens: b"same digest")
    manager = kv_manager.KVManager(PagePool(8, 8), SlotTable(2, 4))
    first, second = (
        Request(EngineRequest(name, tokens, SamplingParams()), i)
        for i, (name, tokens) in enumerate((("a", tuple(range(9))), ("b", tuple(range(1, 10)))))
    )
    assert manager.admit(first, 0)
    first.num_computed = 8
    manager.register(first)
    assert manager.cached_pages(first) == 1
    assert manager.cached_pages(second) == 0 and manager.admit(second, 0)
    assert second.num_computed == 0 and second.pages[0][0] != first.pages[0][0]


@pytest.mark.timeout(60)
def test_looking_for_stop_strings_costs_the_same_for_every_character():
    """A million characters that nearly match, one at a time. What looks back over all of them each time needs hours."""
    matcher = StopMatcher(("a" * 500 + "b", "a" * 300 + "c"), False)
    out = sum(len(matcher.push("a")) for _ in range(1_000_000))
    assert matcher.matched is None and out >= 1_000_000 - 500


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["<", "<tool_call>", '{"', "[" * 10, '\\"'])
def test_looking_for_tool_calls_costs_the_same_for_every_character(text):
    from serving.text.tools import tool_family
    from serving.text.tools.parser import ReplyParser

    parser = ReplyParser(tool_family("hermes"))
    for _ in range(100_000 // len(text)):
        parser.push(text)


async def test_template_variables_cannot_replace_what_the_server_sets():
    service = mock_service(MockEngine(reply="a"))
    for name in ("messages", "tools", "add_generation_prompt", "tokenizer"):
        with pytest.raises(RequestError):
            GenerateInput(messages=[{"role": "user", "content": "x"}], chat_template_kwargs={name: "x"}).check(
                service.limits
            )


def test_the_tests_that_the_document_names_are_there():
    """`path::test`, `::test` of the same path, or a whole file, below tests/ or tests/serving/; or a script."""
    rows = [line for line in (ROOT / "docs/security.md").read_text().splitlines() if line.startswith("| ")]
    named, path = 0, None
    for row in rows:
        for file, name in re.findall(r"`([\w/]*\.py)?(?:::(test_\w+))?`", row.split("|")[-2]):
            if not file and not name:
                continue
            if file:
                places = (ROOT / "tests" / file, ROOT / "tests/serving" / file, ROOT / file)
                path = next((place for place in places if place.is_file()), None)
            assert path is not None, f"{file} of {row[:60]}"
            assert not name or f"def {name}(" in path.read_text(), f"{name} in {path}"
            named += 1
    assert named > 25
