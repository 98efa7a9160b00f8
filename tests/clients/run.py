"""Other people's libraries as clients: builds their environments, runs their tests there, and says what was left out.

    python -m tests.clients.run                      # all of them
    python -m tests.clients.run transformers matgl   # only these

Environments lie under ``.venv-clients/`` and are kept. A client that cannot be installed, or not within the limit, is left out
and said so; a test that fails turns the command red.
"""

import argparse
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HERE = Path("tests/clients")
ENVIRONMENTS = ROOT / ".venv-clients"
LIMIT = 180  # seconds


class Client(NamedTuple):
    """A library that is not ours.

    Attributes:
        name: of ``test_<name>.py`` and ``constraints/<name>.txt``, the requirements that it is installed from.
        package: as the index has it.
        environment: where; clients that agree on their versions share one.
    """

    name: str
    package: str
    environment: str


CLIENTS = (
    Client("transformers", "transformers", "torch-2.13"),
    Client("transformers_trainer", "transformers", "torch-2.13"),
    Client("accelerate", "accelerate", "torch-2.13"),
    Client("pytorch_forecasting", "pytorch-forecasting", "torch-2.13"),
    Client("pina", "pina-mathlab", "torch-2.13"),
    Client("matgl", "matgl", "torch-2.13"),
    Client("chemprop", "chemprop", "torch-2.13"),
    Client("schnetpack", "schnetpack", "torchmetrics-1.0"),
    Client("torchvision", "torchvision", "torch-2.14"),
)


class Result(NamedTuple):
    """What became of a client: ``left_out`` says why its tests were not run."""

    client: Client
    version: str = ""
    seconds: float = 0
    passed: int = 0
    wrong: int = 0
    left_out: str = ""


def requirements(client: Client) -> list[str]:
    """The lines of the client's file, without its comments."""
    lines = (ROOT / HERE / "constraints" / f"{client.name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def constraints(client: Client) -> str:
    """The pins of everyone in the client's environment, and our own tests' of what these leave open."""
    pins = [line for other in CLIENTS if other.environment == client.environment for line in requirements(other)]
    name = re.compile(r"[\w.-]+")
    taken = {name.match(pin)[0].lower() for pin in pins}
    ours = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(pins + [line for line in ours if line and line[0] != "#" and name.match(line)[0].lower() not in taken])


def install(client: Client, python: Path, limit: int) -> str:
    """Into its environment, which is made if it is not there; why that did not work in so many seconds, if it did not."""
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENTS / client.environment], check=True)
    pins = ENVIRONMENTS / client.environment / f"{client.name}.txt"
    pins.write_text(constraints(client), encoding="utf-8")
    ours = ["--editable", ".[examples]", "pytest", "hypothesis"]
    command = [python, "-m", "pip", "install", "--quiet", "--constraint", pins, *requirements(client), *ours]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as pip:
        try:
            output, _ = pip.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            pip.terminate()  # so that it takes away what it had fetched
            return f"installing took more than {limit} s"
    errors = [line for line in output.splitlines() if line.startswith("ERROR")]
    return f"it cannot be installed here: {(errors or ['pip gave no reason'])[-1]}" if pip.returncode else ""


def run(client: Client, limit: int = LIMIT) -> Result:
    """Install it and run its tests."""
    python = ENVIRONMENTS / client.environment / "bin" / "python"
    print(f"\n== {client.package}", flush=True)
    start = time.monotonic()
    left_out = install(client, python, limit)
    seconds = time.monotonic() - start
    if left_out:
        return Result(client, left_out=left_out)
    ask = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    version = subprocess.run([python, "-c", ask], check=True, text=True, capture_output=True).stdout.strip()
    report = ENVIRONMENTS / client.environment / f"{client.name}.xml"
    report.unlink(missing_ok=True)
    # Other people's warnings are theirs to mend.
    tests = [HERE / f"test_{client.name}.py", "-W", "default", "--disable-warnings", "-p", "no:cacheprovider"]
    code = subprocess.run([python, "-m", "pytest", *tests, f"--junit-xml={report}"], cwd=ROOT, check=False).returncode
    counts = {} if not report.exists() else next(ET.parse(report).iter("testsuite")).attrib
    count, *others = (int(counts.get(name, 0)) for name in ("tests", "skipped", "failures", "errors"))
    wrong = sum(others[1:]) or int(code != 0 or count == others[0])
    return Result(client, version, seconds, count - sum(others), wrong)


def table(results: list[Result]) -> str:
    """For people: a line per client, then a sentence for each that was left out."""
    rows = [("client", "version", "installed in", "passed", "failed")]
    rows += [(r.client.name, r.version, f"{r.seconds:.0f} s", str(r.passed), str(r.wrong)) for r in results if not r.left_out]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"Left out: {r.client.name}, since {r.left_out}." for r in results if r.left_out])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if a test failed."""
    names = [client.name for client in CLIENTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", choices=[*names, []], metavar="CLIENT", help=", ".join(names))
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds to install one in; default %(default)s")
    args = parser.parse_args(arguments)
    results = [run(client, args.limit) for client in CLIENTS if client.name in (args.clients or names)]
    print("\n" + table(results))
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
