"""SmolTalk: conversations about everything, as a larger model held them, of one to many turns.

    How do I sort a list of pairs?  ->  Use sorted() with a key: ...

The set for small models (HuggingFaceTB/smol-smoltalk, of arXiv 2502.02737), 460 thousand
conversations of mostly one to three turns, some with a system message.
"""
from nanochat.common import UserError
from nanochat.conversation import normalise_messages
from tasks.common import HubTask

TRIED = 100     # rows that may follow each other without being a conversation


class SmolTalk(HubTask):
    """The conversations of the split "train" or "test". There is no right answer to judge."""

    name = "HuggingFaceTB/smol-smoltalk"
    config = "default"
    columns = ("messages",)
    documented = {"train": 460_000, "test": 24_000}
    tolerance = 0.02    # of these rounded numbers

    def get_example(self, i):
        """Conversation i, or where that row is none, the next row that is one."""
        for place in range(i, i + TRIED):
            messages = _messages_of(self.rows[place % len(self.rows)])
            if messages:
                return {"messages": messages}
        raise UserError(f"{self.name} has no conversation in rows {i} to {i + TRIED - 1}: "
                        "it is not the data set that it was")


def _messages_of(row):
    """The messages of a row up to the assistant's last one; [] where they are no conversation."""
    try:
        messages = normalise_messages(row["messages"])
    except UserError:
        return []
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages
