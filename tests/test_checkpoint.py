"""A checkpoint is whole or not there, and says what is wrong with it in one line."""
import json
import os
import random
import signal
import time

import pytest
import torch

from checkpoint_cases import (  # noqa: F401 - fixtures among them
    CONFIG,
    error_of,
    flip_a_byte,
    folder,
    in_a_child,
    make,
    meta,
    must_be_whole,
    problems,
    save,
    save_with_a_forged_step,
    state_of,
    tokenizer,
    train_step,
)
from nanochat import checkpoint, checkpoint_manager
from nanochat.checkpoint import (
    damaged_files,
    digest_of,
    load_checkpoint,
    read_meta,
    save_checkpoint,
    upgrade_meta,
    verify_files,
    write_meta,
)
from nanochat.checkpoint_manager import (
    AsyncSave,
    CheckpointManager,
    build_model,
    complete_steps,
    load_model,
    lock_folder,
    prune,
    read_checkpoint,
)
from nanochat.common import sha256, warn_once
from nanochat.parallel import Layout

# --------------------------------------------------------------------------------------------------
# save and load


def test_saving_and_loading_one_step(folder, meta):
    model, optimizers = make(meta)
    save_checkpoint(folder, 3, model, state_of(model, optimizers), meta)
    weights, state, found = load_checkpoint(folder, 3, rank=0)
    assert found["step"] == 3 and found["format"] == 3 and found["world_size"] == 1
    assert state["loader"] == (1, 2, 3, 4)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert load_checkpoint(folder, 3)[1] is None
    assert "meta_000004.json is missing" in error_of(load_checkpoint, folder, 4)


def test_files_have_the_documented_names_and_plain_keys(folder, meta):
    save(folder, 7, meta)
    names = ["meta_000007.json", "model_000007.pt", "optim_000007_rank0.pt"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert folder.parent.name == "base_checkpoints"
    weights = torch.load(folder / "model_000007.pt", weights_only=True)
    assert "embed.weight" in weights and not any("_orig_mod" in key for key in weights)
    hashes = json.loads((folder / "meta_000007.json").read_text(encoding="utf-8"))["files"]
    assert hashes.keys() == {"model_000007.pt", "optim_000007_rank0.pt"}


def test_loaded_tensors_are_mapped_and_a_change_to_one_never_changes_the_file(folder, meta):
    model, optimizers = make(meta)
    save(folder, 5, meta, model=model, optimizers=optimizers)
    before = {path.name: sha256(path) for path in folder.iterdir()}
    weights, state, _ = read_checkpoint(folder, rank=0)
    for tensor in weights.values():
        tensor.fill_(7)
    state["rng"].fill_(7)

    model = load_model("base", "cpu")[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert {name: sha256(folder / name) for name in before} == before


def test_a_mapped_model_trains_as_a_copied_one(folder, meta):
    model, optimizers = make(meta)
    save(folder, 2, meta, model=model, optimizers=optimizers)
    losses = []
    for phase in ("train", "eval"):  # copied, mapped
        loaded = load_model("base", "cpu", phase)[0]
        optimizers = loaded.setup_optimizers()
        torch.manual_seed(3)
        losses.append([train_step(loaded.train(), optimizers) for _ in range(3)])
    assert losses[0] == losses[1]
    assert must_be_whole(folder) == [2]


def fit_the_hash(folder, name):
    """Write the hash that a file of step 5 has now into its meta file, as a forger does."""
    found = read_meta(folder, 5)
    found["files"][name] = sha256(folder / name)
    write_meta(folder, found)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran-on-load",)


def test_loading_runs_no_code_from_the_file(folder, meta, tmp_path, monkeypatch):
    # docs/traps.md: unsafe-load
    monkeypatch.chdir(tmp_path)
    save(folder, 5, meta)
    torch.save({"embed.weight": Evil()}, folder / "model_000005.pt")
    fit_the_hash(folder, "model_000005.pt")
    assert "is no file of a checkpoint (UnpicklingError)" in error_of(read_checkpoint, folder)
    assert not (tmp_path / "ran-on-load").exists()


# --------------------------------------------------------------------------------------------------
# what is not complete


def test_a_step_without_its_meta_file_is_not_there(folder, meta):
    # docs/traps.md: meta-written-last
    save(folder, 5, meta)
    save(folder, 9, meta)
    (folder / "meta_000009.json").unlink()
    assert complete_steps(folder) == [5] and read_checkpoint(folder)[2]["step"] == 5
    assert "choose from 5" in error_of(read_checkpoint, folder, 9)


def test_a_crash_before_the_meta_file_leaves_the_old_step_as_the_latest(folder, meta, monkeypatch):
    # docs/traps.md: meta-written-last
    save(folder, 5, meta)
    write = checkpoint.atomic_write

    def crash_at_meta(path, data):
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "atomic_write", crash_at_meta)
    with pytest.raises(OSError):
        save(folder, 9, meta)
    assert (folder / "model_000009.pt").exists() and complete_steps(folder) == [5]


def test_a_full_disk_between_the_files_leaves_no_step_and_no_temporary_file(
    folder, meta, monkeypatch
):
    # docs/traps.md: meta-written-last
    save(folder, 5, meta)
    rename = os.replace

    def full_at_the_optimizer(source, target):
        if "optim" in str(target):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", full_at_the_optimizer)
    with pytest.raises(OSError):
        save(folder, 9, meta)
    assert complete_steps(folder) == [5] and not list(folder.glob("*.tmp"))


DAMAGES = ["", "{", "[1]", '{"files": {}}', '{"files": {"model_000009.pt": "0"}, "saved": 9}']


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_meta_file_is_no_meta_file(folder, meta, damage):
    # docs/traps.md: meta-written-last
    save(folder, 5, meta)
    (folder / "meta_000009.json").write_text(damage, encoding="utf-8")
    assert complete_steps(folder) == [5]


def test_a_step_whose_other_files_are_missing_is_not_there(folder, meta):
    save(folder, 5, meta)
    (folder / "model_000005.pt").unlink()
    assert complete_steps(folder) == []
    assert "scripts.base_train" in error_of(load_model, "base", "cpu", model_tag="d1")


def test_the_latest_is_the_last_saved_and_not_the_highest_number(folder, meta):
    # docs/traps.md: meta-written-last
    save(folder, 900, meta)
    save(folder, 40, meta)  # a later, shorter run in the same folder
    assert complete_steps(folder) == [900, 40] and read_checkpoint(folder)[2]["step"] == 40
    assert read_checkpoint(folder, 900)[2]["step"] == 900


def test_a_byte_flipped_anywhere_in_a_meta_file_is_named_or_harmless(folder, meta):
    save(folder, 4, meta)
    save(folder, 5, meta)
    path = folder / "meta_000005.json"
    good = path.read_bytes()
    found = read_meta(folder, 5)
    del found["digest"]
    for place in range(len(good)):
        flipped = bytes([good[place] ^ 1])
        path.write_bytes(good[:place] + flipped + good[place + 1:])
        problem = problems(folder)[5]
        if problem is None:
            seen = read_meta(folder, 5)
            assert {key: seen.get(key) for key in found} == found
        else:
            assert "meta_000005.json is damaged" in problem
            assert complete_steps(folder) == [4]


# --------------------------------------------------------------------------------------------------
# kills and failing disks


def test_killed_at_every_write_sync_and_rename_a_save_leaves_the_step_before_it(folder, meta):
    model, optimizers = make(meta, 1)
    save(folder, 1, meta, model=model, optimizers=optimizers)
    moments = [
        (os, "fsync"),
        (os, "replace"),
        (os, "chmod"),
        (torch, "save"),
        (checkpoint, "atomic_write"),
    ]
    died = 0
    for module, name in moments:
        for count in range(1, 7):
            def save_and_die():
                real, calls = getattr(module, name), iter(range(1, 99))

                def call(*arguments, **options):
                    if next(calls) == count:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **options)

                setattr(module, name, call)
                save(folder, 2, meta, model=model, optimizers=optimizers)

            status = os.waitstatus_to_exitcode(os.waitpid(in_a_child(save_and_die), 0)[1])
            died += status == -signal.SIGKILL
            # the last sync is that of the folder, when the meta file already has its name
            done = not status or (name, count) == ("fsync", 6)
            assert must_be_whole(folder) == ([1, 2] if done else [1])
            for path in folder.glob("*_000002*"):
                path.unlink()
    # three files are each synced, made readable, renamed and their name synced; torch saves two
    # of them, the third is the meta file
    assert died == 15


def test_killed_at_a_hundred_random_moments_all_complete_steps_are_whole(folder, meta):
    """A run that saves, completes and prunes; whatever it had completed stays, or is superseded."""
    model, optimizers = make(meta, 1)
    save(folder, 0, {**meta, "val_bpb": 1.5}, model=model, optimizers=optimizers)
    moment, wait, newest = random.Random(1), 0.02, 0

    def save_for_ever():
        run = CheckpointManager(folder, 0)
        for step in range(newest + 1, newest + 99):
            run.save(step, model, state_of(model, optimizers), meta)
            run.finish()

    for _ in range(100):
        child = in_a_child(save_for_ever)
        time.sleep(2 * wait * moment.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps = must_be_whole(folder)
        assert steps and steps[-1] >= newest, "what was complete once stays, or a newer one does"
        assert steps[0] == 0, "the best by validation is never deleted"
        # however fast the machine is, half the children complete a step
        wait *= 0.8 if steps[-1] > newest else 1.25
        newest = steps[-1]
    assert newest > 10


FAILURES = [
    (28, "No space left on device"),
    (5, "Input/output error"),
    (30, "Read-only file system"),
]


@pytest.mark.parametrize("number, message", FAILURES)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_steps_before(
    folder, meta, monkeypatch, number, message, call
):
    save(folder, 5, meta)

    def fail(*arguments):
        raise OSError(number, message)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=message):
        save(folder, 9, meta)
    monkeypatch.undo()
    assert must_be_whole(folder) == [5] and not list(folder.glob("*.tmp"))


def test_a_step_that_is_saved_again_is_never_half_of_two_runs(folder, meta):
    """A run that starts again in a folder and is killed while it saves must not leave the meta file
    of the other run beside its own weights."""
    save(folder, 5, meta, model=make(meta, 0)[0])

    def killed_at_the_optimizer():
        rename = os.replace

        def replace(source, target):
            if "optim" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = replace
        save(folder, 5, meta, model=make(meta, 0)[0])

    os.waitpid(in_a_child(killed_at_the_optimizer), 0)
    assert must_be_whole(folder) == [] and list(folder.glob("*.tmp"))
    lock_folder(folder, 0).close()
    assert not list(folder.glob("*.tmp")), "the next run deletes what a killed one left"


def test_weights_that_are_not_finite_are_not_saved(folder, meta):
    model = make(meta, 0)[0]
    model.embed.weight.data[0, 0] = torch.inf
    with pytest.raises(OSError, match="step 2 was not saved in .* are not finite .embed.weight."):
        save_checkpoint(folder, 2, model, None, meta)
    assert complete_steps(folder) == [] and not list(folder.glob("*_000002*"))


# --------------------------------------------------------------------------------------------------
# verify


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read to verify them."""
    names = []

    def recording(path):
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr(checkpoint, "sha256", recording)
    return names


def make_old(folder, seconds=100):
    """Let the files of a folder have been written some time ago."""
    for path in folder.glob("*.pt"):
        modified = path.stat().st_mtime - seconds
        os.utime(path, (modified, modified))


def test_a_file_that_was_verified_is_read_again_only_when_it_changed(folder, meta, read):
    save(folder, 5, meta)
    make_old(folder)
    names = ["model_000005.pt", "optim_000005_rank0.pt"]
    read.clear()
    for _ in range(2):
        read_checkpoint(folder, rank=0)
    assert read == names, "at the first start, and not at the second"
    read.clear()
    found = read_meta(folder, 5)
    assert verify_files(folder, found, names) == [] and read == names, "always"

    # a changed time, the same contents
    read.clear()
    os.utime(folder / names[0], (5, 5))
    assert damaged_files(folder, found, names) == [] and read == [names[0]]

    # other contents; the damage is not forgotten
    flip_a_byte(folder / names[1])
    make_old(folder)
    for _ in range(2):
        assert damaged_files(folder, found, names) == [names[1]]
    assert "optim_000005_rank0.pt is damaged" in error_of(read_checkpoint, folder, rank=0)

    # other contents of the same size and time are found by verify_files, and remembered
    modified = (folder / names[0]).stat().st_mtime_ns
    flip_a_byte(folder / names[0])
    os.utime(folder / names[0], ns=(modified, modified))
    assert damaged_files(folder, found, names[:1]) == []
    assert verify_files(folder, found, names[:1]) == names[:1]
    assert damaged_files(folder, found, names[:1]) == names[:1]


def test_a_file_written_a_moment_ago_is_not_remembered_as_verified(folder, meta, read):
    """It may change again within the resolution of the file system's clock."""
    save(folder, 5, meta)
    read.clear()
    for _ in range(2):
        read_checkpoint(folder)
    assert read == ["model_000005.pt"] * 2


@pytest.mark.parametrize("content", ["", "[1]", '{"model_000005.pt": 3, "gone.pt": [1, 2, "3"]}'])
def test_a_damaged_record_of_verified_files_is_ignored(folder, meta, content):
    save(folder, 5, meta)
    make_old(folder)
    record = folder / ".verified.json"
    record.write_text(content, encoding="utf-8")
    assert read_checkpoint(folder)[2]["step"] == 5
    assert json.loads(record.read_text(encoding="utf-8")).keys() == {"model_000005.pt"}


def test_a_folder_that_cannot_be_written_to_can_be_loaded_from(folder, meta, monkeypatch):
    save(folder, 5, meta)

    def read_only(path, data):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoint, "atomic_write", read_only)
    for _ in range(2):
        assert read_checkpoint(folder, rank=0)[2]["step"] == 5
    assert not (folder / ".verified.json").exists()


# --------------------------------------------------------------------------------------------------
# formats

FULL_CONFIG = {**CONFIG, "softcap": 15.0, "rotary_base": 10000.0}


def write_format_1(folder, meta, ngrams, model_class):
    """A step as version 1 wrote it. The class was gpt, and the config said what was in it.

    model_class: what that class is called today; the keys of its state dict are the same.
    """
    config = {**FULL_CONFIG, "ngrams": ngrams}
    today = config if ngrams else FULL_CONFIG
    model = make({**meta, "model_class": model_class, "config": today}, 0)[0]
    for buffer in model.ngrams.buffers() if ngrams else ():
        buffer.zero_()  # nothing was counted
    save(folder, 5, {**meta, "model_class": "gpt", "config": config}, model=model)
    path = folder / "meta_000005.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written.pop("format") == 3
    del written["digest"]
    write_meta(folder, written)
    return model


@pytest.mark.parametrize("ngrams, model_class", [(0, "lookup"), (3, "lookup_ngrams")])
def test_format_1_is_read(folder, meta, ngrams, model_class):
    model = write_format_1(folder, meta, ngrams, model_class)
    loaded, _, found = load_model("base", "cpu")
    assert found["format"] == 3 and found["model_class"] == model_class
    assert found["config"] == ({**FULL_CONFIG, "ngrams": 3} if ngrams else FULL_CONFIG)
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_upgrading_a_meta_file_changes_neither_its_argument_nor_anything_else():
    old = {"model_class": "gpt", "config": {"depth": 3, "ngrams": 0}, "step": 7, "stage": "x"}
    copy = json.loads(json.dumps(old))
    new = upgrade_meta(old)
    assert old == copy
    assert new == {**old, "format": 3, "model_class": "lookup", "config": {"depth": 3}}
    assert upgrade_meta(new) == new
    assert upgrade_meta({**old, "format": 2}) == {**old, "format": 3}
    assert upgrade_meta({**old, "config": {"depth": 3}})["model_class"] == "lookup"
    counted = {"depth": 3, "ngrams": 9}
    new = upgrade_meta({**old, "config": counted})
    assert new["model_class"] == "lookup_ngrams" and new["config"] == counted


def save_as_format_2(folder, meta, model, optimizers):
    """Step 5 as version 2 wrote it: with the state_dict() of each optimizer of a rank."""
    state = state_of(model, [])
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    AsyncSave(folder, 5, model, state, meta, 0).finish()
    write_meta(folder, {**read_meta(folder, 5), "format": 2})


def test_format_2_is_read_by_as_many_ranks(folder, meta, monkeypatch):
    # docs/traps.md: rank-count-on-resume
    model, optimizers = make(meta)
    save_as_format_2(folder, meta, model, optimizers)
    weights, state, found = read_checkpoint(folder, rank=0)
    assert found["format"] == 3 and found["step"] == 5
    again = build_model(found, "cpu")
    again.load_state_dict(weights)
    fresh = again.setup_optimizers()
    Layout(again, fresh).load_optimizer_state(state["optimizers"])
    losses = []
    for pair in ((model, optimizers), (again, fresh)):
        torch.manual_seed(3)
        losses.append([train_step(*pair) for _ in range(3)])
    assert losses[0] == losses[1]

    monkeypatch.setattr(checkpoint_manager, "get_dist_info", lambda: (True, 0, 0, 3))
    message = error_of(read_checkpoint, folder, rank=0)
    assert "saved by 1 ranks of an earlier version" in message and "this run has 3" in message
    assert read_checkpoint(folder)[1] is None, "for its weights, any number will do"


CHANGES = [
    ({"format": 4}, "format 4"),
    ({"format": "new"}, "format new"),
    ({"model_class": "mamba"}, "model_class=mamba is unknown"),
    ({"config": {**CONFIG, "wings": 2, "tail": 1}}, "(tail, wings)"),
    ({"config": {**CONFIG, "width": 128}}, "the weights of the checkpoint do not fit"),
    # what only somebody else's checkpoint says
    ({"model_class": ["gpt"]}, "model_class is of type list"),
    ({"config": [1, 2]}, "config is of type list"),
    ({"dtype": "load"}, "dtype=load is unknown: choose from float32, bfloat16"),
    ({"dtype": "float64"}, "dtype=float64 is unknown"),
    ({"settings": "--lr"}, "settings is of type str"),
    ({"val_bpb": "good"}, "val_bpb is of type str"),
    ({"elapsed": float("nan")}, "elapsed is nan"),
    ({"elapsed": 10**400}, "elapsed is 1000"),
    ({"elapsed": -1.0}, "elapsed is -1.0"),
    ({"saved": 1e18}, "saved is 1e+18"),
    ({"saved": -1e18}, "saved is -1e+18"),
    ({"val_bpb": 10**400}, "val_bpb is 1000"),
    ({"best_bpb": None}, "best_bpb is of type NoneType"),
    ({"bpbs": 2.5}, "bpbs is of type float"),
    ({"bpbs": [2.5, "2.1"]}, "bpbs are not all numbers"),
    ({"domain_bpbs": {"c4": "2.1"}}, "domain_bpbs are not all numbers"),
    ({"fp8": "hybrid"}, "fp8 is of type str"),
    ({"stages_begun": {}}, "stages_begun is of type dict"),
    ({"stages_begun": [[0, 0]]}, "stages_begun are not all index, step and seconds"),
    ({"extend": "2"}, "extend is of type str"),
    ({"continues": "d4"}, "continues is of type str"),
    ({"continues": [4, 5]}, "continues is no folder and step"),
    ({"origin": []}, "origin is no folder and step"),
    ({"origin": ["/d4", "5"]}, "origin is no folder and step"),
    ({"name": 7}, "name is of type int"),
    ({"own_identity": {}}, "own_identity is of type dict"),
    ({"own_identity": [1]}, "own_identity is no list of lists"),
    ({"device_batch_size": "4"}, "device_batch_size is of type str"),
    ({"device_batch_size": -4}, "device_batch_size is -4"),
    ({"total_batch_size": 0}, "total_batch_size is 0"),
    ({"parallel": 2}, "parallel is of type int"),
    ({"saved": float("inf")}, "saved is inf"),
    ({"world_size": 0}, "it was saved by 0 ranks"),
    ({"world_size": -8}, "it was saved by -8 ranks"),
    ({"config": {**CONFIG, "depth": -1}}, "(depth=-1)"),
    ({"config": {**CONFIG, "depth": "1"}}, "(depth=1)"),
    ({"config": {**CONFIG, "depth": 1.0}}, "(depth=1.0)"),
    ({"config": {**CONFIG, "depth": True}}, "(depth=True)"),
    ({"config": {**CONFIG, "depth": None}}, "(depth=None)"),
    ({"config": {**CONFIG, "heads": 0}}, "(heads=0)"),
    ({"config": {**CONFIG, "heads": 3, "kv_heads": 3}}, "(width=64, heads=3, kv_heads=3)"),
    ({"config": {**CONFIG, "heads": 4, "kv_heads": 3}}, "(width=64, heads=4, kv_heads=3)"),
    ({"config": {**CONFIG, "heads": 64, "kv_heads": 1}}, "(width=64, heads=64, kv_heads=1)"),
    ({"config": {**CONFIG, "softcap": float("nan")}}, "(softcap=nan)"),
    ({"config": {**CONFIG, "rotary_base": -1.0}}, "(rotary_base=-1.0)"),
    ({"config": {**CONFIG, "depth": 10**9}}, "depth=1000000000, at most"),
    ({"config": {**CONFIG, "vocab_size": 2**62}}, f"vocab_size={2**62}, at most"),
    ({"config": {**CONFIG, "width": 10**99}}, "width=100000000000000000000000000000, at most"),
    ({"config": {**CONFIG, "max_seq_len": 2**40}}, f"max_seq_len={2**40}, at most 1,048,576"),
    ({"config": {**CONFIG, "vocab_size": 250_000}}, "embed.weight has shape [320, 64], expected"),
    ({"config": {**CONFIG, "depth": 2}}, "blocks.1."),
    ({"model_class": "lookup"}, "is in one of the two alone"),
    ({"model_class": "lookup_ngrams", "config": {**CONFIG, "ngrams": -1}}, "(ngrams=-1)"),
]


@pytest.mark.parametrize("change, needle", CHANGES)
def test_what_this_version_cannot_load_is_refused_in_one_line(
    folder, meta, monkeypatch, change, needle
):
    save(folder, 5, meta)
    write_meta(folder, {**read_meta(folder, 5), **change})
    allocated = tensors_allocated(monkeypatch)
    message = error_of(load_model, "base", "cpu")
    assert allocated == [], "refused before anything is allocated"
    assert needle in message and len(message) < 500


def tensors_allocated(monkeypatch):
    """A list that gets the shape of each parameter that is allocated on a device with memory."""
    allocated = []
    real = torch.nn.Parameter.__new__

    def new(cls, data=None, requires_grad=True):
        if data is not None and data.device.type != "meta":
            allocated.append(data.shape)
        return real(cls, data, requires_grad)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", new)
    return allocated


# --------------------------------------------------------------------------------------------------
# files that came from elsewhere

# Names that a forged meta file may hold besides those of the step
NAMES = [
    "../../../victim",
    "/etc/passwd",
    "..",
    "",
    "sub/model_000005.pt",
    "model_000006.pt",            # of another step
    "meta_000005.json",
    ".lock",
    "optim_000005_rank01.pt",
    "optim_000005_rank\u0663.pt",  # a digit, but not one of ours
    "optim_000005_rank0.pt\n",
    "model_000005.pt\0x",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_meta_file_names_no_file_outside_of_its_step(folder, meta, base_dir, name):
    """What it names would be read, and deleted when old steps are."""
    victim = base_dir / "victim"
    victim.write_text("a thesis", encoding="utf-8")
    assert (folder / "../../victim").resolve() == victim.resolve()
    for step in (5, 6, 7, 8, 9):
        save(folder, step, meta)
    for given in (name, "../../victim"):
        found = json.loads((folder / "meta_000005.json").read_text(encoding="utf-8"))
        write_meta(folder, {**found, "files": {**found["files"], given: "0" * 64}})
        before = sorted(folder.iterdir())
        assert complete_steps(folder) == [6, 7, 8, 9]
        message = problems(folder)[5]
        assert "which is no file of step 5" in message and "\n" not in message
        assert "step 5 is not in" in error_of(read_checkpoint, folder, 5)
        assert [path for path in before if path.name.endswith("_000005.pt")]
        prune(folder, keep=9)
        assert sorted(folder.iterdir()) == before and victim.exists()
        write_meta(folder, found)


def test_pruning_a_forged_step_deletes_nothing_else(folder, meta, base_dir):
    victim = save_with_a_forged_step(folder, meta, base_dir)
    assert prune(folder, keep=1) == [2, 3, 4]
    assert victim.read_text(encoding="utf-8") == "a thesis"


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])


def holding(value):
    """A function that replaces a file by a saved `value`."""
    return lambda path: torch.save(value, path)


# What stands where the weights should, with the hash in the meta file that it has
FORGED = [
    (cut, "is no file of a checkpoint (RuntimeError)"),
    (lambda path: path.write_bytes(b""), "is no file of a checkpoint"),
    (lambda path: path.write_bytes(b"{}"), "is no file of a checkpoint"),
    (lambda path: path.write_bytes(b"PK\3\4" + b"x" * 99), "is no file of a checkpoint"),
    (holding([1, 2]), "model_000005.pt holds no table of tensors"),
    (holding({"embed.weight": 3}), "embed.weight is no tensor"),
    (holding({"embed.weight": torch.ones(1).expand(10**9, 64)}), "is not stored whole"),
    (holding({"embed.weight": torch.ones(64, 320).T}), "embed.weight is not stored whole"),
    (holding({"embed.weight": torch.eye(9).to_sparse()}), "embed.weight is not stored whole"),
    (holding({str(i): torch.ones(999) for i in range(3)}), "is in one of the two alone"),
    (holding(dict.fromkeys(map(str, range(999)), torch.ones(999))), "bytes, model_000005.pt has"),
]


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("forge, needle", FORGED)
def test_a_file_with_the_right_hash_and_wrong_contents_is_refused_in_one_line(
    folder, meta, monkeypatch, forge, needle
):
    save(folder, 5, meta)
    forge(folder / "model_000005.pt")
    fit_the_hash(folder, "model_000005.pt")
    allocated = tensors_allocated(monkeypatch)
    message = error_of(load_model, "base", "cpu")
    assert needle in message and allocated == []


def change_a_tensor(path, change):
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


CHANGED_TENSORS = [
    (lambda weights: weights.pop("head.weight"), "head.weight is in one of the two alone"),
    (lambda weights: weights.update(more=torch.ones(2)), "more is in one of the two alone"),
    (lambda weights: weights.update({"head.weight": torch.ones(64, 320)}), "has shape [64, 320]"),
    (lambda weights: weights.update({"head.weight": torch.ones(())}), "has shape []"),
    (lambda weights: weights.update({"head.weight": weights["head.weight"].long()}), "torch.int64"),
    (lambda weights: weights.update({7: torch.ones(2)}), "7 is in one of the two alone"),
]


@pytest.mark.parametrize("change, needle", CHANGED_TENSORS)
def test_weights_of_another_shape_are_refused_before_a_model_is_built(
    folder, meta, monkeypatch, change, needle
):
    save(folder, 5, meta)
    change_a_tensor(folder / "model_000005.pt", change)
    fit_the_hash(folder, "model_000005.pt")
    allocated = tensors_allocated(monkeypatch)
    message = error_of(load_model, "base", "cpu")
    assert needle in message and allocated == []


RNG = torch.get_rng_state()
STATE = state_of(torch.nn.Module(), [])


PIECE = {"name": "embed.weight", "start": 0, "count": 1, "values": {}}


@pytest.mark.parametrize("state", [
    None,
    [1],
    {"optimizers": 3},
    {"loader": [1]},
    {"optimizers": [3]},
    {"optimizers": [{"state": {}}]},
    {"optimizers": [{"state": {0: 1}, "param_groups": []}]},
    {"optimizers": [{"state": {}, "param_groups": [{"lr": 1}]}]},
    {"optimizers": [{"state": {}, "param_groups": [{"params": 1}]}]},
    {"optimizers": [[3]]},
    {"optimizers": [[{**PIECE, "name": 3}]]},
    {"optimizers": [[{**PIECE, "start": -1}]]},
    {"optimizers": [[{**PIECE, "count": 1.0}]]},
    {"optimizers": [[{**PIECE, "values": [1]}]]},
    *({"optimizers": [[{key: PIECE[key] for key in PIECE if key != no}]]} for no in PIECE),
    {**STATE, "rng": None},
    {**STATE, "rng": RNG[:-1]},
    {**STATE, "rng": RNG.float()},
    {**STATE, "guard": None},
    {**STATE, "guard": {"losses": []}},
    *({key: STATE[key] for key in STATE if key != missing} for missing in STATE),
])
def test_an_optimizer_file_without_a_state_is_refused_in_one_line(folder, meta, state):
    save(folder, 5, meta)
    torch.save(state, folder / "optim_000005_rank0.pt")
    fit_the_hash(folder, "optim_000005_rank0.pt")
    assert "holds no optimizer state" in error_of(read_checkpoint, folder, rank=0)
    assert read_checkpoint(folder)[2]["step"] == 5, "the weights can still be used"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 50_000, " " * 2**25 + "{}"])
def test_a_meta_file_that_would_take_long_to_read_is_damaged(folder, meta, content):
    save(folder, 5, meta)
    (folder / "meta_000009.json").write_text(content, encoding="utf-8")
    assert complete_steps(folder) == [5] and "is damaged" in problems(folder)[9]


def test_folders_and_pipes_are_no_files_of_a_step(folder, meta):
    save(folder, 5, meta)
    path = folder / "model_000005.pt"
    path.unlink()
    os.mkfifo(path)
    assert "model_000005.pt is missing" in problems(folder)[5]
    path.unlink()
    path.mkdir()
    assert "model_000005.pt is missing" in problems(folder)[5]


# --------------------------------------------------------------------------------------------------
# file systems that lack something


def test_files_that_cannot_be_mapped_are_read(folder, meta, monkeypatch, capsys):
    save(folder, 5, meta)
    warn_once.cache_clear()

    def refused(name, *_):
        raise RuntimeError(f"unable to mmap 9 bytes from file <{name}>: No such device (19)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", refused)
    for _ in range(2):
        weights, state, _ = read_checkpoint(folder, rank=0)
    assert capsys.readouterr().err.count("cannot map files") == 1
    assert weights["embed.weight"].shape == (320, 64) and "rng" in state


KEYS = ["tokenizer", "model_class", "config", "dtype", "files", "saved", "step", "world_size"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("format", [1, 3])
def test_a_meta_file_that_misses_a_key_is_refused_in_one_line(folder, meta, key, format):
    save(folder, 5, meta)
    path = folder / "meta_000005.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    del found[key], found["digest"]
    if format == 1:
        del found["format"]
    else:
        found["digest"] = digest_of(found)
    path.write_text(json.dumps(found), encoding="utf-8")
    message = error_of(load_model, "base", "cpu")
    assert f"has no {key}" in message and "meta_000005.json" in message


def test_a_meta_file_without_its_digest_is_damaged(folder, meta):
    save(folder, 5, meta)
    path = folder / "meta_000005.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    del found["digest"]
    path.write_text(json.dumps({**found, "val_bpb": 0.01}), encoding="utf-8")
    assert "meta_000005.json is damaged (it has no digest)" in error_of(load_model, "base", "cpu")
