"""The files around the package agree with each other, and nothing tracked is large or tells of one machine."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import lorakit
from lorakit import cli
from lorakit.course.runner import KERNEL_ENV

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    *(".ci", ".gitignore", "LICENSE", "Makefile", "README.md", "constraints.txt", "environment.yml", "pyproject.toml"),
    *(".github", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"),
    *("data", "lorakit", "notebooks", "tests"),
}
MAX_BYTES = 5_000_000
MACHINE = re.compile(
    r"/(home|Users)/\w|[^\w.]/(root|tmp|opt|mnt)/\w|file:/{2}|\w\.(internal|corp|lan)\b"  # somebody's paths and hosts
    r"|\b(10\.\d{1,3}|192\.168)(\.\d{1,3}){2}\b"
)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads(read("pyproject.toml"))["project"]


@pytest.fixture(scope="module")
def pins():
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "expected only name==version"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.fixture(scope="module")
def tracked():
    """The files that git has or would take."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("needs a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in names if name and (ROOT / name).is_file()]


def test_every_dependency_is_pinned_inside_its_range(project, pins):
    asked = sum(project["optional-dependencies"].values(), project["dependencies"])
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name == project["name"]:
            assert requirement.extras <= set(project["optional-dependencies"])
        else:
            assert requirement.specifier, f"{name} has no lower bound"
            assert name in pins, f"{name} is not in constraints.txt"
            assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is not {requirement.specifier}"


def test_conda_takes_the_same_packages(project):
    environment = yaml.safe_load(read("environment.yml"))
    plain = [each for each in environment["dependencies"] if isinstance(each, str)]
    (pip,) = (each["pip"] for each in environment["dependencies"] if isinstance(each, dict))
    (python,) = (each.split("=")[1] for each in plain if each.startswith("python="))
    assert SpecifierSet(project["requires-python"]).contains(python)
    assert {"pip", "make"} <= set(plain)
    constraints, editable = pip
    assert constraints == "-c constraints.txt"
    (extra,) = re.fullmatch(r"-e \.\[(\w+)\]", editable).groups()
    assert extra in project["optional-dependencies"]
    assert f"-c constraints.txt -e '.[{extra}]'" in read("Makefile"), "conda and make install the same"


def test_the_version_is_one(project):
    cited = yaml.safe_load(read("CITATION.cff"))
    versions = re.findall(r"^## \[(\d\S*)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert project["version"] == lorakit.__version__ == cited["version"] == versions[0]
    assert project["license"] == cited["license"]


def test_a_commit_is_checked_by_the_same_ruff(pins):
    (repo,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repo["rev"] == f"v{pins['ruff']}"


def test_the_workflows_run_what_people_run(project):
    jobs = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    (marks,) = {words for line in [*commands, read("Makefile")] for words in re.findall(r"not slow[\w ]*", line)}
    assert marks == "not slow and not long"
    pythons = jobs["quick"]["strategy"]["matrix"]["python"]
    assert all(SpecifierSet(project["requires-python"]).contains(python) for python in pythons)
    assert len(pythons) >= 4


def make_targets():
    return set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))


def test_make_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)", read("Makefile"), re.MULTILINE)[1]
    assert make_targets() == set(phony.split()) == set(re.findall(r"^([a-z]+):.*## ", read("Makefile"), re.MULTILINE))


def test_make_lab_takes_options_for_jupyterlab():
    printed = subprocess.run(["make", "-n", "lab", "LAB=--allow-root"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "jupyter lab notebooks --allow-root" in printed


def test_make_and_lorakit_give_kernels_the_same_environment():
    assert dict(re.findall(r"^export (\w+) := (.*)", read("Makefile"), re.MULTILINE)) == KERNEL_ENV


NIGHTLY = ".github/workflows/nightly.yml"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", ".ci/run", "environment.yml", NIGHTLY])
def test_commands_that_are_named_exist(name):
    text = read(name)
    # a command is in backquotes, or begins a line of a block of code
    makes = set(re.findall(r"(?:^\s*|`|exec |run: )make ([a-z]+)", text, re.MULTILINE))
    lorakits = set(re.findall(r"(?:^\s*|`)lorakit ([a-z]+)\b", text, re.MULTILINE))
    assert makes <= make_targets()
    assert lorakits <= set(cli.COMMANDS)
    assert name != "README.md" or makes >= {"start", "test"}, "the README names the two commands"


def test_nothing_tracked_is_large(tracked):
    assert {str(path): size for path in tracked if (size := (ROOT / path).stat().st_size) > MAX_BYTES} == {}


def test_the_top_level_is_the_agreed_one(tracked):
    assert {path.parts[0] for path in tracked} <= TOP_LEVEL


def test_nothing_tracked_tells_of_one_machine(tracked):
    leaks = []
    for path in tracked:
        text = (ROOT / path).read_text(encoding="utf-8", errors="ignore")
        here = re.escape(str(ROOT)) if len(ROOT.parts) > 2 else "(?!)"  # a checkout in /src would be found everywhere
        leaks += [f"{path}: {match[0]}" for match in re.finditer(f"{MACHINE.pattern}|{here}", text)]
    assert leaks == []


@pytest.mark.parametrize(
    ("text", "word"),  # apart, so that this file has no machine in it
    [
        ("cd /%s/ann", "home"),
        ("(/%s/x)", "root"),
        ("http://wheels.%s/simple", "corp"),
        ("%s.2.3", "10.1"),
        ("file:/%s", "/x"),
    ],
)
def test_a_machine_is_recognised(text, word):
    assert MACHINE.search(text % word)
    assert not MACHINE.search(text % "course")
