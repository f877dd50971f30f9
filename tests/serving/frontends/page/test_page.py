"""The playground in a real browser: conversations and what can be done with them, errors and keys, both themes, phone and desktop,
and axe's rules for those who use a keyboard or a screen reader."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import httpx
import pytest

from serving.access import Access, KeyRing
from serving.engine.api.adapters import AdapterInfo
from serving.frontends.page.page import STATIC, page_paths
from tests.mock_engine import MockEngine, MockTemplate, until
from tests.serving.frontends.conftest import Running, Start
from tests.serving.frontends.page import browser
from tests.serving.frontends.page.driving import TEXTS, act, answered, give, needs_browser, opened, said
from tests.serving.frontends.page.test_documents import pdf
from tests.serving.media.images import encoded, image_service

REPLY = "Here is **bold**, `code` and <b>no markup</b>:\n```python\nprint('hi')\n```\nDone."
CONTROL, ESCAPE, UP = "\ue009", "\ue00c", "\ue013"  # WebDriver's names for keys
KEY = "sk-0123456789abcdef"


async def test_the_page_loads_nothing_from_elsewhere(running: Running):
    reply = await running.http.get("/")
    policy = reply.headers["content-security-policy"]
    assert reply.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    for file in (one for one in STATIC.rglob("*") if one.is_file()):
        text = file.read_text()
        assert not re.findall(r"https?://(?!www\.w3\.org/|\[)", text.replace("https?:\\/\\/", "")), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", text), (
            file.name
        )
        assert not re.search(r"\bon\w+=|style=", text) or file.suffix == ".svg", file.name
        for path in re.findall(r'(?:src="|href="|from ")(/static/[^"]+)"', text):
            assert path in page_paths(), f"{file.name} wants {path}"
    for path in page_paths():
        found = await running.http.get(path)
        assert found.status_code == 200 and found.headers["x-content-type-options"] == "nosniff", path
    assert (await running.http.get("/favicon.ico")).headers["content-type"] == "image/svg+xml"
    assert (await running.http.get("/static/page.js")).headers["content-type"].startswith("text/javascript")
    for path in (
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/nothing.js",
        "/static/",
        "/static/%2e%2e/page.py",
    ):
        async with httpx.AsyncClient(timeout=60) as client:
            assert (await client.get(running.server.url + path)).status_code == 404


def prompt_of(engine: Any, which: int = -1) -> str:
    return bytes(i for i in engine.requests[which].prompt_token_ids if i < 256).decode()


@needs_browser
async def test_a_conversation_in_a_browser(start: Start, page: browser.Browser):
    running = await start(
        MockEngine(reply=REPLY, step_s=0.001, max_model_len=4096), default_params={"temperature": 0.4}
    )
    engine = running.engine
    await opened(page, running)
    await said(page, "Hello")
    assert await page.run("document.querySelector('.assistant pre code').textContent") == "print('hi')\n"
    assert await page.run("document.querySelector('.assistant strong').textContent") == "bold"
    assert await page.run("document.querySelectorAll('.assistant b').length") == 0
    assert "<b>no markup</b>" in await page.run("document.querySelector('.assistant').textContent")
    stats = await page.run("document.querySelector('.stats').textContent")
    assert re.fullmatch(r"\d+ ms TTFT · [\d.]+ tokens/s · \d+ tokens", stats), stats
    assert stats.endswith(f" {len(REPLY) + 1} tokens")
    assert re.fullmatch(
        r"\d+ running · \d+ waiting · KV \d+ %", await page.wait("document.querySelector('#health').textContent")
    )

    await page.click(".toggle")
    assert await page.run("document.querySelector('[name=temperature]').placeholder") == "0.4"
    await page.type("[name=system]", "Be kind.")
    await page.type("[name=temperature]", "0.3")
    engine.drafts = 3, 2
    await said(page, "Again", 2)
    for shown in (".stats", ".message:last-child small"):
        assert (await page.run(f"document.querySelector('{shown}').textContent")).endswith("· 3 of 5 drafts right")
    engine.drafts = 0, 0
    assert prompt_of(engine) == f"Be kind.Hello{REPLY}Again" and engine.requests[-1].params.temperature == 0.3

    engine.step_s, engine._reply = 0.02, "word " * 400  # not over before it is stopped, however slow the machine is
    for stop in (lambda: page.click("#stop"), lambda: page.press(ESCAPE)):
        await page.type("#prompt", "Long\n")
        await page.wait("document.querySelector('.busy .body')?.textContent.length > 3")
        await stop()
        await page.wait("!document.querySelector('.busy')")
        assert (await page.run("document.querySelector('.message:last-child small').textContent")).startswith("stopped")
    # The page is done when it hangs up; the server learns of that a moment later.
    await until(lambda: len(engine.aborted) == 2 and not engine.live, "both were aborted")

    engine.step_s, engine._reply = 0.001, REPLY
    await page.click("#clear")
    await said(page, "First")
    await page.press(CONTROL, ".")
    assert await page.run("document.querySelectorAll('.pane').length") == 2
    assert await page.run("document.querySelectorAll('.user').length") == 2, (
        "the second has the first one's conversation"
    )
    await said(page, "Both", 4)
    assert {prompt_of(engine, -1), prompt_of(engine, -2)} == {f"Be kind.First{REPLY}Both"}
    assert [r.params.temperature for r in engine.requests[-2:]] == [0.3, 0.3]
    assert await page.console() == []


@needs_browser
async def test_what_was_said_can_be_changed(start: Start, page: browser.Browser):
    running = await start(MockEngine(reply="ok", max_model_len=4096))
    engine = running.engine
    await opened(page, running)
    await said(page, "one")
    await said(page, "two", 2)
    assert await page.run(TEXTS) == ["one", "ok", "two", "ok"]

    engine._reply = "new"
    await act(page, ".message:nth-child(4)", "Again")
    await answered(page, 2)
    assert await page.run(TEXTS) == ["one", "ok", "two", "new"]
    assert prompt_of(engine) == "oneoktwo"
    await act(page, ".message:nth-child(2)", "Branch")
    assert await page.run(TEXTS) == ["one", "ok"]
    await page.wait("document.querySelectorAll('#conversations li').length === 2")
    await page.click("#conversations li:nth-child(2) .open")
    assert await page.run(TEXTS) == ["one", "ok", "two", "new"]

    await act(page, ".message:nth-child(1)", "Edit")
    await page.run("document.querySelector('.message textarea').value = 'uno'")
    await act(page, ".message:nth-child(1)", "Send")
    await answered(page, 1)
    assert await page.run(TEXTS) == ["uno", "new"]
    assert prompt_of(engine) == "uno"
    await act(page, ".message:nth-child(2)", "Delete")
    assert await page.run(TEXTS) == ["uno"]

    await page.click("#prompt")
    await page.press(UP)  # in the empty message box: edits the last message
    await page.wait("document.activeElement.closest('.message')")
    await page.press(ESCAPE)
    await page.wait("document.querySelectorAll('#conversations li').length === 2")
    await opened(page, running)  # again: what was kept is there, and the page begins anew
    await page.wait("document.querySelectorAll('#conversations li').length === 2")
    assert await page.run("document.querySelectorAll('.message').length") == 0
    await page.click("#conversations li:first-child button[aria-label^=Delete]")
    await page.wait("document.querySelectorAll('#conversations li').length === 1")
    assert await page.console() == []


@needs_browser
async def test_an_answer_that_is_cut_off_leaves_no_trace_of_itself(start: Start, page: browser.Browser):
    engine = MockEngine(reply="word " * 400, step_s=0.01, max_model_len=8192)
    running = await start(engine)
    await opened(page, running)
    await page.type("#prompt", "Long\n")
    await page.wait("document.querySelector('.busy .body')?.textContent.length > 3")
    await page.click("#clear")
    await until(lambda: engine.aborted and not engine.live, "a new conversation ends the old one's answer")
    assert await page.run("document.querySelectorAll('.message').length") == 0

    engine.step_s = 60.0  # nothing comes before it is stopped
    await page.type("#prompt", "Silent\n")
    await page.wait("document.querySelector('.busy')")
    await page.click("#stop")
    await page.wait("document.querySelector('.user.unanswered .failed')")
    engine.step_s, engine._reply = 0.0, "ok"
    await said(page, "Next")
    assert prompt_of(engine) == "Next", "one user's turn, not two"
    await act(page, ".unanswered", "Try again")
    await answered(page, 1)
    assert await page.run(TEXTS) == ["Silent", "ok"]


@needs_browser
async def test_errors_are_told_with_a_way_on(start: Start, page: browser.Browser):
    engine = MockEngine(reply="fine", max_live=0)
    running = await start(engine)
    await opened(page, running)
    await page.type("#prompt", "Hello\n")
    text = await page.wait("document.querySelector('.failed')?.textContent")
    assert "queue is full" in text and "wait 1 s" in text
    assert await page.run("document.querySelector('#send').hidden") is False
    engine._max_live = 9
    await act(page, ".user", "Try again")
    await answered(page, 1)
    assert await page.run(TEXTS) == ["Hello", "fine"]
    engine._reply, engine.step_s = "word " * 400, 0.01
    await page.type("#prompt", "Long\n")
    await page.wait("document.querySelector('.busy .body')?.textContent.length > 3")
    engine.die()
    await page.wait("document.querySelector('.assistant .failed button')")
    assert (await page.run(TEXTS))[-1].startswith("word")
    await running.server.stop(0.0)
    await page.type("#prompt", "Anybody?\n")
    await page.wait("document.querySelector('.user .failed')?.textContent.includes('cannot be reached')")
    await page.wait("document.querySelector('#health').textContent === 'not reachable'")


@needs_browser
async def test_the_page_asks_for_a_key_and_forgets_it(start: Start, page: browser.Browser):
    running = await start(MockEngine(reply="open"), app={"access": Access(KeyRing.of([KEY]))})
    await page.open(running.server.url + "/")
    for key in ("sk-wrong-0123456789", KEY):
        await page.wait("document.querySelector('#key-dialog').open")
        await page.type("#key-box", key + "\n")
    await page.wait("document.querySelector('.pane')")
    await said(page, "Hello")
    assert await page.run("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])") == json.dumps(
        [{"jaxserve-theme": await page.run("document.documentElement.dataset.theme")}, {}, ""], separators=(",", ":")
    )
    assert KEY not in await page.run("document.documentElement.outerHTML + document.querySelector('#key-box').value")
    await page.open(running.server.url + "/")
    await page.wait("document.querySelector('#key-dialog').open")
    await page.click("#key-cancel")
    await page.wait(
        "!document.querySelector('#again').hidden && document.querySelector('#notice').textContent.includes('API key')"
    )


@needs_browser
async def test_tools_probabilities_schemas_and_the_difference(start: Start, page: browser.Browser):
    engine = MockEngine(reply="The quick fox", max_model_len=4096)
    running = await start(engine, tool_parser="hermes")
    await opened(page, running)
    await page.click(".toggle")
    await page.click("[name=logprobs]")
    await said(page, "Go")
    await act(page, ".assistant", "Tokens")
    assert await page.run("document.querySelector('.tokens').textContent") == "The quick fox</s>"
    await page.run("document.querySelector('.token').focus()")
    await page.press("\ue014")  # to the right
    assert await page.run("document.activeElement.textContent") == "h"
    assert re.match(r"h [\d.]+ %", await page.run("document.querySelector('.others').textContent"))

    await page.run("document.querySelector('[name=format]').value = 'json_schema'")
    await page.run("document.querySelector('[name=format]').dispatchEvent(new Event('change', {bubbles: true}))")
    note = "document.querySelector('.note').textContent"
    for text, wrong in (
        ("{\n  oops", "line 2"),
        ('{"type": "text"}', "unknown type"),
        ('{"required": "a"}', "list of names"),
        ("{}", ""),
    ):
        await page.run(f"document.querySelector('[name=constraint]').value = {json.dumps(text)}")
        await page.run("document.querySelector('[name=constraint]').dispatchEvent(new Event('input', {bubbles: true}))")
        assert (wrong in await page.run(note)) if wrong else (await page.run(note) == ""), (text, await page.run(note))
    await page.run("document.querySelector('[name=format]').value = ''")
    await page.run("document.querySelector('[name=format]').dispatchEvent(new Event('change', {bubbles: true}))")

    await page.press(CONTROL, ".")
    engine._reply = lambda request: list(b"The slow fox" if len(engine.requests) % 2 else b"The quick fox")
    await said(page, "Race", 4)
    await page.click("#diff")
    marks = await page.run("[...document.querySelectorAll('mark')].map((m) => m.textContent).sort()")
    assert marks == ["quick", "slow"]
    await page.press(CONTROL, ".")
    assert await page.run("document.querySelectorAll('mark').length") == 0

    engine._reply = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    await page.click(".tool-example")
    await said(page, "Weather?", 3)
    assert '"city": "Bern"' in await page.run("document.querySelector('.call code').textContent")
    engine._reply = "Sunny."
    await page.type(".call textarea", "20 degrees")
    await act(page, ".call", "Send result")
    await answered(page, 4)
    assert (await page.run(TEXTS))[-1] == "Sunny."
    assert prompt_of(engine).endswith("20 degrees")
    assert await page.console() == []


class Loaded:
    """As much of an `AdapterClient` as requests and lists ask for: one adapter."""

    info = AdapterInfo("pirate", "adapters/pirate", "ab" * 16, 8, 14)

    def find(self, name):
        return self.info if name == self.info.name else None

    def infos(self):
        return [self.info]

    def load_now(self):
        return None


@needs_browser
async def test_the_base_beside_an_adapter_with_files_and_the_template(start: Start, page: browser.Browser, tmp_path):
    engine = MockEngine(reply="Aye.", max_model_len=4096)
    engine.adapters = Loaded()
    template: Any = MockTemplate()
    template.source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    running = await start(engine, template=template)
    await opened(page, running)
    await page.press(CONTROL, ".")
    chosen = "[...document.querySelectorAll('.pane .model')].map((box) => box.selectedOptions[0].textContent)"
    assert await page.run(chosen) == ["mock", "pirate (adapter)"]
    code, document, other = tmp_path / "a.py", tmp_path / "b.pdf", tmp_path / "c.bin"
    code.write_text("x = '```'\n")
    document.write_bytes(pdf("A line."))
    other.write_bytes(b"ab\0cd")
    for file in (code, document, other):
        await page.type("#attach-file", str(file))
        await page.wait("document.querySelector('#attach-file').value === ''")
    assert "c.bin: it is neither a text, a PDF, an image nor sound." in await page.run(
        "document.querySelector('#notice').textContent"
    )
    listed = "[...document.querySelectorAll('#files li')].map((one) => one.innerText.replace(/\\s+/g, ' '))"
    await page.wait(f"{listed}.join().includes('tokens') && !{listed}.join().includes('counting')")
    wanted = ["a.py:\n````\nx = '```'\n````", "b.pdf:\n```\nA line.\n```"]
    assert await page.run(listed) == [
        f"{text.split(':')[0]} {len(text)} tokens ✕" for text in wanted
    ]  # a byte is a token
    await page.type("#prompt", "What is it?\n")
    await answered(page, 2)
    asked = {
        request.adapter: bytes(i for i in request.prompt_token_ids if i < 256).decode() for request in engine.requests
    }
    assert asked == dict.fromkeys((None, Loaded.info.digest), "\n\n".join([*wanted, "What is it?"]))
    assert await page.run("document.querySelector('#files').hidden")
    stats = await page.run("[...document.querySelectorAll('.stats')].map((one) => one.textContent)")
    assert len(stats) == 2 and all("ms TTFT" in one and "tokens/s" in one for one in stats)
    await page.click(".toggle")
    await page.click(".pane .template")
    await page.wait("document.querySelector('#template-dialog').open")
    assert await page.run("document.querySelector('#template-text').textContent") == template.source
    assert await page.console() == []


MARKDOWN = [
    ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    ("# T #\n## *U*", "<h3>T</h3><h4><em>U</em></h4>"),
    ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
    ("1. a\n\n   b\n2. c", "<ol><li>a<p>b</p></li><li>c</li></ol>"),
    ("3) x", '<ol start="3"><li>x</li></ol>'),
    ("- [x] a\n- [ ] b", '<ul><li><input type="checkbox" disabled="" checked="" aria-label="done">a</li>'
     '<li><input type="checkbox" disabled="" aria-label="done">b</li></ul>'),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("***", "<hr>"),
    ("|a|b|\n|:-:|-:|\n|1|`x`|",
     '<div class="table" tabindex="0"><table><thead><tr><th class="center">a</th><th class="right">b</th></tr></thead>'
     '<tbody><tr><td class="center">1</td><td class="right"><code>x</code></td></tr></tbody></table></div>'),
    ("**a *b* c** __d__ _e_ ~~f~~ snake_case_name 2 * 3 * 4",
     "<p><strong>a <em>b</em> c</strong> <strong>d</strong> <em>e</em> <s>f</s> snake_case_name 2 * 3 * 4</p>"),
    ("``a`b`` \\*x\\*", "<p><code>a`b</code> *x*</p>"),
    ("$a_1 + b_2$ \\(x*y*z\\) costs $5 and $6",
     '<p><span class="math">$a_1 + b_2$</span> <span class="math">\\(x*y*z\\)</span> costs $5 and $6</p>'),
    ("$$\na_b_c\n$$", '<pre class="math">$$\na_b_c\n$$</pre>'),
    ("[a](https://x.y/z) ![i](https://x.y/i.png) <script>alert(1)</script>",
     '<p><a href="https://x.y/z" target="_blank" rel="noopener noreferrer nofollow">a</a> '
     '<a href="https://x.y/i.png" target="_blank" rel="noopener noreferrer nofollow">i</a> '
     "&lt;script&gt;alert(1)&lt;/script&gt;</p>"),
    ("[a](javascript:alert(1)) [b](data:text/html,x)", "<p>[a](javascript:alert(1)) [b](data:text/html,x)</p>"),
    ("see https://x.y/a_b_c.",
     '<p>see <a href="https://x.y/a_b_c" target="_blank" rel="noopener noreferrer nofollow">https://x.y/a_b_c</a>.</p>'),
]  # fmt: skip


@needs_browser
async def test_markdown(start: Start, page: browser.Browser):
    running = await start()
    await opened(page, running)
    script = """
        const { markdown } = await import("/static/messages/markdown.js");
        const at = document.createElement("div");
        return arguments[0].map((text) => { at.replaceChildren(markdown(text)); return at.innerHTML; });
    """
    assert await page.run_async(script, [text for text, _ in MARKDOWN]) == [html for _, html in MARKDOWN]
    fenced = "```py\na\n\n  b\n```\nx\n~~~\nopen"
    found = await page.run_async(
        script.replace("at.innerHTML", "[...at.querySelectorAll('pre code, .head span')].map((n) => n.textContent)"),
        [fenced],
    )
    assert found == [["py", "a\n\n  b\n", "text", "open\n"]]
    # What is open, nested or long ends in a moment.
    nasty = [
        "**" * 20_000,
        "[" * 20_000,
        "> " * 5_000 + "x",
        "`" * 20_001,
        "- " * 3_000,
        "|" * 10_000 + "\n|-|",
        "_a" * 10_000,
        "$x" * 9_999,
    ]
    assert len(await page.run_async(script, nasty)) == len(nasty)


@needs_browser
async def test_conversations_go_out_and_come_back(start: Start, page: browser.Browser):
    running = await start(MockEngine(reply="ok"))
    await opened(page, running)
    await said(page, "one")
    script = """
        const store = await import("/static/conversation/store.js"), form = await import("/static/conversation/conversation.js");
        const file = await import("/static/conversation/markdown_file.js");
        let all = [];
        while (!all.length) { all = await store.all(); await new Promise((wait) => setTimeout(wait, 50)); }
        const back = form.fromJson(form.toJson(all));
        const wrong = ["nope", "{}", '{"format": "jaxserve-conversations", "conversations": [{}]}', '[]'].map((text) => {
          try { form.fromJson(text); return ""; } catch (error) { return error.message; }
        });
        return [all, back, file.toMarkdown(all[0]), wrong];
    """
    [[one], [back], text, wrong] = await page.run_async(script)
    assert one["title"] == "one" and [m["content"] for m in one["panes"][0]["messages"]] == ["one", "ok"]
    assert back["panes"] == one["panes"] and back["id"] != one["id"]
    assert text == "# one\n\n**You**\n\none\n\n**Assistant**\n\nok\n"
    assert all(message.endswith(".") or "JSON" in message for message in wrong) and "" not in wrong


@needs_browser
async def test_axe_finds_nothing_serious(start: Start, page: browser.Browser):
    """Rules of axe-core (https://github.com/dequelabs/axe-core), in both themes, at two widths, with everything opened."""
    axe = browser.axe()
    if axe is None:
        pytest.skip("axe-core is not in the cache: run scripts/fetch_axe.py")
    engine = MockEngine(reply=REPLY + "\n\n| a |\n|---|\n| 1 |\n\n- [x] done", max_model_len=4096)
    told = dataclasses.replace(engine.info(), modalities=("image", "sound"))
    engine.info = lambda: told  # type: ignore[method-assign]
    running = await start(engine, service=image_service(engine))
    await opened(page, running)
    await give(page, "drop", encoded(), "a.png", "image/png")
    await page.wait("document.querySelector('#files li')")
    await page.click(".toggle")
    await page.click("[name=logprobs]")
    await said(page, "Hello")
    await act(page, ".assistant", "Tokens")
    await give(page, "drop", encoded(), "b.png", "image/png")
    await page.press(CONTROL, ".")
    running.engine._max_live = 0
    await page.type("#prompt", "No\n")
    await page.wait("document.querySelector('.failed')")
    found = {}
    for width, theme, dialog in (
        (1280, "light", "close"), (400, "dark", "close"), (1280, "dark", "showModal"), (400, "light", "showModal"),
    ):  # fmt: skip
        await page.resize(width, 860)
        await page.run(f"document.documentElement.dataset.theme = '{theme}'")
        await page.run(f"document.querySelector('#key-dialog').{dialog}()")
        await page.wait("document.getAnimations().length === 0")  # colours on their way to a theme are of neither
        for violation in await page.run_async(axe + "; return (await axe.run()).violations;"):
            found |= {
                (violation["id"], width, theme, node["html"][:150]): violation["help"] for node in violation["nodes"]
            }
        await page.run("document.querySelector('#key-dialog').close()")
        assert await page.run("document.documentElement.scrollWidth <= innerWidth"), f"wider than {width}"
    assert not found, "\n".join(map(str, found.items()))
