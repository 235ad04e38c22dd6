"""The auditor: checks that replay and the experiences topic contain exactly what acknowledged events imply.

    evidence = await collect(settings)      # reads topics, replay and weights
    report = audit(evidence)                # pure
    report.clean, report.counts, report.findings

It uses no metrics of the workers, and no code of theirs except the event models and the names of topics and
keys. Its join is a brute-force search by the rules, one reply after another; it is not optimised for speed.

    evidence   the input, as small values         reading   reads it from Kafka and Redis
    join       assigns replies to interactions    compare   finds what is lost, doubled or wrong
    versions   checks the chain of versions       report    counts and findings, as JSON and as text
"""
