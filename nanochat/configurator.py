"""Settings: module-level variables at the head of a script, overridden by the command line.

    depth: int = None           # layers; None: 20 on a GPU
    learning_rate = 0.02        # Muon's
    settings = configure(globals())

The comment is the help text. `--learning_rate=0.01`, `--learning-rate 0.01`, `--flag` for booleans,
and `config/my_machine.py` (a file of bare assignments) all work; a later word overrides an earlier
one. The idea of overriding globals in place is nanoGPT's configurator.
"""
import ast
import difflib
import math
import sys
import tokenize
from pathlib import Path

from nanochat.common import UserError, install_error_hook

TYPES = {"int": int, "float": float, "str": str, "bool": bool}
BOOLEANS = {"true": "True", "false": "False"}
HELP = object()  # stands for --help among the names of settings


# --------------------------------------------------------------------------------------------------
# what a script declares

def _comments(path):
    """{line number: text} of all comments in a Python file."""
    with open(path, "rb") as file:
        return {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.tokenize(file.readline)
            if token.type == tokenize.COMMENT
        }


def _is_configure_call(value):
    return isinstance(value, ast.Call) and getattr(value.func, "id", "") == "configure"


def _setting(node):
    """(name, type) of a statement that declares a setting, None for any other.

    `x: int = None` declares one, and so does `x = 3`: a lower-case name and a literal.
    """
    if isinstance(node, ast.AnnAssign):
        return node.target.id, TYPES[node.annotation.id]
    if not isinstance(node, ast.Assign):
        return None
    target = node.targets[0]
    if not isinstance(target, ast.Name) or not target.id.islower():
        return None
    try:
        return target.id, type(ast.literal_eval(node.value))
    except ValueError:
        return None


def _declared(path):
    """{name: (type, help)} of the settings before the call of configure() in a script."""
    comments = _comments(path)
    found = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if _is_configure_call(getattr(node, "value", None)):
            break
        setting = _setting(node)
        if setting:
            name, kind = setting
            found[name] = (kind, comments.get(node.lineno, ""))
    return found


def declared_values(path):
    """{name: value} of a script's settings as they stand in its source, which is not run."""
    values = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if _is_configure_call(getattr(node, "value", None)):
            break
        setting = _setting(node)
        if setting:
            values[setting[0]] = ast.literal_eval(node.value)
    return values


# --------------------------------------------------------------------------------------------------
# what the command line says

def _literal(text):
    """The Python literal in `text`, "true" and "false" in any case; else `text` itself."""
    try:
        return ast.literal_eval(BOOLEANS.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def _convert(name, kind, value):
    """`value` as `kind`; UserError where it is not one.

    value: text from the command line, or an object from a config file. An int passes for a float,
    0 and 1 pass for a bool, and None or "None" passes for anything.
    """
    if value is None or value == "None":
        return None
    if isinstance(value, str) and kind is not str:
        value = _literal(value)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is bool and type(value) is int and value in (0, 1):
        value = bool(value)
    if type(value) is not kind:
        allowed = "1, 0, True or False" if kind is bool else kind.__name__
        raise UserError(f"--{name} takes {allowed}, not {value!r}")
    return value


def _full_name(name, declared, aliases):
    """The setting that `name` or `na-me` or an alias means; UserError for an unknown one."""
    name = aliases.get(name, name).replace("-", "_")
    if name in declared:
        return name
    near = difflib.get_close_matches(name, declared, n=1)
    hint = f"; did you mean --{near[0]}?" if near else "; --help lists them all"
    raise UserError(f"unknown setting --{name}{hint}")


def _stands_for_a_value(name, aliases):
    """Whether `name` is an alias that holds a value, such as {"no_wandb": "logger="}."""
    return "=" in aliases.get(name.replace("-", "_"), "")


def _aliased(name, switch, aliases):
    """Yield the (name, value) that such an alias stands for, or nothing where it is switched off.

    switch: what the alias was set to, as _convert() takes it for a bool.
    """
    if _convert(name, bool, switch):
        setting, _, value = aliases[name.replace("-", "_")].partition("=")
        yield setting, value


def _next_value(name, kind, words):
    """The value of a setting that was given without "=": taken from the words that follow."""
    if kind is bool:
        explicit = words and words[0].lower() in BOOLEANS
        return words.pop(0) if explicit else True
    if not words:
        raise UserError(f"--{name} needs a value")
    return words.pop(0)


def read_config(path):
    """[(name, value)] of a config file: bare assignments of literals, read and never executed."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not Python: {error}") from error

    assignments = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # its docstring
        try:
            assignments.append((node.targets[0].id, ast.literal_eval(node.value)))
        except (AttributeError, ValueError) as error:
            raise UserError(f"config file {path}, line {node.lineno}: "
                            "only lines of the form name = value") from error
    return assignments


def _meant_by(word, aliases):
    """What a word that is no config file may have been meant as, as a remedy."""
    folder = Path(word).parent
    near = difflib.get_close_matches(word, map(str, folder.glob("*.py")), n=1)
    if near:
        return f"did you mean {near[0]}?"
    if aliases.get("p") == "prompt":
        return f'a question goes in quotes behind -p: -p "{word}"'
    return "settings are written --name=value, and text with spaces goes in quotes"


def _assignments(words, declared, aliases, texts):
    """Yield (name, value) for all that the command line sets, in order; (HELP, None) for --help.

    Names are checked, values are not. `words` is emptied; texts: as of configure().
    """
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            yield HELP, None
        elif word == "--" and texts is not None:
            texts += words
            words.clear()
        elif word == "--":  # torchrun passes it through
            continue
        elif word.startswith("-"):
            name, given, value = word.lstrip("-").partition("=")
            if _stands_for_a_value(name, aliases):
                switch = value if given else _next_value(name, bool, words)
                yield from _aliased(name, switch, aliases)
                continue
            name = _full_name(name, declared, aliases)
            if not given:
                value = _next_value(name, declared[name][0], words)
            yield name, value
        elif texts is not None:
            texts.append(word)
        elif Path(word).is_file():
            for name, value in read_config(word):
                if _stands_for_a_value(name, aliases):
                    yield from _aliased(name, value, aliases)
                else:
                    yield _full_name(name, declared, aliases), value
        else:
            raise UserError(f"config file '{word}' does not exist: {_meant_by(word, aliases)}")


def _print_help(doc, declared, settings, here):
    print((doc or "").strip() + "\n\nsettings:")
    for name, (kind, text) in declared.items():
        if settings[name] is None and name in here:
            text += f" (here: {here[name]})"
        assignment = f"--{name}={settings[name]!r}"
        print(f"  {assignment:<30} {kind.__name__:<5} {text}")


def configure(namespace, argv=None, aliases={}, defaults_here=None, texts=None):
    """Override the settings in `namespace` from the command line; return all of them as a dict.

    namespace: a script's globals(), changed in place. argv: the words, by default sys.argv[1:].
    aliases: other names, {"p": "prompt"}, and words that stand for a setting with its value,
    {"no_wandb": "logger="}. defaults_here: a function of the settings that returns {name: what a
    None becomes on this machine}; only --help calls it and shows its values. texts: a list for
    the words without dashes and all behind "--", which are then no config files.
    UserError (exit status 2) for an unknown setting, a wrong type or a missing file.
    """
    install_error_hook()
    declared = _declared(namespace["__file__"])
    settings = {name: namespace[name] for name in declared}
    words = list(sys.argv[1:] if argv is None else argv)

    for name, value in _assignments(words, declared, aliases, texts):
        if name is HELP:  # shows the settings as the words before it have set them
            here = defaults_here(settings) if defaults_here else {}
            _print_help(namespace.get("__doc__"), declared, settings, here)
            raise SystemExit(0)
        kind = declared[name][0]
        settings[name] = _convert(name, kind, value)
        if settings[name] is None and namespace[name] is not None:
            raise UserError(f"--{name} takes {kind.__name__}, not None")
    namespace.update(settings)
    return settings


def check_choices(settings, **choices):
    """UserError where a setting is none of its choices."""
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            words = " or ".join(word for word in allowed if word)
            raise UserError(f"{name}={settings[name]} does not exist: choose {words}")


def require(settings, lowest, *names, highest=math.inf):
    """UserError where one of the named settings is a number below `lowest` or above `highest`.

    None passes, NaN does not.
    """
    for name in names:
        value = settings[name]
        if value is not None and not value >= lowest:  # written so that NaN does not pass
            raise UserError(f"{name}={value} must be at least {lowest}")
        if value is not None and value > highest:
            raise UserError(f"{name}={value} must be at most {highest}")
