"""Work on a Ray cluster: actors that hold one matcher each, and are replaced when they are lost.

Tasks go to whichever actor has room. Those of an actor that died are done again by others; what it wrote is
written anew under the same names, so nothing is there twice. A task that kills one actor after another is
split, and the item at fault is given up. An actor may die before the answer to the task before has left it,
which lets that one look guilty: so what has been suspected once has its next actor to itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from kglmatch.errors import BackendError, KGLMatchError

_TASKS = 2  # that an actor has at once, so that it never waits for the next
_DEATHS = 2  # that a task may cause before it is split or given up
_DEATHS_IN_A_ROW = 12  # of actors, with none ready between: then it is not the tasks


@dataclass(frozen=True)
class RayOptions:
    """How a job uses a Ray cluster.

    Attributes:
        address: of the cluster; None takes the one that runs here or that RAY_ADDRESS names, or starts one
            on this machine.
        actors: how many; None takes one a GPU, or as many as the processors of the cluster allow.
        cpus: processors of each actor; None takes 1, with a GPU up to 4.
        gpus: of each actor, also a fraction; None takes 1 where the cluster has any.
    """

    address: str | None = None
    actors: int | None = None
    cpus: float | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("actors", 1), ("cpus", 0), ("gpus", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise KGLMatchError(f"{name} must be at least {least}, got {value}")


class Work(Protocol):
    """What an actor does; it travels to the actor by pickle."""

    workers: int | None

    def prepare(self) -> None:
        """Loads the model."""

    def __call__(self, items: list[Any]) -> list[dict[str, Any]]:
        """Rows for some items."""


class _Actor:
    """Runs in a process of the cluster."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def prepare(self) -> None:
        self._work.prepare()

    def run(self, items: list[Any]) -> list[dict[str, Any]]:
        return self._work(items)


@dataclass
class _Task:
    items: list[Any]
    deaths: int = 0


class _Slot:
    """A place for an actor, and what the one that holds it works on, in order."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self.tasks: deque[_Task] = deque()
        self.restart()

    def restart(self) -> None:
        self.ready = False
        self.tasks.clear()
        self.actor = self._start()


def run_on_ray(
    work: Work, tasks: Iterator[list[Any]], options: RayOptions, lost: Callable[[Any], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Rows of all items, in the order in which they are done.

    Args:
        work: what each actor does.
        tasks: items that an actor takes at once.
        options: how many actors.
        lost: the row of an item whose work killed its actor each time.

    Raises:
        BackendError: no Ray, no cluster, or actors that die whatever they do.
        KGLMatchError: what the work raises.
    """
    ray = _ray()
    here = not ray.is_initialized()
    if here:
        try:
            ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises plain ones where a cluster does not come up
            reason = " ".join(str(error).split())
            raise BackendError(f"cannot reach or start a Ray cluster: {reason}") from error
    try:
        yield from _Pool(ray, work, options).run(tasks, lost)
    finally:
        if here:
            ray.shutdown()


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise BackendError('engine="ray" needs Ray: pip install "kglmatch[ray]"') from error


class _Pool:
    def __init__(self, ray: Any, work: Work, options: RayOptions) -> None:
        self._ray = ray
        has = ray.cluster_resources()
        all_cpus, all_gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
        gpus = options.gpus if options.gpus is not None else float(all_gpus > 0)
        count = options.actors
        if count is None and gpus:
            count = max(1, int(all_gpus / gpus))
        cpus = options.cpus
        if cpus is None:
            cpus = float(max(1, min(4, int(all_cpus / (count or 1))))) if gpus else 1.0
        if count is None:
            count = max(1, int(all_cpus / cpus)) if cpus else 1
        if work.workers is None:
            work = dataclasses.replace(work, workers=max(0, int(cpus) - 1))  # type: ignore[type-var]
        actor = ray.remote(_Actor).options(num_cpus=cpus, num_gpus=gpus)
        sent = ray.put(work)
        self._slots = [_Slot(lambda: actor.remote(sent)) for _ in range(count)]
        self._again: deque[_Task] = deque()
        self._suspects: deque[_Task] = deque()
        self._flying: dict[Any, tuple[_Slot, Any]] = {}
        self._deaths_in_a_row = 0

    def run(
        self, tasks: Iterator[list[Any]], lost: Callable[[Any], dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        try:
            for slot in self._slots:
                self._submit(slot, None)
            while self._feed(tasks):
                (done,), _ = self._ray.wait(list(self._flying), num_returns=1)
                slot, actor = self._flying.pop(done)
                yield from self._finish(slot, actor, done, lost)
        finally:
            for slot in self._slots:
                self._ray.kill(slot.actor)

    def _feed(self, tasks: Iterator[list[Any]]) -> bool:
        """Gives tasks to the actors that have room; whether any is still to be done."""
        for room in range(_TASKS):
            for slot in self._slots:
                if slot.ready and len(slot.tasks) == room and not any(task.deaths for task in slot.tasks):
                    task = self._next(tasks, alone=room == 0)
                    if task is not None:
                        self._submit(slot, task)
        if any(slot.tasks for slot in self._slots):
            return True
        # No actor is ready, or there is nothing left.
        return bool(self._again or self._suspects) or not any(slot.ready for slot in self._slots)

    def _next(self, tasks: Iterator[list[Any]], alone: bool) -> _Task | None:
        """The next task for an actor: a suspected one only where it is alone."""
        if alone and self._suspects:
            return self._suspects.popleft()
        if self._again:
            return self._again.popleft()
        items = next(tasks, None)
        return None if items is None else _Task(items)

    def _submit(self, slot: _Slot, task: _Task | None) -> None:
        if task is None:
            reference = slot.actor.prepare.remote()
        else:
            reference = slot.actor.run.remote(task.items)
            slot.tasks.append(task)
        self._flying[reference] = slot, slot.actor

    def _finish(
        self, slot: _Slot, actor: Any, reference: Any, lost: Callable[[Any], dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        exceptions = self._ray.exceptions
        try:
            rows = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, KGLMatchError):
                raise type(cause)(str(cause)) from error
            raise
        except exceptions.RayActorError as error:
            if slot.actor is actor:  # else another of its tasks said so before
                yield from self._finished_before(slot, actor)
                yield from self._replace(slot, lost, error)
            return
        self._deaths_in_a_row = 0
        if slot.ready:
            slot.tasks.popleft()
            yield from rows
        slot.ready = True

    def _finished_before(self, slot: _Slot, actor: Any) -> Iterator[dict[str, Any]]:
        """Rows of tasks that a dead actor had ended, whose answers wait behind the news of its death."""
        for reference in [r for r, (s, a) in self._flying.items() if s is slot and a is actor]:
            try:
                rows = self._ray.get(reference)
            except self._ray.exceptions.RayError:
                return  # this one and those behind it were never ended
            del self._flying[reference]
            if slot.ready:
                slot.tasks.popleft()
                yield from rows

    def _replace(
        self, slot: _Slot, lost: Callable[[Any], dict[str, Any]], error: Exception
    ) -> Iterator[dict[str, Any]]:
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > _DEATHS_IN_A_ROW:
            reason = " ".join(str(error).split())
            raise BackendError(f"the actors on the Ray cluster die whatever they do: {reason}") from error
        given_up: list[Any] = []
        for number, task in enumerate(slot.tasks):
            if number == 0:  # the others waited behind it
                task.deaths += 1
            if task.deaths < _DEATHS:
                (self._suspects if task.deaths else self._again).append(task)
            elif len(task.items) > 1:
                self._suspects.extend(_Task([item], _DEATHS - 1) for item in task.items)
            else:
                given_up.extend(task.items)
        slot.restart()
        self._submit(slot, None)
        yield from map(lost, given_up)
