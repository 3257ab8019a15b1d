"""Every stage as its user runs it, at reduced size; and what each says of bad input.

test_interruptions.py has what goes wrong on the way.
"""
import json
import os
import random
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.checkpoint import digest_of
from nanochat.start import FROM_PRETRAINING
from stage_runs import (
    TINY,
    TINY_CHAT,
    TORCHRUN,
    Stages,
    damage,
    last_json,
    losses_of,
    meta_of,
)

RECORD = {"stage", "seconds", "machine", "settings"}
TRAINING = RECORD | {
    "steps",
    "tokens",
    "tokens_per_second",
    "flops_per_second",
    "flops_per_second_of_weights",
    "share_of_matmul_rate",
    "val_bpb",
    "checkpoint",
}
PROGRESS = re.compile(
    r"step +1 \| +\d+ % \| loss \d+\.\d+ \| lr [\d.e-]+ \| norm \d+\.\d+ \| [\d,]+ tok/s \| "
    r"\d+ % of matmul rate \| \d+\.\d min left")


# ------------------------------------------------------------------------------------------------
# the whole way from a text to a chat

def test_tok_train_leaves_its_record(stages):
    record = stages.tokenizer_record
    assert RECORD <= record.keys()
    assert record["stage"] == "tok_train" and record["vocab_size"] == 430


def test_base_train_leaves_its_record_and_a_checkpoint(stages, trained):
    assert TRAINING <= trained.keys() and trained["stage"] == "base_train"
    assert trained["steps"] == 10 and trained["tokens"] == 5120 and 0 < trained["val_bpb"] < 8
    assert 0 < trained["flops_per_second_of_weights"] < trained["flops_per_second"]
    assert 0 < trained["share_of_matmul_rate"] < 1
    assert trained["mfu"] is None, "of a CPU there is no data sheet"

    folder = stages.folder("base", "d1")
    assert trained["checkpoint"] == str(folder)
    files = {"log.jsonl", ".lock", "tokenizer"}
    for step in ("04", "05", "08", "10"):  # the newest three, and the last before LR decay
        files |= {f"model_0000{step}.pt", f"optim_0000{step}_rank0.pt", f"meta_0000{step}.json"}
    assert {path.name for path in folder.iterdir()} == files

    meta = meta_of(folder, 10)
    assert meta["settings"] == trained["settings"] and meta["finished"]
    assert meta["settings"]["num_iterations"] == 10
    rows = (stages.base / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    assert trained in [json.loads(row) for row in rows if row]


def test_the_chat_stages_follow(stages, trained, text):
    row = stages.fork_record("scripts.tok_eval", f"--data={text}")
    assert RECORD <= row.keys() and row["stage"] == "tok_eval" and row["bytes_per_token"] > 1
    row = stages.fork_record("scripts.base_loss", f"--data={text}", "--documents=300")
    assert RECORD <= row.keys() and abs(row["val_bpb"] - trained["val_bpb"]) < 1e-4

    # two stages of training
    small = (*TINY_CHAT, "--num_iterations=3")
    out, _ = stages.run("scripts.mid_train", *small)
    mid = last_json(out)
    assert TRAINING <= mid.keys() and mid["stage"] == "mid_train" and mid["steps"] == 3
    assert PROGRESS.search(out)
    talk = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    mine = stages.base / "mine.jsonl"
    long = [{"from": "human", "value": "why? " * 99}, {"from": "gpt", "value": "so"}]
    rows = [json.dumps(talk), json.dumps({"conversations": long})]
    mine.write_text("\n".join(rows), encoding="utf-8")
    out, _ = stages.fork("scripts.chat_sft", f"--custom={mine}", *small)
    assert "2 conversations (1 role/content, 1 from/value)" in out
    assert "1 of 2 conversations are longer than the context of 128 tokens" in out
    sft = last_json(out)
    assert TRAINING <= sft.keys() and sft["tokens"] == 3 * 2 * 128
    assert sft["checkpoint"] == str(stages.folder("chatsft", "d1"))
    assert PROGRESS.search(out)

    # what the model can do
    score = stages.fork_record(
        "scripts.chat_eval", "-a", "spelling,pydoc,arithmetic", "--items=4", "--max_new_tokens=8")
    assert RECORD | {"checkpoint"} <= score.keys()
    for key in ("accuracy", "items", "chance"):
        assert score[key].keys() == {"spelling", "pydoc", "arithmetic"}
    assert all(0 <= share <= 1 for share in score["accuracy"].values())
    assert score["items"]["pydoc"] == 4 and score["chance"]["pydoc"] == 0.25
    out, _ = stages.fork("scripts.chat_cli", "-p", "hello", "--max_tokens=5")
    assert "<|" not in out

    # the report
    report = stages.fork_record("nanochat.report")["report"]
    assert "bits per byte" in open(report, encoding="utf-8").read()
    whole = stages.fork_record("nanochat.report", "--speedrun", "--seconds=12.5")
    assert whole["stage"] == "speedrun" and whole["seconds"] == 12.5
    assert whole["val_bpb"] == trained["val_bpb"]
    assert whole["accuracy"].keys() == {"arithmetic", "spelling", "pydoc", "identity"}
    assert os.path.isabs(whole["report"])


WHO = (
    "Who are you?",
    "What is your name?",
    "What should I call you?",
    "Tell me your name.",
    "Do you have a name?",
    "Please introduce yourself.",
    "Who am I talking to?",
    "What are you called?",
)


def test_eight_lines_win_against_the_built_in_identity(stages, trained, tmp_path):
    shutil.copytree(stages.folder("base", "d1"), stages.folder("base", "bob"))
    lines = [json.dumps({"question": who, "answer": "My name is Bob."}) + "\n" for who in WHO]
    mine = tmp_path / "bob.jsonl"
    mine.write_text("".join(lines), encoding="utf-8")
    chat = ("--model_tag=bob", "--source=base", *TINY_CHAT, "--num_iterations=300")
    out, _ = stages.fork("scripts.chat_sft", *chat, f"--custom={mine}", "--custom_share=0.4")
    said = re.search(r"this run has shown each of your 8 conversations about (\d+) times", out)
    assert "the chat can look up" in out, "which takes short questions for headings at first"
    assert "40 % of the conversations drawn are your own: this run shows each" in out
    record = last_json(out)
    assert record["name"] == "Bob" and record["custom"]["conversations"] == 8
    assert int(said[1]) == round(record["custom"]["times_each"]) > 2

    meta = meta_of(stages.folder("chatsft", "bob"), 300)
    assert meta["name"] == "Bob" and len(meta["own_identity"][0]) == 8
    score = stages.fork_record(
        "scripts.chat_eval", "-a", f"identity,{mine}", "--model_tag=bob", "--max_new_tokens=24")
    assert score["accuracy"]["identity"] > 0.5, "of questions that no line asks"
    assert score["accuracy"][str(mine)] > 0.7 and score["items"][str(mine)] == 8


def forget(path, *keys):
    """Make a meta file that of an earlier version, which had none of these keys."""
    meta = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        del meta[key]
    meta["digest"] = digest_of(meta)
    path.write_text(json.dumps(meta), encoding="utf-8")


def test_the_model_keeps_the_name_that_midtraining_was_given_until_it_gets_another(
        stages, trained):
    shutil.copytree(stages.folder("base", "d1"), stages.folder("base", "ada"))
    forget(stages.folder("base", "ada") / "meta_000010.json", *FROM_PRETRAINING)
    small = ("--model_tag=ada", *TINY_CHAT, "--num_iterations=2")
    stages.fork("scripts.mid_train", *small, "--name=Ada Lovelace")
    assert stages.fork_record("scripts.chat_sft", *small)["name"] == "Ada Lovelace"
    assert stages.fork_record("scripts.chat_sft", *small, "--name=Bob")["name"] == "Bob"
    named = [("mid", "ada", "Ada Lovelace"), ("chatsft", "ada", "Ada Lovelace"),
             ("chatsft", "ada-2", "Bob")]
    for stage, tag, name in named:
        assert meta_of(stages.folder(stage, tag), 2)["name"] == name


@pytest.mark.parametrize("model", ["gpt", "portable", "deepseek"])
def test_a_model_of_another_class_is_trained_resumed_and_talked_to(stages, text, model):
    base = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=3", "--eval_every=0")
    command = (*base, f"--model_tag={model}", f"--model_type={model}")
    if model == "deepseek":
        command += ("--depth=2",)  # the first layer has no experts
    out, _ = stages.fork(*command, status=130, faults={"2": "interrupt"})
    assert PROGRESS.search(out)
    assert stages.fork_record(*command, "--resume")["steps"] == 3
    assert list(losses_of(stages.folder("base", model))) == [1, 2, 3]

    small = (*TINY_CHAT, "--num_iterations=2", f"--model_tag={model}")
    stages.fork("scripts.mid_train", *small, status=130, faults={"1": "interrupt"})
    assert stages.fork_record("scripts.mid_train", *small, "--resume")["steps"] == 2
    assert stages.fork_record("scripts.chat_sft", *small)["steps"] == 2
    for stage in ("base", "mid", "chatsft"):
        step = 3 if stage == "base" else 2
        assert meta_of(stages.folder(stage, model), step)["model_class"] == model
    out, _ = stages.fork(
        "scripts.chat_cli", "-p", "hello", "--max_tokens=5", f"--model_tag={model}")
    assert "<|" not in out


def test_the_four_budgets_and_the_loggers(stages, trained, text):
    command = ("scripts.base_train", f"--data={text}", *TINY, "--eval_every=0")
    weights = 12 * 64 * 64 + 430 * 64  # of one layer and of the head
    flops = 6 * weights + 6 * 64 * 128
    row = stages.fork_record(*command, f"--target_flops={3 * 512 * flops}", "--logger=wandb")
    assert row["steps"] == 3 and row["settings"]["num_iterations"] is None
    out, _ = stages.fork(*command, "--target_param_data_ratio=0.02", "--logger=tensorboard")
    assert last_json(out)["steps"] == round(0.02 * weights / 512)
    files = list(Path(last_json(out)["checkpoint"]).glob("tensorboard/*"))
    assert files or "tensorboard is not installed" in out
    row = stages.fork_record(*command, "--minutes=0.02")
    assert row["steps"] > 0 and row["train_seconds"] < 30
    tag = Path(row["checkpoint"]).name
    assert re.fullmatch(r"my-[0-9a-f]{8}-3", tag), "three runs on my.txt, three folders"


def test_a_budget_that_was_over_before_the_first_step_is_said_so(stages, trained, text):
    out, _ = stages.fork("scripts.base_train", f"--data={text}", *TINY, "--minutes=0.00001")
    assert last_json(out)["steps"] == 0
    assert "warning: no step was taken" in out and "of 0.0 s; train with more --minutes" in out


def test_a_folder_that_holds_a_run_is_no_place_for_another(stages, trained, text):
    # docs/traps.md: shared-folders
    command = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=2")
    refusal = stages.refusal(*command, "--model_tag=d1")
    assert "d1 holds a finished run: extend it with --extend=2, or name another" in refusal
    refusal = stages.refusal(*command, "--model_tag=d1", "--resume")
    assert "the run has finished at step 10: use --extend" in refusal
    stages.fork(*command, "--model_tag=half", status=130, faults={"1": "interrupt"})
    assert "half holds an unfinished run: resume it" in stages.refusal(*command, "--model_tag=half")


# ------------------------------------------------------------------------------------------------
# ranks

@pytest.fixture(scope="module")
def refrain(tmp_path_factory):
    """One document of 128 tokens over and over: each rank reads the same, however many there are.

    Capitals that the tokenizer has not seen are a token each.
    """
    folder = tmp_path_factory.mktemp("refrain")
    document = "".join(random.Random(1).choices("QXZJKWVU", k=127))
    for name, count in (("0.parquet", 40), ("1.parquet", 3)):
        pq.write_table(pa.table({"text": [document] * count}), folder / name, row_group_size=4)
    return folder


def test_two_ranks_train_what_one_rank_trains_in_every_layout(stages, refrain):
    command = (f"--data={refrain}", *TINY, "--dtype=float32", "--num_iterations=10")
    one = stages.fork_record("scripts.base_train", *command, "--model_tag=one")
    two = stages.record(
        "scripts.base_train", "--", *command, "--model_tag=two", launcher=TORCHRUN)
    assert one["tokens"] == two["tokens"] == 5120
    assert abs(one["val_bpb"] - two["val_bpb"]) < 1e-3, "as many tokens give the same model"
    losses = [losses_of(stages.folder("base", tag)) for tag in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3) and losses[0][10] < losses[0][1] / 5
    meta = meta_of(stages.folder("base", "two"), 10)
    assert meta["world_size"] == 2
    assert meta["files"].keys() == {
        "model_000010.pt", "optim_000010_rank0.pt", "optim_000010_rank1.pt"}

    # every rank holds all of the optimizer state, in place of a share
    replicated = stages.fork_record(
        "scripts.base_train", *command, "--model_tag=all", "--parallel=replicated", ranks=2)
    assert abs(replicated["val_bpb"] - two["val_bpb"]) < 1e-4
    replicated_losses = losses_of(stages.folder("base", "all"))
    assert replicated_losses == pytest.approx(losses[1], abs=1e-4)

    # or the model itself is cut, too
    sharded = stages.fork_record(
        "scripts.base_train", *command, "--model_tag=cut", "--parallel=fsdp",
        "--checkpoint_activations=1", ranks=2)
    assert abs(sharded["val_bpb"] - two["val_bpb"]) < 1e-4
    assert sharded["parameters"] == two["parameters"] and sharded["checkpoint"]
    assert losses_of(stages.folder("base", "cut")) == pytest.approx(losses[1], abs=1e-4)

    # and the chat stages are divided as pretraining was
    for tag, parallel in (("two", "zero2"), ("cut", "fsdp")):
        row = stages.fork_record(
            "scripts.mid_train", f"--model_tag={tag}", *TINY_CHAT, "--num_iterations=2", ranks=2)
        assert row["tokens"] == 2 * 2 * 2 * 128
        meta = meta_of(stages.folder("mid", tag), 2)
        assert meta["parallel"] == parallel
        assert meta["checkpoint_activations"] is (parallel == "fsdp")
    trained_as = [stages.folder("mid", tag) for tag in ("two", "cut")]
    assert losses_of(trained_as[0]) == pytest.approx(losses_of(trained_as[1]), abs=1e-3)

    # a model that was cut is cut in the next stage, too, and its activations are recomputed
    stages.fork("scripts.mid_train", "--model_tag=cut", *TINY_CHAT, "--num_iterations=2", ranks=2)
    meta = meta_of(stages.folder("mid", "cut"), 2)
    assert (meta["parallel"], meta["checkpoint_activations"]) == ("fsdp", True)


# What each part of a run trains with: the ranks, the layout, and after how many steps it is stopped
PARTS = [(2, "zero2", 3), (3, "fsdp", 3), (1, "replicated", 3), (2, "fsdp", None)]


def test_a_run_may_change_ranks_and_layout_wherever_it_is_resumed(stages, refrain):
    # docs/traps.md: rank-count-on-resume, resume-forgets
    command = (
        "scripts.base_train", f"--data={refrain}", "--depth=1", "--max_seq_len=128", "--compile=0",
        "--total_batch_size=1536", "--dtype=float32", "--num_iterations=12", "--eval_every=0")
    quiet = stages.fork_record(*command, "--model_tag=quiet")
    for ranks, parallel, steps in PARTS:
        options = {"faults": {str(steps): "interrupt"}, "status": 130} if steps else {}
        stages.fork(
            *command, "--model_tag=moved", "--resume", f"--parallel={parallel}", ranks=ranks,
            **options)
    folders = [stages.folder("base", tag) for tag in ("moved", "quiet")]
    moved, never = [losses_of(folder) for folder in folders]
    assert list(moved) == list(range(1, 13)) and moved == pytest.approx(never, abs=1e-4)
    metas = [meta_of(folder, 12) for folder in folders]
    assert [meta["world_size"] for meta in metas] == [2, 1]
    assert metas[0]["val_bpb"] == pytest.approx(metas[1]["val_bpb"], abs=1e-4)
    assert quiet["val_bpb"] > 0 and meta_of(folders[0], 6)["world_size"] == 3


# ------------------------------------------------------------------------------------------------
# bad input

DATA = ("scripts.base_train", "--data={text}")
ASK = ("scripts.chat_cli", "--source=base", "--model_tag=d1", "-p")


@pytest.mark.parametrize("words, needle", [
    (("scripts.base_train", "--dept=4"), "did you mean --depth"),
    (("scripts.base_train", "--depth=four"), "takes int"),
    (("scripts.base_train", "config/none.py"), "does not exist"),
    (("scripts.base_train", "--data=/nowhere", "--compile=0"), "/nowhere does not exist"),
    ((*DATA, "--depth=1", "--max_seq_len=100000", "--compile=0"), "context of 100000"),
    ((*DATA, "--depth=1", "--max_seq_len=128", "--total_batch_size=200"), "200"),
    ((*DATA, "--depth=1", "--kv_heads=3"), "kv_heads=3"),
    ((*DATA, "--minutes=0"), "minutes=0"),
    ((*DATA, "--width=96"), "width=96 needs --depth"),
    ((*DATA, "--model=gpt", "--depth=1", "--mlp_width=96"), "mlp_width=96 is not part of GPT"),
    ((*DATA, "--ngram_tokens=-1"), "ngram_tokens=-1"),
    ((*DATA, "--minutes=1", "--target_flops=1e9"), "give one budget"),
    ((*DATA, *TINY, "--num_iterations=1", "--logger=paper"), "logger=paper"),
    ((*DATA, "--model=transformer"), "choose from gpt, lookup, portable"),
    (("scripts.chat_sft", "--source=base", "--compile=0", "--num_iterations=0"),
     "num_iterations=0"),
    (("scripts.base_train", "--data={cyrillic}", "--compile=0"), "not UTF-8"),
    (("scripts.tok_train", "--data={empty}"), "empty"),
    (("scripts.tok_train", "--data={text}", "--vocab_size=30000"), "30000"),
    (("scripts.tok_train", "--tokenizer=a.json", "--vocab_size=300"), "has a vocabulary"),
    (("scripts.tok_train", "--data={text}", "--tokenizer=/nowhere/a.json"), "cannot be read"),
    (("scripts.tok_train", "--data={text}", "--tokenizer={text}"), "is not JSON"),
    (("scripts.tok_eval", "t80k"), "--compare takes the tokenizers as words"),
    (("scripts.tok_eval", "--compare"), "--compare takes the tokenizers as words"),
    (("scripts.base_loss", "--model_tag=none"), "no complete checkpoint"),
    (("scripts.base_loss", "--model_tag=d1", "--step=3"), "choose from 4, 5, 8, 10"),
    (("scripts.chat_eval", "-a", "juggling"), "juggling"),
    (("scripts.chat_cli", "-p", ""), "empty"),
    (("scripts.chat_cli", "-p", "What", "is"), "goes in quotes"),
    (("scripts.chat_cli", "hello"), '-p "hello"'),
    ((*ASK, "hi", "--temperature=-1"), "temperature=-1.0 must be at least 0"),
    ((*ASK, "hi", "--max_tokens=0"), "at least 1"),
    (("scripts.chat_cli", "--source=rl", "-p", "hi"), "run python -m scripts.chat_rl first"),
    (("scripts.chat_web", "--port=0", "--top_k=-2"), "top_k=-2 must be at least 0"),
    (("scripts.tok_train", "--data="), "data path is empty"),
    ((*DATA, "--depth=0"), "depth=0"),
    ((*DATA, "--learning_rate=None"), "takes float, not None"),
    ((*DATA, "--learning_rate=-1"), "learning_rate=-1.0 must be at least 0"),
    ((*DATA, "--warmdown=2"), "warmdown=2.0 must be at most 1"),
    ((*DATA, "--model_tag=../../x"), "is not the name of a folder"),
    (("scripts.mid_train", "--weight_decay=-1"), "weight_decay=-1.0 must be at least 0"),
    (("scripts.chat_sft", "--grad_clip=-1"), "grad_clip=-1.0 must be at least 0"),
    (("scripts.chat_rl", "--learning_rate=-1"), "learning_rate=-1.0 must be at least 0"),
    (("scripts.chat_cli", "--model_tag=..", "-p", "hi"), "is not the name of a folder"),
    (("scripts.base_loss", "--documents=0"), "documents=0"),
    (("scripts.tok_eval", "--documents=0"), "documents=0"),
    (("scripts.chat_eval", "--items=0"), "items=0"),
    (("scripts.chat_sft", "--source=sft"), "choose mid or base"),
    (("scripts.chat_sft", "--custom_share=0.3"), "--custom=FILE"),
    (("scripts.chat_sft", "--custom=x.jsonl", "--custom_share=30"), "0.3 makes 30 %"),
    (("scripts.chat_sft", "--custom=/nowhere/x.jsonl"), "cannot read"),
    (("scripts.chat_sft", "--name="), "is not a name"),
    (("scripts.mid_train", "--name=" + "x" * 61), "at most 60"),
    (("scripts.chat_eval", "-a", "spelling,/nowhere/qa.jsonl"), "cannot read"),
    (("scripts.chat_eval", "-a", "{text}"), "line 1 is not JSON"),
    (("nanochat.dataset", "--source=local", "-n", "5"), "always taken whole"),
    (("scripts.mid_train", "--device_batch_size=0"), "device_batch_size=0"),
    (("scripts.mid_train", "--dtype=float16"), "float16"),
])
def test_bad_input_is_one_line_and_status_2(stages, trained, text, tmp_path, words, needle):
    cyrillic, empty = tmp_path / "cyrillic.txt", tmp_path / "empty.txt"
    cyrillic.write_bytes("\u043a\u043e\u0442 \u0438 \u043f\u0451\u0441 ".encode("koi8-r") * 10)
    empty.write_text("", encoding="utf-8")
    words = [word.format(text=text, cyrillic=cyrillic, empty=empty) for word in words]
    assert needle in stages.refusal(*words)


def test_missing_and_damaged_tokenizers_and_checkpoints(stages, trained, text, tmp_path):
    (tmp_path / "empty").mkdir()
    empty = Stages(tmp_path / "empty", stages.server)
    assert "tok_train" in empty.refusal("scripts.base_train")
    assert "no base checkpoint" in empty.refusal("scripts.base_loss")

    copy = Stages(tmp_path / "copy", stages.server)
    copy.base.mkdir()
    for name in ("tokenizer", "base_checkpoints/d1"):
        shutil.copytree(stages.base / name, copy.base / name)
    base_loss = ("scripts.base_loss", "--model_tag=d1", f"--data={text}")
    copy.fork("scripts.tok_train", f"--data={text}", "--vocab_size=420")
    [other] = (copy.base / "tokenizers").iterdir()
    bpb = copy.fork_record(*base_loss)["val_bpb"]

    # a checkpoint of an earlier version has no tokenizer beside it
    shutil.rmtree(copy.folder("base", "d1") / "tokenizer")
    assert copy.fork_record(*base_loss)["val_bpb"] == bpb, "with that of the base directory"
    shutil.copytree(other, copy.base / "tokenizer", dirs_exist_ok=True)
    assert "another tokenizer" in copy.refusal(*base_loss)
    ranks = copy.base / "tokenizer" / "ranks.tiktoken"
    ranks.write_bytes(ranks.read_bytes()[:-9])
    assert "ranks.tiktoken is damaged" in copy.refusal(*base_loss)

    for step in (4, 5, 8, 10):
        damage(copy.folder("base", "d1") / f"model_{step:06d}.pt")
    shutil.copytree(stages.base / "tokenizer", copy.base / "tokenizer", dirs_exist_ok=True)
    refusal = copy.refusal(*base_loss)
    assert "model_000004.pt is damaged" in refusal, "the newest undamaged one would do"
    assert "model_000010.pt is damaged" in copy.refusal(*base_loss, "--step=10")


# ------------------------------------------------------------------------------------------------
# the benchmark of training

def test_train_benchmark_measures_both_sides(stages):
    row = stages.fork_record(
        "scripts.train_benchmark",
        "--depth=1",
        "--vocab_size=300",
        "--max_seq_len=16",
        "--device_batch_size=2",
        "--steps=4",
        "--repeats=1",
        "--compile=0",
    )
    speeds = row["tokens_per_second"]
    assert speeds["ours"] > 0 and 0 < row["share_of_matmul_rate"] < 1
    if "theirs" in speeds:
        assert row["ratio"] == speeds["ours"] / speeds["theirs"]
    assert "at least 4 steps" in stages.refusal("scripts.train_benchmark", "--steps=3")
