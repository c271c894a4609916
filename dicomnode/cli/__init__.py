"""The commands, and the only place that builds things and hands them down.

Each command imports its room inside itself, so that `run receiver` never loads torch. Exit codes: 0 done, 1 failed,
2 wrong use or input, always with one sentence and never with a traceback.
"""

from __future__ import annotations

import sys

import typer

from dicomnode.cli import check, dataset, metrics, node, packages, peers, retention, site, training, work
from dicomnode.errors import NodeError, UsageError
from dicomnode.logs import configure_logs
from dicomnode.version import VERSION
from storage.errors import StorageError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="A DICOM node that runs CNNs. RESEARCH USE ONLY."
)
node.register(app)
check.register(app)
metrics.register(app)
peers.register(app)
packages.register(app)
site.register(app)
retention.register(app)
work.register(app)
training.register(app)
dataset.register(app)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        typer.echo(VERSION)
        raise typer.Exit


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; what goes wrong is one sentence on standard error."""
    configure_logs("critical", json_lines=False)  # a command says its one sentence; what runs as a role configures its own
    try:
        code = app(arguments, standalone_mode=False, prog_name="dicomnode")
    except typer.TyperException as error:  # empty if no command was given: its help has been printed
        message = error.format_message().replace("Value error, ", "")
        return _complain(message, 2) if message else 2
    except UsageError as error:
        return _complain(str(error), 2)
    except (NodeError, StorageError) as error:
        return _complain(str(error), 1)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted", 1)
    except OSError as error:  # what the system refuses a command, e.g. to write a file or to bind a port
        return _complain(": ".join(str(word) for word in (error.filename, error.strerror or error) if word), 1)
    return int(code or 0)


def _complain(message: str, code: int) -> int:
    typer.echo(f"dicomnode: {' '.join(message.split())}", err=True)
    return code
