"""The layers of confinement by themselves: the filter of system calls, which a machine of our own
executes, the rules for old kernels, and what a system without layers says.

docs/traps.md: sandbox-by-name
"""
import errno
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import confinement
from nanochat.common import UserError
from nanochat.confinement import (
    ALLOW,
    ALLOWED,
    AUDIT_ARCH,
    CONDITIONAL,
    CONFINING,
    FAIL,
    KILL,
    KILLED,
    LAYERS,
    MACHINES,
    MISSING,
    SYSCALLS,
    command,
    missing_layers,
    seccomp_filter,
)

PID = 4242
REFUSE = FAIL | errno.EPERM
confined = pytest.mark.skipif(bool(missing_layers()), reason="this system lacks layers")
linux = pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")


# ------------------------------------------------------------------------------------------------
# the filter


def decide(program, machine, number, arguments=()):
    """What a filter returns for a call: classic BPF, as include/uapi/linux/bpf_common.h has it."""
    numbers = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=iIQ6Q", number, machine, 0, *(n & (1 << 64) - 1 for n in numbers))
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator = place = 0
    while True:
        operation, if_true, if_false, value = instructions[place]
        place += 1
        if operation == 0x20:       # load a word of the data
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif operation == 0x15:     # jump if equal
            place += if_true if accumulator == value else if_false
        elif operation == 0x45:     # jump if any bit is set
            place += if_true if accumulator & value else if_false
        elif operation == 0x54:     # and
            accumulator &= value
        elif operation == 0x06:     # return
            return value
        else:
            raise AssertionError(f"operation {operation:#x} is none that the filter uses")


@pytest.fixture(params=MACHINES)
def ask(request):
    """A function of a call's name and arguments: what the filter of a machine returns."""
    machine = request.param
    program = seccomp_filter(machine, PID)

    def decision(name, *arguments):
        number = SYSCALLS[name][MACHINES.index(machine)]
        return None if number is None else decide(program, AUDIT_ARCH[machine], number, arguments)

    decision.program = program
    decision.machine = machine
    return decision


def test_each_call_has_the_decision_of_its_table(ask):
    assert {ask(name) for name in ALLOWED} - {None} == {ALLOW}
    assert {ask(name) for name in KILLED} - {None} == {KILL}
    assert {ask(name) for name in CONFINING} == {REFUSE}
    assert {ask(name) for name in MISSING} == {FAIL | errno.ENOSYS}
    tables = (ALLOWED, CONDITIONAL, MISSING, CONFINING, KILLED)
    assert len(SYSCALLS) == sum(len(table) for table in tables), "a name is in two tables"


def test_what_is_in_no_table_is_refused(ask):
    arch = AUDIT_ARCH[ask.machine]
    column = MACHINES.index(ask.machine)
    listed = {pair[column] for pair in SYSCALLS.values()}
    others = [number for number in range(600) if number not in listed]
    assert len(others) > 300
    assert {decide(ask.program, arch, number) for number in others} == {REFUSE}


def test_a_call_of_another_architecture_is_killed(ask):
    for number in range(500):
        for arch in (0x40000003, 0x40000028, 0xC000003F, 0, *AUDIT_ARCH.values()):  # i386, arm, ...
            if arch != AUDIT_ARCH[ask.machine]:
                assert decide(ask.program, arch, number) == KILL


def test_a_call_of_x32_is_killed():
    program = seccomp_filter("x86_64", PID)
    decisions = {decide(program, AUDIT_ARCH["x86_64"], 0x40000000 | n) for n in range(600)}
    assert decisions == {KILL}


THREAD = 0x3D0F00       # the flags with which glibc and musl make a thread, up to some


@pytest.mark.parametrize("name, arguments, is_allowed", [
    ("clone", [THREAD], True),
    ("clone", [17], False),                     # fork, SIGCHLD
    ("clone", [0x4111], False),                 # vfork
    ("clone", [THREAD | 0x10000000], False),    # a thread in a user namespace
    ("clone", [THREAD | 0x20000], False),       # a thread in a mount namespace
    ("clone", [0], False),
    ("ioctl", [0, 0x5401], True),
    ("ioctl", [0, 0x5412], False),              # TIOCSTI
    ("ioctl", [0, 0x541C], False),              # TIOCLINUX
    ("ioctl", [0, 0xFFFFFFFF00005412], False),
    ("prctl", [15], True),
    ("prctl", [38], False),
    ("prctl", [1], False),
    ("kill", [PID], True),
    ("kill", [PID + 1], False),
    ("kill", [1], False),
    ("kill", [0], False),                       # the group
    ("kill", [-1], False),                      # all
    ("kill", [-PID], False),
    ("tgkill", [PID, 5, 6], True),
    ("tgkill", [1, 1, 9], False),
    ("prlimit64", [0], True),
    ("prlimit64", [PID], True),
    ("prlimit64", [1], False),
    ("socketpair", [1, 1], True),
    ("socketpair", [1, 1 | 0o2000000 | 0o4000], True),  # close-on-exec, non-blocking
    ("socketpair", [1, 2], False),
    ("socketpair", [1, 5], False),
])
def test_a_call_is_allowed_by_its_arguments(ask, name, arguments, is_allowed):
    assert ask(name, *arguments) == (ALLOW if is_allowed else REFUSE)


def header_numbers(path, pattern):
    """{name: number} of the system calls in a header of the kernel."""
    found = re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: int(number) for name, number in found}


HEADERS = [
    (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"^#define __NR_(\w+)\s+(\d+)"),
    (1, "/usr/include/asm-generic/unistd.h", r"^#define __NR(?:3264)?_(\w+)\s+(\d+)"),
]


@pytest.mark.parametrize("column, header, pattern", HEADERS)
def test_the_numbers_are_those_of_the_kernels_headers(column, header, pattern):
    path = Path(header)
    if not path.exists():
        pytest.skip(f"{path} is not installed")
    official = header_numbers(path, pattern)
    if "fstatat" in official:   # the generic header's name
        official["newfstatat"] = official["fstatat"]
    ours = {name: pair[column] for name, pair in SYSCALLS.items()}
    assert len(ours.keys() & official.keys()) > 120
    wrong = {
        name: (number, official.get(name))
        for name, number in ours.items()
        if number != official.get(name)
    }
    assert wrong == {}


# ------------------------------------------------------------------------------------------------
# Landlock on other kernels


@pytest.mark.parametrize("abi, length, rights, scopes", [
    (1, 8, (1 << 13) - 1, None),
    (2, 8, (1 << 14) - 1, None),
    (3, 8, (1 << 15) - 1, None),
    (4, 16, (1 << 15) - 1, None),
    (5, 16, (1 << 16) - 1, None),
    (6, 24, (1 << 16) - 1, 3),
    (9, 24, (1 << 16) - 1, 3),
])
@linux
def test_landlock_asks_an_old_kernel_for_what_it_has(monkeypatch, abi, length, rights, scopes):
    calls = []

    def system_call(name, *arguments):
        calls.append((name, *arguments))
        return os.open("/dev/null", os.O_RDONLY)

    monkeypatch.setattr(confinement, "landlock_abi", lambda: abi)
    monkeypatch.setattr(confinement, "system_call", system_call)
    confinement.apply_landlock(["/usr"], "/tmp")
    (_, attributes, size, flags), *rules, (last, ruleset, _) = calls
    assert (len(attributes), size, flags, last) == (length, length, 0, "landlock_restrict_self")
    fields = struct.unpack(f"{length // 8}Q", attributes)
    assert fields[0] == rights
    assert fields[1:2] == ((3,) if abi >= 4 else ())
    assert fields[2:] == ((scopes,) if scopes else ())
    granted = [struct.unpack("=Qi", rule[3])[0] for rule in rules]
    assert granted[0] == 0b1100 and all(right & ~rights == 0 for right in granted)
    assert not any(right & 1 for right in granted), "nothing may be executed"


# ------------------------------------------------------------------------------------------------
# limits and missing layers


@linux
def test_a_lower_hard_limit_stands():
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 30))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 1000))\n"
        "from nanochat.confinement import limit_resources\n"
        "limit_resources(7, 300)\n"
        "print([resource.getrlimit(getattr(resource, 'RLIMIT_' + name)) for name in\n"
        "       ('NOFILE', 'FSIZE', 'CPU', 'AS', 'CORE')])\n"
    )
    root = Path(confinement.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert json.loads(done.stdout.replace("(", "[").replace(")", "]")) == [
        [30, 30], [1000, 1000], [7, 8], [300 << 20, 300 << 20], [0, 0]], done.stderr


def test_another_system_has_limits_alone(monkeypatch):
    from nanochat import sandbox
    monkeypatch.setattr(sys, "platform", "darwin")
    missing = missing_layers.__wrapped__()
    assert set(missing) == set(LAYERS) - {"limits"}
    monkeypatch.setattr(sandbox, "missing_layers", lambda: missing)
    with pytest.raises(UserError, match="--allow_missing=namespaces,unprivileged_user,no_new_pr"):
        sandbox.run("print(1)")


def test_a_probe_that_fails_finds_no_layer(monkeypatch):
    code = [sys.executable, "-c", "raise OSError('no such thing')"]
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(confinement, "command", lambda *words: code)
    assert missing_layers.__wrapped__() == dict.fromkeys(LAYERS, "OSError: no such thing")


REFUSE_SOME = """
import ctypes, errno, os, sys
sys.path.insert(0, os.getcwd())
from nanochat import confinement as c
column = c.MACHINES.index(os.uname().machine)
refusal = c._instruction(c.RETURN, c.FAIL | errno.EPERM)
program = c._instruction(c.LD_WORD, c.NUMBER_OFFSET)
for name in sys.argv[1:]:
    program += c._for_call(c.SYSCALLS[name][column], refusal)
program += c._instruction(c.RETURN, c.ALLOW)
c.set_no_new_privs()
pointer = ctypes.byref(c._FilterProgram(len(program) // 8, program))
c.call("prctl", c.PR_SET_SECCOMP, c.SECCOMP_MODE_FILTER, pointer, 0, 0)
c.probe()
"""


def probe_where_the_kernel_refuses(*names):
    """What the probe finds where system calls are refused, as docker refuses unshare."""
    root = Path(confinement.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", REFUSE_SOME, *names], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@confined
def test_a_layer_that_the_kernel_refuses_is_missing_by_its_name():
    assert probe_where_the_kernel_refuses() == {}
    missing = probe_where_the_kernel_refuses("landlock_create_ruleset")
    assert missing == {
        "landlock": "landlock: [Errno 1] Operation not permitted: 'landlock_create_ruleset'"}


@confined
def test_where_namespaces_are_refused_the_other_layers_are_there():
    missing = probe_where_the_kernel_refuses("unshare")
    assert missing["namespaces"] == "namespaces: [Errno 1] Operation not permitted: 'unshare'"
    # where root's Python is in a folder that others cannot enter, root cannot become another user
    assert missing.keys() <= {"namespaces", "unprivileged_user"}


@linux
def test_the_bare_interpreter_has_neither_packages_nor_the_repository_in_its_path():
    show = "sys.stdout.write(repr([sys.path, sys.flags.isolated]))\n#"     # the rest is a comment
    words = command("nanochat.sandbox_runner", show)
    done = subprocess.run(words, capture_output=True, text=True, env={}, cwd="/")
    root = str(Path(confinement.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert root not in done.stdout and "site-packages" not in done.stdout
    assert done.stdout.endswith(", 1]")
