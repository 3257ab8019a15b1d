"""The user's own conversations: a .jsonl file, one conversation per line.

    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello, Ada."}]

or the same list under the key "messages". Roles alternate user, assistant; a system message may
come first.
"""
import json
from pathlib import Path

from nanochat.common import UserError
from tasks.common import Task


def _is_message(message):
    return isinstance(message, dict) and {"role", "content"} <= message.keys()


def _is_text(content):
    return isinstance(content, str) and content.strip() != ""


def _what_is_wrong(messages):
    """None, or what is wrong with a list of messages, a str."""
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        return 'a conversation is a list of {"role": ..., "content": ...}'

    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    alternating = ["user", "assistant"] * (len(roles) // 2)
    if not roles or roles != alternating:
        return "roles must alternate user, assistant and end with assistant"

    if not all(_is_text(message["content"]) for message in messages):
        return "every content is a text that is not empty"
    return None


def _read_text(path):
    """The text of a file; UserError where there is none."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read conversations from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error


class CustomJSON(Task):
    """The conversations of the file at `path`.

    UserError, with the line's number, where one is not as it should be.
    """

    def __init__(self, path, **slice_):
        super().__init__(**slice_)
        self.conversations = []
        # not splitlines(): it also breaks at U+2028 inside a string
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
            messages = row.get("messages") if isinstance(row, dict) else row
            wrong = _what_is_wrong(messages)
            if wrong:
                raise UserError(f"{path}, line {number}: {wrong}")
            self.conversations.append({"messages": messages})
        if not self.conversations:
            raise UserError(f"{path} holds no conversations")

    def num_examples(self):
        return len(self.conversations)

    def get_example(self, i):
        return self.conversations[i]

    def evaluate(self, conversation, parts):
        raise UserError("one's own conversations have no right answers to evaluate against")
