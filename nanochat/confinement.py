"""The layers of confinement, each of which a process applies to itself and cannot take off again.

A list of forbidden functions is no sandbox, for the same system call has many names. What confines
a program is the kernel, and it has several means, none of which stops everything. So they lie over
each other, and docs/sandbox.md has a table of what each one stops:

    namespaces          nothing but the interpreter's files, no network, no other process in sight
    unprivileged_user   no capabilities; uid 65534 in place of root
    limits              memory, CPU time, size of files, open files, threads
    no_new_privs        no program that it starts has more rights than it has itself
    landlock            files are read below the interpreter's folders, written in the scratch alone
    seccomp             of about 450 system calls those that computing needs, some with conditions

The order is that of the table: each layer takes away what a layer before it needed.

This file is imported by the process that will be confined, under `python -I -S`: it imports little,
and nothing of nanochat. The numbers are those of Linux's headers, include/uapi/linux/
{landlock,seccomp,audit,sched,mount,prctl}.h and man pages of the same names.
"""
import ctypes
import errno
import functools
import json
import os
import resource
import signal
import struct
import sys

LAYERS = (
    "namespaces",
    "unprivileged_user",
    "limits",
    "no_new_privs",
    "landlock",
    "seccomp",
)
NOBODY = 65534              # user and group that root becomes; Linux's overflow uid
# Where a program may write, in memory; it vanishes with its namespace. A name that no machine has
SCRATCH = "/nanochat-scratch"
SCRATCH_MB = 16
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

# --------------------------------------------------------------------------------------------------
# system calls


@functools.cache
def _library():
    return ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """Call a function of the C library, and return its result.

    Numbers are passed as long, bytes as char*, None as NULL. OSError for a negative result,
    and where the C library lacks the function, as on other systems than Linux.
    """
    function = getattr(_library(), name, None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), name)
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = function(*passed)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def system_call(name, *arguments):
    """Make one of the system calls in SYSCALLS that the C library may lack; as call()."""
    number = SYSCALLS[name][MACHINES.index(os.uname().machine)]
    try:
        return call("syscall", number, *arguments)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None


# --------------------------------------------------------------------------------------------------
# namespaces

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_NEWCGROUP, CLONE_THREAD = 0x02000000, 0x10000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND = 1, 2, 4, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2


def readable_paths():
    """Folders that the interpreter needs: its library, and the shared libraries of the system.

    So a program can read what is installed beside the library, site-packages for example.
    """
    standard_library = os.path.dirname(os.__file__)
    candidates = (
        standard_library,
        os.path.join(sys.base_prefix, "lib"),
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/usr/share/zoneinfo",
    )
    return [path for path in dict.fromkeys(candidates) if os.path.isdir(path)]


def enter_namespaces(paths):
    """Leave the machine's processes, network and files behind, all but the folders in `paths`.

    The calling process itself stays among the machine's processes: its next child is the first one
    of the new namespace, and when that child ends, the kernel kills all others in it. SCRATCH
    becomes the current folder. A user who is not root needs a user namespace for this, in which
    the uid remains what it is.
    """
    uid, gid = os.geteuid(), os.getegid()
    others = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if uid == 0:
        call("unshare", others)
    else:
        call("unshare", others | CLONE_NEWUSER)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    _change_root(paths)


def _write(path, text):
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _change_root(paths):
    """Make a root folder in memory that holds `paths`, some devices and SCRATCH, and enter it.

    In phases: hold the sources open, because the new root may hide them; mount it; bind the sources
    in it; make all of it read-only; mount SCRATCH; make it the root, and detach the old one.
    """
    root = next(path for path in ("/tmp", "/var/tmp", "/mnt") if os.path.isdir(path))
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in (*paths, *DEVICES)}
    call("mount", b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID, b"size=1m,mode=755")
    for path, source in sources.items():
        _bind(source, root + path, is_folder=path in paths)
        os.close(source)
    os.makedirs(root + SCRATCH)

    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    system_call(
        "mount_setattr", AT_FDCWD, root.encode(), AT_RECURSIVE, attributes, len(attributes))
    options = f"size={SCRATCH_MB}m,nr_inodes=1000,mode=1777".encode()
    call("mount", b"tmpfs", (root + SCRATCH).encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options)

    os.chdir(root)
    system_call("pivot_root", b".", b".")   # the old root then lies over the new one
    call("umount2", b".", MNT_DETACH)
    os.chdir(SCRATCH)


def _bind(source, target, is_folder):
    """Make the file or folder that is open as `source` appear at `target` as well."""
    os.makedirs(target if is_folder else os.path.dirname(target), exist_ok=True)
    if not is_folder:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o666))
    path = f"/proc/self/fd/{source}".encode()
    call("mount", path, target.encode(), None, MS_BIND | MS_REC, None)


# --------------------------------------------------------------------------------------------------
# user, limits, no_new_privs

CAPABILITY_VERSION_3 = 0x20080522
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 15, 22, 38
FILE_MB = 16
OPEN_FILES = 64
THREADS = 256           # of all processes of the user, where there is no user namespace


def become_unprivileged():
    """Give up all capabilities; root becomes NOBODY.

    PermissionError where NOBODY cannot read the interpreter's files, as those of a Python in
    /root, which enter_namespaces() makes readable.
    """
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        os.listdir(os.path.dirname(os.__file__))
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    call("capset", header, bytes(24))   # effective, permitted and inheritable: none


def limit_resources(seconds, memory_mb):
    """Limit what the process can use. seconds: of CPU time. memory_mb: of address space, in MiB.

    At the CPU limit comes SIGXCPU, which a program may ignore, a second later SIGKILL.
    """
    wanted = {
        "AS": (memory_mb << 20, memory_mb << 20),
        "CPU": (seconds, seconds + 1),
        "FSIZE": (FILE_MB << 20, FILE_MB << 20),
        "NOFILE": (OPEN_FILES, OPEN_FILES),
        "NPROC": (THREADS, THREADS),
        "CORE": (0, 0),
        "MEMLOCK": (0, 0),
        "MSGQUEUE": (0, 0),
    }
    for name, (soft, hard) in wanted.items():
        kind = getattr(resource, "RLIMIT_" + name, None)
        if kind is None:    # MSGQUEUE exists on Linux alone
            continue
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def set_no_new_privs():
    """Make set-uid programs ordinary ones; Landlock and seccomp ask for it."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def die_with_parent():
    """Be killed when the process that started this one ends. A change of the user undoes it."""
    if sys.platform == "linux":
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


# --------------------------------------------------------------------------------------------------
# Landlock

LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
# rights on files, in the order of their bits, with the ABI that has brought them
FILE_RIGHTS = (
    ("execute", 1), ("write_file", 1), ("read_file", 1), ("read_dir", 1),
    ("remove_dir", 1), ("remove_file", 1), ("make_char", 1), ("make_dir", 1),
    ("make_reg", 1), ("make_sock", 1), ("make_fifo", 1), ("make_block", 1),
    ("make_sym", 1), ("refer", 2), ("truncate", 3), ("ioctl_dev", 5),
)
TCP_RIGHTS = 0b11       # bind and connect, ABI 4
SCOPES = 0b11           # abstract sockets and signals stay inside the domain, ABI 6
READ = {"read_file", "read_dir"}
SCRATCH_RIGHTS = READ | {
    "write_file", "remove_dir", "remove_file", "make_dir", "make_reg", "make_sym", "truncate"}
DEVICE_RIGHTS = {"read_file", "write_file"}


def landlock_abi():
    """The version of the kernel's Landlock. OSError where it has none, or has it switched off."""
    return system_call(
        "landlock_create_ruleset", None, 0, LANDLOCK_CREATE_RULESET_VERSION)


def _bits(names, abi):
    """The named rights as a number, without those that the ABI does not know."""
    known = [
        (name, bit)
        for bit, (name, since) in enumerate(FILE_RIGHTS)
        if since <= abi
    ]
    return sum(1 << bit for name, bit in known if name in names)


def apply_landlock(paths, scratch):
    """Allow to read below `paths`, to write below `scratch` (a folder, or None), and no other use
    of files.

    Where the ABI has them: no TCP, no abstract socket and no signal to a process outside.
    """
    abi = landlock_abi()
    every_right = _bits({name for name, _ in FILE_RIGHTS}, abi)
    tcp = TCP_RIGHTS if abi >= 4 else 0
    scopes = SCOPES if abi >= 6 else 0
    fields = 1 + (abi >= 4) + (abi >= 6)    # the structure has grown
    attributes = struct.pack("QQQ", every_right, tcp, scopes)[:8 * fields]
    ruleset = system_call("landlock_create_ruleset", attributes, len(attributes), 0)
    rules = [(path, READ) for path in paths]
    rules += [(path, DEVICE_RIGHTS) for path in DEVICES]
    if scratch:
        rules.append((scratch, SCRATCH_RIGHTS))
    for path, names in rules:
        if os.path.exists(path):
            _allow_below(ruleset, path, _bits(names, abi))
    system_call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _allow_below(ruleset, path, rights):
    """Add the rule that what lies below `path` may be used with these rights."""
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, folder)
    system_call("landlock_add_rule", ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
    os.close(folder)


# --------------------------------------------------------------------------------------------------
# seccomp
#
# The filter is a program for the kernel's classic BPF machine, which runs at each system call: it
# loads the machine's name and the number of the call, and compares. Allowed is what is listed; all
# else fails with EPERM, so that an honest program sees a PermissionError and may do without. Killed
# at once is what no honest program of this kind calls. A number belongs to one architecture: an
# x86_64 kernel also takes the calls of i386 and of x32, which have other numbers, and are killed.

MACHINES = ("x86_64", "aarch64")
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000
LD_WORD, JUMP_EQUAL, AND, RETURN = 0x20, 0x15, 0x54, 0x06   # operations of classic BPF
JUMP_SET = 0x45
ALLOW, KILL = 0x7FFF0000, 0x80000000
FAIL = 0x00050000       # with the error number in the low 16 bits
SECCOMP_MODE_FILTER = 2
NUMBER_OFFSET, ARCH_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16     # in struct seccomp_data

# name: number on x86_64, on aarch64 (which lacks the calls that others have replaced)
ALLOWED = {
    # memory
    "brk": (12, 214), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "mremap": (25, 216), "madvise": (28, 233), "membarrier": (324, 283),
    # files that are open
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66),
    "pread64": (17, 67), "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70),
    "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "fcntl": (72, 25), "ftruncate": (77, 46),
    "fsync": (74, 82), "fdatasync": (75, 83), "flock": (73, 32), "sendfile": (40, 71),
    "copy_file_range": (326, 285), "fallocate": (285, 47), "pipe": (22, None), "pipe2": (293, 59),
    # names of files; Landlock and the namespace decide which. Landlock does not govern modes,
    # owners and times, so that chmod, chown and utime are not here
    "open": (2, None), "openat": (257, 56), "stat": (4, None), "lstat": (6, None),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "symlink": (88, None), "symlinkat": (266, 36), "umask": (95, 166),
    "truncate": (76, 45), "statfs": (137, 43), "fstatfs": (138, 44),
    # time and waiting
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "time": (201, None), "times": (100, 153), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "alarm": (37, None), "setitimer": (38, 103),
    "getitimer": (36, 102), "pause": (34, None), "select": (23, None), "pselect6": (270, 72),
    "poll": (7, None), "ppoll": (271, 73), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    # signals to itself, threads
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "futex": (202, 98),
    "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293),
    "set_tid_address": (218, 96), "arch_prctl": (158, None), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "exit": (60, 93), "exit_group": (231, 94),
    "wait4": (61, 260), "waitid": (247, 95),
    # about itself
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgrp": (111, None), "uname": (63, 160),
    "getrusage": (98, 165), "getrlimit": (97, 163), "sysinfo": (99, 179), "getrandom": (318, 278),
    # a pair of connected sockets, as asyncio has one; see conditions()
    "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210), "getsockopt": (55, 209),
    "setsockopt": (54, 208), "getsockname": (51, 204), "getpeername": (52, 205),
}
CONDITIONAL = {
    "ioctl": (16, 29), "socketpair": (53, 199), "clone": (56, 220), "prctl": (157, 167),
    "prlimit64": (302, 261), "kill": (62, 129), "tgkill": (234, 131),
}
# glibc makes a thread with clone3, whose flags are in memory that a filter cannot read; where it
# does not exist, glibc takes clone
MISSING = {"clone3": (435, 435)}
# used to confine, and not allowed afterwards
CONFINING = {
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446), "mount_setattr": (442, 442),
}
KILLED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "move_mount": (429, 429), "open_tree": (428, 428),
    "fsopen": (430, 430), "fsmount": (432, 432), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89),
    "open_by_handle_at": (304, 265), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "seccomp": (317, 277), "vmsplice": (278, 75),
}
SYSCALLS = {**ALLOWED, **CONDITIONAL, **MISSING, **CONFINING, **KILLED}

# ioctl: is it a terminal? its size, close-on-exec, bytes to read; never TIOCSTI, which types
IOCTLS = (0x5401, 0x5413, 0x5450, 0x5451, 0x541B, 0x5421)
NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC
    | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
)
SOCK_STREAM, SOCK_TYPE = 1, 0xF


def conditions(pid):
    """{system call: (argument, mask, values)}: allowed where argument & mask is one of the values.

    pid: of the process that is confined. Of each argument the kernel reads 32 bits and no more, so
    the filter does as well.
    """
    everything = 0xFFFFFFFF
    return {
        "clone": (0, CLONE_THREAD | NAMESPACES, (CLONE_THREAD,)),   # a thread, never a process
        "ioctl": (1, everything, IOCTLS),
        "prctl": (0, everything, (PR_SET_NAME,)),
        "prlimit64": (0, everything, (0, pid)),
        "kill": (0, everything, (pid,)),
        "tgkill": (0, everything, (pid,)),
        # a stream reaches its other end alone; a datagram could be sent to any name
        "socketpair": (1, SOCK_TYPE, (SOCK_STREAM,)),
    }


def _instruction(operation, value, if_true=0, if_false=0):
    return struct.pack("=HBBI", operation, if_true, if_false, value)


def _for_call(number, body):
    """Instructions that run `body`, which ends with a return, where the call has this number."""
    length = len(body) // 8
    return _instruction(JUMP_EQUAL, number, 0, length) + body


def _where(argument, mask, values):
    """Instructions that allow the call where its argument, masked, is one of the values."""
    body = _instruction(LD_WORD, ARGUMENTS_OFFSET + 8 * argument) + _instruction(AND, mask)
    for value in values:
        body += _instruction(JUMP_EQUAL, value, 0, 1) + _instruction(RETURN, ALLOW)
    return body + _instruction(RETURN, FAIL | errno.EPERM)


def seccomp_filter(machine, pid):
    """The filter of a process as bytes, 8 an instruction. machine: one of MACHINES."""
    column = MACHINES.index(machine)
    numbers = {name: pair[column] for name, pair in SYSCALLS.items() if pair[column] is not None}
    kill = _instruction(RETURN, KILL)
    program = _instruction(LD_WORD, ARCH_OFFSET)
    program += _instruction(JUMP_EQUAL, AUDIT_ARCH[machine], 1, 0) + kill
    program += _instruction(LD_WORD, NUMBER_OFFSET)
    if machine == "x86_64":
        program += _instruction(JUMP_SET, X32_BIT, 0, 1) + kill

    conditional = conditions(pid)
    for name, number in numbers.items():
        if name in KILLED:
            body = kill
        elif name in MISSING:
            body = _instruction(RETURN, FAIL | errno.ENOSYS)
        elif name in conditional:
            body = _where(*conditional[name])
        elif name in ALLOWED:
            body = _instruction(RETURN, ALLOW)
        else:
            continue
        program += _for_call(number, body)
    return program + _instruction(RETURN, FAIL | errno.EPERM)


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def apply_seccomp():
    """Allow the system calls of the list to this process and to all that it may become."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}", "seccomp")
    instructions = seccomp_filter(machine, os.getpid())
    program = _FilterProgram(len(instructions) // 8, instructions)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


# --------------------------------------------------------------------------------------------------
# all of them


class ConfinementError(Exception):
    """A layer could not be applied. The message is its name and the kernel's reason."""


def apply(name, wanted, function, *arguments):
    """Apply one layer, function(*arguments), where `wanted` has its name."""
    if name not in wanted:
        return
    try:
        function(*arguments)
    except (OSError, ValueError) as error:
        raise ConfinementError(f"{name}: {error}") from error


def confine_session(wanted, paths):
    """The layers that a process applies before it starts others: namespaces, user."""
    apply("namespaces", wanted, enter_namespaces, paths)
    apply("unprivileged_user", wanted, become_unprivileged)


def confine_process(wanted, paths, seconds, memory_mb):
    """The layers that each process applies to itself right before it runs what is not trusted."""
    apply("limits", wanted, limit_resources, seconds, memory_mb)
    apply("no_new_privs", wanted, set_no_new_privs)
    scratch = SCRATCH if "namespaces" in wanted else None
    apply("landlock", wanted, apply_landlock, paths, scratch)
    apply("seccomp", wanted, apply_seccomp)


NEEDS = {
    "unprivileged_user": "namespaces",  # which shows the interpreter's files to another user
    "landlock": "no_new_privs",
    "seccomp": "no_new_privs",
}


def probe():
    """Try every layer, each in a child process; print a list of [name, reason] as JSON."""
    missing = []
    for layer in LAYERS:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            _try(layer, writing)
        os.close(writing)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with open(reading, "rb") as file:
            reason = file.read().decode("utf-8", "replace")
        if status:
            missing.append([layer, reason or f"{layer}: its trial ended with {status}"])
    print(json.dumps(missing))


def _try(layer, writing):
    """Apply a layer to this process and end it: with 0, or with 1 and the reason in a pipe."""
    paths = readable_paths()
    for name in (NEEDS.get(layer), layer):
        try:
            confine_session([name], paths)
            confine_process([name], paths, 10, 512)
        except ConfinementError as error:
            if name == layer:
                os.write(writing, str(error).encode("utf-8"))
                os._exit(1)
    os._exit(0)


@functools.cache
def missing_layers():
    """{name: reason} of the layers that this system does not offer to this user.

    They are tried on processes that have nothing else to do.
    """
    if sys.platform != "linux":
        import platform
        return {name: f"{platform.system()} has none" for name in LAYERS if name != "limits"}
    import subprocess
    done = subprocess.run(
        command("nanochat.confinement", "probe"), capture_output=True, text=True, env={})
    if done.returncode:
        last = done.stderr.strip().split("\n")[-1]
        return dict.fromkeys(LAYERS, last or f"the probe ended with {done.returncode}")
    return dict(json.loads(done.stdout))


def command(module, function, *arguments):
    """The command that runs a function of a module of this repository in a bare interpreter.

    -I: no variable, no user site, no current folder. -S: no site-packages. The repository leaves
    the path again before the function runs.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = (
        f"import sys; sys.path.insert(0, {root!r}); import {module} as m; "
        f"del sys.path[0]; m.{function}()"
    )
    return [sys.executable, "-I", "-S", "-X", "utf8", "-c", code, *arguments]
