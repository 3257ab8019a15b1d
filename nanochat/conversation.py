"""
Chat messages: what is well formed, what is made well formed, what fits the context, and how a tool
call looks as text.

A conversation is {"messages": [{"role": "user", "content": "2+2?"}, ...]}. Content is a string or
a list of parts {"type": "text" | "python" | "python_output", "text": str}. The tokenizer turns
conversations into ids and back.

People, clients and data sets write messages in many ways. normalise_messages() is the one place
that turns these into the form above: for the user's own conversations, the server and chat_cli.
"""
import bisect
import json
import re
from collections import Counter, defaultdict, deque

from nanochat.common import UserError

# What an assistant's message may consist of: text, an expression for the Python tool, its reply.
PART_TYPES = ("text", "python", "python_output")

# Keys of the records in which other programs write conversations, in the order in which they are
# looked for
MESSAGES = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query", "input", "user", "human", "q")
ANSWERS = ("output", "completion", "response", "answer", "reply", "assistant", "bot", "a")

# How control tokens are shown to a person: a tool call reads `12*7` → 84. The others are not shown.
SHOWN = {
    "<|python_start|>": "`",
    "<|python_end|>": "`",
    "<|output_start|>": " → ",
    "<|output_end|>": "\n",
}
# The bounds keep the search linear: anybody may send a megabyte of backticks. The tool reads 200
# characters at most, and writes fewer than 80 (execution.py).
SHOWN_CALL = re.compile(r"`([^`]{1,200})` → ([^\n]{0,80})\n")

# The call that looks the last question up in the user's own text. It has no argument: a small model
# cannot copy a long question. It is not shown; its reply is, and ends with the source of a quote.
LOOKUP_CALL = "lookup()"
NOTHING_FOUND = "I found nothing about that in your text."
NO_ROOM = "No room here to quote "      # and where it stands
SHOWN_LOOKUP = re.compile(
    rf"(.+\n\(source: [^\n]+\)|{re.escape(NOTHING_FOUND)}|{NO_ROOM}[^\n]+)\n?", re.DOTALL
)


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

    A user's text must not be empty, for that is an oversight as a rule; a turn that is meant to be
    empty is a list without parts.

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
    if role == "user" and parts and not any(part["text"] for part in parts):
        raise UserError(f"message {number} (user) is empty: write something")


def is_part(part, types):
    """Whether part is a dict with one of the types and a text."""
    if not isinstance(part, dict):
        return False
    return part.get("type") in types and isinstance(part.get("text"), str)


# -------------------------------------------------------------------------------------------------
# what is made well formed

# How other programs name the fields of a message, and the roles
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text", "parts")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_call": "call",
    "tool_call": "call",
}
# What other programs call a part that is text
TEXT_TYPES = ("text", "input_text", "output_text")
# The parts of a user's message that says nothing
EMPTY_TURN = [{"type": "text", "text": ""}]
# Tools whose one argument is Python already
PYTHON_TOOLS = ("python", "calculator", "code_interpreter")


def normalise_messages(messages, changes=None, may_be_empty=False):
    """The messages of a conversation as well-formed ones, a new list.

    messages: a list of {"role", "content"} or ShareGPT's {"from", "value"}, roles as in ROLES.
    changes: a Counter that learns what was changed, or None.
    may_be_empty: whether a user's message may be empty, as in OpenAI's API. A greeting, with which
    the assistant begins, then stands behind an empty one; else it is left out.

    In phases. Every message is read as parts: content may be null, text, or a list of parts, and a
    tool's call and its reply become those of the Python tool. Messages without content are left
    out. System messages are joined to one that comes first, and so are messages of one role that
    follow each other.

    The result may be empty, and its last message may be anybody's: the caller knows what is due.
    UserError for an unknown role, an unknown form of content, and a user's message that must not be
    empty.

    >>> normalise_messages([{"from": "human", "value": "Hi"}, {"from": "human", "value": "there"}])
    [{'role': 'user', 'content': 'Hi\\n\\nthere'}]
    """
    changes = Counter() if changes is None else changes
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list with at least one message")
    read = []
    for number, message in enumerate(messages, start=1):
        role, parts = _read_message(message, number, changes)
        if role == "user" and not parts and may_be_empty:
            parts = EMPTY_TURN
        elif role == "user" and not parts:
            raise UserError(
                f"message {number} (user) has no content: write a text that is not empty")
        if parts:
            read.append((role, parts))
        else:
            changes["empty messages left out"] += 1

    system = [(role, parts) for role, parts in read if role == "system"]
    later = [role for role, _ in read[1:]].count("system")
    changes["later system messages moved to the beginning"] += later
    turns = _join_neighbours([turn for turn in read if turn[0] != "system"], changes)
    if turns and turns[0][0] == "assistant":
        turns = [("user", EMPTY_TURN), *turns] if may_be_empty else turns[1:]
        changes["greetings left out"] += not may_be_empty
    joined = _join_neighbours(system, Counter()) + turns
    return [{"role": role, "content": _as_content(parts)} for role, parts in joined]


def is_message(value):
    """Whether a value looks like a message: a dict that says whose it is."""
    return isinstance(value, dict) and any(key in value for key in ROLE_KEYS)


def is_like_a_conversation(record, depth=3):
    """Whether a record of a data file looks like one of the forms in docs/conversations.md.

    >>> is_like_a_conversation({"Prompt": "Hello", "completion": "Hello, Ada."})
    True
    """
    if isinstance(record, list):
        return any(is_message(item) or is_like_a_conversation(item, depth) for item in record[:1])
    if not isinstance(record, dict) or depth == 0:
        return False
    keys = {str(key).strip().lower() for key in record}
    is_pair = not keys.isdisjoint(QUESTIONS) and not keys.isdisjoint(ANSWERS)
    has_messages = any(is_like_a_conversation(value, depth - 1) for value in record.values())
    return is_pair or has_messages or not keys.isdisjoint(MESSAGES)


def _first(message, keys):
    """The first value that a message has under one of the keys, or None."""
    values = [message[key] for key in keys if message.get(key) is not None]
    return values[0] if values else None


def _read_message(message, number, changes):
    """(role, parts) of a message, the parts without empty ones. A tool's role stays "tool"."""
    if not isinstance(message, dict):
        raise UserError(f'message {number} is not {{"role": ..., "content": ...}}')
    name = _first(message, ROLE_KEYS)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(
            f"message {number} has the role {name!r}: the known ones are {', '.join(ROLES)}"
        )

    content = _first(message, CONTENT_KEYS)
    if role == "tool":
        parts = [_read_reply(message, content, number)]
    else:
        parts = _read_content(content, role, number)
    calls = _read_calls(message, role, parts)
    changes["tool calls written as Python calls"] += len(calls)
    if role == "call":
        role, parts = "assistant", []
    parts = parts + calls

    for part in parts:
        _check_text(part["text"], number)
    parts = [part for part in parts if part["text"]]
    if not any(part["text"].strip() for part in parts):
        parts = []
    return role, parts


def _read_reply(message, content, number):
    """A tool's reply as a part, with the "id" of the call that it answers where it names one.

    Data that is no text, a dict as most tools return it, is written as JSON.
    """
    try:
        text = "".join(part["text"] for part in _read_content(content, "tool", number))
    except UserError:
        text = json.dumps(content, ensure_ascii=False)
    return {"type": "python_output", "text": text, "id": message.get("tool_call_id")}


def _read_part(part):
    """A part of another program as one of ours: Gemini's has no type, OpenAI's newer another."""
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        return part
    kind = part.get("type", "text")
    return {"type": "text" if kind in TEXT_TYPES else kind, "text": part["text"]}


def _read_content(content, role, number):
    """Content as parts: None is [], text is one part, and texts in a list are one part."""
    if content is None:
        return []
    if isinstance(content, str):
        return as_parts(content)
    content = list(map(_read_part, content)) if isinstance(content, list) else content
    allowed = PART_TYPES if role == "assistant" else ("text",)
    well_formed = isinstance(content, list) and all(is_part(part, allowed) for part in content)
    if not well_formed:
        raise UserError(f"message {number} ({role}): its content must be text or a list of "
                        f'{{"type": {"|".join(allowed)}, "text": str}}')
    if any(part["type"] != "text" for part in content):
        return content
    return as_parts("".join(part["text"] for part in content))


def _check_text(text, number):
    """UserError for a lone surrogate, which UTF-8 lacks, so that no tokenizer can read it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"message {number} has a lone surrogate ({character}) at character {error.start}: "
            "remove it"
        ) from None


def _read_calls(message, role, parts):
    """The tool calls of a message as parts: of OpenAI's fields, or ShareGPT's message of a call."""
    calls = []
    if role == "assistant":
        calls = message.get("tool_calls") or message.get("function_call") or []
    elif role == "call":
        calls = "".join(part["text"] for part in parts)
    if isinstance(calls, str):
        calls = _from_json(calls)
    if not isinstance(calls, list):
        calls = [calls]
    return [{"type": "python", "text": call_text(call), "id": _id_of(call)} for call in calls]


def _id_of(call):
    """The name by which a tool's reply refers to a call, or None."""
    return call.get("id") if isinstance(call, dict) else None


def _from_json(text):
    """What a text says as JSON; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def call_text(call):
    """A tool call as a Python expression.

    >>> call_text({"function": {"name": "weather", "arguments": "{\\"city\\": \\"Ulm\\"}"}})
    "weather(city='Ulm')"
    >>> call_text({"name": "python", "arguments": {"code": "12*7"}})
    '12*7'
    """
    call = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(call, dict):
        return str(call)
    name = call.get("name")
    arguments = call.get("arguments") or call.get("parameters") or {}
    if isinstance(arguments, str):
        arguments = _from_json(arguments)   # OpenAI's are JSON inside of JSON
    values = list(arguments.values()) if isinstance(arguments, dict) else [arguments]
    if name in PYTHON_TOOLS and len(values) == 1:
        return str(values[0])
    if isinstance(arguments, dict):
        values = [f"{key}={value!r}" for key, value in arguments.items()]
    return f"{name}({', '.join(map(str, values))})"


def _join_neighbours(turns, changes):
    """(role, parts) pairs with neighbours of one role as one; a tool's reply is the assistant's."""
    joined = []
    for role, parts in turns:
        owner = "assistant" if role == "tool" else role
        if not joined or joined[-1].owner != owner:
            joined.append(_JoinedTurn(owner))
            joined[-1].add(parts)
        elif role == "tool":
            joined[-1].answer(parts[0])
        else:
            both_text = joined[-1].last_type == parts[0]["type"] == "text"
            changes["messages joined to one of the same role"] += both_text
            joined[-1].add(parts)
    return [(turn.owner, turn.parts()) for turn in joined]


class _JoinedTurn:
    """Messages of one role that follow each other, as one.

    A message of a client may be one of many thousands: adding it takes the time of its own parts,
    however many are there already.

    cells    lists of parts that stay together: texts that become one, or a call and its reply
    """

    def __init__(self, owner):
        self.owner, self.cells = owner, []
        self._calls = deque()       # cells of calls; of the answered ones some, until they are met
        self._calls_by_id = defaultdict(deque)

    @property
    def last_type(self):
        """The type of the last part."""
        return self.cells[-1][-1]["type"]

    def add(self, parts):
        """Add the parts of a message. Its first text continues the text before it."""
        if self.cells and self.last_type == parts[0]["type"] == "text":
            self.cells[-1].append(parts[0])
            parts = parts[1:]
        for part in parts:
            self._add_part(part)

    def _add_part(self, part):
        is_reply = part["type"] == "python_output"
        if is_reply and self.cells and _is_waiting(self.cells[-1]):
            self.cells[-1].append(part)
            return
        cell = [part]
        self.cells.append(cell)
        if part["type"] == "python":
            self._calls.append(cell)
            self._calls_by_id[repr(part.get("id"))].append(cell)

    def answer(self, reply):
        """Put a tool's reply behind the call that it answers.

        That is the one whose id the reply names, since replies may come in any order; else the
        first call that has none; where every call has one, the end.
        """
        named = []
        if reply["id"] is not None:
            named = self._calls_by_id.get(repr(reply["id"]), [])
        cell = _first_waiting(named) or _first_waiting(self._calls)
        if cell is None:
            self.cells.append([reply])
        else:
            cell.append(reply)

    def parts(self):
        """All parts, with a blank line between text and text."""
        found = []
        for cell in self.cells:
            if cell[0]["type"] == "text":
                text = "\n\n".join(part["text"] for part in cell if part["text"])
                found.append({"type": "text", "text": text})
            else:
                found += cell
        return found


def _is_waiting(cell):
    """Whether a cell is a call without a reply."""
    return len(cell) == 1 and cell[0]["type"] == "python"


def _first_waiting(cells):
    """The first of a deque's cells that has no reply, or None. Those before it are taken out."""
    while cells and not _is_waiting(cells[0]):
        cells.popleft()
    return cells[0] if cells else None


def _as_content(parts):
    """Parts as content, without ids: the string alone where there is nothing but one text, a list
    without parts where that is empty."""
    if parts == EMPTY_TURN:
        return []
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"]
    return [{"type": part["type"], "text": part["text"]} for part in parts]


# -------------------------------------------------------------------------------------------------
# answers that come back as history

def restore_tool_calls(message):
    """The message with its tool calls as parts again, the inverse of SHOWN.

    "So: `12*7` → 84\\nIt is 84." becomes the parts text "So: ", python "12*7", python_output "84"
    and text "It is 84.". A quote with its source becomes the look-up that it was. A message without
    a call, or not the assistant's, is returned as it is.
    """
    if message["role"] != "assistant" or not isinstance(message["content"], str):
        return message
    lookup = SHOWN_LOOKUP.fullmatch(message["content"])
    if lookup:
        parts = [
            {"type": "python", "text": LOOKUP_CALL},
            {"type": "python_output", "text": lookup[1]},
        ]
        return {**message, "content": parts}
    pieces = SHOWN_CALL.split(message["content"])  # text, call, reply, text, call, reply, ..., text
    if len(pieces) == 1:
        return message
    parts = []
    for i, piece in enumerate(pieces):
        if piece:
            parts.append({"type": PART_TYPES[i % 3], "text": piece})
    return {**message, "content": parts}


def questions_of(messages):
    """The texts of the user's messages, a list of str. messages: of normalise_messages()."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return [content for content in asked if isinstance(content, str)]


def prompt_room(context, max_new_tokens):
    """How many tokens of a context a prompt may take, so that half of it at most is kept free for
    an answer of max_new_tokens.

    >>> prompt_room(256, 96), prompt_room(256, 1000)
    (160, 128)
    """
    return context - min(max_new_tokens, context // 2)


def fit_conversation(tokenizer, messages, max_tokens, continue_final_message=False):
    """The newest messages whose rendering fits max_tokens.

    The oldest exchanges are dropped first, a system message stays. The last message is kept even
    where it does not fit alone: the caller reports that.
    continue_final_message: as of Tokenizer.render_for_completion.
    """
    options = {"continue_final_message": True} if continue_final_message else {}
    messages = [restore_tool_calls(message) for message in messages]
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = [message for message in messages if message["role"] != "system"]

    def fits(dropped):
        kept = {"messages": system + turns[dropped:]}
        return len(tokenizer.render_for_completion(kept, **options)) <= max_tokens

    # Binary search: one rendering per dropped exchange takes minutes for a long conversation.
    choices = range(0, max(1, len(turns)), 2)
    place = bisect.bisect_left(choices, True, key=fits)
    dropped = choices[min(place, len(choices) - 1)]
    return system + turns[dropped:]
