"""`fastrl run pipeline.yaml`: stages one after the other, each from the checkpoint of the one before, and one
report over all.

    output_dir: runs/cards
    shared: {task: cards, task_options: [k=3], seed: 0}        # options of every stage that has them
    stages:
      - sft: {model: tiny.json, steps: 300, optim: {lr: 3e-3}}
      - grpo: {steps: 100, group: 8}                           # model: {sft}, unless it says another
      - grpo: {name: longer, model: "{grpo}", max_new_tokens: 64}

`{name}` in a text is the last checkpoint of the stage of that name, which is the command's unless `name` says
another.  A pipeline that was stopped goes on where it was: stages that are done are left alone, one that is
half done resumes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from fastrl.config import TRAINING, Run
from fastrl.config.algorithm import row_option_names
from fastrl.config.parse import load
from fastrl.errors import UserError, nearest
from fastrl.report.page import Html, figures, folded, section, table, text
from fastrl.report.report import lead, panels, read, write
from fastrl.run import checkpoint
from fastrl.run.session import changed
from fastrl.trainer import train

KEYS = ("output_dir", "shared", "stages")
NAMED = re.compile(r"\{([^{}]*)\}")


class Options(Protocol):
    """The options of `fastrl run`."""

    @property
    def file(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its name, its command, and the run it is."""

    name: str
    command: str
    config: Run

    @property
    def last(self) -> Path:
        """Its checkpoint when it is done."""
        return Path(self.config.output_dir) / "checkpoints" / f"step_{self.config.steps}"


def run(options: Options) -> None:
    """Run what is not done of a pipeline, and write its report.  Raises UserError for whatever is wrong in
    it, before any training.
    """
    stages = plan(Path(options.file))
    folder = Path(stages[0].config.output_dir).parent
    for stage in stages:
        _check_unchanged(stage)
    for number, stage in enumerate(stages, 1):
        found = checkpoint.whole(Path(stage.config.output_dir))
        if found and found[-1] == stage.last:
            print(f"stage {number} of {len(stages)}, {stage.name}: done before")
            continue
        print(f"stage {number} of {len(stages)}, {stage.name}: fastrl {stage.command}")
        if train(replace(stage.config, resume=bool(found))).interrupted:
            raise UserError(f"stopped in stage {stage.name!r}; continue with: fastrl run {options.file}")
        report(stages[:number], folder)
    print(report(stages, folder))


def plan(path: Path) -> list[Stage]:
    """The stages a file describes, their options resolved.  Raises UserError naming the file and the
    stage.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a pipeline's YAML file, which is not there")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("stages"), list) or not tree["stages"]:
        raise UserError(
            f"{path}: expected the keys output_dir and stages, a list of commands with their options"
        )
    for key in tree:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), KEYS)}")
    folder, shared = Path(str(tree.get("output_dir", "runs/pipeline"))), tree.get("shared") or {}
    stages: list[Stage] = []
    for number, entry in enumerate(tree["stages"], 1):
        stages.append(_stage(f"{path}: stage {number}", entry, shared, folder, number, stages))
    return stages


def _stage(
    where: str, entry: Any, shared: Mapping[str, Any], folder: Path, number: int, before: list[Stage]
) -> Stage:
    if (
        not isinstance(entry, dict)
        or len(entry) != 1
        or not isinstance(next(iter(entry.values())), dict | None)
    ):
        raise UserError(
            f"{where}: expected one command with its options, like `sft: {{steps: 100}}`, got {entry!r}"
        )
    command, own = next(iter(entry.items()))
    if command not in TRAINING:
        raise UserError(
            f"{where}: unknown command {command!r}{nearest(str(command), TRAINING)}; "
            f"expected one of {', '.join(TRAINING)}"
        )
    kind, given = TRAINING[command], dict(own or {})
    name = str(given.pop("name", command))
    if name in {s.name for s in before}:
        raise UserError(
            f"{where}: a second stage is called {name!r}; give it another name, like `name: {name}-2`"
        )
    if "output_dir" in given or "resume" in given:
        raise UserError(
            f"{where}: output_dir and resume are the pipeline's own: "
            f"stages lie side by side in {folder}, and resume by themselves"
        )
    policies = [s for s in before if s.command != "reward"]
    known = {f.name for f in fields(kind)} | {*row_option_names(kind)}
    options = {k: v for k, v in shared.items() if k.split(".")[0] in known} | (
        {"model": f"{{{policies[-1].name}}}"} if policies else {}
    )
    options |= given | {"output_dir": str(folder / f"{number}-{name}")}
    checkpoints = {s.name: str(s.last) for s in before}
    file = folder / "stages" / f"{number}-{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        yaml.safe_dump(_filled(options, checkpoints, where), sort_keys=False, allow_unicode=True),
        encoding="utf-8",
    )
    return Stage(name, command, load(kind, file))


def _filled(value: Any, checkpoints: Mapping[str, str], where: str) -> Any:
    """`value` with {name} replaced by that stage's checkpoint, in every text in it."""
    if isinstance(value, dict):
        return {k: _filled(v, checkpoints, where) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, checkpoints, where) for v in value]
    if not isinstance(value, str):
        return value
    for name in NAMED.findall(value):
        if name not in checkpoints:
            known = ", ".join(checkpoints) or "none"
            raise UserError(
                f"{where}: {value!r} names stage {name!r}{nearest(name, checkpoints)}; "
                f"stages before it: {known}"
            )
    return NAMED.sub(lambda m: checkpoints[m[1]], value)


def _check_unchanged(stage: Stage) -> None:
    """Refuse to go on from a stage that was begun with other options."""
    for key, (was, now) in changed(stage.config).items():
        raise UserError(
            f"stage {stage.name!r}: {stage.config.output_dir} was begun with {key} = {was}, "
            f"now it is {now}; name another output_dir, "
            "or remove that folder"
        )


def _link(stage: Stage, number: int) -> Html:
    folder = text(Path(stage.config.output_dir).name)
    return Html(f'<a href="{folder}/report.html">{text(f"{number}. {stage.name}")}</a>')


def report(stages: list[Stage], folder: Path) -> Path:
    """One page over the stages that have begun: what each did, its curves, its options; returns its path."""
    runs = [(s, read(Path(s.config.output_dir))) for s in stages]
    rows = [
        (
            _link(s, number),
            f"fastrl {s.command}",
            f"{r.rows[-1]['step']} of {s.config.steps}",
            lead(r),
        )
        for number, (s, r) in enumerate(runs, 1)
    ]
    parts = [section("Stages", table(("Stage", "Command", "Steps", "Result"), rows))]
    parts += [
        section(
            f"{s.name}",
            figures(panels({"": r}, folder / "plots" / s.name)),
            folded("Configuration", r.config),
        )
        for s, r in runs
    ]
    names = ", ".join(s.name for s in stages)
    return write(folder, f"Pipeline: {folder.resolve().name}", f"{len(stages)} stages: {names}.", *parts)
