"""`fastrl env`: complete, true about what is chosen, and alive where nothing was built."""

from __future__ import annotations

import torch

from fastrl import __version__, ops
from fastrl.run import environment


def row(text: str, op: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(op + " ")).split()


def test_the_report_says_what_runs():
    """Wrong: a table of defaults instead of what is chosen now."""
    text = environment.environment_text()
    assert __version__ in text
    assert torch.__version__ in text
    for op, chosen in ops.backend().items():
        assert row(text, op)[1] == chosen
    with ops.use_backend("reference"):
        assert row(environment.environment_text(), "token_logp")[1] == "reference"


def test_the_report_survives_an_unbuilt_module(monkeypatch):
    monkeypatch.setattr(environment, "extension", lambda: None)
    assert "not built: pip install" in environment.environment_text()


def test_the_command_prints_it(capsys):
    environment.run(None)
    assert capsys.readouterr().out.startswith("versions\n")


def test_every_op_is_listed_with_what_runs_and_why_a_reference_does():
    """Wrong implementations: no line for linear_loss, which has no kernel of its own; `reference` without a
    word of what that runs on.
    """
    text = environment.environment_text()
    chosen = ops.backend()
    assert row(text, "linear_loss")[1] == chosen["token_logp"]
    assert "linear_loss: matrix products, a chunk of rows at a time, and the kernels of token_logp" in text
    for op, backend in chosen.items():
        assert (f"{op}: reference: " in text) == (backend == "reference"), op
    if chosen["linear_logp"] == "reference":
        on = f"token_logp, which runs on {chosen['token_logp']}"
        assert on in next(line for line in text.splitlines() if line.startswith("linear_logp: reference"))
