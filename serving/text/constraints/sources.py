"""What a request's constraint is written in, checked before it is compiled, and the compiler's refusals in plain words."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark

from serving.errors import RequestError, invalid
from serving.text.constraints.schema_rules import Refused, check_repeats

PARAM = "structured_outputs"
# llguidance translates GBNF to Lark in Python, in time that grows with the square of the number of rules: 300 rules
# take 0.2 s, 1,000 take 2 s, 5,000 take minutes. Lark itself has no such limit: 200,000 characters take 1.5 s.
MAX_GBNF_RULES = 256
MAX_GBNF_CHARS = 1 << 16
MAX_EXPANDED = 100_000
"""Parts of a Lark grammar's tokens with the tokens inside them written out. 1,000,000 take 4 s and 200 MB."""

_DEFINITION = re.compile(r"^\s*[?!]?([A-Za-z_]\w*)(?:\[[^\]\n]*\])?(?:\.\d+)?\s*:", re.MULTILINE)
_LITERALS = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*')
_TOKEN = re.compile(r"\b(_?[A-Z][A-Z0-9_]*)\b(?:\s*\{\s*(\d+)(?:\s*,\s*(\d*))?\s*\})?")
_AT = re.compile(r"^(?:at )?(\d+)\((\d+)\): (.*)", re.DOTALL)
_TOO_COMPLEX = re.compile(r"too (many|big|large|complex)|fuel|precomputation failed|limit for this grammar|limits?\.")
_QUOTED = re.compile(r"^(?: *\d+ \|.*| *\^+ *)\n?", re.MULTILINE)
_TIPS = "Simplify it: fewer nested repetitions, smaller counts."


def lark_string(text: str) -> str:
    """`text` as a string literal of the Lark dialect."""
    return json.dumps(text, ensure_ascii=False)


def check_lark(text: str) -> None:
    """Refuses a Lark grammar whose tokens, which are written out where others name them, would become too large.

    Raises:
        Refused: as the rest of a sentence.
    """
    plain = _LITERALS.sub("x", text)
    for literal in _LITERALS.findall(text):
        if literal.startswith("/") and not literal.startswith("//"):
            check_repeats(literal)
    _check_ignored(text)
    found = list(_DEFINITION.finditer(plain))
    ends = [*(match.start() for match in found[1:]), len(plain)]
    bodies = {match[1]: plain[match.end() : ends[i]] for i, match in enumerate(found)}
    sizes: dict[str, int] = {}

    def size_of(name: str, depth: int) -> int:
        if name not in bodies or depth > len(bodies):
            return 1  # unknown, or in a circle: the compiler says so
        if name not in sizes:
            body = bodies[name]
            total = 1 + body.count("x")
            for other, least, _ in _TOKEN.findall(body):
                # A counted token is kept as it is and counted, so its count multiplies by no more than ten.
                times = min(max(1, int(least or 1)), 10) if len(least) < 9 else 10
                total += times * size_of(other, depth + 1)
                if total > MAX_EXPANDED:
                    break
            sizes[name] = total
        return sizes[name]

    for name in bodies:
        if name.isupper() and size_of(name, 0) > MAX_EXPANDED:
            raise Refused(f"is too large with its tokens written out: {name} has more than {MAX_EXPANDED} parts.")


def _check_ignored(text: str) -> None:
    """Refuses a literal that `%ignore` takes away as well: the compiler then looks for the end of it for ever."""
    ignored, others = [], []
    for line in text.splitlines():
        (ignored if line.lstrip().startswith("%ignore") else others).append(line)
    if not ignored:
        return
    bodies = {match[1]: line[match.end() :] for line in others if (match := _DEFINITION.match(line))}
    patterns = []
    for line in ignored:
        name = line.partition("%ignore")[2].strip()
        patterns += _patterns(bodies.get(name, name))
    texts = {found for line in others for found in _texts(line)}
    for pattern in patterns:
        for found in texts:
            if pattern.fullmatch(found) and pattern.fullmatch(found * 2):
                raise Refused(f"asks for {found!r}, which its %ignore takes away. Write it without one of the two.")


def _patterns(body: str) -> list[re.Pattern[str]]:
    """What an ignored token matches, as far as Python can tell: blanks for the common ones."""
    found = [re.compile(re.escape(text)) for text in _texts(body)]
    for literal in _LITERALS.findall(body):
        if literal.startswith("/") and not literal.startswith("//"):
            with contextlib.suppress(re.error):
                found.append(re.compile(literal[1:-1]))
    if not found or "WS" in body:
        found.append(re.compile(r"\s+"))
    return found


def _texts(line: str) -> list[str]:
    """The string literals of a line."""
    found = []
    for literal in _LITERALS.findall(line):
        if literal.startswith('"'):
            with contextlib.suppress(ValueError):
                found.append(json.loads(literal))
    return [text for text in found if text]


def check(kind: str, checks: Callable[[str], None], text: str) -> None:
    """Runs a check of a constraint's text. Raises RequestError: INVALID_ARGUMENT in the check's words."""
    try:
        checks(text)
    except Refused as error:
        raise invalid(f"The {kind} {error}", PARAM) from None


def from_gbnf(text: str) -> str:
    """A GBNF grammar in Lark. Raises RequestError: INVALID_ARGUMENT: it cannot be read, or is too large."""
    rules = text.count("::=")
    if rules > MAX_GBNF_RULES or len(text) > MAX_GBNF_CHARS:
        raise invalid(
            f"The GBNF grammar has {rules} rules and {len(text)} characters; at most {MAX_GBNF_RULES} and "
            f"{MAX_GBNF_CHARS} are compiled. Write it in Lark, which has no such limit.",
            PARAM,
        )
    try:
        return any_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # the converter raises several kinds of its own
        # "Expected ')' at line 1, 'root ::= (' ^ ''": the text behind the comma is the grammar's.
        said = str(error).partition(", '")[0].strip()
        raise invalid(f"The grammar cannot be read: {brief(said)}.", PARAM) from None


def schema_of(given: Mapping[str, Any] | str) -> Mapping[str, Any]:
    """A schema given as a mapping or as text. Raises RequestError: INVALID_ARGUMENT: it is none."""
    schema: Any = given
    if isinstance(given, str):
        try:
            schema = json.loads(given)
        except ValueError as error:
            why = str(error) if isinstance(error, json.JSONDecodeError) else "a number has too many digits"
            raise invalid(f"The JSON schema is not JSON: {why}.", PARAM) from None
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise invalid(f"A JSON schema is an object, got {json.dumps(schema)[:40]}.", PARAM)
    return schema


def refusal(kind: str, message: str) -> RequestError:
    """The compiler's error as a sentence about the request."""
    the = f"The {kind}"
    # Without the lines it quotes: what the client wrote there must not be taken for the compiler's words.
    message = _QUOTED.sub("", message).strip()
    if found := _AT.match(message):
        place = f" at line {found[1]}, column {found[2]}" if kind == "grammar" else ""
        message = found[3]
    else:
        place = ""
    expression = re.search(r"^error: (.*)", message, re.MULTILINE)
    if "recursion limit" in message:
        return invalid(f"{the} is nested too deeply.", PARAM)
    if unknown := re.search(r"Unimplemented keys: \[(.*?)\]", message):
        keys = unknown[1].replace('"', "")
        return invalid(f"{the} uses {keys}, which is not supported. Leave it out or say it differently.", PARAM)
    if "oneOf constraints" in message:
        return invalid(
            f"{the} uses oneOf with alternatives that may overlap, which is not supported. Use anyOf, or give each "
            "alternative a required property with a const of its own.",
            PARAM,
        )
    if "not disjoint" in message:
        return invalid(f"{the} has patternProperties of which a name may match two, which is not supported.", PARAM)
    if "lookarounds not supported" in message:
        return invalid(
            f"{the} has a regular expression with look-around (\\b, or ^ and $ inside), which is not supported.", PARAM
        )
    if expression or "regex parse error" in message:
        why = (expression[1] if expression else "it is not one").rstrip(".")
        return invalid(f"{the} has a regular expression that cannot be read{place}: {brief(why)}.", PARAM)
    if "Regex is empty" in message:
        return invalid(
            f"{the} has a text that its pattern, format and length rule out together: no value satisfies it.", PARAM
        )
    if "Unsatisfiable schema" in message:
        return invalid(
            f"{the} is satisfied by no value: {brief(message.partition('Unsatisfiable schema: ')[2])}.", PARAM
        )
    if _TOO_COMPLEX.search(message):
        return invalid(f"{the} is too complex to be enforced. {_TIPS}", PARAM)
    if "NoExtension" in message:
        return invalid(
            f"{the} allows no text at all: every way through it leads back to where it began, or nowhere.", PARAM
        )
    said = brief(message.splitlines()[0] if message else "").partition("; following ")[0]
    return invalid(f"{the} cannot be read{place}: {said or 'it is not complete'}.", PARAM)


def brief(message: str) -> str:
    """A message on one line and not too long."""
    flat = " ".join(message.replace("<non-verbose/>", "").split())
    return (flat[:300] + " ..." if len(flat) > 300 else flat).rstrip(".")
