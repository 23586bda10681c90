"""Packaging of hf_compressm."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hf_compressm" / "__init__.py").read_text(), re.MULTILINE)[1]

RECIPES = ["evaluate>=0.4.3", "pillow", "pyyaml", "rich", "scikit-learn"]
BENCHMARKS = ["mambapy"]
TEST = [
    "control",
    "hypothesis",
    'ipykernel; python_version >= "3.11"',
    "mpmath",
    'nbclient; python_version >= "3.11"',
    'optuna; python_version >= "3.11"',
    "peft",
    "pymor",
    "pytest",
    "pytest-xdist",
    "ruff",
    "scipy",
    "slycot",
    "tensorboard",
    'trackio; python_version >= "3.11"',
]

setup(
    name="hf_compressm",
    version=VERSION,
    description="Make a state-space model smaller and faster while the Hugging Face Trainer trains it.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # The demo's recipe travels with the package, so that `hf-compressm demo` runs wherever it is installed.
    packages=[*find_packages(include=["hf_compressm", "hf_compressm.*"]), "hf_compressm._recipes.digits"],
    package_dir={"hf_compressm._recipes.digits": "recipes/digits"},
    package_data={
        "hf_compressm": ["py.typed"],
        "hf_compressm.cli": ["report.html"],
        "hf_compressm.cards": ["template.md"],
    },
    entry_points={"console_scripts": ["hf-compressm = hf_compressm.cli:main"]},
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.1",
        "datasets>=4.0",
        "huggingface-hub>=1.0",
        "jinja2",
        "matplotlib",
        "numba>=0.60",
        "numpy",
        "psutil",
        "pyyaml",
        "safetensors",
        "tabulate",
        "torch>=2.9",
        "tqdm",
        "transformers>=5.17",
        "typer",
    ],
    extras_require={
        "mamba": ["mamba-ssm", "causal-conv1d"],
        "deepspeed": ["deepspeed>=0.18"],
        "recipes": RECIPES,
        "benchmarks": RECIPES + BENCHMARKS,
        "test": RECIPES + BENCHMARKS + TEST,
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
