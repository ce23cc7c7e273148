"""The import graph is a ladder, every op has its test and its benchmark, and nobody takes Hugging Face's
name.

Each rule is a function of sources, so that each is also shown to catch a planted violation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fastrl.methods import METHODS

ROOT = Path(__file__).parents[1]

# a module imports from lower floors, and from its own room; a room is a folder, or a file that is flat in
# fastrl/
FLOORS = (
    ("fastrl", "fastrl._C"),
    ("fastrl.kernels.surrogates",),
    ("fastrl.kernels._*",),
    ("fastrl.kernels.*",),
    ("fastrl.ops", "fastrl.errors", "fastrl.user"),
    ("fastrl.files", "fastrl.config", "fastrl.batch", "fastrl.parallel", "fastrl.report"),
    ("fastrl.algorithms", "fastrl.data", "fastrl.tasks"),
    ("fastrl.model",),
    ("fastrl.sampler", "fastrl.rewards", "fastrl.train"),
    ("fastrl.methods", "fastrl.search"),
    ("fastrl.run",),
    ("fastrl.trainer", "fastrl.recipes", "fastrl.integrations", "fastrl.cli"),
    ("fastrl.pipeline", "fastrl.bench", "fastrl.__main__"),
)
BESIDE = (  # ops that call another op: (importer, imported); cycles are refused all the same
    ("fastrl.kernels.linear_*", "fastrl.kernels.token_logp"),
    ("fastrl.kernels.linear_*", "fastrl.kernels.linear_logp"),
    ("fastrl.kernels.rope", "fastrl.kernels.rms_norm"),
    ("fastrl.kernels.advance", "fastrl.kernels.sample"),
    ("fastrl.kernels.sample", "fastrl.kernels.token_logp"),
    ("fastrl.kernels.decoder_layer", "fastrl.kernels.*"),
)
NOT_OPS = {"surrogates"}  # public names of kernels/ that are no ops of their own
LAZY = {("fastrl.kernels._registry", "extension")}  # fastrl._C may be absent, and must be loaded after torch

Sources = dict[str, str]  # module name -> its text


# --- the rules --------------------------------------------------------------------------------------
def room(module: str) -> str:
    """The folder of a module, or the module itself where it is flat; each op of kernels/ is a room of its
    own.
    """
    parts = module.split(".")
    if parts[:2] == ["fastrl", "kernels"]:
        return "fastrl.kernels._" if len(parts) > 2 and parts[2].startswith("_") else module
    return ".".join(parts[:2])


def floor(module: str) -> int | None:
    names = (module, room(module))
    return next((i for i, own in enumerate(FLOORS) if any(fnmatch(n, o) for n in names for o in own)), None)


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
    """Imports of a higher floor, or of another room on the same one; modules that have no floor."""
    bad = [f"{m}: no floor in FLOORS" for m in modules if floor(m) is None]
    for module, text in modules.items():
        here = floor(module)
        for name in imports(ast.parse(text), modules):
            there = floor(name) if name.split(".")[0] == "fastrl" else None
            if here is None or there is None or there < here or room(name) == room(module):
                continue
            if there > here or not any(fnmatch(module, a) and fnmatch(name, b) for a, b in BESIDE):
                bad.append(f"{module} imports {name}")
    return bad


def cycle(modules: Sources) -> list[str]:
    graph = {
        m: {n for n in imports(ast.parse(text), modules) if n in modules and n != m}
        for m, text in modules.items()
    }
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
                bad += [
                    f"{module}.{f.name} imports {n}"
                    for n in imports(f, modules)
                    if n.split(".")[0] == "fastrl"
                ]
    return bad


def foreign(modules: Sources) -> list[str]:
    """Imports of the top-level name `kernels`, which belongs to Hugging Face."""
    return [
        f"{m} imports {n}"
        for m, text in modules.items()
        for n in imports(ast.parse(text), modules)
        if n.split(".")[0] == "kernels"
    ]


def orphans(root: Path) -> list[str]:
    """Ops without tests/kernels/test_<op>.py or bench/kernels/bench_<op>.py."""
    ops = [p.stem for p in sorted((root / "kernels").glob("*.py")) if not p.stem.startswith("_")]
    wanted = [
        path
        for op in ops
        if op not in NOT_OPS
        for path in (f"tests/kernels/test_{op}.py", f"bench/kernels/bench_{op}.py")
    ]
    return [path for path in wanted if not (root / path).exists()]


# --- this repository --------------------------------------------------------------------------------
def sources() -> Sources:
    found = {}
    for folder, prefix in (("fastrl", "fastrl"), ("kernels", "fastrl.kernels"), ("bench", "fastrl.bench")):
        # rglob does not follow the two links inside fastrl/
        for path in sorted((ROOT / folder).rglob("*.py")):
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


def unfinished(root: Path, commands: Iterable[str]) -> list[str]:
    """Training commands without their folder, options, page or tests."""
    lacking = []
    for command in commands:
        wanted = [f"fastrl/methods/{command}/method.py", f"fastrl/config/{command}.py", f"docs/{command}.md"]
        lacking += [path for path in wanted if not (root / path).exists()]
        if not any((root / "tests").rglob(f"test_*{command}*.py")):
            lacking.append(f"tests/methods/test_{command}*.py")
    return lacking


def test_every_method_is_whole(tmp_path):
    """Wrong implementation: a rule that nothing can break."""
    assert unfinished(ROOT, METHODS) == []
    assert len(unfinished(tmp_path, ["toy"])) == 4


def test_the_sources_are_all_seen():
    """Wrong implementation: a glob that misses a folder finds no violation."""
    assert {
        "fastrl",
        "fastrl.ops",
        "fastrl.kernels._check",
        "fastrl.kernels.token_logp",
        "fastrl.tasks",
        "fastrl.cli",
    } <= sources().keys()


# --- planted violations -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "rule, module, text",
    [
        (climbs, "fastrl.batch.types", "from fastrl import trainer"),
        (climbs, "fastrl.batch.types", "from fastrl.trainer import train"),
        (climbs, "fastrl.kernels.token_logp", "import fastrl.ops"),
        (climbs, "fastrl.kernels._check", "from fastrl.kernels.gae import gae"),
        (climbs, "fastrl.kernels.gae", "from fastrl.kernels.rope import rope"),
        (climbs, "fastrl.batch.pack", "if TYPE_CHECKING:\n    from fastrl.model import Decoder"),
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
        rule(
            {
                "fastrl.train.learner": "import torch\nfrom fastrl import ops\nfrom fastrl.batch.pack "
                "import plan",
                "fastrl.batch.pack": "",
                "fastrl.ops": "",
            }
        )
        == []
    )


def test_an_op_without_test_or_benchmark_is_caught(tmp_path):
    for path in ("kernels/_check.py", "kernels/new.py", "tests/kernels/test_new.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert orphans(tmp_path) == ["bench/kernels/bench_new.py"]
