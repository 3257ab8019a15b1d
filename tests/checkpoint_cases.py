"""What the tests of checkpoints share: a tiny model with its tokenizer, saving it, damaging it."""
import os

import pytest
import torch

from nanochat.checkpoint import list_steps, read_meta, write_meta
from nanochat.checkpoint_manager import AsyncSave, build_model, checkpoint_dir, complete_steps
from nanochat.common import UserError, sha256
from nanochat.guard import Guard
from nanochat.parallel import Layout
from nanochat.tokenizer import Tokenizer

CONFIG = {
    "depth": 1,
    "width": 64,
    "heads": 1,
    "kv_heads": 1,
    "vocab_size": 280,
    "max_seq_len": 32,
}
TEXT = "the cat sat on the mat, the dog ran to the tree and back "


@pytest.fixture
def tokenizer(base_dir):
    tokenizer = Tokenizer.train_from_iterator([TEXT * 9], 280)
    tokenizer.save(base_dir / "tokenizer")
    return tokenizer


@pytest.fixture
def meta(tokenizer):
    return {
        "stage": "base_train",
        "model_class": "gpt",
        "config": CONFIG,
        "dtype": "float32",
        "tokenizer": tokenizer.fingerprint,
        "settings": {"depth": 1, "data": None},
        "elapsed": 1.5,
        "val_bpb": 2.25,
        "finished": False,
    }


@pytest.fixture
def folder(tokenizer):
    return checkpoint_dir("base", "d1")


def make(meta, steps=2):
    """A model and its optimizers after some steps of training on noise."""
    torch.manual_seed(1)
    model = build_model(meta, "cpu")
    optimizers = model.setup_optimizers()
    for _ in range(steps):
        train_step(model, optimizers)
    return model, optimizers


def train_step(model, optimizers):
    idx = torch.randint(0, 280, (2, 17))
    loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss.item()


def state_of(model, optimizers):
    """What a rank saves besides the weights."""
    return {
        "optimizers": Layout(model, optimizers).optimizer_state(),
        "loader": (1, 2, 3, 4),
        "rng": torch.get_rng_state(),
        "guard": Guard().state_dict(),
    }


def save(folder, step, meta, rank=0, model=None, optimizers=()):
    model = model or make(meta, 0)[0]
    AsyncSave(folder, step, model, state_of(model, optimizers), meta, rank).finish()


def save_with_a_forged_step(folder, meta, base_dir):
    """Save steps 1 to 5, of which the first names a file outside of its folder; returns that."""
    victim = base_dir / "victim"
    victim.write_text("a thesis", encoding="utf-8")
    for step in (1, 2, 3, 4, 5):
        save(folder, step, {**meta, "val_bpb": None})
    found = read_meta(folder, 1)
    write_meta(folder, {**found, "files": {**found["files"], "../../victim": "0" * 64}})
    return victim


def error_of(function, *arguments, **options):
    """The message of the UserError that a call raises; it is one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def problems(folder):
    """{step: why it is not complete, or None} of all steps of a folder."""
    return {step.step: step.problem for step in list_steps(folder)}


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def in_a_child(action):
    """Fork, run action() there, and return the child's number.

    Its status is 0, or 9 where the action failed.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of OpenMP did not come along
            action()
            os._exit(0)
        except BaseException:
            os._exit(9)
    return child


def must_be_whole(folder):
    """Every step that counts as complete has files with their hashes. Returns these steps."""
    for step in complete_steps(folder):
        for name, digest in read_meta(folder, step)["files"].items():
            assert sha256(folder / name) == digest, (step, name)
    return complete_steps(folder)
