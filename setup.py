from pathlib import Path

from setuptools import find_packages, setup

readme = Path(__file__).with_name("README.md")

setup(
    name="spotlighter-plugin",
    version="0.1.0",
    description="Token selection and a class memory for CLIP prompt tuning: more accurate on unseen classes, faster",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["spotlighter_plugin", "spotlighter_plugin.*"]),
    package_data={"spotlighter_plugin": ["weights/*", "workbench/reports/*.json"]},
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
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.90", "ruff>=0.6"],
        "figures": ["matplotlib>=3.7", "scikit-learn>=1.3"],
    },
    entry_points={"console_scripts": ["spotlighter = spotlighter_plugin.cli:main"]},
)
