"""scripts/setup.sh against a uv and a pip that only write down what they were asked.

Nothing is downloaded here.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "dirname", "env", "kill", "mkdir", "sed", "sleep", "tail")

# Logs its arguments and the variables meant for it; "installs" by making the folders by which a
# package is found.
FAKE_UV = r"""#!/usr/bin/env bash
[ "$1" = --version ] && { echo "uv 9.9"; exit; }
{ echo "ARGS $*"; env | grep -E '^(UV_|SSL_CERT_FILE)'; } >>"$FAKE_LOG"
site="$(echo "$VIRTUAL_ENV"/lib/python*/site-packages)"
case "$*" in
    *--dry-run*) [ -z "$FAKE_NO_TORCH_INDEX" ] || { echo "  cause: dns error" >&2; exit 1; } ;;
    *" -r "*) torch="$site/torch-2.99.0.dist-info"
              mkdir -p "$torch"
              printf 'Metadata-Version: 2.1\nName: torch\nVersion: 2.99.0\n' >"$torch/METADATA" ;;
    *) [ -z "$FAKE_NO_RUST" ] || { echo "error: no cargo" >&2; exit 1; }
       mkdir -p "$site/rustbpe"; : >"$site/rustbpe/__init__.py" ;;
esac
"""


class Sandbox:
    """A copy of what the set-up reads, an empty environment, a PATH of fakes and basic tools."""

    def __init__(self, folder):
        self.folder, self.repository, self.log = folder, folder / "repo", folder / "uv.log"
        (self.repository / "scripts").mkdir(parents=True)
        (self.repository / "rustbpe" / "src").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "setup.sh", self.repository / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.repository)
        self.source = self.repository / "rustbpe" / "src" / "lib.rs"
        self.source.write_text("// version 1", encoding="utf-8")
        self.bin, self.fakes = folder / "bin", folder / "fakes"
        self.bin.mkdir()
        self.fakes.mkdir()
        for tool in (*TOOLS, "grep"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        # No symlink: Python would take its folder for its home.
        python = f'#!/bin/sh\nexec "{sys._base_executable}" "$@"\n'
        self.tool(self.bin / "python3", python)
        self.uv = self.tool(self.fakes / "uv", FAKE_UV)
        self.cc = self.tool(self.fakes / "cc", "#!/bin/sh\n")
        self.environment = folder / "env"
        venv = [sys._base_executable, "-m", "venv", "--without-pip", str(self.environment)]
        subprocess.run(venv, check=True)
        self.site = next(self.environment.glob("lib/python*/site-packages"))

    def tool(self, path, text):
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        return path

    def torch(self, version):
        """As if that torch had been installed before."""
        folder = self.site / "torch-2.99.0.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        (folder / "METADATA").write_text(metadata, encoding="utf-8")

    def run(self, argument="", then="", active=True, **variables):
        """Source the set-up as a careful caller does.

        Returns the finished process, with `.asked`: uv's log, and `.calls`: its lines of arguments.
        """
        self.log.write_text("", encoding="utf-8")
        environment = {
            "PATH": f"{self.fakes}:{self.bin}",
            "HOME": str(self.folder),
            "FAKE_LOG": str(self.log),
            "PIP_CONFIG_FILE": os.devnull,
            **variables,
        }
        if active:
            environment["VIRTUAL_ENV"] = str(self.environment)
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail; source scripts/setup.sh {argument}; {then}"],
            cwd=self.repository,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        done.asked = self.log.read_text(encoding="utf-8")
        done.calls = [line for line in done.asked.splitlines() if line.startswith("ARGS")]
        return done


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def test_fresh_environment_takes_torch_for_the_hardware(sandbox):
    done = sandbox.run(then="command -v python")
    assert done.returncode == 0, done.stderr
    probe, packages, crate = done.calls
    assert "--dry-run" in probe and "torch>=" in probe
    assert "--torch-backend=auto" in packages and "pyproject.toml" in packages
    assert packages.count("--extra") == packages.count("--extra plots") == 1
    assert "--no-deps" in crate and crate.endswith(str(sandbox.repository))
    # The environment is left active.
    assert done.stdout.splitlines()[-1] == f"{sandbox.environment}/bin/python"


def test_second_run_asks_nobody(sandbox):
    assert sandbox.run().calls
    again = sandbox.run()
    assert again.returncode == 0 and again.calls == [] and again.stdout == ""


def test_the_repository_is_imported_from_any_folder(sandbox):
    package = sandbox.repository / "nanochat"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    command = [f"{sandbox.environment}/bin/python", "-c", "import nanochat; print(nanochat)"]
    assert subprocess.run(command, cwd="/", capture_output=True).returncode == 1
    sandbox.run()
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert str(package) in done.stdout, done.stderr
    moved = sandbox.repository.rename(sandbox.folder / "moved")
    sandbox.repository = moved
    assert sandbox.run().calls == [], "what is installed is as it was"
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert str(moved) in done.stdout, done.stderr


def test_changed_rust_source_or_torch_is_noticed(sandbox):
    sandbox.run()
    sandbox.source.write_text("// version 2", encoding="utf-8")
    assert sandbox.run().calls
    assert sandbox.run().calls == []
    shutil.rmtree(sandbox.site / "torch-2.99.0.dist-info")
    assert sandbox.run().calls


def test_dev_includes_plain_but_not_the_other_way_round(sandbox):
    sandbox.run()
    dev = sandbox.run("dev")
    assert any("--extra plots --extra dev" in call for call in dev.calls)
    assert sandbox.run().calls == [] and sandbox.run("dev").calls == []


def test_torch_index_that_does_not_answer_costs_one_line(sandbox):
    done = sandbox.run(FAKE_NO_TORCH_INDEX="1")
    assert done.returncode == 0
    _, packages, _ = done.calls
    assert "--torch-backend" not in packages
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "dns error" in line]
    assert "package index" in line


def test_good_enough_torch_is_never_replaced(sandbox):
    sandbox.torch("2.12.0a0+rocm7.nightly")
    done = sandbox.run(UV_TORCH_BACKEND="auto")
    packages, _ = done.calls
    constraints = (sandbox.environment / "nanochat-constraints.txt").read_text(encoding="utf-8")
    assert "--constraint" in packages and constraints == "torch==2.12.0a0+rocm7.nightly\n"
    assert "--torch-backend" not in packages and "UV_TORCH_BACKEND" not in done.asked


def test_old_torch_is_replaced(sandbox):
    sandbox.torch("2.9.1")
    assert any("--torch-backend=auto" in call for call in sandbox.run().calls)


def test_pips_variables_reach_uv(sandbox):
    done = sandbox.run(
        PIP_INDEX_URL="http://localhost:1/simple",
        PIP_FIND_LINKS="/wheels /more",
        PIP_TRUSTED_HOST="localhost",
        PIP_EXTRA_INDEX_URL="http://localhost:2/simple",
        PIP_CERT="/ca.pem",
    )
    assert done.returncode == 0, done.stderr
    for line in (
        "UV_DEFAULT_INDEX=http://localhost:1/simple",
        "UV_FIND_LINKS=/wheels,/more",
        "UV_INSECURE_HOST=localhost",
        "UV_EXTRA_INDEX_URL=http://localhost:2/simple",
        "SSL_CERT_FILE=/ca.pem",
    ):
        assert done.asked.splitlines().count(line) == len(done.calls), line
    assert "--torch-backend" not in done.asked, "torch is from the index of the user's choice, too"


def test_uvs_own_variables_stand(sandbox):
    done = sandbox.run(
        PIP_INDEX_URL="http://localhost:1",
        UV_INDEX_URL="http://localhost:3",
        PIP_FIND_LINKS="/pip",
        UV_FIND_LINKS="/uv",
        then="echo index=${UV_DEFAULT_INDEX:-unset}",
    )
    assert "UV_INDEX_URL=http://localhost:3" in done.asked and "UV_DEFAULT_INDEX" not in done.asked
    assert "UV_FIND_LINKS=/uv\n" in done.asked
    assert "index=unset" in done.stdout, "nothing leaks into the caller"


def test_pips_configuration_file_reaches_uv(sandbox, tmp_path):
    version = subprocess.run([sys._base_executable, "-m", "pip", "--version"], capture_output=True)
    if version.returncode != 0:
        pytest.skip("this Python has no pip to read its configuration")
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = http://localhost:4/it's\nno-index = true\n"
        "find-links =\n    /a\n    /b\n",
        encoding="utf-8",
    )
    done = sandbox.run(PIP_CONFIG_FILE=str(config))
    assert "UV_DEFAULT_INDEX=http://localhost:4/it's\n" in done.asked
    assert "UV_FIND_LINKS=/a,/b\n" in done.asked
    assert all("--no-index" in call for call in done.calls)


def test_missing_uv_is_installed_by_pip(sandbox):
    moved = sandbox.folder / "uv-for-later"
    sandbox.uv.rename(moved)
    fake_pip = sandbox.site / "pip"
    fake_pip.mkdir()
    (fake_pip / "__init__.py").write_text("", encoding="utf-8")
    (fake_pip / "__main__.py").write_text(
        "import os, shutil, sys\n"
        "if sys.argv[1] == 'install' and sys.argv[-1] == 'uv':\n"
        f"    shutil.copy({str(moved)!r}, os.path.join(os.environ['VIRTUAL_ENV'], 'bin', 'uv'))\n",
        encoding="utf-8",
    )
    done = sandbox.run()
    assert done.returncode == 0 and len(done.calls) == 3, done.stderr
    assert "no uv on PATH" in done.stdout


def test_no_rust_is_one_line_and_no_stamp(sandbox):
    done = sandbox.run(FAKE_NO_RUST="1", then="echo not reached")
    assert done.returncode == 1 and "not reached" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert "rustup" in line
    assert len(sandbox.run().calls) > 0, "the next run tries again"


def test_no_c_compiler_is_named_before_anything_is_installed(sandbox):
    """The linker's own message would blame Rust."""
    sandbox.cc.unlink()
    done = sandbox.run(then="echo not reached")
    assert done.returncode == 1 and done.calls == [] and "not reached" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert "C compiler" in line and "build-essential" in line


def test_environment_is_made_where_none_is_active(sandbox):
    done = sandbox.run(active=False, then="echo $VIRTUAL_ENV; command -v python")
    assert done.returncode == 0, done.stderr
    home = sandbox.repository / ".venv"
    assert done.stdout.splitlines()[-2:] == [str(home), f"{home}/bin/python"]
    assert sandbox.run(active=False).calls == []


def test_old_python_is_refused(sandbox):
    python = sandbox.environment / "bin" / "python"
    python.unlink()
    python.write_text('#!/bin/sh\ncase "$2" in *version_info*) exit 1;; esac\n', encoding="utf-8")
    python.chmod(0o755)
    done = sandbox.run()
    assert done.returncode == 1 and "3.10" in done.stderr and done.calls == []


@pytest.mark.parametrize("given, meant", [
    ("~/runs", "runs"),
    ("here/runs", "repo/here/runs"),
    ("", ".cache/nanochat"),
])
def test_compiled_python_files_lie_in_the_base_folder_that_python_means(sandbox, given, meant):
    (sandbox.repository / "nanochat").mkdir()
    shutil.copy(ROOT / "nanochat" / "common.py", sandbox.repository / "nanochat")
    done = sandbox.run(
        then='echo "<$PYTHONPYCACHEPREFIX>"',
        PYTHONDONTWRITEBYTECODE="1",
        NANOCHAT_BASE_DIR=given,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"<{sandbox.folder / meant}/pycache>"


def test_setting_up_needs_no_home(sandbox):
    done = sandbox.run(then="unset HOME; source scripts/setup.sh; echo done")
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr
    done = sandbox.run(then="unset HOME; setup_rustbpe; echo done", PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr
