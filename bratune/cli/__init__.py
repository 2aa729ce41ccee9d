"""The command line: one module per verb, loaded when the verb is used.

A verb's module has a click command called ``command``. Modules parse, call and show; what they call
lives below. Expected errors (`bratune.errors`) are shown as one sentence, without a traceback, and decide
the exit code: 0 ok, 1 error, 2 usage, 3 regression found, 4 finished with failed cells (``--strict``),
5 target cannot be measured here, 130 interrupted with results saved, 141 the reader of stdout went away.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import importlib.metadata
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

import bratune
from bratune.errors import BratuneError, UnknownNameError
from bratune.text import printable

__all__ = ["LazyGroup", "hide_passwords", "main", "prepare", "run"]

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
    "contribute": "Check a measured run and make of it a file of results/.",
    "validate-proxy": "Check how well the fidelity score ranks settings.",
}


def _be_quiet(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        sys.stderr = io.StringIO()  # `run` puts the other back


def _be_verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        versions = [f"{name} {_version(name)}" for name in ("bratune", "torch", "triton", "click")]
        click.echo(" · ".join([sys.version.split()[0], sys.platform, *versions]), err=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return bratune.__version__ if package == "bratune" else "(not installed)"


# Of every verb.
_QUIET = click.Option(
    ["-q", "--quiet"],
    is_flag=True,
    expose_value=False,
    callback=_be_quiet,
    help="Nothing on stderr but errors.",
)
_VERBOSE = click.Option(
    ["-v", "--verbose"],
    is_flag=True,
    expose_value=False,
    callback=_be_verbose,
    help="Versions first, and where an error comes from.",
)

# Verbs whose rows are on disk when they are interrupted.
MEASURING = ("profile", "tune", "validate-proxy")


class _ReaderGone(Exception):
    """Nobody reads stdout any more."""


@contextlib.contextmanager
def _broken_pipes_told() -> Iterator[None]:
    """`_ReaderGone` for a broken pipe, which click would turn into the exit code 1."""
    try:
        yield
    except BrokenPipeError as error:
        raise _ReaderGone from error


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
        if _QUIET not in command.params:
            command.params += [_QUIET, _VERBOSE]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; a name that is not known is told which are."""
        if args[0] not in self.table and not args[0].startswith("-"):
            raise UnknownNameError(self.kind, args[0], self.table)
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """As click's; a broken pipe is told apart from what click makes of it."""
        with _broken_pipes_told():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's; a broken pipe is told apart from what click makes of it."""
        with _broken_pipes_told():
            return super().invoke(ctx)

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


cli.params += [_QUIET, _VERBOSE]


def run(
    arguments: Sequence[str] | None = None, *, group: click.Command | None = None, name: str = "bratune"
) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: By default those of this process.
        group: By default that of the verbs.
        name: What it is called in help and messages.
    """
    stderr = sys.stderr
    given = sys.argv[1:] if arguments is None else [*arguments]
    try:
        try:
            result: Any = (group or cli).main(args=given or ["--help"], prog_name=name, standalone_mode=False)
            if sys.stdout is not None:
                with _broken_pipes_told():
                    sys.stdout.flush()
            return result if isinstance(result, int) else 0
        finally:
            sys.stderr = stderr
    except BratuneError as error:
        if not {"-v", "--verbose"}.isdisjoint(given):
            traceback.print_exc()
        _say(str(error))
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error if isinstance(error, Ended) else error.__cause__
        by = f"ended by {cause.name}" if isinstance(cause, Ended) else "interrupted"
        if group is None and given[:1] and given[0] not in MEASURING:
            _say(by)
        else:
            from bratune.cli.options import command_line

            again = command_line([name, *given])
            _say(f"{by}; what was measured so far is saved, and the same command goes on: {again}")
        return 130
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # `bratune cache`; click 8.2 and newer
            click.echo(error.format_message())
            return 0
        verb = getattr(getattr(error, "ctx", None), "command_path", "bratune")
        _say(f"{error.format_message()} ({verb} --help)")
        return error.exit_code
    except _ReaderGone:
        _drop_output()
        return READER_GONE
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        _drop_output()
        _say(f"the output cannot be written: {error.strerror}")
        return 1


# The reader of stdout went away, e.g. `| head`: not 0, which may be a verdict, but what a shell says of
# programs that this ends.
READER_GONE = 141
# What a write to stdout or stderr may fail with.
_NOT_WRITTEN = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


def _drop_output() -> None:
    """Let what is still in stdout's buffer go nowhere, so that nothing complains of it at the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


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
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # under nohup it stays ignored
            signal.signal(number, _end)


def hide_passwords() -> None:
    """Put stars over passwords in the title of this process, which every user of the machine can read."""
    if not any("://" in word for word in sys.argv):
        return
    from bratune.tune.storage import masked

    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux says where the title lies
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        title = ctypes.string_at(start, end - start)
        words = [masked(word.decode("latin-1")).encode("latin-1") for word in title.split(b"\0")]
        ctypes.memmove(start, b"\0".join(words), len(title))


def main() -> NoReturn:
    """The ``bratune`` program."""
    prepare()
    hide_passwords()
    sys.exit(run())


def _say(message: Warning | str, *about: Any, **more: Any) -> None:
    """Show a warning as any other message, without the line of code that gave it and without passwords."""
    from bratune.tune.storage import without_password

    with contextlib.suppress(OSError):  # a full disk behind stderr
        click.echo(f"bratune: {printable(without_password(str(message)))}", err=True)
