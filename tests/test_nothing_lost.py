"""Random commands on two texts in one base directory, killed at random: no finished model is lost.

Each sequence mixes what people do: tokenizers trained again, runs by hand that are resumed,
extended or started again, stages that start from one model or another, two speedruns that take
turns, and text that changes meanwhile. Whatever has finished once must load and answer the same to
the end.
"""
import json
import os
import random
import shutil

import pytest

from nanochat.checkpoint import complete_metas, read_meta
from nanochat.checkpoint_manager import load_model
from nanochat.engine import Engine
from nanochat.folders import list_models
from stage_runs import TINY, TINY_CHAT, Stages

COMMANDS = 12  # of a sequence
STEPS = ("--num_iterations=3", "--save_every=1", "--keep=2")
BASE = ("scripts.base_train", *TINY, "--eval_every=0", *STEPS)
CHAT = (*TINY_CHAT, *STEPS)
# what may happen to a training stage, and how often; a batch counts from the start of the process
FAULTS = [
    *[None] * 5,
    *[{str(batch): "kill"} for batch in (1, 2, 3)],
    {"end": "memory"},
    {"record": "kill"},
]
STATUSES = {0, 1, 2, -9}  # finished, no memory, refused, killed


class Speedrun:
    """A run of four stages as supervise.sh calls them, one at a time."""

    def __init__(self, name, data):
        self.name = name
        self.data = data
        self.begun = set()

    def next_command(self, base):
        """The words of the next stage, or None where all have left their records."""
        done = {row["stage"] for row in records(base) if row.get("run") == self.name}
        commands = [
            ("scripts.tok_train", f"--data={self.data}", "--vocab_size=300"),
            (*BASE, f"--data={self.data}"),
            ("scripts.mid_train", *CHAT),
            ("scripts.chat_sft", *CHAT),
        ]
        for words in commands:
            stage = words[0].removeprefix("scripts.")
            if stage in done:
                continue
            is_resumed = stage in self.begun and stage != "tok_train"
            self.begun.add(stage)
            return (*words, "--resume") if is_resumed else words
        return None


def records(base):
    path = base / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


class World:
    """A base directory with two texts, and all models that ever finished in it."""

    def __init__(self, stages, base, rng):
        self.stages = Stages(base, stages.server)
        self.rng = rng
        base.mkdir()
        for name in ("words.txt", "pydoc.jsonl"):
            shutil.copy(stages.base / name, base)
        self.texts = [base.parent / "cats.txt", base.parent / "numbers.txt"]
        lines = [f"The cat number {i * 37 % 101} sees the house." for i in range(300)]
        self.texts[0].write_text("\n\n".join(lines), encoding="utf-8")
        lines = [f"{i} plus {i + 1} is {2 * i + 1}, says the teacher." for i in range(300)]
        self.texts[1].write_text("\n\n".join(lines), encoding="utf-8")
        self.speedruns = [Speedrun(f"17-{i}", text) for i, text in enumerate(self.texts)]
        self.answers = {}  # of every model that has finished: {(source, tag, step): ids}

    def attempt(self, *words, run=None, faults=None):
        """A command that may fail in all ways that it should."""
        variables = dict(self.stages.environment)
        if run:
            variables["NANOCHAT_RUN"] = run
        if faults:
            variables["FAULTS"] = json.dumps(faults)
        out, err = self.stages.base / "out", self.stages.base / "err"
        [status] = self.stages.server.run(
            words=list(map(str, words)), environments=[variables], out=str(out), err=str(err))
        said = err.read_text(encoding="utf-8")
        assert status in STATUSES, (words, status, said)
        if status == 2:
            assert said.startswith("error: ") and said.count("\n") == 1, (words, said)
        for key in finished_models() - self.answers.keys():
            self.answers[key] = answer(*key)
        return status

    def command(self):
        """One random command."""
        rng = self.rng
        text = rng.choice(self.texts)
        faults = rng.choice(FAULTS)
        resume = rng.choice([(), (), ("--resume",)])
        kind = rng.choice(["speedrun"] * 4 + ["tok_train", "base", "base", "named", "mid", "sft"]
                          + ["extend", "rewind", "touch"])
        if kind == "speedrun":
            self.speedrun(faults)
        elif kind == "tok_train":
            self.attempt("scripts.tok_train", f"--data={text}", "--vocab_size=310")
        elif kind == "base":
            self.attempt(*BASE, f"--data={text}", *resume, faults=faults)
        elif kind == "named":
            self.attempt(*BASE, f"--data={text}", "--model_tag=mine", *resume, faults=faults)
        elif kind == "mid":
            self.attempt("scripts.mid_train", *CHAT, *resume, faults=faults)
        elif kind == "sft":
            source = rng.choice(["mid", "base"])
            self.attempt("scripts.chat_sft", *CHAT, f"--source={source}", *resume, faults=faults)
        elif kind == "extend":
            words = [word for word in BASE if not word.startswith("--num_iterations")]
            self.attempt(*words, "--extend=1.5", faults=faults)
        elif kind == "rewind":
            self.attempt(*BASE, f"--data={text}", "--resume_from_checkpoint=2", faults=faults)
        else:
            os.utime(text)

    def speedrun(self, faults):
        """The next stage of one of the two; a run that is complete makes room for another."""
        index = self.rng.randrange(2)
        run = self.speedruns[index]
        words = run.next_command(self.stages.base)
        if words is None:
            self.speedruns[index] = Speedrun(f"{run.name}0", run.data)
            return
        if words[0] == "scripts.tok_train":
            faults = None
        status = self.attempt(*words, run=run.name, faults=faults)
        assert faults or status == 0, "a speedrun is never refused"


def finished_models():
    """{(source, tag, step)} of all finished steps that are there."""
    found = set()
    for model in list_models():
        for meta in complete_metas(model.dir):
            if meta["finished"]:
                found.add((model.source, model.tag, meta["step"]))
    return found


def answer(source, tag, step):
    """What a model continues a text with."""
    model, tokenizer, _ = load_model(source, "cpu", "eval", tag, step)
    prompt = tokenizer.encode("The cat sees 5 plus", prepend=tokenizer.get_bos_token_id())
    [ids] = Engine(model, tokenizer).generate_batch([prompt], max_new_tokens=12, temperature=0)
    return tokenizer.get_vocab_size(), ids


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_model_that_ever_finished_answers_the_same_at_the_end(
    stages, tmp_path, monkeypatch, seed
):
    # docs/traps.md: shared-folders
    base = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.delenv("NANOCHAT_RUN", raising=False)
    world = World(stages, base, random.Random(seed))
    for text in world.texts:
        assert world.attempt("scripts.tok_train", f"--data={text}", "--vocab_size=300") == 0
    for _ in range(COMMANDS):
        world.command()

    # each of the two speedruns can be brought to its end, from where it was left
    for run in world.speedruns:
        while words := run.next_command(base):
            assert world.attempt(*words, run=run.name) == 0, words
    assert len(world.answers) >= 6, "both speedruns have three models each"
    for key, ids in world.answers.items():
        assert answer(*key) == ids, key

    # no stage of a speedrun started from the model of another
    for model in list_models("mid", "sft"):
        if model.meta["run"].startswith("17-"):
            folder, step = model.meta["origin"]
            assert read_meta(folder, step)["run"] == model.meta["run"]
