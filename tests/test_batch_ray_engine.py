"""Who is blamed for the death of an actor, on a make-believe cluster where an actor's answers die with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kglmatch.batch.ray_engine import RayOptions, _Pool
from kglmatch.errors import BackendError


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class RayTaskError(RayError):
    pass


class Reference:
    """To an answer, once it is done."""

    done, failed, answer = False, False, None


class FakeActor:
    """Works only when it is waited for, on all that it has been given: its answers leave it together or
    not at all."""

    def __init__(self, cls, work) -> None:
        self.instance, self.given, self.dead = cls(work), [], False
        self.prepare = SimpleNamespace(remote=lambda: self.take(self.instance.prepare))
        self.run = SimpleNamespace(remote=lambda items: self.take(lambda: self.instance.run(items)))

    def take(self, call):
        reference = Reference()
        self.given.append((reference, call))
        return reference

    def work(self) -> None:
        if not self.dead:
            try:
                answers = [call() for _, call in self.given]
            except SystemExit:
                self.dead = True
        for number, (reference, _) in enumerate(self.given):
            reference.done, reference.failed = True, self.dead
            reference.answer = None if self.dead else answers[number]
        self.given = []


class FakeRay:
    """What the engine uses of Ray."""

    exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayActorError, RayTaskError=RayTaskError)

    def __init__(self) -> None:
        self.actors: list[FakeActor] = []

    def cluster_resources(self):
        return {"CPU": 2.0}

    def put(self, value):
        return value

    def remote(self, cls):
        def start(work):
            self.actors.append(FakeActor(cls, work))
            return self.actors[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, references, num_returns):
        for actor in self.actors:
            actor.work()
        return next([r] for r in references if r.done), None

    def get(self, reference):
        if reference.failed:
            raise RayActorError("the actor died")
        return reference.answer

    def kill(self, actor):
        actor.dead = True


class Poison:
    """Work that ends its process at some items."""

    def __init__(self, *poisons: int) -> None:
        self.workers, self.poisons = 0, poisons

    def prepare(self) -> None:
        pass

    def __call__(self, items):
        if set(self.poisons) & set(items):
            raise SystemExit
        return [{"item": item} for item in items]


@pytest.mark.parametrize("actors", [1, 2, 3])
@pytest.mark.parametrize("poisons", [(5,), (0,), (11,), (4, 5), (2, 3, 8)])
def test_only_what_kills_its_actors_is_given_up(poisons, actors):
    for size in (1, 2, 3, 4, 12):
        tasks = (list(range(12))[start : start + size] for start in range(0, 12, size))
        pool = _Pool(FakeRay(), Poison(*poisons), RayOptions(actors=actors))
        rows = list(pool.run(tasks, lambda item: {"lost": item}))
        assert sorted(row["lost"] for row in rows if "lost" in row) == list(poisons)
        assert sorted(row["item"] for row in rows if "item" in row) == sorted({*range(12)} - {*poisons})


class NeverReady(Poison):
    def prepare(self) -> None:
        raise SystemExit


def test_actors_that_die_before_they_are_ready_end_the_job():
    pool = _Pool(FakeRay(), NeverReady(), RayOptions(actors=2))
    with pytest.raises(BackendError, match="die whatever they do: the actor died"):
        list(pool.run(iter([[0], [1]]), lambda item: {"lost": item}))
