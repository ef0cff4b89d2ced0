"""Pack configs/ as stdit/configs, which pyproject.toml cannot say; everything else stands there."""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    packages=[
        *find_packages(include=["stdit", "stdit.*"]),
        *(f"stdit.configs.{folder}" for folder in find_namespace_packages("configs")),
    ],
    package_dir={"stdit.configs": "configs"},
)
