"""The command line: a thin shell over the functions that do the work.

Each command imports what it needs when it runs: `fairshard profile --no-compute FOLDER` starts as fast as Python
itself. Results go to stdout, as JSON with --json and as tables without; progress and remarks go to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from planner.errors import FairshardError, Infeasible, InvalidCheckpoint, InvalidInput, InvalidMetadata
from workers.cli import machine as cli_machine
from workers.cli import models as cli_models
from workers.cli import plan as cli_plan
from workers.cli import service as cli_service
from workers.cli import shards as cli_shards
from workers.settings import check_environment

DONE, FAILED, USAGE, INFEASIBLE, INTERRUPTED = 0, 1, 2, 3, 130

_EPILOG = """\
exit status:
  0  done    1  failed    2  wrong usage    3  no plan exists that meets what was asked

examples:
  fairshard up                                        the whole service on this machine
  fairshard submit meta-llama/Llama-3.2-1B --process  have a model profiled, planned and split
  fairshard profile ./my-model                        what each layer costs
  fairshard plan ./my-model --nodes nodes.yaml        who would hold what, and how fast that is

settings are environment variables, such as FAIRSHARD_URL and FAIRSHARD_TOKEN: `fairshard config` shows all of them
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress and no remarks on stderr")
    common.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    whole = argparse.ArgumentParser(
        prog="fairshard",
        description="Divide a Hugging Face model over unequal machines.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (cli_models, cli_plan, cli_shards, cli_service, cli_machine):
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
    args = parser().parse_args(argv)
    args.lean = argv is None  # else the process is somebody's own
    if not sys.warnoptions:
        # Libraries' warnings are for those who write programs, not for those who run this one.
        warnings.simplefilter("ignore")
    try:
        if args.command != "config":
            check_environment()
        status: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("fairshard: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python must not complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except FairshardError as error:
        if args.debug:
            raise
        return _report(args, str(error), error.code, error.details, _status(error))
    except OSError as error:
        if args.debug:
            raise
        name = f"{error.filename}: " if error.filename else ""
        return _report(args, f"{name}{error.strerror or error}", "node_failure", {}, FAILED)
    except Exception as error:
        if args.debug:
            raise
        message = f"this is a fault of fairshard's own: {type(error).__name__}: {error} (--debug shows where)"
        return _report(args, message, "error", {}, FAILED)
    return status


def _status(error: FairshardError) -> int:
    if isinstance(error, Infeasible):
        return INFEASIBLE
    if isinstance(error, InvalidInput) and not isinstance(error, (InvalidCheckpoint, InvalidMetadata)):
        return USAGE
    return FAILED


def _report(args: argparse.Namespace, message: str, code: str, details: dict[str, Any], status: int) -> int:
    """One line on stderr; with --json also the API's form of an error on stdout."""
    print(f"fairshard {args.command}: {' '.join(message.split())}", file=sys.stderr)
    if args.json:
        json.dump({"error": message, "code": code, "details": details}, sys.stdout, indent=2, default=str)
        sys.stdout.write("\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
