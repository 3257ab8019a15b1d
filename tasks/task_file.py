"""A task in a Python file of your own, which chat_eval and chat_rl take by its path.

    python -m scripts.chat_eval -a mine.py
    python -m scripts.chat_rl --task=mine.py

The file has one subclass of tasks.common.Task (docs/add-a-task.md shows one). Where its constructor
takes `split` or `size`, it is told these; other tasks have the same items in every split. The file
is executed like any program: run those alone that you would run by themselves.

What goes wrong in the file is one line that names the file's line.
"""
import contextlib
import importlib.util
import inspect
import sys
import traceback

from nanochat.common import UserError, expand_home
from tasks.common import Task, check_item


@contextlib.contextmanager
def _place_named(path):
    """What is raised inside becomes a UserError that names the line of the file at `path`."""
    try:
        yield
    except UserError:
        raise
    # a user's program may raise whatever it likes
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines = [error.lineno]
        line = f", line {lines[-1]}" if lines else ""
        said = " ".join(str(error).split())
        raise UserError(f"{path}{line}: {type(error).__name__}: {said}") from error


def load_task(path, split="test", size=None):
    """The FileTask of the Python file at `path`.

    split, size: of the constructor, where it takes them. UserError where the file cannot be read or
    run, or does not have exactly one task.
    """
    path = expand_home(str(path), "write the whole path")
    spec = importlib.util.spec_from_file_location(f"task in {path}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    sys.modules[spec.name] = module     # where dataclasses look for the names of annotations
    with _place_named(path):
        spec.loader.exec_module(module)
        task_class = _only_task(path, module)
        wanted = inspect.signature(task_class).parameters
        options = {}
        if "split" in wanted:
            options["split"] = split
        if "size" in wanted and size is not None:
            options["size"] = size
        return FileTask(path, task_class(**options))


def _only_task(path, module):
    """The subclass of Task that a module defines, those not counted that others inherit from."""
    found = [
        value for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Task)
        and value.__module__ == module.__name__
    ]
    found = [one for one in found if not any(one in other.__bases__ for other in found)]
    if len(found) != 1:
        names = ", ".join(one.__name__ for one in found) or "none"
        raise UserError(f"{path} must have one subclass of tasks.common.Task, and has {names}")
    return found[0]


class FileTask(Task):
    """The task of a user's file, of which every item is checked."""

    def __init__(self, path, task):
        super().__init__()
        self.path = path
        self.task = task
        self.name = type(task).__name__
        with _place_named(path):
            self.chance = float(task.chance)
            self.count = len(task)
        if not 0 <= self.chance < 1:
            raise UserError(
                f"{path}: chance={task.chance} of {self.name} must be at least 0 and below 1, the "
                "share that guessing gets right")

    def num_examples(self):
        return self.count

    def get_example(self, i):
        with _place_named(self.path):
            item = self.task[i]
        check_item(item, f"{self.path}, example {i} of {self.name}")
        return item

    def evaluate(self, conversation, parts):
        with _place_named(self.path):
            return bool(self.task.evaluate(conversation, parts))

    def evaluate_many(self, pairs):
        with _place_named(self.path):
            verdicts = [bool(verdict) for verdict in self.task.evaluate_many(pairs)]
        if len(verdicts) != len(pairs):
            raise UserError(
                f"{self.path}: evaluate_many of {self.name} judged {len(verdicts)} of "
                f"{len(pairs)} answers: return one verdict for each")
        return verdicts

    def reward(self, conversation, parts):
        with _place_named(self.path):
            return self.task.reward(conversation, parts)
