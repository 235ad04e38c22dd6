"""The demo's frame, summary, JSON and PNG."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from streams.demo import report
from streams.demo.measures import Sample
from streams.demo.view import Frame, View, chart, plain_line, render


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "interactions": 1000,
        "replies": 800,
        "joined": 790,
        "duplicates": 0,
        "lost": 0,
        "dead_letters": 0,
        "updates": 200,
        "versions": 150,
        "reward_first": 0.25,
        "reward_last": 0.61234567,
        "reward_control": 0.3,
        "memory_precision_first": 0.3,
        "memory_precision_last": 0.4,
        "ece_last": 0.08,
        "reply_to_weights_ms": {"p50": 400.0, "p99": 900.0},
        "seconds": 90.0,
        "errors": 0,
    } | changes


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=100)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_verdict_names_everything_that_was_not_shown() -> None:
    assert report.failures(summary()) == []
    assert report.verdict(summary()).startswith("It learns: reward 0.25 → 0.61")
    for change, word in (
        ({"lost": 2}, "lost is 2"),
        ({"duplicates": 1}, "duplicates is 1"),
        ({"dead_letters": 1}, "dead_letters is 1"),
        ({"errors": 3}, "errors is 3"),
        ({"reward_last": 0.44}, "from 0.25 to 0.44"),
        ({"reward_control": 0.7}, "not above the control"),
        ({"reply_to_weights_ms": {"p50": 1.0, "p99": 2500.0}}, "2500 ms"),
        ({"reply_to_weights_ms": {"p50": None, "p99": None}}, "no reply reached"),
        ({"reward_first": None}, "nothing was measured"),
    ):
        assert word in report.verdict(summary(**change))


def test_the_summary_is_printed_with_its_verdict() -> None:
    console = plain_console()
    report.print_summary(summary(), console)
    assert "0.250 → 0.612" in text_of(console)
    assert "It learns" in text_of(console)
    report.print_summary(
        summary(reward_first=None, ece_last=None), console
    )  # nothing measured: still a table


def test_json_has_its_fields_in_order_first_and_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "demo.json"
    report.write_json({"seed": 3, **summary()}, path)
    report.write_json({"seed": 4, **summary(ece_last=float("nan"))}, path)
    data = json.loads(path.read_text())
    assert tuple(data)[: len(report.JSON_FIELDS)] == report.JSON_FIELDS
    assert (data["seed"], data["ece_last"], data["reward_last"]) == (4, None, 0.6123)
    assert [p.name for p in path.parent.iterdir()] == ["demo.json"]


def test_a_summary_without_a_field_is_no_file(tmp_path: Path) -> None:
    incomplete = summary()
    del incomplete["lost"]
    with pytest.raises(KeyError, match="lost"):
        report.write_json(incomplete, tmp_path / "demo.json")
    assert list(tmp_path.iterdir()) == []


def test_the_learning_curve_is_a_png(tmp_path: Path) -> None:
    samples = [Sample(i, i / 100, True, 0.3, 0.2, 0.5, i // 10, {"a": 0.2, "b": 0.1}) for i in range(60)]
    path = tmp_path / "curve.png"
    report.plot(samples, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert path.stat().st_size > 10_000


def test_a_chart_puts_high_values_above_low_ones() -> None:
    def rows_with_dots(value: float) -> list[int]:
        lines = chart([([value] * 40, "green")], width=20, height=5)
        return [row for row, line in enumerate(lines) if any(0x2800 < ord(c) <= 0x28FF for c in line.plain)]

    assert rows_with_dots(1.0) == [0]
    assert rows_with_dots(0.5) == [2]
    assert rows_with_dots(0.0) == [4]
    assert rows_with_dots(7.0) == [0]


def test_a_chart_fills_as_much_of_its_width_as_there_are_values_yet() -> None:
    def columns(values: int, total: int) -> int:
        [line] = chart([([0.5] * values, "green")], width=20, height=1, total=total)
        return sum(0x2800 < ord(c) <= 0x28FF for c in line.plain)

    assert columns(50, 100) == 10
    assert columns(100, 100) == 20
    assert columns(300, 100) == 20
    assert columns(0, 100) == 0


def test_the_picture_shows_its_figures_in_a_terminal_and_in_a_log() -> None:
    frame = Frame(
        phase="running",
        elapsed_s=45,
        seconds=90,
        interactions=700,
        expected=1400,
        replies=560,
        joined=540,
        reward=[0.2, 0.67],
        control=[0.3, 0.31],
        ema_loss=0.612,
        ece=0.08,
        versions={"inference-1": 80, "inference-2": 81},
        events_per_s=45.0,
        latency_ms=(420.0, 900.0),
    )
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    console.print(render(frame, 100))
    for shown in (
        "0.67",
        "0.31",
        "0.612",
        "inference-1 v80",
        "inference-2 v81",
        "540 of 560",
        "p99 900 ms",
        "45 s",
    ):
        assert shown in text_of(console)
    line = plain_line(frame)
    for shown in ("reward 0.67 (control 0.31)", "v80/v81", "p99 900 ms", "events/s 45"):
        assert shown in line
    assert "–" in plain_line(Frame())


def test_without_a_terminal_a_line_comes_every_few_seconds_and_at_each_phase() -> None:
    console = plain_console()
    with View(console).showing() as view:
        for tick in range(41):
            view.show(Frame(phase="running", elapsed_s=tick * 0.25))
        view.show(Frame(phase="draining", elapsed_s=10.1))
        view.log("inference-1 [is] ready")
    lines = text_of(console).splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [
        ["0", "s", "running"],
        ["5", "s", "running"],
        ["10", "s", "running"],
    ]
    assert "draining" in lines[3]
    assert lines[4] == "inference-1 [is] ready"


def test_with_a_terminal_the_picture_is_live() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with View(console).showing() as view:
        view.show(Frame(phase="running", interactions=77))
    assert "cortex demo" in text_of(console)
