"""Structured output without a model: whatever the masks allow is valid, and what cannot be enforced is refused."""

import json
import random
import re
import threading

import jsonschema
import numpy as np
import pytest

from serving.engine.api.constraint import TooComplexError
from serving.engine.api.sampling_params import StructuredOutputs
from serving.errors import ErrorKind, RequestError
from serving.text.grammar import GrammarCompiler, GrammarConstraint
from tests.serving.text.schemas import schemas
from tests.serving.text.vocabularies import byte_level, sentencepiece
from tests.serving.text.walks import allowed_ids, walk

WIDTH = 1024  # logits are padded beyond the vocabulary


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(byte_level(), WIDTH)


@pytest.mark.parametrize("part", range(4))
def test_random_walks_satisfy_a_hundred_schemas(compiler, part):
    tokenizer = byte_level()
    finished = 0
    cases = schemas(120)[part::4]
    for i, schema in enumerate(cases):
        factory = compiler.compile(StructuredOutputs(json=schema))
        validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["date", "ipv4"]))
        for seed in range(3):
            ids = walk(factory(), tokenizer, random.Random(1000 * i + seed))
            if ids is None:
                continue
            finished += 1
            text = tokenizer.decode(ids)
            validator.validate(json.loads(text))
    assert finished > 2.5 * len(cases)  # walks in recursive schemas may not end


def test_random_walks_on_a_sentencepiece_vocabulary():
    tokenizer = sentencepiece()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    for i, schema in enumerate(schemas(30)):
        ids = walk(compiler.compile(StructuredOutputs(json=schema))(), tokenizer, random.Random(i))
        if ids is not None:
            jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)


@pytest.mark.parametrize("regex", [r"[0-9]{3}-[a-f]+", r"(ja|nein), (Köln|Paris)\?", r"\d{4}(\.\d)?", "a*"])
def test_regex(compiler, regex):
    for seed in range(5):
        ids = walk(
            compiler.compile(StructuredOutputs(regex=regex))(), byte_level(), random.Random(seed), free_tokens=20
        )
        assert ids is not None
        assert re.fullmatch(regex, byte_level().decode(ids))


def test_choice_and_object(compiler):
    choices = ("yes", "no", 'per "haps"\n', "nö")
    seen = set()
    for seed in range(40):
        ids = walk(compiler.compile(StructuredOutputs(choice=choices))(), byte_level(), random.Random(seed))
        seen.add(byte_level().decode(ids or []))
    assert seen == set(choices)
    ids = walk(compiler.compile(StructuredOutputs(json_object=True))(), byte_level(), random.Random(3))
    assert ids is None or isinstance(json.loads(byte_level().decode(ids)), dict)


@pytest.mark.parametrize(
    "grammar",
    ['start: sum\nsum: NUM ("+" NUM)*\nNUM: /[1-9]{1,3}/', 'root ::= num ("+" num)*\nnum ::= [1-9] [1-9]? [1-9]?'],
    ids=["lark", "gbnf"],
)
def test_grammar(compiler, grammar):
    for seed in range(5):
        ids = walk(compiler.compile(StructuredOutputs(grammar=grammar))(), byte_level(), random.Random(seed), 10)
        assert ids is not None
        assert re.fullmatch(r"[1-9]{1,3}(\+[1-9]{1,3})*", byte_level().decode(ids))


def test_blanks_between_parts_are_allowed_but_not_without_end(compiler):
    tokenizer = byte_level()
    constraint = compiler.compile(StructuredOutputs(json={"type": "object", "required": ["a"]}))()
    blank = tokenizer.token_to_id("Ċ")
    assert constraint.accept(tokenizer.token_to_id("{"))
    accepted = 0
    while constraint.accept(blank):
        accepted += 1
        assert accepted < 100
    assert accepted == 32


def test_end_of_sequence_is_allowed_exactly_where_the_text_may_end(compiler):
    tokenizer = byte_level()
    eos = set(tokenizer.eos_token_ids)
    constraint = compiler.compile(StructuredOutputs(regex="ab*"))()
    assert not eos & set(allowed_ids(constraint, WIDTH))
    assert not constraint.accept(tokenizer.eos_token_ids[0])
    assert constraint.accept(tokenizer.token_to_id("a"))
    assert eos <= set(allowed_ids(constraint, WIDTH))
    assert not constraint.finished  # b could follow
    assert constraint.accept(tokenizer.eos_token_ids[1])
    assert constraint.finished
    assert not constraint.accept(tokenizer.token_to_id("b"))


def test_a_refused_token_changes_nothing(compiler):
    tokenizer = byte_level()
    constraint = compiler.compile(StructuredOutputs(regex="abc"))()
    for letter in "abc":
        before = allowed_ids(constraint, WIDTH)
        assert not constraint.accept(tokenizer.token_to_id("x"))
        assert not constraint.accept(WIDTH - 1)
        assert (allowed_ids(constraint, WIDTH) == before).all()
        assert constraint.accept(tokenizer.token_to_id(letter))
    assert constraint.finished


def test_nothing_beyond_the_vocabulary_and_no_control_token_is_allowed(compiler):
    tokenizer = byte_level()
    constraint = compiler.compile(StructuredOutputs(regex="(.|\n)*"))()
    allowed = set(allowed_ids(constraint, WIDTH).tolist())
    assert max(allowed) < tokenizer.vocab_size
    assert allowed & tokenizer.special_token_ids <= set(tokenizer.eos_token_ids)
    assert len(allowed) > tokenizer.vocab_size // 2


def test_rows_of_another_width_are_cut_or_zeroed():
    tokenizer = byte_level()
    narrow = GrammarCompiler(
        tokenizer, tokenizer.vocab_size - 40
    )  # some models' logits are narrower than their vocabulary
    constraint = narrow.compile(StructuredOutputs(regex="a"))()
    a = tokenizer.token_to_id("a")
    for words in ((tokenizer.vocab_size - 40 + 31) // 32, 100):
        row = np.full(words, -1, np.int32)
        constraint.fill_mask(row)
        bits = np.unpackbits(row.view(np.uint8), bitorder="little").nonzero()[0]
        assert bits.tolist() == [a]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (StructuredOutputs(json={"not": {"type": "string", "minLength": 2}}), r"uses not,"),
        (StructuredOutputs(json={"type": "array", "uniqueItems": True, "contains": {}}), r"uniqueItems"),
        (StructuredOutputs(json={"if": {"required": ["a"]}, "then": {"required": ["b"]}}), r"if, then"),
        (StructuredOutputs(json={"oneOf": [{"type": "integer"}, {"type": "number"}]}), r"oneOf.*anyOf"),
        (StructuredOutputs(json={"$ref": "https://example.com/schema"}), r"example\.com"),
        (StructuredOutputs(json={"type": "integer", "minimum": 5, "maximum": 3}), r"minimum"),
        (StructuredOutputs(json={"type": "integer", "enum": ["too many", "fuel"]}), r"no value: incompatible types"),
        (StructuredOutputs(json={"not": {}, "x-guidance": {"lenient": True}}), r"uses not,"),
        (StructuredOutputs(json={"oneOf": [{}, {}], "x-guidance": {"coerce_one_of": True}}), r"oneOf"),
        (StructuredOutputs(json="{"), r"not JSON"),
        (StructuredOutputs(json="[]"), r"is an object"),
        (StructuredOutputs(regex="(a"), r"regex"),
        (StructuredOutputs(regex="a(?=b)"), r"look"),
        (StructuredOutputs(grammar="start: nothing"), r"nothing"),
        (StructuredOutputs(grammar='root ::= "a'), r"grammar"),
        (StructuredOutputs(grammar="root ::= " + "(" * 50_000), r"nested"),
        (StructuredOutputs(grammar='root ::= "a"\n' + 'x ::= "b"\n' * 5000), r"5001 rules.*Lark"),
        (StructuredOutputs(choice=("",)), r"choice"),
        (StructuredOutputs(json={"$ref": "#"}), r"refers to itself"),
        (
            StructuredOutputs(json={"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#"}}}),
            r"refers to itself",
        ),
        (StructuredOutputs(json={"$ref": "#/$defs/none"}), r"'#/\$defs/none', which it does not have"),
        (
            StructuredOutputs(json={"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}),
            r"no value",
        ),
        (StructuredOutputs(json={"type": "string", "pattern": "(a"}), r"regular expression.*unclosed"),
        (StructuredOutputs(json={"type": "string", "pattern": "^a$", "format": "date"}), r"no value satisfies"),
        (StructuredOutputs(json={"enum": []}), r"empty enum"),
        (StructuredOutputs(json={"type": "any"}), r"type \"any\""),
        (StructuredOutputs(json={"minItems": -1}), r"minItems -1"),
        (StructuredOutputs(json={"patternProperties": {"^a": {}, "b$": {}}}), r"may match two"),
        (StructuredOutputs(regex="a{1000000000}"), r"1000000000"),
        (StructuredOutputs(regex=r"\bfoo"), r"look-around"),
        (StructuredOutputs(grammar="root ::= root"), r"allows no text"),
        (StructuredOutputs(grammar="root ::= a\na ::= b\nb ::= a"), r"allows no text"),
        (StructuredOutputs(grammar="start: start"), r"allows no text"),
        (
            StructuredOutputs(
                grammar="start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(40)) + 'R40: "a"'
            ),
            r"written out",
        ),
        (StructuredOutputs(grammar='start: "a" " " "b"\n%ignore / +/\n'), r"%ignore takes away"),
        (StructuredOutputs(grammar='start: "a" "\\n" "b"\n%ignore SPACE\nSPACE: /\\s+/\n'), r"%ignore takes away"),
        (StructuredOutputs(grammar="start: a\na: /[/"), r"regular expression.*line 2"),
        (StructuredOutputs(grammar="%import common.FOO\nstart: FOO"), r"common\.FOO"),
        (StructuredOutputs(regex="a" * (1 << 21)), r"characters"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(compiler, wanted, words):
    with pytest.raises(RequestError, match=words) as error:
        compiler.compile(wanted)
    assert error.value.kind is ErrorKind.INVALID_ARGUMENT
    assert error.value.param == "structured_outputs"
    message = error.value.message
    assert "\n" not in message
    assert len(message) < 400
    # No words of the compiler's, and not the grammar again.
    assert not re.search(r"llguidance|coerce|Unimplemented|fuel|NoExtension|verbose|\^\^|Some\(|available", message)


def test_deeply_nested_schema_is_refused(compiler):
    schema = {"type": "integer"}
    for _ in range(3000):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(RequestError, match=r"nest|recursion"):
        compiler.compile(StructuredOutputs(json=schema))


def test_a_grammar_too_complex_to_go_on_says_so(compiler):
    regex = "(" + "|".join(f"(.*{chr(97 + i)}.{{1,200}}){{1,50}}" for i in range(20)) + ")"
    constraint = compiler.compile(StructuredOutputs(regex=regex))()
    rng = random.Random(0)
    with pytest.raises(TooComplexError, match="Simplify"):
        for _ in range(2000):
            ids = allowed_ids(constraint, WIDTH)
            constraint.accept(int(rng.choice(ids)))


@pytest.mark.parametrize("marker", ["<think>", "</tool_call>", "<|im_end|>", "<|endoftext|>"])
def test_what_looks_like_a_control_token_is_text_in_a_grammar(compiler, marker):
    """In every kind of constraint, and wherever in it: such a text can be written to its end."""
    text = f"a{marker} b"
    for wanted, whole in (
        (StructuredOutputs(choice=(text,)), text),
        (StructuredOutputs(choice=(marker,)), marker),
        (StructuredOutputs(regex=re.escape(text)), text),
        (StructuredOutputs(json={"const": text}), json.dumps(text)),
        (StructuredOutputs(json={"enum": [marker]}), json.dumps(marker)),
        (StructuredOutputs(grammar=f"start: {json.dumps(text)}"), text),
        (StructuredOutputs(grammar=f"root ::= {json.dumps(text)}"), text),
    ):
        for seed in range(4):
            rng, constraint, ids = random.Random(seed), compiler.compile(wanted)(), []
            while not constraint.finished:
                allowed = [token for token in allowed_ids(constraint, WIDTH) if not byte_level().is_special(token)]
                assert allowed, (wanted, byte_level().decode(ids))
                ids.append(int(rng.choice(allowed)))
                assert constraint.accept(ids[-1]), (wanted, byte_level().decode(ids))
            found = byte_level().decode(ids, skip_special_tokens=False)
            assert found == whole, (wanted, found)
    lark = f'%llguidance {{}}\nstart: {marker} "a"'
    if byte_level().is_special(byte_level().token_to_id(marker)):
        return
    constraint = compiler.compile_tools(lark)()
    assert list(allowed_ids(constraint, WIDTH)) == [byte_level().token_to_id(marker)], (
        "the control token where it is asked for"
    )


def test_masks_of_a_batch_are_those_of_each_alone(compiler):
    tokenizer = byte_level()
    rng = random.Random(5)
    constraints = []
    for schema in schemas(24):
        constraint = compiler.compile(StructuredOutputs(json=schema))()
        for _ in range(rng.randrange(0, 6)):
            ids = [int(i) for i in allowed_ids(constraint, WIDTH) if int(i) not in tokenizer.eos_token_ids]
            if ids and not constraint.finished:
                constraint.accept(rng.choice(ids))
        constraints.append(constraint)
    together = np.zeros((40, WIDTH // 32), np.int32)
    items = [(constraint, 39 - i) for i, constraint in enumerate(constraints)]
    assert GrammarConstraint.fill_masks(items, together) == {}
    for constraint, row in items:
        alone = np.zeros(WIDTH // 32, np.int32)
        constraint.fill_mask(alone)
        assert (together[row] == alone).all()
    assert (together[0] == 0).all()
    few = np.zeros((40, WIDTH // 32), np.int32)
    assert GrammarConstraint.fill_masks(items[:2], few) == {}
    assert (few[38:] == together[38:]).all()


def test_one_grammar_that_cannot_go_on_does_not_stop_the_others(compiler):
    regex = "(" + "|".join(f"(.*{chr(97 + i)}.{{1,200}}){{1,50}}" for i in range(20)) + ")"
    broken = compiler.compile(StructuredOutputs(regex=regex))()
    rng = random.Random(0)
    with pytest.raises(RuntimeError):
        for _ in range(2000):
            broken.accept(int(rng.choice(allowed_ids(broken, WIDTH))))
    good = [compiler.compile(StructuredOutputs(choice=(text,)))() for text in "abcde"]
    mask = np.zeros((6, WIDTH // 32), np.int32)
    for items in ([(broken, 0), (good[0], 1)], [(broken, 0), *((c, i + 1) for i, c in enumerate(good))]):
        failed = GrammarConstraint.fill_masks(items, mask)
        assert list(failed) == [0]
        assert isinstance(failed[0], TooComplexError)
        for _, row in items[1:]:
            bits = np.unpackbits(mask[row].view(np.uint8), bitorder="little").nonzero()[0]
            assert bits.tolist() == [byte_level().token_to_id("abcde"[row - 1])]


def test_equal_constraints_compile_once_and_do_not_share_state(compiler, monkeypatch):
    built = []
    original = compiler._build
    monkeypatch.setattr(compiler, "_build", lambda *a: built.append(a) or original(*a))
    wanted = StructuredOutputs(regex="once[ab]")
    first, second = compiler.compile(wanted)(), compiler.compile(wanted)()
    assert len(built) == 1
    o = byte_level().token_to_id("o")
    assert first.accept(o)
    assert second.accept(o)
    assert not first.accept(o)


NESTED = r"((\w{{1,20}}[ ,{0}]){{1,30}}\.){{1,30}}"


def _use(factory, tokens=40):
    """Walks through a grammar for a while; whether it could go on."""
    constraint, rng = factory(), random.Random(0)
    try:
        for _ in range(tokens):
            ids = allowed_ids(constraint, WIDTH)
            constraint.accept(int(rng.choice([i for i in ids if i not in byte_level().eos_token_ids])))
    except RuntimeError:
        return False
    return True


def test_grammars_that_grow_in_use_are_charged_and_forgotten():
    compiler = GrammarCompiler(byte_level(), WIDTH, cache_bytes=4 << 20)
    for i in range(12):
        _use(compiler.compile(StructuredOutputs(regex=NESTED.format(chr(97 + i)))))
        compiler.compile(StructuredOutputs(regex=f"x{i}"))
        assert compiler._cache.num_bytes <= 4 << 20
    assert 0 < len(compiler._cache) < 24


def test_a_grammar_that_failed_is_not_used_again():
    compiler = GrammarCompiler(byte_level(), WIDTH)
    regex = NESTED.format("")
    constraint = compiler.compile(StructuredOutputs(regex=regex))()
    compiler.compile(StructuredOutputs(regex="a"))
    constraint._held.failed = True
    other = compiler.compile(StructuredOutputs(regex=regex))()
    assert other._held is not constraint._held
    assert len(compiler._cache) == 2


def test_what_grew_most_cannot_go_on_where_all_hold_too_much():
    compiler = GrammarCompiler(byte_level(), WIDTH, live_bytes=1 << 20)
    small = compiler.compile(StructuredOutputs(regex="[ab]*"))
    large = compiler.compile(StructuredOutputs(regex=NESTED.format("")))
    assert not _use(large, 2000)
    assert _use(small, 200)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": False, "maxItems": 2},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 1},
        {"type": "string", "uniqueItems": True, "maxLength": 4},
        {"type": "array", "contains": True, "maxItems": 2, "items": {"type": "null"}},
        {"type": "array", "contains": {"type": "string"}, "minContains": 0, "maxItems": 1},
        {"type": "array", "minContains": 2, "maxItems": 1},
        {
            "type": "object",
            "propertyNames": {"type": "string"},
            "additionalProperties": {"type": "integer"},
            "maxProperties": 2,
        },
        {"type": "object", "propertyNames": {"minLength": 0, "title": "n"}, "maxProperties": 1},
        {"type": "object", "propertyNames": {"pattern": "^a[bc]$"}, "additionalProperties": {"type": "null"}},
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "boolean"}},
        {
            "type": "object",
            "propertyNames": {"$ref": "#/$defs/Color"},
            "additionalProperties": {"type": "boolean"},
            "$defs": {"Color": {"enum": ["red", "blue"], "type": "string", "title": "Color"}},
        },
        {
            "type": "object",
            "propertyNames": {"maxLength": 3},
            "additionalProperties": {"type": "null"},
            "maxProperties": 2,
        },
        {"type": "object", "dependentRequired": {}, "additionalProperties": False},
        {"type": "object", "dependentRequired": {"a": []}, "properties": {"a": {}}, "additionalProperties": False},
        {
            "type": "object",
            "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
            "required": ["a"],
            "dependentRequired": {"a": ["b"]},
            "additionalProperties": False,
        },
        {"type": "object", "dependentSchemas": {"a": True}, "dependencies": {}, "maxProperties": 1},
        {
            "type": "object",
            "properties": {"a": {"type": "null"}},
            "additionalProperties": False,
            "unevaluatedProperties": False,
        },
        {"type": "object", "unevaluatedProperties": True, "maxProperties": 1},
        {"type": "array", "prefixItems": [{"type": "null"}], "items": False, "unevaluatedItems": False, "minItems": 1},
        {"type": "string", "not": {"type": "null"}, "maxLength": 3},
        {"type": "boolean", "not": False},
        {"type": "boolean", "if": {}, "then": {}},
        {"type": "boolean", "if": {"const": True}},
        {"type": "boolean", "then": False, "else": False},
        {"type": "object", "minProperties": 0, "properties": {"a": {"type": "null"}}, "additionalProperties": False},
        {
            "type": "object",
            "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
            "required": ["a"],
            "minProperties": 1,
            "maxProperties": 2,
            "additionalProperties": False,
        },
        {"type": "string", "format": "martian", "maxLength": 5},
        {"type": "integer", "format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"type": "integer", "minimum": -(2**63) + 1, "exclusiveMaximum": 2**64},
        {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1e300},
        {"type": "integer", "multipleOf": 1, "maxLength": 3.0},
        {"type": "boolean", "allOf": [], "required": True, "$schema": "https://json-schema.org/bogus"},
        {"type": "string", "maxLength": 2**40, "pattern": "^a{1,3}$"},
        {"$defs": {"unused": {"not": {}}}, "type": "null"},
    ],
    ids=lambda schema: "-".join(schema)[:60],
)
def test_a_keyword_that_restricts_nothing_restricts_nothing(compiler, schema):
    validator = jsonschema.Draft202012Validator({**schema, "$schema": "https://json-schema.org/draft/2020-12/schema"})
    tokenizer = byte_level()
    finished = 0
    for seed in range(4):
        ids = walk(compiler.compile(StructuredOutputs(json=schema))(), tokenizer, random.Random(seed), 20)
        if ids is not None:
            finished += 1
            value = json.loads(tokenizer.decode(ids))
            assert not isinstance(schema.get("required"), list) or set(schema["required"]) <= value.keys()
            if not isinstance(schema.get("required"), bool):
                validator.validate(value)
    assert finished >= 2


def test_the_cache_forgets_the_oldest():
    compiler = GrammarCompiler(byte_level(), WIDTH, cache_size=2)
    for regex in ("a", "b", "a", "c"):
        compiler.compile(StructuredOutputs(regex=regex))
    assert len(compiler._cache) == 2


def test_threads_compile_at_once():
    compiler = GrammarCompiler(byte_level(), WIDTH)
    results = []

    def work(i):
        constraint = compiler.compile(StructuredOutputs(regex=f"x{i % 3}"))()
        results.append(constraint.accept(byte_level().token_to_id("x")))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 12
