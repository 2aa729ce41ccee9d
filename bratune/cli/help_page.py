"""``docs/cli.md`` from the help texts: ``python -m bratune.cli.help_page > docs/cli.md``."""

from __future__ import annotations

import importlib.util

import click

from bratune.cli import VERBS, cli

__all__ = ["page"]

HEAD = """\
# The command line

Written by `python -m bratune.cli.help_page` from the `--help` of every verb; a test keeps it equal.

Data goes to stdout, progress to stderr. Exit codes: 0 ok, 1 error, 2 usage, 3 regression found
(`compare --fail-on-regression`), 4 finished with failed cells (`--strict`), 5 the target cannot be
measured here, 130 interrupted with results saved, 141 the reader of stdout went away. Every error is one
sentence that says what was asked, what was found and what would work.

`-q` leaves nothing on stderr but errors; `-v` says versions first, and where an error comes from. Ctrl-C is
answered at once, with the folder of what is measured and the command that goes on.

Shells complete verbs, flags and names after `eval "$(_BRATUNE_COMPLETE=bash_source bratune)"` in `~/.bashrc`
(`zsh_source` in `~/.zshrc`; fish: `_BRATUNE_COMPLETE=fish_source bratune | source`).

Every flag of `profile` and `explain` can also come from the environment (`BRATUNE_RES=512`) or from a YAML
file with the same keys (`--config run.yaml`; `--dump-config` writes one). The command line wins over the
environment, the environment over the file.
"""


def page() -> str:
    """The page: the help of the program and of every verb, 100 columns wide."""
    context = click.Context(
        cli,
        info_name="bratune",
        terminal_width=100,
        max_content_width=100,
        help_option_names=["-h", "--help"],
    )
    parts = [HEAD, _section("bratune", cli.get_help(context))]
    for verb in VERBS:
        if importlib.util.find_spec(f"bratune.cli.{verb.replace('-', '_')}") is None:
            continue
        command = cli.get_command(context, verb)
        assert command is not None
        own = click.Context(
            command, info_name=verb, parent=context, terminal_width=100, max_content_width=100
        )
        parts.append(_section(f"bratune {verb}", command.get_help(own)))
    return "\n".join(parts)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```\n{text}\n```\n"


if __name__ == "__main__":
    print(page(), end="")
