"""What an installed fastrl is: its name beside Hugging Face's `kernels`, its links, what importing it costs,
its wheel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastrl

ROOT = Path(__file__).parents[1]
LINKS = {"fastrl/kernels": "../kernels", "fastrl/bench": "../bench"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(code: str, *, cwd: Path = ROOT) -> str:
    """Run `code` the way a user does from `cwd`: with that folder first on sys.path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- the name `kernels` -----------------------------------------------------------------------------
def test_our_kernels_never_shadow_hugging_face():
    """Wrong: an __init__.py in kernels/, with which some versions of transformers cannot even import a Llama
    config.
    """
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "bench" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents


def test_transformers_imports_from_the_repository_root():
    assert python("import transformers; print(transformers.LlamaConfig().model_type)") == "llama"


def test_a_real_kernels_package_wins_over_our_folder(tmp_path):
    """Wrong: a folder that Python prefers to the package of that name which is installed further down
    sys.path.
    """
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("MARK = 'the real one'")
    assert (
        python(f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.MARK)")
        == "the real one"
    )


# --- a machine with a GPU ---------------------------------------------------------------------------
# not needed by an op, a sampler or a benchmark
FOREIGN = (
    "tyro",
    "trl",
    "liger_kernel",
    "cut_cross_entropy",
    "ruff",
    "mypy",
)


def test_gpu_check_needs_no_command_line_package():
    """Wrong: a file of GPU tests or a benchmark that imports the command line: not one test runs where tyro
    is not installed.
    """
    files = sorted(
        p
        for p in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"mark\.gpu", p.read_text(encoding="utf-8"))
    )
    assert len(files) > 9
    code = f"""
import importlib.util, sys
class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition('.')[0] in {FOREIGN!r}:
            raise ModuleNotFoundError('No module named ' + repr(name), name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, 'tests/helpers')
for i, file in enumerate({[str(f) for f in files]!r}):
    spec = importlib.util.spec_from_file_location('gpu' + str(i), file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
from fastrl.bench import run
print(len([run.load(name) for name in run.names()]))
"""
    assert int(python(code)) > 15


# --- links ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("link, target", LINKS.items())
def test_links_are_committed_as_links(link, target):
    """Wrong: a copy of the folder, or a link that .gitignore hides."""
    assert (ROOT / link).is_symlink()
    assert os.readlink(ROOT / link) == target
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: only the link itself was checked")
    assert subprocess.run(["git", "check-ignore", "-q", link], cwd=ROOT).returncode == 1
    listed = subprocess.run(["git", "ls-files", "-s", link], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(line.startswith("120000 ") for line in listed.splitlines()), listed


# --- imports ----------------------------------------------------------------------------------------
def test_importing_fastrl_does_not_import_torch():
    assert (
        python(
            "import fastrl, sys; print(sorted({'torch', 'triton', 'transformers', "
            "'numpy'} & set(sys.modules)))"
        )
        == "[]"
    )


def test_ops_survive_the_absence_of_triton():
    """Wrong: `import triton` at the top of an op file; triton has no wheels outside Linux."""
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Blocker())
import torch
from fastrl import ops
with ops.use_backend("reference"):
    print(round(ops.token_logp(torch.zeros(1, 4), torch.zeros(1).long()).logp.exp().item(), 4))
"""
    assert python(code) == "0.25"


# --- metadata ---------------------------------------------------------------------------------------
def test_metadata_is_that_of_the_source():
    try:
        installed = importlib.metadata.distribution("fastrl-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastrl-kernels is not installed: running from the source tree")
    assert installed.version == fastrl.__version__
    assert {e.name: e.value for e in installed.entry_points}["fastrl"] == "fastrl.cli:main"


def test_the_build_does_not_need_torch():
    assert not any("torch" in r for r in PROJECT["build-system"]["requires"])
    assert "import torch" not in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_constraints_pin_every_direct_dependency():
    """Wrong: a dependency added to pyproject.toml alone, whose version then changes under us."""
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["test"],
        *PROJECT["build-system"]["requires"],
    ]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name(line) for line in lines if "==" in line or "<=" in line}
    assert {name(w) for w in wanted} <= pinned


def name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group().lower()


# --- the compiled module ----------------------------------------------------------------------------
def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """setup.py build_ext, with nothing written outside `folder`."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-temp",
        str(folder / "temp"),
        "--build-lib",
        str(folder / "lib"),
    ]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


needs_builder = pytest.mark.skipif(
    not (importlib.util.find_spec("setuptools") and importlib.util.find_spec("pybind11")),
    reason="setuptools or pybind11 not installed here",
)


@needs_builder
def test_a_cuda_toolkit_that_fails_is_an_error(tmp_path):
    """Wrong: a module that silently lacks its CUDA kernels because of a broken toolkit."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    done = build(tmp_path, CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert re.search(
        r"csrc/cuda/\w+\.cu: .*nvcc failed .* set FASTRL_CUDA=0 to build without CUDA", done.stderr
    )


@needs_builder
@pytest.mark.slow
def test_building_without_cuda_leaves_its_functions_out(tmp_path):
    done = build(tmp_path, FASTRL_CUDA="0")
    assert done.returncode == 0, done.stderr
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'lib' / 'fastrl')!r}); import _C; "
        "print([n for n in dir(_C) if 'token_logp' in n])"
    )
    assert (
        python(code, cwd=tmp_path)
        == "['token_logp_backward_cpu', 'token_logp_forward_cpu', 'token_logp_fused_cpu']"
    )


# --- the wheel --------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_wheel_holds_everything(tmp_path):
    """Builds in isolation (only setuptools and pybind11).  Wrong: find_packages, which misses fastrl.kernels;
    packing a Triton that `make` installed beside.
    """
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", "runs", "demo", ".triton"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    other = copy / ".triton" / "3.6.0" / "triton"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-q", "-w", str(tmp_path)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("fastrl_kernels-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(p.relative_to(ROOT)) for p in ROOT.glob("fastrl/**/*.py")}
    expected |= {
        f"fastrl/{folder}/{p.name}" for folder in ("kernels", "bench") for p in ROOT.glob(f"{folder}/*.py")
    }
    expected |= {
        str(p.relative_to(ROOT))
        for suffix in ("yaml", "json")
        for p in ROOT.glob(f"fastrl/recipes/*.{suffix}")
    }
    expected |= {"fastrl/py.typed", "fastrl/_C.pyi"}
    assert expected <= names, sorted(expected - names)
    assert any(re.fullmatch(r"fastrl/_C\..*\.(so|pyd)", n) for n in names)
    assert {n.split("/")[0] for n in names} == {"fastrl", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
