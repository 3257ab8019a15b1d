#!/usr/bin/env bash
# Sets up everything that this repository needs and leaves the environment active. To be sourced:
#
#     source scripts/setup.sh        # what training, evaluation and the chat need
#     source scripts/setup.sh dev    # and what the tests need
#
# The active virtual (or named conda) environment is filled, else .venv in the repository, made where missing.
# uv fills it: the one on PATH, else one that pip installs into the environment. uv asks torch's own index for the build
# that fits the hardware (CUDA, ROCm, CPU); where that index does not answer, the package index's own build is taken.
# Indexes, wheel folders and certificates configured for pip or for uv are honoured, and a torch that is already good
# enough is left alone. rustbpe, the tokenizer trainer, is compiled by maturin, which fetches Rust where it is missing.
# A stamp in the environment makes the next call a matter of a moment. Works in bash 3.2, with or without `set -eu`.

setup_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

setup_fail() {
    echo "setup: $*" >&2
    return 1
}

# setup_run COMMAND...: runs it, and where no terminal shows its progress bar says every ten seconds that it goes on.
# The command stays in the foreground, so that Ctrl+C reaches it.
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

# setup_logged LOG COMMAND...: a compiler's output is for a file.
setup_logged() {
    local log="$1"
    shift
    "$@" >"$log" 2>&1
}

setup_python_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# Puts the environment's bin folder first on PATH, after making .venv where no environment is active.
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
        [ -n "$found" ] || { setup_fail "Python 3.10 or newer is needed, install it and run this again"; return 1; }
        echo "setup: making the environment $prefix"
        # A Python without ensurepip (Debian's) cannot put pip there: uv does not need it.
        "$found" -m venv "$prefix" >/dev/null 2>&1 || "$found" -m venv --without-pip "$prefix" ||
            { setup_fail "no virtual environment could be made: install Python's venv (python3-venv)"; return 1; }
    fi
    # Not bin/activate: that one still names the old place after the folder has been moved.
    export PATH="$prefix/bin:$PATH"
    hash -r
    setup_prefix="$prefix"
    setup_python_is_new_enough python ||
        setup_fail "the active environment $prefix has an old Python: activate one with 3.10 or newer, or none"
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
digest = hashlib.sha256(repr((sys.executable, sys.version, torch, spec and spec.origin)).encode())
crate = root / "rustbpe"
files = [root / "pyproject.toml", root / "scripts" / "setup.sh", *crate.glob("Cargo.*"), *crate.glob("src/**/*.rs")]
for path in sorted(files):
    digest.update(path.name.encode() + b"\0" + path.read_bytes())
print(digest.hexdigest())
PY
}

# uv does not read what was configured for pip, in its variables or its files: prints it as exports for uv.
# Whatever is set for uv itself stands. pip's order is kept: variables, then [install], then [global].
setup_pip_settings() {
    python - <<'PY'
import ast, os, shlex, subprocess, sys

found = {}
for python in (sys.executable, getattr(sys, "_base_executable", "")):
    try:
        listing = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True)
    except OSError:
        continue
    if listing.returncode == 0:
        found = dict(line.split("=", 1) for line in listing.stdout.splitlines() if "=" in line)
        break

for name, variable, also in (
    ("index-url", "UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    ("extra-index-url", "UV_EXTRA_INDEX_URL", "UV_INDEX"),
    ("find-links", "UV_FIND_LINKS", ""),
    ("no-index", "UV_NO_INDEX", ""),
    ("trusted-host", "UV_INSECURE_HOST", ""),
    ("cert", "SSL_CERT_FILE", ""),
):
    value = os.environ.get("PIP_" + name.upper().replace("-", "_"), "")
    for key in (f"install.{name}", f"global.{name}"):
        value = value or ast.literal_eval(found.get(key, "''"))
    if value and not os.environ.get(variable) and not os.environ.get(also):
        separator = "," if name == "find-links" else " "
        print(f"export {variable}={shlex.quote(separator.join(value.split()))}")
PY
}

# Fills the environment. Runs in a subshell: the variables set here are nobody else's business.
setup_install() {
    local extra="$1" wanted installed backend="${UV_TORCH_BACKEND:-auto}" reason
    local arguments=(--python "$setup_prefix/bin/python")
    eval "$(setup_pip_settings)"
    case "${UV_NO_INDEX:-}" in 1 | true | yes | on) arguments+=(--no-index) ;; esac

    if ! uv --version >/dev/null 2>&1; then
        echo "setup: no uv on PATH, installing it into the environment"
        python -m pip --version >/dev/null 2>&1 || python -m ensurepip >/dev/null 2>&1 ||
            { setup_fail "neither uv nor pip is here: install uv, or Python's pip (python3-venv)"; return 1; }
        setup_run python -m pip install --disable-pip-version-check uv ||
            { setup_fail "uv could not be installed: check the network or pip's index"; return 1; }
        hash -r
    fi

    wanted="$(sed -n 's/^ *"\(torch>=[0-9.]*\)".*/\1/p' "$setup_root/pyproject.toml")"
    installed="$(python - "${wanted#torch>=}" <<'PY'
import importlib.metadata, re, sys

try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit()
numbers = lambda text: [int(n) for n in re.findall(r"\d+", text)[:2]]
if numbers(version) >= numbers(sys.argv[1]):
    print(version)
PY
)"
    if [ -n "$installed" ]; then
        echo "setup: keeping torch $installed"
        echo "torch==$installed" >"$setup_prefix/nanochat-constraints.txt"
        arguments+=(--constraint "$setup_prefix/nanochat-constraints.txt")
        backend=""
    elif [ -n "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}${UV_NO_INDEX:-}" ] && [ -z "${UV_TORCH_BACKEND:-}" ]; then
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
    set -- "${arguments[@]}" -r "$setup_root/pyproject.toml"
    if [ -n "$extra" ]; then set -- "$@" --extra "$extra"; fi
    setup_run uv pip install "$@" ||
        { setup_fail "the packages could not be installed: the lines above say why, then run this again"; return 1; }

    local log="$setup_prefix/nanochat-rustbpe.log"
    echo "setup: compiling rustbpe, which takes a minute or two"
    if [ -d "$HOME/.cargo/bin" ]; then PATH="$PATH:$HOME/.cargo/bin"; fi
    set -- "${arguments[@]}" --no-deps --reinstall-package nanochat "$setup_root"
    setup_run setup_logged "$log" uv pip install "$@" && return
    if cargo --version >/dev/null 2>&1; then
        tail -n 30 "$log" >&2
        setup_fail "rustbpe did not compile: the lines above, from $log, say why"
    else
        setup_fail "Rust is missing and could not be fetched: install it from https://rustup.rs, run this again ($log)"
    fi
}

# Where the environment forbids Python to keep what it has compiled (containers often do), every stage would spend ten
# seconds on compiling torch's sources anew. They are kept with our other files then, not in the environment.
setup_bytecode() {
    if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
        export PYTHONDONTWRITEBYTECODE=""
        export PYTHONPYCACHEPREFIX="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/pycache"
    fi
}

setup_main() {
    local extra="" key stamp
    if [ "${1:-}" = dev ]; then extra=dev; fi
    setup_activate || return 1
    setup_bytecode
    key="$(setup_key)" || return 1
    for stamp in "$setup_prefix/nanochat-setup-dev" "$setup_prefix/nanochat-setup-$extra"; do
        if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then return 0; fi
    done
    (setup_install "$extra") || return 1
    setup_key >"$setup_prefix/nanochat-setup-$extra" || return 1
    echo "setup: done, the environment is $setup_prefix"
}

setup_main "${1:-}"
