"""Held-out texts of several domains, by which a base model is measured.

    for domain in load_domains("c4=web.jsonl,gsm8k,humaneval", most=300):
        print(domain.name, len(domain.documents))

    python -m tasks.domains                             # writes validation/*.parquet: C4 (2,000
                                                        # documents), GSM8K and HumanEval (all)
    python -m tasks.domains --domains="c4=web.jsonl,gsm8k" --folder=held-out

A domain is a name in SOURCES, which the hub has, or NAME=PATH: a file or a folder of the user's, in
the forms of FORMS. A path alone stands for the files at it, each a domain. A document is never cut,
however long: a .txt file is one. docs/domains.md has examples.
"""
import re
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, atomic_file, expand_home, print0
from nanochat.configurator import configure, require
from nanochat.conversation import normalise_messages
from nanochat.encoding import NOTES, text_suffix
from nanochat.hub import (
    cache_folder,
    cached_files,
    is_offline,
    list_files,
    load_rows,
    on_first_rank,
)
from nanochat.metrics import finish_stage
from nanochat.textfiles import text_key
from nanochat.userfiles import choose_files, existing_path, find_user_files
from tasks.customjson import READERS, json_values, read_text
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.smoltalk import SmolTalk

OWN = "val"             # the validation text of the run or of --data
MEAN = "mean"           # of all domains, where steps are compared
NAME = re.compile(r"\w[\w.-]*")
# what the name of a file says besides its domain: c4_validation_2k.parquet is of c4
SPLIT = re.compile(r"[-_.](validation|valid|val|test|heldout|held[-_]out)([-_.].*)?$", re.I)
ARTICLE = re.compile(r" = [^=].*[^=] = \n?")    # the title of one in WikiText


class Domain(NamedTuple):
    """documents: a list of str, each whole and none of them empty."""
    name: str
    documents: list


class Item(NamedTuple):
    """One item of --domains. path: a Path, or None for a domain of SOURCES and for OWN."""
    name: str
    path: Path


# ----------------------------------------------------------------------------------------------
# from a row to a document

def joined(*keys, by=""):
    """A function that joins the texts of a row under these keys."""
    def join(row):
        texts = [row[key] for key in keys]
        return by.join(texts) if all(isinstance(text, str) for text in texts) else None
    return join


def conversation_text(row):
    """A conversation as a base model can read it: who speaks, and what. None where there is none.

    >>> conversation_text({"messages": [{"role": "user", "content": "Hi"}]})
    'User: Hi'
    """
    try:
        messages = normalise_messages(row["messages"])
    except UserError:
        return None
    turns = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        turns.append(f"{message['role'].capitalize()}: {content}")
    return "\n\n".join(turns)


question_and_answer = joined("question", "answer", by="\n")
prompt_and_solution = joined("prompt", "canonical_solution")
# (the keys that a record of the user's has, what makes a document of it), the first that fits
FORMS = [
    (("question", "answer"), question_and_answer),
    (("prompt", "canonical_solution"), prompt_and_solution),
    (("messages",), conversation_text),
    (("content",), joined("content")),
]


def document_of(record, place):
    """The document that a record of a file is, "" for one without text. UserError for others."""
    text = record
    if isinstance(record, dict):
        key = text_key(record)
        forms = [form for keys, form in FORMS if record.keys() >= set(keys)]
        if key is not None:
            text = record[key] or ""
        elif forms:
            text = forms[0](record)
    if isinstance(text, str):
        return text
    keys = f" (its keys: {', '.join(map(str, record))})" if isinstance(record, dict) else ""
    forms = ", ".join(" and ".join(keys) for keys, _ in FORMS)
    raise UserError(f"{place}: no text was found{keys}: rename the key that holds it to `text`; "
                    f"read as well: {forms}")


# ----------------------------------------------------------------------------------------------
# domains that the hub has

class Source(NamedTuple):
    """Where a domain is on the hub, and what makes a document of a row.

    splits: their possible names, the first that is there. count: documents that are written.
    """
    name: str
    config: str
    splits: tuple
    columns: dict
    document: object
    count: int


SOURCES = {
    # the hub converts no more than the first gigabytes of a large set, and names such a split so
    "c4": Source("allenai/c4", "en", ("validation", "partial-validation"), {"text": str},
                 joined("text"), 2000),
    "encyclopedia": Source("Salesforce/wikitext", "wikitext-103-raw-v1", ("validation",),
                           {"text": str}, None, 60),
    "gsm8k": Source(GSM8K.name, GSM8K.config, ("test",), GSM8K.columns, question_and_answer, 1319),
    "humaneval": Source(HumanEval.name, HumanEval.config, ("test",), HumanEval.columns,
                        prompt_and_solution, 164),
    "code": Source("google-research-datasets/mbpp", "full", ("test",), {"text": str, "code": str},
                   joined("text", "code", by="\n"), 500),
    "chat": Source(SmolTalk.name, SmolTalk.config, ("test",), SmolTalk.columns,
                   conversation_text, 2000),
}
DOCUMENTED = {"c4": "c4_validation_2k.parquet"}  # the name of its file where all are written


def split_of_source(source):
    """The split of a Source that the cache has, else that the hub has."""
    if len(source.splits) > 1:
        for split in source.splits:
            if cached_files(cache_folder(source.name, source.config, split)):
                return split
    if len(source.splits) > 1 and not is_offline():
        listed = list_files(source.name)
        for split in source.splits:
            if (source.config, split) in listed:
                return split
    return source.splits[0]     # whoever reads it says what is missing


def rows_of_source(source, most):
    """The Rows of a Source, at least `most` of them where there are as many."""
    split = split_of_source(source)
    return load_rows(source.name, source.config, split, source.columns, most=most)


def hub_documents(source, most):
    """The first `most` documents of a Source, a list. Every rank calls it; one of them fetches."""
    most_rows = most if source.document else None
    problem = on_first_rank(lambda: rows_of_source(source, most_rows))
    if problem:
        raise problem
    rows = rows_of_source(source, most_rows)
    if source.document is None:
        return articles_of(rows)[:most]
    documents = []
    for i in range(min(most, len(rows))):
        documents.append(source.document(rows[i]))
    return list(filter(None, documents))


def articles_of(rows):
    """The articles of WikiText, whose rows are lines: a title stands between single marks."""
    articles = []
    for i in range(len(rows)):
        line = rows[i]["text"]
        if ARTICLE.fullmatch(line) or not articles:
            articles.append([])
        articles[-1].append(line)
    texts = ["".join(lines) for lines in articles]
    return [text for text in texts if text.strip()]


# ----------------------------------------------------------------------------------------------
# the user's files

def records_of(path):
    """Yield (place, record) of a file whose suffix says that it holds records."""
    read = READERS.get(text_suffix(path))
    if read:
        yield from read(path)
        return
    for place, value in json_values(path):
        if not isinstance(value, list):
            yield place, value
            continue
        for number, record in enumerate(value, start=1):
            yield f"entry {number}", record


def file_documents(path):
    """Yield the documents of a file (a Path) in its order, none of them empty."""
    if text_suffix(path) in NOTES:
        text = read_text(path)
        if text.strip():
            yield text
        return
    for place, record in records_of(path):
        text = document_of(record, f"{path}, {place}" if place else str(path))
        if text.strip():
            yield text


def files_at(path):
    """The files of a file or folder, without those that are about a data set."""
    files, _ = find_user_files(path)
    about = choose_files(path, files).about
    return [file for file in files if file not in about]


def path_documents(path, most):
    """The first `most` documents at a path of the user's, a list."""
    documents = []
    for file in files_at(path):
        for text in file_documents(file):
            if len(documents) == most:
                return documents
            _check_unicode(text, file)
            documents.append(text)
    return documents


def _check_unicode(text, file):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{file} holds a lone surrogate, which is no character: remove it") from None


# ----------------------------------------------------------------------------------------------
# what --domains says

def parse_domains(text):
    """The Items of a text such as "c4,gsm8k,code=src/" or "validation/", a list.

    UserError for an unknown name, a path that does not exist, a path that is called OWN, and a
    name that is given twice.
    """
    items = []
    for word in filter(None, map(str.strip, text.split(","))):
        name, has_path, path = word.partition("=")
        if has_path:
            items.append(Item(name.strip(), existing_path(path.strip())))
        elif word in SOURCES or word == OWN:
            items.append(Item(word, None))
        else:
            items += _items_at(word)
    for name, path in items:
        if name == OWN and path is not None:
            raise UserError(f"{OWN} is the validation text of the run or of --data, and {path} is "
                            f"another: give it another name, as in {OWN}2={path}")
    names = [item.name for item in items]
    for name in names:
        if not NAME.fullmatch(name) or name == MEAN:
            raise UserError(f"{name!r} is no name of a domain: use letters, digits, - and _")
        if names.count(name) > 1:
            raise UserError(f"two domains are called {name}: name them, as in {name}2=PATH")
    if not items:
        raise UserError(f"domains={text!r} names none: choose from {', '.join(SOURCES)}, or give "
                        "NAME=PATH")
    return items


def _items_at(word):
    """The Items of a file, or of the files in a folder, named as the files are."""
    if not Path(expand_home(word, "write the whole path")).exists():
        raise UserError(f"{word} is no domain, and no file or folder: choose from {OWN}, "
                        f"{', '.join(SOURCES)}, or give NAME=PATH")
    items = []
    for file in files_at(existing_path(word)):
        stem = file.name.split(".")[0]
        items.append(Item(SPLIT.sub("", stem), file))
    return items


def canonical_domains(text):
    """A text for the --domains of a run, or None for none.

    Paths are absolute, so that a run which is resumed from elsewhere reads the same, and OWN is
    left out, for every run has it.
    """
    items = parse_domains(text) if text else []
    words = [f"{name}={path}" if path else name for name, path in items if name != OWN]
    return ",".join(words) or None


def check_best_by(best_by, text):
    """UserError where the steps of a run cannot be compared by what --best_by says.

    text: of --domains, or None. A run always has OWN besides.
    """
    names = [item.name for item in parse_domains(text)] if text else []
    choices = [OWN, *names, MEAN]
    if best_by is not None and best_by not in choices:
        raise UserError(f"best_by={best_by} is no domain of this run: choose from "
                        f"{', '.join(choices)}, or add it to --domains")


def load_domains(text, most, own=None):
    """The Domains that a text names, a list; of each the first `most` documents.

    own: the documents of OWN, a list; None where there are none. Every rank calls it. UserError
    where one of them cannot be had or has no text; HubError (an OSError) where the hub fails.
    """
    domains = []
    for name, path in parse_domains(text):
        if path is not None:
            documents = path_documents(path, most)
        elif name == OWN:
            documents = own
        else:
            documents = hub_documents(SOURCES[name], most)
        if not documents:
            raise UserError(f"the domain {name} ({path or 'no path'}) has no text: "
                            "add some, or leave it out")
        domains.append(Domain(name, documents))
    return domains


# ----------------------------------------------------------------------------------------------
# the command

# settings
domains = "c4,gsm8k,humaneval"  # what is written: names, or NAME=PATH
folder = "validation"           # where to
documents = 2000                # at most, of each


def write_domain(target, domain):
    """Write a Domain as a parquet file with a column `text` in a folder; returns its path."""
    source = SOURCES.get(domain.name)
    is_whole = source is not None and len(domain.documents) == source.count
    name = DOCUMENTED.get(domain.name) if is_whole else None
    path = target / (name or f"{domain.name}_validation.parquet")
    table = pa.table({"text": pa.array(domain.documents, pa.string())})
    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd")
    return path


def main():
    settings = configure(globals())
    require(settings, 1, "documents")
    start = time.time()
    if OWN in [item.name for item in parse_domains(domains)]:
        raise UserError(f"{OWN} is the text of a run: give NAME=PATH to write a text of yours")
    loaded = load_domains(domains, documents)
    target = Path(expand_home(folder, "write the whole path"))
    target.mkdir(parents=True, exist_ok=True)
    written = {}
    for domain in loaded:
        path = write_domain(target, domain)
        size = path.stat().st_size
        print0(f"{path}: {len(domain.documents):,} documents, {size / 1e3:,.0f} kB")
        written[domain.name] = {
            "file": str(path), "documents": len(domain.documents), "bytes": size}
    print0(f"python -m scripts.base_loss --domains={folder} measures a model by them")
    finish_stage("domains", time.time() - start, settings, written=written)


if __name__ == "__main__":
    main()
