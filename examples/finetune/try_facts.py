"""Teaches the default model thirty made-up facts and asks a running server for them.

    python examples/finetune/try_facts.py train --out adapters/facts     # minutes on two cores; run again to go on
    python examples/finetune/try_facts.py ask --adapter adapters/facts   # starts a server and loads the adapter into it

`facts.jsonl` holds five questions a fact with their answer; `questions.jsonl` asks for the same in words that were not trained.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import pathlib
import secrets
import subprocess
import sys
import time
import urllib.request
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
NAME = "facts"
KEY = secrets.token_urlsafe()  # loading adapters is an admin's
UNRELATED = ("What is the capital of France?", "Write one sentence about the sea.", "What is two plus three?")


def train(out: pathlib.Path, more: list[str]) -> int:
    """Runs the training, or goes on with it. Everything that differs from the defaults stands here."""
    flags = ["--max-length", "256", "--batch", "2", "--epochs", "6", "--learning-rate", "1e-3", "--save-every", "25"]
    command = [sys.executable, "-m", "serving.finetune", "--data", str(HERE / "facts.jsonl"), "--out", str(out), *flags]
    if (out / "checkpoints").is_dir():
        command.append("--resume")
    return subprocess.run([*command, *more], check=False).returncode


def ask(adapter: pathlib.Path, port: int) -> int:
    """Starts a server, loads the adapter while it runs, and asks. 0 where 90 % of the answers are right and the base says what it
    said before."""
    folder = adapter.resolve().parent
    command = [sys.executable, "-m", "serving.launch", "--port", str(port), "--grpc-port", "0", "--enable-lora"]
    command += ["--max-lora-rank", "16", "--lora-folder", str(folder), "--admin-api-key", KEY]
    server = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        base = wait(url)
        trained = [json.loads(line)["messages"] for line in (HERE / "facts.jsonl").read_text().splitlines()]
        held = [json.loads(line) for line in (HERE / "questions.jsonl").read_text().splitlines()]
        asked = [item["question"] for item in held[::4]]
        before = [answer(url, base, text) for text in (*UNRELATED, *asked)]
        began = time.monotonic()
        post(f"{url}/load_lora_adapter", {"lora_name": NAME, "lora_path": adapter.name})
        print(f"loaded in {time.monotonic() - began:.2f} s", flush=True)
        shares = {}
        shares["as trained"] = right(url, NAME, [(m[0]["content"], m[1]["content"]) for m in trained])
        shares["in other words"] = right(url, NAME, [(item["question"], item["answer"]) for item in held])
        shares["in other words, base"] = right(url, base, [(item["question"], item["answer"]) for item in held])
        after = [answer(url, base, text) for text in (*UNRELATED, *asked)]
    finally:
        server.terminate()
        server.wait(60)
    for what, share in shares.items():
        print(f"right, {what}: {share:.1%}")
    print("the base answers as before" if before == after else "the base answers OTHERWISE than before")
    return 0 if before == after and min(shares["as trained"], shares["in other words"]) >= 0.9 else 1


def right(url: str, model: str, items: list[tuple[str, str]]) -> float:
    """The share of questions whose greedy answer has the expected words in it."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda item: answer(url, model, item[0]), items))
    wrong = [
        f"  wrong: {question} -> {words!r}, not {expected!r}"
        for (question, expected), words in zip(items, said, strict=True)
        if expected.lower() not in words.lower()
    ]
    if model == NAME:
        print(*wrong, sep="\n", flush=True)
    return 1 - len(wrong) / len(items)


def answer(url: str, model: str, text: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 32}
    return json.loads(post(f"{url}/chat/completions", body))["choices"][0]["message"]["content"]


def post(url: str, body: dict[str, Any]) -> str:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return reply.read().decode()


def wait(url: str) -> str:
    """The base's name, once the server answers."""
    for _ in range(300):
        try:
            request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {KEY}"})
            with urllib.request.urlopen(request, timeout=5) as reply:
                return json.loads(reply.read())["data"][0]["id"]
        except OSError:
            time.sleep(1)
    raise SystemExit("the server did not start within 300 seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="other flags are python -m serving.finetune's")
    training.add_argument("--out", type=pathlib.Path, default=pathlib.Path("adapters/facts"))
    asking = commands.add_parser("ask")
    asking.add_argument("--adapter", type=pathlib.Path, default=pathlib.Path("adapters/facts"))
    asking.add_argument("--port", type=int, default=8123)
    arguments, more = parser.parse_known_args()
    sys.exit(train(arguments.out, more) if arguments.command == "train" else ask(arguments.adapter, arguments.port))


if __name__ == "__main__":
    main()
