"""Word problems of grade school mathematics, solved step by step with the Python tool.

    Weng earns $12 an hour ...   ->  Weng earns 12/60 = $<python>12/60</python>
                                     <output>0.2</output>0.2 per minute. ... #### 10

GSM8K (Cobbe et al. 2021, arXiv 2110.14168). Its solutions hold calculator calls, <<12/60=0.2>>,
which become calls of the tool, and end with "#### " and the result.
"""
import re

from nanochat.execution import use_tool
from tasks.common import NUMBER, HubTask, answer_text, canonical_number, conversation

ANSWER_TOKENS = 512     # that chat_eval leaves for a solution
CALL = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
RESULT = re.compile(rf"####\s*\$?\s*({NUMBER.pattern})")


class GSM8K(HubTask):
    """The problems of the split "train" or "test"."""

    name = "openai/gsm8k"
    config = "main"
    columns = {"question": str, "answer": str}
    documented = {"train": 7473, "test": 1319}

    def get_example(self, i):
        row = self.rows[i]
        if result_of(row["answer"]) is None:
            raise self.rows.error(i, "answer", 'no "#### " with a number ends the solution')
        parts = solution_parts(row["answer"])
        return conversation(row["question"], parts, answer_tokens=ANSWER_TOKENS)

    def evaluate(self, conversation, parts):
        """Right when the number behind the last #### is the result."""
        wanted = result_of(answer_text(conversation["messages"][-1]["content"]))
        return result_of(answer_text(parts)) == wanted


def solution_parts(text):
    """A solution as parts of a message, its calculator calls as calls of the tool.

    The reply is what the tool gives, such as 9 for 9.00: so the model reads in training what it
    reads when it answers. It is the number that the solution says, in all 27,998 calls of GSM8K
    (one of which says 3/4 for 0.75). Where the tool refuses a call, the solution's own reply stays.

    >>> [part["text"] for part in solution_parts("3*4=<<3*4=12>>12")]
    ['3*4=', '3*4', '12', '12']
    """
    parts = []
    pieces = CALL.split(text)   # text, expression, result, text, expression, ..., text
    for i, piece in enumerate(pieces):
        kind = ("text", "python", "python_output")[i % 3]
        if kind == "python_output":
            piece = use_tool(pieces[i - 1]) or piece
        if piece:
            parts.append({"type": kind, "text": piece})
    return parts


def result_of(text):
    """The number behind the last "####" of a text in its canonical form, or None."""
    found = RESULT.findall(text.replace("\N{MINUS SIGN}", "-"))
    return canonical_number(found[-1]) if found else None
