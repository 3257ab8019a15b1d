"""
Chat messages: what is well formed, what fits the context, and how a tool call looks as text.

A conversation is {"messages": [{"role": "user", "content": "2+2?"}, ...]}. Content is a string or
a list of parts {"type": "text" | "python" | "python_output", "text": str}. The tokenizer turns
conversations into ids and back.
"""
import bisect
import re

from nanochat.common import UserError

# What an assistant's message may consist of: text, an expression for the Python tool, its reply.
PART_TYPES = ("text", "python", "python_output")

# How control tokens are shown to a person: a tool call reads `12*7` → 84. The others are not shown.
SHOWN = {
    "<|python_start|>": "`",
    "<|python_end|>": "`",
    "<|output_start|>": " → ",
    "<|output_end|>": "\n",
}
SHOWN_CALL = re.compile(r"`([^`]+)` → ([^\n]*)\n")


# -------------------------------------------------------------------------------------------------
# what is well formed

def as_parts(content):
    """Content of a message as a list of parts: "hi" -> [{"type": "text", "text": "hi"}]."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def check_conversation(conversation):
    """The messages of a well-formed conversation. UserError says what is wrong with another.

    One system message may come first. Then user and assistant take turns, the user beginning.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('a conversation is {"messages": [...]} with at least one message')

    expected = ("system", "user")
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in expected:
            due = " or ".join(expected)
            raise UserError(f"message {number} has the role {role!r} where {due} is due")
        check_content(message.get("content"), role, number)
        expected = ("assistant",) if role == "user" else ("user",)
    return messages


def check_content(content, role, number):
    """UserError unless content is a string or a list of parts that this role may send.

    number: the message's place in the conversation, from 1, for the error message.
    """
    parts = as_parts(content)
    if not isinstance(parts, list):
        raise UserError(f"message {number} needs a content: a string or a list of parts")

    allowed = PART_TYPES if role == "assistant" else ("text",)
    for part in parts:
        if not is_part(part, allowed):
            shape = f'{{"type": {"|".join(allowed)}, "text": str}}'
            raise UserError(f"a part of message {number} ({role}) is not {shape}")
    if role == "user" and not any(part["text"] for part in parts):
        raise UserError(f"message {number} (user) is empty: write something")


def is_part(part, types):
    """Whether part is a dict with one of the types and a text."""
    if not isinstance(part, dict):
        return False
    return part.get("type") in types and isinstance(part.get("text"), str)


# -------------------------------------------------------------------------------------------------
# answers that come back as history

def restore_tool_calls(message):
    """The message with its tool calls as parts again, the inverse of SHOWN.

    "So: `12*7` → 84\\nIt is 84." becomes the parts text "So: ", python "12*7", python_output "84"
    and text "It is 84.". A message without a call, or not the assistant's, is returned as it is.
    """
    if message["role"] != "assistant" or not isinstance(message["content"], str):
        return message
    pieces = SHOWN_CALL.split(message["content"])  # text, call, reply, text, call, reply, ..., text
    if len(pieces) == 1:
        return message
    parts = []
    for i, piece in enumerate(pieces):
        if piece:
            parts.append({"type": PART_TYPES[i % 3], "text": piece})
    return {**message, "content": parts}


def fit_conversation(tokenizer, messages, max_tokens):
    """The newest messages whose rendering fits max_tokens.

    The oldest exchanges are dropped first, a system message stays. The last message is kept even
    where it does not fit alone: the caller reports that.
    """
    messages = [restore_tool_calls(message) for message in messages]
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = [message for message in messages if message["role"] != "system"]

    def fits(dropped):
        kept = {"messages": system + turns[dropped:]}
        return len(tokenizer.render_for_completion(kept)) <= max_tokens

    # Binary search: one rendering per dropped exchange takes minutes for a long conversation.
    choices = range(0, max(1, len(turns)), 2)
    place = bisect.bisect_left(choices, True, key=fits)
    dropped = choices[min(place, len(choices) - 1)]
    return system + turns[dropped:]
