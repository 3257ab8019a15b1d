"""docs/tour.md: every stop is there, and every line that they tell people to type
does what the page says."""
import ast
import doctest
import re

import pytest
import torch

from conftest import ROOT

TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
STOPS = re.findall(r"^- `([\w/.]+)`: (.*)$", TOUR, re.M)


def names_in(path):
    """The functions, classes and methods (Class.method) that a file defines."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        for inner in getattr(node, "body", ()) if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                found.add(f"{node.name}.{inner.name}")
    return found


def missing_names(file, words):
    """The names between backticks of a stop that its file does not define."""
    if not (ROOT / file).is_file():
        return [file]
    return sorted(set(re.findall(r"`([A-Za-z_][\w.]*)`", words)) - names_in(ROOT / file))


@pytest.mark.parametrize("file, words", STOPS, ids=[f"{i}-{f}" for i, (f, _) in enumerate(STOPS)])
def test_every_stop_of_the_tour_is_in_its_file(file, words):
    assert re.match("`", words), "a stop names what to read"
    assert missing_names(file, words) == []


def test_a_stop_that_is_not_there_would_be_found():
    assert len(STOPS) > 25
    assert missing_names("nanochat/gpt.py", "`GPT.features`, `GPT.featurez`") == ["GPT.featurez"]
    assert missing_names("nanochat/gtp.py", "`GPT`") == ["nanochat/gtp.py"]


def test_the_lines_of_the_tour_do_what_it_says():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        result = doctest.testfile(str(ROOT / "docs" / "tour.md"), module_relative=False)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    assert result.attempted > 30 and result.failed == 0
