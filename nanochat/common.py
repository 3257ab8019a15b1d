"""What every stage needs: errors as one line, safe files, ranks and device."""
import contextlib
import datetime
import errno
import functools
import hashlib
import io
import os
import sys
import tempfile
import zlib
from collections import namedtuple
from pathlib import Path


class UserError(ValueError):
    """Bad input. The message is one line that names the remedy; the process prints only that and
    exits with 2."""


# What ends a program with one line in place of a traceback, and its exit status
EXIT_STATUS = {UserError: 2, OSError: 1, MemoryError: 1, KeyboardInterrupt: 130}


def _error_hook(kind, error, trace):
    """An excepthook: one line on standard error for the exceptions in EXIT_STATUS."""
    statuses = [status for known, status in EXIT_STATUS.items() if issubclass(kind, known)]
    message = " ".join(str(error).split()) or kind.__name__
    heartbeat = sys.modules.get("nanochat.heartbeat")  # of a process that is one of several ranks
    if not statuses:
        if heartbeat:
            heartbeat.explain(error)  # ends the process here where another rank has died
        sys.__excepthook__(kind, error, trace)
        _tell_other_ranks(f"{kind.__name__}: {message}")
        return
    if kind is KeyboardInterrupt:
        message = "interrupted"
    print(f"error: {message}", file=sys.stderr, flush=True)
    _tell_other_ranks(message)
    # The interpreter takes the exit status from a SystemExit raised inside the hook.
    raise SystemExit(statuses[0])


def _tell_other_ranks(failure):
    """Where this process is one of several ranks, say to the others why it ends."""
    heartbeat = sys.modules.get("nanochat.heartbeat")
    if heartbeat:
        heartbeat.leave(failure)
    elif "torch" in sys.modules and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from nanochat import heartbeat  # it has not joined, and torchrun has the store
        heartbeat.give_up(failure)


def install_error_hook():
    """Make a UserError end the process with one line and status 2.

    A full disk (or another OSError), a MemoryError and Ctrl+C also end it with one line, and with
    1, 1 and 130.
    What a terminal cannot encode or send ends nothing: see tolerate_characters().
    """
    sys.excepthook = _error_hook
    tolerate_characters()


def tolerate_characters():
    """Replace a character that a standard stream cannot encode or decode, as "?" or U+FFFD.

    A terminal in an old locale, a Windows console and a pipe may lack a character of a sample;
    half a character may be typed at a prompt. Neither is a reason to end.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):    # notebooks and services have others, or None
            with contextlib.suppress(io.UnsupportedOperation):  # it has been read from before
                stream.reconfigure(errors="replace")


# --------------------------------------------------------------------------------------------------
# files

def expand_home(path, remedy):
    """A path, a str, in which a ~ at the beginning has become the home folder.

    UserError, which ends with the remedy, where ~ means nothing: HOME is not set and the system
    does not list the user, as in a container that runs under a number of its own. A file whose name
    begins with ~ is left as it is.
    """
    expanded = os.path.expanduser(path)
    if str(expanded).startswith("~") and not os.path.exists(expanded):
        raise UserError(
            f"{path}: the home folder is not known (HOME is not set, or there is no such user): "
            + remedy
        )
    return str(expanded)


def get_base_dir():
    """The folder that holds everything a run writes: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat.

    A relative one is relative to the folder in which the command was given. Created if missing.
    UserError where it cannot be created, and where ~ means nothing.
    """
    named = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"
    base = Path(expand_home(named, "set NANOCHAT_BASE_DIR to a folder you can write")).absolute()
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {base} ({error.strerror}): "
            "set NANOCHAT_BASE_DIR to a folder you can write"
        ) from error
    return base


# How file systems (NFS, Lustre, CIFS, exFAT, FUSE) say that they do not offer a system call
NOT_OFFERED = {
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.EPERM,
    errno.EACCES,
    errno.EBADF,
    errno.ENOLCK,
    errno.ENOTTY,
}


@functools.cache
def warn_once(message):
    """Print a warning on standard error of rank 0, the first time that a process has it to say."""
    print0(f"warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def where_offered(call, consequence):
    """A context for a system call that only adds safety.

    Where the file system does not offer the call, a warning names it and the consequence, once, and
    the program continues. Other errors, those of a full or failing disk, are raised.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        warn_once(f"the file system refuses {call} ({error.strerror}): {consequence}")


def _fsync_file(file):
    """Make the contents of an open file outlive a power cut."""
    with where_offered("fsync of a file", "a power cut may lose what was just saved"):
        os.fsync(file.fileno())


def _fsync_folder(path):
    """Make the names in a folder outlive a power cut."""
    with where_offered("fsync of a folder", "a power cut may lose what was just saved"):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _give_usual_mode(path):
    """Set the mode that open() would have given: mkstemp() makes files for their owner alone."""
    umask = os.umask(0)  # the only way to read it is to set it
    os.umask(umask)
    with where_offered("chmod", "files keep the mode that it gives them"):
        os.chmod(path, 0o666 & ~umask)


@contextlib.contextmanager
def atomic_file(path):
    """A binary file that appears under `path` whole or not at all.

    In phases: write under a temporary name, fsync, rename, fsync of the folder. Where any of them
    fails, what was at `path` before is still there and the temporary file is gone.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent,
        prefix=path.name + ".",
        suffix=".tmp",
    )
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            _fsync_file(file)
        _give_usual_mode(temporary)
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def atomic_write(path, data):
    """Write `data` (bytes or str) to `path`, whole or not at all."""
    if isinstance(data, str):
        data = data.encode("utf-8")
    with atomic_file(path) as file:
        file.write(data)


def fraction(text):
    """A number in [0, 1) that depends on nothing but `text`, so that every sort or split by it is
    the same on every machine and in every run."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def sha256(path):
    """SHA-256 of the file at `path`, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# ranks and device

Compute = namedtuple("Compute", "is_dist rank local_rank world_size device dtype")


def get_dist_info():
    """(is_dist, rank, local_rank, world_size) from torchrun's environment variables.

    (False, 0, 0, 1) for a process that torchrun did not start.
    """
    if "RANK" not in os.environ:
        return False, 0, 0, 1
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ["LOCAL_RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    return True, rank, local_rank, world_size


def is_one_machine():
    """Whether all ranks are on this machine."""
    world_size = get_dist_info()[3]
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == world_size


def print0(*args, **kwargs):
    """print() on rank 0 only."""
    if get_dist_info()[1] == 0:
        print(*args, **{"flush": True, **kwargs})


def choose_device_type(device_type):
    """The type of the device to compute on: `device_type` itself, or for "" the best one here.

    MPS is the best one of a Mac where the gradients of a tiny model on it are those of the CPU.
    UserError where the named type is not available, and where nothing was named and torch cannot
    use the GPU that the machine has: the run would otherwise be a slow one, without a word why.
    """
    import torch
    from nanochat.hardware import find_unseen_gpu, mps_problem
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device_type and not available.get(device_type):
        choices = [name for name, is_available in available.items() if is_available]
        raise UserError(f"device_type={device_type} is not available here: choose from {choices}")
    if device_type:
        return device_type
    if available["cuda"]:
        return "cuda"
    if available["mps"]:
        problem = mps_problem()
        if not problem:
            return "mps"
        warn_once(f"the MPS device is not used: {problem}; --device_type=mps takes it all the same")
        return "cpu"
    problem = find_unseen_gpu()
    if problem:
        raise UserError(problem)
    return "cpu"


def _set_up_threads(is_dist):
    """Give this process its share of the CPUs, or as many threads as the user has asked for."""
    import torch
    from nanochat.hardware import available_cpus, bind_workers, threads_are_chosen
    chosen = threads_are_chosen(is_dist)  # torch has read the number when it was imported
    if is_dist:  # torchrun leaves one thread to each rank
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if not chosen:
            torch.set_num_threads(max(1, available_cpus() // ranks_here))
        return
    if not chosen and torch.get_num_threads() > available_cpus():
        torch.set_num_threads(available_cpus())  # OpenMP knows nothing of a cgroup's quota
    bind_workers()


# A collective that takes longer fails. NCCL's own ten minutes are too few for a save of a large
# model on a slow disk, or for the first reading of large --data. Earlier ends: of a training step
# --hang_minutes, which says where each rank was, and of a rank that has died heartbeat.py.
GROUP_TIMEOUT = datetime.timedelta(hours=2)


def _join_process_group(device):
    """Join the other ranks, and begin to watch that none of them dies."""
    import torch.distributed as dist
    from nanochat import heartbeat
    # Some optimizers import this module. Imported after init_process_group, it keeps the group as
    # a default argument: the group's threads then outlive compute_cleanup, and one that wants the
    # interpreter while that ends aborts the process.
    import torch.distributed.nn  # noqa: F401
    is_cuda = device.type == "cuda"
    error_hook = sys.excepthook
    store, rank, world_size = next(dist.rendezvous("env://", timeout=GROUP_TIMEOUT))
    store.set_timeout(GROUP_TIMEOUT)
    heartbeat.gather(store, rank, world_size)
    # With its device named, NCCL connects now, and what prevents that is seen at the start.
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=GROUP_TIMEOUT,
        device_id=device if is_cuda else None,
    )
    # Torch puts its own hook before ours, to mark each line with its rank, and loses what ours says
    # before it ends the process.
    sys.excepthook = error_hook
    if world_size > 1:
        master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        heartbeat.start(rank, world_size, is_one_machine(), master)


def check_dtype(dtype):
    """UserError for a dtype of compute_init() that is not supported."""
    if dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"dtype={dtype} is not supported: choose float32 or bfloat16")


def compute_init(device_type="", dtype="", seed=42):
    """Choose device and compute dtype, join the process group under torchrun, seed torch.

    device_type: cuda, mps or cpu; "" is the best one here (choose_device_type).
    dtype: float32 or bfloat16; "" lets the hardware decide.
    Returns a Compute tuple. UserError for a device or dtype that is not to be had here.
    """
    import torch
    import torch.distributed as dist
    from nanochat.hardware import preferred_dtype
    is_dist, rank, local_rank, world_size = get_dist_info()

    # 1) what to compute on, and in which dtype
    device_type = choose_device_type(device_type)
    check_dtype(dtype)
    dtype = dtype or preferred_dtype(device_type)
    if device_type == "mps" and world_size > 1:
        raise UserError(
            f"a Mac has one MPS device for {world_size} ranks: start without torchrun, or give "
            "--device_type=cpu")

    # 2) the device's own settings
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif device_type == "cpu":
        _set_up_threads(is_dist)

    # 3) the random state, and the other ranks
    torch.manual_seed(seed)
    if is_dist and not dist.is_initialized():
        _join_process_group(device)
    return Compute(is_dist, rank, local_rank, world_size, device, getattr(torch, dtype))


def compute_cleanup():
    """Leave the process group, if this process has joined one."""
    import torch.distributed as dist
    # Torch decides, not the environment: a script may end before it has joined.
    if dist.is_available() and dist.is_initialized():
        from nanochat import heartbeat
        heartbeat.leave()
        dist.destroy_process_group()


def collective_device():
    """The type of the device on which the ranks exchange numbers: NCCL's, or the CPU.

    Never MPS, which has no float64.
    """
    import torch.distributed as dist
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def all_reduce_max(*numbers):
    """The largest of each number over all ranks, as a tuple or list of floats.

    This is a collective: every rank must call it. Ranks that decide by its result (has the time run
    out? did a signal arrive?) all decide alike.
    """
    import torch
    import torch.distributed as dist
    if not (dist.is_available() and dist.is_initialized()):
        return numbers
    values = torch.tensor(numbers, dtype=torch.float64, device=collective_device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def gathered(values):
    """The items of the list of each rank in one list, in the order of the ranks.

    This is a collective: every rank must call it. The items travel as pickles.
    """
    import torch.distributed as dist
    world_size = get_dist_info()[3]
    if world_size == 1:
        return values
    lists = [None] * world_size
    dist.all_gather_object(lists, values)
    return [value for one in lists for value in one]


def require_alike(what, value, remedy):
    """UserError on every rank unless `value` is the same on all of them. what: its name.

    This is a collective. Machines that do not share a folder may find different things in theirs;
    ranks that start from different ones would wait for each other in different collectives.
    """
    number = zlib.crc32(repr(value).encode("utf-8"))
    highest, lowest = all_reduce_max(number, -number)
    if highest != -lowest:
        raise UserError(f"the ranks differ in {what}, rank {get_dist_info()[1]} has {value}: "
                        + remedy)
