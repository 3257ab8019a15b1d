#!/usr/bin/env bash
# Sets up everything that this repository needs and leaves the environment active. To be sourced:
#
#     source scripts/setup.sh        # what training, evaluation and the chat need
#     source scripts/setup.sh dev    # and what the tests need
#
# 1. The environment: the active virtual (or named conda) one, else .venv in the repository, made
#    where it is missing.
# 2. uv, which installs the rest: the one on PATH, else one that pip installs into the environment.
# 3. torch: the build for this hardware (CUDA, ROCm, CPU) from torch's own index, or the package
#    index's build where that does not answer. A torch that is new enough is left alone.
# 4. The packages that pyproject.toml names, with those for the report's plots.
# 5. rustbpe, the tokenizer trainer: compiled by maturin, which fetches Rust where it is missing.
#    A C compiler, with which Rust links, must be there.
# 6. The repository's folder is put on the environment's path: `import nanochat` works anywhere.
#
# Indexes, wheel folders and certificates configured for pip or for uv are honoured. A stamp in the
# environment makes the next call a matter of a moment. Works in bash 3.2, with and without
# `set -eu`.

setup_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

setup_fail() {
    echo "setup: $*" >&2
    return 1
}

# setup_run COMMAND...: runs the command. Where no terminal shows a progress bar, a line every ten
# seconds says that the command is still running. It stays in the foreground: Ctrl+C reaches it.
setup_run() {
    if [ -t 2 ] && [ "$1" != setup_logged ]; then
        "$@"
        return
    fi
    (
        waited=0
        while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
            waited=$((waited + 10))
            echo "setup:   ... $waited s"
        done
    ) &
    local heartbeat=$! result=0
    "$@" || result=$?
    kill "$heartbeat" 2>/dev/null
    wait "$heartbeat" 2>/dev/null || true
    return "$result"
}

# setup_logged LOG COMMAND...: runs the command with its output in a file, as for a compiler.
setup_logged() {
    local log="$1"
    shift
    "$@" >"$log" 2>&1
}

setup_python_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# Puts the environment's bin folder first on PATH. Makes .venv where no environment is active.
setup_activate() {
    local prefix="${VIRTUAL_ENV:-}" candidate found=""
    if [ -z "$prefix" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        prefix="${CONDA_PREFIX:-}"
    fi
    if [ ! -x "$prefix/bin/python" ]; then
        prefix="$setup_root/.venv"
        export VIRTUAL_ENV="$prefix"
    fi
    if ! "$prefix/bin/python" -c '' 2>/dev/null; then
        for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
            if setup_python_is_new_enough "$candidate"; then
                found="$candidate"
                break
            fi
        done
        if [ -z "$found" ]; then
            setup_fail "Python 3.10 or newer is needed, install it and run this again"
            return 1
        fi
        echo "setup: making the environment $prefix"
        # A Python without ensurepip (Debian's) cannot put pip there: uv does not need it.
        if ! "$found" -m venv "$prefix" >/dev/null 2>&1 &&
            ! "$found" -m venv --without-pip "$prefix"; then
            setup_fail "no virtual environment could be made: install Python's venv (python3-venv)"
            return 1
        fi
    fi
    # Not bin/activate: that one still names the old place after the folder has been moved.
    export PATH="$prefix/bin:$PATH"
    hash -r
    setup_prefix="$prefix"
    setup_python_is_new_enough python ||
        setup_fail "the active environment $prefix has an old Python:" \
            "activate one with 3.10 or newer, or none"
}

# A hash of all that the environment was made from, and of what it must still hold.
setup_key() {
    python - "$setup_root" <<'PY'
import hashlib, importlib.metadata, importlib.util, pathlib, sys

root = pathlib.Path(sys.argv[1])
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    torch = "no torch"
spec = importlib.util.find_spec("rustbpe")
environment = (sys.executable, sys.version, torch, spec and spec.origin)
digest = hashlib.sha256(repr(environment).encode())
crate = root / "rustbpe"
files = [root / "pyproject.toml", root / "scripts" / "setup.sh"]
files += [*crate.glob("Cargo.*"), *crate.glob("src/**/*.rs")]
for path in sorted(files):
    digest.update(path.name.encode() + b"\0" + path.read_bytes())
print(digest.hexdigest())
PY
}

# uv does not read what was configured for pip, in variables or files: prints it as exports for uv.
# Whatever is set for uv itself stands. pip's order is kept: variables, [install], [global].
setup_pip_settings() {
    python - <<'PY'
import ast, os, shlex, subprocess, sys

# pip's setting, uv's variable, and another variable of uv that would say the same
SETTINGS = [
    ("index-url", "UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    ("extra-index-url", "UV_EXTRA_INDEX_URL", "UV_INDEX"),
    ("find-links", "UV_FIND_LINKS", ""),
    ("no-index", "UV_NO_INDEX", ""),
    ("trusted-host", "UV_INSECURE_HOST", ""),
    ("cert", "SSL_CERT_FILE", ""),
]


def pip_config():
    """{"global.index-url": "'https://...'"} of the environment's pip, else of the base Python's."""
    for python in (sys.executable, getattr(sys, "_base_executable", "")):
        command = [python, "-m", "pip", "config", "list"]
        try:
            listing = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            continue
        if listing.returncode == 0:
            return dict(line.split("=", 1) for line in listing.stdout.splitlines() if "=" in line)
    return {}


config = pip_config()
for name, variable, also in SETTINGS:
    value = os.environ.get("PIP_" + name.upper().replace("-", "_"), "")
    for key in (f"install.{name}", f"global.{name}"):
        value = value or ast.literal_eval(config.get(key, "''"))
    if value and not os.environ.get(variable) and not os.environ.get(also):
        separator = "," if name == "find-links" else " "
        print(f"export {variable}={shlex.quote(separator.join(value.split()))}")
PY
}

# Puts uv on PATH.
setup_uv() {
    if uv --version >/dev/null 2>&1; then return 0; fi
    echo "setup: no uv on PATH, installing it into the environment"
    if ! python -m pip --version >/dev/null 2>&1 && ! python -m ensurepip >/dev/null 2>&1; then
        setup_fail "neither uv nor pip is here: install uv, or Python's pip (python3-venv)"
        return 1
    fi
    if ! setup_run python -m pip install --disable-pip-version-check uv; then
        setup_fail "uv could not be installed: check the network or pip's index"
        return 1
    fi
    hash -r
}

# setup_installed_torch VERSION: prints the installed torch's version, if it is at least VERSION.
setup_installed_torch() {
    python - "$1" <<'PY'
import importlib.metadata, re, sys

try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit()
numbers = lambda text: [int(n) for n in re.findall(r"\d+", text)[:2]]
if numbers(version) >= numbers(sys.argv[1]):
    print(version)
PY
}

# Without a C compiler Rust would fail minutes from now, with a message that blames Rust.
setup_c_compiler() {
    if command -v cc >/dev/null 2>&1; then return 0; fi
    setup_fail "there is no C compiler (cc), which Rust needs to link rustbpe: install one" \
        "(Debian, Ubuntu: apt-get install build-essential; Fedora: dnf install gcc;" \
        "macOS: xcode-select --install), run this again"
}

# Fills the environment. Runs in a subshell: the variables set here are nobody else's business.
setup_install() {
    local extra="$1" wanted installed backend="${UV_TORCH_BACKEND:-auto}" reason
    local arguments=(--python "$setup_prefix/bin/python")
    setup_c_compiler || return 1
    eval "$(setup_pip_settings)"
    case "${UV_NO_INDEX:-}" in 1 | true | yes | on) arguments+=(--no-index) ;; esac
    setup_uv || return 1

    wanted="$(sed -n 's/^ *"\(torch>=[0-9.]*\)".*/\1/p' "$setup_root/pyproject.toml")"
    installed="$(setup_installed_torch "${wanted#torch>=}")"
    if [ -n "$installed" ]; then
        echo "setup: keeping torch $installed"
        echo "torch==$installed" >"$setup_prefix/nanochat-constraints.txt"
        arguments+=(--constraint "$setup_prefix/nanochat-constraints.txt")
        backend=""
    elif [ -z "${UV_TORCH_BACKEND:-}" ] &&
        [ -n "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}${UV_NO_INDEX:-}" ]; then
        backend=""    # an index of the user's own choice is where torch comes from, too
    else
        echo "setup: asking torch's index for a build for this hardware"
        reason="$(UV_HTTP_TIMEOUT=15 UV_HTTP_RETRIES=1 uv pip install "${arguments[@]}" \
            --dry-run --no-deps "--torch-backend=$backend" "$wanted" 2>&1)" || {
            reason="$(echo "$reason" | sed '/^ *$/d' | tail -n 1 | sed 's/^ *//')"
            echo "setup: taking torch from the package index, since torch's own gave none ($reason)"
            backend=""
        }
    fi
    unset UV_TORCH_BACKEND
    if [ -n "$backend" ]; then arguments+=("--torch-backend=$backend"); fi

    echo "setup: installing the packages that pyproject.toml names"
    set -- "${arguments[@]}" -r "$setup_root/pyproject.toml" --extra plots
    if [ -n "$extra" ]; then set -- "$@" --extra "$extra"; fi
    if ! setup_run uv pip install "$@"; then
        setup_fail "the packages could not be installed: the lines above say why," \
            "then run this again"
        return 1
    fi
    setup_rustbpe "${arguments[@]}"
}

# setup_rustbpe ARGUMENT...: compiles rustbpe with `uv pip install ARGUMENT...`.
setup_rustbpe() {
    local log="$setup_prefix/nanochat-rustbpe.log"
    echo "setup: compiling rustbpe, which takes a minute or two"
    if [ -d "${HOME:-}/.cargo/bin" ]; then PATH="$PATH:${HOME:-}/.cargo/bin"; fi
    set -- "$@" --no-deps --reinstall-package nanochat "$setup_root"
    if setup_run setup_logged "$log" uv pip install "$@"; then return 0; fi
    if cargo --version >/dev/null 2>&1; then
        tail -n 30 "$log" >&2
        setup_fail "rustbpe did not compile: the lines above, from $log, say why"
    else
        setup_fail "Rust is missing and could not be fetched:" \
            "install it from https://rustup.rs, run this again ($log)"
    fi
}

# Where the environment forbids Python to keep what it has compiled (containers often do), every
# stage would compile torch's sources again, which takes ten seconds. The compiled files are kept
# with our other files then, not in the environment. Python says where those are, so that ~ and
# relative folders mean the same everywhere; where there is no such folder, nothing is kept.
setup_bytecode() {
    local base
    if [ -z "${PYTHONDONTWRITEBYTECODE:-}" ]; then return 0; fi
    base="$(PYTHONPATH="$setup_root" python -c \
        'from nanochat.common import get_base_dir; print(get_base_dir())' 2>/dev/null)" || return 0
    export PYTHONDONTWRITEBYTECODE="" PYTHONPYCACHEPREFIX="$base/pycache"
}

# The environment's Python finds this repository from any folder, behind all that is installed. An
# environment that two clones share has the one that was set up last, except within their folders.
setup_path() {
    local site
    for site in "$setup_prefix"/lib/python3*/site-packages; do
        if [ "$(cat "$site/nanochat.pth" 2>/dev/null)" != "$setup_root" ]; then
            echo "$setup_root" 2>/dev/null >"$site/nanochat.pth" ||
                echo "setup: $site cannot be written: import nanochat works in $setup_root alone"
        fi
    done
}

setup_main() {
    local extra="" key stamp
    if [ "${1:-}" = dev ]; then extra=dev; fi
    setup_activate || return 1
    setup_bytecode
    setup_path
    key="$(setup_key)" || return 1
    for stamp in "$setup_prefix/nanochat-setup-dev" "$setup_prefix/nanochat-setup-$extra"; do
        if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then return 0; fi
    done
    (setup_install "$extra") || return 1
    setup_key >"$setup_prefix/nanochat-setup-$extra" || return 1
    echo "setup: done, the environment is $setup_prefix"
}

setup_main "${1:-}"
