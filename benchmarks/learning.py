"""Quality of learning, compared with baselines.

    python -m benchmarks.learning --data ../shared/data/clinc150 --json learning.json --plot learning.png

Delayed progressive validation: every metric is over decisions that were made before their reply was known.
`benchmarks/README.md` describes the tasks and metrics.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import measures
from benchmarks.baselines import FullLabels, KernelUCB, LinUCB, Thompson, Uniform, VowpalWabbit
from benchmarks.cortex_learner import Ablation, CortexLearner
from benchmarks.measures import Run
from benchmarks.memory_baselines import Bilinear, ConstantConfidence, Cosine, KernelAndBilinear
from benchmarks.replies import BANKS
from benchmarks.sentences import Sentences, load
from benchmarks.tasks import Answer, Request, Settings, Task, World, make
from cortex_core.evaluation import Learner, progressive_validation
from cortex_core.feedback_collector import DEFAULT_EXTRACTOR, EXTRACTORS, Feedback

Maker = Callable[[Task, int], Learner[Request, Answer, Feedback]]
"""Creates a learner for a task and a seed."""

BANDITS: dict[str, Maker] = {
    learner.name: learner for learner in (Uniform, LinUCB, Thompson, VowpalWabbit, KernelUCB)
}
OURS: dict[str, Maker] = {CortexLearner.name: CortexLearner}
ABLATIONS: dict[str, Maker] = {
    "cortex without replay": partial(CortexLearner, ablation=Ablation(replay=False)),
    "cortex without the encoder's gradient": partial(
        CortexLearner, ablation=Ablation(encoder_gradient=False)
    ),
    "cortex without exploration": partial(CortexLearner, ablation=Ablation(exploration=False)),
    "cortex without soft ECE": partial(CortexLearner, ablation=Ablation(soft_ece=False)),
}
MEMORY = {learner.name: learner for learner in (Uniform, Cosine, Bilinear)}
CONFIDENCE = {learner.name: learner for learner in (ConstantConfidence, KernelAndBilinear)}


@dataclass(frozen=True, slots=True)
class Block:
    """One table: an environment, the learners and the metrics."""

    title: str
    world: World
    learners: dict[str, Maker]
    figures: Callable[[Run], dict[str, float | None]]
    headline: str
    curve: str


BLOCKS: dict[str, Block] = {
    "strategy": Block(
        "Strategy: accuracy",
        "strategy",
        OURS | BANDITS | {FullLabels.name: FullLabels},
        measures.strategy_figures,
        "accuracy_final",
        "right",
    ),
    "memory": Block(
        "Memory: precision@3 of 200",
        "memory",
        OURS | MEMORY,
        measures.memory_figures,
        "precision_final",
        "precision",
    ),
    "confidence": Block(
        "Confidence, strategy and memory together",
        "combined",
        OURS | CONFIDENCE,
        measures.confidence_figures,
        "satisfied_final",
        "satisfied",
    ),
    "switch": Block(
        "Switch: preferences change at half time",
        "strategy",
        OURS | {k: v for k, v in BANDITS.items() if k != Uniform.name},
        measures.switch_figures,
        "accuracy_final",
        "right",
    ),
    "ablations": Block(
        "Ablations, strategy and memory together",
        "combined",
        OURS | ABLATIONS,
        measures.ablation_figures,
        "satisfied_final",
        "satisfied",
    ),
}
SWITCHING = 0.4
"""Fraction of the kinds that change at half time in the task `switch`."""


@dataclass(frozen=True, slots=True)
class Source:
    """The source of the sentences."""

    data: Path | None
    encoder: str


@dataclass(frozen=True, slots=True)
class Job:
    """One learner on one seed of one block."""

    block: str
    learner: str
    seed: int
    settings: Settings
    source: Source


@lru_cache(maxsize=2)
def sentences_of(source: Source) -> Sentences:
    """The sentences, loaded once per process."""
    return load(source.data, encoder=source.encoder)


def run(job: Job) -> Run:
    """Evaluates one learner."""
    block = BLOCKS[job.block]
    task = make(block.world, sentences_of(job.source), job.settings, job.seed)
    learner = block.learners[job.learner](task, job.seed)
    steps = len(task.requests)
    right, precision, satisfied, chance, confidence = np.zeros((5, steps))
    began = time.process_time()
    for step in progressive_validation(task.requests, learner, task.reply, delay=job.settings.delay):
        outcome = task.outcome(step.request, step.answer)
        i = step.step
        right[i], precision[i], satisfied[i] = outcome.right, outcome.precision, outcome.satisfied
        chance[i] = outcome.chance
        confidence[i] = np.nan if step.answer.confidence is None else step.answer.confidence
    return Run(
        learner=job.learner,
        seed=job.seed,
        right=right,
        precision=precision,
        satisfied=satisfied,
        chance=chance,
        confidence=confidence,
        changed=task.changed,
        seconds=time.process_time() - began,
    )


def run_all(jobs: Sequence[Job], processes: int, console: Console) -> Iterator[tuple[Job, Run]]:
    """Runs all jobs, in this process or in several, with a progress bar or, without a terminal, log lines."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=len(jobs))

        def done(job: Job, result: Run) -> None:
            progress.update(bar, advance=1, description=f"{job.block}, seed {job.seed}: {job.learner}")
            if not console.is_terminal:
                block = BLOCKS[job.block]
                value = block.figures(result)[block.headline]
                read = ", oracle" if job.settings.oracle else ""
                line = f"{job.block}{read}, seed {job.seed}, {job.learner}: {block.headline} {value:.3f}"
                console.print(f"{line}, {result.seconds:.0f} s", highlight=False)

        if processes == 1:
            for job in jobs:
                progress.update(bar, description=f"{job.block}, seed {job.seed}: {job.learner}")
                result = run(job)
                done(job, result)
                yield job, result
            return
        # spawn: forking while torch and BLAS threads run is unsafe.
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
            futures = {pool.submit(run, job): job for job in jobs}
            for future in as_completed(futures):
                done(futures[future], future.result())
                yield futures[future], future.result()


def _one_thread() -> None:
    from threadpoolctl import threadpool_limits  # noqa: PLC0415 - comes with scikit-learn, in the extra `bench`

    threadpool_limits(1)


def blocks_of(args: argparse.Namespace) -> dict[str, tuple[str, Settings]]:
    """key in the JSON → (block, settings)."""
    base = Settings(
        steps=args.steps,
        kinds=args.kinds,
        strategies=args.strategies,
        silence=args.silence,
        noise=args.noise,
        replies=args.replies,
        extractor=args.extractor,
        groups=args.groups,
        memories=args.memories,
        delay=args.delay,
    )
    names = list(BLOCKS) if args.task == "all" else [args.task]
    out: dict[str, tuple[str, Settings]] = {}
    for name in names:
        settings = replace(base, switch=SWITCHING) if name == "switch" else base
        out[name] = (name, settings)
        if args.oracle_replies:
            out[f"{name}_oracle"] = (name, replace(settings, oracle=True))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    args = _parser().parse_args(argv)
    console = Console(stderr=True)
    source = Source(args.data, args.encoder)
    load(args.data, encoder=args.encoder, note=lambda m: console.print(m, style="dim"))
    blocks = blocks_of(args)
    only = None if args.only is None else {name.strip() for name in args.only.split(",")}
    if importlib.util.find_spec("vowpalwabbit") is None:
        console.print("Skipping Vowpal Wabbit: install cortex-streams[bench]", style="yellow")
        only = (only or {name for block in BLOCKS.values() for name in block.learners}) - {VowpalWabbit.name}
    jobs: dict[Job, str] = {}
    for key, (name, settings) in blocks.items():
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for learner in BLOCKS[name].learners:
                if only is None or learner in only:
                    jobs[Job(name, learner, seed, settings, source)] = key
    if not jobs:
        console.print(f"--only {args.only} matches no learner of {', '.join(blocks)}")
        return 2
    runs: dict[str, list[Run]] = {key: [] for key in blocks}
    began = time.perf_counter()
    _one_thread()
    for job, result in run_all(list(jobs), args.jobs, console):
        runs[jobs[job]].append(result)
    out = Console(width=None if sys.stdout.isatty() else 220)
    summaries: dict[str, Any] = {}
    titles: dict[str, Any] = {}
    for key, (name, settings) in blocks.items():
        block = BLOCKS[name]
        own = [r for learner in block.learners for r in runs[key] if r.learner == learner]
        if not own:
            continue
        summaries[key] = measures.summarize(own, block.figures, block.headline, block.curve)
        read = "replies read perfectly" if settings.oracle else f"replies read by {settings.extractor}"
        title = f"{block.title} ({read}; {args.seeds} seeds, {settings.steps} steps)"
        titles[title] = summaries[key]
        out.print(measures.table(title, summaries[key]))
    if args.json is not None:
        report = {
            "settings": {
                **{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "json"},
                "source": sentences_of(source).source,
                "world": asdict(next(iter(blocks.values()))[1]),
                "python": platform.python_version(),
                "cpus": os.cpu_count(),
                "seconds": round(time.perf_counter() - began, 1),
            },
            "tasks": summaries,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot is not None:
        measures.plot(titles, args.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder of CLINC150; default: generated sentences")
    add("--task", choices=[*BLOCKS, "all"], default="all")
    add("--seeds", type=int, default=5)
    add("--first-seed", type=int, default=0)
    add("--steps", type=int, default=3000)
    add("--only", help="comma-separated names of the learners to run")
    add("--strategies", type=int, default=7)
    add(
        "--kinds", type=int, default=50, help="kinds of request per seed, of 150 in CLINC150 or 100 generated"
    )
    add("--groups", type=int, help="groups of kinds that share helpful memories; default: one per area")
    add("--memories", type=int, default=200)
    add("--silence", type=float, default=0.3, help="fraction of users who do not comment on the answer")
    add("--noise", type=float, default=0.1, help="fraction of replies that contradict the truth")
    add("--replies", choices=list(BANKS), default="plain", help="bank of the users' replies")
    add(
        "--extractor",
        choices=sorted(EXTRACTORS),
        default=DEFAULT_EXTRACTOR,
        help="extractor that reads the replies",
    )
    add("--oracle-replies", action="store_true", help="add a block whose replies are read without errors")
    add("--delay", type=int, default=0, help="number of further decisions before a reply arrives")
    add("--encoder", default="minilm", help="minilm, hashing, hashing-DIM, a directory or a hub name")
    add("--jobs", type=int, default=1, help="number of processes")
    add("--json", type=Path, help="write metrics and curves to this file")
    add("--plot", type=Path, help="write the learning curves to this PNG file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
