"""A training stage in which certain batches go wrong, as FAULTS='{"4": "nan"}' in the environment says (batches count from 1).

    nan      the last rank's gradients become NaN
    spike    gradients a hundred times too large
    sick     the weights become NaN, as after a bad update
    missing  the batch never comes
    hang     the last rank sleeps
"""
import json
import os
import runpy
import sys
import time

import torch

from nanochat import dataloader, gpt


def install():
    faults = {int(number): fault for number, fault in json.loads(os.environ["FAULTS"]).items()}
    read, accumulate, calls = dataloader.tokenizing_distributed_data_loader_with_state, gpt.accumulate_gradients, [0]

    def loader(*arguments):
        for number, batch in enumerate(read(*arguments), start=1):
            if faults.get(number) != "missing":
                yield batch

    def faulty(model, *arguments):
        calls[0] += 1
        fault = faults.get(calls[0])
        if fault == "sick":
            next(model.parameters()).data.fill_(torch.nan)
        last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        if fault == "hang" and last:
            time.sleep(999)
        result = accumulate(model, *arguments)
        for p in model.parameters() if fault == "spike" or fault == "nan" and last else ():
            p.grad *= 100 if fault == "spike" else torch.nan
        return result

    dataloader.tokenizing_distributed_data_loader_with_state, gpt.accumulate_gradients = loader, faulty


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
