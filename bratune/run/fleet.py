"""Fleet: the same work on several devices of this machine at once, one worker and one store per device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence

from bratune.record import Record
from bratune.run.engine import CellEngine

__all__ = ["run"]


def run(
    engines: Sequence[CellEngine], session: Callable[[int, CellEngine], Iterator[Record]]
) -> Generator[tuple[int, Record], None, None]:
    """Rows of every engine as they come, with the number of the engine.

    Each engine has a thread, which sleeps while its worker measures. When one fails, or the caller stops (by
    Ctrl-C too), the workers of all are killed and the cells in flight stay "started", to be measured
    by the next run.

    Args:
        engines: One per device; entered and closed by the caller.
        session: What to do with an engine, given its number.

    Raises:
        Exception: whatever a session raises.
    """
    if len(engines) == 1:
        yield from ((0, record) for record in session(0, engines[0]))
        return
    inbox: queue.SimpleQueue[tuple[int, Record | BaseException | None]] = queue.SimpleQueue()

    def work(number: int) -> None:
        try:
            for record in session(number, engines[number]):
                inbox.put((number, record))
        except BaseException as error:  # handed to the caller's thread, whatever it is
            inbox.put((number, error))
        else:
            inbox.put((number, None))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(engines))]
    for thread in threads:
        thread.start()
    running = len(engines)
    try:
        while running:
            number, found = inbox.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                running -= 1
            else:
                yield number, found
    finally:
        for engine in engines:
            engine.cancel()
        for thread in threads:
            thread.join()
