"""The demonstration (`make demo`): from nothing to SFT to GRPO on the card game, measured on unseen prompts.

Every training run is a command a user could type, printed as it is run:

    fastrl sft   random weights -> an honest start, data parallel over two processes
    fastrl grpo  that start -> better, from the verifier's reward
    fastrl sft   that start -> the control: demonstrations for the same wall time, on the other core

Then all three answer the same unseen prompts, greedily and sampled, and the report compares them prompt by
prompt.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import fastrl.recipes
from fastrl.bench.results_page import write_block
from fastrl.bench.studies.demo_table import CONTROL, DEMO, GRPO, START, demo_block
from fastrl.config import Grpo
from fastrl.config.parse import load
from fastrl.errors import UserError
from fastrl.model.adapter import load_model
from fastrl.model.tokenizer import load_tokenizer
from fastrl.report.compare import Answer, Arm, Comparison, Seed, as_text, build_comparison
from fastrl.report.stats import Estimate, mean_interval, paired_interval
from fastrl.run.checkpoint import complete_checkpoints
from fastrl.run.evaluate import Evaluation, evaluate, save
from fastrl.sampler import Sampler
from fastrl.tasks import load_run_task

RECIPES = Path(fastrl.recipes.__path__[0])
CORES = min(2, os.cpu_count() or 1)
PROMPTS, SAMPLES = 800, 4  # unseen prompts, each another problem, and answers drawn for each
FOLDERS = {START: "sft", CONTROL: "sft_continued", GRPO: "grpo"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed's three models on the test prompts, and how long each was trained, s."""

    seed: int
    evaluations: dict[str, Evaluation]
    seconds: dict[str, float]

    def gain(self, arm: str) -> list[float]:
        """Per prompt, the arm's share of right samples less the start's."""
        pairs = zip(self.evaluations[START].per_prompt(), self.evaluations[arm].per_prompt(), strict=True)
        return [after - before for before, after in pairs]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration for one or several seeds, print the comparison and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m fastrl.bench.studies.demo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("demo"), help="where runs and report go (default: demo)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, counted from 0 (default: 1)")
    parser.add_argument("--page", type=Path, help="page to rewrite the table of, such as docs/results.md")
    options = parser.parse_args(argv)
    began = time.monotonic()
    # threads that wait for each other spin, and are slow on a machine that does anything else
    torch.set_num_threads(1)
    folder = fresh(options.output_dir)
    try:
        comparison = compare(
            [run_seed(seed, folder / f"seed{seed}") for seed in range(options.seeds)], folder
        )
        page = build_comparison(comparison, folder)
        if options.page is not None:
            write_block(options.page, demo_block(comparison), DEMO)
    except (UserError, subprocess.CalledProcessError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{as_text(comparison)}\n\n{time.monotonic() - began:.0f} s in all; the report is {page}")
    return 0


def fresh(folder: Path) -> Path:
    """`folder`, after making sure that no earlier demonstration's runs are in it."""
    if any(complete_checkpoints(run) for run in folder.glob("seed*/*")):
        number = next(n for n in range(1, 1000) if not folder.with_name(f"{folder.name}-{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}-{number}"))
    return folder


def run_seed(seed: int, folder: Path) -> Outcome:
    """Train the three models of one seed, and evaluate them."""
    began = time.monotonic()
    run = ["--seed", str(seed), "--output-dir"]
    one = ["--threads", "1", "--model"]
    sft = command(
        "sft",
        "cards_sft",
        *one,
        str(RECIPES / "cards.config.json"),
        *run,
        str(folder / FOLDERS[START]),
        processes=CORES,
    )
    finish(start(sft), sft)
    trained = time.monotonic()
    one.append(str(newest(folder / FOLDERS[START])))
    grpo = command("grpo", "cards_grpo", *one, *run, str(folder / FOLDERS[GRPO]))
    control = command("sft", "cards_sft_continued", *one, *run, str(folder / FOLDERS[CONTROL]))
    running, beside = start(grpo), start(control, quiet=True)
    try:
        finish(running, grpo)
    finally:
        beside.send_signal(signal.SIGTERM)  # it finishes its step and saves
        beside.wait()
    done = time.monotonic()
    evaluations = {arm: test(folder / name, seed) for arm, name in FOLDERS.items()}
    seconds = {START: trained - began, CONTROL: done - trained, GRPO: done - trained}
    return Outcome(seed, evaluations, seconds)


def command(name: str, recipe: str, *options: str, processes: int = 1) -> list[str]:
    """The command line of a run; over several processes through torchrun, which is this module."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    return [*launcher, "-m", "fastrl", name, "--config", str(RECIPES / f"{recipe}.yaml"), *options]


def start(call: Sequence[str], *, quiet: bool = False) -> subprocess.Popen[bytes]:
    """Print the command as a user would type it, and start it."""
    print(f"\n$ {' '.join(['python', *call])}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *call], stdout=subprocess.DEVNULL if quiet else None, env=environment
    )


def finish(process: subprocess.Popen[bytes], call: Sequence[str]) -> None:
    """Wait for the command; CalledProcessError when it fails."""
    if code := process.wait():
        raise subprocess.CalledProcessError(code, call)


def newest(run: Path) -> Path:
    return complete_checkpoints(run)[-1]


def test(run: Path, seed: int) -> Evaluation:
    """The run's newest checkpoint on the test split."""
    recipe = load(Grpo, RECIPES / "cards_grpo.yaml")
    task = load_run_task(recipe.task, recipe.task_options)
    if task is None:
        raise UserError("cards_grpo.yaml: expected a task, got none")
    checkpoint = newest(run)
    model = load_model(str(checkpoint), dtype=torch.float32, device=torch.device("cpu"))
    sampler = Sampler(model, load_tokenizer(None, str(checkpoint), task.tokenizer))
    done = evaluate(
        sampler,
        task,
        split="test",
        prompts=PROMPTS,
        samples=SAMPLES,
        max_new_tokens=recipe.max_new_tokens,
        seed=seed,
    )
    save(done, run / "test.json")
    return done


def compare(outcomes: Sequence[Outcome], folder: Path) -> Comparison:
    """Everything the report shows, pooled over the seeds."""
    later = [arm for arm in FOLDERS if arm != START]
    seeds = [
        Seed(
            seed=o.seed,
            arms=[
                Arm(
                    name=arm,
                    greedy=e.accuracy()[0],
                    sampled=e.accuracy()[1],
                    well_formed=e.well_formed(),
                    seconds=o.seconds[arm],
                )
                for arm, e in o.evaluations.items()
            ],
            gains={
                arm: paired_interval(o.evaluations[START].per_prompt(), o.evaluations[arm].per_prompt())
                for arm in later
            },
        )
        for o in outcomes
    ]
    first = outcomes[0]
    before, after = first.evaluations[START], first.evaluations[GRPO]
    rows = zip(before.examples, before.greedy, after.greedy, strict=True)
    answers = [
        Answer(prompt=e.prompt, before=b, after=a, before_correct=bs.correct, after_correct=as_.correct)
        for e, (b, bs), (a, as_) in list(rows)[:5]
    ]
    runs = {arm: folder / f"seed{first.seed}" / name for arm, name in FOLDERS.items()}
    notes = [
        f"Each prompt was answered greedily and {SAMPLES} times at temperature 1; "
        "differences are paired by prompt."
    ]
    notes += [f"Curves and answers are those of seed {first.seed}."] * (len(outcomes) > 1)
    return Comparison(
        title="The card game: SFT, then GRPO",
        prompts=len(before.greedy),
        seeds=seeds,
        answers=answers,
        runs=runs,
        gains={arm: pooled([o.gain(arm) for o in outcomes]) for arm in later},
        notes=notes,
    )


def pooled(gains: Sequence[Sequence[float]]) -> Estimate:
    """The mean gain over all seeds with its interval over prompts: the seeds' models answer the same prompts,
    so a prompt's gains are averaged over the seeds first.
    """
    return mean_interval([sum(column) / len(column) for column in zip(*gains, strict=True)])


if __name__ == "__main__":
    sys.exit(main())
