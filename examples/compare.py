"""Every method on the handwritten digits of ``digits.py``: one word changed, the same seeds, a ranked table.

Each method runs with its own defaults, from the same networks and on the same batches. What it shows on five seeds is in
``docs/comparison.md``.

    python examples/compare.py                       # all methods, five seeds; about ten minutes
    python examples/compare.py --methods equal GradNorm geometric --seeds 2
"""

from collections.abc import Sequence

import lightning as L
import torch
from _common import CommandLine, Progress, quiet_lightning, quiet_trainer
from digits_problem import DigitsWithIndicators, load
from torch.utils.data import DataLoader

from lightning_gradnorm import compare
from lightning_gradnorm.comparison import METHODS

MEASURES = {"held_out/digit": "higher", "held_out/pixels": "lower", "held_out/ink": "lower"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandLine(__doc__, "compare", seeds=5, epochs=80, each=", of 22 steps each", quick=2, out="results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the first is the baseline")
    args = parser.read(arguments)
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
    comparison.print()
    comparison.write(args.out / "compare.json")
    (args.out / "compare.md").write_text(comparison.markdown(), encoding="utf-8")
    comparison.draw(args.out / "compare.png")
    print(f"Figure: {args.out / 'compare.png'}\nTable:  {args.out / 'compare.md'}\nValues: {args.out / 'compare.json'}")


if __name__ == "__main__":
    main()
