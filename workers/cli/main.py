"""The command line: a thin shell over the functions that do the work.

Each command imports what it needs when it runs: `fairshard profile --no-compute FOLDER` starts as fast as Python
itself. Results go to stdout, as JSON with --json and as tables without; progress and remarks go to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from planner.errors import FairshardError, Infeasible, InvalidCheckpoint, InvalidInput, InvalidMetadata, NodeFailure
from workers.cli import demo, join, machine, models, plan, service, shards
from workers.cli.arguments import Parser, WrongUsage
from workers.cli.console import Bars, harmless
from workers.settings import check_environment, completing

DONE, FAILED, USAGE, INFEASIBLE, INTERRUPTED = 0, 1, 2, 3, 130

_EPILOG = """\
exit status:
  0  done    1  failed    2  wrong usage    3  no plan exists that meets what was asked    130  Ctrl-C

examples:
  fairshard up                                        run the whole service on this machine
  fairshard submit meta-llama/Llama-3.2-1B --process  let it profile a model, plan it and split it
  fairshard profile ./my-model                        show what each layer costs
  fairshard plan ./my-model --nodes nodes.yaml        show which node would hold what, and how fast that is

The Tab key completes commands and options after: eval "$(fairshard completion bash)"   (in ~/.bashrc; also zsh, fish)

settings are environment variables, such as FAIRSHARD_URL and FAIRSHARD_TOKEN: `fairshard config` shows all of them
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result, or the error, as JSON on stdout")
    common.add_argument("-q", "--quiet", action="store_true", help="write no progress and no remarks to stderr")
    common.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    whole = Parser(
        prog="fairshard",
        description="Divide a Hugging Face model over unequal machines.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (models, plan, shards, service, machine, join, demo):
        module.add_commands(commands, common)
    return whole


class _ShowVersion(argparse.Action):
    """--version; looks it up when asked, since importlib.metadata loads slower than all that a command needs."""

    def __call__(self, *_: Any, **__: Any) -> None:
        """Print the version and end."""
        from importlib.metadata import version

        print(f"fairshard {version('fairshard')}")
        sys.exit(DONE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; the exit status."""
    words = sys.argv[1:] if argv is None else argv
    whole = parser()
    if completing():
        import argcomplete

        argcomplete.autocomplete(whole)  # answers the shell, and ends the process
    # Before the arguments are known to be right: argparse takes --js for --json as well.
    args = argparse.Namespace(
        command="", debug=False, json=any(len(word) > 2 and "--json".startswith(word) for word in words)
    )
    if not sys.warnoptions:
        # Libraries' warnings are for those who write programs, not for those who run this one.
        warnings.simplefilter("ignore")
    bars = Bars()
    try:
        # `lean`: a process that is not ours alone is left as it is.
        args = whole.parse_args(words, argparse.Namespace(bars=bars, lean=argv is None))
        if args.command != "config":
            check_environment()
        status: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        bars.close()
        return _report(args, str(stop) or "interrupted", "interrupted", {}, INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python must not complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        bars.close()
        if args.debug:
            raise
        if isinstance(error, WrongUsage):
            args.command = error.command
            print(error.usage, end="", file=sys.stderr)
        return _report(args, *_explained(error))
    bars.close()
    return status


def _explained(error: Exception) -> tuple[str, str, Mapping[str, Any], int]:
    """An error as its message, code, details and exit status."""
    if isinstance(error, FairshardError):
        usage = isinstance(error, InvalidInput) and not isinstance(error, (InvalidCheckpoint, InvalidMetadata))
        status = INFEASIBLE if isinstance(error, Infeasible) else USAGE if usage else FAILED
        return str(error), error.code, error.details, status
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        extra = _extra_with(package)
        if extra:
            message = f"this needs the package {package}: pip install 'fairshard[{extra}]'"
            return message, NodeFailure.code, {"package": package, "extra": extra}, FAILED
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or error}", NodeFailure.code, {}, FAILED
    message = f"this is a fault of fairshard's own: {type(error).__name__}: {error} (--debug shows where)"
    return message, "error", {}, FAILED


def _extra_with(package: str) -> str | None:
    """The extra of fairshard that brings a package; None if none does."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("fairshard") or []
    except PackageNotFoundError:
        return None
    for line in lines:
        found = re.match(r"([\w.-]+).*extra == ['\"](\w+)", line)
        if found and found[1].replace("-", "_").lower() == package:
            return found[2]
    return None


def _report(args: argparse.Namespace, message: str, code: str, details: Mapping[str, Any], status: int) -> int:
    """One line on stderr; with --json also the API's form of an error on stdout."""
    print(f"fairshard {args.command}".strip() + f": {harmless(' '.join(message.split()))}", file=sys.stderr)
    if args.json:
        json.dump({"error": message, "code": code, "details": details}, sys.stdout, indent=2, default=str)
        sys.stdout.write("\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
