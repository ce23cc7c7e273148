"""The import graph is a ladder, every op has its test and its benchmark, and nobody takes Hugging Face's name.

Each rule is a function of sources, so that each is also shown to catch a planted violation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LADDER = (  # a module imports only from rungs above its own line in this list
    ("fastrl", "fastrl._C"),
    ("fastrl.kernels._*",),
    ("fastrl.kernels.*",),
    ("fastrl.ops",),
    ("fastrl.errors",),
    (
        "fastrl.config",
        "fastrl.config.*",
        "fastrl.types",
        "fastrl.files",
        "fastrl.options",
        "fastrl.device",
        "fastrl.model_config",
        "fastrl.weights",
        "fastrl.stats",
        "fastrl.plots",
        "fastrl.page",
        "fastrl.panels",
    ),
    (
        "fastrl.algorithms",
        "fastrl.algorithms.*",
        "fastrl.tasks",
        "fastrl.tasks.*",
        "fastrl.data",
        "fastrl.comparisons",
        "fastrl.reward_model",
        "fastrl.pairs",
        "fastrl.pack",
        "fastrl.prefix",
        "fastrl.model",
        "fastrl.adapter",
        "fastrl.checkpoint",
        "fastrl.dist",
        "fastrl.log",
        "fastrl.environment",
    ),
    (
        "fastrl.sampler",
        "fastrl.sampler.*",
        "fastrl.learner",
        "fastrl.reward_learner",
        "fastrl.critic",
        "fastrl.search",
        "fastrl.search.*",
        "fastrl.rewards",
        "fastrl.implicit_reward",
        "fastrl.refill",
        "fastrl.tokenizer",
        "fastrl.interrupt",
    ),
    ("fastrl.draw", "fastrl.batches", "fastrl.carry", "fastrl.dialogue", "fastrl.ppo_learner", "fastrl.joint_learner"),
    ("fastrl.experience", "fastrl.intake", "fastrl.known", "fastrl.reward_source"),
    ("fastrl.ppo_source", "fastrl.joint_source", "fastrl.preferences", "fastrl.mixture", "fastrl.supervised"),
    ("fastrl.reference", "fastrl.fusion"),
    ("fastrl.commands",),
    ("fastrl.setup", "fastrl.evaluate", "fastrl.generate", "fastrl.report", "fastrl.reward_report", "fastrl.compare"),
    ("fastrl.trainer", "fastrl.bench.*", "fastrl.integrations", "fastrl.integrations.*"),
    ("fastrl.recipes", "fastrl.recipes.*", "fastrl.pipeline"),
    ("fastrl.cli", "fastrl.__main__"),
)
SAME_RUNG = (  # (importer, imported) pairs that may share a rung; cycles are refused all the same
    ("fastrl.kernels._*", "fastrl.kernels._*"),
    ("fastrl.kernels.linear_*", "fastrl.kernels.token_logp"),
    ("fastrl.kernels.linear_*", "fastrl.kernels.linear_logp"),
    ("fastrl.kernels.rope", "fastrl.kernels.rms_norm"),
    ("fastrl.kernels.advance", "fastrl.kernels.sample"),
    ("fastrl.kernels.sample", "fastrl.kernels.token_logp"),
    ("fastrl.algorithms*", "fastrl.algorithms.*"),
    ("fastrl.config*", "fastrl.config.*"),
    ("fastrl.tasks*", "fastrl.tasks.*"),
    ("fastrl.sampler*", "fastrl.sampler.*"),
    ("fastrl.search*", "fastrl.search.*"),
    ("fastrl.integrations*", "fastrl.integrations.*"),
    ("fastrl.bench.*", "fastrl.bench.*"),
    ("fastrl.recipes*", "fastrl.recipes.*"),
    ("fastrl.page", "fastrl.plots"),
    ("fastrl.plots", "fastrl.stats"),
    ("fastrl.weights", "fastrl.files"),
    ("fastrl.adapter", "fastrl.model"),
    ("fastrl.pairs", "fastrl.data"),
    ("fastrl.compare", "fastrl.report"),
    ("fastrl.comparisons", "fastrl.data"),
    ("fastrl.comparisons", "fastrl.pairs"),
    ("fastrl.comparisons", "fastrl.algorithms.*"),
    ("fastrl.reward_model", "fastrl.adapter"),
    ("fastrl.reward_model", "fastrl.comparisons"),
    ("fastrl.reward_model", "fastrl.model"),
    ("fastrl.reward_model", "fastrl.pack"),
    ("fastrl.reward_learner", "fastrl.learner"),
    ("fastrl.reward_source", "fastrl.experience"),
    ("fastrl.reward_source", "fastrl.intake"),
    ("fastrl.known", "fastrl.intake"),
    ("fastrl.rewards", "fastrl.tokenizer"),
    ("fastrl.rewards", "fastrl.implicit_reward"),
    ("fastrl.implicit_reward", "fastrl.tokenizer"),
    ("fastrl.report", "fastrl.reward_report"),
    ("fastrl.__main__", "fastrl.cli"),
)
LAZY = {("fastrl.kernels._backend", "extension")}  # fastrl._C may be absent, and must be loaded after torch

Sources = dict[str, str]  # module name -> its text


# --- the rules --------------------------------------------------------------------------------------
def rung(module: str) -> int | None:
    return next((i for i, names in enumerate(LADDER) if any(fnmatch(module, n) for n in names)), None)


def imports(node: ast.AST, modules: Sources) -> Iterator[str]:
    """Every module of `modules` that the tree imports, and every other top-level name."""
    for x in ast.walk(node):
        if isinstance(x, ast.Import):
            yield from (a.name for a in x.names)
        elif isinstance(x, ast.ImportFrom):
            assert x.level == 0, "relative import"
            base = x.module or ""
            for a in x.names:
                full = f"{base}.{a.name}"
                yield full if full in modules or full == "fastrl._C" else base


def climbs(modules: Sources) -> list[str]:
    """Imports that go up the ladder, or along a rung without being listed; modules that have no rung."""
    bad = [f"{m}: no rung in LADDER" for m in modules if rung(m) is None]
    for module, text in modules.items():
        mine = rung(module)
        for name in imports(ast.parse(text), modules):
            theirs = rung(name) if name.split(".")[0] == "fastrl" else None
            if mine is None or theirs is None or theirs < mine or name == module:
                continue
            if theirs > mine or not any(fnmatch(module, a) and fnmatch(name, b) for a, b in SAME_RUNG):
                bad.append(f"{module} imports {name}")
    return bad


def cycle(modules: Sources) -> list[str]:
    graph = {m: {n for n in imports(ast.parse(text), modules) if n in modules and n != m} for m, text in modules.items()}
    for m in graph:  # a package that gathers its own parts is not a cycle with them
        graph[m] -= {n for n in graph[m] if m.startswith(n + ".")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def lazy(modules: Sources) -> list[str]:
    """Imports of our own modules inside functions: they hide a rung that does not hold."""
    bad = []
    for module, text in modules.items():
        for f in ast.walk(ast.parse(text)):
            if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) and (module, f.name) not in LAZY:
                bad += [f"{module}.{f.name} imports {n}" for n in imports(f, modules) if n.split(".")[0] == "fastrl"]
    return bad


def foreign(modules: Sources) -> list[str]:
    """Imports of the top-level name `kernels`, which belongs to Hugging Face."""
    return [f"{m} imports {n}" for m, text in modules.items() for n in imports(ast.parse(text), modules) if n.split(".")[0] == "kernels"]


def orphans(root: Path) -> list[str]:
    """Ops without tests/ops/test_<op>.py or bench/bench_<op>.py."""
    ops = [p.stem for p in sorted((root / "kernels").glob("*.py")) if not p.stem.startswith("_")]
    wanted = [path for op in ops for path in (f"tests/ops/test_{op}.py", f"bench/bench_{op}.py")]
    return [path for path in wanted if not (root / path).exists()]


# --- this repository --------------------------------------------------------------------------------
def sources() -> Sources:
    found = {}
    for folder, prefix in (("fastrl", "fastrl"), ("kernels", "fastrl.kernels"), ("bench", "fastrl.bench")):
        for path in sorted((ROOT / folder).rglob("*.py")):  # rglob does not follow the two links inside fastrl/
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "fastrl" and parts[0] in ("kernels", "bench"):
                continue
            name = ".".join((prefix, *(p for p in parts if p != "__init__")))
            found[name] = path.read_text(encoding="utf-8")
    return found


@pytest.mark.parametrize("rule", [climbs, cycle, lazy, foreign], ids=lambda f: f.__name__)
def test_the_ladder_holds(rule):
    assert rule(sources()) == []


def test_every_op_has_a_test_and_a_benchmark():
    assert orphans(ROOT) == []


def test_the_sources_are_all_seen():
    """Wrong implementation: a glob that misses a folder finds no violation."""
    assert {"fastrl", "fastrl.ops", "fastrl.kernels._check", "fastrl.kernels.token_logp", "fastrl.tasks", "fastrl.cli"} <= sources().keys()


# --- planted violations -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "rule, module, text",
    [
        (climbs, "fastrl.types", "from fastrl import trainer"),
        (climbs, "fastrl.types", "from fastrl.trainer import train"),
        (climbs, "fastrl.kernels.token_logp", "import fastrl.ops"),
        (climbs, "fastrl.kernels._check", "from fastrl.kernels.gae import gae"),
        (climbs, "fastrl.kernels.gae", "from fastrl.kernels.rope import rope"),
        (climbs, "fastrl.pack", "if TYPE_CHECKING:\n    from fastrl.model import Decoder"),
        (climbs, "fastrl.brand_new", ""),
        (cycle, "fastrl.tasks.cards", "from fastrl.tasks import load_task\nfrom fastrl.tasks.gsm8k import x"),
        (lazy, "fastrl.cli", "def main():\n    from fastrl.trainer import train"),
        (lazy, "fastrl.kernels._backend", "def pick():\n    from fastrl import _C"),
        (foreign, "fastrl.model", "import kernels.rope"),
        (foreign, "fastrl.model", "from kernels import rope"),
    ],
)
def test_a_planted_violation_is_caught(rule, module, text):
    others = dict.fromkeys(("fastrl", "fastrl.ops", "fastrl.trainer", "fastrl.model", "fastrl.tasks"), "")
    others["fastrl.tasks.gsm8k"] = "from fastrl.tasks.cards import y"
    assert rule(others | {module: text}) != []
    assert (
        rule({"fastrl.learner": "import torch\nfrom fastrl import ops\nfrom fastrl.pack import plan", "fastrl.pack": "", "fastrl.ops": ""})
        == []
    )


def test_an_op_without_test_or_benchmark_is_caught(tmp_path):
    for path in ("kernels/_check.py", "kernels/new.py", "tests/ops/test_new.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert orphans(tmp_path) == ["bench/bench_new.py"]
