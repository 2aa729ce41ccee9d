"""Whole models side by side: the published composition, a backend everywhere, and the runtime.

    $ python -m bratune.profile.whole_model --model biformer_tiny --res 224 -b 1
    $ python -m bratune.profile.whole_model -b 4 --direction fwd-bwd
    $ python -m bratune.profile.whole_model --compile --peers swin_tiny,convnext_tiny

All contenders share weights and images and take turns (`bratune.profile.contest`); models of timm
(``--peers``) take theirs too. With ``-o`` every row is also a record.
"""

from __future__ import annotations

import functools
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bratune.errors import BratuneError, UnknownNameError, UsageError
from bratune.measure.meter import Measurement
from bratune.profile.contest import (
    AGREE,
    CLOCKS,
    COMPILED,
    GRAPH,
    Contest,
    Row,
    contenders,
    contest,
    with_compiled,
)
from bratune.record import Record

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bratune.machine import Machine
    from bratune.work.cells import Scene

__all__ = ["to_records"]

_REGIMES = {"": "eager", COMPILED: "compile", GRAPH: "graph"}
_OWN = ("published", "gather", "auto", "runtime", "lean")


def to_records(
    found: Contest, scene: Scene, machine: Machine, *, how: str, **values: Any
) -> Iterator[tuple[Record, tuple[float, ...]]]:
    """A row of the project's records per contender, and its times; caches were warm.

    Args:
        found: The contest.
        scene: The model of ours, its images and batch.
        machine: Where it ran.
        how: What a sample is, for `Record.sampling`.
        values: Further fields of every record.
    """
    from bratune.profile.peers import PEERS, timm_cell

    limit = AGREE[scene.request.dtype]
    for row in found.rows:
        name, mark, kind = row.name.partition(", ")
        regime = _REGIMES[mark + kind]
        if name in _OWN:
            cell = scene.model_cell((name,)).replace(regime=regime)
        else:
            cell = timm_cell(PEERS.get(name, name), scene.request, scene.batch, regime, scene.l2)
        own: dict[str, Any] = {"outcome": row.outcome, "reason": row.reason, "sampling": how}
        if row.difference is not None:
            own |= {"max_rel_err": row.difference, "tolerance": limit}
        if row.median_ms is not None:
            measured = Measurement(samples_ms=row.samples_ms, workspace_mb=row.peak_mb, stop_reason="rounds")
            own |= measured.to_record_fields()
            own |= {"images_per_s": 1e3 * found.batch / row.median_ms}
            own |= {"speedup": row.ratio, "baseline": found.baseline}
        yield Record.of(cell, machine, **own, **values), row.samples_ms


@click.command()
@click.option("--model", default="biformer_tiny", show_default=True, help="A published model.")
@click.option("--task", default="classification", show_default=True, help="Sets S; see bratune list tasks.")
@click.option("--res", default=None, help="Image size, 512 or 800x1333; by default the task's.")
@click.option("-b", "--batch-size", "batches", multiple=True, default=(1,), show_default=True, help="Images.")
@click.option("--dtype", default="float32", type=click.Choice(list(AGREE)), show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--rounds", default=30, show_default=True, help="Times that every contender runs.")
@click.option("--direction", default="fwd", type=click.Choice(["fwd", "fwd-bwd"]), show_default=True)
@click.option("--only", default="", help="Forms of the model, e.g. published,runtime; by default all.")
@click.option("--peers", default="", help="Models of timm in the same rounds, e.g. swin_tiny,deit_small.")
@click.option(
    "--compile", "compile_", is_flag=True, help="Time every contender compiled, too; takes minutes."
)
@click.option("--threads", default=0, help="CPU threads; 0 leaves them as they are.")
@click.option("--clock", default="wall", type=click.Choice(list(CLOCKS)), show_default=True)
@click.option(
    "--budget", type=float, default=None, help="Seconds after which no contender and no round is started."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=None, help="Folder for records.jsonl."
)
def main(
    model: str,
    task: str,
    res: str | None,
    batches: tuple[int, ...],
    dtype: str,
    device: str,
    rounds: int,
    direction: str,
    only: str,
    peers: str,
    compile_: bool,
    threads: int,
    clock: str,
    budget: float | None,
    output: Path | None,
) -> None:
    """Time a whole model as published, by backend, and in the runtime (or lean), side by side."""
    deadline = None if budget is None else time.monotonic() + budget
    import torch

    from bratune.machine import detect
    from bratune.measure.memory import release
    from bratune.profile.peers import timm_model
    from bratune.store import Store
    from bratune.variant import parse_resolution
    from bratune.work.cells import scenes
    from bratune.work.modules import images_for, model_for
    from bratune.work.request import make_request

    if threads:
        torch.set_num_threads(threads)
    command = _command(sys.argv[1:])
    run_id = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    try:
        machine = detect(device)
        store = None if output is None else Store(output / "records.jsonl")
        request = make_request(
            machine,
            models=(model,),
            task=task,
            image=None if res is None else parse_resolution(res),
            batches=batches,
            dtype=dtype,
            direction=direction,
            l2="warm",
        )
        click.echo(str(machine))
        rows: list[Row] = []
        for scene in scenes(request):
            cell = scene.model_cell(("auto",))
            network, images = model_for(cell, machine.device).eval(), images_for(cell, machine.device)
            if direction == "fwd-bwd" and scene.batch == 1 and not network.features_only:
                raise UsageError(
                    "one image gives a classifier in training no gradient: batch norm makes the mean of its "
                    "last map a constant; -b 2 would work"
                )
            forms = _chosen(contenders(network, images, direction=direction), only)

            def rival(name: str, image: tuple[int, int] = cell.image, images: Tensor = images) -> Any:
                made: Any = timm_model(name, image)
                return made.to(images.device, images.dtype).train(direction == "fwd-bwd")

            rivals: dict[str, Callable[[], nn.Module]] = {
                name: functools.partial(rival, name) for name in filter(None, peers.split(","))
            }
            if compile_:
                torch._dynamo.reset()  # code of another batch counts towards the limit of recompilations
                forms, rivals = with_compiled(forms, network), with_compiled(rivals)
            found = contest(
                forms,
                images,
                rounds=rounds,
                clock=CLOCKS[clock],
                direction=direction,
                rivals=rivals,
                deadline=deadline,
            )
            height, width = cell.image
            click.echo(
                f"{model} · {height if height == width else f'{height}x{width}'} · batch {scene.batch} · "
                f"{dtype} · {direction} · {clock} clock · {found.rounds} rounds"
            )
            click.echo(found.table())
            how = f"{found.rounds} rounds in turn, {clock} clock"
            rows += found.rows
            for record, samples in to_records(found, scene, machine, how=how, run_id=run_id, repro=command):
                if store is not None:
                    store.append(record, samples)
            del network, images, forms, rivals
            release()
    except BratuneError as error:
        raise click.ClickException(str(error)) from None
    without = sum(not row.samples_ms for row in rows)
    if without:
        raise click.ClickException(f"{without} of {len(rows)} rows have no time; each says why")


def _command(arguments: Sequence[str]) -> str:
    """What measures the rows again, wherever they are kept."""
    words = list(arguments)
    for flag in {"-o", "--output"} & set(words):
        at = words.index(flag)
        del words[at : at + 2]
    return f"python -m bratune.profile.whole_model {shlex.join(words)}"


def _chosen(forms: Mapping[str, Callable[[], nn.Module]], only: str) -> Mapping[str, Callable[[], nn.Module]]:
    """The forms that are asked for, each with its graph; all where none is."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = dict.fromkeys(name.removesuffix(GRAPH) for name in forms)
    for name in names:
        if name not in known:
            raise UnknownNameError("form", name, known)
    return {name: form for name, form in forms.items() if not names or name.removesuffix(GRAPH) in names}


if __name__ == "__main__":
    main()
