"""The hand-kept lists of the packaging agree with each other.

Bugs that only these tests catch: a dependency without a pin, a pin below its own lower bound, two versions of
one project in two files, an extra that the Makefile forgets to install.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    extras = PROJECT["optional-dependencies"].values()
    wanted = [Requirement(text) for group in (PROJECT["dependencies"], *extras) for text in group]
    for requirement in wanted:
        if requirement.name != PROJECT["name"]:
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), requirement


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = [Requirement(text) for text in PROJECT["dependencies"]]
    assert pins.keys() == {requirement.name for requirement in wanted}
    for requirement in wanted:
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        assert Version(bound.version) == Version(pins[requirement.name]), requirement


def test_one_version_everywhere() -> None:
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[({re.escape(version)}|Unreleased)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_makefile_installs_every_extra() -> None:
    match = re.search(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert match is not None
    assert set(match[1].split(",")) == set(PROJECT["optional-dependencies"])
