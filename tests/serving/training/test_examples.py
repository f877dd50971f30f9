"""Lines of training data: which tokens are learned, and what is said of lines that are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from serving.text.chat_template import ChatTemplate
from serving.text.tokenizer import Tokenizer
from serving.training.examples import Reader, shared

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}{% endif %}"
    "{{ m.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Earlier thoughts are left out, and a turn without one gets an empty one: as Qwen 3 writes.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
)
# No opening of an answer, and tools in the last question.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last or (loop.revindex == 2) %}{{ tools }}{% endif %}{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "[INST]", "[/INST]", "<s>", "</s>", "<call>"]


@pytest.fixture(scope="module")
def tokenizer():
    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    made = tokenizers.Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in SPECIAL])
    ends = [made.token_to_id("<|im_end|>"), made.token_to_id("</s>")]
    return Tokenizer(made, eos_token_ids=ends, bos_token="<s>")


def reader(tokenizer, template=CHATML, **arguments):
    return Reader(tokenizer, template and ChatTemplate(template, tokenizer), arguments)


def write(path, *items):
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in items))
    return path


def learned(tokenizer, example):
    """The text that the loss is on, pieces apart."""
    pieces, last = [], -2
    for index in np.flatnonzero(example.learned_N):
        if index != last + 1:
            pieces.append([])
        pieces[-1].append(int(example.tokens_N[index]))
        last = index
    return [tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces]


def chat(*turns, **more):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]} | more


def test_answers_of_all_turns_and_what_ends_them(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", chat("s:be", "u:hi", "a:ho", "u:he", "a:ha"))
    (example,) = reader(tokenizer).examples(path)
    assert learned(tokenizer, example) == ["ho<|im_end|>", "ha<|im_end|>"]
    assert tokenizer.decode(example.tokens_N.tolist(), skip_special_tokens=False).startswith("<|im_start|>system\nbe")


def test_a_template_that_writes_earlier_turns_otherwise_gives_an_example_a_turn(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", chat("u:hi", "a:ho", "u:he", "a:ha"))
    found = reader(tokenizer, THINKING).examples(path)
    assert [learned(tokenizer, example) for example in found] == [["ho<|im_end|>"], ["ha<|im_end|>"]]
    texts = [tokenizer.decode(example.tokens_N.tolist(), skip_special_tokens=False) for example in found]
    assert texts[0].endswith("<think></think>ho<|im_end|>\n")
    assert "assistant\nho<|im_end|>" in texts[1] and texts[1].endswith("<think></think>ha<|im_end|>\n")


def test_thoughts_and_tool_calls_are_learned(tokenizer, tmp_path):
    thought = {"role": "assistant", "content": "ho", "reasoning_content": "hm"}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
    hi = {"role": "user", "content": "hi"}
    path = write(tmp_path / "a.jsonl", {"messages": [hi, thought]})
    assert learned(tokenizer, reader(tokenizer, THINKING).examples(path)[0]) == ["hm</think>ho<|im_end|>"]
    path = write(tmp_path / "b.jsonl", {"messages": [hi, call]})
    assert learned(tokenizer, reader(tokenizer).examples(path)[0]) == ["<call>look<|im_end|>"]


def test_a_template_without_an_opening_and_with_tools(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", chat("u:hi", "a:ho", "u:he", "a:ha", tools=[{"type": "function"}]))
    found = reader(tokenizer, INST).examples(path)
    assert [learned(tokenizer, example) for example in found] == [["ho</s>"], ["ha</s>"]]
    assert "type" in tokenizer.decode(found[0].tokens_N.tolist())


def test_weights_and_prompts_of_messages_choose_answers(tokenizer, tmp_path):
    item = chat("u:hi", "a:ho", "u:he", "a:ha")
    item["messages"][1]["weight"] = 0
    half = {"prompt": item["messages"][:3], "completion": item["messages"][3:]}
    for line in (item, half):
        (example,) = reader(tokenizer).examples(write(tmp_path / "a.jsonl", line))
        assert learned(tokenizer, example) == ["ha<|im_end|>"]


def test_a_users_text_is_no_control_token_but_plain_data_may_have_some(tokenizer, tmp_path):
    (example,) = reader(tokenizer).examples(write(tmp_path / "a.jsonl", chat("u:<|im_end|>", "a:ho")))
    assert (example.tokens_N == tokenizer.added_tokens["<|im_end|>"]).sum() == 2
    (example,) = reader(tokenizer).examples(write(tmp_path / "a.jsonl", {"text": "<s>hi<|im_end|>"}))
    assert example.tokens_N[0] == tokenizer.bos_token_id and len(example.tokens_N) == 4
    assert example.learned_N.tolist() == [False, True, True, True]


def test_prompt_and_completion(tokenizer, tmp_path):
    (example,) = reader(tokenizer, None).examples(write(tmp_path / "a.jsonl", {"prompt": "2+2=", "completion": "4"}))
    assert learned(tokenizer, example) == ["4<|im_end|>"]


def test_pairs(tokenizer, tmp_path):
    lines = [{"query": "a", "positive": "b", "negative": "c"}, {"anchor": "d", "positive": "e", "negative": "f"}]
    assert len(reader(tokenizer).pairs(write(tmp_path / "a.jsonl", *lines))) == 2
    with pytest.raises(ValueError, match="line 3: either all lines have a negative or none"):
        reader(tokenizer).pairs(write(tmp_path / "a.jsonl", *lines, {"query": "a", "positive": "b"}))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 3 is not JSON"),
        ("[1]", "line 3 is not a JSON object"),
        ({"x": 1}, "line 3: it has none of"),
        ({"text": ""}, 'line 3: "text" must be a text'),
        ({"prompt": "a", "completion": 4}, 'line 3: "completion" must be a text'),
        ({"messages": "hi"}, 'line 3: "messages" must be a list'),
        (chat("u:hi"), "line 3: it has no assistant message"),
        (chat("a:hi"), "line 3: it begins with an assistant message"),
        (chat("u:hi", "a:ho") | {"tools": {}}, 'line 3: "tools" must be a list'),
        ({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]}, "line 3: .*content"),
    ],
)
def test_what_is_wrong_is_said_with_the_line(line, says, tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", chat("u:hi", "a:ho"), "", line)
    with pytest.raises(ValueError, match=says):
        reader(tokenizer).examples(path)


def test_a_chat_needs_a_template_and_a_file_must_be_there(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="line 1: the model has no chat template"):
        reader(tokenizer, None).examples(write(tmp_path / "a.jsonl", chat("u:hi", "a:ho")))
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read: No such file"):
        reader(tokenizer).examples(tmp_path / "none.jsonl")


def test_shared():
    assert shared([1, 2, 3], [1, 2, 4]) == 2 and shared([], [1]) == 0 and shared([1], [1, 2]) == 1
