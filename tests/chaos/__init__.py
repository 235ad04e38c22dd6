"""Chaos: agents under load on a whole stack, whose processes are killed, stopped and restarted at random.

    make chaos ROUNDS=100 SEED=0

`load` sends, `faults` breaks, `watch` measures how soon everything works again, `checks` compares all that is
stored with what was acknowledged; `rounds` puts them together, and `report` writes docs/chaos.md.
"""
