"""The demonstration (`make demo`): from nothing to SFT to GRPO on the card game, measured on unseen prompts.

Every training run is a command a user could type, printed as it is run:

    fastrl sft   random weights -> the start, data parallel over two processes
    fastrl grpo  the start -> the method, trained on the verifier's reward
    fastrl sft   the start -> the control, trained on demonstrations for the same wall time on the other core

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
PROMPTS, SAMPLES = 800, 4  # unseen prompts, all of different problems, and sampled answers to each
FOLDERS = {START: "sft", CONTROL: "sft_continued", GRPO: "grpo"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed's three models on the test prompts, and the training time of each, s."""

    seed: int
    evaluations: dict[str, Evaluation]
    seconds: dict[str, float]

    def gain(self, arm: str) -> list[float]:
        """Per prompt, the arm's share of correct samples minus the start's."""
        before, after = self.evaluations[START].per_prompt(), self.evaluations[arm].per_prompt()
        return [b - a for a, b in zip(before, after, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration for one or several seeds, print the comparison and write the report."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m fastrl.bench.studies.demo", description=summary)
    output = "folder of the runs and the report (default: demo)"
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), help=output)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0 (default: 1)")
    parser.add_argument("--page", type=Path, help="page to rewrite the table of, such as docs/results.md")
    options = parser.parse_args(argv)

    began = time.monotonic()
    # threads that wait for each other spin, which is slow on a machine with other work
    torch.set_num_threads(1)
    folder = fresh(options.output_dir)
    try:
        outcomes = [run_seed(seed, folder / f"seed{seed}") for seed in range(options.seeds)]
        comparison = summarise(outcomes, folder)
        page = build_comparison(comparison, folder)
        if options.page is not None:
            write_block(options.page, demo_block(comparison), DEMO)
    except (UserError, subprocess.CalledProcessError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{as_text(comparison)}\n\n{time.monotonic() - began:.0f} s in all; the report is {page}")
    return 0


def fresh(folder: Path) -> Path:
    """`folder`, after renaming one that holds an earlier demonstration's runs."""
    if any(complete_checkpoints(run) for run in folder.glob("seed*/*")):
        number = next(n for n in range(1, 1000) if not folder.with_name(f"{folder.name}-{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}-{number}"))
    return folder


def run_seed(seed: int, folder: Path) -> Outcome:
    """Train the three models of one seed, and evaluate them."""
    began = time.monotonic()
    runs = {arm: folder / name for arm, name in FOLDERS.items()}
    shared = ["--threads", "1", "--seed", str(seed)]

    model = str(RECIPES / "cards.config.json")
    options = [*shared, "--model", model, "--output-dir", str(runs[START])]
    sft = command("sft", "cards_sft", *options, processes=CORES)
    finish(start(sft), sft)
    trained = time.monotonic()

    shared += ["--model", str(newest(runs[START]))]
    grpo = command("grpo", "cards_grpo", *shared, "--output-dir", str(runs[GRPO]))
    control = command("sft", "cards_sft_continued", *shared, "--output-dir", str(runs[CONTROL]))
    grpo_process, control_process = start(grpo), start(control, quiet=True)
    try:
        finish(grpo_process, grpo)
    finally:
        control_process.send_signal(signal.SIGTERM)  # it finishes its step and saves
        control_process.wait()
    done = time.monotonic()

    evaluations = {arm: test(run, seed) for arm, run in runs.items()}
    seconds = {START: trained - began, CONTROL: done - trained, GRPO: done - trained}
    return Outcome(seed, evaluations, seconds)


def command(name: str, recipe: str, *options: str, processes: int = 1) -> list[str]:
    """Python's arguments for a run; several processes are started by torchrun."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    config = str(RECIPES / f"{recipe}.yaml")
    return [*launcher, "-m", "fastrl", name, "--config", config, *options]


def start(call: Sequence[str], *, quiet: bool = False) -> subprocess.Popen[bytes]:
    """Print the command as a user would type it, and start it."""
    print(f"\n$ {' '.join(['python', *call])}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *call], stdout=subprocess.DEVNULL if quiet else None, env=environment
    )


def finish(process: subprocess.Popen[bytes], call: Sequence[str]) -> None:
    """Wait for the command.  Raises CalledProcessError when it fails."""
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
    evaluation = evaluate(
        sampler,
        task,
        split="test",
        prompts=PROMPTS,
        samples=SAMPLES,
        max_new_tokens=recipe.max_new_tokens,
        seed=seed,
    )
    save(evaluation, run / "test.json")
    return evaluation


def summarise(outcomes: Sequence[Outcome], folder: Path) -> Comparison:
    """Everything that the report shows, pooled over the seeds."""
    first = outcomes[0]
    notes = [
        f"Each prompt was answered greedily and {SAMPLES} times at temperature 1; "
        "differences are paired by prompt."
    ]
    if len(outcomes) > 1:
        notes.append(f"Curves and answers are those of seed {first.seed}.")
    later = [arm for arm in FOLDERS if arm != START]
    return Comparison(
        title="The card game: SFT, then GRPO",
        prompts=len(first.evaluations[START].greedy),
        seeds=[_seed(outcome, later) for outcome in outcomes],
        answers=_answers(first)[:5],
        runs={arm: folder / f"seed{first.seed}" / name for arm, name in FOLDERS.items()},
        gains={arm: pooled([outcome.gain(arm) for outcome in outcomes]) for arm in later},
        notes=notes,
    )


def _seed(outcome: Outcome, later: Sequence[str]) -> Seed:
    arms = []
    for name, evaluation in outcome.evaluations.items():
        greedy, sampled = evaluation.accuracy()
        arm = Arm(
            name=name,
            greedy=greedy,
            sampled=sampled,
            well_formed=evaluation.well_formed(),
            seconds=outcome.seconds[name],
        )
        arms.append(arm)
    before = outcome.evaluations[START].per_prompt()
    gains = {arm: paired_interval(before, outcome.evaluations[arm].per_prompt()) for arm in later}
    return Seed(seed=outcome.seed, arms=arms, gains=gains)


def _answers(outcome: Outcome) -> list[Answer]:
    """Every prompt, answered by the start and by GRPO."""
    before, after = outcome.evaluations[START], outcome.evaluations[GRPO]
    answers = []
    for i, example in enumerate(before.examples):
        text_before, score_before = before.greedy[i]
        text_after, score_after = after.greedy[i]
        answer = Answer(
            prompt=example.prompt,
            before=text_before,
            after=text_after,
            before_correct=score_before.correct,
            after_correct=score_after.correct,
        )
        answers.append(answer)
    return answers


def pooled(gains: Sequence[Sequence[float]]) -> Estimate:
    """The mean gain over all seeds with its interval over prompts.

    Every seed answers the same prompts, so a prompt's gains are averaged over the seeds first.
    """
    by_prompt = [sum(column) / len(column) for column in zip(*gains, strict=True)]
    return mean_interval(by_prompt)


if __name__ == "__main__":
    sys.exit(main())
