"""A method is one folder, one file of options, one page and one line of the table: a toy shows it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from runs import write_model

ROOT = Path(__file__).parents[2]
OPTIONS = '''"""Options of `fastrl toy`."""

from dataclasses import dataclass

from fastrl.config.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy(Run):
    """Imitates the last token of every demonstration."""

    last: int = 1
    """Tokens at the end of a demonstration that count."""
'''
METHOD = '''"""`fastrl toy`: supervised fine-tuning on the ends of demonstrations."""

from dataclasses import replace

from fastrl.algorithms import ALGORITHMS
from fastrl.batch.types import Batch
from fastrl.config import Sft
from fastrl.config.toy import Toy
from fastrl.methods.method import Context, Method, language_model
from fastrl.methods.sft.batches import Demonstrations, DemonstrationEncoder, demonstrations
from fastrl.report.metrics import LOGGED
from fastrl.train.objective import PolicyObjective


def choose(config):
    return ALGORITHMS["sft"]


def learner(context):
    objective = PolicyObjective(context.model, context.algorithm, context.temperature)
    return context.learner(objective, context.weights(context.model))


def source(context, learner):
    config, shape = context.config, context.model.config
    encode = DemonstrationEncoder(
        Sft(model=config.model), context.tokenizer, shape.max_position_embeddings, shape.vocab_size
    )
    items, size = demonstrations(encode, context.task)

    def ends(indices):
        samples = items(indices)
        return [
            replace(s, mask=[i >= len(s.mask) - config.last for i in range(len(s.mask))]) for s in samples
        ]

    drawn = Demonstrations(
        ends,
        size,
        count=config.prompts,
        algorithm=context.algorithm,
        seed=config.seed,
        device=context.device,
        world=context.world,
    )
    return drawn, encode.longest


METHOD = Method(
    choose=choose, load=language_model, learner=learner, source=source, metrics=LOGGED["sft"]
)
'''
LINE = '    "toy": ("fastrl.config.toy:Toy", "fastrl.methods.toy.method:METHOD"),\n'


def build(tree: Path) -> None:
    """A copy of the library with the toy in it."""
    shutil.copytree(
        ROOT / "fastrl", tree / "fastrl", symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    for linked in ("kernels", "bench"):
        (tree / linked).symlink_to(ROOT / linked)

    (tree / "fastrl/methods/toy").mkdir()
    (tree / "fastrl/methods/toy/method.py").write_text(METHOD)
    (tree / "fastrl/config/toy.py").write_text(OPTIONS)
    (tree / "docs").mkdir()
    (tree / "docs/toy.md").write_text("# fastrl toy\n")
    table = tree / "fastrl/methods/__init__.py"
    text = table.read_text()
    table.write_text(text.replace("METHODS = {", "METHODS = {\n" + LINE.rstrip("\n"), 1))


def changed(tree: Path) -> set[str]:
    """What differs from the library, files and folders by their first new name."""
    found = set()
    for path in (p for p in tree.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        name = path.relative_to(tree)
        if name.parts[0] in ("kernels", "bench") or name.parts[1:2] in (("kernels",), ("bench",)):
            continue
        ours = ROOT / name
        if name.parts[0] == "docs" or not ours.exists() or ours.read_bytes() != path.read_bytes():
            found.add(str(name))
    return found


def fastrl(tree: Path, *arguments: str) -> str:
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastrl", *arguments]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_toy_method_touches_four_places_and_trains(tmp_path):
    """Wrong implementations: a second table that has to know the command; a command line, a checkpoint or a
    report that only known commands have.
    """
    build(tmp_path)
    assert changed(tmp_path) == {
        "docs/toy.md",
        "fastrl/config/toy.py",
        "fastrl/methods/__init__.py",
        "fastrl/methods/toy/method.py",
    }

    assert "toy " in fastrl(tmp_path, "--help") and "--last" in fastrl(tmp_path, "toy", "--help")
    shared = ("--model", write_model(tmp_path), "--task", "cards", "--task-options", "k=2", "--prompts", "3")
    fastrl(tmp_path, "toy", *shared, "--steps", "2", "--last", "2", "--output-dir", "run", "--threads", "1")

    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["num_tokens"] for row in rows] == [6, 6] and all(row["loss"] > 0 for row in rows)
    assert (tmp_path / "run/checkpoints/step_2/model.safetensors").exists()
    assert (tmp_path / "run/report.html").exists()
