"""Bits of two trees compared: `python tests/guard.py BASE_TREE` runs every training command in both and
compares what they leave.

Five steps of a tiny model, one thread, one seed.  What must be equal: metrics.jsonl without clock times,
samples.jsonl, and the bytes of the last checkpoint's tensors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "sft": ["sft"],
    "sft_neftune": ["sft", "--neftune-alpha", "5", "--label-smoothing", "0.1"],
    "grpo": ["grpo", "--minibatches", "2", "--refill", "1"],
    "grpo_kl": [
        "grpo",
        "--algorithm",
        "gspo",
        "--kl-coef",
        "0.1",
        "--correction",
        "token_truncate",
        "--epochs",
        "2",
    ],
    "grpo_carry": ["grpo", "--tail", "carry", "--tail-share", "0.5"],
    "ppo": ["ppo", "--kl-target", "0.5", "--group", "4", "--minibatches", "2"],
    "ppo_shared": ["ppo", "--critic", "shared", "--kl-in", "loss", "--group", "2"],
    "dpo": ["dpo"],
    "kto": ["dpo", "--algorithm", "kto"],
    "reward": ["reward", "--eval.every", "2"],
    "hybrid_dpo": ["hybrid", "--algorithm", "grpo_dpo", "--norms-every", "2"],
    "hybrid_luffy": ["hybrid", "--algorithm", "luffy"],
    "hybrid_srft": ["hybrid", "--algorithm", "srft", "--minibatches", "2"],
    "hybrid_online": ["hybrid", "--algorithm", "online_dpo"],
    "joint": ["joint", "--reward-every", "2", "--demonstrations"],
}
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "initializer_range": 0.2,
}
DIGITS = """
def digits(completions, **columns):
    return [sum(c.isdigit() for c in text) / 8 for text in completions]
"""
CLOCK = ("time", "eval/time", "perf/")


def run(tree: Path, folder: Path, name: str) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "rewards.py").write_text(DIGITS)
    command, *options = COMMANDS[name]
    shared = [
        "--model",
        "model.json",
        "--task",
        "cards",
        "--task-options",
        "k=2",
        "--output-dir",
        name,
        "--steps",
        "5",
        "--prompts",
        "4",
        "--micro-tokens",
        "200",
        "--optim.lr",
        "1e-2",
        "--eval.prompts",
        "4",
        "--threads",
        "1",
        "--save.every",
        "5",
    ]
    if command in ("grpo", "ppo", "hybrid", "joint"):
        shared += ["--max-new-tokens", "8", "--reward", "rewards.py:digits"]
        shared += [] if "--group" in options else ["--group", "4"]
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_CBWR": "AUTO,STRICT"}
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fastrl", command, *shared, *options],
            cwd=folder,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def left(folder: Path) -> dict[str, object]:
    """What a run left behind: name -> what must be equal."""
    from safetensors.numpy import load_file

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    out: dict[str, object] = {
        "metrics": [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows],
        "samples": (folder / "samples.jsonl").read_text() if (folder / "samples.jsonl").exists() else None,
    }
    for file in sorted((folder / "checkpoints" / "step_5").rglob("*.safetensors")):
        for key, value in load_file(file).items():
            out[f"{file.parent.name}/{file.name}/{key}"] = (value.shape, value.tobytes())
    return out


def all_runs(tree: Path, folder: Path, names: list[str]) -> None:
    waiting, going = list(names), []
    while waiting or going:
        while waiting and len(going) < 2:
            name = waiting.pop(0)
            going.append((name, run(tree, folder, name)))
        name, process = going.pop(0)
        if process.wait() != 0:
            print(f"{name}: exit {process.returncode}\n{(folder / f'{name}.log').read_text()[-2000:]}")


def main() -> int:
    base, work = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    names = sys.argv[3:] or list(COMMANDS)
    here = Path(__file__).resolve().parents[1]
    missing = [n for n in names if not (work / "base" / n / "checkpoints").exists()]
    all_runs(base, work / "base", missing)
    subprocess.run(["rm", "-rf", *(str(work / "here" / n) for n in names)], check=True)
    all_runs(here, work / "here", names)
    bad = 0
    for name in names:
        try:
            a, b = left(work / "base" / name), left(work / "here" / name)
        except OSError as error:
            print(f"{name}: {error}")
            bad += 1
            continue
        differ = [k for k in a.keys() | b.keys() if a.get(k) != b.get(k)]
        print(f"{name}: {len(a)} things, {len(differ)} differ {sorted(differ)[:4]}")
        bad += bool(differ) or len(a) < 5
    print("equal bits" if not bad else f"{bad} commands differ")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
