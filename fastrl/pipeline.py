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
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import yaml

from fastrl.config import Run
from fastrl.config.algorithm import row_option_names
from fastrl.config.parse import UsageError, load
from fastrl.errors import UserError, nearest
from fastrl.files import Json, JsonObject
from fastrl.methods import METHODS, command_hint, options_of
from fastrl.parallel.world import World, init_world
from fastrl.report.page import Html, figures, folded, section, table, text
from fastrl.report.report import RunFiles, panels, read_run, summary, write_page
from fastrl.run import checkpoint
from fastrl.run.lock import claimed
from fastrl.run.preflight import preflight
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
    """One stage: its name, its command, and the run's configuration.

    where     the file that describes it, the line, and its number
    resolved  its options as given, with checkpoints in place of the names of stages
    """

    name: str
    command: str
    config: Run
    where: str
    resolved: JsonObject

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def last(self) -> Path:
        """Its checkpoint when it is done."""
        return self.folder / "checkpoints" / f"step_{self.config.steps}"


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """How a pipeline ended: 0, or what a shell reports for the signal that stopped it."""

    exit_code: int


def run(options: Options) -> PipelineResult:
    """Run the unfinished stages of a pipeline, and write its report.

    Raises UserError, before any training, for whatever is wrong in the file or missing beside it.
    """
    world = init_world()
    stages = read_stages(Path(options.file))
    folder = stages[0].folder.parent
    with claimed(folder, f"{options.file}: output_dir", world, folder=True):
        world.from_main(lambda: _check(stages))
        for number, stage in enumerate(stages, 1):
            code = _run_stage(stage, f"stage {number} of {len(stages)}, {stage.name}", options, world)
            if code:
                return PipelineResult(code)
            if world.is_main and number < len(stages):
                write_report(stages[:number], folder)
        if world.is_main:
            print(write_report(stages, folder))
    return PipelineResult(0)


def _run_stage(stage: Stage, progress: str, options: Options, world: World) -> int:
    """Train a stage, unless that is done; the exit code of a pipeline that is to stop here."""
    checkpoints = checkpoint.complete_checkpoints(stage.folder)
    done = _is_done(stage)
    if world.is_main:
        print(f"{progress}: " + ("done before" if done else f"fastrl {stage.command}"))
    if done:
        return 0

    result = train(replace(stage.config, resume=bool(checkpoints)))
    stopped = f"stopped in stage {stage.name!r}; continue with: fastrl run {options.file}"
    if result.exit_code:
        if world.is_main:
            print(stopped)
        return result.exit_code
    if result.interrupted:
        raise UserError(stopped)
    return 0


def preview(options: Options) -> None:
    """Check a pipeline as `run` does, and print its stages and what was looked at."""
    stages = read_stages(Path(options.file))
    for stage, found in zip(stages, _preflight(stages), strict=True):
        print(f"{stage.where}: fastrl {stage.command}, {stage.config.steps} steps, in {stage.folder}")
        for line in found:
            print(f"  {line}")


def _check(stages: Sequence[Stage]) -> None:
    """Refuse what cannot be run; then leave the resolved options beside the stages."""
    for stage in stages:
        _check_unchanged(stage)
    _preflight(stages)
    for stage in stages:
        file = stage.folder.parent / "stages" / f"{stage.folder.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(stage.resolved, sort_keys=False, allow_unicode=True)
        file.write_text(text, encoding="utf-8")


def _preflight(stages: Sequence[Stage]) -> list[list[str]]:
    """What the check of each stage looked at.  Raises UserError naming the file, its line and the stage."""
    found = []
    written: list[str] = []
    for stage in stages:
        try:
            looked_at = ["done before"] if _is_done(stage) else preflight(stage.config, written)
        except UserError as error:
            raise UserError(f"{stage.where}: {error}") from error
        found.append(looked_at)
        if stage.config.steps > 0:
            written.append(str(stage.last))
    return found


def _is_done(stage: Stage) -> bool:
    """Whether a stage has its last checkpoint: what it was made from may be gone."""
    return checkpoint.complete_checkpoints(stage.folder)[-1:] == [stage.last]


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

    folder = Path(str(tree.get("output_dir", f"runs/{path.stem}"))).expanduser()
    shared = tree.get("shared") or {}
    stages: list[Stage] = []
    lines = _lines(path)
    for number, entry in enumerate(tree["stages"], 1):
        where = Place(path, number, lines[number - 1])
        stages.append(_stage(where, entry, shared, folder, stages))
    return stages


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stage is written: its number, and the lines of its keys; the entry's own is under ""."""

    path: Path
    number: int
    lines: Mapping[str, int]

    def __str__(self) -> str:
        return f"{self.path}:{self.lines['']}: stage {self.number}"

    def of(self, message: str) -> str:
        """The place of the key that a message is about, or that of the stage."""
        named = [key for key in self.lines if key and re.search(rf"(^|'){re.escape(key)}('|:)", message)]
        line = self.lines[named[0] if named else ""]
        return f"{self.path}:{line}: stage {self.number}"


def _lines(path: Path) -> list[dict[str, int]]:
    """The lines of each stage's keys, nested ones under their own name and with their group's."""
    root = yaml.compose(path.read_text(encoding="utf-8"))
    assert isinstance(root, yaml.MappingNode)
    (entries,) = (value for key, value in root.value if key.value == "stages")
    found = []
    for entry in entries.value:
        lines = {"": entry.start_mark.line + 1}
        if isinstance(entry, yaml.MappingNode):
            for _, options in entry.value:
                _add_lines(options, "", lines)
        found.append(lines)
    return found


def _add_lines(node: yaml.Node, prefix: str, lines: dict[str, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            _add_lines(value, f"{prefix}{key.value}.", lines)


def _stage(
    place: Place,
    entry: Json,
    shared: Mapping[str, Json],
    folder: Path,
    before: Sequence[Stage],
) -> Stage:
    """The stage that follows those `before`; its resolved options are parsed as a file of options is."""
    where = str(place)
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
    return Stage(name, command, _parse(config, resolved, place), f"{where}, {name}", resolved)


def _parse(config: type[Run], resolved: JsonObject, place: Place) -> Run:
    """The configuration of a stage.  Raises UsageError naming the pipeline's own file and line."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stage.yaml"
        file.write_text(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), encoding="utf-8")
        try:
            return load(config, file)
        except UserError as error:
            message = str(error).replace(f"{file}: ", "")
            raise UsageError(f"{place.of(message)}: {message}") from None


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
