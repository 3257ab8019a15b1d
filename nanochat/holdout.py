"""Which whole sources are held out of training: books, packages, files.

    held_out = choose_held_out({"emma.txt": 880_000, "ulysses.txt": 1_500_000}, 100_000)

A document of a book that training has read in part is easier than one of another book: names and
phrases recur, and counts of n-grams profit most. Whether a model has learnt more than that is seen
on sources of which it has read nothing. Which those are follows from a hash of their names, so that
neither chance nor the order of files on a machine has a part in it.
"""
import re

from nanochat.common import UserError, fraction
from nanochat.encoding import find_encoding, open_text, text_suffix
from nanochat.shards import name_of

LIST_NAME = "sources"       # of the file beside parquet that says which source a row is from
WRONG_LIST = "correct it, or rename it to hold out whole files"


def choose_held_out(sizes, wanted):
    """The names of the sources to hold out, a set: at least one, and never all.

    sizes: {name of a source: its size}. wanted: the size to hold out, about.

    Sources are taken in the order of a hash of their names until `wanted` is reached. One that
    would make it more than half as much again is passed over. Where that is every one, the smallest
    is taken. UserError for fewer than two sources.
    """
    if len(sizes) < 2:
        raise UserError(
            f"--holdout=source holds out whole sources, and the text has {len(sizes)}: leave it "
            "out, or add files"
        )
    held_out = set()
    taken = 0
    for name in sorted(sizes, key=lambda name: (fraction(name), name)):
        if taken >= wanted or len(held_out) == len(sizes) - 1:
            break
        if taken + sizes[name] <= 1.5 * wanted:
            held_out.add(name)
            taken += sizes[name]
    return held_out or {min(sizes, key=lambda name: (sizes[name], fraction(name), name))}


def find_source_lists(about):
    """Those of the files beside a data set, a list, that say which source each row is from."""
    return [file for file in about if file.name.lower().split(".")[0] == LIST_NAME]


def read_source_list(path, files, root):
    """{parquet file: {row: source}} of a list whose lines are shard, row and source, with tabs.

    files: the parquet files; a shard is the number at the end of a file's name, and rows count
    from 0. root: the folder that names are relative to, which begin those of sources.
    UserError with the line for any other form.
    """
    by_number = {}
    for file in files:
        number = re.search(r"\d+$", file.stem)
        if number and text_suffix(file) == ".parquet" and file.parent == path.parent:
            shard = int(number.group())
            if shard in by_number:
                raise UserError(
                    f"{path}: {file.name} and {by_number[shard].name} are both shard {shard}: "
                    f"{WRONG_LIST}"
                )
            by_number[shard] = file

    folder = "" if path.parent == root else name_of(path.parent, root) + "/"
    found = {file: {} for file in by_number.values()}
    with open_text(path, find_encoding(path)) as stream:
        for number, line in enumerate(stream, start=1):
            fields = line.rstrip("\r\n").split("\t")
            is_row = len(fields) == 3 and all(map(str.isdecimal, fields[:2]))
            if not is_row or int(fields[0]) not in by_number:
                raise UserError(
                    f"{path}, line {number}: not the number of a shard, a row and a source, "
                    f"divided by tabs: {WRONG_LIST}"
                )
            found[by_number[int(fields[0])]][int(fields[1])] = folder + fields[2]
    return found


def source_of_row(listed, file, row, root):
    """The name of the source of a row, or of a document, of one of the user's files.

    listed: what the read_source_list() of the folders say, in one dict. UserError for a row that
    the list of its folder has left out.
    """
    if file not in listed:
        return name_of(file, root)
    if row not in listed[file]:
        raise UserError(f"{file}, row {row} is in no line of the sources beside it: {WRONG_LIST}")
    return listed[file][row]
