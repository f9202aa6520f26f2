"""`python -m fastdiff COMMAND`; each command is a file in `fastdiff.cli` with `add_arguments(parser)` and `run(args) -> int`."""

import argparse
import importlib
import sys

COMMANDS = {
    "info": "what runs on this machine, and why not",
    "sample": "sample images from a model into a PNG grid",
    "verify": "measure every solver against exact solutions or diffusers",
    "bench": "time kernels against their peers",
    "quantize": "quantize a model by a recipe and report its quality",
    "compare": "compare two models from equal noise",
    "tune": "measure which tiles of the GPU kernels are fastest here",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code. Errors of the user print one line and give 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdiff", description="A sampling engine for diffusion and flow models."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, help_text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=help_text)
        if name in arguments[:1]:  # no command loads what another one needs
            command = importlib.import_module(f"fastdiff.cli.{name}")
            sub.description = command.__doc__
            sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"fastdiff {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastdiff {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
