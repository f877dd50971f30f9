"""The process that renders chat templates: `python -P template_worker.py FD`.

A template comes with a model from anywhere. Jinja's sandbox keeps it from Python's internals, but nothing inside a
process can stop it from looping for ever or from asking for all memory. So it runs here, where the parent can kill it
after a deadline and the operating system limits its memory. This file imports nothing of ours: starting it must stay
cheap (0.1 s).

Frames on the socket FD are 4 bytes of length (big endian) and that much JSON.
  {"load": id, "source": text}                       -> {"facts": {...}}
  {"render": id, "variables": {...}, "limit": chars}  -> {"text": ...}
Both may answer {"error": sentence} instead.
"""

import datetime
import json
import socket
import struct
import sys

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY_LIMIT_BYTES = 2 << 30
HEADER = struct.Struct(">I")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without attributes that could reach into Python."""

    def __init__(*args, **kwargs):  # no named self: `namespace(self=1)` is allowed
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name):
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"A namespace cannot hold {name!r}: names may not start with '_'.")


class _Dict:
    """`dict(...)` in a template, without the class behind it."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it: what transformers' `apply_chat_template` sets up."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes <, > and & for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(form):
        return datetime.datetime.now().strftime(form)

    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=_Dict(), namespace=_Namespace)
    return env


def facts(env: jinja2.Environment, source: str) -> dict:
    """What a template's syntax tree tells about the messages that it expects."""
    tree = env.parse(source)
    loops = any(_is_content(node.iter) for node in tree.find_all(jinja2.nodes.For))
    tests = list(tree.find_all(jinja2.nodes.Test))
    return {
        "loops_over_content": loops,
        "tests_string": any(test.name == "string" for test in tests),
        "tests_none": any(test.name == "none" and _is_content(test.node) for test in tests),
        "joins_arguments": any(
            _is_arguments(side) for node in tree.find_all(jinja2.nodes.Add) for side in (node.left, node.right)
        ),
        "variables": sorted(jinja2.meta.find_undeclared_variables(tree)),
    }


def _is_arguments(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Const):
        return node.arg.value == "arguments"
    return isinstance(node, jinja2.nodes.Getattr) and node.attr == "arguments"


def _is_content(node: jinja2.nodes.Node | None) -> bool:
    while isinstance(node, jinja2.nodes.Filter):
        node = node.node
    if isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Const):
        return node.arg.value == "content"
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, jinja2.nodes.Name) and "content" in node.name


def render(template: jinja2.Template, variables: dict, limit: int) -> dict:
    parts, size = [], 0
    for part in template.generate(**variables):
        size += len(part)
        if size > limit:
            return {"error": f"the result is longer than {limit} characters"}
        parts.append(part)
    return {"text": "".join(parts)}


def serve(channel: socket.socket) -> None:
    env = environment()
    templates: dict[str, jinja2.Template] = {}
    send(channel, {"ready": True})
    while (request := receive(channel)) is not None:
        try:
            if "load" in request:
                reply = {"facts": facts(env, request["source"])}
                templates[request["load"]] = env.from_string(request["source"])
            else:
                reply = render(templates[request["render"]], request["variables"], request["limit"])
        except jinja2.TemplateSyntaxError as error:
            reply = {"error": f"line {error.lineno}: {error.message}"}
        except jinja2.TemplateError as error:
            reply = {"error": error.message or type(error).__name__, "raised": True}
        except MemoryError:
            reply = {"error": "it needs more memory than it is given"}
        except RecursionError:
            reply = {"error": "it is nested too deeply"}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        send(channel, reply)


def send(channel: socket.socket, message: dict) -> None:
    data = json.dumps(message).encode()
    channel.sendall(HEADER.pack(len(data)) + data)


def receive(channel: socket.socket) -> dict | None:
    """The next message; None when the other side closed."""
    header = _exactly(channel, HEADER.size)
    if header is None:
        return None
    data = _exactly(channel, HEADER.unpack(header)[0])
    return None if data is None else json.loads(data)


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        part = channel.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system: the deadline and the size limit remain
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
