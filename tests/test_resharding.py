"""A run saved by some ranks in one layout is resumed in any other layout, by any number of ranks.

docs/traps.md: rank-count-on-resume
"""
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat import parallel
from toy import KINDS, WIDTH, Training

RANKS = 3
PHASES = [2, 3, 2]  # how many ranks a phase has; the first saves, the others load what came before


def save(training, path):
    """The state of this rank, and of rank 0 the weights, as a checkpoint has them."""
    state = {
        "weights": training.layout.whole_weights(),
        "optimizers": training.layout.optimizer_state(),
    }
    torch.save(state, f"{path} {training.rank}.pt")


def resume(path, saved_by, training):
    """Load what `saved_by` ranks have saved, and take two more steps. Returns the parameters."""
    files = [f"{path} {rank}.pt" for rank in range(saved_by)]
    states = [torch.load(file, weights_only=True, mmap=True) for file in files]
    training.layout.load_weights(states[0]["weights"])
    training.layout.load_optimizer_state([state["optimizers"] for state in states])
    training.step(2, 0.5)
    training.step(3, 0.5)
    return training.parameters()


def worker(rank, ports, folder, barrier):
    torch.set_num_threads(1)
    parallel.BUCKET_BYTES = 4 * WIDTH * WIDTH  # a matrix
    results = {}
    for phase, (ranks, port) in enumerate(zip(PHASES, ports)):
        barrier.wait()
        if rank >= ranks:
            continue
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        dist.init_process_group("gloo")
        if phase:
            for saved_by, kind, path in sources(folder, ranks):
                for into in KINDS:
                    training = Training(rank, ranks, kind=into)
                    results[saved_by, kind, ranks, into] = resume(path, saved_by, training)
        for kind in KINDS:
            save(Training(rank, ranks, kind=kind).run(2), f"{folder}/{ranks} {kind}")
        dist.destroy_process_group()
    torch.save(results, f"{folder}/results {rank}.pt")


def sources(folder, ranks):
    """Yield (saved by how many ranks, in which layout, where) of what others than `ranks` saved."""
    for saved_by in (1, 2, 3):
        for kind in KINDS if saved_by > 1 else KINDS[:1]:
            if saved_by != ranks:
                yield saved_by, kind, f"{folder}/{saved_by} {kind}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where everything is, after one rank has saved and all phases have run."""
    folder = tmp_path_factory.mktemp("resharding")
    save(Training().run(2), f"{folder}/1 replicated")
    context = mp.get_context("spawn")
    ports = [31000 + phase + os.getpid() % 400 for phase in range(len(PHASES))]
    arguments = (ports, str(folder), context.Barrier(RANKS))
    mp.start_processes(worker, arguments, nprocs=RANKS, start_method="spawn")
    return folder


@pytest.fixture(scope="module")
def never_changed():
    return Training().run(4).parameters()


def assert_near(ours, theirs, case):
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=1e-6, rtol=1e-5, msg=f"{case}: {name}")


def test_several_ranks_continue_what_others_began_as_if_nothing_had_changed(folder, never_changed):
    for rank in range(RANKS):
        results = torch.load(folder / f"results {rank}.pt", weights_only=True)
        # one rank saved in one layout, two and three in three; each is loaded into three
        assert len(results) == (24 if rank < 2 else 12)
        for case, parameters in results.items():
            assert_near(parameters, never_changed, case)


def test_one_rank_continues_what_several_began(folder, never_changed):
    for saved_by, kind, path in sources(folder, ranks=1):
        assert_near(resume(path, saved_by, Training()), never_changed, (saved_by, kind))


def test_the_files_of_ranks_that_are_missing_are_missed(folder):
    with pytest.raises(ValueError, match="not that of this model .*units of embed are there"):
        resume(f"{folder}/3 fsdp", 2, Training())
