"""The documented shape of 28 layers through all stages, at a width and a vocabulary for a CPU."""
import pytest

from conftest import ROOT
from stage_runs import TINY_CHAT, losses_of, meta_of

# Ten steps of the real width would take minutes on two cores: 28 layers stay, with the shape's
# grouped queries, SwiGLU and tied head, at an eighth of the width.
SHAPE = (
    str(ROOT / "config" / "yxanul_197m.py"),
    "--width=64", "--mlp_width=224", "--max_seq_len=128", "--total_batch_size=256", "--compile=0",
    "--fp8=none", "--device_batch_size=2", "--model_tag=yxanul", "--num_iterations=10",
    "--eval_every=0")


def test_28_layers_are_trained_resumed_in_mid_stage_and_evaluated(stages, text):
    base = ("scripts.base_train", *SHAPE, f"--data={text}")
    stages.fork(*base, status=130, faults={"6": "interrupt"})
    row = stages.fork_record(*base, "--resume")
    assert row["steps"] == 10
    folder = stages.folder("base", "yxanul")
    losses = losses_of(folder)
    assert list(losses) == list(range(1, 11)) and losses[10] < losses[1] - 0.5
    config = meta_of(folder, 10)["config"]
    assert (config["depth"], config["heads"], config["kv_heads"]) == (28, 8, 2)
    assert config["tied"] and config["mlp_width"] == 224

    chat = (*TINY_CHAT, "--num_iterations=10", "--model_tag=yxanul")
    stages.fork("scripts.mid_train", *chat, status=130, faults={"4": "interrupt"})
    assert stages.fork_record("scripts.mid_train", *chat, "--resume")["steps"] == 10
    assert stages.fork_record("scripts.chat_sft", *chat)["steps"] == 10
    assert meta_of(stages.folder("chatsft", "yxanul"), 10)["config"] == config

    loss = stages.fork_record("scripts.base_loss", f"--data={text}", "--model_tag=yxanul")
    assert loss["val_bpb"] == pytest.approx(row["val_bpb"], abs=1e-3)
