"""Every method on the handwritten digits of ``digits.py``: one word changed, the same seeds, a ranked table.

Each method runs with its own defaults, from the same networks and on the same batches. What it shows on five seeds is in
``docs/comparison.md``.

    python examples/compare.py                       # all methods, five seeds; about ten minutes
    python examples/compare.py --methods equal GradNorm geometric --seeds 2
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from _common import Progress, quiet_lightning, quiet_trainer
from digits_problem import DigitsWithIndicators, load
from torch.utils.data import DataLoader

from lightning_gradnorm import compare
from lightning_gradnorm.comparison import METHODS

MEASURES = {"held_out/digit": "higher", "held_out/pixels": "lower", "held_out/ink": "lower"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the first is the baseline")
    parser.add_argument("--seeds", type=int, default=5, help="how many; default %(default)s")
    parser.add_argument("--epochs", type=int, default=80, help="per fit, of 22 steps each; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for results; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs: to see that it runs")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # layers as small as these are slower on several
    if args.quick:
        args.seeds, args.epochs = 1, 2
    train, test = load()
    progress = Progress(22 * args.epochs * args.seeds * len(args.methods))

    def make() -> tuple[L.LightningModule, DataLoader, DataLoader]:
        module = DigitsWithIndicators()
        order = torch.Generator().manual_seed(torch.initial_seed())
        return module, DataLoader(train, 64, shuffle=True, generator=order), DataLoader(test, batch_size=len(test))

    def trainer(callbacks: list[L.Callback], **settings: object) -> L.Trainer:
        return quiet_trainer([progress, *callbacks], max_epochs=args.epochs, check_val_every_n_epoch=args.epochs, **settings)

    with quiet_lightning():
        comparison = compare(make, MEASURES, {name: METHODS[name] for name in args.methods}, seeds=args.seeds, trainer=trainer)
    args.out.mkdir(parents=True, exist_ok=True)
    comparison.print()
    comparison.write(args.out / "compare.json")
    (args.out / "compare.md").write_text(comparison.markdown(), encoding="utf-8")
    comparison.draw(args.out / "compare.png")
    print(f"Figure: {args.out / 'compare.png'}\nTable:  {args.out / 'compare.md'}\nValues: {args.out / 'compare.json'}")


if __name__ == "__main__":
    main()
