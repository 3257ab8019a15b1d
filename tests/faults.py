"""A training stage in which certain batches go wrong, as FAULTS='{"4": "nan"}' in the environment says (batches count from 1).

    nan      the last rank's gradients become NaN
    spike    gradients a hundred times too large
    sick     the weights become NaN, as after a bad update
    missing  the batch never comes
    hang     the last rank sleeps
    kill     the process is killed; interrupt: as by Ctrl+C; terminate, terminate twice: as by a scheduler

At "end" no memory is left for the last validation ("memory").
"""
import json
import os
import runpy
import signal
import sys
import time

import torch

from nanochat import dataloader, loss_eval, parallel


def install():
    faults = json.loads(os.environ["FAULTS"])
    at_the_end = faults.pop("end", None)
    faults = {int(number): fault for number, fault in faults.items()}
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
        if fault == "sick":
            next(model.parameters()).data.fill_(torch.nan)
        last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        if fault == "hang" and last:
            time.sleep(999)
        for number in {"kill": [signal.SIGKILL], "interrupt": [signal.SIGINT], "terminate": [signal.SIGTERM],
                       "terminate twice": [signal.SIGTERM] * 2}.get(fault, []):
            os.kill(os.getpid(), number)
        if fault in ("nan", "spike"):
            layout = arguments[-1]
            layout.overlap = False  # so that the gradients do not leave during the backward pass
        result = accumulate(model, *arguments)
        for p in model.parameters() if fault == "spike" or fault == "nan" and last else ():
            p.grad *= 100 if fault == "spike" else torch.nan
        return result

    def no_memory(*_, **__):
        raise MemoryError("of this machine")

    parallel.accumulate_gradients = faulty
    if at_the_end == "memory":
        loss_eval.evaluate_bpb = no_memory
    for name in ("tokenizing_distributed_data_loader_with_state", "sft_data_generator"):
        setattr(dataloader, name, without_the_missing(getattr(dataloader, name)))


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
