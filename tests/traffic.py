"""Counts what ranks send to each other: the bytes of every collective that torch is asked for."""
import collections
import contextlib

import torch
import torch.distributed as dist

# The argument that is as large as what a rank sends and receives in all, by the convention that a
# reduce-scatter moves its input, an all-gather its output and an all-reduce its buffer.
WHOLE = {
    "all_reduce": 0,
    "reduce_scatter_tensor": 1,
    "all_gather_into_tensor": 0,
    "all_to_all_single": 1,
}
NAMES = {  # of arguments that may be given by name
    "all_reduce": ("tensor",),
    "reduce_scatter_tensor": ("output", "input"),
    "all_gather_into_tensor": ("output_tensor", "input_tensor"),
    "all_to_all_single": ("output", "input"),
}


@contextlib.contextmanager
def counted():
    """A Counter of bytes by the name of the collective, while the block runs.

    Numbers on which ranks agree (loss and norm, 8 bytes) are counted, too.
    """
    moved = collections.Counter()
    originals = {name: getattr(dist, name) for name in WHOLE}

    def counting(name):
        def call(*arguments, **options):
            place = WHOLE[name]
            tensor = options.get(NAMES[name][place])
            if tensor is None:
                tensor = arguments[place]
            assert isinstance(tensor, torch.Tensor)
            moved[name] += tensor.nbytes
            return originals[name](*arguments, **options)
        return call

    for name in WHOLE:
        setattr(dist, name, counting(name))
    try:
        yield moved
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
