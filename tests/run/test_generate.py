"""`fastrl generate`: a completion of every prompt, in order,
the same whatever stands beside it in the file.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from runs import decoder, tokenizer

from fastrl import cli
from fastrl.errors import UserError
from fastrl.run import generate
from fastrl.sampler import Sampler, SamplingParams

PROMPTS = ["7+", "K", "a:7K>3|", "4-4", "99"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    decoder().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def run(model: str, *args: str) -> int:
    given = ["--model", model, *args]
    for option, value in (("--max-new-tokens", "6"), ("--n", "2")):
        given += [] if option in args else [option, value]
    return cli.main(["generate", *given])


def test_completions_are_those_of_the_sampler(model, tmp_path, monkeypatch):
    """Wrong implementations: noise that starts again in every chunk; samples beside the wrong prompt;
    log-probs of the prompt.
    """
    monkeypatch.setattr(generate, "CHUNK", 2)
    (tmp_path / "p.txt").write_text("\n\n".join(PROMPTS) + "\n")
    assert (
        run(
            model,
            "--prompts",
            str(tmp_path / "p.txt"),
            "--output",
            str(tmp_path / "out.jsonl"),
            "--seed",
            "3",
        )
        == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    want = Sampler(decoder(), tokenizer()).generate(PROMPTS, SamplingParams(n=2, max_new_tokens=6, seed=3))
    assert [r["prompt"] for r in rows] == [p for p in PROMPTS for _ in range(2)]
    assert [r["completion"] for r in rows] == want.text
    assert [r["finish_reason"] for r in rows] == want.finish_reason
    assert [x for r in rows for x in r["logp"]] == pytest.approx(
        want.logp[want.completion_mask].tolist(), abs=1e-4
    )


def test_prompts_from_standard_input_and_json_lines(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("7+\r\n\nK\n"))
    assert run(model) == 0
    first = capsys.readouterr()
    (tmp_path / "p.jsonl").write_text('{"prompt": "7+"}\n\n{"prompt": "K", "more": 1}\n')
    assert run(model, "--prompts", str(tmp_path / "p.jsonl")) == 0
    assert capsys.readouterr().out == first.out
    assert [json.loads(x)["prompt"] for x in first.out.splitlines()] == ["7+", "7+", "K", "K"]
    assert "2 of 2 prompts" in first.err


def test_on_a_terminal_it_is_text(model, capsys, monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stdin", io.StringIO("7+\n"))
    assert run(model) == 0
    want = Sampler(decoder(), tokenizer()).generate(["7+"], SamplingParams(n=2, max_new_tokens=6))
    assert shown.getvalue() == "".join(f"7+\n  {t}\n" for t in want.text or [])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "p.txt",
            "7\n" * 66 + "7" * 128,
            "p.txt:67: a prompt of 128 tokens leaves no room for a completion in the model's context of 128",
        ),
        ("p.txt", "7\nhello\n", "p.txt:2: the tokenizer has no tokens for part of 'hello'"),
        ("p.jsonl", '{"prompt": "7"}\n{"promt": "7"}\n', "p.jsonl:2: expected a prompt column, got promt"),
        ("p.jsonl", '{"prompt": 7}\n', "p.jsonl:1: prompt: expected text or a list of messages, got int 7"),
        ("p.jsonl", '{"prompt": "7"\n', "p.jsonl:1: expected a JSON object"),
    ],
)
def test_a_prompt_that_cannot_be_completed_is_named_before_any_is(model, tmp_path, name, text, said):
    """Wrong implementations: prompts[3] for the prompt of line 67; a file half written before the error."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        generate.run(_config(model, tmp_path / name, tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def _config(model, prompts, output):
    return generate.Generate(model=model, prompts=str(prompts), output=str(output), max_new_tokens=6)


def test_no_prompts_give_an_empty_file(model, tmp_path):
    (tmp_path / "p.txt").write_text("\n")
    generate.run(_config(model, tmp_path / "p.txt", tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == ""


# --- interrupted and resumed ------------------------------------------------------------------------
def write(model: str, folder: Path, name: str, *args: str) -> tuple[int, bytes]:
    """The exit code of a run that writes folder/name, and what it wrote."""
    seed = () if "--seed" in args else ("--seed", "3")
    code = run(model, "--prompts", str(folder / "p.txt"), "--output", str(folder / name), *seed, *args)
    return code, (folder / name).read_bytes() if (folder / name).exists() else b""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Five prompts, completed two at a time."""
    monkeypatch.setattr(generate, "CHUNK", 2)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    return tmp_path


def fail_in_chunk(monkeypatch, chunk: int, error: BaseException) -> None:
    """The sampler raises `error` in the middle of its chunk-th call, counted from 0: when it tells of the
    first tokens.
    """
    calls, real = [], Sampler.generate

    def interrupt(n):
        raise error

    def generate(self, prompts, params, *, on_tokens=None, **options):
        calls.append(prompts)
        return real(
            self, prompts, params, on_tokens=interrupt if len(calls) == chunk + 1 else on_tokens, **options
        )

    monkeypatch.setattr(Sampler, "generate", generate)


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (KeyboardInterrupt(), 130, "fastrl: interrupted"),
        (UserError("out of memory"), 1, "fastrl: error: out of memory"),
    ],
)
def test_a_run_interrupted_in_the_sampler_is_continued_to_the_same_bytes(
    model, folder, monkeypatch, capsys, error, code, last
):
    """Wrong implementations: nothing written until the end; noise that starts again; the prompts that are
    done drawn once more.
    """
    _, want = write(model, folder, "straight.jsonl")
    with monkeypatch.context() as patch:
        fail_in_chunk(patch, 1, error)
        assert write(model, folder, "out.jsonl") == (code, b"".join(want.splitlines(True)[:4]))
    told = capsys.readouterr().err.splitlines()
    how = f"--config {folder}/out.jsonl.config.yaml --resume"
    assert told[-2:] == [
        f"{folder}/out.jsonl holds 2 of 5 prompts; continue with: fastrl generate {how}",
        last,
    ]
    drawn = watch(monkeypatch)
    assert cli.main(["generate", *how.split()]) == 0
    assert (folder / "out.jsonl").read_bytes() == want and drawn == [4, 8]


def watch(monkeypatch) -> list[int]:
    """The number of the first sequence of every call of the sampler from now on."""
    offsets, real = [], Sampler.generate

    def generate(self, prompts, params, **options):
        offsets.append(options["sequence_offset"])
        return real(self, prompts, params, **options)

    monkeypatch.setattr(Sampler, "generate", generate)
    return offsets


@pytest.mark.parametrize("cut", range(0, 1400, 199))
def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(model, folder, cut, straight, monkeypatch):
    """Wrong implementations: a torn line kept, or taken for a whole one where only its end is missing; a
    prompt with one of two completions skipped, or completed twice; the rest of a chunk drawn in another
    batch.
    """
    want = straight[0]
    size = min(cut, len(want))
    (folder / "out.jsonl").write_bytes(want[:size])
    (folder / "out.jsonl.config.yaml").write_text(straight[1])
    drawn = watch(monkeypatch)
    assert write(model, folder, "out.jsonl", "--resume") == (0, want)
    rows = want[:size].count(b"\n")
    assert drawn == (list(range(rows // 4 * 4, 10, 4)) if rows < 10 else [])


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory) -> tuple[bytes, str]:
    """What a run that nobody interrupted writes: completions and configuration."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "CHUNK", 2)
        written = write(model, folder, "out.jsonl")[1]
    return written, (folder / "out.jsonl.config.yaml").read_text()


def test_only_the_end_of_the_last_line_is_missing(model, folder, straight, monkeypatch, capsys):
    """Wrong implementations: a line that parses counts as whole, and the next one is glued to it; a whole
    file's last chunk drawn again.
    """
    (folder / "out.jsonl").write_bytes(straight[0][:-1])
    (folder / "out.jsonl.config.yaml").write_text(straight[1])
    assert write(model, folder, "out.jsonl", "--resume") == (0, straight[0])
    drawn = watch(monkeypatch)
    capsys.readouterr()
    assert write(model, folder, "out.jsonl", "--resume") == (0, straight[0]) and drawn == []
    assert capsys.readouterr().err == f"{folder}/out.jsonl is complete: nothing is left to do\n"


def test_rows_say_which_prompt_and_sample_they_are(straight):
    rows = [json.loads(line) for line in straight[0].splitlines()]
    assert [(r["index"], r["sample"], r["prompt"]) for r in rows] == [
        (i, j, p) for i, p in enumerate(PROMPTS) for j in range(2)
    ]


def edit_prompts(folder: Path) -> None:
    (folder / "p.txt").write_text("\n".join(["7+", "K+", *PROMPTS[2:]]) + "\n")


def fewer_prompts(folder: Path) -> None:
    (folder / "p.txt").write_text("7+\nK\n")


def break_a_line(folder: Path) -> None:
    lines = (folder / "out.jsonl").read_bytes().splitlines(True)
    (folder / "out.jsonl").write_bytes(b"".join([lines[0], b"{]\n", *lines[2:]]))


def lose_the_settings(folder: Path) -> None:
    (folder / "out.jsonl.config.yaml").unlink()


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "args", "said"),
    [
        (
            edit_prompts,
            ("--resume",),
            "out.jsonl:3: expected index, sample and prompt [1, 0, 'K+'], got [1, 0, 'K']: "
            "the file belongs to",
        ),
        (fewer_prompts, ("--resume",), "out.jsonl:5: more completions than 2 of each of the 2 prompts"),
        (break_a_line, ("--resume",), "out.jsonl:2: expected a JSON object"),
        (lose_the_settings, ("--resume",), "out.jsonl.config.yaml, the configuration that wrote"),
        (nothing, ("--resume", "--seed", "4"), "was written with --seed 3, got 4"),
        (nothing, ("--resume", "--n", "3"), "was written with --n 2, got 3"),
        (nothing, ("--resume", "--sampling.top-p", "0.5"), "was written with --sampling.top-p 1.0, got 0.5"),
        (nothing, (), "out.jsonl exists already; continue it with --resume, or name another file"),
        (lambda folder: (folder / "out.jsonl").unlink(), ("--resume",), "out.jsonl; start without --resume"),
    ],
)
def test_a_file_that_cannot_be_continued_is_refused_and_left_alone(
    model, folder, straight, capsys, change, args, said
):
    """Wrong implementations: a file overwritten; completions of two seeds, or of other prompts,
    in one file.
    """
    (folder / "out.jsonl").write_bytes(straight[0])
    (folder / "out.jsonl.config.yaml").write_text(straight[1])
    change(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert write(model, folder, "out.jsonl", *args)[0] == 1
    assert said in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_the_terminal_cannot_be_resumed(model, capsys):
    assert run(model, "--resume") == 1
    assert (
        "--resume: expected the --output file of the interrupted run, got the terminal"
        in capsys.readouterr().err
    )


def test_more_prompts_may_follow_and_a_device_file_takes_none(model, folder, straight):
    """Wrong implementations: a file that grew is another file; a configuration beside /dev/null."""
    (folder / "out.jsonl").write_bytes(straight[0])
    (folder / "out.jsonl.config.yaml").write_text(straight[1])
    (folder / "p.txt").write_text("\n".join([*PROMPTS, "5"]) + "\n")
    code, written = write(model, folder, "out.jsonl", "--resume")
    assert code == 0
    assert written.startswith(straight[0])
    assert [json.loads(x)["prompt"] for x in written.splitlines()[10:]] == ["5", "5"]
    assert write(model, folder, "/dev/null") == (0, b"") and not Path("/dev/null.config.yaml").exists()


# --- progress ---------------------------------------------------------------------------------------
def test_a_full_disk_is_one_line_with_the_file(model, folder, capsys):
    """Wrong implementation: `[Errno 28]` without a path."""
    assert run(model, "--prompts", str(folder / "p.txt"), "--output", "/dev/full") == 1
    assert re.search(r"error: /dev/full: \d+ bytes could not be written \(No space", capsys.readouterr().err)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_per_chunk_or_a_bar_on_a_terminal(model, folder, monkeypatch, capsys):
    """Wrong implementations: a bar in a log file; tokens counted in prompts; a bar that starts from 0 when
    resumed.
    """
    assert write(model, folder, "a.jsonl")[0] == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["2 of 5 prompts", "4 of 5 prompts", "5 of 5 prompts"]
    assert all(re.fullmatch(r"[\d,]+ tok/s", line.split("  ")[1]) for line in lines)
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    assert write(model, folder, "b.jsonl")[0] == 0
    assert "5/5" in shown.getvalue()
    assert "tok/s" in shown.getvalue()
    assert "of 5 prompts" not in shown.getvalue()


def test_tokens_are_counted_by_the_sampler(model, folder, monkeypatch):
    counted = []
    monkeypatch.setattr(generate.GenerateProgress, "tokens", lambda self, n: counted.append(n))
    written = write(model, folder, "out.jsonl")[1]
    assert sum(counted) == sum(len(json.loads(line)["logp"]) for line in written.splitlines())


# --- docs/generate.md -------------------------------------------------------------------------------
def test_the_examples_of_the_page_run(capsys):
    """Wrong implementation: a page about an interface of some earlier day."""
    page = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(first, names)
    assert [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()] == [0] * 4 + [1] * 4
    for example in others:  # each goes on from the one before
        exec(example, names)
