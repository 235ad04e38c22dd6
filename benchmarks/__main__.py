"""Runs all benchmarks, or those named, in sequence: `python -m benchmarks [NAME …]`."""

from __future__ import annotations

import subprocess
import sys

ALL = (
    "learning",
    "feedback",
    "decision_speed",
    "joiner_throughput",
    "reply_to_weights",
    "inference_latency",
    "model_count",
)
"""Quality benchmarks first; then timings, which need an idle machine."""


def main(names: list[str]) -> int:
    """Runs the named benchmarks, or all; returns the number of failures."""
    unknown = set(names) - set(ALL)
    if unknown:
        print(f"unknown benchmark {', '.join(sorted(unknown))}, expected one of {', '.join(ALL)}")
        return 2
    failed = 0
    for name in names or ALL:
        print(f"\n== python -m benchmarks.{name}", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
