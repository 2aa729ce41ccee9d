"""Options that several verbs share, and how their texts become numbers.

Every option can also come from the environment (``BRATUNE_<FLAG>``) or from a YAML file (``--config``);
the command line wins over the environment, the environment over the file, the file over the default.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from bratune.cli.values import (
    DTYPE_HELP,
    BatchSize,
    Dtype,
    Duration,
    Model,
    Name,
    Numbers,
    Percent,
    Resolution,
    Seed,
    backend_names,
    model_names,
    route_kinds,
    task_names,
)
from bratune.errors import UsageError
from bratune.measure.settings import EFFORTS

__all__ = [
    "CONTEXT",
    "cluster_option",
    "command_line",
    "config_file",
    "dump_config",
    "engine_options",
    "factory_of",
    "host_option",
    "input_option",
    "measuring_options",
    "meter_changes",
    "output_options",
    "request_values",
    "settings_of",
    "swept_what_options",
    "target_options",
    "trust_option",
    "way_options",
    "what_options",
    "work_options",
]

F = TypeVar("F", bound=Callable[..., Any])

# For `click.command(context_settings=CONTEXT)`: -h, and BRATUNE_<FLAG> for every flag.
CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "BRATUNE"}


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        return functools.reduce(lambda f, option: option(f), reversed(options), function)

    return decorate


# --- groups of options, as decorators ---------------------------------------------------------

target_options = _stack(
    click.option(
        "--gpu", default="auto", metavar="KEY", help="GPU in question, e.g. a100; need not be here."
    ),
    click.option(
        "--gpu-spec",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="YAML that describes a GPU no table has (or `like: KEY` and what differs).",
    ),
    click.option(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N; profile: also several, or all.",
    ),
    click.option(
        "--measured", is_flag=True, help="Fail (exit code 5) rather than model a GPU that is not here."
    ),
)

_question = _stack(
    click.option("--model", type=Model("model", model_names), multiple=True, help="Model; repeatable."),
    click.option("--task", type=Name("task", task_names), help="Task; sets resolution and S."),
    click.option(
        "--res", "--img-size", "res", type=Resolution(), help="Pixels: 512, or 800x1333 (height x width)."
    ),
)

what_options = _stack(
    _question,
    click.option("--n-win", type=Numbers(), metavar="S", help="Regions per side, one or one per stage."),
    click.option("--topks", type=Numbers(), metavar="K,K,K,K", help="Top-k of each stage, e.g. 1,4,16,-2."),
)

# The same for verbs that answer for several S and top-k; `settings_of` takes them apart.
swept_what_options = _stack(
    _question,
    click.option(
        "--n-win",
        type=Numbers(),
        metavar="S,S",
        multiple=True,
        help="Regions per side: one S or several, each for every stage; four numbers are one per stage.  "
        "Repeatable.",
    ),
    click.option(
        "--topks",
        type=Numbers(),
        metavar="K,K,K,K",
        multiple=True,
        help="Top-k of each stage, e.g. 1,4,16,-2; repeatable.",
    ),
)

work_options = _stack(
    click.option(
        "-b", "--batch-size", type=BatchSize(), multiple=True, help="Images per call, or auto; repeatable."
    ),
    click.option("--dtype", type=Dtype(), help=DTYPE_HELP),
    click.option("--amp", is_flag=True, help="Autocast to --dtype and keep float32 weights."),
    click.option(
        "--channels-last/--no-channels-last",
        default=None,
        help="Images and maps in channels-last memory order.  [default: no]",
    ),
    click.option(
        "--direction",
        type=Name("direction", lambda: ("fwd", "fwd-bwd")),
        default="fwd",
        show_default=True,
        help="fwd, or fwd-bwd to add the gradients.",
    ),
    click.option(
        "--backend", type=Name("backend", backend_names), multiple=True, help="Only this backend; repeatable."
    ),
    click.option(
        "--skip", type=Name("backend", backend_names), multiple=True, help="Not this backend; repeatable."
    ),
    click.option(
        "--routes",
        type=Name("kind of routes", route_kinds),
        multiple=True,
        help="recorded, random, local or same; repeatable.  [default: recorded]",
    ),
    click.option(
        "--images",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Pictures to feed.  [default: synthetic]",
    ),
    click.option(
        "--seed", type=Seed(), default=0, show_default=True, help="Seed of weights, images and routes."
    ),
)

way_options = _stack(
    click.option(
        "--regime",
        type=Name("regime", lambda: ("eager", "graph", "compile")),
        multiple=True,
        help="eager, graph (CUDA graph) or compile; repeatable.  [default: eager]",
    ),
    click.option(
        "--l2",
        type=Name("cache state", lambda: ("cold", "warm", "both")),
        help="cold, warm or both.  [default: cold on a GPU, warm on a CPU]",
    ),
)

measuring_options = _stack(
    way_options,
    click.option(
        "--min-time", type=Duration(), metavar="TIME", help="Time at least this long per cell, e.g. 0.5s."
    ),
    click.option(
        "--max-noise", type=Percent(), metavar="PCT", help="Stop when the noise is below, e.g. 0.5%."
    ),
    click.option(
        "--timeout", type=Duration(), metavar="TIME", help="Stop timing a cell after this, e.g. 30s."
    ),
    click.option(
        "--effort",
        type=Name("effort", lambda: EFFORTS),
        help="quick, standard or full.  [default: standard on a GPU, quick on a CPU]",
    ),
    click.option(
        "--budget",
        type=Duration(),
        metavar="TIME",
        help="Stop after this, e.g. 20m; what is missing is said.",
    ),
)

engine_options = _stack(
    click.option(
        "--isolate/--no-isolate",
        default=True,
        help="Measure in a process of its own, which may crash.  [default: yes]",
    ),
    click.option(
        "--replay",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Answer from the records in a file or folder; nothing is measured.",
    ),
)


mixer_option = click.option(
    "--mixer",
    metavar="NAME,NAME",
    multiple=True,
    help="Compare these attentions in one layout, and nothing else: window, cross-shaped, full, "
    "bi-level-routing:gather ..., see `bratune list mixers`; repeatable.",
)


def names_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Names that stand in texts with commas between them."""
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def _trust(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Let weights files run code in this process and its workers, while the command runs."""
    if value:
        before = os.environ.get(TRUST_VARIABLE)
        os.environ[TRUST_VARIABLE] = "1"
        ctx.call_on_close(
            lambda: (
                os.environ.pop(TRUST_VARIABLE, None)
                if before is None
                else os.environ.update({TRUST_VARIABLE: before})
            )
        )


# The name that `bratune.kernels.checkpoint` reads; importing it here would load torch.
TRUST_VARIABLE = "BRATUNE_TRUST_CHECKPOINT"

trust_option = click.option(
    "--trust-checkpoint",
    is_flag=True,
    expose_value=False,
    callback=_trust,
    help="The weights file may run code of its author while it is read (whole pickled models).",
)

host_option = click.option(
    "--host",
    metavar="KIND",
    help="Host of a GPU that is not here: slow, typical, fast, or microseconds per operation, e.g. 12 "
    "(`bratune doctor` measures it).",
)

input_option = click.option(
    "--input",
    metavar="SHAPE",
    help="With --model package.module:factory, any model of yours: the shape of its input, e.g. 1x3x640x640.",
)

cluster_option = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Measure on a Ray cluster: auto, local or ray://HOST:PORT; --gpu a100,l4 names several kinds.",
)

output_options = _stack(
    click.option(
        "-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the records."
    ),
    click.option(
        "--format",
        type=Name("format", lambda: ("table", "json", "csv", "md", "timm")),
        default="table",
        show_default=True,
        help="What goes to stdout: table, json, csv, md or timm.",
    ),
    click.option("--dry-run", is_flag=True, help="Say what would be measured, and how long it might take."),
    click.option("--strict", is_flag=True, help="Exit code 4 when a cell failed."),
    click.option("--fresh", is_flag=True, help="Measure again what --output already holds."),
)


# --- configuration files ----------------------------------------------------------------------


def config_file(function: F) -> F:
    """Add ``--config FILE`` and ``--dump-config``; the function gets ``dump_config`` as an argument."""
    option = click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="YAML file with the same keys as the flags.",
    )
    dump = click.option("--dump-config", is_flag=True, help="Print the settings as such a file, and stop.")
    return option(dump(function))


def _read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is None:
        return
    from bratune.suites.load import read_yaml

    params = {key: p for p in ctx.command.params for key in _config_keys(p)}
    data = read_yaml(value, known=tuple(sorted(params)))
    defaults: dict[str, Any] = {}
    for key, given in data.items():
        option = params[key]
        several = isinstance(option, click.Option) and option.multiple
        one = not isinstance(given, list)
        if isinstance(option.type, Numbers) and not one:  # [1, 4, 16, -2] is one value
            one = not any(isinstance(value, list | str) for value in given)
        defaults[str(option.name)] = [given] if several and one else given
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _config_keys(param: click.Parameter) -> tuple[str, ...]:
    """How an option is spelt in a file: as its long flag, with - or with _; () for those about files."""
    apart = ("config", "dump_config", "help", "dry_run", "quiet", "verbose")
    if not isinstance(param, click.Option) or param.name in apart:
        return ()
    flag = next(opt for opt in param.opts if opt.startswith("--"))[2:]
    return (flag, flag.replace("-", "_")) if "-" in flag else (flag,)


def dump_config(ctx: click.Context) -> str:
    """The settings of this call as YAML, one key per line; settings that are not set are left out."""
    lines = []
    for param in ctx.command.params:
        keys, value = _config_keys(param), ctx.params.get(str(param.name))
        switched_off = value is False and param.default is not None
        if keys and value not in (None, (), "") and not switched_off:
            lines.append(f"{keys[0]}: {json.dumps(_plain(keys[0], value))}")
    return "\n".join(lines)


def _plain(key: str, value: Any) -> Any:
    """A value as a file would hold it; JSON is YAML, so no YAML package is needed to write it."""
    if key == "res":
        return f"{value[0]}x{value[1]}"
    if key in ("storage", "join"):
        from bratune.tune.storage import without_password

        return without_password(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def meter_changes(asked: Mapping[str, Any]) -> dict[str, float]:
    """What `measuring_options` gave of a meter's settings, by the names that `MeterSettings` has for them."""
    given = {
        "min_time_s": asked["min_time"],
        "max_noise_pct": asked["max_noise"],
        "timeout_s": asked["timeout"],
    }
    return {name: value for name, value in given.items() if value is not None}


def command_line(words: Sequence[str] | None = None) -> str:
    """The command line that was given, ready to be pasted, without the password of its storage.

    Args:
        words: By default those of this process.
    """
    from bratune.tune.storage import without_password

    given = ["bratune", *sys.argv[1:]] if words is None else words
    return shlex.join(map(without_password, given))


# Numbers of ``--n-win`` that are one per stage: every model has so many stages.
_STAGES = 4


def settings_of(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `swept_what_options` gave, once for every S with every top-k, in the order given."""
    n_wins: list[tuple[int, ...]] = []
    for given in asked["n_win"]:
        n_wins += [given] if len(given) == _STAGES else [(n_win,) for n_win in given]
    return [
        {**asked, "n_win": n_win, "topks": topks}
        for n_win in dict.fromkeys(n_wins or [()])
        for topks in dict.fromkeys(asked["topks"] or [None])
    ]


def factory_of(asked: Mapping[str, Any]) -> str:
    """The function of ``--model package.module:factory``; empty where a model of this package is asked for.

    Raises:
        UsageError: it is one of several models, has no ``--input``, or stands beside what its layers decide.
    """
    found = [name for name in asked["model"] if ":" in name]
    if not found:
        if asked["input"]:
            raise UsageError("--input is the shape of a model of yours: --model package.module:factory")
        return ""
    if len(asked["model"]) > 1 or not asked["input"]:
        raise UsageError(f"--model {found[0]} is measured alone, with --input, e.g. 1x3x640x640")
    own = (
        "task",
        "res",
        "n_win",
        "topks",
        "batch_size",
        "images",
        "checkpoint",
        "stage",
        "forms",
        "peers",
        "mixer",
        "suite",
    )
    for name in own:
        if asked.get(name) and (name != "batch_size" or asked[name] != 1):  # 1 is what tune takes unasked
            raise UsageError(
                f"--{name.replace('_', '-')} says nothing about {found[0]}: its function and --input do"
            )
    return str(found[0])


def request_values(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What `what_options` and `work_options` gave, as arguments of `bratune.work.request.make_request`."""
    return {
        "models": asked["model"],
        "task": asked["task"],
        "image": asked["res"],
        "batches": asked["batch_size"],
        "n_win": asked["n_win"] or (),
        "topks": asked["topks"],
        "dtype": asked["dtype"],
        "amp": asked["amp"],
        "channels_last": asked["channels_last"],
        "direction": asked["direction"],
        "backends": asked["backend"],
        "skip": asked["skip"],
        "routes": asked["routes"],
        "seed": asked["seed"],
        "images": str(asked["images"] or ""),
    }
