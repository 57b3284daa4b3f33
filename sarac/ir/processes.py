"""Work dealt out over the processes of a torch.distributed group: each does its share, all get every result or one error."""

import heapq
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from sarac.ir.errors import InputError, SaracError

_PATIENCE = timedelta(days=1)  # one process may decompose long after the others have done their share
_LOOK = 0.1  # seconds between two looks at how far all are
_calls = count()
_open = False  # whether this process owes the others, which may wait for it, one more exchange


class _StoppedError(Exception):
    """Another process has failed."""


def dealt(costs: Sequence[int], processes: int) -> list[list[int]]:
    """Which of the works each process does: the costliest first, each to the process that has the least so far."""
    loads = [(0, rank) for rank in range(processes)]
    shares: list[list[int]] = [[] for _ in range(processes)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(i)
        heapq.heappush(loads, (load + costs[i], rank))
    return shares


def first() -> bool:
    """Whether this process is the one that speaks: the only one, or rank 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0" or not _launched()


@contextmanager
def joined() -> Iterator[bool]:
    """Join the group of the processes that torchrun started, for a while; whether there are any others.

    A process that fails before the results are exchanged tells the others, which then end with its error.
    """
    if not _launched():
        yield False
        return
    global _open
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=_PATIENCE)  # what is exchanged lies in host memory
    _open = True
    try:
        yield True
    except Exception as error:
        if _open:
            _exchanged(None, error)
        raise
    finally:
        _open = False
        dist.destroy_process_group()


class Share:
    """One process's part of works of these costs. `progress` is called in rank 0, for the steps of all processes."""

    def __init__(self, costs: Sequence[int], progress: Callable[[str], None] | None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                "distributed=True needs the process group that the work is dealt over: call "
                "torch.distributed.init_process_group in every process first, or leave it out."
            )
        self.mine = dealt(costs, dist.get_world_size())[dist.get_rank()]
        group: Any = dist.distributed_c10d
        self._board = group.PrefixStore(f"sarac/{next(_calls)}", group._get_default_store())
        self._progress = progress if dist.get_rank() == 0 else None

    def step(self, name: str) -> None:
        """Count one step of this process; where another has failed it ends here."""
        try:
            if self._board.check(["failed"]):
                raise _StoppedError
            self._board.set("last", name)
            self._board.add("done", 1)
        except RuntimeError as error:
            raise _gone(error) from error

    def collect(self, results: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """The results of all processes, from this one's; the first error of any of them is raised in all."""
        mine: dict[str, Any] = {}
        failed = None
        with self._shown():
            try:
                mine.update(results)
            except _StoppedError:
                pass
            except Exception as error:  # noqa: BLE001  whatever it is, the others would wait for this one
                failed = error
                with suppress(RuntimeError):
                    self._board.set("failed", "")
            return _exchanged(mine, failed)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Show the steps of all processes in one bar, meanwhile."""
        if self._progress is None:
            yield
            return
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(self._progress, ended), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _watch(self, progress: Callable[[str], None], ended: threading.Event) -> None:
        shown, last = 0, False
        while not last:
            last = ended.wait(_LOOK)
            try:
                done = self._board.add("done", 0)
                name = self._board.get("last").decode() if done else ""
            except RuntimeError:  # rank 0 is not where the store is, and that is gone
                return
            for _ in range(done - shown):
                progress(name)
            shown = done


def _exchanged(mine: dict[str, Any] | None, failed: Exception | None) -> dict[str, Any]:
    global _open
    told = failed
    if failed is not None and not isinstance(failed, SaracError):
        told = SaracError(f"Process {dist.get_rank()} failed with {type(failed).__name__}: {failed}.")
    everyone: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(everyone, (mine or {}, told))
    except RuntimeError as error:
        raise (failed or _gone(error)) from error
    finally:
        _open = False
    errors = [(rank, theirs) for rank, (_, theirs) in enumerate(everyone) if theirs is not None]
    if errors:
        rank, first_of_all = errors[0]
        raise (failed if failed is not None and rank == dist.get_rank() else first_of_all) from failed
    return {name: value for found, _ in everyone for name, value in found.items()}


def _gone(error: RuntimeError) -> SaracError:
    return SaracError(
        f"Another process of the group is gone ({str(error).splitlines()[0]}). What was measured is in the cache: run it again."
    )


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ
