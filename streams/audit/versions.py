"""The chain of weights versions: each model's numbers grow, each version stands on the one before. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from streams.audit.evidence import Version
from streams.audit.report import Report


def check_versions(versions: Iterable[Version], report: Report) -> None:
    """Finds forks. The log is compacted: versions may be missing, and what is left must still agree.

    Args:
        versions: in the order of the log.
    """
    newest: dict[str, Version] = {}
    for version in versions:
        report.counts["versions"] += 1
        before = newest.get(version.model_id)
        if problem := _problem(version, before):
            report.find("fork", version.model_id, f"version {version.version}", problem)
        if before is None or version.version > before.version:
            newest[version.model_id] = version
    for model_id, version in newest.items():
        model = report.models.setdefault(model_id, {})
        model |= {"version": version.version, "learned": version.learned}


def _problem(version: Version, before: Version | None) -> str:
    """Why a version cannot follow `before`, the newest one of its model so far; empty where it can."""
    if version.parent is not None and version.parent >= version.version:
        return f"its parent is {version.parent}"
    if before is None:
        return ""
    if version.version <= before.version:
        return f"it stands after version {before.version}"
    if version.parent is None or version.parent < before.version:
        return f"its parent is {version.parent}, and version {before.version} stands before it"
    back = [name for name, offset in version.consumed.items() if offset < before.consumed.get(name, 0)]
    if back:
        return (
            f"it has read {back[0]} up to {version.consumed[back[0]]}, version {before.version} already up "
            f"to {before.consumed[back[0]]}: something was learned twice"
        )
    return ""
