"""Optimizer state as it is saved: in pieces that know neither a layout nor a number of ranks.

An optimizer's `partition` says what the units of its parameters are: "elements" (AdamW), "rows"
(RowAdagrad) or "matrices" (Muon). A piece is what it keeps of some consecutive units of a
parameter:

    {
        "name": "blocks.0.mlp.up.weight",   # of the parameter
        "start": 0,                         # the first unit
        "count": 1,                         # how many
        "values": {"momentum": (1, m, n)},  # tensors: the first dimension is that of the units;
    }                                       # one without dimensions (AdamW's step) is of all units

The file of a rank holds a list of pieces for each optimizer. Every rank that loads them has the
files of all ranks before it, and copies what overlaps with its own units. A parameter without any
piece had no state when it was saved, and gets none.

Learning rates and other settings are not saved: they are those of the run that loads.
"""
import math
from typing import NamedTuple

import torch

from nanochat.common import UserError


class Segment(NamedTuple):
    """Units [start, start + count) of the parameter `name`, which an optimizer holds from unit
    `offset` of one of its tensors on."""
    name: str
    start: int
    count: int
    offset: int


def unit_shape(tensor, partition):
    """The shape of the smallest piece that an optimizer of this partition can update."""
    if partition == "elements":
        return ()
    if partition == "rows":
        return tuple(tensor.shape[1:])
    return tuple(tensor.shape[-2:])  # matrices


def units_of(tensor, partition):
    """How many units a tensor has."""
    return tensor.numel() // math.prod(unit_shape(tensor, partition))


def places(optimizer, segments):
    """Yield (the tensor under which the state is kept, a Segment with its offset in that state).

    segments: {tensor in the optimizer's groups: its Segments}. The state of all matrices of a group
    is one stack, which is kept under the first of the group's tensors.
    """
    for group in optimizer.param_groups:
        before = 0
        for tensor in group["params"]:
            key, offset = tensor, 0
            if optimizer.partition == "matrices":
                key, offset = group["params"][0], before
            for segment in segments[tensor]:
                yield key, segment._replace(offset=offset + segment.offset)
            before += units_of(tensor, optimizer.partition)


# -------------------------------------------------------------------------------------------------
# save

def pieces_of(optimizer, segments):
    """The state of what an optimizer holds here, as a list of pieces; the tensors are views."""
    pieces = []
    for key, segment in places(optimizer, segments):
        state = optimizer.state.get(key)
        if not state:
            continue
        units = slice(segment.offset, segment.offset + segment.count)
        pieces.append({
            "name": segment.name,
            "start": segment.start,
            "count": segment.count,
            "values": {key: value[units] if value.ndim else value for key, value in state.items()},
        })
    return pieces


# -------------------------------------------------------------------------------------------------
# load

def other_model(problem):
    """The UserError for a state with which this model cannot continue."""
    return UserError(
        f"the checkpoint's optimizer state is not that of this model ({problem}): resume with the "
        "version that saved it, or train again; its weights can still be loaded"
    )


def load_pieces(optimizer, segments, units, pieces):
    """Make the state of what an optimizer holds here from the pieces of all ranks that saved.

    units: {name: how many units each parameter of the optimizer has}, on all ranks together.
    UserError where the pieces are not of these parameters, or a unit is missing or there twice.
    """
    by_name = {}
    for piece in pieces:
        name = piece["name"]
        if piece["start"] + piece["count"] > units.get(name, 0):
            raise other_model(f"it has a parameter {name[:80]} of another size")
        by_name.setdefault(name, []).append(piece)
    for name, pieces in by_name.items():
        _check_complete(name, pieces, units[name])

    optimizer.state.clear()
    for tensor, segment in places(optimizer, segments):
        pieces = by_name.get(segment.name)
        if pieces is None:
            continue
        state = optimizer.state_of(tensor)
        for piece in pieces:
            _copy_overlap(state, segment, piece)


def _check_complete(name, pieces, units):
    """UserError unless the pieces of a parameter make up all of its units, each of them once."""
    parts = sorted((piece["start"], piece["count"]) for piece in pieces if piece["count"])
    end = 0
    for start, count in parts:
        if start != end:
            raise other_model(f"units of {name} are missing or there twice")
        end += count
    if end != units:
        raise other_model(f"{end} of {units} units of {name} are there")


def _copy_overlap(state, segment, piece):
    """Copy what a piece has of a segment into a state."""
    start, count, values = piece["start"], piece["count"], piece["values"]
    begin = max(segment.start, start)
    end = min(segment.start + segment.count, start + count)
    if begin >= end:
        return
    here = slice(begin - segment.start + segment.offset, end - segment.start + segment.offset)
    there = slice(begin - start, end - start)
    shapes = {}
    for key, value in state.items():
        shapes[key] = (count, *value.shape[1:]) if value.ndim else ()
    _check_values(values, shapes, segment.name)
    for key, value in state.items():
        if value.ndim:
            value[here] = values[key][there].to(value.device)
        else:
            # units that were held apart may have been updated a different number of times
            value.fill_(max(value.item(), values[key].item()))


def _check_values(values, shapes, name):
    """UserError unless values are floating-point tensors with these keys and shapes."""
    if values.keys() != shapes.keys():
        raise other_model(f"a state of {name} with other keys")
    for key, value in values.items():
        if not _is_plain(value) or tuple(value.shape) != shapes[key]:
            raise other_model(f"{key} of {name}, expected to have the shape {shapes[key]}")


def _is_plain(value):
    """Whether a value is a tensor of floating-point numbers in memory, one after the other."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    return value.layout is torch.strided and not value.is_meta


def load_state_dict(optimizer, saved):
    """Load what formats 1 and 2 have of an optimizer: the state_dict() of one rank.

    It is of the tensors that this rank held, so that ranks and layout must be the same.
    """
    here = [len(group["params"]) for group in optimizer.param_groups]
    there = [len(group["params"]) for group in saved["param_groups"]]
    if here != there:
        raise UserError(
            f"the checkpoint's optimizer state is divided into {there} tensors, this run's into "
            f"{here}: resume with the version, ranks and layout that saved it"
        )
    first = [group["params"][0] for group in optimizer.param_groups if group["params"]]
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    keys = first if optimizer.partition == "matrices" else tensors

    optimizer.state.clear()
    for number, tensor in enumerate(tensors):
        values = saved["state"].get(number)
        if values is None:
            continue
        if not any(tensor is key for key in keys):
            raise other_model("a momentum that is not under the first matrix")
        state = optimizer.state_of(tensor)
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        _check_values(values, shapes, f"a parameter of shape {tuple(tensor.shape)}")
        for key, value in state.items():
            value.copy_(values[key])


# -------------------------------------------------------------------------------------------------
# files that came from elsewhere

def problem_of(saved):
    """What is wrong with the saved state of an optimizer in any format, or None.

    Whether it is the state of this model is for the functions above to say.
    """
    if isinstance(saved, dict):
        return None if _is_state_dict(saved) else "an optimizer without param_groups or state"
    if not isinstance(saved, list):
        return "an optimizer without a list of pieces"
    return None if all(map(_is_piece, saved)) else "something that is no piece of a state"


def _is_piece(piece):
    if not isinstance(piece, dict) or not isinstance(piece.get("name"), str):
        return False
    if not isinstance(piece.get("values"), dict):
        return False
    numbers = piece.get("start"), piece.get("count")
    return all(type(number) is int and number >= 0 for number in numbers)


def _is_state_dict(saved):
    """Whether a value is what Optimizer.state_dict() returns."""
    groups, states = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict):
        return False
    are_groups = all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    return are_groups and all(isinstance(values, dict) for values in states.values())
