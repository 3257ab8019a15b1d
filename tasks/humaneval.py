"""Functions to write from their signature and docstring; the tests decide, in the sandbox.

    def add(x: int, y: int):            ->  ```python
        '''Add two numbers x and y'''       def add(x: int, y: int): ...
                                                return x + y
                                            ```

HumanEval (Chen et al. 2021, arXiv 2107.03374), 164 problems. The share of the problems whose first
answer passes is pass@1. Programs run in the sandbox (docs/sandbox.md), so that this task needs a
system which can confine them.
"""
import ast
import re
import warnings
from functools import partial

from nanochat.sandbox import check, layers_here, run_many
from tasks.common import HubTask, answer_text, conversation

ANSWER_TOKENS = 512     # that chat_eval leaves for a function
MAX_CHARS = 50_000      # a longer answer is none
CPU_SECONDS = 10
WALL_SECONDS = 60
MEMORY_MB = 512
INDENT = "    "
FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
TOP_LEVEL = re.compile(r"^(?=\S)", re.MULTILINE)
CODE_BEGINS = re.compile(r"^(?:@|def |async def |class |import |from )", re.MULTILINE)


class HumanEval(HubTask):
    """The problems, which are one split, "test".

    allow_missing: layers of the sandbox that may be missing on this system. UserError at the first
    evaluation where another one is.
    """

    name = "openai/openai_humaneval"
    config = "openai_humaneval"
    columns = {"prompt": str, "canonical_solution": str, "test": str, "entry_point": str}
    documented = {"test": 164}

    def __init__(self, split="test", fetch=True, allow_missing=(), **slice_):
        super().__init__(split, fetch, **slice_)
        self.allow_missing = allow_missing

    def get_example(self, i):
        row = self.rows[i]
        return conversation(
            row["prompt"],
            f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```",
            entry_point=row["entry_point"],
            test=row["test"],
            answer_tokens=ANSWER_TOKENS,
        )

    def evaluate(self, conversation, parts):
        """Right when the function in the answer passes the problem's tests."""
        return self.evaluate_many([(conversation, parts)])[0]

    def evaluate_many(self, pairs):
        """Judge several answers at the same time, as many as there are CPUs."""
        layers_here(self.allow_missing)     # refuses also where no answer holds a program
        jobs = {}
        for i, (conversation, parts) in enumerate(pairs):
            prompt = conversation["messages"][-2]["content"]
            entry_point = conversation["entry_point"]
            program = program_of(prompt, entry_point, answer_text(parts))
            if program is not None:
                jobs[i] = partial(
                    check,
                    program,
                    conversation["test"],
                    entry_point,
                    setup=prompt,
                    seconds=CPU_SECONDS,
                    wall_seconds=WALL_SECONDS,
                    memory_mb=MEMORY_MB,
                    allow_missing=self.allow_missing,
                )
        verdicts = dict(zip(jobs, run_many(jobs.values())))
        return [i in verdicts and verdicts[i].passed for i in range(len(pairs))]


def program_of(prompt, entry_point, answer):
    """The program that an answer gives for a problem, or None where it gives none.

    The answer is a block of code or text, which repeats the signature or continues the prompt, with
    or without words around it. The program begins with the prompt, whose imports and functions the
    answer may use; its function of the name `entry_point` is the answer's.

    >>> print(program_of("def one():\\n    '''One.'''\\n", "one", "Sure:\\n```\\nreturn 1\\n```"))
    def one():
        '''One.'''
        return 1
    """
    if len(answer) > MAX_CHARS:
        return None
    blocks = FENCE.findall(answer)
    blocks.sort(key=lambda block: f"def {entry_point}(" not in block)   # those that have it first
    for text in [*blocks[:1], answer]:
        for program in _readings(prompt, entry_point, text):
            if _defines(program, entry_point):
                return program.rstrip()
    return None


def _readings(prompt, entry_point, text):
    """Programs that a text may stand for, the likeliest first.

    A model which continues the prompt often does not stop behind the function, so that what follows
    at the left margin is dropped where it is no program.
    """
    if f"def {entry_point}(" in text:
        begins = CODE_BEGINS.search(text)
        code = text[begins.start():] if begins else text
        yield f"{prompt}\n\n{code}"
        pieces = TOP_LEVEL.split(code)
        for count in range(len(pieces) - 1, 0, -1):
            yield f"{prompt}\n\n{''.join(pieces[:count])}"
        return
    body = text.strip("\n")
    lines = body.split("\n")
    is_indented = [line[:1].isspace() for line in lines if line.strip()]
    if not any(is_indented):
        yield prompt + _indent(lines)
    if is_indented and not is_indented[0]:
        # the answer's first blanks were lost
        body = INDENT + body
        yield prompt + _indent(lines)
    yield prompt + body
    yield prompt + TOP_LEVEL.split(body)[0]


def _indent(lines):
    """The lines, each one level deeper, as text."""
    return "\n".join(INDENT + line if line.strip() else "" for line in lines)


def _defines(program, entry_point):
    """Whether a text is a program whose last function of that name does more than its docstring."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # such as an invalid escape in an answer
            statements = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [s for s in statements if isinstance(s, kinds) and s.name == entry_point]
    if not found:
        return False
    body = found[-1].body
    return any(not _is_text(statement) for statement in body)


def _is_text(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
