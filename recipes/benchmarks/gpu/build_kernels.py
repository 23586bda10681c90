"""
Wheels of mamba-ssm and causal-conv1d for one kind of GPU, built from their source archives without network.

Where there is network, fetch the archives with

    MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE pip download --no-deps --no-build-isolation \
        --no-binary :all: mamba-ssm==2.2.6.post3 causal-conv1d==1.7.0

The build needs nvcc of torch's CUDA version, torch, ninja, packaging, setuptools and wheel, but no GPU. Each `setup.py`
names up to eleven kinds of GPU, each of which multiplies the time; all but one are taken out of the commands of nvcc.
On 16 cores with other work beside it mamba-ssm took two minutes and causal-conv1d five.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

_FORCE = {"MAMBA_FORCE_BUILD": "TRUE", "CAUSAL_CONV1D_FORCE_BUILD": "TRUE", "NVCC_THREADS": "1"}
# mamba-ssm 2.2 imports names that transformers 5 no longer has; without them nothing of it can be imported.
_OLD_NAMES = "from transformers.generation import GreedySearchDecoderOnlyOutput, SampleDecoderOnlyOutput, TextStreamer"
_NEW_NAMES = (
    "from transformers.generation import GenerateDecoderOnlyOutput, TextStreamer\n"
    "GreedySearchDecoderOnlyOutput = SampleDecoderOnlyOutput = GenerateDecoderOnlyOutput"
)
_GENCODE = re.compile(r'cc_flag\.append\("arch=compute_(\w+),code=sm_\w+"\)')


def keep_one_architecture(setup: str, architecture: str) -> str:
    """
    The text of a `setup.py` that compiles for one kind of GPU.

    Args:
        setup (`str`): The text as its authors wrote it.
        architecture (`str`): Compute capability without the point, such as `"90"`.

    Raises:
        ValueError: If the text does not name this kind of GPU.
    """
    found = _GENCODE.findall(setup)
    if architecture not in found:
        raise ValueError(f"setup.py compiles for {', '.join(found) or 'nothing known'}, not for {architecture}.")
    wanted = f"arch=compute_{architecture},code=sm_{architecture}"
    # nvcc refuses the same pair twice, so the others go together with the flag before them.
    pairs = re.compile(r'( *)cc_flag\.append\("-gencode"\)\s*cc_flag\.append\("(arch=compute_\w+,code=sm_\w+)"\)')
    return pairs.sub(lambda match: match[0] if match[2] == wanted else f"{match[1]}pass", setup)


def build(archive: Path, output: Path, architecture: str, jobs: int) -> None:
    """
    Build the wheel of one source archive.

    Args:
        archive (`Path`): A `.tar.gz` of mamba-ssm or causal-conv1d.
        output (`Path`): Folder for the wheel.
        architecture (`str`): Compute capability without the point.
        jobs (`int`): Files that are compiled at a time.
    """
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        [source] = Path(folder).iterdir()
        setup = source / "setup.py"
        setup.write_text(keep_one_architecture(setup.read_text(), architecture))
        for generation in source.glob("mamba_ssm/utils/generation.py"):
            generation.write_text(generation.read_text().replace(_OLD_NAMES, _NEW_NAMES))
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(output), "."]
        subprocess.run(command, cwd=source, env={**os.environ, **_FORCE, "MAX_JOBS": str(jobs)}, check=True)


def main() -> None:
    """Build a wheel of each archive that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("wheels"))
    parser.add_argument("--architecture", default="90", help="compute capability without the point (default: 90)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="files compiled at a time")
    options = parser.parse_args()
    for archive in options.archives:
        build(archive, options.output.resolve(), options.architecture, options.jobs)


if __name__ == "__main__":
    main()
