"""Questions with four choices from 57 subjects, of school, university and profession.

MMLU (Hendrycks et al. 2020, arXiv 2009.03300). Training uses its auxiliary split, about a hundred
thousand questions of other tests (ARC, MCTest, OpenBookQA, RACE), or where that is not to be had,
the five questions of each subject that are meant as examples (dev).
"""
from tasks.common import HubTask, choice_conversation, chosen_letter


class MMLU(HubTask):
    """The questions of the split "auxiliary_train", "dev", "validation" or "test"."""

    name = "cais/mmlu"
    config = "all"
    columns = {"question": str, "choices": [str], "answer": int}
    documented = {"auxiliary_train": 99_842, "dev": 285, "validation": 1531, "test": 14_042}
    chance = 0.25

    def get_example(self, i):
        row = self.rows[i]
        if row["answer"] not in range(len(row["choices"])):
            words = f"{row['answer']} is none of {len(row['choices'])} choices, counted from 0"
            raise self.rows.error(i, "answer", words)
        return choice_conversation(row["question"], row["choices"], row["answer"])

    def evaluate(self, conversation, parts):
        """Right when the answer is the letter of the right choice."""
        return chosen_letter(conversation, parts)
