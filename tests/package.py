"""The package as a stranger gets it: built, checked, installed into an empty environment, its tests collected from the sdist.

    python -m tests.package

Built files lie under ``dist/``, environments under ``.venv-package/``. Whatever is wrong turns the command red.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
ENVIRONMENTS = ROOT / ".venv-package"
PINS = ROOT / "constraints.txt"
ONLY_IN_THE_REPOSITORY = ".ci/"
ADDED_BY_THE_BUILD = {"PKG-INFO"}
QUICK = ["tests/test_recipes.py", "tests/test_rooms.py", "tests/clients/test_run.py"]
IMPORTS_WITHOUT_TORCH = (
    "import sys, lightning_gradnorm, lightning_gradnorm.cli as cli\n"
    "assert 'site-packages' in lightning_gradnorm.__file__, lightning_gradnorm.__file__\n"
    "assert 'torch' not in sys.modules"
)


def run(*command: object, cwd: Path = ROOT) -> str:
    """What it prints; the package is found where the command looks for it and nowhere else."""
    print("$", *(str(part).split("\n")[0] for part in command), flush=True)
    done = subprocess.run([str(part) for part in command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{done.stdout}\nended with {done.returncode}")
    return done.stdout


def environment(name: str, *installed: Sequence[object]) -> Path:
    """The Python of a new environment with only this in it."""
    folder = ENVIRONMENTS / name
    run(sys.executable, "-m", "venv", "--clear", folder)
    python = folder / "bin" / "python"
    for packages in installed:
        run(python, "-m", "pip", "install", "--quiet", "--constraint", PINS, *packages)
    return python


def built(python: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that was made of it."""
    for old in DIST.glob("lightning_gradnorm-*"):
        old.unlink()
    run(python, "-m", "build", "--outdir", DIST)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    run(python, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def difference(what: str, there: Iterable[str], wanted: Iterable[str]) -> None:
    """Ends the command if they are not the same names."""
    found, expected = set(there), set(wanted)
    missing, surplus = sorted(expected - found), sorted(found - expected)
    if missing or surplus:
        sys.exit(f"{what} lacks {missing or 'nothing'}, and has {surplus or 'nothing'} that does not belong there")


def contents(sdist: Path, wheel: Path) -> None:
    """The sdist has what the repository has; the wheel has the package, its metadata and nothing else."""
    tracked = [name for name in run("git", "ls-files").splitlines() if not name.startswith(ONLY_IN_THE_REPOSITORY)]
    with tarfile.open(sdist) as file:
        names = {member.name.split("/", 1)[1] for member in file.getmembers() if member.isfile()}
    difference("the sdist", names - ADDED_BY_THE_BUILD, tracked)
    with zipfile.ZipFile(wheel) as file:
        modules = {name for name in file.namelist() if ".dist-info/" not in name}
    difference("the wheel", modules, (name for name in tracked if name.startswith("lightning_gradnorm/")))


def readme_program(python: Path, folder: Path) -> None:
    """The README's first program, and the command, where nothing else of ours can be found."""
    run(python, "-c", IMPORTS_WITHOUT_TORCH, cwd=folder)
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (folder / "program.py").write_text(block.group(1), encoding="utf-8")
    printed = run(python, "program.py", cwd=folder)
    if "GradNorm after" not in printed:
        sys.exit(f"{printed}\nthe README's program ended without GradNorm's table")
    run(python.with_name("lightning-gradnorm"), "--help", cwd=folder)


def tests_of_the_sdist(sdist: Path, folder: Path) -> str:
    """How many are collected there; some that read pages and records are run."""
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    collected = run(*pytest, "--collect-only", cwd=unpacked).splitlines()[-1]
    run(*pytest, *QUICK, cwd=unpacked)
    return collected.split(" in ")[0]


def main() -> None:
    """The command."""
    with tempfile.TemporaryDirectory() as wheel_folder, tempfile.TemporaryDirectory() as sdist_folder:
        sdist, wheel = built(environment("tools", ["build", "twine"]))
        contents(sdist, wheel)
        readme_program(environment("wheel", ["torch"], [wheel]), Path(wheel_folder))
        collected = tests_of_the_sdist(sdist, Path(sdist_folder))
    sizes = " and ".join(f"{path.name} ({path.stat().st_size / 2**20:.1f} MiB)" for path in (sdist, wheel))
    print(f"{sizes} are in order; the README's program ran from the wheel, and from the sdist {collected}.")


if __name__ == "__main__":
    main()
