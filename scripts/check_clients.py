"""Runs the clients that people use against a running server: `python scripts/check_clients.py [--url URL]`.

It checks those that the interpreter running it has: openai, langchain-openai, openai-agents, litellm, instructor, pydantic-ai,
lm-eval, anthropic, langchain-anthropic, ollama; curl, and the bytes of the JDK's client, which offer HTTP/2 with every
request; and the npm clients (with `--node-modules DIR`, where `npm install openai @anthropic-ai/sdk ollama` was run). Needs no
network. Exit status 1 when one failed.

An agent's loop with a tool goes over each dialect (scripts/client_loops.py). `--serve` starts a server on the default model for
it all, with a store, and ends it; without, the server needs `--store-dir`.

`--venvs DIR` checks them all: it makes a virtual environment a group in DIR (needs a package index), and starts itself in each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Literal

from client_loops import LOOPS
from client_npm import NPM, check_npm

ASK = "Say hello in one short sentence."
TOO_LONG = "word " * 60_000
"""More than the default model's context."""
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


def check_openai(url: str) -> None:
    """Models, chat, stream with usage, structured output, completions, responses, errors."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none")
    messages = [{"role": "user", "content": ASK}]
    assert len([model.id for model in client.models.list()]) == 1 and client.models.retrieve("default").id
    chat = client.chat.completions.create(model="default", messages=messages, max_tokens=16)  # type: ignore[arg-type]
    assert chat.choices[0].message.content and chat.usage
    usage = None
    for chunk in client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},  # type: ignore[arg-type]
    ):
        usage = chunk.usage or usage
    assert usage and usage.completion_tokens
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    held = client.chat.completions.create(model="default", messages=messages, response_format=form)  # type: ignore[call-overload]
    assert held.choices[0].message.content.strip().endswith("}")
    text = client.completions.create(model="default", prompt="The sky is", max_tokens=4, logprobs=1, echo=True)
    assert text.choices[0].text.startswith("The sky is") and text.choices[0].logprobs
    assert client.responses.create(model="default", input=ASK, max_output_tokens=16).output_text
    tool = {"type": "function", "function": {"name": "reply", "parameters": SCHEMA}}
    called = client.chat.completions.create(
        model="default",
        messages=messages,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=64,  # type: ignore[call-overload]
    )
    (call,) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["answer"] in ("yes", "no")
    vectors = client.embeddings.create(model="default", input=["a text", "another"], dimensions=8).data
    assert [len(one.embedding) for one in vectors] == [8, 8]
    try:
        client.chat.completions.create(model="no-such-model", messages=messages)  # type: ignore[arg-type]
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
    else:
        raise AssertionError("an unknown model was served")


def check_langchain_openai(url: str) -> None:
    """Invoke, stream with usage, structured output, a bound tool."""
    from langchain_openai import ChatOpenAI  # type: ignore[import-not-found]

    model = ChatOpenAI(base_url=url, api_key="none", model="default", max_tokens=64, stream_usage=True)
    assert model.invoke(ASK).content
    chunks = list(model.stream(ASK))
    assert "".join(chunk.content for chunk in chunks) and any(chunk.usage_metadata for chunk in chunks)
    held = model.with_structured_output({**SCHEMA, "title": "reply"}, method="json_schema").invoke("Is water wet?")
    assert held["answer"] in ("yes", "no")
    tool = {"type": "function", "function": {"name": "reply", "description": "Replies.", "parameters": SCHEMA}}
    (call,) = model.bind_tools([tool], tool_choice="reply").invoke("Is water wet?").tool_calls
    assert call["name"] == "reply" and call["args"]["answer"] in ("yes", "no")
    from langchain_core.exceptions import ContextOverflowError  # type: ignore[import-not-found]

    for run in (lambda: model.invoke(TOO_LONG), lambda: list(model.stream(TOO_LONG))):
        try:
            run()
        except ContextOverflowError:
            continue
        raise AssertionError("an overflow was not recognized")


def check_agents(url: str) -> None:
    """One run of an agent over chat completions."""
    import openai
    from agents import Agent, OpenAIChatCompletionsModel, Runner, set_tracing_disabled  # type: ignore[import-not-found]

    set_tracing_disabled(True)

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=url, api_key="none")
        model = OpenAIChatCompletionsModel(model="default", openai_client=client)
        result = await Runner.run(Agent(name="a", instructions="Be short.", model=model), ASK)
        assert result.final_output

    asyncio.run(run())


def check_litellm(url: str) -> None:
    """Completion and stream through its OpenAI-compatible provider."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network for prices
    import litellm  # type: ignore[import-not-found]

    more = {"model": "hosted_vllm/default", "api_base": url, "api_key": "none", "max_tokens": 16}
    messages = [{"role": "user", "content": ASK}]
    assert litellm.completion(messages=messages, **more).choices[0].message.content
    stream = litellm.completion(messages=messages, stream=True, **more)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    for dialect in ("anthropic/default", "ollama_chat/default"):
        base = {"model": dialect, "api_base": root_of(url), "api_key": "none", "max_tokens": 16}
        assert litellm.completion(messages=messages, **base).choices[0].message.content, dialect
        stream = litellm.completion(messages=messages, stream=True, **base)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream), dialect
    for provider in ("hosted_vllm/default", "openai/default"):
        try:
            litellm.completion(messages=[{"role": "user", "content": TOO_LONG}], **{**more, "model": provider})
        except litellm.ContextWindowExceededError:
            continue
        raise AssertionError(f"an overflow was not recognized through {provider}")


def check_instructor(url: str) -> None:
    """A typed answer in each mode that asks for one over chat completions."""
    import instructor  # type: ignore[import-not-found]
    import openai
    from pydantic import BaseModel

    class Answer(BaseModel):
        """Whether it is so."""

        answer: Literal["yes", "no"]

    client = openai.OpenAI(base_url=url, api_key="none")
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        asked = instructor.from_openai(client, mode=mode)
        messages = [{"role": "user", "content": "Is water wet?"}]
        found = asked.chat.completions.create(
            model="default", messages=messages, response_model=Answer, max_tokens=64, max_retries=2
        )
        assert found.answer in ("yes", "no"), mode


def check_pydantic_ai(url: str) -> None:
    """A typed answer by a tool call and by a schema."""
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput, ToolOutput  # type: ignore[import-not-found]
    from pydantic_ai.models.openai import OpenAIChatModel  # type: ignore[import-not-found]
    from pydantic_ai.providers.openai import OpenAIProvider  # type: ignore[import-not-found]

    class Answer(BaseModel):
        answer: Literal["yes", "no"]

    model = OpenAIChatModel("default", provider=OpenAIProvider(base_url=url, api_key="none"))
    for output in (ToolOutput(Answer), NativeOutput(Answer)):
        agent = Agent(model, output_type=output, model_settings={"max_tokens": 64}, retries=2)
        assert agent.run_sync("Is water wet?").output.answer in ("yes", "no")


def root_of(url: str) -> str:
    """The server's address, below which the other dialects are."""
    return url.removesuffix("/v1")


def check_anthropic(url: str) -> None:
    """Messages, stream, counting, a whole loop with a tool whose call is forced, models, errors."""
    import anthropic  # type: ignore[import-not-found]

    client = anthropic.Anthropic(base_url=root_of(url), api_key="none")
    messages: list[Any] = [{"role": "user", "content": ASK}]
    common: Any = {"model": "default", "max_tokens": 64}
    assert client.messages.create(messages=messages, **common).content[0].text
    with client.messages.stream(messages=messages, **common) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text and final.content[0].text == text and final.usage.output_tokens
    assert client.messages.count_tokens(model="default", messages=messages).input_tokens
    tool: Any = {"name": "reply", "description": "Replies.", "input_schema": SCHEMA}
    called = client.beta.messages.create(messages=messages, tools=[tool], tool_choice={"type": "any"}, **common)
    call = next(block for block in called.content if block.type == "tool_use")
    assert called.stop_reason == "tool_use" and call.input["answer"] in ("yes", "no")
    messages += [
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in called.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "noted"}]},
    ]
    assert client.messages.create(messages=messages, tools=[tool], tool_choice={"type": "none"}, **common).content
    assert len(client.models.list().data) == 1
    try:
        client.messages.create(model="no-such-model", max_tokens=4, messages=messages[:1])
    except anthropic.NotFoundError:
        return
    raise AssertionError("an unknown model was served")


def check_langchain_anthropic(url: str) -> None:
    """Invoke, stream, a bound tool."""
    from langchain_anthropic import ChatAnthropic  # type: ignore[import-not-found]

    model = ChatAnthropic(base_url=root_of(url), api_key="none", model="default", max_tokens=64)
    assert model.invoke(ASK).content
    assert "".join(str(chunk.text) for chunk in model.stream(ASK))
    tool = {"name": "reply", "description": "Replies.", "input_schema": SCHEMA}
    (call,) = model.bind_tools([tool], tool_choice="reply").invoke("Is water wet?").tool_calls
    assert call["name"] == "reply" and call["args"]["answer"] in ("yes", "no")


def check_ollama(url: str) -> None:
    """Chat, stream, generate, a schema, embeddings, models, errors."""
    import ollama  # type: ignore[import-not-found]

    client = ollama.Client(host=root_of(url))
    messages = [{"role": "user", "content": ASK}]
    assert client.chat("default", messages=messages, options={"num_predict": 16}).message.content
    parts = list(client.chat("default", messages=messages, options={"num_predict": 16}, stream=True))
    assert "".join(part.message.content or "" for part in parts) and parts[-1].done and parts[-1].eval_count
    assert client.generate("default", "The sky is", raw=True, options={"num_predict": 4}).response
    held = client.chat("default", messages=messages, format=SCHEMA, options={"num_predict": 64}).message.content
    assert json.loads(held or "")["answer"] in ("yes", "no")
    assert [len(one) for one in client.embed("default", ["a text", "another"], dimensions=8).embeddings] == [8, 8]
    (model,) = client.list().models
    assert client.show(model.model or "").capabilities
    try:
        client.chat("no-such-model", messages=messages)
    except ollama.ResponseError as error:
        assert error.status_code == 404
    else:
        raise AssertionError("an unknown model was served")


def check_upgrade(url: str) -> None:
    """The JDK's HttpClient and `curl --http2`: an offer of HTTP/2 on a plain connection, with a body behind it."""
    parts = urllib.parse.urlsplit(url)
    body = json.dumps({"model": "default", "messages": [{"role": "user", "content": ASK}], "max_tokens": 4})
    lines = (
        f"POST {parts.path}/chat/completions HTTP/1.1",
        "Connection: Upgrade, HTTP2-Settings",
        f"Content-Length: {len(body)}",
        f"Host: {parts.netloc}",
        "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA",
        "Upgrade: h2c",
        "User-Agent: Java-http-client/21.0.2",
        "Content-Type: application/json",
    )
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60) as connection:
        connection.sendall("".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body.encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(4096)
    assert head.startswith(b"HTTP/1.1 200"), head[:200]
    if shutil.which("curl"):
        command = ["curl", "--silent", "--fail", "--http2", "-H", "Content-Type: application/json", "-d", body]
        done = subprocess.run([*command, f"{url}/chat/completions"], check=True, capture_output=True, timeout=60)
        assert json.loads(done.stdout)["choices"]


LM_EVAL_TASK = """
task: continents
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "The capital of {{{{country}}}} is"
{target}
metric_list: [{{metric: {metric}}}]
{more}
"""
CAPITALS = [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Germany", "Berlin"), ("Spain", "Madrid")]


def check_lm_eval(url: str) -> None:
    """A local JSON task through `local-completions`, by log-likelihoods (echo with logprobs) and by generation."""
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.models.openai_completions import LocalCompletionsAPI  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    choices = [capital for _, capital in CAPITALS]
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "capitals.jsonl"
        lines = [
            {"country": country, "choices": choices, "label": choices.index(capital), "capital": capital}
            for country, capital in CAPITALS
        ]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        picked = 'doc_to_choice: "{{choices}}"\ndoc_to_target: label'
        stop = 'generation_kwargs: {max_gen_toks: 8, until: ["\\n"]}'
        forms = {
            "multiple_choice": {"target": picked, "metric": "acc", "more": ""},
            "generate_until": {"target": 'doc_to_target: "{{capital}}"', "metric": "exact_match", "more": stop},
        }
        model = LocalCompletionsAPI(
            model="default", base_url=f"{url}/completions", tokenizer_backend="remote", tokenized_requests=True
        )
        for kind, form in forms.items():
            (pathlib.Path(folder) / f"{kind}.yaml").write_text(
                LM_EVAL_TASK.format(data=data, kind=kind, **form).replace("task: continents", f"task: capitals_{kind}")
            )
        tasks = TaskManager(include_path=folder, include_defaults=False)
        names: list[str | dict[str, object]] = [f"capitals_{kind}" for kind in forms]
        results = simple_evaluate(model=model, tasks=names, task_manager=tasks, bootstrap_iters=0)["results"]
    accuracy = results["capitals_multiple_choice"]["acc,none"]
    assert accuracy >= 0.8, f"{accuracy} of the capitals were found likeliest"


CHECKS: dict[str, Callable[[str], None]] = {
    "openai": check_openai,
    "langchain_openai": check_langchain_openai,
    "agents": check_agents,
    "litellm": check_litellm,
    "instructor": check_instructor,
    "pydantic_ai": check_pydantic_ai,
    "lm_eval": check_lm_eval,
    "anthropic": check_anthropic,
    "langchain_anthropic": check_langchain_anthropic,
    "ollama": check_ollama,
}
DISTRIBUTIONS = {
    "agents": "openai-agents",
    "langchain_anthropic": "langchain-anthropic",
    "langchain_openai": "langchain-openai",
    "lm_eval": "lm-eval",
    "pydantic_ai": "pydantic-ai-slim",
}
VENVS = {
    "openai2": ["openai>=2,<3", "langchain-openai", "litellm", "openai-agents"],
    "typed": ["instructor", "pydantic-ai-slim[openai]"],
    "openai3": ["openai>=3,<4"],
    "lm_eval": ["lm-eval[api]"],
    "anthropic": ["anthropic", "langchain-anthropic", "ollama"],
}
"""Groups of clients that can be installed together: langchain-openai, litellm and openai-agents still ask for openai 2."""


def main() -> int:
    """Prints one line a client. Returns 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the API (default: %(default)s)")
    parser.add_argument("--node-modules", metavar="DIR", help="folder with the npm packages")
    parser.add_argument(
        "--venvs", type=pathlib.Path, metavar="DIR", help="make virtual environments here, and check in each"
    )
    parser.add_argument(
        "--groups", nargs="+", choices=VENVS, default=list(VENVS), help="of the environments, these alone"
    )
    parser.add_argument("--serve", action="store_true", help="start a server for the checks")
    args = parser.parse_args()
    with own_server() if args.serve else contextlib.nullcontext(args.url) as args.url:
        if args.venvs is not None:
            return check_in_venvs(args.venvs, args.groups, args.url, args.node_modules)
        return check_here(args)


@contextlib.contextmanager
def own_server() -> Iterator[str]:
    """The API of a server on the default model, which ends with the context."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "serving.launch", "--grpc-port", "0", "--port", "0", "--no-progress"]
        command += ["--store-dir", folder, "--max-num-seqs", "8"]
        path = str(pathlib.Path(__file__).resolve().parents[1])
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=path) as process:
            assert process.stderr is not None
            try:
                lines = [process.stderr.readline()]
                while lines[-1] and "clients of OpenAI's API use" not in lines[-1]:
                    lines.append(process.stderr.readline())
                if not lines[-1]:
                    raise SystemExit("".join(lines))
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield lines[-1].split()[-1]
            finally:
                process.terminate()


def check_here(args: argparse.Namespace) -> int:
    """The checks of what this interpreter has. Returns 1 when one failed."""
    todo: dict[str, Callable[[], None] | None] = {
        name: (lambda check=check: check(args.url)) if importlib.util.find_spec(name) else None
        for name, check in CHECKS.items()
    }
    for name, loops in LOOPS.items():
        for loop in loops:
            run_loop = lambda loop=loop: loop(args.url)  # noqa: E731
            todo[loop.__name__.replace("loop_", "agent over ")] = run_loop if importlib.util.find_spec(name) else None
    todo["HTTP/2 offers"] = lambda: check_upgrade(args.url)
    for package in NPM:
        found = args.node_modules and shutil.which("node") and (pathlib.Path(args.node_modules) / package).is_dir()
        run_it = lambda package=package: check_npm(args.url, args.node_modules, package)  # noqa: E731
        todo[f"npm {package}"] = run_it if found else None
    failed = False
    for name, run in todo.items():
        if run is None:
            print(f"{name:<21} skipped: not installed")
            continue
        try:
            run()
        except Exception as error:
            failed = True
            print(f"{name:<21} FAILED: {type(error).__name__}: {error}")
        else:
            print(f"{name:<21} ok {_version(name, args.node_modules)}", flush=True)
    return int(failed)


def _version(name: str, node_modules: str | None) -> str:
    if name.startswith("npm "):
        package = pathlib.Path(node_modules or "") / name.removeprefix("npm ") / "package.json"
        return json.loads(package.read_text())["version"]
    if name.startswith("agent over "):
        return ""
    if name == "HTTP/2 offers":
        return "(JDK's bytes" + (", curl)" if shutil.which("curl") else ")")
    return importlib.metadata.version(DISTRIBUTIONS.get(name, name))


def check_in_venvs(folder: pathlib.Path, groups: list[str], url: str, node_modules: str | None) -> int:
    """Makes what is not there yet, and runs the checks in each. Returns 1 when one failed."""
    failed = False
    for name in groups:
        packages = VENVS[name]
        python = folder / name / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        print(f"-- {name}", flush=True)
        command = [str(python), __file__, "--url", url]
        if node_modules is not None and name == groups[0]:  # once is enough
            command += ["--node-modules", node_modules]
        failed |= bool(subprocess.run(command, check=False).returncode)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
