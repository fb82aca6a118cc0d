"""What pyproject.toml cannot say: recipes/ is installed inside the package, as finetune/recipe/shipped."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["finetune*", "modeling*"]), "finetune.recipe.shipped"],
    package_dir={"finetune.recipe.shipped": "recipes"},
)
