"""The command `fastrl eval`: the accuracy of a model on a task, and of a search among its answers."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

from fastrl import ops
from fastrl.config import Evaluate
from fastrl.errors import UserError, require
from fastrl.model.adapter import load_model
from fastrl.model.tokenizer import load_tokenizer
from fastrl.parallel.device import resolve_device, set_threads
from fastrl.parallel.world import World, init_world
from fastrl.rewards.functions import Reward, load_reward
from fastrl.run.evaluate import Evaluation, SearchRow, candidates, evaluate, save, search_accuracy
from fastrl.run.kernels import say_kernels
from fastrl.run.lock import claimed
from fastrl.run.remembered import Plan, as_remembered
from fastrl.sampler import SAMPLERS
from fastrl.search import SEARCHES
from fastrl.tasks import Task, load_run_task, notes


def run(config: Evaluate) -> None:
    """The command `fastrl eval`; under torchrun the processes share the prompts and the first one reports."""
    world = init_world()
    with claimed(Path(config.output), "--output", world) if config.output else nullcontext():
        _run(config, world)


def _run(given: Evaluate, world: World) -> None:
    set_threads(given.threads)
    plan = as_remembered(given)
    config = plan.config
    device, dtype = resolve_device(config.device, config.dtype)
    task = load_run_task(config.task, config.task_options)
    if task is None:
        raise UserError(
            f"--task: expected a task to evaluate on, got none, and {config.model} is no checkpoint of a run "
            "with one"
        )
    _check_search(config, task)

    reward = None
    trust = config.trust_remote_code
    if config.reward is not None:
        reward = load_reward(config.reward, dtype=dtype, device=device, trust=trust)
    model = load_model(config.model, dtype=dtype, device=device, trust=trust)
    if world.is_main:
        say_kernels(model)
    tokenizer = load_tokenizer(
        config.tokenizer, config.model, task.tokenizer, template=config.chat_template, trust=trust
    )
    sampler = SAMPLERS["fastrl"](model, tokenizer, plan.sampling)
    with ops.exact() if plan.exact else nullcontext():
        evaluation = evaluate(
            sampler,
            task,
            split=plan.split,
            prompts=plan.prompts,
            samples=plan.samples,
            max_new_tokens=plan.max_new_tokens,
            seed=config.seed,
            world=world,
        )
    if world.is_main:
        _report(plan, evaluation, task, reward)


def _report(plan: Plan, evaluation: Evaluation, task: Task, reward: Reward | None) -> None:
    """Print the accuracies and the search's table, and write the file."""
    config = plan.config
    _print_accuracy(evaluation, plan, task)

    table: list[SearchRow] = []
    chosen: list[int] = []
    if config.search:
        found = candidates(evaluation, task, reward)
        table = search_accuracy(found, config.search)
        chosen = [SEARCHES[config.search].choose(c) for c in found]
    for row in table:
        accuracy = row["accuracy"]
        oracle = row["oracle"]
        interval = f"(95% interval {accuracy.lo:.1%} to {accuracy.hi:.1%})"
        name = f"{config.search} {row['n']:<4}"
        print(f"{name} {accuracy.mean:6.1%}  {interval}, oracle {oracle.mean:.1%}")
    if config.output:
        save(
            evaluation,
            Path(config.output),
            {"search": table} if table else {},
            chosen,
        )


def _print_accuracy(evaluation: Evaluation, plan: Plan, task: Task) -> None:
    for name, estimate in zip(("greedy", "sampled"), evaluation.accuracy(), strict=True):
        if not math.isnan(estimate.mean):
            interval = f"(95% interval {estimate.lo:.1%} to {estimate.hi:.1%})"
            print(f"{name:8} accuracy  {estimate.mean:6.1%}  {interval}")
    prompts = f"{len(evaluation.greedy)} prompts of {task.name}/{plan.split}"
    line = f"well-formed answers {evaluation.well_formed():.1%}; {prompts}, {plan.samples} samples each"
    print("\n".join([line, *notes(task, plan.split)]))


def _check_search(config: Evaluate, task: Task) -> None:
    search = SEARCHES.get(config.search or "")
    if search is None:
        expected = "none without a --search that judges samples by it"
        require(
            "--reward",
            config.reward,
            config.reward is None,
            expected,
        )
        return

    given = config.reward is not None or not search.reward
    require(
        "--reward",
        config.reward,
        given,
        f"model:FOLDER or file.py:fn for {config.search}",
    )
    require(
        "--samples",
        config.samples,
        config.samples is None or config.samples >= 1,
        "at least 1 to search in",
    )
    readable = not search.answer or hasattr(task, "answer")
    require(
        "--search",
        config.search,
        readable,
        f"another: {task.name} has no answer(completion)",
    )
