"""Settings are the module-level variables at the head of a script; the command line and config files override them.

    depth: int = None           # layers
    learning_rate = 0.02        # Muon's
    settings = configure(globals())

`--learning_rate=0.01`, `--learning-rate 0.01`, `--flag` for booleans, and `config/my_machine.py` (bare assignments) all
work; later wins. The idea of overriding globals in place is nanoGPT's configurator.
"""
import ast
import difflib
import sys
import tokenize
from pathlib import Path

from nanochat.common import UserError, install_error_hook

TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def _declared(path):
    """{name: (type, help)} of the simple assignments before the call of configure() in the script at `path`."""
    with open(path, "rb") as file:
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "configure":
            break
        if isinstance(node, ast.AnnAssign):
            found[node.target.id] = (TYPES[node.annotation.id], comments.get(node.lineno, ""))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.islower():
            try:
                found[node.targets[0].id] = (type(ast.literal_eval(value)), comments.get(node.lineno, ""))
            except ValueError:
                continue  # not a literal, so not a setting
    return found


def _convert(name, kind, value):
    """`value` (text from the command line, or an object from a config file) as `kind`; UserError where it is not one."""
    if value is None or value == "None":
        return None
    if isinstance(value, str) and kind is not str:
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
        except (ValueError, SyntaxError):
            pass
    if kind is float and type(value) is int:
        value = float(value)
    if kind is bool and type(value) is int and value in (0, 1):
        value = bool(value)
    if type(value) is not kind:
        raise UserError(f"--{name} takes {kind.__name__}, not {value!r}")
    return value


def _print_help(doc, declared, settings):
    print((doc or "").strip() + "\n\nsettings:")
    for name, (kind, text) in declared.items():
        print(f"  --{name}={settings[name]!r:<14} {kind.__name__:<5} {text}")


def configure(namespace, argv=None, aliases={}):
    """Override the settings in `namespace` (a script's globals()) from `argv`; return all of them as a dict.

    aliases: short names, {"p": "prompt"}. Unknown key, wrong type or missing file: UserError (exit code 2).
    """
    install_error_hook()
    declared = _declared(namespace["__file__"])
    settings = {name: namespace[name] for name in declared}

    def assign(name, value):
        name = aliases.get(name, name).replace("-", "_")
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1)
            raise UserError(f"unknown setting --{name}" + (f"; did you mean --{near[0]}?" if near else "; --help lists them all"))
        settings[name] = _convert(name, declared[name][0], value)
        if settings[name] is None and namespace[name] is not None:
            raise UserError(f"--{name} takes {declared[name][0].__name__}, not None")

    words = list(sys.argv[1:] if argv is None else argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            _print_help(namespace.get("__doc__"), declared, settings)
            raise SystemExit(0)
        if word == "--":  # torchrun passes it on
            continue
        if word.startswith("-"):
            name, given, value = word.lstrip("-").partition("=")
            plain = aliases.get(name, name).replace("-", "_")
            if not given and declared.get(plain, (None,))[0] is bool:
                value = words.pop(0) if words and words[0].lower() in ("true", "false") else True
            elif not given:
                if plain in declared and not words:
                    raise UserError(f"--{name} needs a value")
                value = words.pop(0) if words else None
            assign(name, value)
        elif not Path(word).is_file():
            raise UserError(f"config file '{word}' does not exist: settings are written --name=value, and text with spaces goes in quotes")
        else:
            for name, value in _read_config(word):
                assign(name, value)
    namespace.update(settings)
    return settings


def require(settings, lowest, *names):
    """UserError where one of these settings is a number below `lowest`. None passes."""
    for name in names:
        if settings[name] is not None and not settings[name] >= lowest:
            raise UserError(f"{name}={settings[name]} must be at least {lowest}")


def _read_config(path):
    """[(name, value)] of a config file: bare assignments of literals, read and never run."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not Python: {error}") from error
    rows = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # its docstring
        try:
            rows.append((node.targets[0].id, ast.literal_eval(node.value)))
        except (AttributeError, ValueError) as error:
            raise UserError(f"config file {path}, line {node.lineno}: only lines of the form name = value") from error
    return rows
