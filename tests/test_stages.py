"""Every stage as its user runs it, in a process of its own, at reduced size; and what each says of bad input."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import ROOT, last_json
from nanochat.checkpoint_manager import complete_steps

TINY = ("--depth=1", "--max_seq_len=128", "--total_batch_size=512", "--compile=0")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
RECORD = {"stage", "seconds", "machine", "settings"}
# A second thread is no help to matrices as small as these. Compiling the sources of torch's compiler and of sympy takes
# ten seconds of every stage where an environment forbids Python to keep the result.
QUICK = {"OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "false", "PYTHONDONTWRITEBYTECODE": ""}
TRAINING = RECORD | {"steps", "tokens", "tokens_per_second", "flops_per_second", "val_bpb", "checkpoint"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A few hundred sentences, enough for a vocabulary of 430."""
    path = tmp_path_factory.mktemp("text") / "my.txt"
    lines = [f"The {a} {b} {c} the {d} number {i * 37 % 1009}." for i, (a, b, c, d) in enumerate(
        (a, b, c, d) for a in ("small", "green", "quick", "old") for b in ("cat", "dog", "bird", "horse", "fox")
        for c in ("sees", "follows", "finds", "leaves") for d in ("house", "river", "garden", "street", "forest"))]
    path.write_text("\n\n".join(lines * 3), encoding="utf-8")
    return path


# Most of the time of a short command goes into importing torch, so that one process imports it and each command is a
# fork of that. (It has computed nothing, so there are no threads yet that a fork would lose.)
FORK_SERVER = """
import json, os, runpy, sys
import matplotlib, numpy, pyarrow.parquet, tiktoken, torch, torch._dynamo
for line in sys.stdin:
    words, environment, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if "FAULTS" in environment:
            sys.path.append("tests")
            import faults
            faults.install()
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Stages:
    """Runs stages with the base directory `base`."""

    def __init__(self, base, server):
        self.base, self.server = base, server
        self.environment = {"NANOCHAT_BASE_DIR": str(base), **QUICK}

    def start(self, *words, launcher=("-m",)):
        return subprocess.Popen([sys.executable, *launcher, *map(str, words)], cwd=ROOT, text=True, encoding="utf-8",
                                env={**os.environ, **self.environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *words, launcher=("-m",), status=0):
        process = self.start(*words, launcher=launcher)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, out + err
        return out, err

    def record(self, *words, **options):
        return last_json(self.run(*words, **options)[0])

    def fork(self, *words, status=0, faults=None):
        """As run(), faster; with batches that go wrong as faults.py says."""
        files = [self.base / "forked.out", self.base / "forked.err"]
        environment = {**self.environment, **({"FAULTS": json.dumps(faults)} if faults else {})}
        self.server.stdin.write(json.dumps([list(map(str, words)), environment, *map(str, files)]) + "\n")
        self.server.stdin.flush()
        found = int(self.server.stdout.readline())
        out, err = (file.read_text(encoding="utf-8") for file in files)
        assert found == status, out + err
        return out, err

    def fork_record(self, *words, **options):
        return last_json(self.fork(*words, **options)[0])

    def refusal(self, *words):
        """The one line that bad input gets."""
        _, err = self.fork(*words, status=2)
        assert err.count("\n") == 1 and err.startswith("error: "), err
        return err


@pytest.fixture(scope="module")
def server():
    """The process that forks."""
    with subprocess.Popen([sys.executable, "-c", FORK_SERVER], cwd=ROOT, env={**os.environ, **QUICK}, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        yield process


@pytest.fixture(scope="module")
def stages(tmp_path_factory, text, server):
    stages = Stages(tmp_path_factory.mktemp("stages"), server)
    rng = random.Random(1)  # words and objects to ask about; gathering the real ones takes a while
    words = sorted({"".join(rng.choices("abcdefghi", k=rng.randint(4, 8))) for _ in range(300)})
    (stages.base / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    objects = [{"name": f"cats.{word}", "sentence": f"Return {word} of the cat."} for word in words]
    (stages.base / "pydoc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects), encoding="utf-8")
    record = stages.record("scripts.tok_train", f"--data={text}", "--vocab_size=430")
    assert RECORD <= record.keys() and record["stage"] == "tok_train" and record["vocab_size"] == 430
    return stages


@pytest.fixture(scope="module")
def trained(stages, text):
    """A base model of ten steps."""
    return stages.record("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=10")


def test_base_train_leaves_its_record_and_a_checkpoint(stages, trained):
    assert TRAINING <= trained.keys() and trained["stage"] == "base_train"
    assert trained["steps"] == 10 and trained["tokens"] == 5120 and 0 < trained["val_bpb"] < 8
    assert 0 < trained["flops_per_second_of_weights"] < trained["flops_per_second"] and 0 < trained["share_of_matmul_rate"] < 1
    assert trained["mfu"] is None, "of a CPU there is no data sheet"
    folder = stages.base / "base_checkpoints" / "d1"
    assert trained["checkpoint"] == str(folder)
    files = {f"{name}_0000{step}{end}" for step in ("04", "05", "08", "10")  # the newest three, and the last before the rate fell
             for name, end in (("model", ".pt"), ("optim", "_rank0.pt"), ("meta", ".json"))}
    assert {p.name for p in folder.iterdir()} == files | {"log.jsonl", ".lock"}
    meta = json.loads((folder / "meta_000010.json").read_text(encoding="utf-8"))
    assert meta["settings"] == trained["settings"] and meta["settings"]["num_iterations"] == 10 and meta["finished"]
    rows = (stages.base / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    assert trained in [json.loads(row) for row in rows if row]


def test_the_chat_stages_follow(stages, trained, text):
    row = stages.fork_record("scripts.tok_eval", f"--data={text}")
    assert RECORD <= row.keys() and row["stage"] == "tok_eval" and row["bytes_per_token"] > 1
    row = stages.fork_record("scripts.base_loss", f"--data={text}", "--documents=300")
    assert RECORD <= row.keys() and abs(row["val_bpb"] - trained["val_bpb"]) < 1e-4
    small = ("--compile=0", "--device_batch_size=2", "--num_iterations=3")
    mid = stages.record("scripts.mid_train", *small)
    assert TRAINING <= mid.keys() and mid["stage"] == "mid_train" and mid["steps"] == 3
    talk = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    mine = stages.base / "mine.jsonl"
    mine.write_text(json.dumps(talk) + "\n", encoding="utf-8")
    sft = stages.fork_record("scripts.chat_sft", f"--custom={mine}", *small)
    assert TRAINING <= sft.keys() and sft["tokens"] == 3 * 2 * 128
    assert sft["checkpoint"] == str(stages.base / "chatsft_checkpoints" / "d1")
    score = stages.fork_record("scripts.chat_eval", "-a", "spelling,pydoc,arithmetic", "--items=4",
                               "--max_new_tokens=8")
    assert RECORD | {"checkpoint"} <= score.keys()
    for key in ("accuracy", "items", "chance"):
        assert score[key].keys() == {"spelling", "pydoc", "arithmetic"}
    assert all(0 <= share <= 1 for share in score["accuracy"].values())
    assert score["items"]["pydoc"] == 4 and score["chance"]["pydoc"] == 0.25
    out, _ = stages.run("scripts.chat_cli", "-p", "hello", "--max_tokens=5")
    assert "<|" not in out
    report = stages.fork_record("nanochat.report")["report"]
    assert "bits per byte" in open(report, encoding="utf-8").read()
    whole = stages.fork_record("nanochat.report", "--speedrun", "--seconds=12.5")
    assert whole["stage"] == "speedrun" and whole["seconds"] == 12.5 and whole["val_bpb"] == trained["val_bpb"]
    assert whole["accuracy"].keys() == {"arithmetic", "spelling", "pydoc", "identity"}
    assert os.path.isabs(whole["report"])


def test_the_four_budgets_and_the_loggers(stages, trained, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--model_tag=budget", "--eval_every=0")
    weights = 12 * 64 * 64 + 430 * 64  # of one layer and of the head
    flops = 6 * weights + 6 * 64 * 128
    row = stages.fork_record(*command, f"--target_flops={3 * 512 * flops}", "--logger=wandb")
    assert row["steps"] == 3 and row["settings"]["num_iterations"] is None
    out, _ = stages.fork(*command, "--target_param_data_ratio=0.02", "--logger=tensorboard")
    assert last_json(out)["steps"] == round(0.02 * weights / 512)
    assert "tensorboard is not installed" in out or list(stages.base.glob("base_checkpoints/budget/tensorboard/*"))
    row = stages.fork_record(*command, "--minutes=0.02")
    assert row["steps"] > 0 and row["train_seconds"] < 30


@pytest.fixture(scope="module")
def refrain(tmp_path_factory):
    """One document of 128 tokens over and over, so that what a rank reads does not depend on the number of ranks.

    Capitals that the tokenizer has not seen are a token each.
    """
    folder = tmp_path_factory.mktemp("refrain")
    document = "".join(random.Random(1).choices("QXZJKWVU", k=127))
    for name, count in (("0.parquet", 40), ("1.parquet", 3)):
        pq.write_table(pa.table({"text": [document] * count}), folder / name, row_group_size=4)
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def losses_of(folder):
    return {row["step"]: row["loss"] for row in rows_of(folder) if "loss" in row}


def test_two_ranks_train_what_one_rank_trains_and_one_cannot_go_on_from_two(stages, refrain):
    command = ("scripts.base_train", f"--data={refrain}", *TINY, "--dtype=float32", "--num_iterations=10")
    one = stages.fork_record(*command, "--model_tag=one")
    two = stages.record(command[0], "--", *command[1:], "--model_tag=two", launcher=TORCHRUN)
    assert one["tokens"] == two["tokens"] == 5120
    assert abs(one["val_bpb"] - two["val_bpb"]) < 1e-3, "the same batch in tokens gives the same model"
    folder = stages.base / "base_checkpoints"
    losses = [losses_of(folder / tag) for tag in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3) and losses[0][10] < losses[0][1] / 5
    meta = json.loads((folder / "two" / "meta_000010.json").read_text(encoding="utf-8"))
    assert meta["world_size"] == 2
    assert meta["files"].keys() == {"model_000010.pt", "optim_000010_rank0.pt", "optim_000010_rank1.pt"}
    refusal = stages.refusal(*command, "--model_tag=two", "--resume")  # trap 30
    assert "2 ranks" in refusal and "has 1" in refusal
    row = stages.record("scripts.mid_train", "--", "--model_tag=two", "--compile=0", "--device_batch_size=2",
                        "--num_iterations=2", launcher=TORCHRUN)
    assert row["tokens"] == 2 * 2 * 2 * 128


def weights_of(folder, step):
    return torch.load(folder / f"model_{step:06d}.pt", weights_only=True)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_values(a, b):
    """Whether two nests of dicts, lists, tensors and numbers are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_values(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_values, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(params=["base", "mid", "chatsft"])
def stage(request, stages, trained, text):
    """name -> (words that train a tiny model in eight steps, the folder of its checkpoints)."""
    words = {"base": ("scripts.base_train", f"--data={text}", *TINY, "--eval_every=0"),
             "mid": ("scripts.mid_train", "--compile=0", "--device_batch_size=2"),
             "chatsft": ("scripts.chat_sft", "--compile=0", "--device_batch_size=2", "--source=base")}[request.param]

    def named(name):
        tag = f"{request.param}-{name}"
        if request.param != "base":  # all start from the same base model
            (stages.base / "base_checkpoints" / tag).symlink_to("d1")
        return (*words, "--num_iterations=8", "--save_every=2", f"--model_tag={tag}"), stages.base / f"{request.param}_checkpoints" / tag
    return named


def test_trap_26_a_batch_of_nan_is_left_out_and_the_run_is_the_one_that_never_had_it(stages, stage):
    command, folder = stage("nan")
    assert stages.fork_record(*command, faults={"3": "nan"})["steps"] == 8
    skipped = [row for row in rows_of(folder) if "skipped" in row]
    assert len(skipped) == 1 and skipped[0]["step"] == 2 and "nan" in skipped[0]["skipped"]
    command, missing = stage("missing")
    assert stages.fork_record(*command, faults={"3": "missing"})["steps"] == 8
    assert same_weights(weights_of(folder, 8), weights_of(missing, 8))


def test_trap_26_nan_on_one_of_two_ranks_is_skipped_by_both(stages, text, monkeypatch):
    monkeypatch.setitem(stages.environment, "FAULTS", json.dumps({"3": "nan", "30": "spike"}))
    row = stages.record("scripts.base_train", "--", f"--data={text}", *TINY, "--num_iterations=40", "--eval_every=0", "--model_tag=ranks",
                        launcher=(*TORCHRUN, "tests.faults"))
    folder = stages.base / "base_checkpoints" / "ranks"
    assert row["steps"] == 40
    assert [(row["step"], row["verdict"]) for row in rows_of(folder) if "skipped" in row] == [(2, "skip"), (28, "skip")]
    assert all(value.isfinite().all() for value in weights_of(folder, 40).values())


def test_a_rank_that_hangs_ends_the_run_and_says_where_it_stood(stages, text):
    _, err = stages.fork("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=99", "--eval_every=0", "--model_tag=hung",
                         "--hang_minutes=0.05", status=1, faults={"6": "hang"})
    assert "Timeout" in err and "faults.py" in err and "in faulty" in err


def test_sick_weights_go_back_to_the_last_good_checkpoint_at_half_the_rate(stages, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=10", "--eval_every=0", "--save_every=3")
    out, _ = stages.fork(*command, "--model_tag=sick", faults={"6": "sick"})
    assert "back to step 4" in out, "the one before the decay is newer than that of step 3"
    folder = stages.base / "base_checkpoints" / "sick"
    assert [row["verdict"] for row in rows_of(folder) if "skipped" in row] == ["skip"] * 4 + ["roll back"]
    meta = json.loads((folder / "meta_000010.json").read_text(encoding="utf-8"))
    assert meta["finished"] and meta["rate_scale"] == 0.5
    assert all(value.isfinite().all() for value in weights_of(folder, 10).values())


def test_weights_that_are_sick_when_somebody_stops_the_run_are_not_saved(stages, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=14", "--eval_every=0", "--save_every=4", "--model_tag=poorly", "--resume")
    folder = stages.base / "base_checkpoints" / "poorly"
    out, _ = stages.fork(*command, status=130, faults={"10": "sick", "12": "interrupt"})
    assert "not saved, for the last batches were bad" in out and complete_steps(folder)[-1] == 8
    assert stages.fork_record(*command)["steps"] == 14
    assert all(value.isfinite().all() for value in weights_of(folder, 14).values())


def test_two_ranks_that_do_not_recover_go_on_as_two(stages, text, monkeypatch):
    command = ("scripts.base_train", "--", f"--data={text}", *TINY, "--num_iterations=8", "--eval_every=0", "--save_every=3", "--model_tag=ill2")
    folder = stages.base / "base_checkpoints" / "ill2"
    monkeypatch.setitem(stages.environment, "FAULTS", json.dumps({str(number): "nan" for number in range(5, 999)}))
    stages.run(*command, launcher=(*TORCHRUN, "tests.faults"), status=1)
    assert complete_steps(folder)[-1] == 4
    monkeypatch.delitem(stages.environment, "FAULTS")
    row = stages.record("nanochat.checkpoint_manager", folder, "--rescue")
    assert row["steps"] == 8 and json.loads((folder / "meta_000008.json").read_text(encoding="utf-8"))["world_size"] == 2


def test_a_run_that_does_not_recover_stops_and_the_emergency_run_goes_on(stages, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=10", "--eval_every=0", "--save_every=3", "--model_tag=ill")
    folder = stages.base / "base_checkpoints" / "ill"
    out, err = stages.fork(*command, status=1, faults={str(number): "nan" for number in range(8, 999)})
    assert "does not recover" in out and f"emergency_training.sh {folder}" in out, out + err
    assert complete_steps(folder)[-1] == 6
    result = subprocess.run(["bash", "emergency_training.sh", str(folder)], cwd=ROOT, env={**os.environ, **stages.environment},
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "learning_rate=0.01 (was 0.02)" in result.stdout and "grad_clip=1.0 (was 0.0)" in result.stdout
    row = last_json(result.stdout)
    assert row["steps"] == 10 and row["checkpoint"] == str(folder) and row["settings"]["data"] == str(text)


def test_the_emergency_run_passes_over_a_damaged_step(stages, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=9", "--eval_every=0", "--save_every=2", "--model_tag=ill3")
    folder = stages.base / "base_checkpoints" / "ill3"
    stages.fork(*command, status=130, faults={"7": "interrupt"})
    newest = folder / f"model_{complete_steps(folder)[-1]:06d}.pt"
    newest.write_bytes(newest.read_bytes()[:-7])
    safe = ("--grad_clip=1.0", "--save_minutes=2.0", "--learning_rate=0.01", "--resume_from_checkpoint=6")
    out, _ = stages.fork(*command, *safe, status=130, faults={"1": "interrupt"})
    assert "the same command with --resume in place of --resume_from_checkpoint goes on" in out and complete_steps(folder)[-1] == 7
    newest.write_bytes(newest.read_bytes()[:-7])
    out, _ = stages.fork("nanochat.checkpoint_manager", folder, "--rescue")
    assert "resuming from step 6" in out and "learning_rate=0.01 (was 0.02)" in out


def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_a_quiet_one(stages, stage):
    command, quiet = stage("quiet")
    stages.fork_record(*command)
    command, folder = stage("killed")
    for batch in (6, 4, 2):  # counted from each start
        stages.fork(*command, "--resume", status=-signal.SIGKILL, faults={str(batch): "kill"})
        assert complete_steps(folder)
    stages.fork_record(*command, "--resume")
    assert same_weights(weights_of(folder, 8), weights_of(quiet, 8))
    states = [torch.load(path / "optim_000008_rank0.pt", weights_only=True) for path in (folder, quiet)]
    assert same_values(*states) and states[0].keys() == {"optimizers", "loader", "rng", "guard"}, "optimizers, random numbers, the next batch, the guard"
    assert [row["step"] for row in rows_of(folder) if "loss" in row] == list(range(1, 9)), "no row is lost, none comes twice"


def test_trap_29_what_was_trained_is_saved_before_the_last_validation_which_may_fail(stages, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=8", "--eval_every=0", "--save_every=3", "--model_tag=full")
    folder = stages.base / "base_checkpoints" / "full"
    stages.fork(*command, status=1, faults={"end": "memory"})
    assert complete_steps(folder)[-1] == 8
    whole = weights_of(folder, 8)
    out, _ = stages.fork(*command, "--resume")
    assert last_json(out)["steps"] == 8 and "step     8" not in out and same_weights(weights_of(folder, 8), whole), "nothing is trained again"


def test_a_scheduler_stops_a_run_as_ctrl_c_does_and_twice_at_once(stages, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=12", "--eval_every=0", "--model_tag=scheduled")
    folder = stages.base / "base_checkpoints" / "scheduled"
    out, err = stages.fork(*command, status=143, faults={"3": "terminate"})
    assert complete_steps(folder) == [3] and "--resume goes on" in out and "Traceback" not in err and "leaked" not in err
    out, err = stages.fork(*command, "--resume", status=143, faults={"2": "terminate twice"})
    assert complete_steps(folder) == [3] and "stopped at once" in out and "Traceback" not in err
    assert stages.fork_record(*command, "--resume")["steps"] == 12


def test_the_best_step_by_validation_is_saved_and_stays(stages, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=12", "--model_tag=best", "--eval_every=2", "--keep=1")
    stages.fork_record(*command)
    folder = stages.base / "base_checkpoints" / "best"
    rows = [(row["val_bpb"], row["step"]) for row in rows_of(folder) if "val_bpb" in row and row["step"] < 12]
    metas = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("meta_*.json"))]
    assert [row[1] for row in rows] == [2, 4, 6, 8, 10] and all(meta["val_bpb"] for meta in metas if meta["step"] != 5)
    assert min((meta["val_bpb"], meta["step"]) for meta in metas if meta["val_bpb"]) <= min(rows)
    assert "keep=0" in stages.refusal(*command, "--keep=0")


def test_a_resumed_run_may_change_its_dtype(stages, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=6", "--eval_every=0", "--model_tag=wide")
    stages.fork(*command, status=130, faults={"2": "interrupt"})
    stages.fork_record(*command, "--resume", "--dtype=bfloat16")
    folder = stages.base / "base_checkpoints" / "wide"
    assert json.loads((folder / "meta_000006.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_extend_goes_on_from_before_the_decay_without_a_jump_of_the_rate(stages, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--eval_every=0", "--model_tag=longer")
    folder = stages.base / "base_checkpoints" / "longer"
    assert "can be extended" in stages.refusal(*command, "--extend=2")
    assert stages.fork_record(*command, "--num_iterations=10", "--learning_rate=0.005")["steps"] == 10
    assert "takes no other budget" in stages.refusal(*command, "--num_iterations=10", "--extend=2")
    assert "after the rate began to fall" in stages.refusal(*command, "--extend=2", "--resume_from_checkpoint=10")
    out, _ = stages.fork(*command, "--extend=2.0", status=130, faults={"4": "interrupt"})
    assert "--resume in place of --extend" in out
    out, _ = stages.fork(*command, "--resume", status=130, faults={"2": "interrupt"})
    assert stages.fork_record(*command, "--extend=2.0")["steps"] == 20, "the run goes on that was extended, and is not extended once more"
    rates = [row["lr"] for row in rows_of(folder) if "loss" in row]
    assert len(rates) == 20 and rates[1:8] == [0.005] * 7 and all(a >= b for a, b in zip(rates[1:], rates[2:])), "its own rate, which the command need not repeat"


def test_resume_from_a_named_checkpoint(stages, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=9", "--eval_every=0", "--save_every=2", "--keep=9", "--model_tag=named")
    stages.fork_record(*command)
    folder = stages.base / "base_checkpoints" / "named"
    whole = weights_of(folder, 9)
    for name in ("2", folder / "model_000006.pt"):
        out, _ = stages.fork(*command, f"--resume_from_checkpoint={name}")
        assert same_weights(weights_of(folder, 9), whole)
    assert "choose from" in stages.refusal(*command, "--resume_from_checkpoint=77")
    assert "is no checkpoint" in stages.refusal(*command, "--resume_from_checkpoint=/none")
    mid = ("scripts.mid_train", "--model_tag=named", "--compile=0", "--num_iterations=6", "--save_every=2", "--device_batch_size=2")
    stages.fork_record(*mid)
    folder = stages.base / "mid_checkpoints" / "named"
    whole = weights_of(folder, 6)
    stages.fork_record(*mid, "--resume_from_checkpoint=2")
    assert same_weights(weights_of(folder, 6), whole)
    stages.fork_record("scripts.base_train", f"--data={text}", "--depth=2", *TINY[1:], "--num_iterations=1", "--eval_every=0", "--model_tag=newer")
    path = folder / "meta_000004.json"
    stages.fork_record(mid[0], *mid[2:], f"--resume_from_checkpoint={path}")
    assert same_weights(weights_of(folder, 6), whole), "all that a resumed run needs is in its checkpoint, whichever base model is the newest"
    assert "is of mid_train, not of base_train" in stages.refusal(*command, f"--resume_from_checkpoint={path}")
    assert "is of base_train, not of mid_train" in stages.refusal(*mid, f"--resume_from_checkpoint={stages.base}/base_checkpoints/named/meta_000006.json")
    out, _ = stages.fork(*mid[:1], "--model_tag=newer", *mid[2:], "--resume")
    assert "nothing to resume" in out


def test_trap_31_ctrl_c_saves_and_the_same_command_ends_where_an_undisturbed_run_ends(stages, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=20", "--eval_every=0", "--resume")
    whole = stages.fork_record(*command, "--model_tag=whole")
    command += ("--model_tag=stopped",)
    folder = stages.base / "base_checkpoints" / "stopped"
    out, err = stages.fork(*command, status=130, faults={"7": "interrupt"})
    assert "Traceback" not in err and "--resume" in out and complete_steps(folder) == [7]
    again = stages.fork_record(*command)
    assert again["steps"] == 20 and abs(again["val_bpb"] - whole["val_bpb"]) < 1e-3
    losses = [losses_of(folder.parent / tag) for tag in ("stopped", "whole")]
    assert list(losses[0]) == list(range(1, 21)), "no step is lost, none comes twice"
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize("words, needle", [
    (("scripts.base_train", "--dept=4"), "did you mean --depth"),
    (("scripts.base_train", "--depth=four"), "takes int"),
    (("scripts.base_train", "config/none.py"), "does not exist"),
    (("scripts.base_train", "--data=/nowhere", "--compile=0"), "/nowhere does not exist"),
    (("scripts.base_train", "--data={text}", "--depth=1", "--max_seq_len=100000", "--compile=0"), "context of 100000"),
    (("scripts.base_train", "--data={text}", "--depth=1", "--max_seq_len=128", "--total_batch_size=200"), "200"),
    (("scripts.base_train", "--data={text}", "--depth=1", "--kv_heads=3"), "kv_heads=3"),
    (("scripts.base_train", "--data={text}", "--minutes=0"), "minutes=0"),
    (("scripts.base_train", "--data={text}", "--ngram_tokens=-1"), "ngram_tokens=-1"),
    (("scripts.base_train", "--data={text}", "--minutes=1", "--target_flops=1e9"), "give one budget"),
    (("scripts.base_train", "--data={text}", *TINY, "--num_iterations=1", "--logger=paper"), "logger=paper"),
    (("scripts.chat_sft", "--source=base", "--compile=0", "--num_iterations=0"), "num_iterations=0"),
    (("scripts.base_train", "--data={latin}", "--compile=0"), "not UTF-8"),
    (("scripts.tok_train", "--data={empty}"), "empty"),
    (("scripts.tok_train", "--data={text}", "--vocab_size=30000"), "30000"),
    (("scripts.base_loss", "--model_tag=none"), "no complete checkpoint"),
    (("scripts.base_loss", "--model_tag=d1", "--step=3"), "choose from 4, 5, 8, 10"),
    (("scripts.chat_eval", "-a", "juggling"), "juggling"),
    (("scripts.chat_cli", "-p", ""), "empty"),
    (("scripts.chat_cli", "-p", "What", "is"), "goes in quotes"),
    (("scripts.chat_cli", "--source=base", "--model_tag=d1", "-p", "hi", "--temperature=-1"), "must not be negative"),
    (("scripts.chat_cli", "--source=base", "--model_tag=d1", "-p", "hi", "--max_tokens=0"), "at least 1"),
    (("scripts.chat_cli", "--source=rl", "-p", "hi"), "no stage makes rl checkpoints yet"),
    (("scripts.chat_web", "--port=0", "--top_k=-2"), "must not be negative"),
    (("scripts.tok_train", "--data="), "data path is empty"),
    (("scripts.base_train", "--data={text}", "--depth=0"), "depth=0"),
    (("scripts.base_train", "--data={text}", "--learning_rate=None"), "takes float, not None"),
    (("scripts.base_loss", "--documents=0"), "documents=0"),
    (("scripts.tok_eval", "--documents=0"), "documents=0"),
    (("scripts.chat_eval", "--items=0"), "items=0"),
    (("scripts.chat_sft", "--source=sft"), "choose mid or base"),
    (("nanochat.dataset", "--source=local", "-n", "5"), "always taken whole"),
    (("scripts.mid_train", "--device_batch_size=0"), "device_batch_size=0"),
    (("scripts.chat_cli", "--source=base", "--model_tag=d1", "-p", "word " * 200), "the context holds 128"),
    (("scripts.mid_train", "--dtype=float16"), "float16"),
])
def test_bad_input_is_one_line_and_status_2(stages, trained, text, tmp_path, words, needle):
    latin, empty = tmp_path / "latin.txt", tmp_path / "empty.txt"
    latin.write_bytes("caf\xe9 au lait".encode("latin-1") * 10)
    empty.write_text("", encoding="utf-8")
    assert needle in stages.refusal(*(word.format(text=text, latin=latin, empty=empty) for word in words))


def test_missing_and_damaged_tokenizers_and_checkpoints(stages, trained, text, tmp_path):
    (tmp_path / "empty").mkdir()
    empty = Stages(tmp_path / "empty", stages.server)
    assert "tok_train" in empty.refusal("scripts.base_train")
    assert "no base checkpoint" in empty.refusal("scripts.base_loss")
    copy = Stages(tmp_path / "copy", stages.server)
    shutil.copytree(stages.base, copy.base)
    base_loss = ("scripts.base_loss", "--model_tag=d1", f"--data={text}")
    copy.fork("scripts.tok_train", f"--data={text}", "--vocab_size=420")
    assert "another tokenizer" in copy.refusal(*base_loss)
    ranks = copy.base / "tokenizer" / "ranks.tiktoken"
    ranks.write_bytes(ranks.read_bytes()[:-9])
    assert "ranks.tiktoken is damaged" in copy.refusal(*base_loss)
    for step in (4, 5, 8, 10):
        model = copy.base / "base_checkpoints" / "d1" / f"model_{step:06d}.pt"
        model.write_bytes(model.read_bytes()[:-7])
    shutil.copytree(stages.base / "tokenizer", copy.base / "tokenizer", dirs_exist_ok=True)
    assert "model_000004.pt is damaged" in copy.refusal(*base_loss), "the newest that is whole would have been taken"
    assert "model_000010.pt is damaged" in copy.refusal(*base_loss, "--step=10")


def test_train_benchmark_measures_both_sides(stages):
    command = ("scripts.train_benchmark", "--depth=1", "--vocab_size=300", "--max_seq_len=16", "--device_batch_size=2", "--steps=4",
               "--repeats=1", "--compile=0")
    row = stages.record(*command)
    assert row["tokens_per_second"]["ours"] > 0 and 0 < row["share_of_matmul_rate"] < 1
    if "theirs" in row["tokens_per_second"]:
        assert row["ratio"] == row["tokens_per_second"]["ours"] / row["tokens_per_second"]["theirs"]
    assert "at least 4 steps" in stages.refusal("scripts.train_benchmark", "--steps=3")
