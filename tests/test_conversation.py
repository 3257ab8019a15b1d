"""Chat messages: an answer that comes back as history is parts again, old turns make room, and what
people write is made well formed."""
import json
import time
from collections import Counter

import pytest

from nanochat.common import UserError
from nanochat.conversation import (
    check_conversation,
    fit_conversation,
    normalise_messages,
    questions_of,
    restore_tool_calls,
)
from nanochat.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the cat sat on the mat, 12*7 is 84, and the dog ran. " * 20]
    return Tokenizer.train_from_iterator(texts, 290)


def test_an_answer_that_comes_back_as_history_is_parts_again():
    message = {"role": "assistant", "content": "So: `12*7` → 84\nIt is 84."}
    parts = restore_tool_calls(message)["content"]
    assert [(p["type"], p["text"]) for p in parts] == [
        ("text", "So: "),
        ("python", "12*7"),
        ("python_output", "84"),
        ("text", "It is 84."),
    ]
    user = {"role": "user", "content": "`1` → 2\n"}
    assert restore_tool_calls(user) is user


def test_a_conversation_that_outgrows_the_context_loses_its_oldest_turns(tokenizer):
    turns = [
        {"role": role, "content": f"{role} {i} the cat sat"}
        for i in range(6) for role in ("user", "assistant")
    ]
    system = {"role": "system", "content": "be kind"}
    messages = [system, *turns, {"role": "user", "content": "the dog"}]
    fitted = fit_conversation(tokenizer, messages, 60)
    assert fitted[0]["role"] == "system" and fitted[1]["role"] == "user"
    assert fitted[-1] == messages[-1]
    assert 2 < len(fitted) < len(messages)
    assert len(tokenizer.render_for_completion({"messages": fitted})) <= 60


def test_a_long_conversation_is_shortened_in_few_attempts(tokenizer, monkeypatch):
    messages = [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(4001)]
    asked, render = [], tokenizer.render_for_completion
    monkeypatch.setattr(tokenizer, "render_for_completion", lambda c: asked.append(1) or render(c))
    kept = fit_conversation(tokenizer, messages, 128)
    assert len(asked) < 15 and kept == messages[-len(kept):] and kept[0]["role"] == "user"
    one_turn_more = messages[-len(kept) - 2:]
    assert len(render({"messages": kept})) <= 128 < len(render({"messages": one_turn_more}))


@pytest.mark.parametrize("piece", [
    "`a` → ", "`", "`a` → `\n", "`a", "` → \n(source: a", "\n(source: )", "`" + "a" * 199,
])
def test_a_megabyte_of_history_is_read_at_once(piece):
    """docs/traps.md: quadratic-patterns. Ten seconds stand for the hours that it would take."""
    text = piece * (1_000_000 // len(piece))
    start = time.monotonic()
    restored = restore_tool_calls({"role": "assistant", "content": text})
    assert time.monotonic() - start < 10
    assert restored["content"] == text or len(restored["content"]) > 1


def test_an_answer_may_be_continued_where_the_last_message_is_the_assistants(tokenizer):
    messages = [message("user", "12*7?"), message("assistant", "It is 8")]
    ids = tokenizer.render_for_completion({"messages": messages}, continue_final_message=True)
    asked = tokenizer.render_for_completion({"messages": messages})
    assert ids == asked + tokenizer.encode("It is 8")
    only = {"messages": messages[:1]}
    assert tokenizer.render_for_completion(only, continue_final_message=True) == asked

    turns = [message("user", "the cat"), message("assistant", "sat")] * 3 + messages
    fitted = fit_conversation(tokenizer, turns, len(ids) + 1, continue_final_message=True)
    assert fitted == messages


# ------------------------------------------------------------------------------------------------
# messages as people write them

def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def call(name, id="call_1", **arguments):
    """A tool call in OpenAI's shape."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": id, "type": "function", "function": function}


HI, HELLO = message("user", "Hi"), message("assistant", "Hello")


@pytest.mark.parametrize("messages, normal", [
    ([HI, HELLO], [HI, HELLO]),
    ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], [HI, HELLO]),
    ([message("User", "Hi", name="Ada", weight=1), message("MODEL", "Hello")], [HI, HELLO]),
    ([message("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}])], [HI]),
    ([message("user", [{"type": "input_text", "text": "Hi"}]),
      message("ai", [{"type": "output_text", "text": "Hello"}])], [HI, HELLO]),
    ([{"role": "user", "parts": [{"text": "Hi"}]},
      {"role": "model", "parts": [{"text": "Hel"}, {"text": "lo"}]}], [HI, HELLO]),
    # greeting first
    ([message("assistant", "Welcome!"), HI, HELLO], [HI, HELLO]),
    ([message("system", "s"), message("assistant", "Welcome!"), HI], [message("system", "s"), HI]),
    # consecutive messages of one role
    ([HI, message("user", "there"), HELLO], [message("user", "Hi\n\nthere"), HELLO]),
    ([HI, HELLO, message("assistant", "you")], [HI, message("assistant", "Hello\n\nyou")]),
    # system messages in other places
    ([message("developer", "a"), HI, message("system", "b")], [message("system", "a\n\nb"), HI]),
    ([HI, message("system", "b"), HELLO], [message("system", "b"), HI, HELLO]),
    # no content
    ([HI, message("assistant", None), HI], [message("user", "Hi\n\nHi")]),
    ([HI, {"role": "assistant"}], [HI]),
    ([message("system", ""), HI], [HI]),
    ([message("system", None)], []),
    # a call of nothing, and calls where none can be
    ([HI, message("function_call", "[]"), HELLO], [HI, HELLO]),
    ([message("user", "Hi", tool_calls=[{"name": "f"}]), HELLO], [HI, HELLO]),
    ([message("tool", "42"), HI, HELLO], [HI, HELLO]),
])
def test_messages_are_made_well_formed(messages, normal):
    before = json.dumps(messages)
    assert normalise_messages(messages) == normal
    assert json.dumps(messages) == before, "what was given is not changed"
    if normal:
        assert check_conversation({"messages": normal}) == normal


EMPTY = message("user", [])


@pytest.mark.parametrize("messages, normal", [
    ([message("assistant", "Welcome!"), HI], [EMPTY, message("assistant", "Welcome!"), HI]),
    ([message("system", "s"), message("assistant", "Welcome!")],
     [message("system", "s"), EMPTY, message("assistant", "Welcome!")]),
    ([message("user", "")], [EMPTY]),
    ([message("user", [])], [EMPTY]),
    ([message("user", None)], [EMPTY]),
    ([HI, HELLO, message("user", " ")], [HI, HELLO, EMPTY]),
    ([message("user", ""), HI, message("user", []), HELLO], [HI, HELLO]),
    ([HI, message("user", "there"), HELLO], [message("user", "Hi\n\nthere"), HELLO]),
])
def test_a_server_takes_empty_turns_and_keeps_greetings(tokenizer, messages, normal):
    found = normalise_messages(messages, may_be_empty=True)
    assert found == normal
    ids = tokenizer.render_for_completion({"messages": found}, continue_final_message=True)
    start, end = (tokenizer.encode_special(f"<|user_{name}|>") for name in ("start", "end"))
    assert ids.count(start) == ids.count(end) == sum(one["role"] == "user" for one in found)
    asked = [one["content"] for one in found if one["role"] == "user" and one != EMPTY]
    assert questions_of(found) == asked


def test_tool_calls_and_replies_become_those_of_the_python_tool(tokenizer):
    changes = Counter()
    calls = [call("weather", city="Ulm"), call("f", x=1, y=2)]
    asked = message("assistant", None, tool_calls=calls)
    messages = normalise_messages(
        [HI, asked, message("tool", "rain", tool_call_id="call_1"), message("tool", "3"), HELLO],
        changes,
    )
    assert messages[0] == HI and len(messages) == 2
    assert [(part["type"], part["text"]) for part in messages[1]["content"]] == [
        ("python", "weather(city='Ulm')"),
        ("python_output", "rain"),
        ("python", "f(x=1, y=2)"),
        ("python_output", "3"),
        ("text", "Hello"),
    ]
    assert +changes == {"tool calls written as Python calls": 2}
    ids, mask = tokenizer.render_conversation({"messages": messages})
    assert tokenizer.encode_special("<|python_start|>") in ids and 0 < sum(mask) < len(mask)


@pytest.mark.parametrize("ids, replies", [
    ("ab", [("b", "of b"), ("a", "of a")]),
    ("ab", [("a", "of a"), ("b", "of b")]),
    ("ab", [(None, "of a"), (None, "of b")]),
    ("ab", [("x", "of a"), ("y", "of b")]),             # ids of another program
    ("abc", [("c", "of c"), ("b", "of b"), ("a", "of a")]),
    ("aa", [("a", "of a"), ("a", "of b")]),             # ids that are not unique
])
def test_a_reply_stands_behind_the_call_that_it_answers_in_whatever_order(ids, replies):
    # docs/traps.md: replies-out-of-order
    asked = message("assistant", None, tool_calls=[call(f"f{i}", id) for i, id in enumerate(ids)])
    answered = [message("tool", text, tool_call_id=id) for id, text in replies]
    parts = normalise_messages([HI, asked, *answered, HELLO])[1]["content"]
    assert all(part.keys() == {"type", "text"} for part in parts)
    calls = [(call["text"], reply["text"]) for call, reply in zip(parts[:-1:2], parts[1::2])]
    assert calls == [(f"f{i}()", f"of {'abc'[i]}") for i in range(len(ids))]


def test_a_reply_that_is_data_is_written_as_json():
    asked = message("assistant", None, tool_calls=[call("weather")])
    replies = [{"rain": "é"}, [{"day": 1}], 7]
    for reply, text in zip(replies, ('{"rain": "é"}', '[{"day": 1}]', "7")):
        parts = normalise_messages([HI, asked, message("tool", reply), HELLO])[1]["content"]
        assert parts[1] == {"type": "python_output", "text": text}


@pytest.mark.parametrize("turn", [
    {"from": "function_call", "value": '{"name": "python", "arguments": {"code": "6*7"}}'},
    {"from": "function_call", "value": "6*7"},
    {"from": "tool_call", "value": '[{"name": "python", "parameters": {"expression": "6*7"}}]'},
    message("assistant", None, tool_calls=json.dumps([call("python", code="6*7")])),
    message("assistant", None, function_call={"name": "calculator", "arguments": '"6*7"'}),
    message("assistant", "", tool_calls=[call("code_interpreter", input="6*7")]),
    message("assistant", [{"type": "python", "text": "6*7"}]),
])
def test_a_call_of_a_python_tool_is_its_expression(turn):
    reply = {"from": "observation", "value": "42"}
    parts = normalise_messages([HI, turn, reply, HELLO])[1]["content"]
    assert [part["text"] for part in parts] == ["6*7", "42", "Hello"]


@pytest.mark.parametrize("messages, words", [
    (None, "at least one message"),
    ([], "at least one message"),
    ("Hi", "at least one message"),
    (["Hi"], "message 1 is not"),
    ([HI, {"content": "x"}], "message 2 has the role None"),
    ([message([], "x")], r"message 1 has the role \[\]"),
    ([message("narrator", "x")], "'narrator': the known ones are system, developer, user"),
    ([HI, HELLO, message("user", None)], r"message 3 \(user\) has no content"),
    ([message("user", 7)], r"message 1 \(user\): its content must be text"),
    ([message("user", [{"type": "python", "text": "1"}])], "must be text or a list"),
    ([message("user", [{"type": "text", "text": None}])], "must be text or a list"),
    ([message("user", ["x"])], "must be text or a list"),
    ([message("user", {"text": "x"})], r"message 1 \(user\): its content must be text"),
    ([HI, message("assistant", "a\udc80")], r"message 2 has a lone surrogate \(U\+DC80\)"),
])
def test_messages_that_cannot_be_made_well_formed_are_named(messages, words):
    with pytest.raises(UserError, match=words):
        normalise_messages(messages)
