"""A training stage in which certain batches go wrong, as FAULTS='{"4": "nan"}' in the environment says (batches count from 1).

    nan      the last rank's gradients become NaN
    spike    gradients a hundred times too large
    sick     the weights become NaN, as after a bad update
    missing  the batch never comes
    hang     the last rank sleeps
    kill     the process is killed, and interrupt: as by Ctrl+C
"""
import json
import os
import runpy
import signal
import sys
import time

import torch

from nanochat import dataloader, gpt


def install():
    faults = {int(number): fault for number, fault in json.loads(os.environ["FAULTS"]).items()}
    accumulate, calls = gpt.accumulate_gradients, [0]

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
        if fault in ("kill", "interrupt"):
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGINT)
        result = accumulate(model, *arguments)
        for p in model.parameters() if fault == "spike" or fault == "nan" and last else ():
            p.grad *= 100 if fault == "spike" else torch.nan
        return result

    gpt.accumulate_gradients = faulty
    for name in ("tokenizing_distributed_data_loader_with_state", "sft_data_generator"):
        setattr(dataloader, name, without_the_missing(getattr(dataloader, name)))


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
