"""The command line: one module per verb, loaded when the verb is used.

A verb's module has a click command called ``command``. Modules parse, call and show; what they call
lives below. Expected errors (`bratune.errors`) are shown as one sentence, without a traceback, and decide
the exit code: 0 ok, 1 error, 2 usage, 3 regression found, 4 finished with failed cells (``--strict``),
5 target cannot be measured here, 130 interrupted with results saved.
"""

from __future__ import annotations

import importlib
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click

import bratune
from bratune.errors import BratuneError, UnknownNameError
from bratune.text import printable

__all__ = ["LazyGroup", "main", "prepare", "run"]

# verb -> one line for --help; the module is bratune.cli.<verb>, with _ for -.
VERBS = {
    "profile": "Measure every backend at every stage of a model, then the whole model.",
    "tune": "Search S, top-k and backend per stage; write the best plan.",
    "export": "Write a plan as a config that training code loads.",
    "compare": "Say which of several sets of records is faster, and how sure that is.",
    "report": "Draw records as one self-contained HTML page.",
    "predict": "Estimate times on a GPU that is not here.",
    "explain": "Show what a model asks of each backend, and which backends accept.",
    "visualize": "Draw where a query position attends to.",
    "list": "List backends, models, tasks, suites or GPUs.",
    "doctor": "Check whether this machine can measure soundly.",
    "cache": "Look at, merge and prune stored records.",
    "validate-proxy": "Check how well the fidelity score ranks settings.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for.

    Args:
        table: Name, where the command is (``module:attribute``), and one line for ``--help``.
        kind: What a name is called where it is not known.
        options: Those of `click.Group`.
    """

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]], kind: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.table, self.kind = table, kind

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return [*self.table]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in self.table:
            return None
        module, _, attribute = self.table[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; a name that is not known is told which are."""
        if args[0] not in self.table and not args[0].startswith("-"):
            raise UnknownNameError(self.kind, args[0], self.table)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The names with their lines; nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.table.items()])


_TABLE = {verb: (f"bratune.cli.{verb.replace('-', '_')}:command", line) for verb, line in VERBS.items()}


@click.group(
    cls=LazyGroup,
    table=_TABLE,
    kind="command",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(bratune.__version__, prog_name="bratune")
def cli() -> None:
    """Which region factor, top-k and backend should a BiFormer run, on this GPU, for this task?"""


def run(
    arguments: Sequence[str] | None = None, *, group: click.Command | None = None, name: str = "bratune"
) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: By default those of this process.
        group: By default that of the verbs.
        name: What it is called in help and messages.
    """
    try:
        result: Any = (group or cli).main(args=arguments, prog_name=name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except BratuneError as error:
        click.echo(f"bratune: {printable(str(error))}", err=True)
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error if isinstance(error, Ended) else error.__cause__
        by = f"ended by {cause.name}" if isinstance(cause, Ended) else "interrupted"
        click.echo(
            f"bratune: {by}; what was measured so far is saved, and the same command goes on", err=True
        )
        return 130
    except click.ClickException as error:
        verb = getattr(getattr(error, "ctx", None), "command_path", "bratune")
        click.echo(f"bratune: {printable(error.format_message())} ({verb} --help)", err=True)
        return error.exit_code
    except BrokenPipeError:  # the reader of stdout went away, e.g. `| head`
        sys.stderr.close()
        return 0


class Ended(KeyboardInterrupt):
    """A signal that ends programs, as Ctrl-C does: what is measured is saved, workers are ended."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


def _end(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second one ends at once
    raise Ended(number)


def prepare() -> None:
    """Let warnings be messages, and signals that end programs end workers too."""
    warnings.showwarning = _say
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup it stays ignored
            signal.signal(number, _end)


def main() -> NoReturn:
    """The ``bratune`` program."""
    prepare()
    sys.exit(run())


def _say(message: Warning | str, *about: Any, **more: Any) -> None:
    """Show a warning as any other message, without the line of code that gave it."""
    click.echo(f"bratune: {printable(str(message))}", err=True)
