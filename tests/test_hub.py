"""Data sets of the hub, from a server on this machine that fails in all the ways a network does.

With NANOCHAT_TEST_DATA it also serves real data, laid out as on the hub.
"""
import io
import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.multiprocessing as mp

from conftest import last_json
from hub_fakes import NAME, SMALL, Hub, parquet_bytes
from nanochat import download, hub
from nanochat.common import UserError, all_reduce_max, compute_cleanup, compute_init
from nanochat.hub import (
    HubError,
    Rows,
    cache_folder,
    fetch_split,
    is_offline,
    list_files,
    load_rows,
    on_first_rank,
)
from stage_runs import rank_variables

REAL = os.environ.get("NANOCHAT_TEST_DATA")


@pytest.fixture
def server(base_dir, monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(download, "BLOCK_BYTES", 512)  # the files are small
    yield server
    server.close()


def whole_split():
    """Whether the cache has the training split as the server has it, and nothing else."""
    folder = cache_folder(NAME, "main", "train")
    names = {path.name for path in folder.iterdir()} - {"index.json", ".lock"}
    same = [(folder / name).read_bytes() == SMALL[f"main/train/{name}"] for name in names]
    return names == {"0000.parquet", "0001.parquet"} and all(same)


# ----------------------------------------------------------------------------------------------
# fetching

def test_a_split_is_fetched_once_and_read_by_row(server):
    rows = load_rows(NAME, "main", "train", ["question", "answer"])
    assert len(rows) == 280 and rows[279] == {"question": "279 + 700?", "answer": 279}
    assert [rows[i]["answer"] for i in range(280)] == list(range(280))
    for outside in (-1, 280):
        with pytest.raises(IndexError):
            rows[outside]
    assert load_rows(NAME, "main", "train")[100]["choices"] == {
        "text": ["100", "0"], "label": ["A", "B"]}
    some = load_rows(NAME, "main", "train", most=120)
    assert len(some) == 200 and some.total == 280, "two row groups"
    assert len(load_rows(NAME, "main", "train", most=200)) == 200
    assert len(load_rows(NAME, "main", "train", most=251)) == 280
    assert whole_split()
    assert len(server.requests) == 3, "a listing and two files; what is there is not asked for"


def test_the_listing_is_read_to_its_last_page(server):
    server.page = 2
    listed = list_files(NAME)
    assert {key: len(files) for key, files in listed.items()} == {
        ("main", "train"): 2, ("main", "test"): 1}
    assert sorted(listed["main", "train"])[1].size == len(SMALL["main/train/0001.parquet"])
    assert len(server.requests) == 2


@pytest.mark.parametrize("next_host", [None, "https://inside.example"])
def test_a_mirror_may_lie_below_a_path(server, monkeypatch, next_host):
    server.prefix, server.page, server.redirects = "/mirrors/hf", 1, True
    server.next_host = next_host
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/mirrors/hf//")
    assert len(load_rows(NAME, "main", "train")) == 280 and whole_split()


def test_names_that_lead_out_of_the_cache_are_not_taken(server):
    server.files[NAME] |= {"../../x.parquet": b"", "main/../x.parquet": b"", "main/train/x.py": b"",
                           "main/more/train/x.parquet": b"", "main/train/x.parquet.sha256": b""}
    listed = list_files(NAME)
    assert {key: len(files) for key, files in listed.items()} == {
        ("main", "train"): 2, ("main", "test"): 1}
    for name in ("../../etc", "sums", "a/b/c", "somebody/.."):
        with pytest.raises(UserError, match="is no name of a data set"):
            list_files(name)


def test_drops_and_busy_servers_are_survived_and_cut_files_continued(server):
    # docs/traps.md: half-downloaded
    server.trouble = {
        "listing": [503, 429],
        "main/train/0000.parquet": ["cut", 429, "cut", 500],
        "main/train/0001.parquet": ["garbage"],
    }
    assert len(load_rows(NAME, "main", "train")) == 280 and whole_split()
    ranges = server.fetched("main/train/0000.parquet")
    assert ranges[0] is None and all(ranges[1:]), "a cut file is continued"
    assert server.fetched("main/train/0001.parquet") == [None, None], "a damaged one is not"


def test_a_connection_may_drop_more_often_than_attempts_are_made_while_bytes_come(server):
    file = "main/train/0000.parquet"
    drops = len(SMALL[file]) // 700
    assert drops > download.ATTEMPTS
    server.trouble = {file: ["drop"] * drops}
    assert len(load_rows(NAME, "main", "train")) == 280 and whole_split()
    assert len(server.fetched(file)) == drops + 1
    for trouble in ([500] * 9, ["drop"] + [500] * 9):
        server.trouble, server.requests = {"main/test/0000.parquet": trouble}, []
        with pytest.raises(HubError, match="500"):
            load_rows(NAME, "main", "test")
        assert len(server.fetched("main/test/0000.parquet")) == download.ATTEMPTS


def test_a_server_may_send_less_than_the_range_or_all_of_the_file(server):
    first, second = "main/train/0000.parquet", "main/train/0001.parquet"
    server.trouble = {first: ["cut", "capped"], second: ["cut", "from_start"]}
    assert len(load_rows(NAME, "main", "train")) == 280 and whole_split()
    third = len(SMALL[first]) // 3
    begun = [int(given[6:-1]) for given in server.fetched(first)[1:]]
    assert begun == [third // 512 * 512, third // 512 * 512 + 700], "what came is kept"
    assert len(server.fetched(second)) == 2


def test_a_download_that_is_stopped_keeps_what_came(server, base_dir):
    stop = threading.Event()
    url = f"{server.url}/datasets/{NAME}/resolve/{hub.BRANCH}/main/train/0000.parquet"
    path = base_dir / "0000.parquet"
    assert download.download(url, path, stop, progress=lambda *_: stop.set()) == "interrupted"
    assert len(server.requests) == 1 and not path.exists()
    assert (base_dir / "0000.parquet.part").stat().st_size == download.BLOCK_BYTES


def test_what_is_left_of_a_longer_file_is_not_continued(server):
    folder = cache_folder(NAME, "main", "test")
    folder.mkdir(parents=True)
    (folder / "0000.parquet.part").write_bytes(bytes(9000))
    assert len(load_rows(NAME, "main", "test")) == 5
    assert server.fetched("main/test/0000.parquet") == ["bytes=9000-", None]


def test_the_hash_that_a_reply_tells_is_compared_where_the_listing_has_none(server):
    server.hashes, server.tags, server.redirects = False, True, True
    server.trouble = {"main/train/0000.parquet": ["damaged"]}
    fetch_split(NAME, "main", "train")
    asked = [host for host, path, _, _ in server.requests if path.endswith("train/0000.parquet")]
    assert whole_split() and asked == ["hub", "storage"] * 2


def test_a_file_of_another_length_is_damaged(tmp_path):
    path = tmp_path / "0000.parquet"
    path.write_bytes(SMALL["main/test/0000.parquet"])
    size = path.stat().st_size
    lengths = (None, size, size - 1, size + 1)
    check = download.parquet_problem
    problems = [download._problem_of(path, length, None, check) for length in lengths]
    assert problems == ["", "", "the length is wrong", "the length is wrong"]


def test_the_pause_that_a_server_asks_for_is_kept_unless_it_is_too_long(
        server, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(threading.Event, "wait", lambda _, seconds=None: waited.append(seconds))
    server.trouble = {"main/train/0000.parquet": [429, 500]}
    server.retry_after = "7"
    stop = threading.Event()
    url = f"{server.url}/datasets/{NAME}/resolve/{hub.BRANCH}/main/train/0000.parquet"
    folder = cache_folder(NAME, "main", "train")
    folder.mkdir(parents=True)
    assert download.download(url, folder / "0000.parquet", stop) is None
    assert waited.count(7) == 2 and "next attempt in 7 s" in capsys.readouterr().out
    waited.clear()
    server.trouble = {"main/train/0000.parquet": [500, 500, 500]}
    server.retry_after = "tomorrow"
    assert download.download(url, folder / "doubled.parquet", stop) is None
    pauses = [seconds for seconds in waited if seconds and seconds < 0.01]
    assert pauses == [0.001, 0.002, 0.004]
    server.trouble = {"main/train/0000.parquet": [429]}
    server.retry_after = "86400"
    assert "429" in download.download(url, folder / "again.parquet", stop)
    assert 86400 not in waited


def test_a_file_that_stays_damaged_is_fetched_once_more_and_then_refused(server):
    # docs/traps.md: half-downloaded
    file = "main/train/0001.parquet"
    for trouble in ("garbage", "damaged", "short"):
        server.trouble, server.requests = {file: [trouble] * 9}, []
        with pytest.raises(HubError, match="0001.parquet cannot be fetched: "):
            load_rows(NAME, "main", "train")
        assert len(server.fetched(file)) == 2
        assert not (cache_folder(NAME, "main", "train") / "0001.parquet").exists()
    server.trouble = {}
    assert len(load_rows(NAME, "main", "train")) == 280, "what came before is kept"
    assert len(server.fetched("main/train/0000.parquet")) == 0


def test_a_file_that_changed_since_the_listing_is_not_kept(server):
    server.hashes = False
    server.trouble = {"main/train/0001.parquet": ["changed"]}
    size = len(SMALL["main/train/0001.parquet"])
    with pytest.raises(HubError, match=f"it has not the {size:,} bytes that the hub lists"):
        load_rows(NAME, "main", "train")
    assert not (cache_folder(NAME, "main", "train") / "0001.parquet").exists()


def test_the_files_of_a_split_are_read_in_the_order_of_their_names(server):
    server.files[NAME] = dict(reversed(SMALL.items()))
    rows = load_rows(NAME, "main", "train")
    assert [rows[i]["answer"] for i in (0, 250, 279)] == [0, 250, 279]


@pytest.mark.parametrize("trouble", ["damaged", "short"])
def test_damage_without_a_known_hash_is_found_too(server, trouble):
    server.hashes = False
    server.trouble = {"main/test/0000.parquet": [trouble]}
    if trouble == "damaged":
        assert len(load_rows(NAME, "main", "test")) == 5
        assert len(server.fetched("main/test/0000.parquet")) == 2
        server.trouble = {"main/train/0000.parquet": [trouble] * 9}
        with pytest.raises(UserError, match="damaged as the hub has it"):
            load_rows(NAME, "main", "train")
    else:
        assert len(load_rows(NAME, "main", "test")) == 5


def test_half_a_split_is_never_taken_for_the_whole(server, monkeypatch):
    # docs/traps.md: half-downloaded
    server.trouble = {"main/train/0001.parquet": [404]}
    with pytest.raises(HubError, match="404"):
        fetch_split(NAME, "main", "train")
    assert (cache_folder(NAME, "main", "train") / "0000.parquet").exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="not whole"):
        fetch_split(NAME, "main", "train")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert len(fetch_split(NAME, "main", "train")) == 2 and whole_split()


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(server):
    paths = fetch_split(NAME, "main", "train")
    before = paths[0].read_bytes()
    paths[0].write_bytes(before[:40] + bytes(200) + before[240:])
    assert len(load_rows(NAME, "main", "train")) == 280 and paths[0].read_bytes() == before
    (paths[0].parent / "index.json").write_text("{", encoding="utf-8")
    paths[1].unlink()
    assert len(load_rows(NAME, "main", "train")) == 280 and whole_split()


def change_a_text(path):
    """Change a letter of a cached file so that Arrow reads it as before. Returns what it was."""
    before = path.read_bytes()
    changed = before.replace(b"2 + 703", b"2 + 999")
    assert changed != before
    path.write_bytes(changed)
    assert Rows([path])[2]["question"] == "2 + 999?"
    return before


@pytest.mark.parametrize("hashes", [True, False])
def test_a_text_that_changed_in_the_cache_is_fetched_again_and_never_read(
        server, monkeypatch, hashes):
    server.hashes = hashes      # where the hub does not tell them, those of what came count
    [path, _] = fetch_split(NAME, "main", "train")
    before = change_a_text(path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="is not whole in"):
        load_rows(NAME, "main", "train")
    assert path.read_bytes() != before, "nothing is deleted where nothing can be fetched"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert load_rows(NAME, "main", "train")[2]["question"] == "2 + 703?"
    assert path.read_bytes() == before


# ----------------------------------------------------------------------------------------------
# the token

def test_the_token_is_sent_to_the_hub_and_to_no_other_host(server, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.redirects, server.page = True, 1
    server.next_host = server.storage   # as a mirror passes the hub's own addresses on
    assert len(load_rows(NAME, "main", "train")) == 280
    sent = {(host, token) for host, _, _, token in server.requests}
    assert sent == {("hub", "Bearer hf_secret"), ("storage", None)}
    asked = [host for host, path, _, _ in server.requests if "/tree/" in path]
    assert set(asked) == {"hub"} and len(asked) == 4
    assert "secret" not in capsys.readouterr().out


def test_neither_token_nor_signature_is_printed_where_a_download_fails(server, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.redirects = True
    server.trouble = {"main/test/0000.parquet": [403]}
    with pytest.raises(UserError) as error:
        fetch_split(NAME, "main", "test")
    assert "HF_TOKEN holds the token" in str(error.value)
    assert "accept the terms" in str(error.value) and "\n" not in str(error.value)
    assert "secret" not in str(error.value) + capsys.readouterr().out
    monkeypatch.setenv("HF_TOKEN", "hf secret")
    with pytest.raises(UserError, match="HF_TOKEN must be") as error:
        fetch_split(NAME, "main", "test")
    assert "secret" not in str(error.value)


# ----------------------------------------------------------------------------------------------
# what cannot be had

@pytest.mark.parametrize("name, config, split, words", [
    ("somebody/nothing", "main", "train", "no parquet files of somebody/nothing"),
    (NAME, "other", "train", "choose from main test, main train"),
    (NAME, "main", "validation", "no split validation of main"),
])
def test_what_the_hub_has_not_is_one_line_with_the_choices(server, name, config, split, words):
    with pytest.raises(UserError, match=words) as error:
        fetch_split(name, config, split)
    assert "\n" not in str(error.value) and len(server.requests) == 1
    assert not list(cache_folder(name, config, split).glob("*.parquet"))


CONTINUES = "the same command again continues, HF_ENDPOINT names a mirror"


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("trouble, kind, words", [
    (401, UserError, "no access to .* .HF_TOKEN holds the token.: check the name and the token"),
    (403, UserError, "no access to .* accept the terms"),
    (429, HubError, f"429 .*wait some minutes, or set HF_TOKEN.*; {CONTINUES}"),
    (500, HubError, f"500 .*; {CONTINUES}, .*hub/somebody/sums/CONFIGURATION/SPLIT are read"),
])
def test_a_request_that_fails_is_one_line_with_the_remedy(server, file, trouble, kind, words):
    server.trouble = {"main/test/0000.parquet" if file else "listing": [trouble] * 9}
    with pytest.raises(kind, match=words) as error:
        fetch_split(NAME, "main", "test")
    assert "\n" not in str(error.value)


def test_a_listing_of_another_form_is_one_line_with_the_remedy(server):
    server.trouble = {"listing": ["other"]}
    with pytest.raises(HubError, match="does not list files .*: check HF_ENDPOINT, or unset it"):
        list_files(NAME)


def test_a_connection_that_fails_names_the_setting_that_mends_it():
    import requests
    request = requests.Request("GET", "https://hub.example.org/a?token=secret").prepare()
    for kind, words in (
        (requests.ConnectionError, "no connection to hub.example.org"),
        (requests.exceptions.SSLError, "not trusted (REQUESTS_CA_BUNDLE names your own)"),
        (requests.exceptions.ProxyError, "through the proxy of HTTPS_PROXY"),
    ):
        reason = download.reason_of(kind("a\nlong story", request=request))
        assert reason.endswith(words) and "secret" not in reason


def test_without_a_network_the_cache_alone_is_read(server, monkeypatch):
    fetch_split(NAME, "main", "test")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert len(load_rows(NAME, "main", "test")) == 5
    with pytest.raises(UserError, match="nothing is fetched now: run python -m nanochat.hub"):
        load_rows(NAME, "main", "train", fetch=False)
    with pytest.raises(HubError, match="no connection to 127.0.0.1:9"):
        load_rows(NAME, "main", "train")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(load_rows(NAME, "main", "test")) == 5
    with pytest.raises(UserError, match=f"run python -m nanochat.hub {NAME} main train .or"):
        load_rows(NAME, "main", "train")
    for value, is_set in (("true", True), ("YES", True), ("on", True), ("0", False), ("", False)):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert is_offline() is is_set
    monkeypatch.setenv("HF_ENDPOINT", "hub.example.org")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match="begins with https://"):
        load_rows(NAME, "main", "train")
    for no_address in ("https://[hub", "https:///x"):
        monkeypatch.setenv("HF_ENDPOINT", no_address)
        with pytest.raises(UserError, match="is no address"):
            load_rows(NAME, "main", "train")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@hub.example.org")
    with pytest.raises(UserError, match="must hold no password") as error:
        load_rows(NAME, "main", "train")
    assert "secret" not in str(error.value)


def test_files_that_somebody_has_put_there_are_read_and_never_deleted(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = cache_folder("others/own", "main", "train")
    folder.mkdir(parents=True)
    (folder / "a.parquet").write_bytes(parquet_bytes(0, 40))
    assert len(load_rows("others/own", "main", "train")) == 40
    with pytest.raises(UserError, match="no column 'text', only"):
        load_rows("others/own", "main", "train", ["text"])
    (folder / "a.parquet").write_bytes(parquet_bytes(0, 40)[:-100])
    with pytest.raises(UserError, match="is damaged .*: copy its files again"):
        load_rows("others/own", "main", "train")
    (folder / "a.parquet").write_bytes(parquet_bytes(0, 0))
    with pytest.raises(UserError, match="main/train is an empty split, without any row: "):
        load_rows("others/own", "main", "train")
    assert (folder / "a.parquet").exists() and not server.requests


SHAPES = {
    "question": str, "answer": int, "choices": {"text": [str], "label": [str]},
}


@pytest.mark.parametrize("row, column, value", [
    (0, "question", None),
    (4, "answer", None),
    (3, "choices", None),
    (2, "choices", {"text": None, "label": ["A"]}),
    (5, "choices", {"text": ["3", None], "label": ["A", "B"]}),
])
def test_a_null_is_one_line_with_file_row_and_column(tmp_path, row, column, value):
    table = pq.read_table(io.BytesIO(parquet_bytes(0, 6))).to_pylist()
    paths = [tmp_path / "0000.parquet", tmp_path / "0001.parquet"]
    paths[0].write_bytes(parquet_bytes(0, 6))
    assert len(Rows(paths[:1], SHAPES)) == 6
    table[row][column] = value
    pq.write_table(pa.Table.from_pylist(table), paths[1], row_group_size=2)
    with pytest.raises(UserError) as error:
        Rows(paths, SHAPES)
    assert str(error.value) == (
        f"{paths[1]}, row {row + 1}, column {column!r}: it holds a null: correct or replace this "
        "file")
    assert len(Rows(paths, SHAPES.keys())) == 12, "names alone ask for no shape"
    others = {name: shape for name, shape in SHAPES.items() if name != column}
    assert len(Rows(paths, others)) == 12


@pytest.mark.parametrize("column, value, words", [
    ("question", 7, "has the type int64, not text"),
    ("answer", "7", "has the type string, not integer"),
    ("answer", 7.0, "has the type double, not integer"),
    ("choices", ["a", "b"], "has the type list<.*>, not text: list of text and label: list of"),
    ("choices", {"text": ["a"], "label": [1]}, "has the type struct<.*>, not text: list of"),
    ("choices", {"text": ["a"]}, "has the type struct<.*>, not text: list of"),
    ("choices", {"text": "a", "label": "b"}, "has the type struct<.*>, not text: list of"),
])
def test_another_type_is_one_line_with_file_and_column(tmp_path, column, value, words):
    path = tmp_path / "0000.parquet"
    [row] = pq.read_table(io.BytesIO(parquet_bytes(0, 1))).to_pylist()
    pq.write_table(pa.Table.from_pylist([{**row, column: value}]), path)
    with pytest.raises(UserError, match=f"0000.parquet, column '{column}' {words}") as error:
        Rows([path], SHAPES)
    assert "\n" not in str(error.value)


def test_a_wrong_row_is_named_with_its_file(tmp_path):
    paths = [tmp_path / "0000.parquet", tmp_path / "0001.parquet"]
    for path in paths:
        path.write_bytes(parquet_bytes(0, 120))
    rows = Rows(paths)
    for i, place in ((0, "0000.parquet, row 1"), (119, "0000.parquet, row 120"),
                     (120, "0001.parquet, row 1"), (239, "0001.parquet, row 120")):
        error = rows.error(i, "answer", "no number")
        assert isinstance(error, UserError)
        assert f"{place}, column 'answer': no number: correct" in str(error)


def test_a_disk_that_is_too_small_is_said_before_the_download(server, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="0 MB are free: make room"):
        fetch_split(NAME, "main", "train")
    assert len(server.requests) == 1


def test_progress_is_said_and_so_is_the_size(server, monkeypatch, capsys):
    monkeypatch.setattr(hub, "PROGRESS_SECONDS", 0)
    fetch_split(NAME, "main", "train")
    out = capsys.readouterr().out
    assert f"{NAME} main train, file 2 of 2: 0.0 of 0.0 MB" in out
    assert "reading" not in out
    monkeypatch.setattr(hub, "SLOW_BYTES", 0)
    fetch_split(NAME, "main", "train")
    folder = cache_folder(NAME, "main", "train")
    assert capsys.readouterr().out == f"reading 0 MB of {folder}\n"
    assert f"{NAME} main train: 0.0 MB in 2 files, in {cache_folder(NAME, 'main', 'train')}" in out


# ----------------------------------------------------------------------------------------------
# several processes

def test_two_that_want_the_same_fetch_it_once(server):
    threads = [
        threading.Thread(target=fetch_split, args=(NAME, "main", "train")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert whole_split() and len(server.requests) == 3


def _fetch_on_ranks(rank, variables, base, endpoint, results):
    os.environ.update(variables[rank])
    os.environ.update({"NANOCHAT_BASE_DIR": base, "HF_ENDPOINT": endpoint})
    download.BACKOFF_SECONDS = 0.001
    hub.POLL_SECONDS = 0.05
    compute_init("cpu")
    here = on_first_rank(lambda: fetch_split(NAME, "main", "train"))
    rows = len(load_rows(NAME, "main", "train", fetch=False))
    absent = on_first_rank(lambda: fetch_split(NAME, "main", "validation"))
    failed = all_reduce_max(float(absent is not None), -float(absent is not None))
    results[rank] = (here, rows, type(absent).__name__, [abs(value) for value in failed])
    compute_cleanup()


def test_one_rank_fetches_and_all_learn_whether_it_could(server, base_dir):
    variables = rank_variables(2)
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (variables, str(base_dir), server.url, results)
        mp.spawn(_fetch_on_ranks, arguments, nprocs=2)
        assert results[0] == (None, 280, "UserError", [1.0, 1.0])
        assert results[1] == (None, 280, "HubError", [1.0, 1.0])
    assert len(server.fetched("0000.parquet")) == 1 and len(server.requests) == 4


def test_on_one_rank_the_error_comes_back():
    def fail():
        raise HubError("no")
    assert on_first_rank(lambda: None) is None
    assert str(on_first_rank(fail)) == "no"
    with pytest.raises(ZeroDivisionError):
        on_first_rank(lambda: 1 / 0)


# ----------------------------------------------------------------------------------------------
# the command, and real data

def test_the_command_fills_the_cache(server, base_dir, run_module):
    done = run_module("nanochat.hub", NAME, base=base_dir)
    record = last_json(done.stdout)
    assert record["stage"] == "hub" and record["rows"] == {"test": 5, "train": 280}
    assert whole_split()
    done = run_module("nanochat.hub", NAME, "main", "train", base=base_dir, HF_HUB_OFFLINE="1")
    assert last_json(done.stdout)["rows"] == {"train": 280}
    for words, said in (
        ([], "name a data set"),
        ([NAME, "other"], "name one of its configurations: main"),
        (["somebody/nothing"], "no parquet files"),
    ):
        done = run_module("nanochat.hub", *words, base=base_dir)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(not REAL, reason="NANOCHAT_TEST_DATA is not set")
def test_real_data_in_the_layout_of_the_hub(server):
    root = Path(REAL) / "hf"
    for path in sorted(root.rglob("*.parquet")):
        owner, name, *rest = path.relative_to(root).parts
        server.files.setdefault(f"{owner}/{name}", {})["/".join(rest)] = path.read_bytes()
    server.trouble = {"all/test/0000.parquet": ["cut", 503, "cut"], "main/test/0000.parquet": [429]}
    server.redirects = True
    rows = {
        key: len(load_rows(name, *key))
        for name in ("openai/gsm8k", "cais/mmlu")
        for key in list_files(name)
    }
    assert rows == {
        ("main", "test"): 1319,
        ("main", "train"): 7473,
        ("all", "dev"): 285,
        ("all", "test"): 14042,
        ("all", "validation"): 1531,
    }
    path = root / "openai/gsm8k/main/test/0000.parquet"
    assert Rows([path], ["answer"])[0]["answer"].endswith("#### 18")
