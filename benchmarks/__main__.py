"""One subcommand for each benchmark of l2rw_ext, and the demo."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "step": "time of a training step, every method against the plain one",
    "kernels": "every operator against its composition and the roofline",
    "roofline": "what every kernel and step should take on a GPU, by its data sheet",
    "memory": "peak memory of a training step, in a subprocess for each method",
    "scaling": "time and memory of a step as batches, model or sequences grow",
    "profile": "where the time of a step goes, and what each intercepted call costs",
    "distributed": "a step on two ranks over a plain one, and the bytes that collectives send",
    "labels": "how well wrong labels are found, beside confident learning",
    "report": "draw charts and print tables from recorded results",
    "demo": "train on imbalanced digits: plain, clean images only, reweighted",
    "paper": "the paper's experiments, each ending in a table beside the paper's numbers",
}
USAGE = 2
INTERRUPTED = 130


def dispatch(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the subcommand and return its exit status."""
    from .errors import UsageError

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, summary in COMMANDS.items():
        module = modules[name] = importlib.import_module(f".{name}", __package__)
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__))
    args = parser.parse_args(arguments)
    try:
        return int(modules[args.command].run(args))
    except UsageError as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return USAGE


def main(arguments: list[str] | None = None) -> int:
    """:func:`dispatch`, with Ctrl-C as one sentence at any time, imports included."""
    try:
        return dispatch(arguments)
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C before the end.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
