"""Data parallelism: two processes over gloo compute what one does.

The two processes run this file once, as a program, and leave what they found for the tests.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import actor_critic
import hybrids
import pytest
import torch
from configs import configured
from cotraining import joint
from fusion_runs import fusion
from runs import (
    GROUP,
    METHODS,
    SEED,
    decoder,
    demonstrations,
    dpo,
    drift,
    gradient,
    grpo,
    learner,
    lines,
    on_policy,
    relative,
    state,
    tokenizer,
    write_model,
)

import fastrl.run.generate
import fastrl.trainer
from fastrl import cli
from fastrl.algorithms import ALGORITHMS
from fastrl.algorithms.reward import REWARD_LOSSES
from fastrl.config import Eval, HeldOut, Optim, Reward, Run
from fastrl.parallel.world import World, init_world
from fastrl.run.evaluate import evaluate
from fastrl.run.lock import claimed
from fastrl.run.session import set_up
from fastrl.sampler import Sampler
from fastrl.tasks import Cards
from fastrl.train.source import Evaluable, order

ROOT = Path(__file__).parents[2]
# the one group of unequal rewards is the first process's
FIRST_ONLY = [float(i == GROUP * order(3, SEED, 0, 1)[0]) for i in range(12)]
PREFERENCES = ("dpo", "kto")
FUSED = {  # one step's offline pairs, minibatch of groups with members, on-policy pairs and lists
    "grpo_dpo": {"norms_every": 1, "pairs": 5},
    "grpo_pairs": {},
    "online_dpo": {"pairing": "all"},
    "group_softmax": {"anchor": "old"},
}
# others share what processes could get wrong
ALIKE = (
    "bnpo",
    "two_sided",
    "luspo",
    "sapo",
    "pass_at_k",
    "max_rl",
    "reinforce++",
)
SHARED = {name: row for name, row in METHODS.items() if name not in ALIKE}
MIXTURES: dict[str, dict[str, Any]] = {  # of hybrids: options of the source
    "hpt": {},
    "hpt_soft": {},
    "luffy": {},
    "srft": {"minibatches": 2},
    "mixed": {"correction": "token_truncate", "epochs": 2},
    "chord": {"prompts": 1},
    "chord_phi": {"known": (0,)},
}
REWARDED: dict[str, dict[str, Any]] = {  # of reward models: options of the run
    "bradley_terry": {"group": 3, "center": 0.1},
    "plackett_luce": {"group": 4},
    "outcome": {},
    "one group": {"prompts": 1},
}
RUN = {"steps": 3, "minibatches": 2, "epochs": 2, "kl_coef": 0.1, "eval": Eval(prompts=3)}


def findings(world: World, folder: Path) -> dict[str, Any]:
    """What is to be the same for any number of processes."""
    found: dict[str, Any] = {}
    for name, row in SHARED.items():
        model = decoder()
        source = demonstrations(world) if name == "sft" else on_policy(model, row, world=world)
        step = source.collect(0, 0)
        drift(model, 1e-3 if "gspo" in name else 0.03)
        found[name] = (*gradient(learner(model, row, 20, world=world), step.batches[0]), step.metrics)
    for name, options in {
        "refilled": {"refill": 2},
        "several rewards": {"multi_objective_aggregation": "normalize_then_sum", "overlong_buffer": 4},
        "one prompt": {"prompts": 1, "scores": range(12)},
        "first only": {"scores": FIRST_ONLY},
        "none": {"scores": [1.0] * 12},
    }.items():
        model = decoder()
        step = on_policy(model, ALGORITHMS["grpo"], world=world, **options).collect(0, 0)
        # a step without gradient would still decay the weights
        optim = Optim(lr=1e-2, eps=1e-2, weight_decay=0.1)
        metrics = learner(model, ALGORITHMS["grpo"], optim=optim, world=world).update(step.batches[0], 0)
        found[name] = (metrics, torch.cat([p.detach().flatten() for p in model.parameters()]), step.metrics)
    done = evaluate(
        Sampler(decoder(), tokenizer()),
        Cards(k=2),
        split="val",
        prompts=3,
        samples=2,
        max_new_tokens=6,
        world=world,
    )
    found["evaluation"] = ([e.prompt for e in done.examples], done.greedy, done.sampled)
    found["joint"] = joint_steps(folder)
    fastrl.trainer.train(grpo(folder, **RUN))
    return found | composed(world) | first_steps(folder) | {"commands": commands(world, folder)}


def commands(world: World, folder: Path) -> list[tuple[int, str, str]]:
    """Exit codes and what is said: completions of prompts, an evaluation, a file that is in use, no file."""
    if world.is_main:
        decoder().save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        (folder / "p.txt").write_text("7+\nK\na:7K>3|\n4-4\n99\n")
    world.barrier()
    complete = ["generate", "--model", f"{folder}/model", "--max-new-tokens", "6", "--n", "2", "--prompts"]
    judge = [
        "eval",
        "--model",
        f"{folder}/model",
        "--task",
        "cards",
        "--prompts",
        "3",
        "--max-new-tokens",
        "6",
    ]
    told = []
    with pytest.MonkeyPatch.context() as patch, claimed(folder / "held.jsonl", "--output", world):
        patch.setattr(fastrl.run.generate, "CHUNK", 2)
        for args in (
            [*complete, f"{folder}/p.txt", "--output", f"{folder}/out.jsonl"],
            judge,
            [*complete, f"{folder}/p.txt", "--output", f"{folder}/held.jsonl"],
            [*complete, f"{folder}/p.txt", "--output", f"{folder}/out.jsonl"],
            ["env"],
        ):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main(args)
            told.append((code, out.getvalue(), err.getvalue()))
    return told


def composed(world: World) -> dict[str, Any]:
    """Steps with a critic, and with demonstrations among the completions."""
    found: dict[str, Any] = {}
    for critic in ("separate", "shared"):
        made = actor_critic.learner(
            decoder(), actor_critic.row(critic=critic, reward_kl_coef=0.1), 20, world=world
        )
        step = actor_critic.source(made, kl_target=1.0, missing_eos_penalty=0.5).collect(0, 0)
        metrics, *grads = actor_critic.gradients(made, step.batches[0])
        found[f"ppo {critic}"] = (metrics, torch.cat(grads), step.metrics)
    for name, options in MIXTURES.items():
        model = decoder()
        row = hybrids.corrected(name, options.get("correction"))
        step = hybrids.mixture(model, row, world=world, **options).collect(0, 0)
        drift(model, 0.03)
        found[f"hybrid {name}"] = (
            *gradient(hybrids.learner(model, row, 30, world), step.batches[0]),
            step.metrics,
        )
    return found


def first_steps(folder: Path) -> dict[str, Any]:
    """First steps of runs on pairs, on both, and on comparisons."""
    slow: dict[str, Any] = {"optim": Optim(lr=1e-2, eps=1e-2)}
    runs: dict[str, Run] = {
        name: dpo(folder, name, algorithm=name, prompts=5, **slow) for name in PREFERENCES
    }
    runs |= {
        name: fusion(folder, name, algorithm=name, prompts=5, **slow, **options)
        for name, options in FUSED.items()
    }
    runs |= {
        name: reward(folder, name, **slow | {"prompts": 5} | options) for name, options in REWARDED.items()
    }
    return {f"first step of {name}": first_step(config) for name, config in runs.items()}


def reward(folder: Path, name: str, **changes: Any) -> Reward:
    """A run of reward models on the card game's pairs."""
    algorithm = name if name in REWARD_LOSSES else "bradley_terry"
    return configured(
        Reward,
        model=write_model(folder),
        task="cards",
        task_options=("k=2",),
        output_dir=str(folder / name),
        steps=3,
        algorithm=algorithm,
        micro_tokens=128,
        eval=HeldOut(prompts=5),
        **changes,
    )


def first_step(config: Run) -> tuple[dict[str, float], torch.Tensor]:
    """The metrics of a run's first step, with those of a reward model's evaluation after it, and the weights
    after it.
    """
    run = set_up(config)
    with run.log:
        step = run.source.collect(0, 0)
        metrics = run.learner.update(step.batches[0], 0)
        held_out = run.source.evaluate()[0] if isinstance(run.source, Evaluable) else {}
    return metrics | step.metrics | held_out, torch.cat(
        [p.detach().flatten() for p in run.context.model.parameters()]
    )


def joint_steps(folder: Path) -> list[tuple[dict[str, float], torch.Tensor, torch.Tensor, list[list[int]]]]:
    """Of a run's first steps: metrics, the weights of policy and reward model, and the calibration set."""
    smooth = Optim(lr=1e-2, eps=1e-2)
    run, out = (
        set_up(
            joint(
                folder,
                "joint",
                prompts=5,
                reward_every=2,
                offline_share=0.4,
                calibration=7,
                demonstrations=True,
                optim=smooth,
            )
        ),
        [],
    )
    with run.log:
        for number in range(3):
            step = run.source.collect(number, number)
            metrics = run.merge_metrics([run.learner.update(batch, number) for batch in step.batches])
            weights = [
                torch.cat([p.detach().flatten() for p in m.parameters()])
                for m in (run.context.model, run.learner.judge.model)
            ]
            out.append(
                (metrics | step.metrics, *weights, [g.tokens[0] for g in run.learner.judge.calibration])
            )
    return out


def child(folder: Path) -> None:
    world = init_world()
    found = findings(world, folder)
    r = world.rank
    found["world"] = (world.sum(r + 1, 0.5), world.max(-r, r), world.gather(["a"] * r), world.is_main)
    world.barrier()
    torch.save(found, folder / f"{r}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """Both processes' findings, and the folder with their run."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    call = [sys.executable, __file__, str(folder)]
    both = [
        subprocess.Popen(
            call, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    told = [p.communicate(timeout=120)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], "\n".join(told)
    return folder, [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("one")
    return folder, findings(World(), folder)


def test_shares_are_contiguous_and_even():
    """Wrong implementations: the remainder dropped, or all given to the last."""
    for n, R in ((10, 3), (2, 4), (0, 2), (7, 7)):
        shares = [list(World(r, R).share(n)) for r in range(R)]
        assert [i for s in shares for i in s] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_world_of_one_is_the_identity():
    world = World()
    assert (world.sum(1.5, 2), world.max(3.0), world.gather([1, 2]), world.is_main) == (
        [1.5, 2],
        [3.0],
        [1, 2],
        True,
    )
    world.barrier()


def test_joining_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert init_world() == World()


def test_sums_and_lists_of_two(two):
    assert [f["world"] for f in two[1]] == [
        ([3.0, 1.0], [0.0, 1.0], ["a"], True),
        ([3.0, 1.0], [0.0, 1.0], ["a"], False),
    ]


def assert_same_metrics(found: dict[str, float], want: dict[str, float]) -> None:
    """Sampler against trainer is rounding here, 1e-6 nats of it,
    which the shape of a matrix product changes.
    """
    rounding = [k for k in want if k.startswith("sampler_diff")]
    assert [found.pop(k) for k in rounding] == pytest.approx([want[k] for k in rounding], abs=1e-5)
    assert found == pytest.approx({k: v for k, v in want.items() if k not in rounding}, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "name", [*SHARED, "ppo separate", "ppo shared", *(f"hybrid {name}" for name in MIXTURES)]
)
def test_two_processes_have_the_loss_and_gradient_of_one(name, one, two):
    """Wrong implementations: gradients averaged where losses have global denominators; denominators of a
    process; other samples; advantages whitened, or a KL observed, over a process's own tokens; demonstrations
    of a share's prompts in the place of others', or prompts counted by a share.
    """
    metrics, gradients, rollout = one[1][name]
    for found in two[1]:
        assert relative(found[name][1], gradients) < 1e-5
        assert_same_metrics(found[name][0], metrics)
        assert found[name][2] == pytest.approx(rollout, rel=1e-4, abs=1e-6)
    assert torch.equal(two[1][0][name][1], two[1][1][name][1])


@pytest.mark.parametrize("name", ["refilled", "several rewards", "one prompt", "first only", "none"])
def test_a_process_whose_share_is_empty_or_without_signal_takes_part(name, one, two):
    """Wrong implementations: it waits for ever in another sum than the other process, or does not step."""
    metrics, weights, rollout = one[1][name]
    start = torch.cat([p.detach().flatten() for p in decoder().parameters()])
    assert torch.equal(weights, start) == (name == "none")
    for found in two[1]:
        assert torch.allclose(found[name][1], weights, atol=1e-6)
        assert_same_metrics(found[name][0], metrics)
        assert found[name][2] == pytest.approx(rollout, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", [*PREFERENCES, *FUSED, *REWARDED])
def test_a_step_of_comparisons_is_that_of_one_process(name, one, two):
    """Wrong implementations: reference log-probs in the order of the processes; a process that reads a file
    while the other computes; a baseline of mismatches within a share; a mean over a share's pairs, groups or
    verdicts; accuracy of a share; a process without a group that waits in another sum; norms of one process's
    part of a gradient.
    """
    metrics, weights = one[1][f"first step of {name}"]
    for found in two[1]:
        assert found[f"first step of {name}"][0] == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        assert torch.allclose(found[f"first step of {name}"][1], weights, atol=1e-6)


def test_joint_training_is_that_of_one_process(one, two):
    """Wrong implementations: a calibration set of each process's own; comparisons that wait in the process
    that drew them, or are learned from by all; offline ones twice; accuracy of a share; denominators of a
    share.
    """
    for found in two[1]:
        for (metrics, policy, reward, calibration), want in zip(found["joint"], one[1]["joint"], strict=True):
            assert metrics == pytest.approx(want[0], rel=1e-3, abs=1e-5)
            assert calibration == want[3]
            assert len(calibration) == 7
            assert torch.allclose(policy, want[1], atol=1e-5) and torch.allclose(reward, want[2], atol=1e-5)
    assert ["joint/loss" in metrics for metrics, *_ in one[1]["joint"]] == [False, True, False]


def test_an_evaluation_is_shared_and_whole_everywhere(one, two):
    assert [f["evaluation"] for f in two[1]] == [one[1]["evaluation"]] * 2


def test_a_run_of_two_processes_is_the_run_of_one(one, two):
    """Wrong implementations: minibatches made of other prompts; both processes writing the files; other
    weights on each.
    """
    a, b = (state(folder / "run/checkpoints/step_3") for folder in (one[0], two[0]))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    first, second = lines(one[0] / "run"), lines(two[0] / "run")
    assert len(first) == len(second) == 5, "three steps, and an evaluation at each end"
    for x, y in zip(first, second, strict=True):
        assert y == pytest.approx(x, rel=1e-3, abs=1e-5)
    samples = [(folder / "run/samples.jsonl").read_text() for folder in (one[0], two[0])]
    assert samples[0] == samples[1]


def test_commands_of_two_processes_write_and_say_what_one_does(one, two, monkeypatch):
    """Wrong implementations: every completion once per process; a table per process; a refusal that the other
    process waits for in vain; a file that one process cannot continue.
    """
    whole = (one[0] / "out.jsonl").read_bytes()
    assert (two[0] / "out.jsonl").read_bytes() == whole and whole.count(b"\n") == 10
    alone, (main, other) = one[1]["commands"], (found["commands"] for found in two[1])
    assert [code for code, *_ in main] == [code for code, *_ in other] == [0, 0, 1, 1, 0]
    assert [out for _, out, _ in main[:2]] == [out for _, out, _ in alone[:2]] and "accuracy" in main[1][1]
    assert "is in use by process" in main[2][2] and "exists already; continue it" in main[3][2]
    assert "torch threads" in main[4][1] and [out + err for _, out, err in other] == [""] * 5

    monkeypatch.setattr(fastrl.run.generate, "CHUNK", 2)
    (two[0] / "out.jsonl").write_bytes(whole[: len(whole) // 2])
    resume = ["generate", "--config", f"{two[0]}/out.jsonl.config.yaml", "--resume"]
    assert cli.main(resume) == 0 and (two[0] / "out.jsonl").read_bytes() == whole


if __name__ == "__main__":
    torch.manual_seed(0)
    child(Path(sys.argv[1]))
