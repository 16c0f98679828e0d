from pathlib import Path

from setuptools import find_packages, setup

readme = Path(__file__).with_name("README.md")

# What a reader of CoOp looks for at the top of the repository is installed below the package: nobody's `datasets` or
# `trainers` is shadowed. compat.ROOT is where they are found.
BUNDLED = {  # folder: its data files
    "trainers": [],
    "datasets": ["[!_]*/*"],
    "configs": ["*/*.yaml", "*/*/*.yaml"],
    "patches": ["*.diff"],
}
bundled = {f"spotlighter_plugin.bundled.{folder}": folder for folder in BUNDLED}

setup(
    name="spotlighter-plugin",
    version="0.2.0",
    description="Token selection and a class memory for CLIP prompt tuning",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="Spotlighter contributors",
    project_urls={
        "Paper": "https://arxiv.org/abs/2509.00905",
        "Documentation": "docs/README.md",
        "Changelog": "CHANGELOG.md",
        "Contributing": "CONTRIBUTING.md",
    },
    license="MIT",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["spotlighter_plugin", "spotlighter_plugin.*"]), *bundled],
    package_dir=bundled,
    package_data={
        "spotlighter_plugin": ["py.typed", "weights/*", "workbench/reports/*.json"],
        **{package: BUNDLED[folder] for package, folder in bundled.items()},
    },
    install_requires=[
        "torch>=2.1",
        "torchvision>=0.16",
        "openai-clip>=1.0.1",
        "setuptools<81",  # openai-clip imports pkg_resources, which later setuptools no longer carry
        "yacs>=0.1.8",
        "numpy>=1.24",
        "pillow>=9.5",
        "safetensors>=0.4",
        "typer>=0.12",
        "rich>=13",
        "tqdm>=4.60",
        "matplotlib>=3.7",
        "scikit-learn>=1.3",
    ],
    extras_require={
        "open_clip": ["open_clip_torch>=2.20"],
        "transformers": ["transformers>=4.40"],
        "slurm": ["submitit>=1.4"],
        "ray": ["ray>=2"],
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.90", "ruff>=0.6"],
    },
    entry_points={"console_scripts": ["spotlighter = spotlighter_plugin.cli:main"]},
)
