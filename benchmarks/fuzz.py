"""Broken and hostile files for every reader of other people's files: each is read, or refused in plain words.

    python benchmarks/fuzz.py --inputs 200000             # some five minutes on one core; counts by reader
    python benchmarks/fuzz.py --reader header --seed 7
    python benchmarks/fuzz.py --bytes 300                 # seconds; by the coverage of our code (pip install atheris)
    python benchmarks/fuzz.py --inputs 200000 --keep      # adds what reaches new error messages to the stored inputs

Inputs are valid files with bytes flipped, cut, doubled and inserted, and JSON values replaced by others: huge and
negative numbers, other types, names that leave the folder, deep nesting.  An input counts as a failure if its reader
raises anything but a deliberate refusal, takes longer than ten seconds, needs more memory than the limit, writes
anything, or imports anything.  Stored inputs are in tests/robustness/corpus, where tests read them again.
"""

import argparse
import logging
import random
import resource
import sys
import time
import warnings
from collections import Counter

from fuzz_bytes import fuzz_bytes, instrumented


MEMORY = 8 << 30


def main() -> None:
    """Fuzz, print what was found, and exit with 1 after a failure."""
    args = parse_arguments()
    logging.disable(logging.WARNING)  # of rows that are left out
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with instrumented(args.bytes is not None):
        from fuzz_attempt import read_valid_files
        from fuzz_readers import READERS
    if unknown := set(args.reader or ()) - set(READERS):
        sys.exit(f"no reader is named {sorted(unknown)[0]}; there are {', '.join(READERS)}")
    names = args.reader or list(READERS)
    read_valid_files(names)
    if args.bytes is not None:
        fuzz_bytes(names, args.bytes, args.seed)  # ends the process
    sys.exit(fuzz(names, args) > 0)


def fuzz(names: list[str], args: argparse.Namespace) -> int:
    """Break valid files at random, and print the failures and counts; returns the number of failures."""
    from fuzz_attempt import attempt
    from fuzz_corpus import Corpus
    from fuzz_mutations import mutated
    from fuzz_readers import READERS

    counts, failures, corpus = Counter(), 0, Corpus()
    started = time.perf_counter()
    for number in range(args.inputs):
        name = names[number % len(names)]
        draw = random.Random(f"{args.seed} {name} {number}")
        content = mutated(READERS[name][1](), draw)
        outcome = attempt(name, content)
        counts[name, outcome.kind] += 1
        if outcome.kind == "failed":
            failures += 1
            print(f"{name} {number}: {outcome.says}\n  {content[:300]!r}", flush=True)
            if failures >= args.most:
                break
        elif args.keep and corpus.add(name, content, outcome):
            print(f"{name} {number} is kept: {outcome.says[:100]}", flush=True)
    print(f"\n{sum(counts.values()):,} inputs in {time.perf_counter() - started:.0f} s, {failures} failures")
    for name in names:
        print(f"{name:11}", *(f"{kind} {counts[name, kind]:>8,}" for kind in ("read", "refused", "failed")))
    return failures


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="in all (default: %(default)s)")
    parser.add_argument("--reader", nargs="+", help="(default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=10, help="failures before it ends (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="store inputs that reach new error messages")
    parser.add_argument("--bytes", type=int, metavar="SECONDS", help="let atheris choose the inputs, for so long")
    return parser.parse_args()


if __name__ == "__main__":
    main()
