"""`fastrl generate`: a completion of every prompt, in order, the same whatever stands beside it in the file."""

from __future__ import annotations

import io
import json
import sys

import pytest
from runs import decoder, tokenizer

from fastrl import cli, generate
from fastrl.errors import UserError
from fastrl.sampler import Sampler, SamplingParams

PROMPTS = ["7+", "K", "a:7K>3|", "4-4", "99"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    decoder().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def run(model: str, *args: str) -> int:
    return cli.main(["generate", "--model", model, "--max-new-tokens", "6", "--n", "2", *args])


def test_completions_are_those_of_the_sampler(model, tmp_path, monkeypatch):
    """Wrong implementations: noise that starts again in every chunk; samples beside the wrong prompt; log-probs of the prompt."""
    monkeypatch.setattr(generate, "CHUNK", 2)
    (tmp_path / "p.txt").write_text("\n\n".join(PROMPTS) + "\n")
    assert run(model, "--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out.jsonl"), "--seed", "3") == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    want = Sampler(decoder(), tokenizer()).generate(PROMPTS, SamplingParams(n=2, max_new_tokens=6, seed=3))
    assert [r["prompt"] for r in rows] == [p for p in PROMPTS for _ in range(2)]
    assert [r["completion"] for r in rows] == want.text and [r["finish_reason"] for r in rows] == want.finish_reason
    assert [x for r in rows for x in r["logp"]] == pytest.approx(want.logp[want.completion_mask].tolist(), abs=1e-4)


def test_prompts_from_standard_input_and_json_lines(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("7+\r\n\nK\n"))
    assert run(model) == 0
    first = capsys.readouterr()
    (tmp_path / "p.jsonl").write_text('{"prompt": "7+"}\n\n{"prompt": "K", "more": 1}\n')
    assert run(model, "--prompts", str(tmp_path / "p.jsonl")) == 0
    assert capsys.readouterr().out == first.out and [json.loads(x)["prompt"] for x in first.out.splitlines()] == ["7+", "7+", "K", "K"]
    assert "2 of 2 prompts" in first.err


def test_on_a_terminal_it_is_text(model, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stdin", io.StringIO("7+\n"))
    assert run(model) == 0
    want = Sampler(decoder(), tokenizer()).generate(["7+"], SamplingParams(n=2, max_new_tokens=6))
    assert shown.getvalue() == "".join(f"7+\n  {t}\n" for t in want.text or [])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "7\n" * 66 + "7" * 128, "p.txt:67: a prompt of 128 tokens leaves no room for a completion in the model's context of 128"),
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
