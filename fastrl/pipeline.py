"""`fastrl run pipeline.yaml`: stages in order, each from the checkpoint of the one before, and one report.

    output_dir: runs/cards
    shared: {task: cards, task_options: [k=3], seed: 0}        # options of every stage that has them
    stages:
      - sft: {model: tiny.json, steps: 300, optim: {lr: 3e-3}}
      - grpo: {steps: 100, group: 8}                           # model: {sft} by default
      - grpo: {name: longer, model: "{grpo}", max_new_tokens: 64}

`{name}` in a text stands for the last checkpoint of the stage of that name; a stage is named after its
command unless `name` is given.  A pipeline that was stopped continues: finished stages are left alone, and an
unfinished one resumes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import yaml

from fastrl.config import Run
from fastrl.config.algorithm import row_option_names
from fastrl.config.parse import load
from fastrl.errors import UserError, nearest
from fastrl.files import Json, JsonObject
from fastrl.methods import METHODS, command_hint, options_of
from fastrl.report.page import Html, figures, folded, section, table, text
from fastrl.report.report import RunFiles, panels, read_run, summary, write_page
from fastrl.run import checkpoint
from fastrl.run.session import changed
from fastrl.trainer import train

KEYS = ("output_dir", "shared", "stages")
REFERENCE = re.compile(r"\{([^{}]*)\}")


class Options(Protocol):
    """The options of `fastrl run`."""

    @property
    def file(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its name, its command, and the run's configuration."""

    name: str
    command: str
    config: Run

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def last(self) -> Path:
        """Its checkpoint when it is done."""
        return self.folder / "checkpoints" / f"step_{self.config.steps}"


def run(options: Options) -> None:
    """Run the unfinished stages of a pipeline, and write its report.

    Raises UserError, before any training, for whatever is wrong in the file.
    """
    stages = read_stages(Path(options.file))
    folder = stages[0].folder.parent
    for stage in stages:
        _check_unchanged(stage)

    for number, stage in enumerate(stages, 1):
        progress = f"stage {number} of {len(stages)}, {stage.name}"
        checkpoints = checkpoint.complete_checkpoints(stage.folder)
        if checkpoints and checkpoints[-1] == stage.last:
            print(f"{progress}: done before")
            continue
        print(f"{progress}: fastrl {stage.command}")
        if train(replace(stage.config, resume=bool(checkpoints))).interrupted:
            raise UserError(f"stopped in stage {stage.name!r}; continue with: fastrl run {options.file}")
        write_report(stages[:number], folder)
    print(write_report(stages, folder))


# --- the file ---------------------------------------------------------------------------------------
def read_stages(path: Path) -> list[Stage]:
    """The stages that a file describes, their options resolved.

    Raises UserError naming the file and the stage.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a pipeline's YAML file, got no file")
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

    folder = Path(str(tree.get("output_dir", "runs/pipeline"))).expanduser()
    shared = tree.get("shared") or {}
    stages: list[Stage] = []
    for number, entry in enumerate(tree["stages"], 1):
        stages.append(_stage(f"{path}: stage {number}", entry, shared, folder, stages))
    return stages


def _stage(
    where: str,
    entry: Json,
    shared: Mapping[str, Json],
    folder: Path,
    before: Sequence[Stage],
) -> Stage:
    """The stage that follows those `before`; its resolved options are written to a file, which is parsed."""
    command, given = _entry(where, entry)
    name = str(given.pop("name", command))
    if name in {s.name for s in before}:
        example = f"`name: {name}-2`"
        raise UserError(f"{where}: a second stage is called {name!r}; give it another name, like {example}")
    if "output_dir" in given or "resume" in given:
        raise UserError(
            f"{where}: output_dir and resume: expected none, the pipeline sets both "
            f"(stages lie side by side in {folder}); leave them out"
        )

    config = options_of(command)
    known = {f.name for f in fields(config)} | {*row_option_names(config)}
    options = {key: value for key, value in shared.items() if key.split(".")[0] in known}
    policies = [s for s in before if s.command != "reward"]
    if policies:
        options["model"] = f"{{{policies[-1].name}}}"
    stem = f"{len(before) + 1}-{name}"
    options |= given | {"output_dir": str(folder / stem)}

    checkpoints = {s.name: str(s.last) for s in before}
    resolved = _resolve(options, checkpoints, where)
    file = folder / "stages" / f"{stem}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Stage(name, command, load(config, file))


def _entry(where: str, entry: Json) -> tuple[str, JsonObject]:
    """A stage's command and a copy of its options."""
    options = None
    ok = isinstance(entry, dict) and len(entry) == 1
    if ok:
        ((command, options),) = entry.items()
    if not ok or not isinstance(options, dict | None):
        example = "`sft: {steps: 100}`"
        raise UserError(f"{where}: expected one command with its options, like {example}, got {entry!r}")
    if command not in METHODS:
        near = command_hint(str(command))
        known = ", ".join(METHODS)
        raise UserError(f"{where}: unknown command {command!r}{near}; expected one of {known}")
    return command, dict(options or {})


def _resolve(value: Json, checkpoints: Mapping[str, str], where: str) -> Json:
    """`value` with {name} in every text in it replaced by that stage's checkpoint."""
    if isinstance(value, dict):
        return {key: _resolve(item, checkpoints, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, checkpoints, where) for item in value]
    if not isinstance(value, str):
        return value
    for name in REFERENCE.findall(value):
        if name not in checkpoints:
            near = nearest(name, checkpoints)
            known = ", ".join(checkpoints) or "none"
            raise UserError(f"{where}: {value!r} names stage {name!r}{near}; stages before it: {known}")
    return REFERENCE.sub(lambda match: checkpoints[match[1]], value)


def _check_unchanged(stage: Stage) -> None:
    """Refuse to continue a stage that was begun with other options."""
    for key, (was, now) in changed(stage.config).items():
        raise UserError(
            f"stage {stage.name!r}: {stage.folder} was begun with {key} = {was}, now it is {now}; "
            "name another output_dir, or remove that folder"
        )


# --- the report -------------------------------------------------------------------------------------
def write_report(stages: Sequence[Stage], folder: Path) -> Path:
    """Write one page over the stages that have begun and return its path.

    It holds what each stage did, its curves and its options.
    """
    rows: list[tuple[object, ...]] = []
    details = []
    for number, stage in enumerate(stages, 1):
        files = read_run(stage.folder)
        steps = f"{files.rows[-1]['step']} of {stage.config.steps}"
        rows.append((_link(stage, number), f"fastrl {stage.command}", steps, summary(files)))
        details.append(_details(stage, files, folder / "plots" / stage.name))

    overview = section("Stages", table(("Stage", "Command", "Steps", "Result"), rows))
    names = ", ".join(stage.name for stage in stages)
    title = f"Pipeline: {folder.resolve().name}"
    return write_page(
        folder,
        title,
        f"{len(stages)} stages: {names}.",
        overview,
        *details,
    )


def _details(stage: Stage, files: RunFiles, plots: Path) -> Html:
    pictures = figures(panels({"": files}, plots))
    return section(stage.name, pictures, folded("Configuration", files.config))


def _link(stage: Stage, number: int) -> Html:
    folder = text(stage.folder.name)
    return Html(f'<a href="{folder}/report.html">{text(f"{number}. {stage.name}")}</a>')
