"""``python -m tests.random_programs``: checks many random programs, or one that is given, and counts what came of them."""

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch

from tests.random_programs.checking import Verdict, check
from tests.random_programs.description import Hook, Piece, Program, Shared, Task
from tests.random_programs.looking import Found, look

_CHUNK = 250  # programs that one seed of hypothesis draws
_SHOWN = 4  # programs that differ in the same ways


def _report(found: Found) -> None:
    for title, counts in (("ingredients", found.ingredients), ("how read, and why not", found.notes)):
        print(f"\n{title}")
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            print(f"{count:8} {name}")
    by_kind: dict[tuple[tuple[str, str], ...], list[tuple[Program, Verdict]]] = {}
    for program, verdict in found.differences:
        by_kind.setdefault(tuple(sorted(verdict.differences)), []).append((program, verdict))
    for kind, alike in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        print(f"\nDIFFERENT, {len(alike)} in {', '.join(f'{what} ({reader})' for reader, what in kind)}")
        for program, verdict in sorted(alike, key=lambda pair: len(repr(pair[0])))[:_SHOWN]:
            print(f"  {program!r}")
            for (reader, _), words in verdict.differences.items():
                print(f"    {reader}: {words}")
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in found.outcomes.most_common()))


def main() -> int:
    """Exit status 1 on any difference."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_programs", description=__doc__)
    parser.add_argument("--programs", type=int, default=1000, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--as-drawn", action="store_true", help="report differences as drawn, not the least programs with them")
    parser.add_argument("--program", help="check this one alone, as a report prints it")
    arguments = parser.parse_args()
    if arguments.program:
        names = {cls.__name__: cls for cls in (Hook, Piece, Program, Shared, Task)}
        program = eval(arguments.program, names)
        verdict = check(program)
        _report(Found(Counter([verdict.outcome]), differences=[(program, verdict)] if verdict.differences else []))
        return int(bool(verdict.differences))
    start, total = time.perf_counter(), Found()
    chunks = [(k, min(_CHUNK, arguments.programs - k * _CHUNK)) for k in range(-(-arguments.programs // _CHUNK))]
    jobs = [(arguments.seed, k, count, not arguments.as_drawn) for k, count in chunks]
    with ProcessPoolExecutor(arguments.processes) as pool:
        for waiting in [pool.submit(look, *job) for job in jobs]:
            total.add(waiting.result())
            print(f"{total.outcomes.total()} programs, {len(total.differences)} different", file=sys.stderr, flush=True)
    _report(total)
    seconds = time.perf_counter() - start
    print(f"{total.outcomes.total()} programs, seed {arguments.seed}, {seconds:.0f} s, torch {torch.__version__}")
    return int(bool(total.differences))


if __name__ == "__main__":
    sys.exit(main())
