"""Does every method learn?  Every method from one SFT start, with several seeds (`make learning`).

    python -m fastrl.bench.studies.learning

Each row of METHODS is a command with its recipe, so that the study measures what a user would run; all
on-policy methods have the same budget of completions.  Finished runs, those with a result.json, are left
alone, and stopped runs resume.  Differences to the start are on the test split, paired by prompt; no choice
was made on it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastrl.bench.ledger import identity
from fastrl.bench.studies.demo import PROMPTS, RECIPES, SAMPLES, command
from fastrl.bench.studies.gsm8k_reward import prepare
from fastrl.bench.studies.learning_table import RESULT, START, as_text, gather, publish
from fastrl.bench.studies.margins import margins, reward_margins
from fastrl.config import Grpo
from fastrl.config.parse import load, resolve
from fastrl.errors import UserError
from fastrl.methods import options_of
from fastrl.report.stats import wilson
from fastrl.run.checkpoint import complete_checkpoints
from fastrl.run.log import METRICS

GSM8K = "FASTRL_GSM8K"  # the environment's variable, as for --task gsm8k
CARDS = load(Grpo, RECIPES / "cards_grpo.yaml")
OPTIONS = CARDS.task_options
STEPS = 60  # of every on-policy method: 64 prompts x 8 completions each
UPDATES = 2 * STEPS  # of the control: as many as two minibatches a step give


# --- what is measured -------------------------------------------------------------------------------
def answers(checkpoint: Path, run: Path, seed: int) -> dict[str, Any]:
    """Correctness on the test split's prompts: of the greedy answer (P,), and the share of samples (P,)."""
    file = run / "test.json"
    call(
        "eval",
        "--model",
        str(checkpoint),
        "--task",
        "cards",
        "--task-options",
        *OPTIONS,
        "--prompts",
        str(PROMPTS),
        "--samples",
        str(SAMPLES),
        "--max-new-tokens",
        str(CARDS.max_new_tokens),
        "--seed",
        str(seed),
        "--threads",
        "1",
        "--output",
        str(file),
    )
    rows = json.loads(file.read_text(encoding="utf-8"))["answers"]
    return {
        "greedy": [float(r["greedy"]["correct"]) for r in rows],
        "sampled": [sum(s["correct"] for s in r["sampled"]) / len(r["sampled"]) for r in rows],
    }


def margin(checkpoint: Path, run: Path, seed: int) -> dict[str, Any]:
    """Log-probability of the correct answer minus the wrong one's, nats, on the test split's pairs (P,)."""
    found = margins(checkpoint, OPTIONS, split="test", count=PROMPTS)
    return {"margin": found} | answers(checkpoint, run, seed)


def preferred(checkpoint: Path, run: Path, seed: int) -> dict[str, Any]:
    """Share of the test split's pairs in which the correct answer has the higher reward.

    For all kinds of mistakes mixed, and by kind.
    """
    shares = {}
    for kind, found in reward_margins(checkpoint, OPTIONS, split="test", count=PROMPTS).items():
        correct, n = sum(m > 0 for m in found), len(found)
        shares[kind] = [correct / n, *wilson(correct, n)]
    return {"accuracy": shares.pop("mixed"), "kinds": shares}


def held_out(checkpoint: Path, run: Path, seed: int) -> dict[str, Any]:
    """Accuracy on pairs of held-out problems at the run's last evaluation; the interval is over problems."""
    lines = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if "eval/accuracy" in line][-1]
    return {"accuracy": [last[f"eval/accuracy{end}"] for end in ("", "_lo", "_hi")]}


# --- what is run ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Method:
    """A row of the study.

    options  set over the recipe's
    measure  of the last checkpoint: (checkpoint, run folder, seed) -> results
    start    a key of STARTS
    """

    command: str
    recipe: str
    options: tuple[str, ...] = ()
    measure: Callable[[Path, Path, int], dict[str, Any]] = answers
    start: str = "cards"


def _family(name: str) -> Method:
    return Method("grpo", "cards_grpo", ("--algorithm", name, *SHORT))


FAMILY = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce++", "gspo", "cispo", "gmpo", "sapo")
QUIET = ("--eval.prompts", "0")
SHORT = ("--steps", str(STEPS), *QUIET)
REWARDS = {"bradley_terry": "reward", "process": "process"}
METHODS: dict[str, Method] = {
    "sft continued": Method("sft", "cards_sft_continued", ("--steps", str(UPDATES))),
    **{name: _family(name) for name in FAMILY},
    "ppo": Method("ppo", "cards_ppo", SHORT),
    "hpt": Method("hybrid", "cards_hybrid", SHORT),
    "grpo_dpo": Method("hybrid", "cards_fusion", SHORT),
    "joint": Method("joint", "cards_joint", SHORT, start="judged"),
    "dpo": Method("dpo", "cards_dpo", QUIET, margin),
    **{
        f"reward, {row}": Method("reward", f"cards_{recipe}", QUIET, preferred)
        for row, recipe in REWARDS.items()
    },
    "reward, gsm8k": Method("reward", "gsm8k_reward", measure=held_out, start="gsm8k"),
}


# --- running ----------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done, print the table, and write it where the options say."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)
    folder, seeds = options.output_dir, range(options.seeds)
    try:
        needed = {METHODS[name].start for name in options.only}
        starts = {key: make(folder, seeds) for key, make in STARTS.items() if key in needed}
        for seed in seeds:  # seed by seed, so that a study that is stopped has complete seeds
            for name in options.only:
                method = METHODS[name]
                train(name, method, seed, starts[method.start], folder)

        commands = {name: [m.command, m.recipe, *m.options] for name, m in METHODS.items()}
        found = gather(folder, commands)
        print(as_text(found))
        publish(found, folder, options.results, options.page)
    except (UserError, subprocess.CalledProcessError) as error:
        print(f"learning: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m fastrl.bench.studies.learning", description=summary)

    def add(option: str, text: str, **settings: Any) -> None:
        parser.add_argument(option, help=text, **settings)

    default = Path("runs/learning")
    add("--output-dir", "folder of the runs (default: runs/learning)", type=Path, default=default)
    add("--seeds", "number of seeds, from 0 (default: 3)", type=int, default=3)
    names = f"some of: {', '.join(METHODS)}"
    add("--only", names, nargs="+", choices=METHODS, default=possible(), metavar="NAME")
    add("--results", "folder for learning-<date>.json, such as bench/results", type=Path)
    add("--page", "page to rewrite the table of, such as docs/results.md", type=Path)
    return parser


def possible() -> list[str]:
    """Every method that has its data."""
    if GSM8K in os.environ:
        return list(METHODS)
    left_out = [name for name, method in METHODS.items() if method.start == "gsm8k"]
    if left_out:
        folder = "the folder of train.jsonl and model_solutions.jsonl"
        print(f"without {', '.join(left_out)}: {GSM8K} does not name {folder}", file=sys.stderr)
    return [name for name in METHODS if name not in left_out]


def begin(folder: Path, seeds: Sequence[int]) -> list[str]:
    """The start of every method on the card game: seed 0 of the recipe, measured with every seed's noise."""
    start, _ = fit("sft", "cards_sft", folder / START, "--model", str(RECIPES / "cards.config.json"))
    for seed in seeds:
        record(folder / START / f"seed{seed}", partial(margin, start), START, seed)
    return ["--model", str(start)]


def begin_judged(folder: Path, seeds: Sequence[int]) -> list[str]:
    """The same start, and the reward model of joint training: seed 0 of its recipe, from that start."""
    start = begin(folder, seeds)
    judge, _ = fit("reward", "cards_reward", folder / "judge", *start, *QUIET)
    return [*start, "--reward-model", str(judge)]


def begin_reading(folder: Path, seeds: Sequence[int]) -> list[str]:
    """The start of reward models of word problems: a decoder trained on the training set's solutions."""
    data = folder / "gsm8k_data"
    if not (data / "groups.jsonl").is_file():
        if GSM8K not in os.environ:
            raise UserError(f"--only: {GSM8K} must name the folder of train.jsonl and model_solutions.jsonl")
        prepare(Path(os.environ[GSM8K]), data)
    tokenizer = ("--tokenizer", str(data / "tokenizer"))
    model = ("--model", str(RECIPES / "gsm8k_small.config.json"))
    solutions = ("--dataset", str(data / "solutions.jsonl"))
    start, _ = fit("sft", "gsm8k_read", folder / "gsm8k_read", *model, *solutions, *tokenizer)
    return ["--model", str(start), "--dataset", str(data / "groups.jsonl"), *tokenizer]


STARTS: dict[str, Callable[[Path, Sequence[int]], list[str]]] = {
    "cards": begin,
    "judged": begin_judged,
    "gsm8k": begin_reading,
}


def train(name: str, method: Method, seed: int, start: Sequence[str], folder: Path) -> None:
    """One seed of one method, from the start to its result."""
    stem = "".join(c if c.isalnum() or c in "+_" else "_" for c in name)
    run = folder / stem / f"seed{seed}"

    def work(run: Path, seed: int) -> dict[str, Any]:
        options = (*start, "--seed", str(seed), *method.options)
        last, seconds = fit(method.command, method.recipe, run, *options)
        return {"seconds": seconds} | method.measure(last, run, seed)

    record(run, work, name, seed)


def fit(name: str, recipe: str, run: Path, *options: str) -> tuple[Path, float | None]:
    """Train to the recipe's last step, resuming a stopped run: its checkpoint, and the CPU time, s.

    The time is None if the run, or its first part, was done before.  Raises UserError if it stopped again.
    """
    words = command(name, recipe, "--threads", "1", "--output-dir", str(run), *options)[2:]
    steps = resolve(options_of(name), words[1:]).steps
    last, before = run / "checkpoints" / f"step_{steps}", complete_checkpoints(run)
    if last in before:
        return last, None
    seconds = call(*words, *["--resume"][: len(before)])
    if last not in complete_checkpoints(run):
        raise UserError(f"{run}: stopped before step {steps}; run the same command again to continue")
    return last, None if before else seconds


def record(run: Path, work: Callable[[Path, int], dict[str, Any]], name: str, seed: int) -> None:
    """Write the result of `work` into the run's folder, with the commit it ran at; skipped if done before."""
    if (run / RESULT).is_file():
        return
    run.mkdir(parents=True, exist_ok=True)
    found = {"method": name, "seed": seed, "identity": identity(torch.device("cpu"))} | work(run, seed)
    (run / RESULT).write_text(json.dumps(found), encoding="utf-8")


def call(*arguments: str) -> float:
    """Run a command as a user would type it; returns its CPU time, s, which for one thread is its run time.

    Raises CalledProcessError when it fails.
    """
    print(f"$ fastrl {' '.join(arguments)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastrl", *arguments], stdout=subprocess.DEVNULL, env=environment
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
