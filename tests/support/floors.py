"""Lower bounds of the requirements as constraints for pip, printed for `make test-floors`."""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip brings a reader along where Python has none
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
#: Extras that only check or build the code, or name one version of each of their packages.
TOOLS = ("dev", "integrations", "peft-suite")


def floors(pyproject: Path = PYPROJECT) -> dict[str, str]:
    """Package -> lowest version that the project and its extras ask for."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    texts = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        texts += requirements if extra not in TOOLS else []
    found = {}
    for requirement in map(Requirement, texts):
        lowest = [each.version for each in requirement.specifier if each.operator in (">=", "==")]
        if not lowest:
            raise ValueError(f'"{requirement}" has no lowest version.')
        found[requirement.name] = lowest[0]
    return found


if __name__ == "__main__":
    for name, version in floors().items():
        print(f"{name}=={version}")
