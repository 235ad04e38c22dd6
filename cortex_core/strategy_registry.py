"""Strategies: the ways an agent can answer. Does not import torch, so that every worker can use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from cortex_core.errors import ConfigError, InputError

StrategySet = Literal["generic", "developer", "support"]


@dataclass(frozen=True, slots=True)
class StrategyProfile:
    """One way to answer, described for the agent that builds the prompt."""

    id: str
    name: str = ""
    description: str = ""
    prompt_framing: str = ""
    """Text placed before the task in the system prompt."""
    reasoning_style: str = "direct"
    """direct, chain_of_thought, exploratory, …; free text for the agent."""
    response_format: str = "prose"
    tool_permissions: tuple[str, ...] = ()
    """Tools the agent may use with this strategy; empty means its default permissions."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Additional data of the agent."""

    def __post_init__(self) -> None:
        if not self.id or self.id != self.id.strip():
            raise ConfigError(
                f"a strategy's id is {self.id!r}, expected a name without leading or trailing blanks"
            )
        if not self.name:
            object.__setattr__(self, "name", self.id.replace("_", " ").capitalize())


class StrategyRegistry:
    """The ordered strategies of one model; the index of a strategy is its row in the selector.

    Args:
        strategies: None means the seven generic strategies.

    Raises:
        ConfigError: no strategy, or a duplicate id.
    """

    def __init__(self, strategies: Iterable[StrategyProfile] | None = None) -> None:
        self._profiles: list[StrategyProfile] = []
        self._index: dict[str, int] = {}
        for profile in _GENERIC if strategies is None else strategies:
            self.add(profile)
        if not self._profiles:
            raise ConfigError("a StrategyRegistry needs at least one strategy")

    @classmethod
    def from_set(cls, name: StrategySet) -> StrategyRegistry:
        """A built-in set: `generic`, `developer` or `support`."""
        if name not in _SETS:
            raise ConfigError(f"unknown strategy set {name!r}, expected one of {', '.join(_SETS)}")
        return cls(_SETS[name])

    @classmethod
    def from_ids(cls, ids: Iterable[str]) -> StrategyRegistry:
        """Profiles for these ids in this order; an id without a built-in profile gets an empty one."""
        known = {profile.id: profile for profiles in _SETS.values() for profile in profiles}
        return cls(known.get(id_) or StrategyProfile(id_) for id_ in ids)

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids, in order."""
        return tuple(profile.id for profile in self._profiles)

    def add(self, profile: StrategyProfile) -> None:
        """Appends a profile. An existing selector keeps its number of rows: create a new one."""
        if profile.id in self._index:
            raise ConfigError(f"duplicate strategy {profile.id!r}")
        self._index[profile.id] = len(self._profiles)
        self._profiles.append(profile)

    def id_to_index(self, strategy_id: str) -> int:
        """The index of a strategy.

        Raises:
            InputError: unknown id.
        """
        try:
            return self._index[strategy_id]
        except KeyError:
            raise InputError(
                f"unknown strategy {strategy_id!r}, expected one of {', '.join(self._index)}"
            ) from None

    def get_by_id(self, strategy_id: str) -> StrategyProfile:
        """The profile with this id; raises `InputError` for an unknown id."""
        return self._profiles[self.id_to_index(strategy_id)]

    def __getitem__(self, index: int) -> StrategyProfile:
        return self._profiles[index]

    def __iter__(self) -> Iterator[StrategyProfile]:
        return iter(self._profiles)

    def __len__(self) -> int:
        return len(self._profiles)

    def __contains__(self, strategy_id: object) -> bool:
        return strategy_id in self._index

    def __repr__(self) -> str:
        return f"StrategyRegistry({', '.join(self.ids)})"


def _profile(
    id_: str, description: str, framing: str, reasoning: str, form: str, *tools: str
) -> StrategyProfile:
    return StrategyProfile(
        id_,
        description=description,
        prompt_framing=framing,
        reasoning_style=reasoning,
        response_format=form,
        tool_permissions=tools,
    )


_GENERIC = (
    _profile(
        "deep_research",
        "Gather evidence from several sources before answering",
        "Research this thoroughly. Compare sources, and say what is certain and what is not.",
        "chain_of_thought",
        "report with sources",
        "search",
        "read",
    ),
    _profile(
        "quick_answer",
        "Answer at once, in one or two sentences",
        "Answer in one or two sentences. No introduction.",
        "direct",
        "short prose",
    ),
    _profile(
        "clarify_first",
        "Ask before acting when the request is open to more than one reading",
        "Before answering, ask the one question whose answer would change what you do.",
        "exploratory",
        "one question",
    ),
    _profile(
        "step_by_step",
        "Lead through numbered steps",
        "Give numbered steps. Each step is one action and says what the user should then see.",
        "chain_of_thought",
        "numbered list",
    ),
    _profile(
        "summarize",
        "Condense what there is",
        "Summarise the essentials. Leave out what the user already knows.",
        "direct",
        "bullet list",
        "read",
    ),
    _profile(
        "creative",
        "Offer original ideas and several options",
        "Offer several different ideas, the unusual ones included.",
        "divergent",
        "list of options",
    ),
    _profile(
        "empathize",
        "Acknowledge the user's state first, then help",
        "First show in one sentence that you understand how the user feels. Then help, calmly.",
        "reflective",
        "warm prose",
    ),
)

_DEVELOPER = (
    _profile(
        "explain_code",
        "Explain what code does and why",
        "Explain the code from its purpose down to the lines that matter.",
        "chain_of_thought",
        "prose with code",
        "read",
    ),
    _profile(
        "write_code",
        "Write the code that was asked for",
        "Write complete, working code in the project's style. Explain only what surprises.",
        "direct",
        "code",
        "read",
        "write",
    ),
    _profile(
        "debug",
        "Find the cause of a failure before changing anything",
        "Reproduce, form a hypothesis, test it, then fix the cause and not the symptom.",
        "chain_of_thought",
        "diagnosis and patch",
        "read",
        "run",
        "write",
    ),
    _profile(
        "review",
        "Judge a change",
        "Review for correctness first, then for simplicity. Name file and line.",
        "chain_of_thought",
        "list of findings",
        "read",
    ),
    _profile(
        "design",
        "Weigh designs before any code",
        "Compare two or three designs by their trade-offs and recommend one.",
        "exploratory",
        "comparison",
        "read",
        "search",
    ),
    _profile(
        "run_command",
        "Do it with tools and report",
        "Do the task with the tools you have and report what changed.",
        "direct",
        "short report",
        "read",
        "run",
        "write",
    ),
    _profile("quick_answer", "Answer at once", "Answer in one or two sentences.", "direct", "short prose"),
)

_SUPPORT = (
    _profile(
        "resolve",
        "Solve the customer's problem in this reply",
        "Solve the problem in this reply, with the exact steps.",
        "direct",
        "numbered list",
        "account",
        "orders",
    ),
    _profile(
        "troubleshoot",
        "Narrow the fault down with the customer",
        "Narrow the fault down: one check at a time, the likeliest cause first.",
        "chain_of_thought",
        "one step",
        "account",
    ),
    _profile(
        "clarify_first",
        "Ask for the missing fact",
        "Ask for the one fact that is missing.",
        "exploratory",
        "one question",
    ),
    _profile(
        "empathize",
        "Calm an upset customer, then help",
        "Acknowledge the trouble in one sentence without excuses, then help.",
        "reflective",
        "warm prose",
    ),
    _profile(
        "policy",
        "Explain what the rules allow",
        "State what the policy allows in plain words, and the best option it leaves.",
        "direct",
        "short prose",
        "read",
    ),
    _profile(
        "escalate",
        "Hand over to a person",
        "Say that a person takes over, when, and what they will already know.",
        "direct",
        "short prose",
        "handover",
    ),
)

_SETS: dict[str, tuple[StrategyProfile, ...]] = {
    "generic": _GENERIC,
    "developer": _DEVELOPER,
    "support": _SUPPORT,
}
