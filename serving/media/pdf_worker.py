"""The process that reads a PDF: `python -P pdf_worker.py` takes it on its standard input and answers with a line of JSON.

A PDF comes from anywhere, and its reader is large: it runs where the parent can kill it after a deadline and the operating system
limits its memory. This file imports nothing of ours. The answer is {"text": ..., "pages": ...} or {"error": sentence}.
"""

import json
import sys

MEMORY_LIMIT_BYTES = 1 << 30
MAX_CHARS = 4_000_000


def read(stream) -> dict:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(stream)
        if reader.is_encrypted and not reader.decrypt(""):
            return {"error": "it is locked with a password."}
        parts, size = [], 0
        for page in reader.pages:
            parts.append(page.extract_text().strip())
            size += len(parts[-1])
            if size > MAX_CHARS:
                return {"error": f"its text is longer than {MAX_CHARS} characters."}
        text = whole("\n\n".join(part for part in parts if part))
        return {"text": text, "pages": len(parts)} if text else {"error": "there is no text in it, only pictures."}
    except MemoryError:
        return {"error": "reading it needs more memory than it is given."}
    except (
        PyPdfError,
        RecursionError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        OSError,
        AssertionError,
    ):
        return {"error": "it is no PDF, or a damaged one."}
    except Exception as error:  # what else its reader may raise, about a file that nobody vouches for
        return {"error": f"it cannot be read ({type(error).__name__})."}


def whole(text: str) -> str:
    """Without halves of surrogate pairs, which fonts may have letters stand for: they are no Unicode text."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def main() -> None:
    import io

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system: the deadline remains
    found = read(io.BytesIO(sys.stdin.buffer.read()))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
