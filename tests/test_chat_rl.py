"""Reinforcement learning as its user runs it: a task of one's own, resuming, ranks, a reward that
can be hacked, and what is said of bad input."""
import pytest
import torch

from stage_runs import (
    TINY,
    TINY_CHAT,
    Stages,
    last_json,
    meta_of,
    rows_of,
    same_values,
    same_weights,
    weights_of,
)

# {evaluate} and {reward} are expressions of `text`, the answer
TASK = """
from tasks.common import Task, answer_text, conversation


class Letters(Task):
    def __init__(self, split):
        super().__init__()
        self.split = split

    def num_examples(self):
        return 40

    def get_example(self, i):
        return conversation(f"Say cat number {{i}}.", f"cat {{i}}")

    def evaluate(self, conversation, parts):
        text = answer_text(parts)
        return {evaluate}

    def reward(self, conversation, parts):
        text = answer_text(parts)
        return {reward}
"""
SMALL = (
    "--device_batch_size=8", "--examples_per_step=4", "--num_samples=4", "--max_new_tokens=6",
    "--eval_items=4", "--eval_times=1")


@pytest.fixture(scope="module")
def sft(stages, trained):
    """Stages with a chat model of three steps."""
    stages.fork("scripts.chat_sft", "--source=base", *TINY_CHAT, "--num_iterations=3")
    return stages


def write_task(path, evaluate="'e' in text", reward="float('e' in text)"):
    path.write_text(TASK.format(evaluate=evaluate, reward=reward), encoding="utf-8")
    return path


@pytest.fixture
def task(tmp_path):
    """The path of a task whose reward is for the letter e."""
    return write_task(tmp_path / "letters.py")


def test_the_stage_learns_what_the_reward_is_for_and_leaves_its_record(sft, task):
    size = ("--examples_per_step=8", "--num_samples=8", "--eval_items=32")
    command = ("scripts.chat_rl", f"--tasks={task}", *SMALL, *size, "--num_iterations=30")
    out, _ = sft.fork(*command, "--learning_rate=0.02", "--eval_times=2")
    record = last_json(out)
    print(record)
    assert record["stage"] == "chat_rl" and record["steps"] == 30
    assert record["accuracy_after"] > record["accuracy_before"] + 0.2
