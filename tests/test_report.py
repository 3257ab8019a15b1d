"""The report card, from records and logs made here: what it shows, what it has no section for, and
that it holds no live markup."""

import json
import os
import re
from html.parser import HTMLParser

import pytest

from conftest import last_json
from nanochat import document, records, report
from nanochat.common import UserError

MACHINE = {"cpu": "A Test CPU", "cores": 2, "memory_gb": 16, "gpus": [], "torch": "2.99"}
EVIL = "<script>alert(1)</script> | `x`\n# heading"


def record(stage, seconds=10.0, **fields):
    settings = {"depth": None, "dtype": "float32"}
    return {"stage": stage, "seconds": seconds, "machine": MACHINE, "settings": settings, **fields}


def training(base, stage, **fields):
    """The record of a training stage, with a log of ten steps beside its checkpoint."""
    folder = base / stage
    folder.mkdir(parents=True, exist_ok=True)
    log = [
        {"step": s, "tokens": 100 * s, "loss": 5 - s / 4, "lr": 0.01, "seconds": s}
        for s in range(1, 11)
    ]
    log.insert(5, {"step": 5, "val_bpb": 2.5})
    log.insert(6, {"step": 5, "samples": [{"prompt": "def f(", "text": EVIL}]})
    log.append({"step": 10, "samples": [{"prompt": "def f(", "text": "x): return 1"}]})
    (folder / "log.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in log), encoding="utf-8"
    )
    return record(
        stage,
        steps=10,
        tokens=1_500_000,
        tokens_per_second=1234.5,
        flops_per_second=2e11,
        matmul_flops_per_second=8e11,
        val_bpb=1.2345,
        checkpoint=str(folder),
        parameters=4_200_000,
        config={"n_layer": 4},
        **fields,
    )


def write(base, rows):
    (base / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )


@pytest.fixture
def whole_run(base_dir):
    write(
        base_dir,
        [
            record("tok_train", vocab_size=4096, bytes_per_token=3.5),
            training(base_dir, "base_train"),
            training(base_dir, "chat_sft"),
            record(
                "chat_eval",
                accuracy={"arithmetic": 0.99, "spelling": 0.9, "pydoc": 0.6, "identity": 1.0},
                items={"arithmetic": 200, "spelling": 200, "pydoc": 200, "identity": 200},
                chance={"pydoc": 0.25},
            ),
        ],
    )
    return base_dir


def test_report_shows_what_the_run_did(whole_run):
    report.write_report(whole_run, total=125)
    text = (whole_run / "report.md").read_text(encoding="utf-8")
    for expected in (
        "A Test CPU",
        "4.2 M",
        "1.234",
        "1.23 k",
        "200 GFLOP/s",
        "25.0 %",
        "2 min 5 s",
        "def f(",
        "x): return 1",
        "base_train, step 5",
        "4096",
        "3.50 bytes",
        "5.25 MB",
        "float32",
        "n_layer",
        "electricity",
        "assumption",
        "fluent guesses",
    ):
        assert expected in text, expected
    assert re.search(r"\| pydoc \| 60\.0 % \| 53\.1 to 66\.5 % \| 25\.0 % \| 200 \|", text)
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (whole_run / name).read_bytes().startswith(b"\x89PNG")
    assert text.count(".png)") == 3


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]


def test_html_is_self_contained_and_samples_are_only_text(whole_run):
    report.write_report(whole_run)
    page = Tags()
    page.feed((whole_run / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and "link" not in page.tags and page.tags.count("img") == 3
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)


def test_markdown_samples_are_code(whole_run):
    report.write_report(whole_run)
    lines = (whole_run / "report.md").read_text(encoding="utf-8").split("\n")
    assert (
        "    " + EVIL.split("\n")[0] in lines
        and "    # heading" in lines
        and "# heading" not in lines
    )


def test_table_cells_cannot_break_the_table():
    text = document.to_markdown("t", [("table", ["a", "b"], [("x|y", "1\n2")])])
    assert "| x\\|y | 1 2 |" in text


def test_half_a_run_still_gets_its_report(base_dir):
    write(base_dir, [record("dataset"), record("tok_train")])
    report.write_report(base_dir)
    text = (base_dir / "report.md").read_text(encoding="utf-8")
    assert "## Time" in text and "## Training" not in text and "## Accuracy" not in text
    assert not (base_dir / "report_loss.png").exists()


def test_a_run_without_a_step_of_pretraining_is_described_as_such(base_dir):
    base, chat = training(base_dir, "base_train"), training(base_dir, "chat_sft")
    base.update(steps=0, tokens=0)
    write(base_dir, [base, record("chat_eval", accuracy={"spelling": 0.9})])
    report.write_report(base_dir)
    text = (base_dir / "report.md").read_text(encoding="utf-8")
    assert "4.2 M parameters and was not pretrained: no step of pretraining was taken" in text
    assert "No later stage trained it" in text
    write(base_dir, [base, chat, record("chat_eval", accuracy={"spelling": 0.9})])
    report.write_report(base_dir)
    text = (base_dir / "report.md").read_text(encoding="utf-8")
    assert "it learned from 1.5 M tokens of the later stages" in text


def test_nothing_to_report_names_the_remedy(base_dir):
    with pytest.raises(UserError, match="run one first"):
        report.write_report(base_dir)
    assert not (base_dir / "report.md").exists()


def test_last_record_of_each_stage_since_the_start_counts():
    rows = [
        record("mid_train"),
        {"stage": "start"},
        record("base_train", seconds=1),
        record("chat_sft"),
        record("base_train", seconds=2),
        record("report"),
    ]
    stages = records.last_run(rows)
    assert list(stages) == ["chat_sft", "base_train"] and stages["base_train"]["seconds"] == 2


def test_two_speedruns_that_took_turns_have_a_report_each():
    def of(run, stage, seconds=1):
        return {**record(stage, seconds=seconds), "run": run}

    rows = [
        {"stage": "start", "run": "17-4"},
        of("17-4", "base_train", 1),
        {"stage": "start", "run": "17-5"},
        of("17-5", "base_train", 2),
        of("17-4", "mid_train", 3),
        record("chat_eval"),  # by hand
        of("17-5", "mid_train", 4),
    ]
    for run, times in (("17-4", [1, 3]), ("17-5", [2, 4])):
        stages = records.last_run(rows, run)
        assert [stages[name]["seconds"] for name in ("base_train", "mid_train")] == times
        assert len(stages) == 2
    assert list(records.last_run(rows)) == ["base_train", "chat_eval", "mid_train"]
    assert records.last_run(rows)["mid_train"]["seconds"] == 4, "the one that began last"


def test_log_of_a_resumed_run_counts_every_step_once(tmp_path):
    steps = [
        1,
        2,
        3,
        3,
        4,
        5,
        4,
        5,
        6,
    ]  # two rows of step 3; saved after it, stopped in 5, resumed with 4
    lines = [json.dumps({"step": step, "loss": i}) for i, step in enumerate(steps)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "lo', encoding="utf-8")
    rows = records.training_log({"checkpoint": str(tmp_path)})
    assert [(row["step"], row["loss"]) for row in rows] == [
        (1, 0),
        (2, 1),
        (3, 2),
        (3, 3),
        (4, 6),
        (5, 7),
        (6, 8),
    ]


def test_line_separators_inside_strings_do_not_split_records(tmp_path):
    # docs/traps.md: encoding-and-splitlines
    line = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text(line + "\n", encoding="utf-8")
    assert records.read_jsonl(tmp_path / "x.jsonl") == [{"text": "a\u2028b\x85c"}]


def test_text_that_was_read_several_times_is_counted_once_and_epochs_apart(base_dir):
    rows = [
        record("tok_train", vocab_size=512, bytes_per_token=3.5),
        training(base_dir, "base_train", text_bytes=620_000, epochs=8.47),
    ]
    write(base_dir, rows)
    report.write_report(base_dir)
    text = (base_dir / "report.md").read_text(encoding="utf-8")
    assert "1.5 M tokens (620 kB of text, read 8.5 times)" in text and "5.25 MB" not in text
    assert "| of text | 620 kB |" in text and "| times read | 8.5 |" in text
    rows[1]["epochs"] = 0.2
    write(base_dir, rows)
    report.write_report(base_dir)
    text = (base_dir / "report.md").read_text(encoding="utf-8")
    assert "(620 kB of text, of which it read 20.0 %)" in text


def test_validations_are_compared_on_the_same_documents(base_dir):
    log = [
        {"step": 5, "val_bpb": 2.5, "documents": 30},
        {"step": 7, "loss": 4.0, "lr": 0.01},
        {"step": 10, "val_bpb": 2.25, "documents": 30},
        {"step": 10, "val_bpb": 1.75, "documents": 300},
    ]
    assert records.comparable(log) == [log[0], log[2]]
    assert records.comparable(log[1:2]) == []
    row = training(base_dir, "base_train")
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    (base_dir / "base_train" / "log.jsonl").write_text(lines, encoding="utf-8")
    write(base_dir, [row, record("base_loss", val_bpb=1.5, documents=50)])
    report.write_report(base_dir)
    text = (base_dir / "report.md").read_text(encoding="utf-8")
    assert "| base_train | 300 | 1.2345 |" in text and "| base_loss | 50 | 1.5000 |" in text


def test_unseen_sources_stand_beside_those_that_were_read(base_dir):
    row = training(base_dir, "base_train")
    unseen = {"val_bpb": 1.5, "val_bpb_without_counts": 1.75, "documents": 200}
    row.update(unseen=unseen, val_bpb_without_counts=1.6, protocol="bpb1-300-1a2b3c4d")
    measured = record("base_loss", val_bpb=1.25, documents=300, protocol="bpb1-300-1a2b3c4d")
    write(base_dir, [row, measured])
    report.write_report(base_dir)
    text = (base_dir / "report.md").read_text(encoding="utf-8")
    assert "| on unseen sources | 1.500 |" in text
    header, _, *lines = text.split("## Validation bits per byte")[1].strip().split("\n")[:5]
    assert header == "| stage | of | validation documents | bits per byte | without counts |"
    assert lines[0].startswith("| base_train | sources that were read | ")
    assert lines[0].endswith(" | 1.2345 | 1.6000 |")
    assert lines[1] == "| base_train | whole sources that were not | 200 | 1.5000 | 1.7500 |"
    assert lines[2] == "| base_loss | sources that were read | 300 | 1.2500 |  |"


def test_accuracies_stand_beside_majority_control_chatcore_and_pass_at_k(base_dir):
    write(base_dir, [
        training(base_dir, "base_train"),
        record(
            "chat_eval",
            accuracy={"MMLU": 0.375, "GSM8K": 0.05},
            items={"MMLU": 256, "GSM8K": 256},
            chance={"MMLU": 0.25, "GSM8K": 0.0},
            majority={"MMLU": 0.28, "GSM8K": 0.01},
            control={"MMLU": 0.27},
            chatcore=0.1083,
            pass_at_k={"GSM8K": {"1": 0.05, "4": 0.125}},
            declined={
                "should": 0.925, "should_count": 400, "should_not": 0.01, "should_not_count": 900},
        ),
    ])
    report.write_report(base_dir)
    text = (base_dir / "report.md").read_text(encoding="utf-8")
    assert "| task | right | 95 % interval | chance | majority | control | items |" in text
    assert "| 25.0 % | 28.0 % | 27.0 % | 256 |" in text
    assert "| 0.0 % | 1.0 % | no choices | 256 |" in text
    assert "Declined when it should: 92.5 % of 400" in text
    assert "when it should not: 1.0 % of 900" in text
    assert "0.1083" in text and "pass@k of GSM8K: 5.0 % at 1, 12.5 % at 4" in text


def test_a_chat_about_own_text_is_described_by_what_it_quotes(base_dir):
    row = training(base_dir, "base_train")
    row["settings"]["data"] = "/home/ada/notes"
    accuracy = {"own_text": 0.7, "own_text_practised": 0.95}
    write(base_dir, [row, record("chat_eval", accuracy=accuracy, own_files=300)])
    report.write_report(base_dir)
    text = (base_dir / "report.md").read_text(encoding="utf-8")
    assert "the look of your text, /home/ada/notes, and" in text
    assert "It quotes from your 300 files" in text and "nothing else" in text
    assert "held out, it quoted the right passage for 70.0 %, and from those that it practised " \
        "for 95.0 %" in text
    assert "| own_text, practised | 95.0 % |" in text and "| own_text | 70.0 % |" in text


def test_unknown_throughputs_say_unknown(base_dir):
    # docs/traps.md: wrong-throughput
    row = training(base_dir, "base_train")
    del row["matmul_flops_per_second"], row["tokens_per_second"]
    write(base_dir, [row])
    report.write_report(base_dir)
    lines = (base_dir / "report.md").read_text(encoding="utf-8").split("\n")
    line = next(line for line in lines if line.startswith("| base_train"))
    assert line.count("unknown") == 2


GPU_FIELDS = {"machine": {"gpus": ["NVIDIA H100 80GB HBM3"]}, "mfu": 0.44, "mfu_square": 0.487,
              "peak_flops_per_second": 7.912e15, "dtype": "bfloat16"}


def test_the_share_of_a_gpus_peak_stands_by_both_conventions_with_the_peak(base_dir):
    # docs/traps.md: wrong-throughput
    write(base_dir, [training(base_dir, "base_train", **GPU_FIELDS)])
    report.write_report(base_dir)
    text = (base_dir / "report.md").read_text(encoding="utf-8")
    assert "| mfu, causal | mfu, square |" in text and "| 44.0 % | 48.7 % |" in text
    assert "7.91 PFLOP/s (bfloat16)" in text


def test_the_share_of_an_unknown_gpus_peak_is_unknown_and_a_cpu_has_none(base_dir):
    # docs/traps.md: wrong-throughput
    unknown = {**GPU_FIELDS, "mfu": None, "mfu_square": None, "peak_flops_per_second": None}
    for fields, says in ((unknown, True), ({}, False)):
        write(base_dir, [training(base_dir, "base_train", **fields)])
        report.write_report(base_dir)
        text = (base_dir / "report.md").read_text(encoding="utf-8")
        assert ("| unknown | unknown |" in text) == says
        assert ("The peak of this GPU is unknown" in text) == says


@pytest.mark.parametrize(
    "number, unit, expected",
    [
        (0, "", "0"),
        (999, "", "999"),
        (1234567, "", "1.23 M"),
        (3.1e11, "FLOP/s", "310 GFLOP/s"),
        (15123, "", "15.1 k"),
        (None, "", "unknown"),
    ],
)
def test_si(number, unit, expected):
    assert records.si(number, unit) == expected


def test_interval_is_honest_at_the_ends():
    assert records.interval(1.0, 200) == "98.1 to 100.0 %"
    assert records.interval(0.0, 200) == "0.0 to 1.9 %"


def test_costs_of_gpus_are_counted_per_gpu():
    rows = report.cost({"gpus": ["X"] * 8, "cores": 100}, hours=4)
    assert rows[1][1] == "$96.000" and rows[1][2].startswith("8 GPUs")


def test_commands(whole_run, run_module):
    done = run_module("nanochat.report", base=whole_run)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["report"] == str(whole_run / "report.md")
    done = run_module("nanochat.report", "--speedrun", "--seconds=900", base=whole_run)
    row = last_json(done.stdout)
    assert row["stage"] == "speedrun" and row["seconds"] == 900 and row["val_bpb"] == 1.2345
    assert row["val_bpb_bound"] is None, "no diffusion model"
    assert row["accuracy"] == {"arithmetic": 0.99, "spelling": 0.9, "pydoc": 0.6, "identity": 1.0}


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "inline"])
def test_a_notebooks_plotting_backend_does_not_matter(whole_run, run_module, backend):
    done = run_module("nanochat.report", base=whole_run, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert (whole_run / "report_loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_report_is_written_and_says_how_to_get_plots(
    whole_run, run_module, tmp_path
):
    broken = tmp_path / "packages" / "matplotlib"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('not here')", encoding="utf-8")
    path = f"{broken.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = run_module("nanochat.report", base=whole_run, PYTHONPATH=path)
    assert done.returncode == 0 and done.stderr == ""
    assert last_json(done.stdout)["report"] == str(whole_run / "report.md")
    text = (whole_run / "report.md").read_text(encoding="utf-8")
    assert "pip install matplotlib" in text and ".png" not in text and "## Accuracy" in text
    page = (whole_run / "report.html").read_text(encoding="utf-8")
    assert "pip install matplotlib" in page and "<img" not in page
