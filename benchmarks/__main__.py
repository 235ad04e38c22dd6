"""All benchmarks, one after the other: `python -m benchmarks [NAME …]`. Each is also a command of its own."""

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
)
"""Quality first; then what needs a machine with nothing else to do."""


def main(names: list[str]) -> int:
    """Runs those named, or all; returns how many failed."""
    unknown = set(names) - set(ALL)
    if unknown:
        print(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
        return 2
    failed = 0
    for name in names or ALL:
        print(f"\n== python -m benchmarks.{name}", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
