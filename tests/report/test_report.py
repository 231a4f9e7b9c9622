"""The report says what the logs say, and refuses what cannot be compared."""

import json
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from apollo_optim import build_optimizer, describe
from apollo_optim.core.errors import InputError
from apollo_optim.report import in_words, markdown_table, read_run, rich_table, table_rows, write_report
from apollo_optim.report.curves import losses
from apollo_optim.report.picture import draw, running_mean
from apollo_optim.report.read import labels
from apollo_optim.train.config import ModelConfig
from apollo_optim.train.models import skeleton

Event = dict[str, Any]


def log_of(
    optimizer: str = "apollo", sha256: str | None = "a" * 64, tokenizer: str = "b" * 64, **corpus: Any
) -> list[Event]:
    """A run of ten steps as the loop writes it."""
    identity = {"name": "python", "sha256": sha256, "tokenizer": {"name": "bpe", "sha256": tokenizer}, **corpus}
    memory = {"weights": 13_600_000, "gradients": 13_600_000, "optimizer": 7_000_000}
    events: list[Event] = [
        {
            "event": "start", "time": 0.0, "config": {"model": {"name": "llama-4m"}, "optim": {"name": optimizer}},
            "corpus": identity, "versions": {"torch": "2.13.0"}, "hardware": {"cpu": "<b>a cpu</b>"},
            "params": 3_400_000, "memory": {**memory, "optimizer": 0}, "resumed_from": None,
        },
        {"event": "memory", "step": 1, **memory},
    ]  # fmt: skip
    for step in range(1, 11):
        at = {"step": step, "tokens": 4096 * step, "loss": 8.0 - step / 2, "seconds": step / 2}
        events.append({"event": "step", **at, "lr": 0.001 * step, "lr_rest": 0.002 * step, "grad_norm": 1.0})
        if step % 5 == 0:
            figures = {"perplexity": math.exp(at["loss"]), "perplexity_reference": 1.0, "bits_per_byte": 2.5}
            events.append({"event": "eval", **at, **figures})
    events.append({"event": "end", "step": 10, "loss": 3.0, "seconds": 5.0, "memory": {**memory, "peak": 900_000_000}})
    return events


def write_log(path: Path, events: list[Event], tail: str = "") -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return path


@pytest.mark.parametrize("key", ["seconds", "bits_per_byte"])
def test_a_figure_that_a_log_lacks_is_not_drawn(tmp_path: Path, key: str) -> None:
    """In one record, and in all of them."""
    for name, lacking in (("one", 3), ("all", None)):
        events = log_of()
        for event in events if lacking is None else events[lacking : lacking + 1]:
            event.pop(key, None)
        run = read_run(write_log(tmp_path / name, events))
        assert write_report([run], tmp_path / f"page-{name}").page.is_file()


def test_the_table_holds_the_figures_of_the_log(tmp_path: Path) -> None:
    titles, [row] = table_rows([read_run(write_log(tmp_path / "run", log_of()))])
    cells = dict(zip(titles, row, strict=True))
    assert cells == {
        "run": "apollo", "model": "llama-4m", "params": "3,400,000", "lr": "0.01", "lr of the rest": "0.02",
        "steps": "10", "tokens": "40,960", "loss": "3.0000", "perplexity": f"{math.exp(3.0):.2f}", "bits/byte": "2.500",
        "ppl n/(n+1)*": "1.00", "tokens/s": "8,192", "time": "5.0s", "weights": "13.6 MB", "gradients": "13.6 MB",
        "optimizer": "7 MB", "peak": "900 MB",
    }  # fmt: skip


def test_tokens_of_fine_tuning_are_the_learnt_ones(tmp_path: Path) -> None:
    """A loop counts what has a label: answers."""
    events = log_of()
    events[0]["config"]["data"] = {"format": "auto"}
    tuned, text = read_run(write_log(tmp_path / "tuned", events)), read_run(write_log(tmp_path / "text", log_of()))
    for runs, word in (
        ([tuned], "learnt tokens"),
        ([text], "tokens"),
        ([tuned, text], "tokens (of fine-tuning: learnt ones)"),
    ):
        assert word in table_rows(runs)[0]
        assert draw(runs).axes[0].get_xlabel() == f"thousands of {word}"
        assert f"thousands of {word}<" in losses(runs)


def test_a_run_that_goes_on_is_drawn_and_marked(tmp_path: Path) -> None:
    run = read_run(write_log(tmp_path / "run", log_of()[:8], tail='{"event": "st'))
    titles, [row] = table_rows([run])
    assert row[0] == "apollo (not ended)"
    assert "peak" not in titles  # not measured yet: no column for it
    assert row[titles.index("optimizer")] == "7 MB"  # as counted after the first step, not the 0 of the start
    assert len(run.steps) == 5
    assert draw([run]).axes


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"event": "st', "not an event"),
        ("[]", "not an event"),
        ("[" * 100_000, "not an event"),
        ('{"event": "step", "step": ' + "9" * 5000 + "}", "not an event"),
        ('{"event": "step", "step": null, "tokens": 1, "loss": 1.0}', "a step without a step"),
        ('{"event": "step", "step": 1, "tokens": 1}', "a step without a loss"),
        ('{"event": "step", "step": 1, "tokens": 1, "loss": "1.0"}', "a step without a loss"),
        ('{"event": "step", "step": 1, "tokens": 1, "loss": 1e999}', "a step without a loss"),
        ('{"event": "start"}', "a start without a config"),
        ('{"event": "start", "config": {}, "corpus": "x"}', "a start whose corpus makes no sense"),
        ('{"event": "end", "memory": 3}', "an? end whose memory makes no sense"),
        ("\udcff", "not an event"),
    ],
)
def test_a_line_that_is_no_record_is_counted_and_said(line: str, why: str, tmp_path: Path, caplog: Any) -> None:
    path = write_log(tmp_path / "run", log_of()[:3])
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b'\n{"event": "end"}\n')
    run = read_run(path)
    assert (len(run.steps), run.end) == (1, {"event": "end"})
    assert re.search(rf"metrics.jsonl has 1 line that is no record, the first: line 4: {why}", caplog.text)


def test_a_long_log_takes_little_memory(tmp_path: Path) -> None:
    """Eight bytes a figure instead of a dictionary a line."""
    steps = [event for event in log_of() if event["event"] == "step"]
    path = write_log(tmp_path / "run", log_of() + steps * 5_000)
    tracemalloc.start()
    run = read_run(path)
    draw([run])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(run.steps) == 50_010
    assert peak < 20e6  # of dictionaries alone: 50e6
    assert run.steps[-1] == {key: steps[-1][key] for key in ("step", "tokens", "loss", "seconds", "lr", "lr_rest")}


def test_runs_are_told_apart(tmp_path: Path) -> None:
    optimizers = {"a": "adamw", "b": "apollo"}
    runs = [read_run(write_log(tmp_path / name, log_of(optimizer))) for name, optimizer in optimizers.items()]
    assert labels(runs) == ["adamw", "apollo"]
    again = read_run(write_log(tmp_path / "seed-1", log_of("apollo")))
    assert labels([*runs, again]) == ["a", "b", "seed-1"]


def test_a_log_kept_alone_is_a_run(tmp_path: Path) -> None:
    path = write_log(tmp_path / "run", log_of()) / "metrics.jsonl"
    assert read_run(path).path == tmp_path / "run"
    kept = [path.rename(tmp_path / "apollo-seed-0.jsonl"), tmp_path / "apollo-seed-1.jsonl"]
    kept[1].write_text(kept[0].read_text())
    runs = [read_run(log) for log in kept]
    assert labels(runs) == ["apollo-seed-0", "apollo-seed-1"]
    assert write_report(runs, tmp_path / "report").page.is_file()


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"sha256": "c" * 64}, "corpora"),
        ({"tokenizer": "c" * 64}, "tokenizers"),
        ({"sha256": None, "subset": "en"}, "corpora"),
    ],
)
def test_different_text_is_refused(tmp_path: Path, other: dict[str, Any], what: str) -> None:
    runs = [read_run(write_log(tmp_path / "one", log_of())), read_run(write_log(tmp_path / "two", log_of(**other)))]
    with pytest.raises(InputError, match=f"different {what}.*one.*two"):
        write_report(runs, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_streams_are_compared_by_what_was_asked_for(tmp_path: Path) -> None:
    logs = [log_of(sha256=None, name="allenai/c4", subset=subset) for subset in ("en", "en", "de")]
    english, same, german = (read_run(write_log(tmp_path / str(i), log)) for i, log in enumerate(logs))
    write_report([english, same], tmp_path / "report")
    with pytest.raises(InputError, match="different corpora"):
        write_report([english, german], tmp_path / "report")


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    runs = [read_run(write_log(tmp_path / name, log_of(name))) for name in ("adamw", "apollo", "apollo-mini")]
    written = write_report(runs, tmp_path / "deep" / "report")
    assert written.picture.read_bytes().startswith(b"\x89PNG")
    page = written.page.read_text()
    assert page.count("<svg") == 5  # a key of three lines, loss against tokens and time
    assert not re.search(r"(?:src|href)=", page)
    assert "&lt;b&gt;a cpu&lt;/b&gt;" in page  # what comes from a log is text, not HTML
    assert "| apollo-mini | llama-4m | 3,400,000 |" in written.table.read_text()
    assert markdown_table(runs).count("\n| adamw |") == 1


def test_labels_of_bars_do_not_overlap(tmp_path: Path) -> None:
    """Where names are long, bars are short, and a part's name does not fit into it."""
    runs = []
    for name in ("adamw-seed0-again-and-again", "apollo-mini-seed0"):
        events = log_of()
        state = 26_800_000 if "adamw" in name else 12_700_000
        sizes = {"weights": 13_400_000, "gradients": 13_400_000, "optimizer": state}
        events[-1]["memory"] |= sizes
        runs.append(read_run(write_log(tmp_path / name, events)))
    figure = draw(runs)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[2].texts]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_runs_are_told_in_words_beside_the_first(tmp_path: Path) -> None:
    runs = []
    for name, state, loss in (("adamw", 28_000_000, 3.0), ("apollo", 7_000_000, 3.01)):
        events = log_of(name)
        events[-1]["memory"]["optimizer"] = state
        events[-1] |= {"tokens": 40_960, "perplexity": math.exp(loss)}
        runs.append(read_run(write_log(tmp_path / name, events)))
    (told,) = words = in_words(runs, "llama-7b", [54_000_000_000, 13_500_000_000])
    assert told == (
        "apollo keeps 7 MB of optimizer state where adamw keeps 28 MB (4.0 times as much). It ends at perplexity "
        "20.29, adamw at 20.09 (+1.0%). With llama-7b apollo would keep 13.5 GB where adamw would keep 54 GB (4.0 "
        "times as much)."
    )
    written = write_report(runs, tmp_path / "report", words)
    assert f"<p>{told}</p>" in written.page.read_text()
    assert "apollo keeps 7 MB" in written.table.read_text()
    assert in_words(runs[:1]) == []
    assert in_words(runs[:1], "llama-7b", [54_000_000_000]) == [
        "With llama-7b adamw would keep 54 GB of optimizer state."
    ]
    unfinished = read_run(write_log(tmp_path / "muon", log_of("muon")[:-1]))
    (told,) = in_words([runs[0], unfinished])  # what is not known is not told
    assert told == "muon keeps 7 MB of optimizer state where adamw keeps 28 MB (4.0 times as much)."


def test_the_state_with_a_larger_model_is_that_of_its_plan(tmp_path: Path) -> None:
    """The run's own settings, with another model."""
    from apollo_optim.cli.report import planned_state

    events = log_of("apollo-mini")
    events[0]["config"]["optim"] |= {"rest": "adamw8bit", "rank": 1}
    planned = planned_state(read_run(write_log(tmp_path / "mini", events)), "llama-1m")
    model = skeleton(ModelConfig("llama-1m"))
    told = describe(build_optimizer("apollo-mini", model, rest="adamw8bit"))
    assert f"{planned:,}" == told.splitlines()[-1].split()[-1]


def test_one_legend_and_no_pair_by_colour_alone(tmp_path: Path) -> None:
    runs = [read_run(write_log(tmp_path / str(i), log_of())) for i in range(12)]
    figure = draw(runs)
    assert len(figure.legends) == 1
    assert all(axes.get_legend() is None for axes in figure.axes)
    lines = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == 12
    assert len({style for _, style in looks}) > 1


@pytest.mark.parametrize(
    ("events", "message"),
    [(None, "no metrics.jsonl"), ([], "no start event"), (log_of()[:1], "no step is logged yet")],
)
def test_nothing_to_report(tmp_path: Path, events: list[Event] | None, message: str) -> None:
    path = tmp_path / "run"
    if events is None:
        path.mkdir()
    else:
        write_log(path, events)
    with pytest.raises(InputError, match=message):
        write_report([read_run(path)], tmp_path / "report")


def test_a_loss_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    events = log_of()
    events[-2]["loss"] = events[-3]["loss"] = None
    draw([read_run(write_log(tmp_path / "run", events))])


def test_running_mean() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_the_rate_of_the_table_is_the_configured_one(tmp_path: Path) -> None:
    events = log_of()
    events[0]["peak_lr"] = {"lr": 0.5, "lr_rest": 0.25}
    titles, [row] = table_rows([read_run(write_log(tmp_path / "run", events))])
    cells = dict(zip(titles, row, strict=True))
    assert (cells["lr"], cells["lr of the rest"]) == ("0.5", "0.25")


def test_the_training_curve_lies_inside_the_axes(tmp_path: Path) -> None:
    events = log_of()
    for event in events:
        if event["event"] == "step" and event["step"] > 5:
            event["loss"] -= 3.0  # training below validation
    figure = draw([read_run(write_log(tmp_path / "run", events))])
    low, _ = figure.axes[0].get_ylim()
    assert low < min(event["loss"] for event in events if event["event"] == "step")


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(tmp_path: Path) -> None:
    runs = [read_run(write_log(tmp_path / name, log_of(optimizer=name))) for name in ("_a", "b")]
    assert [text.get_text() for text in draw(runs).legends[0].get_texts()] == ["_a", "b"]


def test_names_are_names(tmp_path: Path) -> None:
    """Neither markup of the terminal, nor mathematics, nor Markdown, nor HTML."""
    from rich.console import Console

    name = "[/b]$x_{$<b>|*a*\x1b[2J"
    runs = [read_run(write_log(tmp_path / "runs" / name, log_of(optimizer=name)))]
    console = Console(width=200, record=True)
    console.print(rich_table(runs))
    shown = console.export_text()
    assert name.replace("\x1b", "\\x1b") in shown
    written = write_report(runs, tmp_path / "out")
    for text in (shown, written.page.read_text(), written.table.read_text()):
        assert "\x1b" not in text
    assert "<b>" not in written.page.read_text()
    assert r"&lt;b&gt;\|\*a\*" in written.table.read_text()
