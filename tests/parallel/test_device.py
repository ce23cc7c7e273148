"""The device of a run, and wrong settings in the environment."""

from __future__ import annotations

import pytest
import torch

from fastrl.cli import main
from fastrl.errors import UserError
from fastrl.parallel.device import resolve_device


@pytest.mark.parametrize(
    "device", ["mps", "meta", "nonsense", "", "cuda:x", "cuda:-1", "CPU", "cpu:1", None, 0]
)
def test_devices_that_a_run_does_not_know(device):
    with pytest.raises(UserError, match="--device: expected auto, cpu, cuda or cuda:N; got"):
        resolve_device(device, "auto")


def test_the_device_of_a_run_is_one_that_is_there(monkeypatch):
    """Wrong: an index that no tensor on the CPU has; a missing GPU, found by the first copy to it."""
    assert resolve_device("cpu:0", "auto") == (torch.device("cpu"), torch.float32)
    assert resolve_device(torch.device("cpu"), "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1", "auto") == (torch.device("cuda", 1), torch.bfloat16)
    with pytest.raises(UserError, match="got 'cuda:2', but the last CUDA device of this machine is cuda:1"):
        resolve_device("cuda:2", "auto")


def test_a_variable_of_the_environment_with_a_wrong_value(monkeypatch, capsys):
    """Wrong: an internal error, with the advice to look at a traceback."""
    monkeypatch.setenv("FASTRL_BACKEND", "cuda:0")
    assert main(["env"]) == 1
    told = capsys.readouterr().err
    assert told == (
        "fastrl: error: FASTRL_BACKEND: expected one of auto, cuda, triton, cpu, reference; got 'cuda:0'\n"
    )
