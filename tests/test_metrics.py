"""A run's log and its loggers, which never end a run."""
import json
import sys
import types

import pytest

from nanochat.common import UserError
from nanochat.metrics import open_log, open_logger

ROW = {"step": 3, "loss": 2.5, "samples": ["text"]}


def fake_wandb(monkeypatch, init):
    """Put a module with wandb's names and this init() in its place."""
    class Error(Exception):
        pass

    module = types.ModuleType("wandb")
    module.errors = types.SimpleNamespace(Error=Error)
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_the_log_of_a_resumed_run_ends_at_its_step(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step}) for step in (1, 2, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"ste', encoding="utf-8")
    with open_log(tmp_path, 2) as file:
        file.write("next\n")
    assert path.read_text(encoding="utf-8").splitlines() == [*lines[:3], "next"]
    open_log(tmp_path, 0).close()
    assert path.read_text(encoding="utf-8") == ""


def test_wandb_gets_the_numbers_and_keeps_its_files_in_the_checkpoint_folder(tmp_path, monkeypatch):
    seen = []

    def init(**options):
        seen.append((options["dir"], options["name"], options["config"]))
        return types.SimpleNamespace(log=lambda numbers, step: seen.append((step, numbers)))

    fake_wandb(monkeypatch, init)
    open_logger("wandb", tmp_path, {"depth": 4})(3, ROW)
    assert seen == [(tmp_path, tmp_path.name, {"depth": 4}), (3, {"step": 3, "loss": 2.5})]


def test_wandb_with_a_key_that_cannot_be_one_is_one_line(tmp_path, monkeypatch, capsys):
    def init(**options):
        raise ValueError("API key must be 40 characters long, yours was 3")

    fake_wandb(monkeypatch, init)
    open_logger("wandb", tmp_path, {})(3, ROW)
    out = capsys.readouterr().out
    assert out.startswith("wandb cannot start (API key must") and out.count("\n") == 1


def test_wandb_without_a_key_is_one_line_and_no_question(tmp_path, monkeypatch, capsys):
    stdin = sys.stdin

    def init(**options):
        assert sys.stdin is not stdin and not sys.stdin.isatty() and sys.stdin.read() == ""
        raise module.errors.Error("No API key configured.\nUse `wandb login` to log in.")

    module = fake_wandb(monkeypatch, init)
    open_logger("wandb", tmp_path, {})(3, ROW)
    out = capsys.readouterr().out
    assert out.startswith("wandb cannot start (No API key configured. Use `wandb login`")
    assert "continuing without it" in out and out.count("\n") == 1
    assert sys.stdin is stdin


@pytest.mark.parametrize("name, module", [
    ("wandb", "wandb"),
    ("tensorboard", "torch.utils.tensorboard"),
])
def test_a_logger_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    open_logger(name, tmp_path, {})(3, ROW)
    out = capsys.readouterr().out
    assert out.startswith(f"{name} is not installed, continuing without it")
    assert out.count("\n") == 1


def test_an_unknown_logger_is_refused(tmp_path):
    with pytest.raises(UserError, match="logger=paper"):
        open_logger("paper", tmp_path, {})
