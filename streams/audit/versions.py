"""Checks the chain of weights versions: they increase, and the parent of each is the previous one. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from streams.audit.evidence import Version
from streams.audit.report import Report


def check_versions(versions: Iterable[Version], report: Report) -> None:
    """Reports forks. As the topic is compacted, versions may be missing; the others must be consistent.

    Args:
        versions: in the order of the topic.
        report: gets the findings, and the newest version of each model.
    """
    newest: dict[str, Version] = {}
    for version in versions:
        if not version.version:
            newest.pop(version.model_id, None)
            continue
        report.counts["versions"] += 1
        before = newest.get(version.model_id)
        if problem := _problem(version, before):
            report.add("fork", version.model_id, f"version {version.version}", problem)
        if before is None or version.version > before.version:
            newest[version.model_id] = version
    for model_id, version in newest.items():
        model = report.models.setdefault(model_id, {})
        model |= {"version": version.version, "learned": version.learned}


def _problem(version: Version, before: Version | None) -> str:
    """Why a version cannot follow `before`, its model's newest one so far; empty if it can."""
    if version.parent is not None and version.parent >= version.version:
        return f"its parent is {version.parent}"
    if before is None:
        return ""
    if version.version <= before.version:
        return f"it is published after version {before.version}"
    if version.parent is None or version.parent < before.version:
        return f"its parent is {version.parent}, but version {before.version} was published before it"
    back = [name for name, offset in version.consumed.items() if offset < before.consumed.get(name, 0)]
    if back:
        return (
            f"it has consumed {back[0]} up to {version.consumed[back[0]]}, the earlier version "
            f"{before.version} up to {before.consumed[back[0]]}: experiences were learned twice"
        )
    return ""
