"""The package as a stranger gets it: a wheel, its optional packages absent, its dependencies with hashes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = {"dev", "docs"}
"""Extras of those who build the package; the others are of those who use it."""


def run(words: list[str], folder: Path, **environment: str) -> str:
    """What a command prints that must end well, with nothing of this process's Python path and no other
    programs in reach: no git, no make."""
    inherited = {name: os.environ[name] for name in ("HOME", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {**inherited, "PATH": str(folder / "no-programs"), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- the wheel ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that is built from it."""
    place = tmp_path_factory.mktemp("distributions")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place), str(ROOT)], place)
    return place


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    files = (path for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert packed == {str(path.relative_to(source)) for path in files}


def test_an_index_would_take_both_distributions(distributions):
    files = sorted(str(path) for path in distributions.iterdir() if path.suffix in (".whl", ".gz"))
    assert len(files) == 2
    words = [sys.executable, "-m", "twine", "check", "--strict", *files]
    assert run(words, distributions).count("PASSED") == 2


def test_the_installed_wheel_runs_the_demo_without_git_and_make(wheel, tmp_path):
    """The dependencies are those of this environment; package and program are the wheel's."""
    place = tmp_path / "installed"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    run([sys.executable, "-m", "pip", *install], tmp_path)
    installed = {"PYTHONPATH": str(place), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    where = "import softdefend; print(softdefend.__file__)"
    assert run([sys.executable, "-c", where], tmp_path, **installed).startswith(str(place))
    small = "--data.train_size 64 --optim.epochs 1 --evaluate.size 32 --evaluate.curve_size 0 --parallel 1"
    program = [sys.executable, str(place / "bin" / "softdefend")]
    printed = run([*program, "demo", *small.split(), "--runtime.device", "cpu"], tmp_path, **installed)
    assert printed.rstrip().endswith("report: demo/report.html")
    assert (tmp_path / "demo" / "report.html").is_file()
    for preset, label in (("pgd-at", "Hard"), ("sglr-reference", "SGLR")):
        config = yaml.safe_load((tmp_path / "demo" / f"{preset}-seed0" / "config.yaml").read_text())
        assert config["label"]["class_path"] == f"softdefend.{label}"
        assert (config["data"]["source"], config["data"]["noise_rate"]) == ("digits", 0.3)
        assert preset in printed


# --- optional packages --------------------------------------------------------------------------------------


def optional_modules() -> set[str]:
    """Modules that come with an extra, by the names under which they are imported."""
    extras = {name: PROJECT["optional-dependencies"][name] for name in PROJECT["optional-dependencies"]}
    wanted = {Requirement(line).name for name in extras.keys() - TOOLS for line in extras[name]}
    required = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    names = {canonicalize_name(name) for name in wanted} - required
    installed = {
        module
        for module, owners in packages_distributions().items()
        if names & {canonicalize_name(owner) for owner in owners}
    }
    return installed | {name.replace("-", "_") for name in names}


ALONE = """
import importlib, pkgutil, sys
for name in {blocked!r}:
    sys.modules[name] = None  # as if it were not installed: import fails, and find_spec finds nothing
import softdefend
from softdefend.cli.main import COMMANDS, main
for module in pkgutil.walk_packages(softdefend.__path__, "softdefend."):
    if module.name not in ("softdefend.__main__", "softdefend.execution.fused.kernels"):
        importlib.import_module(module.name)
for words in (["--help"], *([command, "--help"] for command in COMMANDS)):
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == 0, words
print("all", len(COMMANDS), "commands")
"""


def test_everything_imports_and_helps_without_the_optional_packages(tmp_path):
    blocked = sorted(optional_modules())
    assert {"timm", "tensorboard", "cleanlab"} <= set(blocked)
    script = ALONE.format(blocked=blocked)
    printed = run([sys.executable, "-W", "error", "-c", script], tmp_path, PYTHONPATH=str(ROOT / "src"))
    assert re.search(r"^all \d\d commands$", printed, flags=re.MULTILINE)


# --- the lock -----------------------------------------------------------------------------------------------


def locked(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Requirement and hashes of each package of a lock file."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = [line.split("--hash=") for line in text.splitlines()]
    requirements = [(Requirement(line[0].strip()), [one.strip() for one in line[1:]]) for line in lines]
    return {canonicalize_name(one.name): (one, hashes) for one, hashes in requirements}


LOCK, TORCH = locked("requirements.lock"), locked("requirements-torch.lock")


def required(names: list[Requirement]) -> Iterator[Requirement]:
    """Requirements of this platform and all that they require, as the installed packages say it."""
    todo, seen = list(names), set()
    while todo:
        one = todo.pop()
        if one.marker is not None and not any(
            one.marker.evaluate({"extra": extra}) for extra in (*one.extras, "")
        ):
            continue
        yield one
        for extra in ("", *one.extras):
            if (one.name, extra) in seen:
                continue
            seen.add((one.name, extra))
            try:
                below = [Requirement(line) for line in requires(one.name) or ()]
            except PackageNotFoundError:  # needed on other platforms only
                continue
            todo += [
                Requirement(str(other).partition(";")[0])
                for other in below
                if (other.marker is None and not extra)
                or (other.marker is not None and other.marker.evaluate({"extra": extra}))
            ]


def test_the_lock_pins_whatever_the_package_requires():
    pins = {**LOCK, **TORCH}
    for one in required([Requirement(line) for line in PROJECT["dependencies"]]):
        assert canonicalize_name(one.name) in pins, f"{one.name} is not locked: make lock"
        (pin,) = pins[canonicalize_name(one.name)][0].specifier
        assert one.specifier.contains(pin.version), f"{one} is locked as {pin}: make lock"


def test_every_locked_file_has_a_hash_and_every_package_stands_in_one_lock():
    for one, hashes in (*LOCK.values(), *TORCH.values()):
        assert [pin.operator for pin in one.specifier] == ["=="]
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes)
    assert not LOCK.keys() & TORCH.keys()
    assert "torch" in TORCH
    assert not [name for name in LOCK if re.match(r"torch|triton|nvidia|cuda", name)]


def test_lock_and_constraints_agree():
    lines = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().split()]
    for name, (one, _) in {**LOCK, **TORCH}.items():
        fixed = [line.specifier for line in lines if canonicalize_name(line.name) == name]
        assert fixed in ([], [one.specifier]), name


# --- what stands around the code ----------------------------------------------------------------------------


def test_no_dependency_is_named_twice():
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        names = [canonicalize_name(Requirement(line).name) for line in group]
        assert len(set(names)) == len(names)


def test_workflows_run_targets_of_the_makefile_on_every_supported_python():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    workflows = {path.stem: path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    for text in workflows.values():
        assert set(re.findall(r"\bmake ([a-z]+)", text)) <= targets
        assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    matrix = yaml.safe_load(workflows["test"])["jobs"]["test"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: "
    assert matrix == [line.removeprefix(prefix) for line in PROJECT["classifiers"] if prefix in line]


def test_the_images_copy_files_that_are_there():
    recipe = (ROOT / "Dockerfile").read_text()
    copied = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", recipe, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert {"cpu", "cuda"} <= set(re.findall(r"^FROM \S+ AS (\w+)$", recipe, flags=re.MULTILINE))
