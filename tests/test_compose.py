"""compose.yaml and the commands in docs/models: right by schema, by vLLM's flags, and safe to start
on a shared memory."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from vllm_flags import BYTES, problems

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

PROFILES = {"fp8": "vllm-qwen3-32b-fp8", "bf16": "vllm-qwen3-32b"}
VERSIONS = [(0, 11), (0, 13), (0, 19)]  # compose.yaml must not depend on which vLLM the image holds
PAGES = sorted((ROOT / "docs" / "models").glob("*.md"))
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def services(**environment):
    """The services with their variables put in, as docker compose does it."""
    text = VARIABLE.sub(
        lambda found: environment.get(found[1]) or found[2],
        (ROOT / "compose.yaml").read_text(encoding="utf-8"),
    )
    assert "${" not in text, "a variable without a default"
    return yaml.safe_load(text)["services"]


def flag(service, name):
    return next(
        word.partition("=")[2] for word in service["command"] if word.startswith(f"--{name}=")
    )


def started(profile):
    """{name: service} of what `docker compose --profile PROFILE up` starts."""
    return {
        name: service
        for name, service in services().items()
        if profile in service.get("profiles", [profile])
    }


def test_the_file_fits_the_compose_specification():
    tool = shutil.which("check-jsonschema") or shutil.which(
        "check-jsonschema", path=str(Path(sys.executable).parent)
    )
    if tool is None:
        pytest.skip("check-jsonschema is not installed")
    done = subprocess.run(
        [tool, "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_three_services_and_their_profiles():
    assert {name: service.get("profiles") for name, service in services().items()} == {
        "ollama": None,
        "vllm-qwen3-32b-fp8": ["fp8"],
        "vllm-qwen3-32b": ["bf16"],
    }
    for profile, name in PROFILES.items():
        assert set(started(profile)) == {"ollama", name}


@pytest.mark.parametrize("profile", PROFILES)
def test_each_port_has_one_owner_in_a_profile_and_is_published_on_loopback(profile):
    ports = [port for service in started(profile).values() for port in service["ports"]]
    assert sorted(ports) == ["127.0.0.1:11434:11434", "127.0.0.1:8000:8000"]


def test_both_models_want_the_same_port_so_that_they_never_share_the_memory():
    assert (
        len({tuple(services(VLLM_PORT="9000")[name]["ports"]) for name in PROFILES.values()}) == 1
    )


@pytest.mark.parametrize("name, service", services().items())
def test_a_service_is_pinned_watched_bounded_and_keeps_its_downloads(name, service):
    tag = service["image"].rpartition(":")[2]
    assert re.search(r"\d+\.\d+", tag) and "latest" not in service["image"]
    health = service["healthcheck"]
    assert (
        health["test"][0] == "CMD"
        and "curl" not in health["test"]
        and health["retries"]
        and health["start_period"]
    )
    assert service["restart"] == "on-failure:3" and set(service["logging"]["options"]) == {
        "max-size",
        "max-file",
    }
    assert service["volumes"] == (
        ["/opt/ollama:/root/.ollama"] if name == "ollama" else ["/opt/hf:/root/.cache/huggingface"]
    )
    assert (
        service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
        and "privileged" not in service
    )


def test_the_python_of_a_health_check_compiles():
    for name in PROFILES.values():
        program = services()[name]["healthcheck"]["test"]
        assert program[1:3] == ["python3", "-c"]
        compile(program[3], name, "exec")


def test_ollama_is_one_with_the_known_hole_closed():
    version = services()["ollama"]["image"].partition(":")[2]
    assert tuple(map(int, version.split("."))) >= (0, 17, 1)


@pytest.mark.parametrize("profile, weights", [("fp8", 34.3e9), ("bf16", 65.6e9)])
def test_the_memory_of_all_that_runs_together_is_below_the_whole(profile, weights):
    running = started(profile)
    vllm, ollama = running[PROFILES[profile]], running["ollama"]
    share = float(flag(vllm, "gpu-memory-utilization"))
    assert re.fullmatch(r"\d+g", ollama["mem_limit"])
    assert share + int(ollama["mem_limit"][:-1]) * 2**30 / BYTES < 1
    assert weights + int(flag(vllm, "kv-cache-memory-bytes")) < share * BYTES, (
        "weights and cache fit into what must be free at the start"
    )


@pytest.mark.parametrize("name", PROFILES.values())
@pytest.mark.parametrize("version", VERSIONS)
def test_every_flag_is_one_that_vllm_has(name, version):
    assert problems(services()[name]["command"], version) == []


@pytest.mark.parametrize("name", PROFILES.values())
def test_the_cache_holds_a_whole_context(name):
    service = services()[name]
    assert int(flag(service, "max-model-len")) * 256 * 1024 <= int(
        flag(service, "kv-cache-memory-bytes")
    )  # 256 KiB a token


def test_the_table_of_flags_finds_what_is_wrong():
    serve = ["vllm", "serve", "m"]
    assert (
        problems([*serve, "--port", "8000", "--trust-remote-code", "--allowed-origins=[]"], (0, 11))
        == []
    )
    for words in (
        ["--prot=1"],
        ["--port=0"],
        ["--port"],
        ["--port=x"],
        ["--port=1", "--port=2"],
        ["--trust-remote-code=1"],
        ["--block-size=3"],
        ["--gpu-memory-utilization=1.1"],
        ["--allowed-origins={}"],
        ["--allowed-origins=*"],
        ["--dtype=fp8"],
        ["stray"],
    ):
        assert len(problems([*serve, *words], (0, 11))) == 1, words
    assert (
        problems([*serve, "--swap-space=16"], (0, 17)) == []
        and len(problems([*serve, "--swap-space=16"], (0, 18))) == 1
    )
    assert problems(["vllm", "--port=1"], (0, 11)) and problems(
        ["vllm", "serve", "--port=1"], (0, 11)
    )


# --------------------------------------------------------------------------------------------------
# .env.example and the pages


def test_env_example_names_every_variable_with_its_default():
    said = dict(
        re.findall(
            r"^#? ?([A-Z0-9_]+)=(.*)$", (ROOT / ".env.example").read_text(encoding="utf-8"), re.M
        )
    )
    assert said.pop("COMPOSE_PROFILES") == "fp8"
    assert said == dict(VARIABLE.findall((ROOT / "compose.yaml").read_text(encoding="utf-8")))


def test_secrets_are_not_committed():
    assert "\n.env\n" in (ROOT / ".gitignore").read_text(encoding="utf-8")
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert "\nHF_TOKEN=\n" in example and "\nVLLM_API_KEY=\n" in example


def vllm_commands(page):
    """[(version, words)] of the `vllm serve` commands in a page's code blocks.

    ```bash vllm-0.11 says which vLLM a block is for.
    """
    found = []
    for info, block in re.findall(
        r"^```(.*)\n((?:.*\n)*?)```$", page.read_text(encoding="utf-8"), re.M
    ):
        version = re.search(r"vllm-(\d+)\.(\d+)", info)
        for line in block.replace("\\\n", " ").splitlines():
            if "vllm serve " in line:
                words = shlex.split(line)
                found.append(
                    (version and (int(version[1]), int(version[2])), words[words.index("vllm") :])
                )
    return found


def test_the_words_that_the_page_hands_on_and_the_upgrade_are_flags_of_their_version():
    def serve(*words, **variables):
        done = subprocess.run(
            ["bash", "serve_r1.sh", "--dry-run", *words],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "HOME": "/home/me", **variables},
            capture_output=True,
            text=True,
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith("docker run"))
        return shlex.split(line)[shlex.split(line).index("vllm") :]

    page = (ROOT / "docs" / "models" / "deepseek-r1.md").read_text(encoding="utf-8")
    handed_on = re.findall(r"serve_r1\.sh start -- ([^`\n]+)", page)
    assert handed_on
    for words in handed_on:
        assert problems(serve("start", "--", *words.split()), (0, 11)) == []
    assert (
        "BLOCK_SIZE= bash serve_r1.sh" in page
        and problems(serve(BLOCK_SIZE=""), (0, 19)) == []
        and problems(serve(), (0, 19)) != []
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_vllm_command_in_the_pages_has_only_flags_of_its_version(page):
    commands = vllm_commands(page)
    assert commands
    for version, words in commands:
        assert version, f"which vLLM is this for? {words}"
        assert problems(words, version) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_service_and_setting_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    known = set(
        re.findall(r"^([A-Z_]+)=", (ROOT / "serve_r1.sh").read_text(encoding="utf-8"), re.M)
    )
    known |= set(
        re.findall(r"^#? ?([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.M)
    )
    for line in re.findall(r"^(?:.*bash serve_r1\.sh.*|[A-Z0-9_]+=\S*)$", text, re.M):
        assert set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", line)) <= known, line
    for name in re.findall(r"docker compose (?:up -d|logs -f|stop|exec) ([a-z][\w-]*)", text):
        assert name in services(), name


def test_the_dry_run_in_the_page_is_the_one_that_is_printed_today():
    page = (ROOT / "docs" / "models" / "deepseek-r1.md").read_text(encoding="utf-8")
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/home/me",
        "GPU_GROUPS": "video 109",
    }
    for verb in ("start", "status", "logs", "throughput", "test", "stop"):
        done = subprocess.run(
            ["bash", "serve_r1.sh", "--dry-run", verb],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        for line in done.stdout.splitlines():
            words = shlex.split(line)
            assert words in [
                shlex.split(shown)
                for shown in page.replace("\\\n", " ").splitlines()
                if shown.startswith(words[0])
            ], line


def test_json_in_the_pages_is_json():
    for page in PAGES:
        for text in re.findall(
            r"--(?:data(?:-binary)?|rope-scaling|hf-overrides) '([^']*)'|-d '([^']*)'",
            page.read_text(encoding="utf-8"),
        ):
            json.loads("".join(text))
