"""The deal of faults and the figures, without a stack."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

from tests.chaos.faults import Fault, dealt
from tests.chaos.report import Run, markdown
from tests.chaos.rounds import Round
from tests.chaos.watch import Recovery


def test_every_fault_comes_equally_often_and_the_same_seed_deals_the_same() -> None:
    rounds = [*islice(dealt(random.Random(3)), 1000)]
    counts = Counter(fault for faults in rounds for fault in faults)
    assert len(counts) == 15
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {len(faults) for faults in rounds} == {1, 2}
    assert all(len({fault.kind for fault in faults}) == len(faults) for faults in rounds)
    assert rounds == [*islice(dealt(random.Random(3)), 1000)]


def test_the_page_has_the_recovery_from_single_faults_and_what_deviated() -> None:
    joiner, redis = Fault("kill -9", "joiner"), Fault("kill -9", "redis")
    rounds = [
        Round(1, (joiner,), Recovery(6.0, 1.0, 0.1), events=100, seconds=9.0),
        Round(2, (joiner,), Recovery(8.0, 1.0, 0.1), events=200, seconds=9.0),
        Round(3, (joiner, redis), Recovery(60.0, 1.0, 0.1), events=1300, seconds=11.0),
    ]
    page = markdown(Run(rounds, seed=7, failed_calls=2, seconds=29.0))
    assert "make chaos ROUNDS=3 SEED=7" in page
    assert "Result: no deviation" in page
    assert "| joiner | replies are joined in every partition | 2 | 7.0 | 8.0 | ≤ 10 s |" in page
    assert "| redis | replies are joined in every partition | 0 | - | - | ≤ 10 s |" in page
    assert "| distinct events | 1,300 |" in page

    rounds[2].deviations.append("lost: r1")
    assert "Result: **deviations**" in markdown(Run(rounds, seed=7, failed_calls=2, seconds=29.0))
