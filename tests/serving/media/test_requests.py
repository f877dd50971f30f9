"""Images through every entry that takes them, down to what the engine is asked; and those that are refused."""

import gc
import json

import numpy as np
import pytest

from serving.errors import ErrorKind, RequestError
from serving.frontends.app import create_app
from serving.frontends.openai.batches.runner import call_app, run_batch
from serving.media import MediaPolicy
from serving.media import reader as reading
from serving.service import GenerateInput, Limits
from tests.mock_engine import EmbeddingEngine, MockEngine, mock_service
from tests.models.tiny_vision import picture
from tests.serving.frontends.page.test_documents import pdf
from tests.serving.media.images import PLACE, asked, encoded, image_service, part, reader, uri

PNG = encoded()
BASE64 = uri(PNG).partition(",")[2]
IMAGE_PARTS = {
    "openai": part(uri(PNG)),
    "as text": {"type": "image_url", "image_url": uri(PNG)},
    "responses": {"type": "input_image", "image_url": uri(PNG)},
    "hugging face": {"type": "image", "url": uri(PNG)},
    "pillow": {"type": "image", "image": picture(40, 30)},
    "vllm": {"type": "image_pil", "image_pil": picture(40, 30)},
    "array": {"type": "image", "image": np.asarray(picture(40, 30))},
    "bytes": {"type": "image", "image": PNG},
}


async def prepared(service, *parts, **more):
    given = GenerateInput(messages=asked(*parts), **more)
    return await service.prepare(given, service.make_params({"max_tokens": 2}))


@pytest.mark.parametrize("kind", IMAGE_PARTS)
async def test_an_image_becomes_its_places(kind):
    service = image_service(MockEngine())
    made = await prepared(service, "a", IMAGE_PARTS[kind], "b")
    (request,) = made.children
    (item,) = request.media.items
    at = made.prompt_token_ids.index(PLACE)
    assert made.prompt_token_ids.count(PLACE) == item.size == 6  # 40 x 30 pixels are scaled up to 2 x 3 squares
    assert item.places_N.tolist() == list(range(at, at + 6))
    assert request.media.length == len(made.prompt_token_ids)
    assert item.patches_PX.shape == (24, 3 * 2 * 14 * 14) and len(item.place_P2) == 24


async def test_several_images_keep_their_order_and_n_shares_them():
    service = image_service(MockEngine())
    given = GenerateInput(messages=asked(part(uri(encoded(seed=1))), "then", part(uri(encoded(60, 60, seed=2)))))
    made = await service.prepare(given, service.make_params({"max_tokens": 2, "n": 2}))
    first, second = made.children
    assert [one.size for one in first.media.items] == [6, 4] and first.media is second.media


async def test_texts_alone_have_no_media():
    service = image_service(MockEngine())
    assert (await prepared(service, "a")).children[0].media is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": asked("a", part(uri(PNG))), "max_tokens": 2}),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": uri(PNG)}]}], "max_output_tokens": 2},
        ),
        (
            "/v1/messages",
            {
                "model": "default", "max_tokens": 2,
                "messages": [{"role": "user", "content": [
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}}]}],
            },
        ),
        ("/api/chat", {"model": "default", "stream": False, "messages": [{"role": "user", "content": "a", "images": [BASE64]}]}),
        ("/api/generate", {"model": "default", "stream": False, "prompt": "a", "images": [BASE64]}),
    ],
    ids=["chat", "responses", "anthropic", "ollama chat", "ollama generate"],
)  # fmt: skip
async def test_over_http(path, body):
    engine = MockEngine(reply="ok")
    status, reply = await call_app(create_app(image_service(engine), page=False), path, body, "a")
    assert status == 200, reply
    assert engine.requests[0].media.items[0].size == 6
    other = MockEngine(reply="ok")
    status, reply = await call_app(create_app(mock_service(other), page=False), path, body, "a")
    assert status == 400 and not other.requests, "a model without a tower refuses"
    assert "text only" in str(reply)


async def test_a_line_of_a_batch_has_an_image(tmp_path):
    body = {"messages": asked("a", part(uri(PNG))), "max_tokens": 2}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    engine = MockEngine(reply="ok")
    app = create_app(image_service(engine), page=False)
    done = await run_batch(app, tmp_path / "in.jsonl", tmp_path / "out.jsonl", concurrency=1)
    assert done.succeeded == 1 and not done.failures
    assert engine.requests[0].media.items[0].size == 6


async def test_an_embedding_of_a_chat_with_an_image():
    engine = EmbeddingEngine()
    body = {"messages": asked("a", part(uri(PNG)), "b"), "encoding_format": "float"}
    status, reply = await call_app(create_app(image_service(engine), page=False), "/v1/embeddings", body, "a")
    assert status == 200, reply
    assert engine.embedded_media[0].items[0].size == 6 == engine.embedded[0].count(PLACE)
    assert reply["usage"]["prompt_tokens"] == len(engine.embedded[0])
    other = EmbeddingEngine()
    status, reply = await call_app(create_app(mock_service(other), page=False), "/v1/embeddings", body, "a")
    assert status == 400 and "text only" in str(reply)


BROKEN = {
    "not base64": "data:image/png;base64,%%%",
    "no comma": "data:image/png;base64",
    "not in base64": "data:image/png,hello",
    "no image": uri(b"hello"),
    "cut": uri(PNG[: len(PNG) // 2]),
    "svg": uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
    "bmp": uri(encoded(kind="BMP"), "image/bmp"),
    "tiff": uri(encoded(kind="TIFF"), "image/tiff"),
    "web": "https://example.com/a.png",
    "file": "file:///etc/passwd",
    "other": "ftp://example.com/a.png",
    "empty": "",
}


@pytest.mark.parametrize("what", BROKEN)
async def test_what_is_no_image_is_that_requests_400(what):
    service = image_service(MockEngine())
    with pytest.raises(RequestError) as refused:
        await prepared(service, "a", part(BROKEN[what]))
    assert refused.value.kind is ErrorKind.INVALID_ARGUMENT
    assert "messages[0].content[1]" in refused.value.message
    for told in ("0x", "/tmp", "site-packages", "PIL", "object at", "Traceback"):
        assert told not in refused.value.message
    assert (await prepared(service, "a", part(uri(PNG)))).children[0].media, "others go on"


async def test_too_many_and_too_large():
    service = image_service(MockEngine(), MediaPolicy(max_images=2))
    with pytest.raises(RequestError, match="3 images; at most 2"):
        await prepared(service, *[part(uri(PNG))] * 3)
    small = image_service(MockEngine(max_model_len=24))
    with pytest.raises(RequestError, match="more embeddings"):
        await prepared(small, *[part(uri(encoded(112, 112, seed=i))) for i in range(3)])
    with pytest.raises(RequestError, match="maximum context"):
        await prepared(small, "a" * 10, part(uri(encoded(112, 112))))
    with pytest.raises(RequestError, match="truncate_prompt_tokens"):
        await prepared(service, part(uri(PNG)), truncate_prompt_tokens=4)


async def test_text_that_looks_like_a_place_is_none():
    """The mock tokenizer takes control tokens out of texts, as no real one does: then places and images do not match."""
    service = image_service(MockEngine())
    with pytest.raises(RequestError, match="1 images, and the model's chat template has made 2 places"):
        await prepared(service, "<|tool|>", part(uri(PNG)))


async def test_digests_tell_images_processings_and_tenants_apart_and_nothing_else():
    one = reader()
    source = IMAGE_PARTS["openai"]

    async def digest(service, image, salt=None):
        made = await prepared(service, "a", image, cache_salt=salt)
        return made.children[0].media.items[0].digest

    service = image_service(MockEngine())
    same = await digest(service, source)
    assert same == await digest(image_service(MockEngine()), source) and len(same) == 32
    others = {
        await digest(service, part(uri(encoded(seed=5)))), await digest(service, source, "x"),
        await digest(service, source, "y"), await digest(service, source, ""),
    }  # fmt: skip
    assert len(others | {same}) == 5
    assert one.processor.identity() != type(one.processor).of({"image_token_id": PLACE}).identity()


async def test_what_was_cut_is_kept():
    service = image_service(MockEngine())
    first = (await prepared(service, part(uri(PNG)))).children[0].media.items[0]
    again = (await prepared(service, "b", part(uri(PNG)))).children[0].media.items[0]
    assert again.patches_PX is first.patches_PX


async def test_what_waiting_requests_have_is_counted_together(monkeypatch):
    """And no longer than they wait or run. A single one is taken, however much it is."""
    monkeypatch.setattr(reading, "KEPT_BYTES", 0)
    pixels = (await prepared(image_service(MockEngine()), part(uri(PNG)), "a")).children[0].media.items[0].patches_PX
    service = image_service(MockEngine(), limits=Limits(max_media_bytes=2 * pixels.nbytes))
    held = [await prepared(service, part(uri(encoded(seed=i))), "a") for i in range(2)]
    for _ in range(2):
        with pytest.raises(RequestError, match="that wait or run have more than") as refused:
            await prepared(service, part(uri(encoded(seed=3))), "a")
        assert refused.value.kind is ErrorKind.RESOURCE_EXHAUSTED
    held.pop()
    gc.collect()
    held.append(await prepared(service, part(uri(encoded(seed=3))), "a"))
    held.clear()
    gc.collect()
    (large,) = (await prepared(service, part(uri(encoded(112, 112))), "a")).children[0].media.items
    assert large.patches_PX.nbytes > 2 * pixels.nbytes
    unbounded = image_service(MockEngine(), limits=Limits(max_media_bytes=None))
    assert all([await prepared(unbounded, part(uri(encoded(seed=i))), "a") for i in range(5)])


async def test_over_grpc_a_part_is_a_file_or_a_url():
    from proto.jaxserve.v1 import inference_pb2 as pb
    from serving.frontends.grpc.convert import input_from

    parts = [pb.ContentPart(text="a"), pb.ContentPart(image=PNG), pb.ContentPart(image_url=uri(PNG))]
    asked_for = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", parts=parts)]))
    service = image_service(MockEngine())
    made = await service.prepare(input_from(asked_for, service.limits), service.make_params({"max_tokens": 2}))
    first, second = made.children[0].media.items
    assert first.digest == second.digest and first.size == 6
    other = mock_service(MockEngine())
    with pytest.raises(RequestError, match="text only"):
        await other.prepare(input_from(asked_for, other.limits), other.make_params({"max_tokens": 2}))
    both = pb.ChatMessage(role="user", content="a", parts=parts)
    with pytest.raises(RequestError, match="not both"):
        input_from(pb.GenerateRequest(chat=pb.Chat(messages=[both])), service.limits)


def a_file(data, name="notes.pdf", **more):
    return {"type": "file", "file": {"file_data": uri(data, "application/pdf"), "filename": name, **more}}


@pytest.mark.parametrize("service", [mock_service, image_service])
async def test_a_file_is_read_as_its_text(service):
    service = service(MockEngine())
    inside = {"type": "input_file", "file_data": uri(b"plain words"), "filename": "a.txt"}
    made = await prepared(service, "Sum up", a_file(pdf("The first page.", "The second.")), inside)
    assert "notes.pdf:\nThe first page.\n\nThe second.\n" in made.prompt and "a.txt:\nplain words\n" in made.prompt
    assert made.children[0].media is None


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "file", "file": {"file_id": "file-1"}}, "file_id"),
        ({"type": "file", "file": {}}, "file_data"),
        ({"type": "file"}, "has no file"),
        (a_file(b"\x00\x01\x02"), "neither a PDF nor text"),
        (a_file(b"%PDF-1.4 broken"), "damaged"),
        ({"type": "input_file", "file_url": "file:///etc/passwd"}, "reads no files"),
        ({"type": "input_file", "file_url": "http://127.0.0.1/x"}, "fetches nothing"),
    ],
)
async def test_files_that_are_refused(part, words):
    with pytest.raises(RequestError, match=words) as caught:
        await prepared(mock_service(MockEngine()), "a", part)
    assert caught.value.kind == ErrorKind.INVALID_ARGUMENT


async def test_too_many_files():
    with pytest.raises(RequestError, match="9 files; at most 8"):
        await prepared(mock_service(MockEngine()), *[a_file(b"x", "a.txt")] * 9)


async def test_a_uuid_names_an_image_for_its_sender_alone():
    service = image_service(MockEngine())
    named = {**part(uri(PNG)), "uuid": "mine"}
    alone = {"type": "image_url", "image_url": None, "uuid": "mine"}
    (first,) = (await prepared(service, "a", named, "b")).children[0].media.items
    (again,) = (await prepared(service, "a", alone, "b")).children[0].media.items
    assert again.digest == first.digest and again.patches_PX is first.patches_PX
    with pytest.raises(RequestError, match="no image of this uuid"):
        await prepared(service, "a", alone, "b", cache_salt="another")
    # Another image under a known name is another image: the name decides nothing.
    (other,) = (await prepared(service, {**part(uri(encoded(seed=5))), "uuid": "mine"}, "b")).children[0].media.items
    assert other.digest != first.digest
    for wrong in ("", 7, "x" * 129):
        with pytest.raises(RequestError, match="uuid"):
            await prepared(service, {**part(uri(PNG)), "uuid": wrong}, "b")


async def test_images_are_cut_as_a_request_wants(monkeypatch):
    service = image_service(MockEngine())

    async def item(**said):
        made = await prepared(service, part(uri(encoded(200, 200))), "a", mm_processor_kwargs=said or None)
        return made.children[0].media.items[0]

    usual, small = await item(), await item(max_pixels=28 * 28 * 4)
    assert (usual.size, small.size) == (16, 4) and usual.digest != small.digest
    assert (await item(size={"longest_edge": 28 * 28 * 4})).digest == small.digest
    for wrong in ({"max_pixels": 10**9}, {"max_pixels": "1"}, {"patch_size": 1}, {"size": 3}, {"min_pixels": 0}):
        with pytest.raises(RequestError, match="mm_processor_kwargs"):
            await item(**wrong)
