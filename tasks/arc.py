"""Questions of science lessons with three to five choices.

ARC, the AI2 Reasoning Challenge (Clark et al. 2018, arXiv 1803.05457): an easy set, and the
questions that neither word overlap nor retrieval answered.
"""
from nanochat.common import UserError
from tasks.common import HubTask, choice_conversation, chosen_letter

ROWS = {
    "ARC-Easy": {"train": 2251, "validation": 570, "test": 2376},
    "ARC-Challenge": {"train": 1119, "validation": 299, "test": 1172},
}


class ARC(HubTask):
    """The questions of "ARC-Easy" or "ARC-Challenge", split "train", "validation" or "test"."""

    name = "allenai/ai2_arc"
    columns = {
        "question": str,
        "choices": {"text": [str], "label": [str]},
        "answerKey": str,
    }

    def __init__(self, subset, split, **options):
        if subset not in ROWS:
            raise UserError(f"subset is {' or '.join(ROWS)}, not {subset!r}")
        self.config = subset
        self.documented = ROWS[subset]
        super().__init__(split, **options)

    def get_example(self, i):
        """Question i. Its labels are A, B, ... or in some rows 1, 2, ...: shown are letters."""
        row = self.rows[i]
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        if len(texts) != len(labels):
            words = f"{len(texts)} choices have {len(labels)} labels"
            raise self.rows.error(i, "choices", words)
        if row["answerKey"] not in labels:
            words = f"{row['answerKey']!r} is none of the labels {labels}"
            raise self.rows.error(i, "answerKey", words)
        return choice_conversation(row["question"], texts, labels.index(row["answerKey"]))

    def evaluate(self, conversation, parts):
        """Right when the answer is the letter of the right choice."""
        return chosen_letter(conversation, parts)

    @property
    def chance(self):
        """Of guessing among the choices, over all questions."""
        counts = [len(self[i]["letters"]) for i in range(len(self))]
        return sum(1 / count for count in counts) / len(counts)
