"""The auditor: whether what was acknowledged is what replay and the experiences topic hold.

    evidence = await collect(settings)      # topics, replay, weights, as they stand
    report = audit(evidence)                # pure
    report.clean, report.counts, report.findings

It trusts no counter of the workers and shares no code with them but the event models and the names of
topics and keys. Its join is a plain search by the rules, reply by reply; speed is not its aim.

    evidence   what is read, as small values      reading   reads it from Kafka and Redis
    join       which reply belongs where          compare   what is lost, doubled or wrong
    versions   the chain of weights versions      report    counts and findings, as JSON and as text
"""
