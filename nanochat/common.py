"""What every stage needs: errors as one line, safe files, ranks and device."""
import contextlib
import hashlib
import os
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


def all_reduce_max(*numbers):
    """The largest of each number over all ranks, as a tuple or list of floats. Every rank must call it: it is a collective.

    Ranks that decide by such a number (has the time run out? was there a signal?) all decide alike.
    """
    import torch
    import torch.distributed as dist
    if not (dist.is_available() and dist.is_initialized()):
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()
