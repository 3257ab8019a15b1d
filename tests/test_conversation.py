"""Chat messages: an answer that comes back as history is parts again, and old turns make room."""
import pytest

from nanochat.conversation import fit_conversation, restore_tool_calls
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
