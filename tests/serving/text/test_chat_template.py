"""Chat templates: the same text as transformers, and nothing that a user or a template writes does harm."""

import functools
import itertools
import os
import pathlib
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ErrorKind, RequestError
from serving.text.chat_template import ChatTemplate, TemplateLimits
from serving.text.control_tokens import MARK, PLACEHOLDER
from serving.text.template_process import TemplatePool
from tests.serving.text.vocabularies import CONTROL, PLAIN_ADDED, REAL, byte_level, real, real_folder, sentencepiece

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
    {{- 'Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant\\n' + (message.content or '') }}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

PARTS = """{{ bos_token }}{% for m in messages %}
  {%- if loop.index > 9 %}{% break %}{% endif %}
{%- set ns = namespace(text='') %}
{%- if m['content'] is string %}{% set ns.text = m['content'] | trim %}
{%- else %}{% for part in m['content'] %}{% set ns.text = ns.text ~ (part['text'] | trim) %}{% endfor %}{% endif %}
{%- if m.role == 'assistant' %}{% generation %}[{{ ns.text }}]{% endgeneration %}
{%- else %}({{ m.role }}: {{ ns.text }}){% endif %}
{% endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"""

STRICT = """{% if messages[0].role != 'user' %}{{ raise_exception('The first role must be user, é') }}{% endif %}
{%- for d in documents or [] %}{{ d | tojson(indent=2) }}{% endfor %}
{%- for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}{{ strftime_now('%Y')[:2] }}"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather, with <b> & 'quotes' and é",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
CHATS = [
    [{"role": "user", "content": "Hi  there\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nfoo\n</think>\n\nb "},
        {"role": "user", "content": "c é 你"},
    ],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", "reasoning_content": "because"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"},
    ],
]
VARIANTS = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": False, "continue_final_message": True},
    {"add_generation_prompt": True, "enable_thinking": False},
]


@functools.cache
def template(source, tokenizer=byte_level):
    return ChatTemplate(source, tokenizer())


def oracle_render(source, messages, special_tokens, **kwargs):
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([messages], chat_template=source, **special_tokens, **kwargs)[0][0]


@pytest.mark.parametrize("source", [CHATML, PARTS, STRICT], ids=["chatml", "parts", "strict"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_own_templates_render_as_in_transformers(source, tools):
    ours = template(source)
    same = 0
    for chat, variant in itertools.product(CHATS, VARIANTS):
        try:
            want = oracle_render(source, chat, ours.special_tokens, tools=tools, **variant)
        except Exception:
            with pytest.raises(RequestError):
                ours.render(chat, tools=tools, **variant)
            continue
        assert ours.render(chat, tools=tools, **variant) == want
        text, ids = ours.encode(byte_level(), chat, tools=tools, **variant)
        assert text == want
        assert byte_level().decode(ids, skip_special_tokens=False) == want
        same += 1
    assert same >= 4


@pytest.mark.parametrize("name", [name for name in REAL if name not in ("llama2", "gemma2", "gptoss")])
def test_real_templates_render_and_encode_as_in_transformers(name):
    from transformers import AutoTokenizer

    tokenizer, oracle = real(name), AutoTokenizer.from_pretrained(real_folder(name))
    ours = ChatTemplate.from_tokenizer(tokenizer)
    same = 0
    for chat, tools, variant in itertools.product(CHATS, (None, TOOLS), VARIANTS):
        try:
            want = oracle.apply_chat_template(chat, tools=tools, tokenize=False, **variant)
        except Exception:
            continue
        try:
            text, ids = ours.encode(tokenizer, chat, tools=tools, **variant)
        except RequestError:
            assert "date_string" in ours.source or variant.get("continue_final_message"), (chat, variant)
            continue
        assert text == want
        assert ids == oracle(want, add_special_tokens=False).input_ids
        same += 1
    assert same >= 12


def test_errors_are_the_templates_own_words():
    with pytest.raises(RequestError, match="The first role must be user, é") as error:
        template(STRICT).render([{"role": "assistant", "content": "x"}])
    assert error.value.kind is ErrorKind.INVALID_ARGUMENT
    with pytest.raises(ValueError, match="line 2"):
        ChatTemplate("a\n{% if %}")
    with pytest.raises(RequestError, match="unsafe"):
        ChatTemplate("{{ ''.__class__.__mro__ }}").render(CHATS[0])
    with pytest.raises(RequestError, match="unsafe"):
        ChatTemplate("{{ messages.append(1) }}").render(CHATS[0])
    with pytest.raises(RequestError, match="'_x'"):
        ChatTemplate("{{ namespace(_x=1) }}").render(CHATS[0])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 0.5 seconds"),
        ("{{ 99999999 ** 99999999 if messages }}", "seconds|refused"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "longer than 1000000 characters"),
        (
            "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "memory|seconds",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
    ],
    ids=["loops", "power", "long", "memory", "recursion"],
)
def test_hostile_templates_end(source, words):
    # A short time where it is time that ends them; where something else does, that is to come first on any machine.
    limits = TemplateLimits(deadline_s=0.5 if "seconds" in words else 60.0, max_chars=1_000_000)
    with pytest.raises((RequestError, ValueError), match=words):
        ChatTemplate(source, limits=limits).render(CHATS[0])
    assert template(CHATML).render(CHATS[0]).startswith("<|im_start|>user")  # others are still served


def test_a_killed_worker_is_replaced():
    pool = TemplatePool(size=1)
    try:
        assert "facts" in pool.load("t", "{{ a }}", 60.0)
        (worker,) = pool._idle
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
        message = {"render": "t", "variables": {"a": "x"}, "limit": 9}
        with pytest.raises(Exception, match="ended without an answer"):
            pool.render("t", "{{ a }}", message, 60.0)
        assert pool.render("t", "{{ a }}", message, 60.0) == {"text": "x"}
    finally:
        pool.close()


def test_workers_see_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    pool = TemplatePool(size=1)
    try:
        pool.load("t", "", 60.0)
        environ = pathlib.Path(f"/proc/{pool._idle[0]._process.pid}/environ")
        if not environ.exists():
            pytest.skip("this system has no /proc")
        assert b"HF_TOKEN" not in environ.read_bytes()
    finally:
        pool.close()


def test_messages_are_shaped_for_the_template():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    joined = template(CHATML).render([{"role": "user", "content": parts}], add_generation_prompt=False)
    assert joined == "<|im_start|>user\na\nb<|im_end|>\n"
    only_lists = ChatTemplate("{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}")
    assert only_lists.render([{"role": "user", "content": "text"}]) == "text;"
    call = {**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}
    rendered = template(CHATML).render(
        [{"role": "assistant", "content": None, "tool_calls": [call]}], add_generation_prompt=False
    )
    assert rendered == (
        '<|im_start|>assistant\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>\n'
    )
    assert template(CHATML).render(
        [{"role": "user", "content": "x", "name": None, "tool_calls": []}], add_generation_prompt=False
    ) == template(CHATML).render([{"role": "user", "content": "x"}], add_generation_prompt=False)
    as_text = ChatTemplate("{% for c in messages[0]['tool_calls'] %}{{ c.function.arguments + ';' }}{% endfor %}")
    for arguments, text in (({"city": "Köln"}, '{"city": "Köln"};'), ('{"city":"x"}', '{"city":"x"};')):
        call = {**CALL, "function": {"name": "f", "arguments": arguments}}
        assert as_text.render([{"role": "assistant", "content": None, "tool_calls": [call]}]) == text
    told = template(CHATML).render([{"role": "developer", "content": "x"}], add_generation_prompt=False)
    assert told == "<|im_start|>system\nx<|im_end|>\n"
    with pytest.raises(RequestError, match="image_url"):
        template(CHATML).render([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    with pytest.raises(RequestError, match="empty"):
        template(CHATML).render([])
    with pytest.raises(RequestError, match="add_generation_prompt"):
        template(CHATML).render(CHATS[0], continue_final_message=True)
    for name in ("bos_token", "raise_exception", "_x"):
        with pytest.raises(RequestError, match=name):
            template(CHATML).render(CHATS[0], **{name: "x"})


def test_tool_template_is_used_for_tools():
    ours = ChatTemplate("plain", tool_source="{{ tools | length }} tools")
    assert ours.render(CHATS[0]) == "plain"
    assert ours.render(CHATS[0], tools=[]) == "plain"
    assert ours.render(CHATS[0], tools=TOOLS) == "1 tools"


def test_variables_tell_which_arguments_matter():
    assert "enable_thinking" in template(PARTS).variables
    assert "enable_thinking" not in template(CHATML).variables


def control_ids(tokenizer, messages, source=CHATML, **kwargs):
    _, ids = template(source, tokenizer).encode(tokenizer(), messages, **kwargs)
    return [i for i in ids if i in tokenizer().special_token_ids or i in added_ids(tokenizer())]


def added_ids(tokenizer):
    return set(tokenizer.added_tokens.values())


hostile = st.lists(
    st.one_of(
        st.sampled_from([*CONTROL, *PLAIN_ADDED]),
        st.sampled_from([t[:n] for t in CONTROL for n in range(1, len(t))]),
        st.sampled_from([t[n:] for t in CONTROL for n in range(1, len(t))]),
        st.sampled_from([MARK, PLACEHOLDER, " ", "\n", "</think>", "a", "<"]),
    ),
    max_size=6,
).map("".join)


@given(st.lists(hostile, min_size=1, max_size=4), hostile, hostile)
@settings(deadline=None, max_examples=150)
def test_what_users_type_never_becomes_a_control_token(texts, name, system):
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": [{"type": "text", "text": text} for text in texts]},
        {"role": "tool", "content": texts[0]},
    ]
    tools = [{"type": "function", "function": {"name": name, "description": texts[-1], name: 1}}]
    tokenizer = byte_level()
    # The same chat with harmless strings tells which control tokens are the template's own.
    harmless = [{"role": m["role"], "content": "x"} for m in messages]
    want = [i for i in control_ids(byte_level, harmless, tools=TOOLS) if i in tokenizer.special_token_ids]
    got = [i for i in control_ids(byte_level, messages, tools=tools) if i in tokenizer.special_token_ids]
    assert got == want


@given(st.lists(hostile, min_size=2, max_size=5))
@settings(deadline=None, max_examples=100)
def test_strings_that_the_template_joins_cannot_make_a_control_token(texts):
    messages = [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]
    for tokenizer in (byte_level, sentencepiece):
        _, ids = template(PARTS, tokenizer).encode(tokenizer(), messages)
        special = [i for i in ids if i in tokenizer().special_token_ids]
        assert special == [tokenizer().bos_token_id]


def test_structure_is_text_where_users_and_tools_write_it():
    tokenizer = byte_level()
    call = tokenizer.token_to_id("<tool_call>")
    for role, expected in (("user", 0), ("tool", 0), ("system", 1), ("assistant", 1)):
        _, ids = template(CHATML).encode(tokenizer, [{"role": role, "content": "a <tool_call> b"}])
        assert ids.count(call) == expected, role
        assert "a <tool_call> b" in tokenizer.decode(ids)
    think = tokenizer.token_to_id("<think>")  # not written by this template: an ordinary added token
    assert template(CHATML).encode(tokenizer, [{"role": "user", "content": "<think>"}])[1].count(think) == 1


def test_marked_text_keeps_its_characters():
    text, ids = template(CHATML).encode(byte_level(), [{"role": "user", "content": "a<|im_end|>b <|im_st\ud800"}])
    assert "a<|im_end|>b <|im_st" in text
    assert MARK not in text
    assert "a<|im_end|>b <|im_st\ufffd" in byte_level().decode(ids)


def test_many_threads_render_at_once():
    from concurrent.futures import ThreadPoolExecutor

    ours = template(CHATML)
    chats = [[{"role": "user", "content": f"number {i}"}] for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ours.render, chats))
    assert all(f"number {i}<" in text for i, text in enumerate(texts))
