"""A chat front end that is not ours, out of its package, against a running server, driven in Chromium:

    python scripts/check_front_end.py --front DIR/bin/python [--url URL] [--shot FILE.png]

The front end is Gradio's own page for servers of OpenAI's API (`gradio.load_chat`; none of our code): --front is an interpreter
that has `gradio>=6` and `openai`. `--serve` starts a server on the default model for it. Needs chromium and chromedriver. Exit
status 1 where no answer came.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1]), str(pathlib.Path(__file__).resolve().parent)]

from check_clients import own_server  # noqa: E402

from tests.serving.frontends.page.browser import Browser, missing  # noqa: E402

FRONT = """
import sys, gradio
chat = gradio.load_chat(sys.argv[1], model="default", token="none", file_types=None)
chat.launch(server_name="127.0.0.1", server_port=int(sys.argv[2]), quiet=True)
"""
QUESTION = "What is the capital of France?"
ENOUGH = 300
ANSWERS = (
    "[...document.querySelectorAll('.message.bot, .bot.message, [data-testid=bot]')].map((one) => one.innerText.trim())"
)


async def drive(address: str) -> tuple[str, bytes]:
    """Asks in the page. Returns the answer, once it grows no more or has `ENOUGH` characters (small models may go on to the
    context's end, and the front end sets no bound), and a picture of it."""
    with tempfile.TemporaryDirectory() as profile:
        async with Browser(profile) as page:
            await page.open(address)
            await page.wait("document.querySelector('textarea')")
            await page.type("textarea", QUESTION + "\n")
            answer = ""
            while True:
                await page.wait(f"{ANSWERS}.some((text) => text)")
                now = (await page.run(ANSWERS))[-1]
                if now and (now == answer or len(now) > ENOUGH):
                    break
                answer = now
                await asyncio.sleep(2)
            return answer, await page.screenshot()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Returns once something answers there."""
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        if process.poll() is not None:
            raise SystemExit("the front end ended before it was ready")
        time.sleep(0.2)
    raise SystemExit("the front end did not begin to answer")


def main() -> int:
    """Prints the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--front", required=True, help="an interpreter that has the front end")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the API (default: %(default)s)")
    parser.add_argument("--serve", action="store_true", help="start a server for it")
    parser.add_argument("--shot", type=pathlib.Path, help="where a picture of the page goes")
    args = parser.parse_args()
    if (lacks := missing()) is not None:
        print(f"{lacks} is not installed", file=sys.stderr)
        return 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with own_server() if args.serve else contextlib.nullcontext(args.url) as url:
        front = subprocess.Popen([args.front, "-c", FRONT, url, str(port)])
        try:
            address = f"http://127.0.0.1:{port}/"
            wait_for(address, front)
            answer, picture = asyncio.run(drive(address))
        finally:
            front.terminate()
            front.wait()
    if args.shot is not None:
        args.shot.write_bytes(picture)
    print(f"{QUESTION} {answer}")
    return 0 if answer else 1


if __name__ == "__main__":
    sys.exit(main())
