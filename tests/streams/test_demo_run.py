"""`cortex demo` as it is: real servers, real workers, simulated users, and everything counted."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from cortex_core.errors import ConfigError
from streams.demo import report
from streams.demo.run import run_demo
from streams.demo.users import Users
from streams.settings import Settings
from streams.testing import wait_for
from tests.streams.test_embedded import gone

SECONDS, RATE, SEED = 12.0, 6.0, 3


def test_it_loads_no_torch_in_its_own_process() -> None:
    code = "import sys, streams.demo.run; print(sorted(m for m in sys.modules if m.split('.')[0] == 'torch'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


@pytest.mark.parametrize(("seconds", "rate"), [(0.0, 5.0), (5.0, -1.0), (0.1, 0.1)])
def test_a_run_without_traffic_is_refused_before_anything_starts(
    seconds: float, rate: float, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"demo expects|no interaction"):
        run_demo(Settings.load(data=tmp_path), seconds=seconds, rate=rate)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_a_short_run_loses_nothing_and_says_what_it_measured(settings: Settings, tmp_path: Path) -> None:
    figures, curve = tmp_path / "out" / "demo.json", tmp_path / "out" / "demo.png"
    shown = io.StringIO()
    summary = run_demo(
        settings,
        seconds=SECONDS,
        rate=RATE,
        seed=SEED,
        json_path=figures,
        plot_path=curve,
        console=Console(file=shown, width=120),
    )
    assert json.loads(figures.read_text()).keys() == summary.keys()
    assert set(report.JSON_FIELDS) <= set(summary)
    assert curve.read_bytes().startswith(b"\x89PNG")

    assert (summary["lost"], summary["duplicates"], summary["dead_letters"], summary["errors"]) == (
        0,
        0,
        0,
        0,
    )
    assert (summary["pending"], summary["unlearned"], summary["interrupted"]) == (0, 0, False)
    count = summary["interactions"]
    assert 0 < count <= round(SECONDS * RATE)  # a machine that is busy otherwise serves fewer
    assert summary["seconds"] > SECONDS - 1
    # Who is silent depends on the seed alone; how many reply twice depends on what was answered as well.
    users = Users(SEED)
    answered = sum(bool(users.react(users.request(i), "", ()).replies) for i in range(count))
    assert summary["joined"] == answered
    assert answered <= summary["replies"] <= 2 * answered
    assert (
        summary["reply_to_weights_ms"]["count"] == summary["replies"]
    )  # each became a revision, and was learned
    assert 0 < summary["reply_to_weights_ms"]["p50"] <= summary["reply_to_weights_ms"]["p99"]
    assert 0 < summary["versions"] <= summary["updates"]
    for name in ("reward_first", "reward_last", "reward_control", "memory_precision_first", "ece_last"):
        assert 0 <= summary[name] <= 1
    said = shown.getvalue()
    assert "draining" in said
    assert report.verdict(summary)[:20] in said


@pytest.mark.integration
def test_ctrl_c_ends_it_early_with_a_summary_and_leaves_nothing_behind(
    settings: Settings, tmp_path: Path
) -> None:
    figures, output = tmp_path / "demo.json", tmp_path / "output"
    with output.open("w") as out:
        demo = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "streams.cli",
                "demo",
                "--seconds",
                "600",
                "--rate",
                "6",
                "--json",
                str(figures),
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings.environment()},
            start_new_session=True,
        )
    try:

        def running() -> bool:
            assert demo.poll() is None, output.read_text()
            shown = re.findall(r"running +interactions (\d+)", output.read_text())
            return bool(shown) and int(shown[-1]) > 10

        wait_for(running, "the users to talk")
        children = psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(signal.SIGINT)
        assert demo.wait() == 0, output.read_text()
    finally:
        demo.kill()
        demo.wait()
    assert len(children) >= 4  # joiner, trainer, two inference workers
    assert all(gone(child.pid) for child in children)
    summary = json.loads(figures.read_text())
    assert summary["interrupted"]
    assert 10 < summary["interactions"] < 3000
    assert (summary["lost"], summary["duplicates"], summary["errors"]) == (0, 0, 0)
