"""What the objects of Python's library, numpy and torch do: first sentences of their docstrings.

    What does textwrap.dedent do?    ->  Remove any common leading whitespace from every line in ...
    Which module has dedent?         ->  textwrap
    What does textwrap.dedent do?    ->  the likeliest of four sentences ("choice", for evaluation)
    the same, with the four shown    ->  the letter of one ("letter")

Objects are public functions, classes and methods. Sources of the standard library are parsed with
`ast`, so that nothing with side effects is imported. Modules written in C, numpy and torch, which a
training run imports anyway, are inspected as they are. Whether an object is taken depends on its
own docstring only, by the same rule in training and test:
  - the first sentence of the first paragraph that is no signature, without its markup, is kept as
    the object's sentence;
  - it has at least 4 words and 20 characters, and starts with a letter;
  - it is not boilerplate (`Return self+value.`, `Deprecated ...`);
  - no object before has the same sentence (compared without case and punctuation).
Train and test are split by a hash of the object's name. As sentences are unique, and the wrong
choices of a question come from the question's own split, no choice of a test question was an answer
or a choice in training. Wrong choices are drawn evenly from the whole split: they are neither
picked to be near the right one nor to be far from it.
"""
import ast
import importlib
import inspect
import json
import random
import re
from collections import Counter

from nanochat.common import UserError, atomic_write, fraction, get_base_dir, print0
from nanochat.sources import python_files
from tasks.common import Task, answer_text, check_split, conversation, render_mc, split_of

FORMS = ("what", "module", "choice", "letter")
LETTERS = "ABCD"
CHOICE_CHARS = 70   # a choice is cut here, at a word's end
ANSWER_CHARS = 160  # a longer sentence is no answer

WHAT = (
    "What does {n} do?",
    "What is {n}?",
    "Explain {n}.",
    "what does {n} do?",
)
WHICH_MODULE = (
    "Which module has {k}?",
    "In which module is {k}?",
    "Where do I find {k}?",
)

MODULES_IN_C = (
    "builtins",
    "array",
    "binascii",
    "bisect",
    "cmath",
    "collections",
    "datetime",
    "decimal",
    "functools",
    "gc",
    "hashlib",
    "heapq",
    "io",
    "itertools",
    "marshal",
    "math",
    "operator",
    "os",
    "random",
    "re",
    "select",
    "signal",
    "socket",
    "sqlite3",
    "struct",
    "sys",
    "time",
    "unicodedata",
    "zlib",
)
PACKAGES = (
    "numpy",
    "numpy.linalg",
    "numpy.fft",
    "numpy.random",
    "numpy.ma",
    "numpy.char",
    "torch",
    "torch.nn",
    "torch.nn.functional",
    "torch.optim",
    "torch.linalg",
    "torch.fft",
    "torch.special",
    "torch.distributions",
    "torch.utils.data",
)
SKIPPED_MODULES = (
    "antigravity",
    "this",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "encodings",
    "distutils",
    "ensurepip",
)

# ----------------------------------------------------------------------------------------------
# from a docstring to a sentence

SIGNATURE = re.compile(r"[\w.]+\s*\(|[\w.]+$|\.\. |>>>")  # or a directive, or an example
ROLE = re.compile(r":\w+(?::\w+)?:`~?([^`<]*?)(?:\s*<[^`]*>)?`")  # :func:`~a.b <text>` is a.b
MARKUP = re.compile(r"[`*]+")
SENTENCE_END = re.compile(r"(?<=[a-z)\]0-9])[.:](?= |$)")
BOILERPLATE = re.compile(
    r"deprecated|return self|see help|helper for|alias for|initialize self|internal|"
    r"not implemented|create and return a new|same as |like |true if self|see |"
    r"this (method|function) is|todo|override|in-?place version|scalar method identical|"
    r"out-of-place version|rfc \d",
    re.I,
)


def first_sentence(doc):
    """The first sentence of a docstring as plain text on one line.

    Returns "" where that sentence does not say what the object does.

    >>> first_sentence("abs(x, /)\\n\\nReturn the ``absolute`` value\\nof the argument. Or so.")
    'Return the absolute value of the argument.'
    """
    # the first paragraph that is no signature; "f(x) -- text" is a signature and a text
    separated = inspect.cleandoc(doc).replace(" -- ", "\n\n")
    paragraphs = re.split(r"\n\s*\n", separated)
    text = next((part for part in paragraphs if not SIGNATURE.match(part)), "")

    # on one line, without markup
    text = " ".join(text.split())
    text = ROLE.sub(r"\1", text)
    text = MARKUP.sub("", text)

    # its first sentence
    text = SENTENCE_END.split(text)[0].rstrip(" .;,") + "."
    return text if _is_informative(text) else ""


def _is_informative(sentence):
    """Whether a sentence has the size and the form of one that says what an object does."""
    if not 20 <= len(sentence) <= ANSWER_CHARS:
        return False
    if len(sentence.split()) < 4:
        return False
    if not sentence[0].isalpha() or not sentence.isascii():
        return False
    return not BOILERPLATE.match(sentence)


def shorten(sentence, limit=CHOICE_CHARS):
    """The sentence without its full stop, cut at a word's end to at most `limit` characters.

    >>> shorten("Return a copy of the list.", 12)
    'Return a'
    """
    text = sentence.rstrip(".")
    if len(text) <= limit:
        return text
    words, _, _ = text[:limit + 1].rpartition(" ")
    return words.rstrip(" ,;:(")


# ----------------------------------------------------------------------------------------------
# gathering the objects

def all_objects():
    """The objects, [{"name", "sentence", "homes"}], read from $NANOCHAT_BASE_DIR/pydoc.jsonl.

    The first call writes that file, which takes some seconds.
    homes: the number of modules that have an object of that name at their top level.
    """
    path = get_base_dir() / "pydoc.jsonl"
    if not path.exists():
        print0("gathering docstrings of the standard library, numpy and torch")
        lines = [json.dumps(row) + "\n" for row in _harvest()]
        atomic_write(path, "".join(lines))
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def _harvest():
    """The rows of all_objects; the shorter name is kept where a sentence comes twice."""
    # 1) (module, name, docstring) of every public object
    found = []
    for module, path in _parsed_modules():
        found += [(module, name, doc) for name, doc in _from_source(module, path)]
    for module in MODULES_IN_C + PACKAGES:
        found += [(module, name, doc) for name, doc in _from_import(module)]

    # 2) in how many modules is each name?
    in_modules = set()
    for module, name, _ in found:
        parent, _, own = name.rpartition(".")
        if parent in (module, ""):
            in_modules.add((own, module))
    homes = Counter(own for own, _ in in_modules)

    # 3) one object for each name and each sentence
    sentences = set()
    names = set()
    rows = []
    for _, name, doc in sorted(found, key=lambda item: (item[1].count("."), item[1])):
        sentence = first_sentence(doc) if doc else ""
        shown = re.sub(r"[^a-z0-9]+", " ", sentence.lower())[:CHOICE_CHARS].strip()
        is_repeated = shown in sentences or name in names
        if not sentence or is_repeated:
            continue
        sentences.add(shown)
        names.add(name)
        own = name.rpartition(".")[2]
        rows.append({"name": name, "sentence": sentence, "homes": homes[own]})
    return rows


def _parsed_modules():
    """Yield (dotted name, path) of the public modules of the standard library."""
    for _, name, path in python_files(("stdlib",)):
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        is_private = "._" in "." + module
        is_skipped = module.partition(".")[0] in SKIPPED_MODULES
        is_script = "-" in module
        if not (is_private or is_skipped or is_script):
            yield module, path


def _from_source(module, path):
    """Yield (name, docstring) of the public classes, methods and functions in a source file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in _public_definitions(tree):
        yield f"{module}.{node.name}", ast.get_docstring(node)
        if not isinstance(node, ast.ClassDef):
            continue
        for method in _public_definitions(node):
            yield f"{module}.{node.name}.{method.name}", ast.get_docstring(method)


def _public_definitions(node):
    """The public functions and classes in the body of a module or class."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    definitions = [child for child in node.body if isinstance(child, kinds)]
    return [child for child in definitions if not child.name.startswith("_")]


def _from_import(name):
    """Yield (name, docstring) of the public functions, classes and methods of a module.

    Of numpy and torch only their own objects are yielded, not what they import.
    """
    module = importlib.import_module(name)
    for key, value in sorted(vars(module).items()):
        if not _is_own_object(name, key, value):
            continue
        full = key if name == "builtins" else f"{name}.{key}"
        yield full, value.__doc__ if isinstance(value.__doc__, str) else None
        if not inspect.isclass(value):
            continue
        for method, function in sorted(vars(value).items()):
            is_public = callable(function) and not method.startswith("_")
            if is_public and isinstance(function.__doc__, str):
                yield f"{full}.{method}", function.__doc__


def _is_own_object(module, key, value):
    """Whether an entry of a module is a public function or class of it."""
    if key.startswith("_") or not callable(value):
        return False
    if key.endswith(("Tensor", "Storage")) and key != "Tensor":
        return False  # torch's many old names for Tensor
    package = module.partition(".")[0]
    if package not in ("numpy", "torch"):
        return True
    origin = getattr(value, "__module__", None) or package
    return origin.partition(".")[0] == package


# ----------------------------------------------------------------------------------------------
# the task

class PyDoc(Task):
    """Questions about library objects.

    form: "what", "module", "choice" or "letter".
    size: number of questions; None: one for each object.

    "choice" asks like "what" and carries four sentences as `choices`, the right one at index
    `gold`, and `neutral`, the same question about nothing: the sentence whose likelihood gains most
    by the real question is the answer. "letter" shows the sentences and wants a letter, which takes
    a model far more practice.

    Beyond the number of objects, training asks about them again, with other wrong choices. The
    right answer stands at each place equally often; in training, questions about the other three
    letters follow. "module" asks about no name that several modules have, so that the right module
    is unique.
    """

    def __init__(self, split, form="choice", size=None, **slice_):
        super().__init__(**slice_)
        if form not in FORMS:
            raise UserError(f"form is what, module, choice or letter, not {form!r}")
        self.split = check_split(split)
        self.form = form
        objects = all_objects()
        if form == "module":
            objects = [row for row in objects if _has_one_module(row)]
        mine = [row for row in objects if split_of(row["name"]) == split]
        self.objects = sorted(mine, key=lambda row: fraction(row["name"]))
        self.size = len(self.objects) if size is None else size
        if form in ("choice", "letter"):
            self.chance = 1 / len(LETTERS)

    def num_examples(self):
        if self.split == "train":
            return self.size
        return min(self.size, len(self.objects))

    def get_example(self, i):
        turn, target = divmod(i, len(self.objects))
        rng = random.Random(f"pydoc {self.split} {i}")
        name = self.objects[target]["name"]
        sentence = self.objects[target]["sentence"]
        if self.form == "what":
            return conversation(rng.choice(WHAT).format(n=name), sentence)
        if self.form == "module":
            module, _, own = name.rpartition(".")
            return conversation(rng.choice(WHICH_MODULE).format(k=own), module)

        gold = (target + turn) % len(LETTERS)
        places = self._draw_choices(rng, target, gold)
        question = f"What does {name} do?"
        if self.form == "letter":
            return self._letter_example(rng, question, places, gold)
        return conversation(
            question,
            sentence,
            choices=[self.objects[k]["sentence"] for k in places],
            gold=gold,
            neutral="What does it do?",
        )

    def _draw_choices(self, rng, target, gold):
        """Indices of four objects, `target` at index `gold` among them."""
        others = rng.sample(range(len(self.objects) - 1), len(LETTERS) - 1)
        places = [k if k < target else k + 1 for k in others]
        places.insert(gold, target)
        return places

    def _letter_example(self, rng, question, places, gold):
        """The question with its choices in sight; the answer is a letter."""
        choices = [shorten(self.objects[k]["sentence"]) for k in places]
        asked = conversation(
            render_mc(question, LETTERS, choices),
            LETTERS[gold],
            letters=list(LETTERS),
            stem=question,
        )
        if self.split == "test":
            return asked

        # In training the other choices are asked about in turn: the model learns four answers from
        # one list of choices.
        others = [k for k in places if k != places[gold]]
        for k in rng.sample(others, len(others)):
            name = self.objects[k]["name"]
            follow_up = conversation(f"And {name}?", LETTERS[places.index(k)])
            asked["messages"] += follow_up["messages"]
        return asked

    def evaluate(self, conversation, parts):
        """Right when the answer is the expected one, apart from case and the full stop."""
        expected = conversation["messages"][1]["content"]
        return _normal_form(answer_text(parts)) == _normal_form(expected)


def _has_one_module(row):
    """Whether an object of all_objects() is `module.name`, and no other module has that name."""
    is_top_level = row["name"].count(".") == 1
    return is_top_level and row.get("homes", 1) == 1


def _normal_form(text):
    return text.strip().rstrip(".").lower()
