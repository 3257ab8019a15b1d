"""Every stage as its user runs it, in a process of its own, at reduced size; and what each says of bad input."""
import json
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, last_json

TINY = ("--depth=1", "--max_seq_len=128", "--total_batch_size=512", "--compile=0")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A few hundred sentences, enough for a vocabulary of 430."""
    path = tmp_path_factory.mktemp("text") / "my.txt"
    lines = [f"The {a} {b} {c} the {d} number {i * 37 % 1009}." for i, (a, b, c, d) in enumerate(
        (a, b, c, d) for a in ("small", "green", "quick", "old") for b in ("cat", "dog", "bird", "horse", "fox")
        for c in ("sees", "follows", "finds", "leaves") for d in ("house", "river", "garden", "street", "forest"))]
    path.write_text("\n\n".join(lines * 3), encoding="utf-8")
    return path


class Stages:
    def __init__(self, base, environment):
        self.base, self.environment = base, environment

    def start(self, *words, launcher=("-m",)):
        return subprocess.Popen([sys.executable, *launcher, *map(str, words)], cwd=ROOT, env=self.environment, text=True,
                                encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *words, launcher=("-m",), status=0):
        process = self.start(*words, launcher=launcher)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, out + err
        return out, err

    def record(self, *words, **options):
        return last_json(self.run(*words, **options)[0])


@pytest.fixture(scope="module")
def stages(tmp_path_factory, text):
    import os
    base = tmp_path_factory.mktemp("stages")
    stages = Stages(base, {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "2"})
    stages.run("scripts.tok_train", f"--data={text}", "--vocab_size=430")
    stages.base = base
    return stages


@pytest.fixture(scope="module")
def trained(stages, text):
    """A base model of ten steps."""
    return stages.record("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=10")


def test_base_train_leaves_its_record_and_a_checkpoint(stages, trained):
    assert {"stage", "seconds", "machine", "settings", "steps", "tokens", "tokens_per_second", "flops_per_second", "val_bpb",
            "checkpoint"} <= trained.keys()
    assert trained["steps"] == 10 and trained["tokens"] == 5120 and 0 < trained["val_bpb"] < 8
    folder = stages.base / "base_checkpoints" / "d1"
    assert trained["checkpoint"] == str(folder)
    assert {p.name for p in folder.iterdir()} == {"model_000010.pt", "optim_000010_rank0.pt", "meta_000010.json", "log.jsonl"}
    meta = json.loads((folder / "meta_000010.json").read_text(encoding="utf-8"))
    assert meta["settings"] == trained["settings"] and meta["settings"]["num_iterations"] == 10
    rows = (stages.base / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    assert trained in [json.loads(row) for row in rows if row]


def test_the_chat_stages_follow(stages, trained):
    assert stages.record("scripts.tok_eval", f"--data={stages_text(trained)}")["stage"] == "tok_eval"
    assert stages.record("scripts.base_loss", f"--data={stages_text(trained)}", "--documents=5")["val_bpb"] > 0
    small = ("--compile=0", "--device_batch_size=2")
    assert stages.record("scripts.mid_train", "--num_iterations=3", *small)["steps"] == 3
    mine = stages.base / "mine.jsonl"
    mine.write_text(json.dumps([{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]) + "\n", encoding="utf-8")
    sft = stages.record("scripts.chat_sft", "--num_iterations=3", f"--custom={mine}", *small)
    assert sft["checkpoint"] == str(stages.base / "chatsft_checkpoints" / "d1")
    score = stages.record("scripts.chat_eval", "-a", "spelling,pydoc,arithmetic", "--items=4", "--max_new_tokens=8")
    assert score["accuracy"].keys() == {"spelling", "pydoc", "arithmetic"} and score["items"]["pydoc"] == 4
    assert score["chance"]["pydoc"] == 0.25
    out, _ = stages.run("scripts.chat_cli", "-p", "hello", "--max_tokens=5")
    assert "<|" not in out
    report = stages.record("nanochat.report")["report"]
    assert "bits per byte" in open(report, encoding="utf-8").read()


def stages_text(record):
    return record["settings"]["data"]


def test_two_ranks_train_what_one_rank_trains(stages, trained):
    """Same batch in tokens; the ranks read other documents at a time, so the figures agree but roughly."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    row = stages.record("scripts.base_train", "--", f"--data={stages_text(trained)}", *TINY, "--num_iterations=10", "--model_tag=two",
                        launcher=launcher)
    assert row["tokens"] == 5120 and abs(row["val_bpb"] - trained["val_bpb"]) < 0.2
    assert (stages.base / "base_checkpoints" / "two" / "optim_000010_rank1.pt").exists()
    stages.run("scripts.base_loss", "--model_tag=two", f"--data={stages_text(trained)}", "--documents=3")


def test_ctrl_c_saves_and_the_same_command_goes_on(stages, trained):
    command = ("scripts.base_train", f"--data={stages_text(trained)}", *TINY, "--num_iterations=400", "--model_tag=stopped", "--resume")
    process = stages.start(*command)
    log = stages.base / "base_checkpoints" / "stopped" / "log.jsonl"
    while not (log.exists() and log.read_text(encoding="utf-8").count("\n") > 5) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "--resume" in out
    row = stages.record(*command)
    assert row["steps"] == 400
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").split("\n") if '"loss"' in line]
    assert steps == list(range(1, 401))  # none lost, none twice


def test_trap_31_a_resumed_run_is_the_run_that_was_not_stopped(stages, trained):
    """Stopped by a budget of fewer steps would be another schedule, so a checkpoint in the middle is taken up instead."""
    common = ("scripts.base_train", f"--data={stages_text(trained)}", *TINY, "--num_iterations=8", "--save_every=4")
    whole = stages.record(*common, "--model_tag=whole")
    folder = stages.base / "base_checkpoints"
    (folder / "cut").mkdir()
    for name in ("model_000004.pt", "optim_000004_rank0.pt", "meta_000004.json"):
        (folder / "cut" / name).write_bytes((folder / "whole" / name).read_bytes())
    again = stages.record(*common, "--model_tag=cut", "--resume")
    assert again["val_bpb"] == whole["val_bpb"]


@pytest.mark.parametrize("words, needle", [
    (("scripts.base_train", "--dept=4"), "did you mean --depth"),
    (("scripts.base_train", "--depth=four"), "takes int"),
    (("scripts.base_train", "config/none.py"), "does not exist"),
    (("scripts.base_train", "--data=/nowhere"), "/nowhere does not exist"),
    (("scripts.base_train", "--data={text}", "--depth=1", "--max_seq_len=100000", "--compile=0"), "context"),
    (("scripts.base_train", "--data={text}", "--depth=1", "--max_seq_len=128", "--total_batch_size=200"), "200"),
    (("scripts.base_train", "--data={latin}"), "not UTF-8"),
    (("scripts.tok_train", "--data={empty}"), "empty"),
    (("scripts.tok_train", "--data={text}", "--vocab_size=30000"), "30000"),
    (("scripts.base_loss", "--model_tag=none"), "no complete checkpoint"),
    (("scripts.chat_eval", "-a", "juggling"), "juggling"),
    (("scripts.chat_cli", "-p", ""), "empty"),
    (("scripts.mid_train", "--dtype=float16"), "float16"),
])
def test_bad_input_is_one_line_and_status_2(stages, trained, tmp_path, words, needle):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1") * 10)
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    words = [w.format(text=stages_text(trained), latin=tmp_path / "latin.txt", empty=tmp_path / "empty.txt") for w in words]
    _, err = stages.run(*words, status=2)
    assert err.count("\n") == 1 and err.startswith("error: ") and needle in err, err


def test_missing_and_damaged_tokenizers_and_checkpoints(stages, trained, tmp_path):
    import os
    import shutil
    empty = Stages(tmp_path / "empty", {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "empty")})
    assert "tok_train" in empty.run("scripts.base_train", status=2)[1]
    assert "no base checkpoint" in empty.run("scripts.base_loss", status=2)[1]
    shutil.copytree(stages.base, tmp_path / "copy")
    copy = Stages(tmp_path / "copy", {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "copy")})
    model = tmp_path / "copy" / "base_checkpoints" / "d1" / "model_000010.pt"
    model.write_bytes(model.read_bytes()[:-7])
    _, err = copy.run("scripts.base_loss", "--model_tag=d1", status=2)
    assert "damaged" in err and err.count("\n") == 1
    ranks = tmp_path / "copy" / "tokenizer" / "ranks.tiktoken"
    ranks.write_bytes(ranks.read_bytes()[:-9])
    assert "damaged" in copy.run("scripts.base_loss", "--model_tag=d1", status=2)[1]
    copy.run("scripts.tok_train", f"--data={stages_text(trained)}", "--vocab_size=420")
    assert "another tokenizer" in copy.run("scripts.base_loss", "--model_tag=two" if (tmp_path / "copy/base_checkpoints/two").exists()
                                           else "--model_tag=d1", status=2)[1]
