"""The user's own text beside a chat model: found for a chat stage, kept in its checkpoint's folder.

A chat stage that starts from a model of the user's data cuts that text into passages
(retrieval.py) and writes them to its folder, so that the chat can quote the notes after they have
moved. The key `passages` of the meta file names the file, and the name holds the file's hash.
"""
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.checkpoint import read_meta
from nanochat.common import UserError, atomic_file, get_dist_info, print0, sha256
from nanochat.dataset import data_tag, open_dataset
from nanochat.passages import MAX_CHARS, Passage, passages_of
from nanochat.retrieval import Passages

FILE_NAME = re.compile(r"passages_([0-9a-f]{16})\.parquet")
SLOW_BYTES = 4_000_000  # a file with more compressed text takes seconds to read
SCHEMA = pa.schema([
    ("source", pa.string()),
    ("heading", pa.string()),
    ("units", pa.list_(pa.string())),
])


def find_data(meta):
    """The `data` setting of the runs that a model comes from, the newest first; None where all of
    them used nanochat's own text, or where their checkpoints are gone.

    meta: of a chat run; its `origin` is [folder, step] of the model that it started from.
    """
    seen = set()
    while meta.get("origin") and tuple(meta["origin"]) not in seen:
        seen.add(tuple(meta["origin"]))
        try:
            meta = read_meta(*meta["origin"])
        except UserError:
            return None
        data = meta.get("settings", {}).get("data")
        if data:
            return data
    return None


def read_passages(data):
    """The passages of a data path, a list of Passage. What is left out is said in one line."""
    dataset = open_dataset(data)
    total = 0

    def documents():
        nonlocal total
        for split in ("train", "val"):
            for name, text in dataset.named_documents(split):
                total += len(text)
                yield name, text
                if total > MAX_CHARS:
                    return

    passages = passages_of(documents())
    if total > MAX_CHARS:
        print0(f"{data}: the chat can look up the first {MAX_CHARS:,} characters")
    return passages


def prepare_passages(data, meta, folder):
    """The Passages of a chat stage, or None where it has no text of the user's.

    data: the setting of the stage, which overrides that of the model's origin. A resumed run has
    its passages already. Rank 0 writes the file, and meta["passages"] names it.
    """
    if meta.get("passages"):
        return load_passages({**meta, "dir": str(folder)})
    data = data or find_data(meta)
    if data is None:
        return None
    if not Path(data).exists():
        print0(f"{data}, the text of this model, is gone: the chat cannot look anything up in it; "
               "--data=PATH names where it is now")
        return None
    if data_tag(data) is None:  # nanochat's own text, named all the same
        return None
    passages = read_passages(data)
    meta["passages"] = save_passages(folder, passages)
    files = len({passage.source for passage in passages})
    print0(f"the chat can look up {len(passages):,} passages of {files:,} files of {data}")
    return Passages(passages)


def save_passages(folder, passages):
    """Write passages to a folder, on rank 0; returns the file's name."""
    rank = get_dist_info()[1]
    columns = [list(column) for column in zip(*passages)] or [[], [], []]
    table = pa.table(dict(zip(SCHEMA.names, columns)), schema=SCHEMA)
    draft = Path(folder) / f"passages_draft_{rank}.parquet"
    draft.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(draft) as file:
        pq.write_table(table, file, compression="zstd")
    name = f"passages_{sha256(draft)[:16]}.parquet"
    draft.replace(draft.parent / name)  # the same bytes on every rank
    return name


def load_passages(meta):
    """The Passages of a chat model, or None where it has none. meta: what load_model returned.

    UserError where the file that the meta file names is missing, or is another one.
    """
    name = meta.get("passages")
    if not name:
        return None
    path = Path(meta["dir"]) / str(name)
    match = FILE_NAME.fullmatch(str(name))
    if not match or not path.is_file() or sha256(path)[:16] != match[1]:
        raise UserError(
            f"{path}, which holds the text that this chat can quote, is missing or damaged: get it "
            "again from where the checkpoint came, or run python -m scripts.chat_sft again")
    if path.stat().st_size > SLOW_BYTES:
        print0(f"reading the text that this chat can quote: {path}")
    rows = pq.read_table(path).to_pylist()
    passages = [Passage(row["source"], row["heading"], tuple(row["units"])) for row in rows]
    return Passages(passages)
