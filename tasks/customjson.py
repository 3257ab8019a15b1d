"""The user's own conversations: a .jsonl file, one conversation a line.

    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello, Ada."}]

or the same list under the key "messages". Roles alternate user, assistant; a system message may come first.
"""
import json
from pathlib import Path

from nanochat.common import UserError
from tasks.common import Task


def _check(messages):
    """None, or what is wrong with a list of messages."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        return 'a conversation is a list of {"role": ..., "content": ...}'
    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        return "roles must alternate user, assistant and end with assistant"
    if not all(isinstance(message["content"], str) and message["content"].strip() for message in messages):
        return "every content is a text that is not empty"
    return None


class CustomJSON(Task):
    """The conversations of the file at `path`. UserError, with the line's number, where one is not as it should be."""

    def __init__(self, path, **slice_):
        super().__init__(**slice_)
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        except OSError as error:
            raise UserError(f"cannot read conversations from {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error
        self.conversations = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): it also breaks at U+2028 inside a string
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
            messages = row.get("messages") if isinstance(row, dict) else row
            if wrong := _check(messages):
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
