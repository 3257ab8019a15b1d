"""Attempts to leave the sandbox, and a process that makes them as root or as another user.

Each attempt is a program that prints ESCAPED where it gets what it wants. Those marked `shown` do
get it outside of the sandbox, which the tests demand, so that none of them fails for a reason of
its own. The others would harm the machine, or need what it may not have.

    python tests/escapes.py '{"uid": 65534, "without": ["landlock"], ...}'    # see main()
"""
import json
import os
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))   # the driver runs this file as a script

from nanochat import confinement, sandbox  # noqa: E402

Escape = namedtuple("Escape", "name code shown", defaults=(True,))

# The names that the programs find: SECRET, a file; FOLDER, that of SECRET; TCP, UDP, ABSTRACT and
# UNIX, sockets that listen; PARENT, a process; NUMBERS of system calls.
PRELUDE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def kernel(name, *arguments):
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return libc.syscall(NUMBERS[name], *arguments)
def escaped(if_this=True):
    if if_this:
        print("ESCAPED", flush=True)
"""

PR_SET_DUMPABLE = 4
# numbers of calls that the filter does not name: x86_64, aarch64
MORE_NUMBERS = {
    "execveat": (322, 281), "memfd_create": (319, 279), "personality": (135, 92),
    "shmget": (29, 194), "shmctl": (31, 195), "pidfd_open": (434, 434),
    "inotify_init1": (294, 26),
}

ESCAPES = [
    # files
    Escape("read /etc/passwd", "escaped(open('/etc/passwd').read())"),
    Escape("read a file of the user", "escaped(open(SECRET).read())"),
    Escape("read it through a path that climbs", "escaped(open('../' * 40 + SECRET).read())"),
    Escape("read it through a symbolic link", "os.symlink(SECRET, 'a'); escaped(open('a').read())"),
    Escape("read it through a hard link", "os.link(SECRET, 'b'); escaped(open('b').read())"),
    Escape("read it through the C library",
           "f = libc.open(SECRET.encode(), 0); escaped(f >= 0)"),
    Escape("read it by a system call",
           "escaped(kernel('openat', -100, SECRET.encode(), 0) >= 0)"),
    Escape("see the size of a file of the user", "escaped(os.stat(SECRET).st_size)"),
    Escape("list the user's folder", "escaped(os.listdir(FOLDER))"),
    Escape("list the root folder", "escaped(os.listdir('/'))"),
    Escape("list /home", "escaped(os.listdir('/home') is not None)"),
    Escape("write into the user's folder", "open(FOLDER + '/new', 'w').write('x'); escaped()"),
    Escape("change the user's file", "open(SECRET, 'a').write('x'); escaped()"),
    Escape("cut the user's file", "os.truncate(FOLDER + '/victim', 0); escaped()"),
    Escape("rename the user's file",
           "os.rename(FOLDER + '/victim', FOLDER + '/other')\n"
           "os.rename(FOLDER + '/other', FOLDER + '/victim'); escaped()"),
    Escape("change the mode of the user's file", "os.chmod(FOLDER + '/victim', 0o644); escaped()"),
    Escape("change the times of the user's file", "os.utime(FOLDER + '/victim'); escaped()"),
    Escape("write into /tmp",
           "import tempfile; tempfile.TemporaryFile(dir='/tmp').write(b'x'); escaped()"),
    Escape("write into /dev/shm",
           "p = '/dev/shm/nanochat-escape'; open(p, 'w').write('x'); os.unlink(p); escaped()"),
    Escape("open the library to write", "open(os.__file__, 'r+').close(); escaped()"),
    Escape("write beside the library",
           "p = os.path.dirname(os.__file__) + '/nanochat-escape'\n"
           "open(p, 'w').close(); os.unlink(p); escaped()"),
    Escape("make a device",
           "import stat; os.mknod('d', stat.S_IFCHR, os.makedev(1, 3)); escaped()"),
    Escape("fill the disk with 50 MB",
           "f = open('big', 'wb')\nfor _ in range(50): f.write(bytes(1 << 20))\n"
           "f.close(); os.unlink('big'); escaped()"),
    Escape("fill the disk with small files",
           "for i in range(3000): open(f'small{i}', 'w').close()\n"
           "for i in range(3000): os.unlink(f'small{i}')\nescaped()"),
    Escape("open 200 files", "kept = [open('/dev/null') for _ in range(200)]; escaped()"),
    # the parent and other processes
    Escape("read the parent's environment",
           "escaped(open(f'/proc/{os.getppid()}/environ', 'rb').read())"),
    Escape("read the environment of a process", "escaped(open(f'/proc/{PARENT}/environ').read())"),
    Escape("read its own /proc/self/mem", "open('/proc/self/mem', 'r+b').close(); escaped()"),
    Escape("see the root of a process", "escaped(os.listdir(f'/proc/{PARENT}/root'))"),
    Escape("see the number of the parent", "escaped(os.getppid() > 1)"),
    Escape("find a secret in the environment", "escaped(os.environ['NANOCHAT_SECRET'])"),
    Escape("find a file that is open",
           "for fd in range(3, 1000):\n"
           "    try: found = os.pread(fd, 6, 0)\n"
           "    except OSError: continue\n"
           "    escaped(found == b'secret')"),
    Escape("signal the parent", "os.kill(os.getppid(), 0); escaped()"),
    Escape("signal a process", "os.kill(PARENT, 0); escaped()"),
    Escape("signal all processes", "os.kill(-1, 0); escaped()"),
    Escape("signal the group", "os.killpg(os.getpgrp(), 0); escaped()"),
    Escape("hold a process", "escaped(kernel('pidfd_open', PARENT, 0) >= 0)"),
    Escape("read the limits of a process",
           "import resource; resource.prlimit(PARENT, resource.RLIMIT_NOFILE); escaped()"),
    Escape("read the memory of a process",
           "s = ctypes.create_string_buffer(8); v = (ctypes.c_size_t * 2)(ctypes.addressof(s), 8)\n"
           "escaped(kernel('process_vm_readv', os.getpid(), v, 1, v, 1, 0) > 0)"),
    Escape("trace", "escaped(kernel('ptrace', 0, 0, 0, 0) == 0)"),
    Escape("compare processes", "escaped(kernel('kcmp', PARENT, PARENT, 1, 0, 0) >= 0)"),
    Escape("raise its priority", "os.nice(-1); escaped()"),
    Escape("choose its CPU", "os.sched_setaffinity(0, os.sched_getaffinity(0)); escaped()"),
    # the network
    Escape("connect by TCP",
           "import socket; socket.create_connection(('127.0.0.1', TCP), 2); escaped()"),
    Escape("listen by TCP",
           "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); escaped()"),
    Escape("send by UDP",
           "import socket; s = socket.socket(type=socket.SOCK_DGRAM)\n"
           "escaped(s.sendto(b'x', ('127.0.0.1', UDP)))"),
    Escape("connect to a socket in a folder",
           "import socket; socket.socket(socket.AF_UNIX).connect(UNIX); escaped()"),
    Escape("connect to an abstract socket",
           "import socket; socket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT); escaped()"),
    Escape("send to an abstract socket from a pair",
           "import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
           "escaped(a.sendto(b'x', '\\0' + ABSTRACT + '-datagrams'))"),
    Escape("ask the kernel by netlink",
           "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); escaped()"),
    Escape("read packets",
           "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW); escaped()", False),
    # other programs
    Escape("fork", "pid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0); escaped()"),
    Escape("fork by the module posix",
           "import posix; pid = posix.fork()\nif pid == 0: os._exit(0)\nescaped()"),
    Escape("fork by ctypes", "pid = libc.fork()\nif pid == 0: os._exit(0)\nescaped(pid > 0)"),
    Escape("clone",
           "pid = kernel('clone', 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nescaped(pid > 0)"),
    Escape("clone3",
           "a = (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17)\n"
           "pid = kernel('clone3', a, 64)\nif pid == 0: os._exit(0)\nescaped(pid > 0)"),
    Escape("forkpty", "import pty; pid, _ = pty.fork()\nif pid == 0: os._exit(0)\nescaped()"),
    Escape("os.system", "os.system('echo ESCAPED')"),
    Escape("os.popen", "print(os.popen('echo ESCAPED').read())"),
    Escape("system by ctypes", "libc.system(b'echo ESCAPED')"),
    Escape("subprocess", "import subprocess; subprocess.run(['/bin/echo', 'ESCAPED'])"),
    Escape("posix_spawn",
           "pid = os.posix_spawn('/bin/echo', ['echo', 'ESCAPED'], {}); os.waitpid(pid, 0)"),
    Escape("_posixsubprocess",      # in whose place subprocess takes vfork where it can
           "import subprocess; subprocess._USE_POSIX_SPAWN = subprocess._USE_VFORK = False\n"
           "subprocess.Popen(['/bin/echo', 'ESCAPED'], close_fds=True).wait()"),
    Escape("multiprocessing",
           "import multiprocessing as m; c = m.get_context('fork')\n"
           "p = c.Process(target=escaped); p.start(); p.join()"),
    Escape("exec", "os.execv('/bin/echo', ['echo', 'ESCAPED'])"),
    Escape("exec of the interpreter",
           "os.execv(sys.executable, [sys.executable, '-c', 'print(\"ESCAPED\")'])"),
    Escape("exec of memory",
           "fd = kernel('memfd_create', b'x', 0); os.write(fd, open('/bin/echo', 'rb').read())\n"
           "argv = (ctypes.c_char_p * 3)(b'echo', b'ESCAPED', None)\n"
           "kernel('execveat', fd, b'', argv, None, 0x1000)"),
    Escape("memory with a name", "escaped(kernel('memfd_create', b'x', 0) >= 0)"),
    Escape("a fresh copy of a module",
           "import importlib; del sys.modules['os'], sys.modules['posix']\n"
           "importlib.import_module('posix').system('echo ESCAPED')"),
    Escape("leave the session",
           "pid = os.fork()\nif pid == 0: os.setsid(); escaped(); os._exit(0)\nos.waitpid(pid, 0)"),
    Escape("fork bomb",
           "count = 0\nwhile count < 1000:\n"
           "    if os.fork() == 0:\n        import time; time.sleep(5); os._exit(0)\n"
           "    count += 1\nescaped()", False),
    # more than its share
    Escape("take 2 GB of memory", "x = bytearray(2 << 30); escaped()"),
    Escape("start 600 threads",
           "import threading; e = threading.Event()\n"
           "for _ in range(600): threading.Thread(target=e.wait, daemon=True).start()\n"
           "escaped(); os._exit(0)"),
    Escape("lift the limit of memory",
           "import resource; r = resource.RLIM_INFINITY\n"
           "resource.setrlimit(resource.RLIMIT_AS, (r, r)); x = bytearray(2 << 30); escaped()"),
    # the kernel
    Escape("be root", "os.setuid(0); escaped()"),
    Escape("be still root", "escaped(os.getuid() == 0)"),
    Escape("make a user namespace", "escaped(kernel('unshare', 0x10000000) == 0)"),
    Escape("make a mount namespace", "escaped(kernel('unshare', 0x20000) == 0)"),
    Escape("enter a namespace",
           "fd = os.open('/proc/self/ns/net', 0); escaped(kernel('setns', fd, 0) == 0)"),
    Escape("change the root folder", "escaped(kernel('chroot', b'.') == 0)"),
    Escape("mount", "escaped(kernel('mount', b'x', b'.', b'tmpfs', 0, 0) == 0)", False),
    Escape("use io_uring",
           "escaped(kernel('io_uring_setup', 1, ctypes.create_string_buffer(200)) >= 0)"),
    Escape("load a BPF map",
           "a = (ctypes.c_uint32 * 16)(2, 4, 4, 1); escaped(kernel('bpf', 0, a, 64) >= 0)"),
    Escape("use userfaultfd", "escaped(kernel('userfaultfd', 1) >= 0)"),
    Escape("measure by perf",
           "a = ctypes.create_string_buffer(b'\\1\\0\\0\\0\\x70\\0\\0\\0', 128)\n"
           "escaped(kernel('perf_event_open', a, 0, -1, -1, 0) >= 0)"),
    Escape("read a key", "escaped(kernel('keyctl', 0, -2, 1, 0, 0) > 0)"),
    Escape("add a key", "escaped(kernel('add_key', b'user', b'x', b'y', 1, -2) > 0)"),
    Escape("share memory",
           "i = kernel('shmget', 0, 4096, 0o600); kernel('shmctl', i, 0, 0); escaped(i >= 0)"),
    Escape("change its personality", "escaped(kernel('personality', 0x0040000) >= 0)"),
    Escape("watch files", "escaped(kernel('inotify_init1', 0) >= 0)"),
    Escape("type on a terminal",
           "import fcntl, pty, termios; _, fd = pty.openpty()\n"
           "fcntl.ioctl(fd, termios.TIOCSTI, b'x'); escaped()"),
    # the machine code of int 0x80 with the number of i386's getpid
    Escape("make a call of another architecture",
           "import mmap; m = mmap.mmap(-1, 4096, prot=7)\n"
           "m.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\n"
           "f = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
           "escaped(f() > 0)", os.uname().machine == "x86_64"),
    Escape("make a call of x32", "libc.syscall(0x40000000 | 39); escaped()"),
]


def program(escape, context):
    """The attempt as a program. context: the values of the names in the comment at PRELUDE."""
    column = confinement.MACHINES.index(os.uname().machine)
    both = {**confinement.SYSCALLS, **MORE_NUMBERS}
    numbers = {name: pair[column] for name, pair in both.items()}
    names = {**context, "NUMBERS": numbers}
    head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return head + PRELUDE + escape.code


def attempt(names, context):
    """{name: [whether it escaped, status, limit, standard error]} in the sandbox."""
    chosen = [escape for escape in ESCAPES if escape.name in names]
    jobs = [
        partial(sandbox.run, program(escape, context), seconds=5, wall_seconds=30)
        for escape in chosen
    ]
    results = sandbox.run_many(jobs, 2)
    return {
        escape.name: [
            b"ESCAPED" in result.stdout,
            result.status,
            result.limit,
            result.stderr.decode("utf-8", "replace")[-300:],
        ]
        for escape, result in zip(chosen, results)
    }


# ------------------------------------------------------------------------------------------------
# as another user


def show_to_all(path):
    """Make a folder visible to every user, in the mount namespace of this process alone.

    A Python in /root, as pyenv has it, cannot be started by another user.
    """
    parents = [parent for parent in reversed(path.parents) if not parent.stat().st_mode & 1]
    if not parents:
        return
    call = confinement.call
    source = os.open(path, os.O_PATH)
    call("mount", b"tmpfs", str(parents[0]).encode(), b"tmpfs", 0, b"mode=755")
    path.mkdir(parents=True)
    flags = confinement.MS_BIND | confinement.MS_REC
    call("mount", f"/proc/self/fd/{source}".encode(), str(path).encode(), None, flags, None)
    os.close(source)


def become(uid):
    """Become a user who can start this Python. Only root can do this."""
    call = confinement.call
    call("unshare", confinement.CLONE_NEWNS)
    call("mount", b"none", b"/", None, confinement.MS_REC | confinement.MS_PRIVATE, None)
    for path in (Path(sys.base_prefix), ROOT):
        show_to_all(path)
    sys.executable = os.path.realpath(sys._base_executable)
    os.chdir("/")
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # as the processes of a user are


def main():
    """Make attempts in the sandbox, and print what attempt() returns as JSON.

    The argument is JSON: uid, to become first, or None; without, layers to pretend that the system
    lacks; names and context, as of attempt().
    """
    job = json.loads(sys.argv[1])
    if job["uid"] is not None:
        become(job["uid"])
    without = job["without"]
    if without:
        real_layers = sandbox.layers_here()
        sandbox.layers_here = lambda allowed: [n for n in real_layers if n not in without]
    print(json.dumps(attempt(job["names"], job["context"])))


if __name__ == "__main__":
    main()
