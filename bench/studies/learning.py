"""Does every method learn?  `python -m fastrl.bench.studies.learning` (`make learning`): one SFT start, every
method from it, several seeds.

Each row of METHODS is a command with its recipe, so that what is measured is what a user would type;
on-policy methods have one budget of completions.  What was done before is not done again: a run that has a
result.json is left alone, one that was stopped resumes.  The differences to the start are on the test split,
paired by prompt; nothing was chosen on it.
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
from fastrl.config import TRAINING, Grpo
from fastrl.config.parse import load, resolve
from fastrl.errors import UserError
from fastrl.report.stats import wilson
from fastrl.run.checkpoint import complete_checkpoints
from fastrl.run.log import METRICS

GSM8K = "FASTRL_GSM8K"  # the environment's variable, as for --task gsm8k
CARDS = load(Grpo, RECIPES / "cards_grpo.yaml")
OPTIONS = CARDS.task_options
STEPS = 60  # of every on-policy method: 64 prompts x 8 completions each
UPDATES = 2 * STEPS  # of the control: what two minibatches a step come to


# --- what is measured -------------------------------------------------------------------------------
def answers(checkpoint: Path, run: Path, seed: int) -> dict[str, Any]:
    """Right answers to the test split's prompts: greedy (P,), and the share of right samples (P,)."""
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
    """Of the test split's pairs: log-probability of the right answer less that of the wrong one, nats, by
    this model (P,).
    """
    return {"margin": margins(checkpoint, OPTIONS, split="test", count=PROMPTS)} | answers(
        checkpoint, run, seed
    )


def preferred(checkpoint: Path, run: Path, seed: int) -> dict[str, Any]:
    """Of the test split's pairs: the share in which the right answer has the higher reward, all kinds of
    mistakes mixed and by kind.
    """
    found = reward_margins(checkpoint, OPTIONS, split="test", count=PROMPTS)
    right = {kind: (sum(m > 0 for m in some), len(some)) for kind, some in found.items()}
    shares = {kind: [n / of, *wilson(n, of)] for kind, (n, of) in right.items()}
    return {"accuracy": shares.pop("mixed"), "kinds": shares}


def held_out(checkpoint: Path, run: Path, seed: int) -> dict[str, Any]:
    """Accuracy on the pairs of held-out problems, as the run's last evaluation has it; the interval is over
    problems.
    """
    lines = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if "eval/accuracy" in line][-1]
    return {"accuracy": [last[f"eval/accuracy{end}"] for end in ("", "_lo", "_hi")]}


# --- what is run ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Method:
    """A row: a command, its recipe, what is set otherwise, what is measured of its last checkpoint, and what
    it starts from.
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
    """Run what is not done, print the table, and write it where it is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m fastrl.bench.studies.learning", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/learning"),
        help="where the runs go (default: runs/learning)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, counted from 0 (default: 3)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=METHODS,
        default=possible(),
        metavar="NAME",
        help=f"some of: {', '.join(METHODS)}",
    )
    parser.add_argument("--results", type=Path, help="folder for learning-<date>.json, such as bench/results")
    parser.add_argument("--page", type=Path, help="page to rewrite the table of, such as docs/results.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        asked = {METHODS[name].start for name in options.only}
        starts = {
            k: make(options.output_dir, range(options.seeds)) for k, make in STARTS.items() if k in asked
        }
        for seed in range(options.seeds):  # seed by seed, so that a run that is stopped has whole seeds
            for name in options.only:
                train(name, METHODS[name], seed, starts[METHODS[name].start], options.output_dir)
        found = gather(
            options.output_dir, {name: [m.command, m.recipe, *m.options] for name, m in METHODS.items()}
        )
        print(as_text(found))
        publish(found, options.output_dir, options.results, options.page)
    except (UserError, subprocess.CalledProcessError) as error:
        print(f"learning: error: {error}", file=sys.stderr)
        return 1
    return 0


def possible() -> list[str]:
    """Every method whose data is there."""
    left_out = [] if GSM8K in os.environ else [name for name, m in METHODS.items() if m.start == "gsm8k"]
    if left_out:
        print(
            f"without {', '.join(left_out)}: {GSM8K} does not name the folder of train.jsonl and "
            "model_solutions.jsonl",
            file=sys.stderr,
        )
    return [name for name in METHODS if name not in left_out]


def begin(folder: Path, seeds: Sequence[int]) -> list[str]:
    """What every method on the card game starts from: seed 0 of the recipe,
    measured with every seed's noise.
    """
    start, _ = fit("sft", "cards_sft", folder / START, "--model", str(RECIPES / "cards.config.json"))
    for seed in seeds:
        record(folder / START / f"seed{seed}", partial(margin, start), START, seed)
    return ["--model", str(start)]


def begin_judged(folder: Path, seeds: Sequence[int]) -> list[str]:
    """The same start, and the reward model that joint training begins with: seed 0 of the recipe, from that
    start.
    """
    start = begin(folder, seeds)
    return [*start, "--reward-model", str(fit("reward", "cards_reward", folder / "judge", *start, *QUIET)[0])]


def begin_reading(folder: Path, seeds: Sequence[int]) -> list[str]:
    """What reward models of word problems start from: a decoder that has read the training set's
    solutions.
    """
    data = folder / "gsm8k_data"
    if not (data / "groups.jsonl").is_file():
        if GSM8K not in os.environ:
            raise UserError(f"--only: {GSM8K} must name the folder of train.jsonl and model_solutions.jsonl")
        prepare(Path(os.environ[GSM8K]), data)
    words = ("--tokenizer", str(data / "tokenizer"))
    own = ("--model", str(RECIPES / "gsm8k_small.config.json"), "--dataset", str(data / "solutions.jsonl"))
    start, _ = fit("sft", "gsm8k_read", folder / "gsm8k_read", *own, *words)
    return ["--model", str(start), "--dataset", str(data / "groups.jsonl"), *words]


STARTS: dict[str, Callable[[Path, Sequence[int]], list[str]]] = {
    "cards": begin,
    "judged": begin_judged,
    "gsm8k": begin_reading,
}


def train(name: str, method: Method, seed: int, start: Sequence[str], folder: Path) -> None:
    """One seed of one method, from the start to its result."""
    run = folder / "".join(c if c.isalnum() or c in "+_" else "_" for c in name) / f"seed{seed}"

    def work(run: Path, seed: int) -> dict[str, Any]:
        last, seconds = fit(method.command, method.recipe, run, *start, "--seed", str(seed), *method.options)
        return {"seconds": seconds} | method.measure(last, run, seed)

    record(run, work, name, seed)


def fit(name: str, recipe: str, run: Path, *options: str) -> tuple[Path, float | None]:
    """Train to the recipe's last step, going on from where the run was stopped: its checkpoint, and the CPU
    time, s.

    The time is None where the run, or its first part, was done before.  Raises UserError when it was stopped
    once more.
    """
    words = command(name, recipe, "--threads", "1", "--output-dir", str(run), *options)[2:]
    steps = resolve(TRAINING[name], words[1:]).steps
    last, before = run / "checkpoints" / f"step_{steps}", complete_checkpoints(run)
    if last in before:
        return last, None
    seconds = call(*words, *["--resume"][: len(before)])
    if last not in complete_checkpoints(run):
        raise UserError(f"{run}: stopped before step {steps}; the same command goes on from there")
    return last, None if before else seconds


def record(run: Path, work: Callable[[Path, int], dict[str, Any]], name: str, seed: int) -> None:
    """What `work` finds, written beside the run with the commit it ran at;
    nothing if that was done before.
    """
    if (run / RESULT).is_file():
        return
    run.mkdir(parents=True, exist_ok=True)
    found = {"method": name, "seed": seed, "identity": identity(torch.device("cpu"))} | work(run, seed)
    (run / RESULT).write_text(json.dumps(found), encoding="utf-8")


def call(*arguments: str) -> float:
    """Run a command as a user would type it; its CPU time, s: one thread, so the time that it takes alone.

    Raises CalledProcessError when it fails.
    """
    print(f"$ fastrl {' '.join(arguments)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "fastrl", *arguments],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
