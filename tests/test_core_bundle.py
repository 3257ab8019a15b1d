"""The files of CORE: what is read, and the one line that says what is wrong with them."""
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from core_cases import write_bundle
from nanochat import core_bundle
from nanochat.common import UserError
from nanochat.core_bundle import fetch_bundle, find_bundle, read_bundle, read_task_list, unpack
from nanochat.download import zip_problem

CORE = "core.yaml"
CHOICES = "eval_data/some/choices.jsonl"


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


def test_a_bundle_is_read(bundle):
    tasks = read_bundle(bundle)
    found = [(task.label, task.kind, task.shots, task.baseline, len(task.rows)) for task in tasks]
    assert found == [
        ("choices", "multiple_choice", 2, 0.25, 8),
        ("schemas", "schema", 0, 0.5, 8),
        ("continuations", "language_modeling", 1, 0.0, 8),
    ]
    assert tasks[0].delimiter == "\nAnswer: " and tasks[1].delimiter == " "
    assert [task.label for task in read_bundle(bundle, ["schemas"])] == ["schemas"]


@pytest.mark.parametrize("file, old, new, words", [
    (CORE, "icl_tasks:", "tasks:", "line 2: expected icl_tasks"),
    (CORE, "num_fewshot: [2]", "num_fewshot: many", "num_fewshot=many must be a number"),
    (CORE, "num_fewshot: [2]", "num_fewshot: [2", "line 5: the value '[2' is not understood"),
    (CORE, "num_fewshot: [2]", "- num_fewshot 2", "line 5: expected `key: value`"),
    (CORE, "  icl_task_type: schema\n", "", "icl_task_type is missing"),
    (CORE, "icl_task_type: schema", "icl_task_type: riddle", "riddle is not one of"),
    (CORE, "some/choices", "some/others", "lacks"),
    (CORE, "some/choices.jsonl", "some", "cannot read"),
    (CORE, "label: choices", "label: [1]", "label=[1] must be a text"),
    (CORE, "icl_task_type: schema", "icl_task_type: [1]", "icl_task_type=[1] must be a text"),
    (CORE, "label: choices", "label: schemas", "has the task schemas twice"),
    (CORE, "label: choices", "label: chances", "no baseline in eval_meta_data.csv"),
    ("eval_meta_data.csv", "8,25", "8,often", "line 2: the columns"),
    ("eval_meta_data.csv", "8,25", "8,100", "must be at least 0 and below 100"),
    (CHOICES, '"gold": 1', '"gold": 4', "gold=4 must name one of at least 2, there are 4"),
    (CHOICES, '"gold": 1', '"gold": "B"', "`gold` must be of type int"),
    (CHOICES, '"the map"', "7", "`choices` must hold strings"),
    (CHOICES, '{"query"', '"query"', "line 1: not JSON"),
])
def test_what_is_wrong_with_a_bundle_is_one_line_with_the_remedy(bundle, file, old, new, words):
    path = bundle / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_bundle(bundle)
    message = str(error.value)
    assert words in message and "--bundle" in message and "\n" not in message


@pytest.mark.parametrize("name", [CORE, "eval_meta_data.csv", CHOICES])
def test_a_missing_file_is_named_with_the_remedy(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(UserError, match="--bundle") as error:
        read_bundle(find_bundle(str(bundle)))
    assert name.rpartition("/")[2] in str(error.value)


def test_a_task_that_is_not_there_is_refused_with_those_that_are(bundle):
    with pytest.raises(UserError, match="choose from choices, schemas, continuations"):
        read_bundle(bundle, ["hellaswag"])


def test_values_are_read_with_quotes_and_comments(tmp_path):
    path = tmp_path / CORE
    lines = ["icl_tasks:", "-", "  a: 'x # y' # z", '  b: "\\n: "', "  c: x y # z", "  d: [3]"]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_task_list(path) == [{"a": "x # y", "b": "\n: ", "c": "x y", "d": [3]}]


def test_a_bundle_is_found_where_it_is_named_else_in_the_base_directory(bundle, base_dir):
    assert find_bundle(str(bundle)) == bundle
    with pytest.raises(UserError, match="core.yaml is missing.*--bundle"):
        find_bundle()
    write_bundle(base_dir / "eval_bundle")
    assert find_bundle() == base_dir / "eval_bundle"


# ------------------------------------------------------------------------------------------------
# fetching it

def test_without_a_network_one_line_names_the_remedy(base_dir, monkeypatch):
    monkeypatch.setattr(core_bundle, "download", lambda *_, **__: "no connection to example.org")
    with pytest.raises(UserError, match="no connection to example.org.*--bundle"):
        fetch_bundle()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set.*--bundle"):
        fetch_bundle()


def archive_of(bundle, path, top="eval_bundle"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in bundle.rglob("*.*"):
            if file.is_file():
                archive.write(file, f"{top}/{file.relative_to(bundle)}")
    return path


def test_a_fetched_bundle_is_unpacked_whole(bundle, base_dir, monkeypatch):
    sent = {}

    def bring(url, path, stop, **options):
        sent.update(options)
        archive_of(bundle, path)

    monkeypatch.setattr(core_bundle, "download", bring)
    fetch_bundle()
    assert len(read_bundle(find_bundle())) == 3
    left = sorted(path.name for path in base_dir.iterdir())
    assert left == [".lock", "eval_bundle"], "no part and no archive is left"
    assert sent["auth"] is None, "the hub's token is for the hub alone"
    monkeypatch.setattr(core_bundle, "download", None)
    fetch_bundle()  # it is there


def test_of_two_that_fetch_the_bundle_one_finds_that_of_the_other(bundle, base_dir, monkeypatch):
    fetched = []

    def bring(url, path, stop, **options):
        fetched.append(path)
        time.sleep(0.2)
        archive_of(bundle, path)

    monkeypatch.setattr(core_bundle, "download", bring)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(fetch_bundle) for _ in range(2)]:
            future.result()
    assert len(fetched) == 1 and len(read_bundle(find_bundle())) == 3


def test_an_archive_of_something_else_is_refused(bundle, base_dir):
    archive = archive_of(bundle, base_dir / "x.zip", top="other")
    with pytest.raises(UserError, match="holds no eval_bundle/core.yaml"):
        unpack(archive, base_dir)
    assert [path.name for path in base_dir.iterdir()] == ["x.zip"]


def test_an_archive_that_was_cut_or_changed_is_not_taken(bundle, tmp_path):
    archive = archive_of(bundle, tmp_path / "x.zip")
    assert zip_problem(archive) == ""
    whole = archive.read_bytes()
    # in a name, in what is compressed, in the list at the end
    for place in (60, 200, len(whole) // 2, len(whole) - 100):
        data = bytearray(whole)
        data[place] ^= 255
        archive.write_bytes(data)
        assert zip_problem(archive), place
    archive.write_bytes(whole[:200])
    assert zip_problem(archive)
