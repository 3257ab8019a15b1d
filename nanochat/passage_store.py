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
from nanochat.common import UserError, atomic_file, get_base_dir, get_dist_info, print0, sha256
from nanochat.dataset import data_tag, open_dataset
from nanochat.passages import MAX_CHARS, Passage, passages_of
from nanochat.retrieval import Passages
from nanochat.userfiles import existing_path

FILE_NAME = re.compile(r"passages_([0-9a-f]{16})\.parquet")
SLOW_BYTES = 4_000_000  # a file with more compressed text takes seconds to read
SCHEMA = pa.schema([
    ("source", pa.string()),
    ("heading", pa.string()),
    ("units", pa.list_(pa.string())),
])


def origins_of(meta):
    """The meta files of the runs that a chat comes from, the newest first, each with the folder
    `dir` that it was read from. The last is None where a checkpoint is gone.

    meta: of a chat run; its `origin` is [folder, step] of the model that it started from.
    """
    seen = set()
    while meta.get("origin") and tuple(meta["origin"]) not in seen:
        seen.add(tuple(meta["origin"]))
        meta = _read_origin(*meta["origin"])
        yield meta
        if meta is None:
            return


def _read_origin(folder, step):
    """The meta file of a model, also where the base directory has moved; None where it is gone."""
    moved = get_base_dir().joinpath(*Path(folder).parts[-2:])
    for place in (folder, moved):
        try:
            return {**read_meta(place, step), "dir": str(place)}
        except UserError:
            continue
    return None


def find_data(meta):
    """(data, store): the path of the text that a chat comes from, and a meta file whose passages
    are that text, for when it is gone. Each may be None.

    data is the setting of the newest run that has one, or what a chat stage found before. Where a
    checkpoint is gone, and with it the answer, that is said in one line.
    """
    store = None
    for origin in origins_of(meta):
        if origin is None:
            print0("the model that this chat comes from is gone: where that was trained on your "
                   "text, --data=PATH lets the chat look things up in it")
            break
        if origin.get("passages") and store is None:
            store = origin
        data = origin.get("settings", {}).get("data") or origin.get("data")
        if data or "data" in origin:
            return data, store
    return None, store


def read_passages(data, whole):
    """The passages of a data path, a list of Passage, and whether that is all of the text.

    Text of more than MAX_CHARS is cut, or without `whole` not read to its end: [].
    """
    documents, total = [], 0
    dataset = open_dataset(data)
    for split in ("train", "val"):
        for document in dataset.named_documents(split):
            total += len(document[1])
            documents.append(document)
            if total > MAX_CHARS:
                return (passages_of(documents), False) if whole else ([], False)
    return passages_of(documents), True


def prepare_passages(data, meta, folder):
    """The Passages of a chat stage, or None where it has no text of the user's.

    data: the setting of the stage, which overrides that of the model's origin. A resumed run has
    its passages already. Every rank calls it; meta["passages"] names the file, and meta["data"] is
    the path of the text. UserError where `data` does not exist.
    """
    if meta.get("passages"):
        return _kept_passages(meta, folder)
    if "data" in meta:  # a resumed run that practises without
        return None
    chosen, store = (str(existing_path(data)), None) if data else find_data(meta)
    meta["data"] = chosen
    if chosen is None and store is None:
        return None
    if chosen is None or not Path(chosen).exists():
        return _passages_of_origin(chosen, store, meta, folder)
    if data_tag(chosen) is None:  # nanochat's own text, named all the same
        return None

    passages, is_whole = read_passages(chosen, whole=bool(data))
    if not is_whole and not data:
        print0(f"{chosen} has more than {MAX_CHARS:,} characters: the chat cannot look anything up "
               f"in it; --data={chosen} lets it, in the first {MAX_CHARS:,}")
        return None
    if not is_whole:
        print0(f"{chosen}: the chat can look up the first {MAX_CHARS:,} characters")
    return _keep(passages, chosen, meta, folder)


def _keep(passages, data, meta, folder):
    """Save the passages of a chat stage and say so; returns the Passages."""
    meta["passages"] = save_passages(folder, passages)
    found = Passages(passages)
    files = "1 file" if found.document_count == 1 else f"{found.document_count:,} files"
    print0(f"the chat can look up {len(passages):,} passages of {files} of {data}")
    return found


def _kept_passages(meta, folder):
    """The Passages of a resumed run. One that continues in another folder takes them along."""
    name = str(meta["passages"])
    continues = meta.get("continues")
    if (Path(folder) / name).is_file() or not continues:
        return load_passages({**meta, "dir": str(folder)})
    found = load_passages({**meta, "dir": str(continues[0])})
    meta["passages"] = save_passages(folder, found.passages)
    return found


def _passages_of_origin(data, store, meta, folder):
    """The Passages of the model that a chat starts from, whose text is gone; None without any."""
    text = data or "a text"
    if store is None:
        print0(f"{text}, the text of this model, is gone: the chat cannot look anything up in it; "
               "--data=PATH names where it is now")
        return None
    print0(f"{text} is gone: the chat looks things up in the text as it was kept beside "
           f"{store['dir']}; --data=PATH names where it is now")
    return _keep(load_passages(store).passages, text, meta, folder)


def save_passages(folder, passages):
    """Write passages to a folder; returns the file's name.

    Every rank writes a draft of its own, and renames it: the same bytes have the same name.
    """
    rank = get_dist_info()[1]
    columns = [list(column) for column in zip(*passages)] or [[], [], []]
    table = pa.table(dict(zip(SCHEMA.names, columns)), schema=SCHEMA)
    draft = Path(folder) / f"passages_draft_{rank}.parquet"
    draft.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(draft) as file:
        pq.write_table(table, file, compression="zstd")
    name = f"passages_{sha256(draft)[:16]}.parquet"
    draft.replace(draft.parent / name)
    return name


def is_undamaged(meta, folder):
    """Whether the folder has the passages that a meta file names, with their hash; True where it
    names none."""
    name = meta.get("passages")
    if not name:
        return True
    path = Path(folder) / str(name)
    match = FILE_NAME.fullmatch(str(name))
    return match is not None and path.is_file() and sha256(path)[:16] == match[1]


def load_passages(meta):
    """The Passages of a chat model, or None where it has none. meta: what load_model returned.

    UserError where the file that the meta file names is missing, or is another one.
    """
    name = meta.get("passages")
    if not name:
        return None
    path = Path(meta["dir"]) / str(name)
    if not is_undamaged(meta, meta["dir"]):
        raise UserError(
            f"{path}, which holds the text that this chat can quote, is missing or damaged: get it "
            "again from where the checkpoint came, or run python -m scripts.chat_sft again")
    if path.stat().st_size > SLOW_BYTES:
        print0(f"reading the text that this chat can quote: {path}")
    rows = pq.read_table(path).to_pylist()
    passages = [Passage(row["source"], row["heading"], tuple(row["units"])) for row in rows]
    return Passages(passages)
