"""The result of an audit: counts and findings, as JSON and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["lost", "doubled", "wrong", "fork"]

COUNTS = {
    "acknowledged": "distinct events in the topics",
    "repeated": "duplicates of these events",
    "refused": "records with a dead letter",
    "uncommitted": "records that the joiners have not committed yet: not checked",
    "joined": "replies in an experience",
    "waiting": "replies that wait for their interaction",
    "orphaned": "replies whose interaction did not arrive in time",
    "late": "replies after their interaction's window",
    "excess": "replies above the maximum of an interaction",
    "moved": "replies first published with another interaction",
    "experiences": "interactions with an experience",
    "amended": "replies after the first of their interaction",
    "expired": "of these: without a reply",
    "misfits": "interactions that do not fit their model: dead letters, and not in replay",
    "open": "interactions whose window is open",
    "republished": "records of the experiences topic that repeat or amend another one",
    "forgotten": "events of forgotten conversations: not checked",
    "beyond": "interactions not checked: before --from, or before the retained events",
    "reused": "interactions not checked: several conversations have the same id",
    "versions": "versions on the weights topic",
    "lost": "acknowledged events that are missing in an output",
    "doubled": "replies that count more than once",
    "wrong": "experiences that differ from their events",
    "forks": "inconsistencies in the chain of weights versions",
}
"""Count → description; the last four are 0 in a clean report."""

FAULTS = ("lost", "doubled", "wrong", "forks")


@dataclass(frozen=True, slots=True)
class Finding:
    """One error."""

    kind: Kind
    model_id: str
    subject: str
    """The interaction, reply, version or record."""
    what: str

    def __str__(self) -> str:
        model = f" of model {self.model_id}" if self.model_id else ""
        return f"{self.kind}: {self.subject}{model}: {self.what}"


@dataclass(slots=True)
class Report:
    """The result of an audit."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    models: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each model: entries in replay, the newest version, and the number of experiences learned."""

    @property
    def clean(self) -> bool:
        """Whether nothing is lost, doubled, wrong or forked."""
        return not self.findings

    @property
    def pending(self) -> int:
        """Number of events still in progress; a later audit checks them."""
        return self.counts["uncommitted"] + self.counts["waiting"] + self.counts["open"]

    def add(self, kind: Kind, model_id: str, subject: str, what: str) -> None:
        """Adds an error."""
        self.findings.append(Finding(kind, model_id, subject, what))
        self.counts["forks" if kind == "fork" else kind] += 1

    def lines(self, most: int = 50) -> list[str]:
        """The report as text: every count that is not 0, every model, and the first findings."""
        shown = [name for name in COUNTS if self.counts[name] or name in FAULTS]
        out = [f"{self.counts[name]:>10,}  {name:<13}{COUNTS[name]}" for name in shown]
        for model_id, model in sorted(self.models.items()):
            out.append(f"model {model_id}: " + ", ".join(f"{name} {n:,}" for name, n in model.items()))
        out += [str(finding) for finding in self.findings[:most]]
        if len(self.findings) > most:
            out.append(f"and {len(self.findings) - most} more: --json shows all")
        out.append("clean" if self.clean else "NOT clean")
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain values: clean, counts, models, findings."""
        return {
            "clean": self.clean,
            "counts": {name: self.counts[name] for name in COUNTS},
            "models": self.models,
            "findings": [
                {"kind": f.kind, "model_id": f.model_id, "subject": f.subject, "what": f.what}
                for f in self.findings
            ],
        }
