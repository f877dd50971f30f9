"""PDF files that the page sends to be read: their text, and what is no PDF, locked, damaged or slow."""

from __future__ import annotations

import io

import pytest

from serving.access import Access, KeyRing
from serving.media import documents, pdf_worker
from tests.mock_engine import MockEngine
from tests.serving.frontends.conftest import Running, Start

KEY = "sk-0123456789abcdef"


def pdf(*pages: str, letter: str = "0041") -> bytes:
    """A PDF with a line of text a page, written by hand. Its A stands for `letter`, in hexadecimal digits of UTF-16."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    bodies = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        f"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /ToUnicode {4 + 2 * len(pages)} 0 R >>",
    ]
    for i, line in enumerate(pages):
        content = f"BT /F1 12 Tf 72 720 Td ({line}) Tj ET" if line else ""
        parent = "/Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >>"
        bodies.append(f"<< /Type /Page {parent} /Contents {5 + 2 * i} 0 R >>")
        bodies.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    letters = (
        f"begincmap 1 begincodespacerange <00> <FF> endcodespacerange 1 beginbfchar <41> <{letter}> endbfchar endcmap"
    )
    bodies.append(f"<< /Length {len(letters)} >>\nstream\n{letters}\nendstream")
    out, places = "%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    head = f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n{table}"
    return (out + head + f"trailer << /Size {len(bodies) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF").encode()


def locked() -> bytes:
    import pypdf

    writer = pypdf.PdfWriter()
    writer.append(io.BytesIO(pdf("Hidden.")))
    writer.encrypt("secret", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


async def test_the_text_of_a_pdf(running: Running):
    reply = await running.http.post("/page/pdf", content=pdf("The first page.", "", "The third."))
    assert reply.status_code == 200, reply.text
    assert reply.json() == {"text": "The first page.\n\nThe third.", "pages": 3}


async def test_letters_that_are_no_text_are_replaced(running: Running):
    """A font may have a letter stand for half of a pair, or for one beyond the first 65,536, which is a pair."""
    for letter, text in (
        ("D800", "\ufffd"),
        ("DC00", "\ufffd"),
        ("DE00D83D", "\ufffd\ufffd"),
        ("D83DDE00", "\U0001f600"),
    ):
        reply = await running.http.post("/page/pdf", content=pdf("a A b", letter=letter))
        assert reply.status_code == 200 and reply.json()["text"] == f"a {text} b", reply.text


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "it is no PDF"),
        (b"PK\x03\x04 something else", "it is no PDF"),
        (b"%PDF-1.4\nnothing follows", "no PDF, or a damaged one"),
        (pdf("Cut off.")[:-300], "no PDF, or a damaged one"),
        (pdf(""), "only pictures"),
        (locked(), "locked with a password"),
    ],
    ids=["empty", "zip", "head alone", "cut off", "pictures", "locked"],
)
async def test_what_cannot_be_read_is_told(running: Running, data, said):
    reply = await running.http.post("/page/pdf", content=data)
    assert reply.status_code == 400 and said in reply.json()["error"]["message"], reply.text


async def test_a_reader_that_hangs_or_dies_is_ended(running: Running, monkeypatch, tmp_path):
    hangs, dies = tmp_path / "hangs.py", tmp_path / "dies.py"
    hangs.write_text("import time\ntime.sleep(600)\n")
    dies.write_text("raise SystemExit(9)\n")
    monkeypatch.setattr(documents, "DEADLINE_S", 0.2)
    monkeypatch.setattr(pdf_worker, "__file__", str(hangs))
    reply = await running.http.post("/page/pdf", content=pdf("x"))
    assert reply.status_code == 400 and "takes longer than" in reply.json()["error"]["message"]
    monkeypatch.setattr(documents, "DEADLINE_S", 60.0)
    monkeypatch.setattr(pdf_worker, "__file__", str(dies))
    reply = await running.http.post("/page/pdf", content=pdf("x"))
    assert reply.status_code == 400 and "more memory" in reply.json()["error"]["message"]


async def test_it_needs_a_key_and_the_library(start: Start, monkeypatch):
    running = await start(MockEngine(), app={"access": Access(KeyRing.of([KEY]))})
    assert (await running.http.post("/page/pdf", content=pdf("x"))).status_code == 401
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    reply = await running.http.post("/page/pdf", content=pdf("x"), headers={"Authorization": f"Bearer {KEY}"})
    assert reply.status_code == 501 and "pip install pypdf" in reply.json()["error"]["message"]
