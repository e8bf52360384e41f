"""Worker processes that end with their work, with an error, and with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from typing import Any, Generic, TypeVar

from swift.core.errors import TransientError

__all__ = ["WorkerPool"]

_GRACE_SECONDS = 5.0

In = TypeVar("In")
Out = TypeVar("Out")


class WorkerPool(Generic[In, Out]):
    """Applies a function to items in several processes and returns the results in order.

    Args:
        function: ``function(state, item) -> result``, importable by name.
        state: sent to every process once.
        num_processes: how many; they start with the first items.
        stage: what the processes do, for messages ("tokenisation").
        fix: what the user can do when a process dies.
        deadline_seconds: how long to wait for one result.
    """

    def __init__(
        self,
        function: Callable[[Any, In], Out],
        state: Any,
        num_processes: int,
        *,
        stage: str,
        fix: str,
        deadline_seconds: float,
    ) -> None:
        self.function = function
        self.num_processes = num_processes
        self.stage = stage
        self.fix = fix
        self.deadline_seconds = deadline_seconds
        # forkserver: a plain fork would copy this process with its threads, locks and CUDA context.
        known = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
        if "forkserver" in known:  # what every process needs is imported once, by their common parent
            context.set_forkserver_preload([function.__module__])
        self._under_way: deque[Future[Out]] = deque()
        ended, self._end = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            num_processes, context, initializer=_start, initargs=(function, state, ended)
        )

    def map(self, items: Iterable[In], ahead: int) -> Generator[Out, None, None]:
        """The results, in the order of the items; at most ``ahead`` items per process are under way.

        What the function raises is raised here. Raises SwiftError when a process dies or a result does not
        arrive in time. Closing the generator early drops what is under way.
        """
        iterator = iter(items)
        waiting = self._under_way = deque[Future[Out]]()
        try:
            while True:
                for item in islice(iterator, ahead * self.num_processes - len(waiting)):
                    waiting.append(self._pool.submit(_work, item))
                if not waiting:
                    return
                # Left in the queue until it is there: an error must cancel it too.
                yield waiting[0].result(timeout=self.deadline_seconds)
                waiting.popleft()
        except BrokenProcessPool as error:
            message = "a worker process died"
            raise TransientError(message, where=self.stage, why=str(error), fix=self.fix) from error
        except TimeoutError as error:
            why = "its processes are stuck, or the disk they read from is"
            message = f"no result for {self.deadline_seconds:.0f} s"
            raise TransientError(message, where=self.stage, why=why) from error
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """End the processes: when their current items are done, or by force when they do not get done."""
        for future in self._under_way:
            future.cancel()
        running = [future for future in self._under_way if future.running()]
        if wait(running, timeout=min(_GRACE_SECONDS, self.deadline_seconds)).not_done:
            self._end.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._end.close()


_function: Callable[[Any, Any], Any]
_state: Any


def _start(function: Callable[[Any, Any], Any], state: Any, ended: Connection) -> None:
    global _function, _state
    _function, _state = function, state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the parent decides what they mean.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(ended,), daemon=True).start()


def _end_with_parent(ended: Connection) -> None:
    """End this process, whatever it does, when its parent says so (by closing the pipe) or has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_any([ended, parent.sentinel])
    os._exit(1)


def _work(item: Any) -> Any:
    return _function(_state, item)
