"""Pack configs/ as stdit/configs, and let editable installs be found first: pyproject.toml can say neither."""

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.editable_wheel import editable_wheel


class OnThePath(editable_wheel):
    """Puts the clone on ``sys.path``.

    Setuptools' default asks a finder of its own last. In the folder that holds a clone named stdit, Python would then
    take the clone for a namespace package, which hides the package inside it.
    """

    def finalize_options(self) -> None:
        self.mode = self.mode or "compat"
        super().finalize_options()


setup(
    packages=[
        *find_packages(include=["stdit", "stdit.*"]),
        *(f"stdit.configs.{folder}" for folder in find_namespace_packages("configs")),
    ],
    package_dir={"stdit.configs": "configs"},
    cmdclass={"editable_wheel": OnThePath},
)
