"""Child processes: each in its own session, with a bounded log file, ending with its parent.

Restarts are the supervisor's task (`stack.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LOG_BYTES = 10_000_000
"""A larger log file is moved to NAME.log.1, which is overwritten."""


class Child:
    """One child process and its log file.

        child = Child("redis", [program, "redis.conf"], data / "logs" / "redis.log")
        child.start()
        ...
        await child.stop()

    Call `start` from a thread that lives longer than the child: the kernel kills the child when the thread
    that started it ends.
    """

    def __init__(
        self, name: str, command: Sequence[str], log_file: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log_file = log_file
        self.env = env
        """Added to the environment of this process."""
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def start(self) -> None:
        """Starts the command; appends to the log file."""
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            guard = Path(__file__).with_name("guard.py")
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(guard), str(os.getpid()), *self.command],
                # Without PR_SET_PDEATHSIG, the closing of this pipe tells the child that its parent has
                # ended.
                stdin=subprocess.DEVNULL if sys.platform == "linux" else subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(self.env or {})},
                # Ctrl-C goes to the foreground process group. In their own session the children do not get
                # it, so that the parent determines the order in which they stop.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id; 0 before the start."""
        return self._process.pid if self._process else 0

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def ending(self) -> str:
        """How it ended, as part of a message."""
        code = self._process.poll() if self._process else None
        if code is None:
            return "is running" if self._process else "was not started"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    @property
    def returncode(self) -> int | None:
        return self._process.poll() if self._process else None

    async def stop(self, grace_s: float = 8.0) -> bool:
        """Sends SIGTERM, and after `grace_s` SIGKILL to its session. Returns whether it ended in time."""
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            if not self.alive:
                return True
            await asyncio.sleep(0.02)
        self.kill()
        return False

    def signal(self, number: int) -> None:
        """Sends a signal; does nothing if the process has ended."""
        if self._process:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Sends SIGKILL to the process and its session, and waits until it ends."""
        if self._process and self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def log_text(self) -> str:
        """The log of this run so far."""
        try:
            with self.log_file.open("rb") as log:
                log.seek(min(self._log_start, self.log_file.stat().st_size))
                return log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of this run's log, indented, for an error message."""
        tail = self.log_text().splitlines()[-lines:]
        return "\n".join(f"    {line}" for line in tail) or "    (the log is empty)"

    def rotate_log(self, limit: int = LOG_BYTES) -> None:
        """Limits the log file to `limit` bytes, and keeps one older file.

        The file is copied and truncated, because the child has it open in append mode. Lines written between
        the two steps are lost.
        """
        with contextlib.suppress(FileNotFoundError):
            if self.log_file.stat().st_size > limit:
                shutil.copyfile(self.log_file, self.log_file.with_suffix(".log.1"))
                os.truncate(self.log_file, 0)
                self._log_start = 0
