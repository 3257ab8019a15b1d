"""Reinforcement learning as its user runs it: a task of one's own, resuming, ranks, a reward that
can be hacked, and what is said of bad input."""
import pytest

from stage_runs import (
    TINY_CHAT,
    last_json,
    meta_of,
    rows_of,
    same_weights,
    weights_of,
)

# {evaluate} and {reward} are expressions of `text`, the answer
TASK = """
from tasks.common import Task, answer_text, conversation


class Letters(Task):
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
REWARD_LINE = 16
SMALL = (
    "--device_batch_size=8", "--examples_per_step=4", "--num_samples=4", "--max_new_tokens=6",
    "--eval_items=4", "--eval_times=1")
LARGER = (
    *SMALL, "--examples_per_step=8", "--num_samples=8", "--eval_items=32", "--eval_times=2",
    "--num_iterations=20", "--learning_rate=0.02")


@pytest.fixture(scope="module")
def sft(stages, trained):
    """Stages with a chat model of three steps."""
    stages.fork("scripts.chat_sft", "--source=base", *TINY_CHAT, "--num_iterations=3")
    return stages


def write_task(path, evaluate="'e' in text", reward="float('e' in text)"):
    path.write_text(TASK.format(evaluate=evaluate, reward=reward), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The path of a task whose reward is for the letter e."""
    return write_task(tmp_path_factory.mktemp("task") / "letters.py")


# ------------------------------------------------------------------------------------------------
# what it learns

def test_the_stage_learns_what_the_reward_is_for_and_leaves_its_record(sft, task):
    out, _ = sft.fork("scripts.chat_rl", f"--tasks={task}", *LARGER)
    record = last_json(out)
    assert record["stage"] == "chat_rl" and record["steps"] == 20 and record["tokens"] > 0
    assert record["accuracy_after"] > record["accuracy_before"] + 0.2
    assert record["reward_after"] == pytest.approx(record["accuracy_after"])
    assert record["pass_at_k_after"] >= record["accuracy_after"] and record["k"] == 8
    assert record["warning"] is None

    # what the run left
    folder = sft.folder("chatrl", "d1")
    assert record["checkpoint"] == str(folder) and meta_of(folder, 20)["finished"]
    curve = rows_of(folder, "pass_at_k")
    assert [row["step"] for row in curve][::2] == [0, 20] and len(curve) == 3
    assert curve[0]["accuracy"] == record["accuracy_before"]
    assert len(rows_of(folder, "reward")) == 20

    # the model that it makes, and the report
    score = sft.fork_record(
        "scripts.chat_eval", "--source=rl", "-a", "arithmetic", "--items=2", "--max_new_tokens=4")
    assert score["source"] == "rl" and score["checkpoint"] == str(folder)
    out, _ = sft.fork("scripts.chat_cli", "--source=rl", "-p", "hello", "--max_tokens=5")
    assert "<|" not in out
    report = open(sft.fork_record("nanochat.report")["report"], encoding="utf-8").read()
    assert "## Reinforcement learning" in report and "report_rl.png" in report
    assert f"{100 * record['accuracy_after']:.1f} %" in report and "pass@8" in report


def test_a_reward_that_is_hacked_is_noticed(sft, tmp_path):
    """The reward is for length, and short answers are right. docs/traps.md: hacked-reward"""
    task = write_task(tmp_path / "long.py", evaluate="len(text) < 10", reward="float(len(text))")
    out, _ = sft.fork("scripts.chat_rl", f"--tasks={task}", *LARGER)
    record = last_json(out)
    assert record["reward_after"] > record["reward_before"]
    assert record["accuracy_after"] < record["accuracy_before"]
    assert "the reward is being hacked" in out and "being hacked" in record["warning"]


def test_rewards_that_are_all_the_same_are_said_to_teach_nothing(sft, tmp_path):
    task = write_task(tmp_path / "same.py", reward="1.0")
    out, _ = sft.fork(
        "scripts.chat_rl", f"--tasks={task}", *SMALL, "--num_iterations=3", "--eval_items=99")
    assert out.count("40 held-out questions, 4 times each") == 2, "each of the task's once"
    assert out.count("all 16 answers have the reward 1, so that there is nothing to learn") == 1
    assert "3 of 3 steps had nothing to learn" in out
    assert "right answers to held-out questions did not rise" in out
    record = last_json(out)
    assert record["idle_steps"] == 3
    before = weights_of(sft.folder("chatsft", "d1"), 3)
    after = weights_of(sft.base / "chatrl_checkpoints" / record["checkpoint"].split("/")[-1], 3)
    assert same_weights(before, after)


def test_several_tasks_are_practised_in_turns(sft, task):
    command = ("scripts.chat_rl", f"--tasks={task},arithmetic", *SMALL, "--num_iterations=1")
    assert sft.fork_record(*command)["tasks"] == [str(task), "arithmetic"]


# ------------------------------------------------------------------------------------------------
# stopping, resuming, ranks

@pytest.fixture
def run_of(sft, task):
    """(tag, settings) -> (words of six steps from a model of that tag, its folder)."""
    def named(tag, *settings):
        link = sft.folder("chatsft", tag)
        if not link.exists():
            link.symlink_to("d1")
        words = (
            "scripts.chat_rl", f"--tasks={task}", f"--model_tag={tag}", *SMALL,
            "--num_iterations=6", "--learning_rate=0.02", *settings)
        return words, sft.folder("chatrl", tag)
    return named


@pytest.fixture(scope="module")
def whole(sft, task):
    """The weights of six steps that nothing interrupted."""
    sft.folder("chatsft", "whole").symlink_to("d1")
    sft.fork(
        "scripts.chat_rl", f"--tasks={task}", "--model_tag=whole", *SMALL, "--num_iterations=6",
        "--learning_rate=0.02")
    return weights_of(sft.folder("chatrl", "whole"), 6)


def test_a_killed_run_resumes_to_the_bit(sft, run_of, whole):
    # docs/traps.md: resume-forgets
    command, folder = run_of("killed", "--save_every=2")
    sft.fork(*command, status=-9, faults={"6": "kill"})
    out, _ = sft.fork(*command, "--resume")
    record = last_json(out)
    assert record["steps"] == 6 and record["accuracy_before"] is not None
    rewards = [row["reward"] for row in rows_of(folder, "reward")]
    assert len(rewards) == 6 and record["mean_reward"] == pytest.approx(sum(rewards) / 6)
    assert same_weights(weights_of(folder, 6), whole)
    assert [row["step"] for row in rows_of(folder, "pass_at_k")] == [0, 6]


def test_a_run_that_is_asked_to_stop_saves_and_resumes_to_the_bit(sft, run_of, whole):
    command, folder = run_of("stopped")
    out, _ = sft.fork(*command, status=143, faults={"3": "terminate"})
    assert "saved step 3" in out and "--resume resumes it" in out
    sft.fork(*command, "--resume")
    assert same_weights(weights_of(folder, 6), whole)


def test_a_step_of_nan_is_skipped_and_the_run_continues_with_other_questions(sft, run_of):
    # docs/traps.md: nan-guards
    command, folder = run_of("nan", "--num_iterations=3")
    assert sft.fork_record(*command, faults={"2": "nan"})["steps"] == 3
    [skipped] = rows_of(folder, "skipped")
    assert skipped["step"] == 1 and "nan" in skipped["skipped"]


SLOW_AND_EXACT = ("--learning_rate=0.002", "--dtype=float32", "--num_iterations=3")


@pytest.fixture(scope="module")
def one_rank(sft, task):
    """The folder of three steps on one rank, in float32."""
    sft.folder("chatsft", "one-rank").symlink_to("d1")
    words = ("scripts.chat_rl", f"--tasks={task}", "--model_tag=one-rank", *SMALL)
    sft.fork(*words, *SLOW_AND_EXACT)
    return sft.folder("chatrl", "one-rank")


@pytest.mark.parametrize("parallel", ["replicated", "zero2", "fsdp"])
def test_two_ranks_learn_what_one_learns(sft, run_of, one_rank, parallel):
    command, folder = run_of(f"ranks-{parallel}", *SLOW_AND_EXACT, f"--parallel={parallel}")
    sft.fork(*command, ranks=2)
    found, wanted = weights_of(folder, 3), weights_of(one_rank, 3)
    before = weights_of(sft.folder("chatsft", "d1"), 3)
    moved = max((wanted[name].float() - before[name].float()).abs().max() for name in wanted)
    assert moved > 1e-2
    for name in wanted:
        assert (found[name].float() - wanted[name].float()).abs().max() < 1e-3, name
    for key in ("reward", "groups"):
        assert [row[key] for row in rows_of(folder, key)] == pytest.approx(
            [row[key] for row in rows_of(one_rank, key)])


# ------------------------------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize("words, said", [
    (("--tasks=countin",), "did you mean counting"),
    (("--tasks=letters.py",), "cannot read letters.py"),
    (("--source=base",), "choose sft, mid or rl"),
    (("--num_samples=1",), "num_samples=1 must be at least 2"),
    (("--temperature=0",), "would all be the same"),
    (("--temperature=-1",), "temperature=-1.0 must be at least 0"),
    (("--minutes=0",), "a budget must be above zero"),
])
def test_bad_input_is_one_line_with_the_remedy(sft, words, said):
    assert said in sft.refusal("scripts.chat_rl", *words)


@pytest.mark.parametrize("reward, said", [
    ("1 / 0", f"broken.py, line {REWARD_LINE + 2}: ZeroDivisionError"),
    ("float('nan')", f"broken.py, line {REWARD_LINE}: the reward of an answer is nan"),
    ("None", f"broken.py, line {REWARD_LINE}: the reward of an answer is None"),
])
def test_a_reward_that_is_broken_is_one_line_with_its_place(sft, tmp_path, reward, said):
    task = write_task(tmp_path / "broken.py", reward=reward)
    assert said in sft.refusal("scripts.chat_rl", f"--tasks={task}", *SMALL, "--num_iterations=1")
