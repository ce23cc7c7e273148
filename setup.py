"""Builds fastrl._C: the CPU kernels everywhere, the CUDA kernels too where nvcc is found.  Needs pybind11,
not torch.

CUDA_HOME         the toolkit to use; otherwise nvcc on PATH
FASTRL_CUDA=0     build without the CUDA kernels although nvcc is there
FASTRL_CUDA_ARCH  compute capabilities to compile for, separated by commas.  80,90+PTX is the default: machine
                  code for 8.x and 9.0, and PTX that the driver compiles once for later ones.  No kernel uses
                  what only 90a has.  A capability takes 7 s of one core and 0.3 MB.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

HEADERS = [str(p) for suffix in ("*.h", "*.cuh", "*.cu") for p in sorted(Path("csrc").rglob(suffix))]


def nvcc() -> str | None:
    """The CUDA compiler, or None where there is none or it is not wanted."""
    if os.environ.get("FASTRL_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def architectures() -> str:
    """The compute capabilities to compile for."""
    asked = os.environ.get("FASTRL_CUDA_ARCH") or "80,90+PTX"
    if not re.fullmatch(r"\d+(a|\+PTX)?(,\d+(a|\+PTX)?)*", asked):
        raise SystemExit(f"FASTRL_CUDA_ARCH: expected a list such as 80,90+PTX, got {asked!r}")
    return asked


def code_for(archs: str) -> list[str]:
    """nvcc's arguments: machine code for each capability, and PTX where asked for."""
    options = []
    for arch in archs.split(","):
        capability = arch.removesuffix("+PTX")
        options.append(f"-gencode=arch=compute_{capability},code=sm_{capability}")
        if arch != capability:
            options.append(f"-gencode=arch=compute_{capability},code=compute_{capability}")
    return options


def static_runtime(compiler: str) -> list[str]:
    """Linker arguments for the static CUDA runtime, from the folders nvcc itself would link against."""
    told = subprocess.run([compiler, "--dryrun", "nothing.cu"], capture_output=True, text=True).stderr
    line = next((x for x in told.splitlines() if "LIBRARIES=" in x), "")
    folders = [Path(f) for f in re.findall(r'-L\s*"?([^"\s]+)', line)]
    archive = next((f / "libcudart_static.a" for f in folders if (f / "libcudart_static.a").exists()), None)
    if archive is None:
        raise SystemExit(
            f"{compiler}: libcudart_static.a not found in {folders}; install it, "
            "or set FASTRL_CUDA=0 to build without CUDA"
        )
    return [str(archive), "-lrt", "-ldl", "-lpthread"]


def side_by_side(compile_one: Callable[[Any], Any], sources: Sequence[Any]) -> list[Any]:
    """The results of compiling each source, in order: as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


class Build(build_ext):
    """build_ext, with csrc/cuda/*.cu compiled to objects first."""

    def build_extension(self, ext: Extension) -> None:
        compiler = nvcc()
        print(
            "fastrl: CUDA kernels "
            f"{'compiled by ' + compiler if compiler else 'left out (no nvcc, or FASTRL_CUDA=0)'}",
            flush=True,
        )
        if compiler:
            ext.define_macros.append(("FASTRL_CUDA", "1"))
            sources = sorted(Path("csrc/cuda").glob("*.cu"))
            ext.extra_objects = side_by_side(lambda source: self.compile_cuda(compiler, source), sources)
            ext.extra_link_args += static_runtime(compiler)
        whole = self.compiler.compile
        self.compiler.compile = lambda sources, **options: [
            target for (target,) in side_by_side(lambda source: whole([source], **options), sources)
        ]
        super().build_extension(ext)

    def compile_cuda(self, compiler: str, source: Path) -> str:
        """The object file of one .cu file, compiled again only when something under csrc is newer."""
        archs = architectures()
        target = Path(self.build_temp) / f"{source.stem}_cuda_{archs}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        newest = max(Path(p).stat().st_mtime for p in [*HEADERS, __file__])
        if target.exists() and target.stat().st_mtime > newest and not self.force:
            return str(target)
        command = [compiler, "-O3", "-std=c++17", "--compiler-options", "-fPIC,-fvisibility=hidden"]
        command += code_for(archs)
        command += ["-DFASTRL_CUDA=1", f'-DFASTRL_CUDA_ARCH="{archs}"', "-c", str(source), "-o", str(target)]
        print(" ".join(command), flush=True)
        if subprocess.run(command).returncode:
            raise SystemExit(
                f"{source}: {compiler} failed (above); fix the toolkit, "
                "or set FASTRL_CUDA=0 to build without CUDA"
            )
        return str(target)


# No -fopenmp: threads come from the runtime torch has loaded (csrc/cpu/targets.cpp), never from a second one.
# -fno-math-errno lets the compiler keep double exp and log inline; NaN and infinity keep their meaning.
CFLAGS = [
    "-O3",
    "-std=c++17",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]

setup(
    packages=find_namespace_packages(
        include=["fastrl", "fastrl.*"], exclude=["*.__pycache__", "fastrl.bench.results*"]
    ),
    ext_modules=[
        Extension(
            "fastrl._C",
            sources=["csrc/bindings.cpp", *(str(p) for p in sorted(Path("csrc/cpu").glob("*.cpp")))],
            depends=HEADERS,
            include_dirs=[pybind11.get_include()],
            extra_compile_args=CFLAGS,
            extra_link_args=[] if sys.platform == "darwin" else ["-ldl"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": Build},
)
