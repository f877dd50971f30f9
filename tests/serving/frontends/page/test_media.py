"""Images and sound in the page: attached, pasted, dropped and recorded, seen in the conversation, sent as OpenAI's parts, kept, and
given out and taken back; models that cannot read them are told of before anything is sent."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest

from serving.frontends.openai import audio
from serving.media.sound import RATE, read_sound
from serving.service.speech.segments import Segment
from serving.service.speech.transcribe import Transcript
from tests.mock_engine import MockEngine
from tests.serving.frontends.conftest import Start
from tests.serving.frontends.page import browser
from tests.serving.frontends.page.driving import TEXTS, act, answered, give, needs_browser, opened, said
from tests.serving.media.images import encoded, image_service

LISTED = "[...document.querySelectorAll('#files li')].map((one) => one.querySelector('.name').textContent)"
READ = "[...document.querySelectorAll('#files li')].filter((one) => !one.textContent.includes('reading…'))"


def engine_that(reply: str = "ok", **facts: Any) -> MockEngine:
    """A mock engine of which other facts are told."""
    engine = MockEngine(reply=reply, max_model_len=4096)
    own = engine.info
    engine.info = lambda: dataclasses.replace(own(), **facts)  # type: ignore[method-assign]
    return engine


def sizes(engine: MockEngine, which: int = -1) -> list[int]:
    """How many places each of a request's images has."""
    media = engine.requests[which].media
    return [] if media is None else [item.size for item in media.items]


@needs_browser
async def test_images_are_attached_seen_sent_and_kept(start: Start, page: browser.Browser, tmp_path):
    engine = engine_that(modalities=("image",))
    running = await start(engine, service=image_service(engine))
    (card,) = (await running.http.get("/v1/models")).json()["data"]
    assert card["input_modalities"] == ["text", "image"] and card["tasks"] == ["generate", "embed"]
    told = await running.http.post("/api/show", json={"model": "default"})
    assert "vision" in told.json()["capabilities"], "what Ollama's front ends look for"
    await opened(page, running)
    assert await page.run("document.querySelector('#record').hidden"), "nobody here hears"
    file = tmp_path / "attached.png"
    file.write_bytes(encoded())
    await page.type("#attach-file", str(file))
    await give(page, "paste", encoded(60, 60, "JPEG", 1), "pasted.jpg", "image/jpeg", "#prompt")
    await give(
        page, "drop", encoded(40, 30, "BMP", 2), "dropped.bmp", "image/bmp"
    )  # the server reads none of these: drawn anew
    await page.wait(f"{READ}.length === 3")
    await give(page, "drop", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "d.svg", "image/svg+xml")
    await page.wait("document.querySelector('#notice').textContent === 'd.svg: it cannot be read as an image.'")
    assert await page.run(LISTED) == ["attached.png", "pasted.jpg", "dropped.bmp"]
    await act(page, "#files li:nth-child(2)", "✕")
    await said(page, "What is it?")
    assert sizes(engine) == [6, 6] and await page.run("document.querySelector('#files').hidden")
    seen = "[...document.querySelectorAll('.user img')].map((one) => [one.alt, one.naturalWidth, one.naturalHeight])"
    shown = [["attached.png", 40, 30], ["dropped.bmp", 40, 30]]
    await page.wait(f"JSON.stringify({seen}) === '{json.dumps(shown, separators=(',', ':'))}'")

    await act(page, ".user", "Edit")
    await page.run("document.querySelector('.message textarea').value = 'And now?'")
    await act(page, ".user", "Send")
    await page.wait(f"{TEXTS}[0] === 'And now?'")
    await answered(page, 1)
    assert sizes(engine) == [6, 6], "the images stay when the words are changed"
    await page.wait("document.querySelector('#conversations .open')?.textContent === 'And now?'")  # kept, as it is now
    await opened(page, running)
    await page.wait("document.querySelectorAll('#conversations li').length === 1")
    await page.click("#conversations .open")
    assert await page.run(TEXTS) == ["And now?", "ok"]
    await page.wait(f"{seen}.every(([, width]) => width === 40)")
    await said(page, "More", 2)
    assert sizes(engine) == [6, 6], "earlier turns' images are sent again"
    assert await page.console() == []


@needs_browser
async def test_conversations_go_out_and_come_back_whole(start: Start, page: browser.Browser):
    await opened(page, await start(MockEngine(reply="ok")))
    url = "data:image/png;base64," + base64.b64encode(encoded()).decode()
    kept = {
        "title": "T",
        "panes": [{
            "settings": {"system": "Be kind.", "model": "mock"},
            "messages": [
                {"role": "user", "content": "look\n**You**\nhere", "media": [
                    {"kind": "image", "name": "a.png", "url": url},
                    {"kind": "image", "name": "b", "url": "https://elsewhere.example/track.png"},
                    {"kind": "image", "name": "c", "url": "data:image/svg+xml;base64,PHN2Zy8+"},
                ]},
                {"role": "assistant", "content": "I ask.", "calls": [{"id": "x", "name": "look_up", "arguments": '{"a": "b)"}'},
                                                                     {"id": "y", "name": "look_up", "arguments": "{}"}]},
                {"role": "tool", "id": "x", "content": "found"},
                {"role": "assistant", "content": "```json\nno(call)\n```\n\nSo."},
            ],
        }],
    }  # fmt: skip
    script = """
        const form = await import("/static/conversation/conversation.js");
        const file = await import("/static/conversation/markdown_file.js");
        const [one] = form.fromJson(form.toJson([arguments[0]]));
        const text = file.toMarkdown(one);
        let wrong = "";
        try { file.fromMarkdown("# Only a title"); } catch (error) { wrong = error.message; }
        const back = file.fromMarkdown(text), sent = form.wire(one.panes[0].messages);
        return [one, text, back, file.toMarkdown(back), wrong, sent];
    """
    one, text, back, again, wrong, sent = await page.run_async(script, kept)
    assert [media["name"] for media in one["panes"][0]["messages"][0]["media"]] == ["a.png"], "nothing leads elsewhere"
    assert sent[0]["content"] == [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "look\n**You**\nhere"}
    ]  # fmt: skip
    assert "*attached: a.png*" in text and "no conversation" in wrong
    assert back["title"] == "T" and back["panes"][0]["settings"] == {"system": "Be kind."}
    said = [(m["role"], m["content"]) for m in back["panes"][0]["messages"]]
    assert said == [
        ("user", "*attached: a.png*\n\nlook\n**You**\nhere"), ("assistant", "I ask."), ("tool", "found"),
        ("assistant", "```json\nno(call)\n```\n\nSo."),
    ]  # fmt: skip
    calls = back["panes"][0]["messages"][1]["calls"]
    assert [(call["name"], call["arguments"]) for call in calls] == [("look_up", '{"a": "b)"}'), ("look_up", "{}")]
    assert back["panes"][0]["messages"][2]["id"] == calls[0]["id"] and calls[0]["answered"]
    assert again == text


@needs_browser
async def test_who_reads_no_images_is_said_before_anything_is_sent(start: Start, page: browser.Browser):
    running = await start(MockEngine(reply="ok"))
    await opened(page, running)
    await give(page, "drop", encoded(), "a.png", "image/png")
    await page.wait("document.querySelector('#notice').textContent.startsWith('a.png: mock cannot read images')")
    assert await page.run(f"{LISTED}.length") == 0 and not running.engine.requests


def tone(seconds: float, rate: int = 44_100) -> bytes:
    """Two channels of sound as a FLAC file, which the page makes a WAV file of."""
    soundfile = pytest.importorskip("soundfile")
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    out = io.BytesIO()
    soundfile.write(out, np.stack([wave, 0 * wave], 1), rate, format="FLAC")
    return out.getvalue()


@needs_browser
async def test_sound_is_attached_and_recorded_and_written_down(start: Start, page: browser.Browser, monkeypatch):
    heard: list[tuple[float, float, str | None]] = []

    async def transcribe(service, given, model):
        """Reads the sound as the real one does, and answers with its length."""
        sound = read_sound(given.data, 60.0, "file")
        heard.append((len(sound) / RATE, float(np.abs(sound).max()), given.prompt))
        segment = Segment(0, 0.0, len(sound) / RATE, (), f" {len(sound) / RATE:.1f} seconds.", 0.0, None)
        return Transcript("transcribe", "en", len(sound) / RATE, (segment,))

    monkeypatch.setattr(audio, "transcribe", transcribe)
    running = await start(engine_that(modalities=("sound",), tasks=("transcribe",)))
    await opened(page, running)
    await give(page, "drop", tone(1.5), "tone.flac", "audio/flac")
    await said(page, "Names: Bern")  # it waits for what is being read
    assert await page.run(TEXTS) == ["Names: Bern", "1.5 seconds."]
    length, loudest, prompt = heard[0]
    assert abs(length - 1.5) < 0.01 and 0.2 < loudest < 0.3 and prompt == "Names: Bern", "both channels' mean"
    assert await page.wait("document.querySelector('.user audio').duration > 1.4")

    await page.click("#record")
    await page.wait("document.querySelector('#record').getAttribute('aria-pressed') === 'true'")
    await page.wait("new Promise((done) => setTimeout(() => done(true), 700))")
    await page.click("#record")
    await page.wait(f"{LISTED}.length === 1 && {LISTED}[0].startsWith('recording')")
    await page.type("#prompt", "\n")
    await answered(page, 2)
    assert heard[1][0] > 0 and heard[1][2] is None  # busy machines lose some of what the microphone hears
    await page.type("#prompt", "No sound\n")
    await page.wait("document.querySelector('.user .failed')?.textContent.includes('attach or record')")
    assert json.dumps(await page.console()) == "[]"


@needs_browser
async def test_what_is_said_goes_into_the_message_where_another_model_writes_it_down(page: browser.Browser):
    parts = """
        const { wire } = await import("/static/conversation/conversation.js");
        return wire([{ role: "user", content: "", media: [{ kind: "audio", name: "a", url: "data:audio/mpeg;base64,AAAA" }] }]);
    """
    from serving.frontends.app import serve_http
    from tests.serving.fleet.fakes import FakeMember, fleet_of

    chat, ear = FakeMember("chat"), FakeMember("ear")
    ear.info = dataclasses.replace(ear.info, modalities=("sound",), tasks=("transcribe",))
    fleet = fleet_of(chat, ear)
    server = await serve_http(fleet, port=0)
    try:
        await page.open(server.url + "/")
        await page.wait("document.querySelector('.pane') && !document.querySelector('#record').hidden")
        assert await page.run_async(parts) == [
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}}]}
        ]
        await page.run("(document.querySelector('#prompt').value = 'So:')")
        await page.click("#record")
        await page.wait("document.querySelector('#record').getAttribute('aria-pressed') === 'true'")
        await page.click("#record")
        # The mock has no ears: what the server says of that is told, and nothing is attached.
        await page.wait("document.querySelector('#notice').textContent.includes('transcribes no speech')")
        assert await page.run(f"{LISTED}.length") == 0
        assert await page.run("document.querySelector('#prompt').value") == "So:"
    finally:
        await fleet.abort_all()
        await server.stop(1.0)
