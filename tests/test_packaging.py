"""The package and its set-up: what a wheel holds, that it works elsewhere, that the lists of dependencies agree, when .venv is remade."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from picotrain import hardware

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, REPO)
    (path,) = folder.glob("picotrain-*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else; its dependencies come from the running environment."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def run_elsewhere(site: Path, cwd: Path, *command: str | Path) -> str:
    """Output of a command that sees the installed wheel before this checkout and runs in a folder without one."""
    env = {**os.environ, "PYTHONPATH": str(site), "PICOTRAIN_CACHE": str(cwd / "cache")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_every_config_and_nothing_beside_the_package(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"picotrain/{path.relative_to(REPO)}" for path in (REPO / "conf").rglob("*.yaml")}
    assert configs and configs <= held
    assert {name.split("/")[0] for name in held} == {"picotrain", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_an_installed_wheel_finds_its_configs_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    origin = run_elsewhere(site, tmp_path, sys.executable, "-c", "import picotrain; print(picotrain.__file__)")
    assert Path(origin.strip()).is_relative_to(site)
    resolved = run_elsewhere(site, tmp_path, sys.executable, "-m", "picotrain.cli", "config", "model=d2")
    assert re.search(r"(?m)^ +depth: 2$", resolved)


def test_the_console_script_of_an_installed_wheel_works(site: Path, tmp_path: Path) -> None:
    resolved = run_elsewhere(site, tmp_path, site / "bin" / "picotrain", "config", "model=d4")
    assert re.search(r"(?m)^ +depth: 4$", resolved)


def test_an_installed_wheel_measures_its_machine_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    options = ["matmul", "--size", "256", "--repeats", "1", "--device", "cpu", "--json"]
    lines = run_elsewhere(site, tmp_path, sys.executable, "-m", "picotrain", "bench", *options).splitlines()
    assert json.loads(lines[0])["environment"]["commit"] is None, "the wheel is of no checkout"
    assert [json.loads(line)["precision"] for line in lines[1:]] == ["fp32", "bf16"]


def test_wheel_version_is_the_package_version(wheel: Path) -> None:
    import picotrain

    assert wheel.name.split("-")[1] == picotrain.__version__


def test_the_docs_table_lists_exactly_the_dependencies() -> None:
    page = REPO / "docs" / "code.md"
    section = re.search(r"(?ms)^#+ Dependencies\b.*?$(.*?)(?=^#|\Z)", page.read_text("utf-8"))
    assert section, f"{page.name} has no heading 'Dependencies'"
    cells = re.findall(r"(?m)^\|([^|\n]+)\|", section[1])
    table = {canonicalize_name(name) for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    required = names(PROJECT["dependencies"])
    optional = set().union(*(names(extra) for extra in PROJECT["optional-dependencies"].values()))
    assert required <= table, f"{page.name} lacks {sorted(required - table)}"
    assert table <= required | optional, f"{page.name} lists what pyproject.toml does not: {sorted(table - required - optional)}"


def test_every_requirement_is_pinned_to_a_version_it_allows() -> None:
    lines = [line.split("#")[0].strip() for line in (REPO / "constraints.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line)
    pins = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"].values()
    for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, f"constraints.txt does not satisfy {line}"


# When .venv is remade, brought up to date or left alone (scripts/make_venv.py).


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/make_venv.py, pointed at an empty checkout that has a usable interpreter in .venv."""
    spec = importlib.util.spec_from_file_location("make_venv", REPO / "scripts" / "make_venv.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("PICOTRAIN_PYTHON", "PICOTRAIN_TORCH", "PICOTRAIN_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = []\noptional-dependencies = { dev = [], tensorboard = [] }\n")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", venv)
    monkeypatch.setattr(module, "PYTHON", venv / "bin" / "python")
    monkeypatch.setattr(module, "STAMP", venv / "stamp.json")
    return module


def stamped(setup: ModuleType, *extras: str) -> dict:
    return {**setup.wanted_stamp(None, list(extras)), "python": setup.venv_python()}


def test_set_up_refuses_an_extra_that_does_not_exist(setup: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no such extra: nope; pyproject.toml has dev, tensorboard"):
        setup.main(["nope"])
    assert setup.read_stamp() is None, "nothing was touched"


def test_set_up_leaves_a_finished_venv_alone(setup: ModuleType) -> None:
    stamp = stamped(setup, "dev")
    assert setup.why_remake(stamp, setup.venv_python()) is None
    assert setup.why_refresh(stamp, setup.wanted_stamp(stamp, ["dev"])) is None
    assert setup.why_refresh(stamp, setup.wanted_stamp(stamp, [])) is None, "the run-time set-up must not undo the extra dev"


def test_set_up_adds_a_missing_extra_and_keeps_the_others(setup: ModuleType) -> None:
    stamp = stamped(setup, "tensorboard")
    wanted = setup.wanted_stamp(stamp, ["dev"])
    assert wanted["extras"] == ["dev", "tensorboard"]
    assert setup.why_refresh(stamp, wanted) == "it lacks dev"


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_set_up_follows_a_changed_input(setup: ModuleType, name: str) -> None:
    stamp = stamped(setup)
    (setup.ROOT / name).write_text("changed")
    assert "changed" in setup.why_refresh(stamp, setup.wanted_stamp(stamp, []))


def test_set_up_remakes_a_venv_that_cannot_be_used(setup: ModuleType) -> None:
    stamp, version = stamped(setup), setup.venv_python()
    assert setup.why_remake(stamp, "3.10"), "another Python"
    assert setup.why_remake({**stamp, "venv": "/elsewhere/.venv"}, version), "moved"
    assert setup.why_remake({}, version), "interrupted"
    setup.PYTHON.unlink()
    setup.PYTHON.symlink_to(setup.ROOT / "gone")
    assert setup.venv_python() is None
    assert setup.why_remake(stamp, None), "interpreter gone"


def test_set_up_remembers_the_choice_of_torch_until_another_is_named(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICOTRAIN_TORCH", "torch==2.11.0")
    stamp = stamped(setup)
    monkeypatch.delenv("PICOTRAIN_TORCH")
    assert setup.why_refresh(stamp, setup.wanted_stamp(stamp, [])) is None
    monkeypatch.setenv("PICOTRAIN_TORCH", "torch==2.12.0")
    assert setup.why_refresh(stamp, setup.wanted_stamp(stamp, []))


@pytest.mark.parametrize(
    ("cuda", "index"), [(None, "cpu"), ("12.4", "cu126"), ("12.8", "cu128"), ("13.1", "cu130"), ("11.4", None)], ids=str
)
def test_set_up_takes_the_build_of_torch_that_fits_the_driver(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, index: str | None
) -> None:
    asked: list[str] = []

    def page(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(b"<a>torch-2.13.0%2Bx-cp312.whl</a>")

    monkeypatch.setattr(setup, "urlopen", page)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    head = f"Driver Version: 550.54.14   CUDA Version: {cuda}"
    answer = f'case "$*" in *query-gpu*) echo "NVIDIA A10, 23028, 8.6";; *) echo "{head}";; esac' if cuda else "exit 9"
    smi.write_text(f"#!/bin/sh\n{answer}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    hardware.detect.cache_clear()
    found = setup.extra_index(setup.wanted_stamp(None, []))
    hardware.detect.cache_clear()
    assert found == (["--extra-index-url", f"https://download.pytorch.org/whl/{index}"] if index else [])
    assert asked == ([f"https://download.pytorch.org/whl/{index}/torch/"] if index else [])
    monkeypatch.setenv("PICOTRAIN_INDEX_URL", "https://chosen")
    assert setup.extra_index(setup.wanted_stamp(None, [])) == ["--extra-index-url", "https://chosen"]


def test_set_up_passes_over_an_index_that_does_not_have_this_torch(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"cu130": b"torch-2.12.0%2Bcu130", "cu128": None, "cu126": b"torch-2.13.0%2Bcu126"}

    def page(url: str, timeout: float) -> io.BytesIO:
        if (text := pages[url.split("/")[-3]]) is None:
            raise OSError("not reached")
        return io.BytesIO(text)

    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup, "urlopen", page)
    monkeypatch.setattr(setup, "torch_builds", lambda: list(pages))
    assert setup.extra_index(setup.wanted_stamp(None, []))[1].endswith("/cu126")


def failing(error: BaseException) -> Callable[[dict, int], None]:
    def install(wanted: dict, lock_fd: int) -> None:
        raise error

    return install


def test_an_interrupted_set_up_begins_anew(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.STAMP.write_text(json.dumps(stamped(setup)))
    monkeypatch.setattr(setup, "install", failing(KeyboardInterrupt()))
    assert setup.main(["dev"]) == 130
    assert setup.why_remake(setup.read_stamp(), setup.venv_python()) == "the last set-up did not end"


def test_a_refused_install_keeps_the_venv_for_another_try(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.STAMP.write_text(json.dumps(stamped(setup)))
    monkeypatch.setattr(setup, "install", failing(subprocess.CalledProcessError(1, ["pip"])))
    assert setup.main(["dev"]) == 1
    stamp = setup.read_stamp()
    assert setup.why_remake(stamp, setup.venv_python()) is None
    assert setup.why_refresh(stamp, setup.wanted_stamp(stamp, ["dev"])) == "it lacks dev"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), subprocess.CalledProcessError(1, ["pip"])])
def test_a_usable_venv_made_by_hand_is_not_thrown_away(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(setup, "install", failing(error))
    assert setup.main([]) != 0
    assert setup.why_remake(setup.read_stamp(), setup.venv_python()) is None
