"""The first hour on a GPU: what has to be measured there, in order, with what to expect beside it.

    bash scripts/gpu_checklist.sh                   # about an hour
    bash scripts/gpu_checklist.sh --short           # twelve minutes, for a borrowed machine
    bash scripts/gpu_checklist.sh --dry_run=1       # prints every command and runs none
    bash scripts/gpu_checklist.sh --steps=profile,kernels
    bash scripts/gpu_checklist.sh --tiny            # minutes on a CPU: proves the checklist itself

docs/gpu-checklist.md says why each step is there. Everything is written to one folder (--out), with
a base directory of its own, so that no model of yours is touched:

    results.jsonl   a line for each step: status, seconds, figures, what was expected
    STEP-N.log      what each command printed
    summary.md      the table, ready for docs/benchmarks.md

A step that fails or takes too long does not stop the others. Exit status: 0 where all steps
succeeded, else 1. The last line is JSON.
"""
import datetime
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from nanochat.common import UserError, expand_home, get_base_dir
from nanochat.configurator import configure, require
from nanochat.metrics import finish_stage

# settings
short = False        # the steps in twelve minutes
tiny = False         # the smallest of everything, also without a GPU
dry_run = False      # print the commands
steps = ""           # names of steps, apart by commas; empty: all
minutes: float = None  # of the whole: what there is no time for is skipped. None: no such limit
gpus: int = None     # how many to use. None: all; without a GPU two ranks on the CPU
data: str = None     # text to train on. None: FineWeb-Edu where its hub answers, else local text
out: str = None      # folder. None: gpu_checklist in $NANOCHAT_BASE_DIR

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 32_768  # for which the expected figures are; a run of its own would take 65,536
SHARDS = 8           # of FineWeb-Edu: 0.4 billion tokens
SEEDS = (1, 2, 3)
TRAIN_ON_TEXT = {"depth12", "depth20", "models", "layouts", "resume"}
SHORTEST = 20        # seconds for which a step is worth starting
HEARTBEAT = 15       # seconds between two lines of a command that takes long
RANKS_END = 30       # seconds that torchrun's ranks have to end, or to save, after SIGTERM


class Setup(NamedTuple):
    """What the commands depend on."""
    size: str      # full, short or tiny
    gpus: int      # ranks of what runs on several
    data: str      # a path, or ""
    online: bool   # whether FineWeb-Edu can be downloaded

    def pick(self, full, short, tiny):
        return {"full": full, "short": short, "tiny": tiny}[self.size]


class Command(NamedTuple):
    """A module with its arguments. ranks: processes under torchrun; 1 is none.

    kill_tag: the model tag of a run that gets SIGTERM after a few steps, or "". variables: of the
    environment, besides those that are set.
    """
    words: list
    ranks: int = 1
    kill_tag: str = ""
    variables: dict = {}

    def line(self):
        """The words of the process."""
        if self.ranks == 1:
            return [sys.executable, "-m", *self.words]
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        return [
            sys.executable, *launcher, f"--nproc_per_node={self.ranks}", "-m", self.words[0],
            "--", *self.words[1:]]


SIZES = ("full", "short", "tiny")


class Step(NamedTuple):
    """A step: its commands, how to read their last JSON lines, and what to expect.

    commands(setup) -> Commands. figures(records) -> {name: number or text}; records: a dict for
    each command, its last JSON line with "log", the path of all that it printed. seconds: the limit
    of the whole step, full, short, tiny; 0: it is not in that list.
    """
    name: str
    commands: object
    figures: object
    seconds: tuple
    expect: str
    least_gpus: int = 1

    def limit(self, size):
        return self.seconds[SIZES.index(size)]


# --------------------------------------------------------------------------------------------------
# the commands of each step

def doctor_commands(setup):
    return [Command(["scripts.doctor"])]


def text_commands(setup):
    vocabulary = setup.pick(VOCAB_SIZE, VOCAB_SIZE, 430)
    if setup.data:
        words = ["scripts.tok_train", f"--data={setup.data}", f"--vocab_size={vocabulary}"]
        return [Command(words)]
    source = ["-n", str(SHARDS)] if setup.online else []
    characters = setup.pick(1_000_000_000, 100_000_000, 1_000_000)
    return [
        Command(["nanochat.dataset", *source]),
        Command(["scripts.tok_train", f"--vocab_size={vocabulary}", f"--max_chars={characters}"]),
    ]


def profile_commands(setup):
    shape = setup.pick(
        ["--depth=20", "--device_batch_size=32", f"--vocab_size={VOCAB_SIZE}"],
        ["--depth=20", "--device_batch_size=32", f"--vocab_size={VOCAB_SIZE}"],
        ["--depth=1", "--device_batch_size=2", "--max_seq_len=64", "--vocab_size=512",
         "--compile=0", "--warm_steps=3", "--steps=1"])
    commands = [Command(["scripts.profile_step", *shape])]
    if setup.size == "full":
        lookup = ["--model=lookup", "--depth=12", f"--vocab_size={VOCAB_SIZE}"]
        commands.append(Command(["scripts.profile_step", *lookup]))
    return commands


FP8_RECIPES = (
    (),
    ("--fp8=hybrid",),
    ("--fp8=hybrid", "--fp8_scaling=rowwise"),
)


def fp8_commands(setup):
    shape = ["--depth=26", "--device_batch_size=16", f"--vocab_size={VOCAB_SIZE}"]
    more = []
    if setup.size == "tiny":  # the smallest whose matrices are large enough
        shape = ["--depth=2", "--device_batch_size=2", "--max_seq_len=64", "--vocab_size=512",
                 "--compile=0", "--warm_steps=3", "--steps=1"]
        more = ["--fp8_emulate=1"]
    commands = []
    for recipe in FP8_RECIPES:
        words = ["scripts.profile_step", *shape, *recipe]
        commands.append(Command(words + more if recipe else words))
    return commands


def kernel_commands(setup):
    shape = setup.pick(
        ["--depth=20", "--device_batch_size=32", f"--vocab_size={VOCAB_SIZE}"],
        ["--depth=20", "--device_batch_size=32", f"--vocab_size={VOCAB_SIZE}", "--seconds=0.5"],
        ["--depth=2", "--device_batch_size=1", "--vocab_size=512", "--seconds=0.01"])
    return [Command(["scripts.kernel_benchmark", *shape])]


def decode_commands(setup):
    shape = setup.pick(
        ["--depth=20", "--batches=1,16", "--contexts=512,1900"],
        ["--depth=20", "--batches=1,16", "--contexts=512"],
        ["--depth=1", "--vocab_size=512", "--batches=1", "--contexts=8", "--tokens=2"])
    written = Command(["scripts.infer_benchmark", *shape, "--compile=0"])
    if setup.size == "tiny":
        return [written]
    return [written, Command(["scripts.infer_benchmark", *shape])]


def simple_commands(setup):
    options = setup.pick([], ["--sizes=4096,8192"], [
        "--sizes=64", "--seconds=0.01", "--copy_megabytes=1", "--mlp_layers=0"])
    return [Command(["scripts.simple_train_benchmark", *options])]


def transformer_commands(setup):
    options = setup.pick(["--full"], ["--model=medium"], [
        "--model=small", "--batch-size=1", "--seq-len=32", "--iterations=2", "--compile=0"])
    return [Command(["scripts.transformer_benchmark", *options])]


def multigpu_commands(setup):
    model = "1.5b" if setup.gpus > 1 else "large"
    options = setup.pick([f"--model={model}"], ["--model=large"], [
        "--model=small", "--batch-size=1", "--seq-len=32", "--iterations=2", "--compile=0"])
    return [Command([
        "scripts.multigpu_benchmark", *options, f"--gpus={setup.gpus}", "--scaling-test"])]


def train(setup, tag, *options):
    """The words of a training run that does nothing but train."""
    words = [
        "scripts.base_train", f"--model_tag={tag}", "--ngram_tokens=0", "--eval_every=100000",
        "--save_every=100000", "--save_minutes=1000", "--keep=1", *options]
    if setup.data:
        words.append(f"--data={setup.data}")
    if setup.size == "tiny":
        return [*words, "--max_seq_len=128", "--total_batch_size=512", "--compile=0"]
    return [*words, "--dtype=bfloat16"]


def depth_commands(depth):
    def commands(setup):
        depth_here = setup.pick(depth, depth, 1)
        count = setup.pick(20, 6, 5)
        tag = f"depth{depth}"
        options = [f"--depth={depth_here}", "--model=gpt", f"--num_iterations={count}"]
        words = train(setup, tag, *options)
        return [Command(words, ranks=setup.gpus, variables={"TORCH_LOGS": "recompiles"})]
    return commands


def model_commands(setup):
    minutes = setup.pick(3.0, 0.5, 0.05)
    seeds = setup.pick(SEEDS, SEEDS[:1], SEEDS[:1])
    depth = setup.pick(12, 12, 1)
    commands = []
    for seed in seeds:
        for model in ("gpt", "lookup"):
            options = [
                f"--depth={depth}", f"--model={model}", f"--seed={seed}", f"--minutes={minutes}"]
            words = train(setup, f"{model}-{seed}", *options)
            commands.append(Command(words, ranks=setup.gpus))
    return commands


def layout_commands(setup):
    depth = setup.pick(20, 12, 1)
    count = setup.pick(15, 8, 5)
    commands = []
    for kind in ("zero2", "fsdp"):
        options = [
            f"--depth={depth}", "--model=gpt", f"--num_iterations={count}", f"--parallel={kind}"]
        commands.append(Command(train(setup, kind, *options), ranks=setup.gpus))
    return commands


def resume_commands(setup):
    depth = setup.pick(12, 12, 1)
    count = setup.pick(60, 40, 150)
    options = [f"--depth={depth}", "--model=gpt", f"--num_iterations={count}"]
    words = train(setup, "killed", *options)
    return [
        Command(words, ranks=setup.gpus, kill_tag="killed"),
        Command([*words, "--resume"], ranks=setup.gpus),
    ]


# --------------------------------------------------------------------------------------------------
# what the records say

def doctor_figures(records):
    [record] = records
    problems = [check["name"] for check in record["checks"] if check["status"] == "problem"]
    figures = {
        "problems": ", ".join(problems) or "none",
        "hub": "online" if record["numbers"]["network"].get("reachable") else "offline",
    }
    for kind, rate in record["numbers"].get("matmul", {}).get("flops_per_second", {}).items():
        figures[f"matmul {kind} TFLOP/s"] = rate / 1e12
    for check in record["checks"]:
        if check["name"] in ("attention", "exchange"):
            figures[check["name"]] = check["detail"]
    return figures


def text_figures(records):
    return {"vocabulary": records[-1]["vocab_size"]}


def profile_figures(records):
    figures = {}
    for record in records:
        name = f"{record['settings']['model']} "
        figures[f"{name}tokens/s"] = record["tokens_per_second"]
        figures[f"{name}ms a step"] = record["step_ms"]
        for kind, milliseconds in record["kinds_ms"].items():
            if milliseconds:
                figures[f"{name}{kind} ms"] = milliseconds
        figures[f"{name}idle ms"] = record["idle_ms"]
    return figures


def fp8_figures(records):
    """Tokens/s in bfloat16 and of each recipe, with what it gains."""
    plain, *others = records
    figures = {"bf16 tokens/s": plain["tokens_per_second"]}
    for record in others:
        name = f"{record['settings']['fp8']} {record['settings']['fp8_scaling'] or 'tensorwise'}"
        figures[f"{name} tokens/s"] = record["tokens_per_second"]
        figures[f"{name} / bf16"] = record["tokens_per_second"] / plain["tokens_per_second"]
    return figures


def kernel_figures(records):
    [record] = records
    figures = {"takes": record["kernel"]}
    for name, milliseconds in record["attention_ms"].items():
        if not isinstance(milliseconds, str):
            figures[f"{name} ms"] = milliseconds
    for name, milliseconds in record["loss_ms"].items():
        figures[f"loss {name} ms"] = milliseconds
    return figures


def decode_figures(records):
    figures = {}
    for name, record in zip(("as written", "captured"), records):
        for row in record["rows"]:
            if "step_seconds" in row:
                where = f"{row['batch']} x {row['context']}, {name}, ms"
                figures[where] = 1e3 * row["step_seconds"]
    return figures


def simple_figures(records):
    [record] = records
    rates = record["matmul_flops_per_second"]
    return {f"{name} TFLOP/s": rate / 1e12 for name, rate in rates.items()}


def transformer_figures(records):
    [record] = records
    done = [row for row in record["rows"] if "tokens_per_second" in row]
    return {f"{row['model']} tokens/s": row["tokens_per_second"] for row in done}


def multigpu_figures(records):
    [record] = records
    figures = {}
    for row in record["rows"]:
        if "tokens_per_second" in row:
            figures[f"{row['ranks']} x tokens/s"] = row["tokens_per_second"]
            if row.get("efficiency"):
                figures[f"{row['ranks']} x efficiency"] = row["efficiency"]
    return figures


def run_figures(record):
    """Of one training run: speed of a device, and its memory beside what was planned."""
    figures = {"tokens/s of a device": record["tokens_per_second"] / record["ranks"]}
    for name in ("mfu", "mfu_square"):
        if record.get(name):
            figures[name] = record[name]
    if record.get("peak_memory"):
        figures["peak GB"] = record["peak_memory"] / 1e9
        figures["planned GB"] = record["planned_memory"] / 1e9
        figures["peak / planned"] = record["peak_memory"] / record["planned_memory"]
    return figures


def depth_figures(records):
    [record] = records
    text = Path(record["log"]).read_text(encoding="utf-8", errors="replace")
    figures = run_figures(record)
    kernel = re.search(r"^attention kernel: (.*)", text, re.MULTILINE)
    if kernel:
        figures["attention"] = kernel[1]
    figures["warnings"] = len(re.findall(r"^WARNING", text, re.MULTILINE))
    figures["recompilations"] = text.count("Recompiling function")
    return figures


def model_figures(records):
    """Bits per byte of both models by seed, and what that decides."""
    scores = {"gpt": [], "lookup": []}
    for record in records:
        scores[record["settings"]["model"]].append(record["val_bpb"])
    figures = {f"{model} bpb": statistics.mean(found) for model, found in scores.items()}
    gains = [plain - lookup for plain, lookup in zip(scores["gpt"], scores["lookup"])]
    figures["lookup's gain, least"] = min(gains)
    figures["lookup's gain, most"] = max(gains)
    figures["decides"] = verdict(gains)
    return figures


def verdict(gains):
    """Which model a GPU should train by default. gains: bits per byte that lookup is better by, one
    for each seed."""
    if len(gains) < len(SEEDS):
        return f"nothing: {len(SEEDS)} seeds are needed, these are {len(gains)}"
    if min(gains) > 0:
        return "--model=lookup: better with every seed"
    if max(gains) < 0:
        return "--model=gpt: better with every seed"
    return "--model=gpt: the seeds disagree, and the plain model can leave for other runtimes"


def layout_figures(records):
    figures = {}
    for record in records:
        kind = record["settings"]["parallel"]
        for name, value in run_figures(record).items():
            figures[f"{kind} {name}"] = value
        figures[f"{kind} bpb"] = record["val_bpb"]
    return figures


def resume_figures(records):
    stopped, resumed = records
    return {
        "stopped at step": stopped["stopped_at"],
        "then trained to": resumed["steps"],
        "bpb": resumed["val_bpb"],
    }


STEPS = [
    Step("doctor", doctor_commands, doctor_figures, (90, 65, 150),
         "no problem; bf16 at 0.8 of the peak (H100, H200: 790 TFLOP/s), NVLink 350 GB/s and more"),
    Step("text", text_commands, text_figures, (600, 50, 120), "a tokenizer"),
    Step("profile", profile_commands, profile_figures, (360, 70, 120),
         "H100, depth 20, 65,536 tokens: 430 to 455 ms; loss below 20 ms without its products, "
         "idle below 3 %"),
    Step("fp8", fp8_commands, fp8_figures, (240, 0, 180),
         "H100, depth 26: hybrid / bf16 1.17 (as others measured), or docs/fp8.md has another"),
    Step("kernels", kernel_commands, kernel_figures, (180, 40, 120),
         "H100: cudnn or fa3 before flash; the loss compiled in a fifth of the eager time, and "
         "within 1.3 of its products"),
    Step("decode", decode_commands, decode_figures, (120, 50, 120),
         "H100, depth 20: one sequence below 2 ms a step, of 20 as it is written"),
    Step("matmul", simple_commands, simple_figures, (240, 35, 120),
         "0.80 of the bf16 peak at n = 8192"),
    Step("transformer", transformer_commands, transformer_figures, (420, 55, 120),
         "H100, tokens/s: small 1.2 M to 1.5 M, medium 500 k to 560 k, large 185 k to 210 k, xl "
         "92 k to 104 k"),
    Step("multigpu", multigpu_commands, multigpu_figures, (420, 60, 240),
         "efficiency 0.9 and more (documented: 0.69 on 8)", least_gpus=2),
    Step("depth12", depth_commands(12), depth_figures, (240, 60, 120),
         "peak within 10 % of the plan, no warning, no recompilation; H100: 559 k tokens/s by "
         "docs/planning.md"),
    Step("depth20", depth_commands(20), depth_figures, (300, 95, 120),
         "peak within 10 % of the plan; H100: 148 k tokens/s, edge 155 k; mfu 0.438, mfu_square "
         "0.485"),
    Step("models", model_commands, model_figures, (1770, 110, 240),
         "open: decides whether lookup becomes the default of a GPU"),
    Step("layouts", layout_commands, layout_figures, (420, 110, 240),
         "the same bits per byte; zero2 at least as fast, fsdp with less memory", least_gpus=2),
    Step("resume", resume_commands, resume_figures, (300, 90, 240),
         "saved at the signal, resumed, all steps done"),
]


# --------------------------------------------------------------------------------------------------
# running

# the last line of a traceback, of torchrun's ranks as well
RAISED = re.compile(r"(?:\[rank\d+\]: ?)?[\w.]*(?:Error|Exception)\b")


class Failed(Exception):
    """Why a step has no figures."""


def last_record(path):
    """The JSON object in the last line of a log that is one, else {}."""
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.startswith("{") and line.endswith("}"):
            return json.loads(line)
    return {}


def reason_of(text):
    """The line of a failed command's output that says why, at most 200 characters of it.

    Our own "error: ...", else the last line of a traceback, else the last line with a letter.
    (torchrun adds a page of its own below.)
    """
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    ours = [line for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if RAISED.match(line)]
    return ([*ours[:1], *raised[:1], *lines[-1:]] or ["without a word"])[0][:200]


def trained_steps(base, tag):
    """Records in the log of a training run, 0 before it has one."""
    log = base / "base_checkpoints" / tag / "log.jsonl"
    return log.read_text(encoding="utf-8").count('"loss"') if log.exists() else 0


def end_command(process):
    """End a command and all that it has started.

    torchrun starts each rank in a session of its own, which a signal to the command's group does
    not reach. At SIGTERM it ends them itself, with SIGKILL after the seconds of RANKS_END.
    """
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(RANKS_END + 5)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all have ended meanwhile
    process.wait()


def wait_for(process, command, base, deadline):
    """Wait until a command ends; returns whether it was stopped for its kill_tag.

    Failed at the deadline, of time.monotonic().
    """
    stopped = False
    began = said = time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        if now > deadline:
            raise Failed(f"no end after {now - began:.0f} seconds")
        if now - said > HEARTBEAT:
            said = now
            print(f"    ... {now - began:.0f} s", flush=True)
        if command.kill_tag and not stopped and trained_steps(base, command.kill_tag) >= 3:
            stopped = True
            process.send_signal(signal.SIGTERM)
    return stopped


def run_command(command, log, base, deadline):
    """Run a Command with its output in a log; returns its record. Failed where it fails.

    deadline: of time.monotonic(), at which it is killed.
    """
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command.line(),
            cwd=ROOT,
            env={
                **os.environ,
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(RANKS_END),
                **command.variables,
                "NANOCHAT_BASE_DIR": str(base),
            },
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            stopped = wait_for(process, command, base, deadline)
        finally:  # also after Ctrl+C, which does not come to another session
            end_command(process)
    if stopped:
        return {"stopped_at": trained_steps(base, command.kill_tag)}
    if process.returncode:
        reason = reason_of(log.read_text(encoding="utf-8", errors="replace"))
        raise Failed(f"exit status {process.returncode}: {reason} ({log})")
    if command.kill_tag:
        raise Failed(f"it ended before it could be stopped ({log})")
    return {**last_record(log), "log": str(log)}


def run_step(step, commands, folder, seconds):
    """The line of results.jsonl for a step."""
    begin = time.monotonic()
    row = {"step": step.name, "status": "ok", "figures": {}, "expected": step.expect}
    try:
        records = []
        for number, command in enumerate(commands, start=1):
            print(f"  {shlex.join(command.line()[1:])}", flush=True)
            log = folder / f"{step.name}-{number}.log"
            records.append(
                run_command(command, log, folder / "base", begin + seconds))
        row["figures"] = step.figures(records)
        row["machine"] = records[-1].get("machine")
    except Failed as error:
        row["status"], row["error"] = "failed", str(error)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        row["status"] = "failed"
        row["error"] = f"its record lacks what was expected: {type(error).__name__} {error}"
    row["seconds"] = round(time.monotonic() - begin, 1)
    row["commands"] = [shlex.join(command.line()[1:]) for command in commands]
    return row


def skipped(step, reason):
    """The line of results.jsonl for a step that is not run."""
    return {
        "step": step.name,
        "status": "skipped",
        "error": reason,
        "expected": step.expect,
        "seconds": 0,
    }


def chosen_steps(names):
    """The Steps of a setting such as "doctor,profile"; all for ""."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {step.name: step for step in STEPS}
    for name in wanted:
        if name not in known:
            raise UserError(f"steps={names}: {name} does not exist: choose from {', '.join(known)}")
    return [step for step in STEPS if not wanted or step.name in wanted]


def with_text(wanted, has_tokenizer):
    """The Steps, with that of the text before those that train on it, where there is none yet."""
    names = {step.name for step in wanted}
    if has_tokenizer or "text" in names or not names & TRAIN_ON_TEXT:
        return wanted
    return [step for step in STEPS if step.name == "text" or step.name in names]


# --------------------------------------------------------------------------------------------------
# the summary

def cell(value):
    """A figure as text.

    >>> cell(148123.4), cell(0.8123), cell("flash")
    ('148,123', '0.812', 'flash')
    """
    if isinstance(value, str) or value is None:
        return value or "unknown"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def latest_rows(text):
    """The last line of each step in a results.jsonl, in the order of STEPS. A step that was skipped
    later keeps what it had."""
    found = {}
    for row in map(json.loads, text.splitlines()):
        if row["status"] != "skipped" or row["step"] not in found:
            found[row["step"]] = row
    return [found[step.name] for step in STEPS if step.name in found]


def summary(rows, heading):
    """The results as a Markdown table."""
    lines = [heading, "", "| step | measured | expected | seconds |", "|---|---|---|---|"]
    for row in rows:
        if row["status"] == "ok":
            found = "; ".join(f"{name} {cell(value)}" for name, value in row["figures"].items())
        else:
            found = f"{row['status']}: {row['error']}"
        found = found.replace("|", "/")
        lines.append(f"| {row['step']} | {found} | {row['expected']} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def heading_of(rows, setup):
    """One line: date, devices, versions, size."""
    machines = [row["machine"] for row in rows if row.get("machine")]
    machine = machines[-1] if machines else {}
    names = machine.get("gpus") or [machine.get("cpu", platform.processor() or "unknown")]
    devices = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    today = datetime.date.today().isoformat()
    return f"{today}, {devices}, torch {machine.get('torch', 'unknown')}, {setup.size} checklist"


def path_of(text):
    """A path of the command line. (In --out=~/x the shell leaves ~ as it is.)"""
    return Path(expand_home(text, "write the whole path")).absolute()


def count_gpus():
    """GPUs that torch sees, asked in another process, where a driver that hangs can be left."""
    # importing scripts hides integrated GPUs
    question = [sys.executable, "-c", "import scripts, torch; print(torch.cuda.device_count())"]
    try:
        done = subprocess.run(question, cwd=ROOT, capture_output=True, text=True, timeout=120)
        return int(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return 0


def main(settings):
    require(settings, 1, "gpus")
    require(settings, 0, "minutes")
    if short and tiny:
        raise UserError("short and tiny are two sizes: choose one of them")
    started = time.monotonic()
    wanted = chosen_steps(steps)
    size = "full"
    for name, chosen in (("short", short), ("tiny", tiny)):
        size = name if chosen else size
    count = 8 if dry_run else count_gpus()
    ranks = gpus or count or (2 if tiny else 0)
    if not ranks or not (count or tiny):
        raise UserError("torch sees no GPU here: python -m scripts.doctor says why; --tiny runs "
                        "the checklist on a CPU")
    folder = path_of(out) if out else get_base_dir() / "gpu_checklist"
    base = folder / "base"
    wanted = with_text(wanted, (base / "tokenizer").exists() or (base / "tokenizers").exists())
    setup = Setup(size, ranks, str(path_of(data)) if data else "", size == "full")
    limit = sum(step.limit(size) for step in wanted) / 60
    where = f"{ranks} GPU{'s' * (ranks > 1)}" if count else f"{ranks} ranks of the CPU"
    print(f"{len(wanted)} steps on {where}, at most {limit:.0f} minutes, in {folder}", flush=True)
    if dry_run:
        for step in wanted:
            lines = [shlex.join(command.line()[1:]) for command in step.commands(setup)]
            print("\n  ".join([f"{step.name}: expect {step.expect}", *lines]))
        return

    # one step after another; what fails is written down like what does not
    rows = []
    base.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(wanted, start=1):
        print(f"[{number}/{len(wanted)}] {step.name}", flush=True)
        left = 60 * minutes - (time.monotonic() - started) if minutes else math.inf
        if ranks < step.least_gpus:
            row = skipped(step, f"needs {step.least_gpus} GPUs")
        elif not step.limit(size):
            row = skipped(step, f"is not in the {size} list")
        elif left < SHORTEST:
            row = skipped(step, f"{minutes:g} minutes were over")
        else:
            # the models of the steps before, which are of no use and fill the disk
            shutil.rmtree(base / "base_checkpoints", ignore_errors=True)
            row = run_step(step, step.commands(setup), folder, min(left, step.limit(size)))
        if row.get("figures", {}).get("hub") == "offline":
            setup = setup._replace(online=False)
        rows.append(row)
        with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {row['status']} {row.get('error', '')}", flush=True)
    # with what earlier calls have measured in this folder
    latest = latest_rows((folder / "results.jsonl").read_text(encoding="utf-8"))
    table = summary(latest, heading_of(latest, setup))
    (folder / "summary.md").write_text(table + "\n", encoding="utf-8")
    print("\n" + table + "\n")
    finish_stage("gpu_checklist", time.monotonic() - started, settings, steps=rows)
    raise SystemExit(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    main(configure(globals()))
