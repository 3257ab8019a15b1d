"""What every stage needs: ranks and device, errors as one line, safe files, and the line that ends a stage."""
import contextlib
import datetime
import hashlib
import json
import os
import platform
import signal
import sys
import tempfile
from collections import namedtuple
from pathlib import Path


class UserError(ValueError):
    """Bad input. The message is one line that names the remedy; the process prints only that and exits with 2."""


def install_error_hook():
    """From here on a UserError ends the process with one line and status 2, a full disk and Ctrl+C likewise (1 and 130)."""
    def hook(kind, error, trace):
        known = {UserError: 2, OSError: 1, KeyboardInterrupt: 130}
        status = next((s for k, s in known.items() if issubclass(kind, k)), None)
        if status is None:
            sys.__excepthook__(kind, error, trace)
            return
        message = "interrupted" if kind is KeyboardInterrupt else " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(status)  # the interpreter takes the status from an exit raised inside the hook
    sys.excepthook = hook


# ---------------------------------------------------------------------------------------------------------------------
# files

def get_base_dir():
    """The folder that holds everything a run writes: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat. Created if missing."""
    base = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser().absolute()
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {base} ({error.strerror}): set NANOCHAT_BASE_DIR to a folder you can write") from error
    return base


@contextlib.contextmanager
def atomic_file(path):
    """A binary file that appears under `path` whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's file is for its owner alone
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name outlives a power cut, too
        finally:
            os.close(folder)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def atomic_write(path, data):
    """Write `data` (bytes or str) to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def fraction(text):
    """A number in [0, 1) that depends on nothing but `text`: whoever sorts or splits by it does so the same way for ever."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:6], "big") / 2**48


def sha256(path):
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# ranks and device

Compute = namedtuple("Compute", "is_dist rank local_rank world_size device dtype")


def get_dist_info():
    """(is_dist, rank, local_rank, world_size) as torchrun's environment tells; (False, 0, 0, 1) without it."""
    if "RANK" not in os.environ:
        return False, 0, 0, 1
    return True, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


def print0(*args, **kwargs):
    """print() on rank 0 only."""
    if get_dist_info()[1] == 0:
        print(*args, **{"flush": True, **kwargs})


def compute_init(device_type="", dtype="", seed=42):
    """Choose device and compute dtype, join the process group under torchrun, seed. Returns a Compute tuple.

    device_type: cuda, mps or cpu; empty is cuda where there is one, else cpu (mps on request: nobody has tried it).
    dtype: float32 or bfloat16; empty lets the hardware decide.
    """
    import torch
    import torch.distributed as dist
    from nanochat.hardware import bind_workers, preferred_dtype
    is_dist, rank, local_rank, world_size = get_dist_info()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device_type = device_type or ("cuda" if available["cuda"] else "cpu")
    if not available.get(device_type):
        raise UserError(f"device_type={device_type} is not available here: choose from {[n for n in available if available[n]]}")
    dtype = dtype or preferred_dtype(device_type)
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype} is not supported: choose float32 or bfloat16")
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device_type == "cpu":
        if is_dist:  # torchrun leaves one thread to a rank: share out all cores
            torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        else:
            bind_workers()
    torch.manual_seed(seed)
    if is_dist and not dist.is_initialized():
        # Imported later (optimizers do it), this keeps the group as a default argument: the group's threads then outlive
        # compute_cleanup, and one that wants the interpreter while that ends aborts the process.
        import torch.distributed.nn
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return Compute(is_dist, rank, local_rank, world_size, device, getattr(torch, dtype))


def compute_cleanup():
    """Leave the process group, if one was joined. (Asks torch, not the environment.)"""
    import torch.distributed as dist
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class StopRequest:
    """Ctrl+C or SIGTERM asks the loop to stop at its next step; a second one stops at once."""

    def __init__(self):
        self.signal = 0
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def release(self):
        """No step is to come: from here on a signal ends the process at once."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.signal:
            print0("stopped at once")
            raise SystemExit(128 + number)
        self.signal = number
        print0("stopping after this step; once more stops at once")


def how_to_go_on(settings):
    """What a stage says when it was stopped and has saved."""
    named = [f"--{name}" for name in ("resume_from_checkpoint", "extend") if settings.get(name) is not None]
    return f"the same command with --resume {'in place of ' + named[0] + ' ' if named else ''}goes on"


def agree(*numbers):
    """The largest of each number over all ranks, so that every rank takes the same decision."""
    import torch
    import torch.distributed as dist
    if not (dist.is_available() and dist.is_initialized()):
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# the record of a run

def machine():
    """What this run ran on, for the record."""
    from nanochat.hardware import cpu_name, instruction_set, memory_gb
    import torch
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu_name(), "isa": instruction_set(), "cores": os.cpu_count(), "memory_gb": memory_gb(), "gpus": gpus,
            "python": platform.python_version(), "torch": torch.__version__}


def append_metrics(row):
    with open(get_base_dir() / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def open_log(folder, step):
    """folder/log.jsonl, open for rows after `step`. What an interrupted run wrote beyond the step from which we go on is cut off."""
    path, kept = folder / "log.jsonl", []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if step and path.exists() else []:
        if json.loads(line)["step"] > step:
            break
        kept.append(line + "\n")
    atomic_write(path, "".join(kept))
    return open(path, "a", encoding="utf-8")


def open_logger(name, folder, settings):
    """A function (step, row) that shows a row's numbers in tensorboard (in `folder`) or wandb, or that does nothing.

    name: tensorboard, wandb or empty. Where the program is not installed one line says so, and the run goes on.
    """
    if name not in ("", "tensorboard", "wandb"):
        raise UserError(f"logger={name} is not supported: choose tensorboard or wandb, or none")
    if not name or get_dist_info()[1] != 0:
        return lambda step, row: None

    def numbers(row):
        return {key: value for key, value in row.items() if isinstance(value, (int, float))}

    try:
        if name == "wandb":
            import wandb
            run = wandb.init(project="nanochat", name=folder.name, config=settings)
            return lambda step, row: run.log(numbers(row), step=step)
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder / "tensorboard")
        return lambda step, row: [writer.add_scalar(key, value, step) for key, value in numbers(row).items()]
    except ImportError:
        print0(f"{name} is not installed, going on without it (log.jsonl in {folder} has the same numbers)")
        return lambda step, row: None


def finish_stage(stage, seconds, settings, **fields):
    """End a stage: one JSON line at column 0 of standard output, and the same line in $NANOCHAT_BASE_DIR/metrics.jsonl.

    seconds: wall clock of the whole stage. settings: what configure() returned. Rank 0 only. A stage of a speedrun names the run,
    so that a second call of speedrun.sh knows what is done.
    """
    if get_dist_info()[1] != 0:
        return
    row = {"stage": stage, "seconds": round(seconds, 2), "machine": machine(), "settings": settings, **fields,
           "time": datetime.datetime.now().isoformat(timespec="seconds"), "run": os.environ.get("NANOCHAT_RUN")}
    append_metrics(row)
    print(json.dumps(row), flush=True)
