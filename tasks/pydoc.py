"""What the objects of Python's library, numpy and torch do, from the first sentences of their docstrings.

    What does textwrap.dedent do?         ->  Remove any common leading whitespace from every line in text.
    Which module has dedent?              ->  textwrap
    What does textwrap.dedent do?         ->  the likeliest of four sentences ("choice", for evaluation)
    the same with the four in sight       ->  the letter of one ("letter")

Objects: public functions, classes and methods. Sources of the standard library are read with `ast`, so that nothing with
side effects is imported; modules written in C, numpy and torch, which a training imports anyway, are looked through as
they are. The rule for an object to be taken looks at its own docstring only, the same in training and test:
  - the first sentence of the first paragraph that is no signature, its markup taken away, is kept as the object's sentence;
  - it has 4 words and 20 characters at least, and starts with a letter;
  - it is not boilerplate (`Return self+value.`, `Deprecated ...`);
  - no object before has the same sentence (compared without case and punctuation).
Train and test are split by a hash of the object's name. As sentences are unique, and the wrong choices of a question come
from the question's own split, no choice of a test question was an answer or a choice in training. Wrong choices are drawn
evenly from the whole split: they are neither picked to be near the right one nor to be far from it.
"""
import ast
import importlib
import inspect
import json
import random
import re
from collections import Counter

from nanochat.common import UserError, atomic_write, get_base_dir, print0
from nanochat.sources import python_files
from tasks.common import Task, answer_text, check_split, conversation, fraction, render_mc, split_of

LETTERS = "ABCD"
CHOICE_CHARS = 70   # a choice is cut here, at a word's end
ANSWER_CHARS = 160  # a longer sentence is no answer
MODULES_IN_C = ("builtins", "array", "binascii", "bisect", "cmath", "collections", "datetime", "decimal", "functools", "gc",
                "hashlib", "heapq", "io", "itertools", "marshal", "math", "operator", "os", "random", "re", "select", "signal",
                "socket", "sqlite3", "struct", "sys", "time", "unicodedata", "zlib")
PACKAGES = ("numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.ma", "numpy.char", "torch", "torch.nn",
            "torch.nn.functional", "torch.optim", "torch.linalg", "torch.fft", "torch.special", "torch.distributions",
            "torch.utils.data")
SKIPPED_MODULES = ("antigravity", "this", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "distutils",
                   "ensurepip")
BOILERPLATE = re.compile(r"deprecated|return self|see help|helper for|alias for|initialize self|internal|not implemented|"
                         r"create and return a new|same as |like |true if self|see |this (method|function) is|todo|override|"
                         r"in-?place version|scalar method identical|out-of-place version|rfc \d", re.I)


def first_sentence(doc):
    """The first sentence of a docstring as plain text on one line, or "" where it does not say what the object does.

    >>> first_sentence("abs(x, /)\\n\\nReturn the ``absolute`` value\\nof the argument. Or so.")
    'Return the absolute value of the argument.'
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc).replace(" -- ", "\n\n"))
    text = next((p for p in paragraphs if not re.match(r"[\w.]+\s*\(|[\w.]+$|\.\. |>>>", p)), "")
    text = re.sub(r":\w+(?::\w+)?:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", " ".join(text.split()))  # :func:`~a.b` is a.b
    text = re.sub(r"[`*]+", "", text)
    text = re.split(r"(?<=[a-z)\]0-9])[.:](?= |$)", text)[0].rstrip(" .;,") + "."
    fine = 20 <= len(text) <= ANSWER_CHARS and len(text.split()) >= 4 and text[0].isalpha() and text.isascii()
    return text if fine and not BOILERPLATE.match(text) else ""


def _from_source(module, path):
    """(name, docstring) of the public classes, methods and functions that a source file defines."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    for node in tree.body:
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        yield f"{module}.{node.name}", ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, kinds) and not method.name.startswith("_"):
                    yield f"{module}.{node.name}.{method.name}", ast.get_docstring(method)


def _from_import(name):
    """(name, docstring) of the public functions, classes and methods in a module; numpy's and torch's own only, not what they import."""
    module = importlib.import_module(name)
    package = name.partition(".")[0]
    for key, value in sorted(vars(module).items()):
        origin = (getattr(value, "__module__", None) or package).partition(".")[0]
        if key.startswith("_") or not callable(value) or package in ("numpy", "torch") and origin != package:
            continue
        if key.endswith(("Tensor", "Storage")) and key != "Tensor":  # torch's many old names for Tensor
            continue
        full = key if name == "builtins" else f"{name}.{key}"
        yield full, value.__doc__ if isinstance(value.__doc__, str) else None
        if inspect.isclass(value):
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and callable(function) and isinstance(function.__doc__, str):
                    yield f"{full}.{method}", function.__doc__


def _harvest():
    """[{"name", "sentence", "homes"}] of all objects, the shorter names first where a sentence comes twice."""
    pairs = []
    for _, name, path in python_files(("stdlib",)):
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if "._" not in "." + module and module.partition(".")[0] not in SKIPPED_MODULES and "-" not in module:
            pairs += ((module, *pair) for pair in _from_source(module, path))
    for module in MODULES_IN_C + PACKAGES:
        pairs += ((module, *pair) for pair in _from_import(module))
    homes = Counter(own for own, _ in {(name.rpartition(".")[2], module) for module, name, _ in pairs
                                       if name.rpartition(".")[0] in (module, "")})  # how many modules have that name
    pairs = [pair for _, *pair in pairs]
    seen, names, rows = set(), set(), []
    for name, doc in sorted(pairs, key=lambda pair: (pair[0].count("."), pair[0])):
        sentence = first_sentence(doc) if doc else ""
        key = re.sub(r"[^a-z0-9]+", " ", sentence.lower())[:CHOICE_CHARS].strip()  # what a choice would show
        if sentence and key not in seen and name not in names:
            seen.add(key)
            names.add(name)
            rows.append({"name": name, "sentence": sentence, "homes": homes[name.rpartition(".")[2]]})
    return rows


def all_objects():
    """The objects, read from $NANOCHAT_BASE_DIR/pydoc.jsonl, which the first call writes (some seconds)."""
    path = get_base_dir() / "pydoc.jsonl"
    if not path.exists():
        print0("gathering docstrings of the standard library, numpy and torch")
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in _harvest()))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def shorten(sentence, limit=CHOICE_CHARS):
    """The sentence without its full stop, cut at a word's end to at most `limit` characters.

    >>> shorten("Return a copy of the list.", 12)
    'Return a'
    """
    text = sentence.rstrip(".")
    return text if len(text) <= limit else text[:limit + 1].rpartition(" ")[0].rstrip(" ,;:(")


class PyDoc(Task):
    """Questions about library objects. form: "what", "module", "choice" or "letter". `size`: how many; None: each object once.

    "choice" asks like "what" and carries four sentences as `choices`, the right one at index `gold`, and `neutral`, the
    same question about nothing: the sentence whose likelihood gains most by the real question is the answer. "letter"
    shows the sentences and wants a letter, which takes a model far more practice. Beyond the number of objects, training
    asks about them again, with other wrong choices. The right answer stands at each place equally often; in training,
    questions about the other three letters follow. The right module is unique: names that several modules have are not
    asked about.
    """

    def __init__(self, split, form="choice", size=None, **slice_):
        super().__init__(**slice_)
        if form not in ("what", "module", "choice", "letter"):
            raise UserError(f"form is what, module, choice or letter, not {form!r}")
        self.split, self.form = check_split(split), form
        objects = all_objects()
        if form == "module":
            objects = [row for row in objects if row["name"].count(".") == 1 and row.get("homes", 1) == 1]
        self.objects = sorted((row for row in objects if split_of(row["name"]) == split), key=lambda row: fraction(row["name"]))
        self.size = len(self.objects) if size is None else size
        if form in ("choice", "letter"):
            self.chance = 1 / len(LETTERS)

    def num_examples(self):
        return self.size if self.split == "train" else min(self.size, len(self.objects))

    def get_example(self, i):
        turn, row = divmod(i, len(self.objects))
        name, sentence = self.objects[row]["name"], self.objects[row]["sentence"]
        rng = random.Random(f"pydoc {self.split} {i}")
        if self.form == "module":
            module, _, key = name.rpartition(".")
            question = rng.choice(("Which module has {k}?", "In which module is {k}?", "Where do I find {k}?")).format(k=key)
            return conversation(question, module)
        if self.form == "what":
            question = rng.choice(("What does {n} do?", "What is {n}?", "Explain {n}.", "what does {n} do?")).format(n=name)
            return conversation(question, sentence)
        places = [k if k < row else k + 1 for k in rng.sample(range(len(self.objects) - 1), len(LETTERS) - 1)]
        gold = (row + turn) % len(LETTERS)
        places.insert(gold, row)
        question = f"What does {name} do?"
        if self.form == "choice":
            choices = [self.objects[k]["sentence"] for k in places]
            return conversation(question, sentence, choices=choices, gold=gold, neutral="What does it do?")
        choices = [shorten(self.objects[k]["sentence"]) for k in places]
        asked = conversation(render_mc(question, LETTERS, choices), LETTERS[gold], letters=list(LETTERS))
        if self.split == "train":  # the other choices are asked about in turn: four answers to learn from for one reading
            for k in rng.sample([k for k in places if k != row], len(places) - 1):
                asked["messages"] += conversation(f"And {self.objects[k]['name']}?", LETTERS[places.index(k)])["messages"]
        return asked

    def evaluate(self, conversation, parts):
        return answer_text(parts).strip().rstrip(".").lower() == conversation["messages"][1]["content"].strip().rstrip(".").lower()
