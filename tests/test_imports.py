"""The order of imports, read from the sources: lower layers know nothing of higher ones."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {  # a file imports from its own layer or a lower one; then tasks, then scripts
    "common": 0, "hardware": 0, "environment": 0, "configurator": 0, "metrics": 0,
    "heartbeat": 0, "probes": 0, "scores": 0,
    "attention": 1, "kv_cache": 1, "muon": 1, "adamw": 1, "adagrad": 1, "schedule": 1,
    "guard": 1, "tokenizer": 1, "tokenizer_json": 1, "conversation": 1, "dataset": 1,
    "sources": 1, "execution": 1,
    "roofline": 1, "loss": 1, "textfiles": 1, "completion": 1, "prompts": 1,
    "words": 1, "passages": 1, "retrieval": 1, "shards": 1, "userfiles": 1, "convert": 1,
    "sequence_text": 1, "holdout": 1,
    "encoding": 1, "tables": 1, "download": 1, "hub": 1, "core_bundle": 1,
    "curriculum": 1, "confinement": 1, "sandbox_runner": 1, "sandbox": 1, "fast_linear": 1,
    "gpt": 2, "dataloader": 2, "loss_eval": 2, "loss_check": 2, "fp8": 2,
    "variants": 3,
    "optimizer_state": 4, "fsdp": 4, "parallel": 4, "memory": 4, "forecast": 4, "plan": 4,
    "checkpoint": 4, "checkpoint_manager": 4, "folders": 4, "hf_names": 4,
    "start": 4, "run": 4, "engine": 4, "passage_store": 4, "rollouts": 4, "selftest": 4,
    "sampling": 4, "decoding": 4, "native_decode": 4, "graph_decode": 4,
    "diffusion_engine": 4, "samples": 4,
    "async_engine": 4, "openai_api": 4, "openai_schema": 4, "http_guard": 4, "serving_stats": 4,
    "server": 5, "report": 5, "doctor": 5, "benchmark": 5, "answers": 5, "core_eval": 5,
    "hf_model": 5, "load_test": 5, "records": 5, "plots": 5, "document": 5, "compare": 5,
    "card": 5, "model_card": 5, "hf_export": 5, "export_check": 5, "hf_import": 5,
    "gguf_export": 5, "gguf_check": 5, "live": 5,
}
TASKS, SCRIPTS = 6, 7
SOURCES = [
    path
    for folder in ("nanochat", "tasks", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
]


def layer(module):
    """Layer of a dotted module of this repository, None for others and for packages."""
    package, _, name = module.partition(".")
    if package == "nanochat" and name:
        return LAYERS.get(name.split(".")[0])
    return {"tasks": TASKS, "scripts": SCRIPTS}.get(package)


def imports(path):
    """Dotted names of all modules imported anywhere in a file.

    `from nanochat import gpt` counts as nanochat.gpt.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            if node.module in ("nanochat", "tasks", "scripts"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_core_file_has_a_layer():
    assert {path.stem for path in SOURCES if path.parent.name == "nanochat"} <= LAYERS.keys()


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down(path):
    mine = layer(module_name(path))
    higher = [name for name in imports(path) if layer(name) is not None and layer(name) > mine]
    assert not higher, f"{path.name} (layer {mine}) imports {higher}"


SCRIPT_SOURCES = [path for path in SOURCES if path.parent.name == "scripts"]


@pytest.mark.parametrize("path", SCRIPT_SOURCES, ids=module_name)
def test_no_script_imports_another(path):
    assert not [name for name in imports(path) if name.startswith("scripts")]


def test_imports_have_no_circle():
    graph = {module_name(path): imports(path) for path in SOURCES}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"circle: {' -> '.join([*open_, name])}"
        if name in done or name not in graph:
            return
        open_.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(open_.pop())

    for name in graph:
        visit(name)


def test_only_the_tokenizer_knows_rustbpe():
    assert [path.name for path in SOURCES if "rustbpe" in imports(path)] in ([], ["tokenizer.py"])


# docs/traps.md: encoding-and-splitlines
@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_text_files_are_opened_as_utf8(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        given = {keyword.arg for keyword in node.keywords}
        if isinstance(node.func, ast.Name) and name == "open":
            mode = "".join(ast.unparse(argument) for argument in node.args[1:2])
            binary = re.search(r"""["'][arwx]\+?b\+?["']""", mode)
            assert "encoding" in given or binary, f"{path.name}:{node.lineno}"
        elif name in ("read_text", "write_text"):
            positional = len(node.args) >= {"read_text": 1, "write_text": 2}[name]
            assert "encoding" in given or positional, f"{path.name}:{node.lineno}"


def test_no_file_names_a_package_registry():
    """Where packages come from is the business of pip's and uv's configuration."""
    host = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|crates\.io")
    patterns = (
        "*.sh", "*.toml", "scripts/*.sh", "rustbpe/Cargo.toml", "rustbpe/src/*.rs", ".ci/run")
    files = [*SOURCES, *(path for pattern in patterns for path in ROOT.glob(pattern))]
    assert not [path.name for path in files if host.search(path.read_text(encoding="utf-8"))]


def test_importing_the_core_does_nothing(tmp_path):
    """No folder made, no output, no process group: the machine is as it was.

    Nor is torch's compiler imported, which takes a second and makes a folder for its cache.
    """
    names = [module_name(path) for path in SOURCES if "nanochat" in path.parts[-3:-1]]
    base = tmp_path / "base"
    check = "assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {', '.join(names)}; {check}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "", "NANOCHAT_BASE_DIR": str(base), "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not base.exists()
