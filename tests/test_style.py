"""The style of the sources, read from the sources: width, density, words, conditions, repetition.

Every check is a function of a file's text, and has a small test on made-up text beside the test on
the repository, so that a check which finds nothing is known to be one that could find something.
The words come from docs/glossary.md, the names of the traps from docs/traps.md.
"""
import ast
import io
import itertools
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_COLUMNS = 100
MAX_NODES_PER_LINE = 9.0   # nanochat's own files have 6.9 to 8.9, nanoGPT's 6.6 to 9.0
MIN_LINES_FOR_DENSITY = 5  # below that an average says nothing
MAX_OPERANDS = 3           # of one `and` or `or`
MAX_SHARED_LINES = 12      # consecutive lines of logic that two files may have in common
GENERATED = {".git", ".venv", "__pycache__", "build", "node_modules", "target"}

# (what not to write, what to write). A blank also matches an underscore and a line break, so that
# a phrase is found in a name and where a comment wraps. Letters on either side prevent a match.
# Upper and lower case are the same, except inside (?-i: ...).
BANNED = [
    # generation
    ("read once", "prefill"),
    ("(?:stands?|standing|stood) still", "a finished slot, no longer advanced"),
    # stopping and starting
    ("(?:go|goes|going|gone|went) on", "resume (a run), continue (anything else)"),
    ("anew", "again, from the start"),
    # numbers that are not finite
    ("sick", "diverged (a run), non-finite (a value)"),
    # sequences of a step, entries of a vocabulary
    ("rows at once", "micro_batch_size"),
    ("passes per|passes *=(?!=)", "grad_accum_steps"),
    ("row_tokens", "tokens per micro-batch"),
    ("rows per (?:rank|device|step)", "sequences per rank, device or step"),
    ("(?:extra|padded) rows", "vocab_size_padded"),
    # lookups and counts
    # the name and the noun; the verb stays
    (r"\.reach|(?:the|its|a) reach|reach *[-+=,)\]]|(?-i:REACH)", "lookback (tokens)"),
    ("left_out", "leave_one_out"),
    ("(?<!_)(?-i:PARTS)", "mixture components"),
    ("(?<!_)(?-i:ORDERS)", "max n-gram order"),
    ("(?<!_)(?-i:LEAST)", "minimum count"),
    ("totals, kinds|kinds, hits", "context count, distinct continuations, target count"),
    ("how far to believe", "mixture weights"),
    ("(?<!is )(?<!are )(?<!was )silent", "zero-initialised"),
    ("a second look", "x0 skip connection"),
    # the learning rate
    ("the rate(?! of )(?! from )(?! at which )", "the learning rate"),
    ("before it fell|before decaying", "before LR decay"),
    ("warm-down", "LR decay, decay phase (the setting's name warmdown stays)"),
    # the data loader
    ("stretch(?:es|ed)?", "shuffle buffer"),
    ("dealt(?! with)", "yielded"),
    # checkpoints and ranks
    ("SaveUnderWay|saves? under way|under_way", "async save"),
    ("must *=(?!=)", "raise_on_error"),
    ("agree\\(", "all_reduce_max"),
    ("squares *=(?!=) *(?:sum|0)", "grad_norm_sq"),
    ("last words", "failure message"),
    # all else
    ("twins?", "reference implementation"),
    ("of late", "recently, or the number's name (median)"),
    ("so many of it", "the noun: so many devices, so many tokens"),
    ("spare", "the quantity's name"),
]


# --- the files


def _git_files():
    """Paths of the tracked files, or none where this is no checkout of git."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [ROOT / name for name in listing.split("\0") if name]


def _glob_files():
    """Paths of all files that are not generated."""
    paths = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in paths if not GENERATED & set(path.relative_to(ROOT).parts)]


def _is_source(path):
    return path.suffix in (".py", ".sh", ".rs") or path == ROOT / ".ci" / "run"


def _relative(path):
    return path.relative_to(ROOT).as_posix()


def _texts(paths):
    """{path relative to the repository: text}"""
    return {_relative(path): path.read_text(encoding="utf-8") for path in sorted(paths)}


TRACKED = [path for path in _git_files() or _glob_files() if path.is_file()]
SOURCES = _texts(path for path in TRACKED if _is_source(path))
PACKAGES = {
    name: text
    for name, text in SOURCES.items()
    if name.split("/")[0] in ("nanochat", "scripts", "tasks")
}
MODULES = {name: text for name, text in PACKAGES.items() if name.endswith(".py")}
CORE = {name: text for name, text in MODULES.items() if name.startswith("nanochat/")}
TESTS = {
    name: text
    for name, text in SOURCES.items()
    if name.startswith("tests/") and name.endswith(".py")
}


def _report(problems):
    """Fail with one problem a line."""
    problems = list(problems)
    if problems:
        pytest.fail(f"{len(problems)} found\n" + "\n".join(problems), pytrace=False)


def test_the_files_are_found():
    assert {"nanochat/gpt.py", "scripts/base_train.py", "tasks/common.py"} <= MODULES.keys()
    assert {"speedrun.sh", "rustbpe/src/bpe.rs", ".ci/run"} <= SOURCES.keys()
    assert "tests/conftest.py" in TESTS
    # the two ways to list the files agree
    assert {path for path in _git_files() if path.is_file()} <= set(_glob_files())


# --- width


def long_lines(text):
    """[(line number, columns)] of the lines that are too long."""
    lines = enumerate(text.split("\n"), start=1)
    return [(number, len(line)) for number, line in lines if len(line) > MAX_COLUMNS]


def test_a_line_of_101_columns_is_too_long():
    assert long_lines("x" * 100 + "\n" + "ä" * 100) == []
    assert long_lines("short\n" + "x" * 101) == [(2, 101)]


def test_no_line_is_over_100_columns():
    _report(
        f"{name}:{number}: {columns} columns, at most {MAX_COLUMNS}"
        for name, text in SOURCES.items()
        for number, columns in long_lines(text)
    )


# --- density


def nodes_per_line(source):
    """Nodes of the syntax tree for each line that is not blank, on average; None for few lines."""
    lines = [line for line in source.split("\n") if line.strip()]
    if len(lines) < MIN_LINES_FOR_DENSITY:
        return None
    return sum(1 for _ in ast.walk(ast.parse(source))) / len(lines)


def test_density_counts_the_nodes_of_a_line():
    assert nodes_per_line("x = 1\n" * 4) is None
    # a line: Assign, Name, Store, Constant (the context Store is one node for all); plus the Module
    assert 3 < nodes_per_line("x = 1\n\n" * 10) < 5
    crowded = "x = [f(a, b) if a and b else g(c)[d] for a, b, c, d in h(*e)]\n"
    assert nodes_per_line(crowded * 10) > MAX_NODES_PER_LINE


def test_no_file_has_more_than_nine_nodes_a_line():
    densities = {name: nodes_per_line(text) for name, text in MODULES.items()}
    _report(
        f"{name}: {density:.1f} nodes per line, at most {MAX_NODES_PER_LINE}"
        for name, density in densities.items()
        if density is not None and density > MAX_NODES_PER_LINE
    )


# --- words


def _compile(expression):
    """A pattern of BANNED as a regular expression; see the comment there."""
    gap = r"""(?:[\s#"'_]+)"""
    # a lookbehind needs a fixed width, so a blank stays a blank inside of it
    pieces = re.split(r"(\(\?<![^)]*\))", expression)
    widened = "".join(piece if piece.startswith("(?<!") else _widen(piece, gap) for piece in pieces)
    whole_word = f"(?<![a-z])(?:{widened})(?:(?<![a-z])|(?![a-z]))"
    return re.compile(whole_word, re.IGNORECASE)


def _widen(piece, gap):
    """`piece` with `gap` for each blank that stands between two words."""
    return re.sub(r"(?<=[\w)?]) (?=[\w(])", lambda _: gap, piece)


PATTERNS = [(_compile(expression), instead) for expression, instead in BANNED]


def banned_words(text):
    """[(line number, what stands there, what to say)]"""
    found = []
    for pattern, instead in PATTERNS:
        for match in pattern.finditer(text):
            number = text.count("\n", 0, match.start()) + 1
            words = " ".join(match.group().split())
            found.append((number, words, instead))
    return sorted(found)


@pytest.mark.parametrize("text", [
    "the run goes on",
    "def how_to_go_on():",
    "# the run goes\n    # on from there",
    '"the run goes "\n    "on"',
    "Sick weights",
    "sick_run = True",
    "rows_at_once = 4",
    "x.unfold(1, self.reach, 1)",
    "REACH = 512",
    "def __init__(self, reach):",
    "the reach of the lookups",
    "model.left_out = True",
    "at half the rate",
    "until the warm-down",
    "dealt out",
    "class SaveUnderWay:",
    "self.under_way = None",
    "finish(must=False)",
    "agree(rate)",
    "squares = sum(norms)",
    "for silent in (a, b):",
    "a slow twin",
    "ORDERS = 4",
    "progress + spare >= 1",
    "last_words(reason)",
])
def test_a_banned_word_is_found(text):
    assert banned_words(text)


@pytest.mark.parametrize("text", [
    "the first one, going online",
    "at least two orders of magnitude",
    "parts of a message, in the order of a hash",
    "what a step would reach",
    "so that tests reach every case",
    "NGRAM_ORDERS = 4",
    "return row\n\ntokens = 4",
    "silently ignored",
    "the rate of requests",
    "the learning rate",
    "warmdown = 0.6",
    "dealt with",
    "must be above zero",
    "if must == 1",
    "ranks disagree(d)",
    "a test passes",
    "rows of the table",
    "renew, lately, homesickness, backstretched",
])
def test_other_words_are_not_banned(text):
    assert banned_words(text) == []


def test_a_banned_word_is_reported_at_its_line():
    assert banned_words("x = 1\n# a sick run\n") == [
        (2, "sick", "diverged (a run), non-finite (a value)"),
    ]


def test_the_words_are_those_of_the_glossary():
    _report(
        f'{name}:{number}: "{words}": say {instead}'
        for name, text in PACKAGES.items()
        for number, words, instead in banned_words(text)
    )


# --- conditions


def crowded_conditions(source):
    """[(line number, what is wrong)] of conditions that hold more than one idea."""
    found = []

    def visit(node, depth, inside_conditional):
        """depth: how many `and` and `or` stand around the node."""
        if isinstance(node, ast.Lambda):
            depth, inside_conditional = 0, False
        elif isinstance(node, ast.BoolOp):
            depth += 1
            if len(node.values) > MAX_OPERANDS:
                found.append((node.lineno, f"{len(node.values)} operands in one condition"))
            if depth > 2:
                found.append((node.lineno, "and, or nested more than one level deep"))
        elif isinstance(node, ast.IfExp):
            if inside_conditional:
                found.append((node.lineno, "a conditional expression inside another"))
            inside_conditional = True
        for child in ast.iter_child_nodes(node):
            visit(child, depth, inside_conditional)

    visit(ast.parse(source), 0, False)
    return found


@pytest.mark.parametrize("source", [
    "x = a and b and c and d",
    "x = a and (b or (c and d))",
    "x = a if b else c if d else e",
    "x = a if b else f'{c if d else e}'",
    "x = f(a or not (b and all(c or d for c in e)))",
])
def test_a_crowded_condition_is_found(source):
    assert [number for number, _ in crowded_conditions("\n" + source)] == [2]


@pytest.mark.parametrize("source", [
    "x = a and b and c",
    "x = a and (b or c) and (d or e)",
    "x = (a if b else c) + (d if e else f)",
    "x = a if b else lambda: c if d else e",
    "if a and b:\n    x = c or d\nelif e and f:\n    x = g if h else i",
])
def test_a_plain_condition_is_not(source):
    assert crowded_conditions(source) == []


def test_a_condition_holds_one_idea():
    _report(
        f"{name}:{number}: {problem}"
        for name, text in MODULES.items()
        for number, problem in crowded_conditions(text)
    )


# --- repetition


def _lines_of(node):
    return range(node.lineno, node.end_lineno + 1)


def _is_docstring(statement):
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_constant and isinstance(statement.value.value, str)


def _is_setting(statement):
    """Whether it gives a name a constant: `depth = 4`, `minutes: float = None`."""
    is_assignment = isinstance(statement, (ast.Assign, ast.AnnAssign))
    return is_assignment and isinstance(statement.value, ast.Constant)


def logic_lines(source):
    """[(line number, line)]: without blanks, comments, docstrings, imports, settings, brackets.

    Settings are the constants that the head of a script assigns. Two scripts may have the same
    settings, for a setting has one name in all of them.
    """
    tree = ast.parse(source)
    dropped = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            dropped.update(_lines_of(node))
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            dropped.update(_lines_of(body[0]))
    for statement in tree.body:
        if _is_setting(statement):
            dropped.update(_lines_of(statement))

    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            number, column = token.start
            lines[number - 1] = lines[number - 1][:column]

    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    return [
        (number, line)
        for number, line in numbered
        if number not in dropped and re.search(r"\w", line)
    ]


def shared_runs(ours, theirs, longest=MAX_SHARED_LINES):
    """Runs of more than `longest` lines that both have, each from the first line on.

    ours, theirs: what logic_lines() gives.
    Returns [(first line of ours, first line of theirs, number of lines)].
    """
    window = longest + 1
    places = {}
    for start in range(len(theirs) - window + 1):
        key = tuple(line for _, line in theirs[start:start + window])
        places.setdefault(key, start)

    runs = []
    start = 0
    while start + window <= len(ours):
        key = tuple(line for _, line in ours[start:start + window])
        place = places.get(key)
        if place is None:
            start += 1
            continue
        pairs = zip(ours[start:], theirs[place:])
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0][1] == pair[1][1], pairs))
        runs.append((ours[start][0], theirs[place][0], same))
        start += same
    return runs


def test_logic_is_what_is_left_without_comments_docstrings_imports_and_settings():
    source = (
        '"""A module."""\n'
        "from os import (\n    path,\n)\n"
        "depth = 4  # a setting\n"
        "minutes: float = None\n\n"
        "def f(x):\n"
        '    """A function."""\n'
        "    # a comment\n"
        "    return g(\n"
        '        "# no comment",  # a comment\n'
        "    )\n"
    )
    assert logic_lines(source) == [
        (8, "def f(x):"),
        (11, "return g("),
        (12, '"# no comment",'),
    ]


def test_thirteen_lines_in_common_are_found_and_twelve_are_not():
    def program(first, count):
        return "".join(f"f({i})\n" for i in range(first, first + count))

    ours = logic_lines("g()\n" + program(0, 13) + "h()\n")
    theirs = logic_lines("# different\n\n" + program(0, 13).replace("\n", "  # comment\n\n"))
    assert shared_runs(ours, theirs) == [(2, 3, 13)]
    assert shared_runs(ours, logic_lines(program(0, 12))) == []
    assert shared_runs(ours, logic_lines(program(100, 50))) == []


def test_no_two_files_share_more_than_twelve_lines_of_logic():
    logic = {name: logic_lines(text) for name, text in MODULES.items()}
    _report(
        f"{a}:{line_a} and {b}:{line_b} share {count} lines, at most {MAX_SHARED_LINES}"
        for a, b in itertools.combinations(logic, 2)
        for line_a, line_b, count in shared_runs(logic[a], logic[b])
    )


# --- docstrings


def undocumented_classes(source):
    """[(line number, name)] of the public classes without a docstring."""
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    public = [node for node in classes if not node.name.startswith("_")]
    return [(node.lineno, node.name) for node in public if not ast.get_docstring(node)]


def test_a_class_without_a_docstring_is_found():
    assert undocumented_classes('class A:\n    """One."""\n\nclass _B:\n    pass') == []
    assert undocumented_classes("x = 1\nclass A:\n    x = 1") == [(2, "A")]


def test_every_public_class_of_the_core_has_a_docstring():
    _report(
        f"{name}:{number}: class {class_name} has no docstring"
        for name, text in CORE.items()
        for number, class_name in undocumented_classes(text)
    )


# --- tests and the traps that they guard


def numbered_tests(source):
    """Names of the tests that are called by a number in place of a sentence."""
    nodes = ast.walk(ast.parse(source))
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    return [name for name in names if re.match(r"test_traps?_\d", name)]


def cited_traps(text):
    """Slugs that follow "docs/traps.md:", several apart by commas."""
    lists = re.findall(r"docs/traps\.md:\s*([a-z0-9-]+(?:, *[a-z0-9-]+)*)", text)
    return {slug.strip() for line in lists for slug in line.split(",")}


def traps_and_guards(page):
    """{slug: test files} of a page in which each trap has a heading of the second level."""
    _, *sections = re.split(r"^## +", page, flags=re.MULTILINE)
    parts = [section.partition("\n") for section in sections]
    return {
        heading.strip(): set(re.findall(r"tests/[\w/]+\.py", body))
        for heading, _, body in parts
    }


def test_traps_are_read_from_the_page_and_from_the_tests():
    page = "# Traps\n\n## one-thing\n\nText, `tests/test_a.py`.\n\n## two\n\nText.\n"
    assert traps_and_guards(page) == {"one-thing": {"tests/test_a.py"}, "two": set()}
    assert cited_traps("# docs/traps.md: one-thing, two\n") == {"one-thing", "two"}
    assert cited_traps('"""docs/traps.md: two."""') == {"two"}
    assert cited_traps("see docs/traps.md") == set()
    old = "def test_trap_05_files(): pass\ndef test_traps_01_and_31(): pass\n"
    assert len(numbered_tests(old)) == 2
    assert numbered_tests("def test_trap_doors_are_shut(): pass") == []


def test_the_name_of_a_test_is_a_sentence():
    _report(
        f"{path}: {name} is called by a number: name it by its sentence and cite the trap as "
        "# docs/traps.md: slug"
        for path, text in TESTS.items()
        for name in numbered_tests(text)
    )


def test_every_trap_that_a_test_cites_is_in_docs_traps():
    traps = traps_and_guards((ROOT / "docs" / "traps.md").read_text(encoding="utf-8"))
    others = {name: text for name, text in TESTS.items() if name != "tests/test_style.py"}
    cited = {name: cited_traps(text) for name, text in others.items()}
    _report(
        f"{name} cites {slug}, which is no heading of docs/traps.md"
        for name, slugs in cited.items()
        for slug in sorted(slugs - traps.keys())
    )


def test_docs_traps_names_the_tests_that_cite_it():
    traps = traps_and_guards((ROOT / "docs" / "traps.md").read_text(encoding="utf-8"))
    others = {name: text for name, text in TESTS.items() if name != "tests/test_style.py"}
    problems = []
    for slug, named in traps.items():
        citing = {name for name, text in others.items() if slug in cited_traps(text)}
        unnamed = sorted(citing - named)
        problems += [f"docs/traps.md, {slug}: name {name}, which cites it" for name in unnamed]
        uncited = sorted(named - citing)
        problems += [f"docs/traps.md, {slug}: {name} does not cite it" for name in uncited]
    _report(problems)


# --- the pages


def named_paths(page):
    """Paths of files and folders in backticks: those that hold a slash, or end as sources do."""
    quoted = re.findall(r"`([\w./-]+)`", page)
    return {path for path in quoted if re.search(r"\w/|\.(?:py|sh|md|rs|html|toml|yaml)$", path)}


def tree_paths(readme):
    """Paths of the README's tree: the first words of its lines, the indented ones in nanochat/.

    A line may name several files, apart by blanks; two blanks end the names.
    """
    block = re.search(r"## The tree\n+```\n(.*?)```", readme, re.DOTALL)
    paths, folder = [], ""
    for line in block.group(1).split("\n"):
        if not line.strip():
            continue
        if not line.startswith(" "):
            folder = ""
        names = re.findall(r"[\w./-]*\w(?:/|\.\w+)(?=\s|$)", re.split(r"\s{3,}", line.strip())[0])
        paths += [folder + name for name in names]
        if line.split()[0].endswith("/") and not line.startswith(" "):
            folder = line.split()[0]
    return paths


def named_modules(page):
    """Files of the modules that a page runs with `python -m`."""
    names = re.findall(r"-m ((?:nanochat|scripts|tasks)\.[\w.]*\w)", page)
    return {name.replace(".", "/") + ".py" for name in names}


def test_paths_are_read_from_a_page_and_from_a_tree():
    assert named_modules("`python -m scripts.base_train -x`.") == {"scripts/base_train.py"}
    assert named_paths("`a/b.py`, `x = 1`, `speedrun.sh`, `GPT`") == {"a/b.py", "speedrun.sh"}
    readme = (
        "## The tree\n\n```\n"
        "run.sh               all\n"
        "core/\n"
        "  a.py               one\n"
        "  b.py  c.py         two\n"
        "docs/                pages\n"
        "```\n"
    )
    assert tree_paths(readme) == ["run.sh", "core/", "core/a.py", "core/b.py", "core/c.py", "docs/"]


@pytest.mark.parametrize("page", ["docs/glossary.md", "docs/traps.md", "docs/gpu.md"])
def test_a_page_names_files_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = sorted(named_paths(text))
    assert paths
    _report(f"{page}: {path} does not exist" for path in paths if not (ROOT / path).exists())


def test_the_tree_of_the_readme_is_that_of_the_repository():
    named = tree_paths((ROOT / "README.md").read_text(encoding="utf-8"))
    core = {name for name in CORE if not name.endswith("__init__.py")}
    top = {name for name in core if name.count("/") == 1}
    missing = [f"README.md: {path} does not exist" for path in named if not (ROOT / path).exists()]
    unnamed = [f"README.md: the tree lacks {path}" for path in sorted(top - set(named))]
    _report(missing + unnamed)


@pytest.mark.parametrize("page", ["README.md", "docs/numerical_stability.md"])
def test_a_page_runs_modules_that_exist(page):
    modules = sorted(named_modules((ROOT / page).read_text(encoding="utf-8")))
    assert modules
    _report(f"{page}: {module} does not exist" for module in modules if module not in MODULES)
