"""The ``lightning-gradnorm`` command, mostly in process; the files it writes and the errors it ends with."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from lightning_gradnorm.cli import main
from lightning_gradnorm.comparison import METHODS
from lightning_gradnorm.report.run import report_of
from tests.helpers import TrunkAndHeads, batches

pytest.importorskip("jsonargparse", reason="the command line is an extra")

OURS = "tests.test_command"
QUIET = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
CALLBACK = {"class_path": "lightning_gradnorm.GradNormCallback", "init_args": {"lr": 0.1}}
CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": f"{OURS}.Small"},
    "data": {"class_path": f"{OURS}.SmallData"},
    "trainer": {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "callbacks": [CALLBACK], **QUIET},
}
MEASURES = ["--measures", "held_out/small:lower", "held_out/large:lower"]


class Small(TrunkAndHeads):
    """Four tasks, with their losses on the held-out batches."""

    def __init__(self, broken: bool = False):
        super().__init__()
        self.broken = broken

    def training_step(self, batch, batch_idx):
        if self.broken:
            return self.total_loss(None + 1)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log_dict({f"held_out/{task}": loss for task, loss in self.losses(batch[0]).items()})


class SmallData(L.LightningDataModule):
    def train_dataloader(self):
        return batches(6)

    def val_dataloader(self):
        return batches(2, seed=2)


class HandsOverNothing(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in; what the command does to the process ends with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls there
    return tmp_path


def config(name="run.yaml", **changes):
    """A YAML file in the folder, as ``--config`` takes it."""
    content = CONFIG | changes
    Path(name).write_text(yaml.safe_dump(content), encoding="utf-8")
    return ["--config", name]


def ends(arguments, capsys):
    """Exit status or message, and all that was printed; of a command that ends the program."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


# -- what it says of itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_it_names_its_commands(arguments, capsys):
    main(arguments)
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lightning-gradnorm COMMAND")
    assert all(command in printed for command in ("fit, validate, test, predict", "diagnose", "compare", "report LOGDIR"))
    assert "COMMAND --help" in printed


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("report", ["lightning-gradnorm report [-h] [--out OUT] LOGDIR", "lightning_logs/version_0", "folder for the figure"]),
        ("diagnose", ["--config CONFIG", "model and data count", "default 20", "go to LightningCLI", "--model.…"]),
        ("compare", [*METHODS, "NAME:WAY", "default: equal GradNorm uncertainty DWA", "default 5", "--trainer.max_epochs 20"]),
        ("fit", ["--trainer.max_epochs", "--model", "--data", "--config"]),
    ],
)
def test_every_command_explains_itself(command, words, capsys):
    status, printed = ends([command, "--help"], capsys)
    assert status == 0
    printed = " ".join(printed.split())
    assert [word for word in words if word not in printed] == []


# -- fit and report --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_fit_writes_and_report_says_it_again(folder, capsys, logger):
    logged = {"class_path": f"lightning.pytorch.loggers.{logger}", "init_args": {"save_dir": "."}}
    main(["fit", *config(trainer=CONFIG["trainer"] | {"logger": logged})])
    at_the_end = capsys.readouterr().out
    log = Path("lightning_logs/version_0")
    assert {"loss_weights.yaml", "loss_balancing.png", "config.yaml"} <= {path.name for path in log.iterdir()}
    assert "GradNorm after 6 steps" in at_the_end
    assert report_of(log)[0].settings["lr"] == 0.1
    main(["report", str(log), "--out", "elsewhere/deep"])
    table, _, last = capsys.readouterr().out.rpartition("Figure: ")
    assert table
    assert table in at_the_end
    assert Path(last.strip()) == Path("elsewhere/deep/loss_balancing.png")
    again, drawn = Path(last.strip()).read_bytes(), (log / "loss_balancing.png").read_bytes()
    assert again[:24] == drawn[:24], "a PNG of the same size"
    assert again == drawn or logger == "CSVLogger", "whose numbers have more digits than what is kept for the figure"
    main(["fit", "--config", str(log / "config.yaml"), "--trainer.max_epochs=2"])  # the saved one is a config too
    assert "GradNorm after 12 steps" in capsys.readouterr().out


def test_report_tells_how_it_read_and_what_it_cannot_draw(folder, capsys, monkeypatch):
    with SummaryWriter("log") as writer:
        for step in range(3):
            writer.add_scalar("loss_weight/a", 1.0, step)
    (file,) = Path("log").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    monkeypatch.setattr("lightning_gradnorm.report.figure.can_draw", lambda: False)
    main(["report", "log"])
    printed = capsys.readouterr()
    assert f"{file.name} ends in the middle of a record" in printed.err
    assert "The run after the 2 logged steps" in printed.out
    assert printed.out.endswith("For a figure: pip install matplotlib\n")
    assert list(Path("log").iterdir()) == [file]


def test_report_of_a_folder_above_takes_the_one_run_in_it_or_puts_several_side_by_side(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for number, weight in enumerate((2.0, 0.5)):
        run = Path(f"logs/{'ab'[number]}/version_{number}")
        run.mkdir(parents=True)
        (run / "metrics.csv").write_text(f"step,loss_weight/x,val_loss\n0,1.0,9.0\n1,{weight},{weight + 1}\n")
        main(["report", "logs", "--out", "drawn"])
        printed = capsys.readouterr().out
        assert ("The run after the 2 logged steps" in printed) == (number == 0)
        assert ("2 runs in logs" in printed) == (number == 1)
    lines = [re.split(r"[\s│]+", line.strip("│ ")) for line in printed.splitlines()]
    assert ["a", "1", "3", "2"] in lines
    assert ["b", "1", "1.5", "0.5"] in lines
    assert {path.name for path in Path("drawn").iterdir()} == {"loss_balancing.png", "runs.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "There is no log folder nowhere"),
        (["report", "empty"], "holds neither TensorBoard event files"),
        (["report", "log", "--out", "log/metrics.csv"], "metrics.csv"),
        (["compare", "--config", "x.yaml", "--measures", "loss"], "--measures takes NAME:lower or NAME:higher; got 'loss'"),
        (["compare", "--config", "x.yaml", "--measures", "loss:up"], "got 'loss:up'"),
        (["compare", "--config", "run.yaml", *MEASURES, "--seeds", "0"], "a measure and a seed at least"),
        (["compare", "--config", "run.yaml", "--measures", "nix:lower", "--seeds", "1"], "The fit logged no 'nix'"),
        (["diagnose", "--config", "run.yaml", "--batches", "0"], "batches is a whole number, 1 or more; got 0"),
        (["diagnose", "--config", "none.yaml"], "The training_step of HandsOverNothing never called total_loss()"),
    ],
)
def test_what_a_user_can_mend_is_one_line(folder, arguments, message, capsys):
    config()
    config("none.yaml", model={"class_path": f"{OURS}.HandsOverNothing"})
    Path("log").mkdir()
    Path("empty").mkdir()
    Path("log/metrics.csv").write_text("step,loss_weight/a\n0,1.0\n")
    line, _ = ends(arguments, capsys)
    assert line.startswith(f"lightning-gradnorm {arguments[0]}: ")
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize("command", [["diagnose"], ["compare", *MEASURES]])
def test_a_mistake_in_the_users_own_code_keeps_its_traceback(folder, command):
    with pytest.raises(TypeError, match="unsupported operand"):
        main([*command, *config(model={"class_path": f"{OURS}.Small", "init_args": {"broken": True}})])


# -- diagnose and compare --------------------------------------------------------------------------------------------------


def test_diagnose_says_what_the_gradients_say(folder, capsys):
    main(["diagnose", *config(), "--batches", "4"])
    printed = capsys.readouterr().out
    assert "4 batches with equal weights, on trunk.2.weight" in printed
    assert "The gradient of 'large' is " in printed
    assert "Try GradNormCallback()" in printed
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


def test_compare_runs_every_method_on_every_seed(folder, capsys):
    chosen = ["--methods", "equal", "DWA", "GradNorm", "--seeds", "2", "--out", "results"]
    trainer = {name: value for name, value in CONFIG["trainer"].items() if name != "enable_checkpointing"}
    main(["compare", *config(trainer=trainer), *MEASURES, *chosen, "--trainer.max_epochs", "2"])
    printed = capsys.readouterr()
    assert "Over 2 seeds" in printed.out
    assert "Results: results" in printed.out
    assert "seed 1, DWA: {'held_out/small': " in printed.err
    content = json.loads(Path("results/comparison.json").read_text(encoding="utf-8"))
    assert content["baseline"] == "equal"
    runs = {(run["method"], run["seed"]): run for run in content["runs"]}
    assert list(runs) == [(method, seed) for seed in (0, 1) for method in ("equal", "DWA", "GradNorm")]
    small = {key: run["measures"]["held_out/small"] for key, run in runs.items()}
    assert small["equal", 0] != small["equal", 1], "each seed starts from a network of its own, whatever the config's seed"
    assert small["equal", 0] == small["DWA", 0], "DWA is equal weights for two epochs, so all else is the same"
    assert small["equal", 0] != small["GradNorm", 0]
    assert set(runs["equal", 0]["weights"].values()) == {1.0}, "the config's own callback is left out"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"run.yaml", *(f"results/comparison.{kind}" for kind in ("json", "md", "png"))}


def test_compare_keeps_the_configs_other_callbacks(folder, capsys):
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "kept"}}
    trainer = CONFIG["trainer"] | {"callbacks": [checkpoint, CALLBACK], "enable_checkpointing": True}
    main(["compare", *config(trainer=trainer), *MEASURES, "--methods", "equal", "--seeds", "1"])
    assert len(list(Path("kept").glob("*.ckpt"))) == 1
    assert Path("comparison/comparison.md").read_text(encoding="utf-8").startswith("Over 1 seed, ")


# -- what cannot run -------------------------------------------------------------------------------------------------------


def with_callback(**changes):
    return {"trainer": CONFIG["trainer"] | {"callbacks": [CALLBACK | changes]}}


@pytest.mark.parametrize("command", [["fit"], ["diagnose"], ["compare", *MEASURES]], ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": {"max_epoch": 3}}, ["max_epoch"]),
        ({"trainer": {"max_epochs": "many"}}, ["max_epochs", "many"]),
        (with_callback(init_args={"alphaa": 1.0}), ["alphaa"]),
        (with_callback(init_args={"alpha": "high"}), ["alpha", "high", "float"]),
        (with_callback(class_path="lightning_gradnorm.GradNormCallbak"), ["GradNormCallbak"]),
        ({"model": {"class_path": "nowhere.Net"}}, ["nowhere.Net", "No module named 'nowhere'"]),
        ({"modle": {"class_path": "x"}}, ["modle"]),
    ],
    ids=["unknown key", "wrong type", "unknown argument", "wrong argument", "unknown class", "unknown module", "top level"],
)
def test_a_mistake_in_the_config_is_named(folder, command, changes, words, capsys):
    status, printed = ends([*command, *config(**changes)], capsys)
    assert status == 2
    message = printed[printed.index("error: ") :]
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("command", [["fit"], ["diagnose"], ["compare", *MEASURES]], ids=lambda command: command[0])
def test_a_missing_config_is_named(folder, command, capsys):
    status, printed = ends([*command, "--config", "missing.yaml"], capsys)
    assert status == 2
    assert "missing.yaml" in printed


@pytest.mark.parametrize("command", ["nonsense", "Fit", "report.py"])
def test_an_unknown_command_names_the_known_ones(command, capsys):
    line, _ = ends([command, "--config", "run.yaml"], capsys)
    assert line == (
        f"lightning-gradnorm: {command!r} is no command; the commands are fit, validate, test, predict, report, diagnose, "
        "compare."
    )


@pytest.mark.parametrize("command", [["fit"], ["diagnose"], ["compare", *MEASURES]], ids=lambda command: command[0])
def test_without_jsonargparse_it_says_what_to_install(folder, command, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "jsonargparse" else find_spec(name))
    line, _ = ends([*command, *config()], capsys)
    assert line.endswith("this command needs jsonargparse. pip install 'lightning-gradnorm[cli]'")


# -- programs of their own -------------------------------------------------------------------------------------------------


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


def program(name, *lines):
    source = Path(__file__).parents[1]
    text = ["import sys", f"sys.path.append({str(source)!r})", f"from {OURS} import Small, SmallData", *lines]
    Path(name).write_text("\n".join(text), encoding="utf-8")


@pytest.mark.slow
def test_as_a_program_it_finds_modules_in_the_folder_where_it_runs(folder):
    program("mine.py")
    config(model={"class_path": "mine.Small"}, data={"class_path": "mine.SmallData"})
    Path("bin").mkdir()
    Path("bin/command.py").write_text("from lightning_gradnorm.cli import main\nmain()\n")  # as pip writes it
    done = run("bin/command.py", "fit", "--config", "run.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "GradNorm after 6 steps" in done.stdout
    assert Path("lightning_logs/version_0/loss_weights.yaml").exists()
    done = run("bin/command.py", "report", "lightning_logs")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "GradNorm after 6 steps" in done.stdout, "of the one run below"
    done = run("bin/command.py", "report", "bin")
    assert done.returncode == 1
    assert "bin holds neither TensorBoard event files nor" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_short_class_name_does_in_ones_own_program(folder):
    cli = "cli = LightningCLI(Small, SmallData)"
    shown = "print('came to', cli.trainer.callbacks[0].balancer.settings())"
    program("own.py", "import lightning_gradnorm", "from lightning.pytorch.cli import LightningCLI", cli, shown)
    trainer = [f"--trainer.{name}=false" for name in QUIET] + ["--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    done = run("own.py", "fit", "--trainer.callbacks+=GradNormCallback", "--trainer.callbacks.alpha=0.75", *trainer)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'alpha': 0.75" in done.stdout
    assert "GradNorm after 6 steps" in done.stdout
