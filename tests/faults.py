"""A training stage in which chosen batches go wrong, for the tests of the guard and of resuming.

The environment variable FAULTS says which: FAULTS='{"4": "nan"}'. Batches count from 1.

    nan              the gradients of the last rank become NaN
    spike            the gradients become a hundred times too large
    diverge          the weights become NaN, as after a bad update
    missing          the batch is skipped by the loader
    hang             the last rank sleeps
    kill             the process is killed
    kill last        the process of the last rank is killed
    fail last        the last rank has an error
    interrupt        the process gets SIGINT, as by Ctrl+C
    hangup           the process gets SIGHUP, as when its terminal closes
    terminate        the process gets SIGTERM, as by a scheduler
    terminate twice  the process gets SIGTERM twice

With {"end": "memory"} the validation at the end finds no memory. With {"record": "kill"} the
process is killed when all is done but its record in metrics.jsonl. With {"attention": "peek"}
attention adds a little of the next position, in any command.
"""
import json
import os
import signal
import time

import torch

from nanochat import dataloader, loss_eval, metrics, parallel

SIGNALS = {
    "kill": [signal.SIGKILL],
    "interrupt": [signal.SIGINT],
    "hangup": [signal.SIGHUP],
    "terminate": [signal.SIGTERM],
    "terminate twice": [signal.SIGTERM, signal.SIGTERM],
}


def install():
    """Replace what the stages call by functions that fail as FAULTS says."""
    faults = json.loads(os.environ["FAULTS"])
    at_the_end = faults.pop("end", None)
    at_the_record = faults.pop("record", None)
    if faults.pop("attention", None) == "peek":
        _peek()
    faults = {int(number): fault for number, fault in faults.items()}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, which may run the tests, ignores it
    accumulate, calls = parallel.accumulate_gradients, [0]

    def without_the_missing(read):
        def loader(*arguments, **options):
            for number, batch in enumerate(read(*arguments, **options), start=1):
                if faults.get(number) != "missing":
                    yield batch
        return loader

    def faulty(model, *arguments):
        calls[0] += 1
        fault = faults.get(calls[0])
        if fault == "diverge":
            next(model.parameters()).data.fill_(torch.nan)
        is_last_rank = _rank() == _world_size() - 1
        if fault == "hang" and is_last_rank:
            time.sleep(999)
        if fault == "kill last" and is_last_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "fail last" and is_last_rank:
            raise ArithmeticError("a bug")
        for number in SIGNALS.get(fault, []):
            os.kill(os.getpid(), number)
        if fault in ("nan", "spike"):
            layout = arguments[-1]
            layout.overlap = False  # so that the gradients do not leave during the backward pass
        result = accumulate(model, *arguments)
        if fault == "spike":
            _scale_gradients(model, 100)
        if fault == "nan" and is_last_rank:
            _scale_gradients(model, torch.nan)
        return result

    def no_memory(*_, **__):
        raise MemoryError("of this machine")

    def killed(row):
        os.kill(os.getpid(), signal.SIGKILL)

    parallel.accumulate_gradients = faulty
    if at_the_record == "kill":
        metrics.append_metrics = killed
    if at_the_end == "memory":
        loss_eval.evaluate_bpb = no_memory
    for name in ("tokenizing_distributed_data_loader_with_state", "sft_data_generator"):
        setattr(dataloader, name, without_the_missing(getattr(dataloader, name)))


def _peek():
    from nanochat import gpt
    forward = gpt.Attention.forward

    def peeking(self, *arguments, **more):
        y = forward(self, *arguments, **more)
        return y + 0.1 * y.roll(-1, dims=1)

    gpt.Attention.forward = peeking


def _rank():
    return int(os.environ.get("RANK", "0"))


def _world_size():
    return int(os.environ.get("WORLD_SIZE", "1"))


def _scale_gradients(model, factor):
    for parameter in model.parameters():
        parameter.grad *= factor
