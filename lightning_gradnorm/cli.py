"""The ``lightning-gradnorm`` command. Each subcommand imports what it needs: help comes at once, a report without torch."""

import argparse
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

USAGE = """usage: lightning-gradnorm COMMAND …

Balance the losses of a multi-task LightningModule.

  fit, validate, test, predict   LightningCLI on your module and data: --config run.yaml
  diagnose                       what the tasks' gradients say, before any commitment
  compare                        several methods on the same seeds: ranked table and figure
  report LOGDIR                  table and figure of an earlier run, or of several side by side

Each explains itself: lightning-gradnorm COMMAND --help
"""
_NO_FIGURE = "For a figure: pip install matplotlib"
_LIGHTNING = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors that a user can mend end the program with one line instead of a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = {"report": _report, "diagnose": _diagnose, "compare": _compare}
    command, rest = (given[0], given[1:]) if given else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command in own:
        try:
            own[command](rest)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            if not (isinstance(error, OSError) or _is_ours(error)):
                raise  # out of the user's own code, where a traceback is what helps
            sys.exit(f"lightning-gradnorm {command}: {error}")
    elif command in _LIGHTNING or command.startswith("-"):
        _lightning_cli(given)
    else:
        known = ", ".join((*_LIGHTNING, *own))
        sys.exit(f"lightning-gradnorm: {command!r} is no command; the commands are {known}.")


def _is_ours(error: Exception) -> bool:
    """Whether one of this package's own lines raised it."""
    name = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return str(name).partition(".")[0] == "lightning_gradnorm"


def _lightning_cli(arguments: list[str], **settings: Any) -> Any:
    """LightningCLI for any module and data; the folder where it runs can be imported from, as with ``python program.py``."""
    if importlib.util.find_spec("jsonargparse") is None:
        sys.exit("lightning-gradnorm: this command needs jsonargparse. pip install 'lightning-gradnorm[cli]'")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    from lightning.pytorch.cli import LightningCLI

    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")  # it is: these are its part of ours
    # A module may come with its optimiser, and a second run into one folder is no mistake.
    overwrite = {"overwrite": True}
    return LightningCLI(args=arguments, auto_configure_optimizers=False, save_config_kwargs=overwrite, **settings)


def _from_config(options: argparse.Namespace, rest: list[str]) -> Any:
    """Module, data and Trainer settings that a config describes, nothing run."""
    settings = {"run": False, "seed_everything_default": False, "save_config_callback": None}
    return _lightning_cli(["--config", str(options.config), *rest], **settings)


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="lightning-gradnorm report",
        description="Table and figure of an earlier run, or of several side by side.",
        epilog="Runs that differ in their seed alone are taken together; method and settings come from the runs' own files.",
    )
    parser.add_argument(
        "folder",
        metavar="LOGDIR",
        help="a log folder, such as lightning_logs/version_0, or one with several below it; also a URL",
    )
    parser.add_argument("--out", help="folder for the figure; LOGDIR by default")
    options = parser.parse_args(arguments)
    from lightning_gradnorm.report.recorded import folders_of_runs

    names = folders_of_runs(options.folder)
    if "." in names or len(names) < 2:
        _report_one(options.folder if "." in names or not names else f"{options.folder.rstrip('/')}/{names[0]}", options.out)
    else:
        _report_several(options.folder, names, options.out)


def _report_one(folder: str, out: str | None) -> None:
    from lightning_gradnorm.report.figure import can_draw
    from lightning_gradnorm.report.run import draw, report_of

    report, history = report_of(folder)
    for note in history.notes:
        print(note, file=sys.stderr)
    report.print()
    if history.tasks:
        print(f"Figure: {draw(history, out or folder, report.heading)}" if can_draw() else _NO_FIGURE)


def _report_several(folder: str, names: list[str], out: str | None) -> None:
    from lightning_gradnorm.report.figure import can_draw
    from lightning_gradnorm.report.recorded import read_runs
    from lightning_gradnorm.report.runs import RunsReport

    runs, notes = read_runs(folder, names)
    for note in (*notes, *(note for run in runs for note in run.history.notes)):
        print(note, file=sys.stderr)
    if not runs:
        raise ValueError(f"None of the {len(names)} runs in {folder} can be read.")
    report = RunsReport(runs, folder)
    report.print()
    print(f"Figure: {report.draw(out or folder)}" if can_draw() else _NO_FIGURE)


def _diagnose(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="lightning-gradnorm diagnose",
        description="Train a copy of the module for a few steps with equal weights; say what its tasks' gradients look like.",
        epilog="Further options go to LightningCLI: --model.…, --data.…",
    )
    parser.add_argument("--config", type=Path, required=True, help="a YAML as `fit` takes it: model and data count")
    parser.add_argument("--batches", type=int, default=20, help="optimiser steps; default %(default)s")
    options, rest = parser.parse_known_args(arguments)
    from lightning_gradnorm.diagnosis import diagnose

    cli = _from_config(options, rest)
    print(diagnose(cli.model, cli.datamodule, options.batches, accelerator=cli.config["trainer"].get("accelerator", "auto")))


def _compare(arguments: list[str]) -> None:
    from lightning_gradnorm.comparison import METHODS, compare

    parser = argparse.ArgumentParser(
        prog="lightning-gradnorm compare",
        description="Train one module with several methods on the same seeds.",
        epilog=f"Methods: {', '.join(METHODS)}. Further options go to LightningCLI: --trainer.max_epochs 20",
    )
    parser.add_argument("--config", type=Path, required=True, help="a YAML as `fit` takes it; its loss balancing is left out")
    parser.add_argument("--measures", nargs="+", required=True, metavar="NAME:WAY", help="logged metric : lower or higher")
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, "all"], metavar="METHOD",
        default=["equal", "GradNorm", "uncertainty", "DWA"],
        help="the first is the baseline; all: every one that needs no indicators; default: equal GradNorm uncertainty DWA",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, help="how many; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder for results; default %(default)s")
    options, rest = parser.parse_known_args(arguments)
    measures: dict[str, Any] = {}
    for measure in options.measures:
        name, _, way = measure.rpartition(":")
        if not name or way not in ("lower", "higher"):
            raise ValueError(f"--measures takes NAME:lower or NAME:higher; got {measure!r}.")
        measures[name] = way

    from lightning.pytorch.callbacks import Checkpoint

    from lightning_gradnorm.callbacks import LossBalancingCallback
    from lightning_gradnorm.report.figure import can_draw

    clis: list[Any] = []

    def make() -> tuple[Any, Any]:
        clis[:] = [_from_config(options, [*rest, "--seed_everything=false"])]  # the comparison's own seed is set
        return clis[0].model, clis[0].datamodule

    def trainer(callbacks: list[Any], **settings: Any) -> Any:
        configured = dict(clis[0].config_init["trainer"])
        given = configured.pop("callbacks", None) or []
        # The Trainer that LightningCLI made has added its own to the list.
        given = given[: len(clis[0].config["trainer"]["callbacks"] or [])] if isinstance(given, list) else [given]
        others = [callback for callback in given if not isinstance(callback, LossBalancingCallback)]
        if not any(isinstance(callback, Checkpoint) for callback in others):
            configured["enable_checkpointing"] = False
        return type(clis[0].trainer)(**configured | settings, callbacks=[*others, *callbacks])

    comparison = compare(
        make,
        measures,
        options.methods,
        seeds=options.seeds,
        trainer=trainer,
        on_run=lambda run: print(f"seed {run.seed}, {run.method}: {run.measures}", file=sys.stderr),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    comparison.print()
    comparison.write(options.out / "comparison.json")
    (options.out / "comparison.md").write_text(comparison.markdown(), encoding="utf-8")
    if can_draw():
        comparison.draw(options.out / "comparison.png")
    print(f"Results: {options.out}")


if __name__ == "__main__":
    main()
