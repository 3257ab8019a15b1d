"""Counts what ranks send to each other: the bytes of every collective that torch is asked for."""
import collections
import contextlib

import torch.distributed as dist

# Collective -> (its place among those counted, which of its tensors measures it: all of what is
# moved, not a rank's part). A reduce-scatter moves its input, an all-gather its output, an
# all-reduce its buffer. torch calls some by other names from 2.15 on.
MEASURES = {
    "all_reduce": ("all_reduce", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "all_gather_into_tensor": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "all_to_all_single": ("all_to_all", 1),
}
TENSORS = ({"tensor", "output", "output_tensor"}, {"input", "input_tensor"})  # as named arguments


@contextlib.contextmanager
def counted():
    """A Counter of bytes by kind of collective, for what runs within.

    The numbers on which ranks agree (loss and norm: 8 bytes) count as well.
    """
    moved = collections.Counter()
    originals = {name: getattr(dist, name) for name in MEASURES if hasattr(dist, name)}
    for name, original in originals.items():
        setattr(dist, name, counting(original, moved, *MEASURES[name]))
    try:
        yield moved
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def counting(original, moved, kind, place):
    """A collective that adds the bytes of the tensor at `place` of its arguments to moved[kind]."""
    def call(*arguments, **options):
        named = [options[name] for name in TENSORS[place] & options.keys()]
        tensor = named[0] if named else arguments[place]
        moved[kind] += tensor.nbytes
        return original(*arguments, **options)
    return call
