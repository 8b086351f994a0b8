"""The same jobs on a real Ray cluster of this machine, one of whose actors is killed on the way."""

from __future__ import annotations

import os
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import other_sensor, texture
from thin_network import make_thin, save_thin_model, write_folders_of_pairs

from kglmatch import Matcher
from kglmatch.errors import BackendError, KGLMatchError
from kglmatch.models.config import CHANNELS

pq = pytest.importorskip("pyarrow.parquet", reason="tables need the extra many")
pa = pytest.importorskip("pyarrow")

from thin_model import ThinModel  # noqa: E402

from kglmatch.batch import RayOptions, image_jobs, pairs_of_folders, run_match, run_score, score_job  # noqa: E402
from kglmatch.batch.ray_engine import run_on_ray  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"max_keypoints": 8, "min_score": 0.0}

# In the environment of every process of the cluster of these tests, so that no other one is touched.
CLUSTER_MARK = f"KGLMATCH_TEST_CLUSTER={os.getpid()}\0"

pytestmark = pytest.mark.slow

FULL = CHANNELS  # before anything makes it thin


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def end(process: subprocess.Popen, address: str) -> None:
    """Ends the cluster that a process holds. `ray stop` would end every one on the machine."""
    process.terminate()  # it takes down what it started, but waits for long
    try:
        process.wait(timeout=3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in processes_of_cluster():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # Where Ray notes the cluster of this machine, which it would try to reach.
    note = Path("/tmp/ray/ray_current_cluster")
    with suppress(OSError):
        if note.read_text().strip().endswith(address[address.rindex(":") :]):
            note.unlink()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[None]:
    """A cluster of our own with room for two actors, to which this process is connected."""
    # A token of its own, so that neither the user's is read nor another cluster is reached by mistake.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {
        **os.environ,
        **token,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "KGLMATCH_TEST_CLUSTER": str(os.getpid()),
    }
    log = tmp_path_factory.mktemp("ray") / "log"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in token.items():
            patch.setenv(name, value)
        ray = pytest.importorskip("ray", reason="needs the extra ray")  # which reads the token
        for _ in range(3):
            process, address = start_cluster(environment, log)
            try:
                if not comes_up(process, log):
                    continue
                ray.init(address=address, log_to_driver=False)
                yield
                ray.shutdown()
                return
            finally:
                end(process, address)
    pytest.skip(f"no Ray cluster comes up here: {log.read_text()[-300:]}")


def comes_up(process: subprocess.Popen, log: Path) -> bool:
    """Whether a cluster is ready within two minutes."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if "runtime started" in log.read_text():
            return True
        time.sleep(0.2)
    return False


def start_cluster(environment: dict[str, str], log: Path) -> tuple[subprocess.Popen, str]:
    """The process that holds a new cluster, in a process group of its own, and the cluster's address."""
    port, *ports = free_ports(5)
    # Helpers whose ports are given are not waited for, which a busy machine needs.
    helpers = ("dashboard-agent-grpc", "dashboard-agent-listen", "metrics-export", "runtime-env-agent")
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"),
        *("--num-cpus=2", "--include-dashboard=false"),
        *(f"--{name}-port={number}" for name, number in zip(helpers, ports, strict=True)),
    ]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    return process, f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        yield ThinModel(str(save_thin_model(tmp_path_factory.mktemp("model"))), device="cpu", batch_size=8)


def processes_of_cluster(kind: bytes = b"") -> list[int]:
    """Processes of the cluster of these tests whose command begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            ours = CLUSTER_MARK in (path.parent / "environ").read_text(errors="replace")
            if ours and path.read_bytes().startswith(kind):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def kill_one_when(ready) -> threading.Thread:
    """Kills an actor as soon as there is a reason to."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if ready() and (found := processes_of_cluster(b"ray::_Actor")):
                os.kill(found[0], signal.SIGKILL)
                killed.append(found[0])
                return
            time.sleep(0.01)

    killed: list[int] = []
    thread = threading.Thread(target=wait)
    thread.killed = killed
    thread.start()
    return thread


def without_seconds(out: Path) -> list[dict]:
    rows = pq.read_table(out / "results.parquet").to_pylist()
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_match_many_with_an_actor_killed(cluster, model, tmp_path, monkeypatch):
    monkeypatch.setattr(image_jobs, "_CHUNK", 3)
    folders = write_folders_of_pairs(tmp_path / "data", 40)
    (folders[0] / "0007.png").write_bytes(b"no image")
    pairs, out = pairs_of_folders(*folders), tmp_path / "ray"
    journal = out / "journal.jsonl"
    killer = kill_one_when(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3)
    report = run_match(
        pairs, out, model=model, save=".csv", engine="ray", ray=RayOptions(actors=2), **OPTIONS
    )
    killer.join()
    assert killer.killed and (report.answered, report.errors) == (39, 1)
    # Nothing twice: one line a pair.
    assert journal.read_bytes().count(b"\n") == 40
    local = tmp_path / "local"
    run_match(pairs, local, model=model, save=".csv", workers=0, **OPTIONS)
    found, expected = without_seconds(out), without_seconds(local)
    assert [row["name"] for row in found] == [f"{i:04}" for i in range(40)]
    for a, b in zip(found, expected, strict=True):
        assert {k: v for k, v in a.items() if k != "homography"} == {
            k: v for k, v in b.items() if k != "homography"
        }
        np.testing.assert_allclose(a["homography"] or 0, b["homography"] or 0, rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in (out / "matches").iterdir()) == sorted(
        p.name for p in (local / "matches").iterdir()
    )


def test_score_many_with_an_actor_killed(cluster, model, tmp_path, monkeypatch):
    monkeypatch.setattr(score_job, "PIECE", 8)
    vis = np.stack([texture(64, 64, seed) for seed in range(48)])
    sides = [np.rint(side * 255).astype(np.uint8) for side in (vis, np.stack([other_sensor(v) for v in vis]))]
    shards = []
    for i in range(6):
        columns = {
            name: [p.tobytes() for p in np.roll(side, i, axis=0)]
            for name, side in zip(("vis", "ir"), sides, strict=True)
        }
        shards.append(tmp_path / f"{i}.parquet")
        pq.write_table(pa.table(columns), shards[-1])
    out = tmp_path / "ray"
    killer = kill_one_when(lambda: any((out / "parts").glob("*/*.parquet")))
    report = run_score(shards, out, model=model, engine="ray", ray=RayOptions(actors=2))
    killer.join()
    assert killer.killed and report.complete and report.total == 288
    run_score(shards, tmp_path / "local", model=model)
    found, expected = (pq.read_table(folder / "results.parquet") for folder in (out, tmp_path / "local"))
    assert found.drop_columns("score").equals(expected.drop_columns("score"))
    np.testing.assert_allclose(found["score"].to_numpy(), expected["score"].to_numpy(), atol=1e-5)


class Poison:
    """Work that ends its process at one item."""

    def __init__(self, mistake: bool = False) -> None:
        self.workers, self.mistake = 0, mistake

    def prepare(self) -> None:
        if self.mistake:
            raise BackendError("no such device")

    def __call__(self, items):
        if 5 in items:
            os._exit(1)
        return [{"item": item} for item in items]


def test_an_item_that_kills_its_actors_is_given_up_and_the_rest_is_done(cluster, monkeypatch):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    tasks = iter([[0, 1, 2], [3, 4, 5, 6], [7, 8]])
    rows = list(run_on_ray(Poison(), tasks, RayOptions(actors=2, cpus=0.5), lambda item: {"lost": item}))
    assert sorted(row["item"] for row in rows if "item" in row) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert [row for row in rows if "lost" in row] == [{"lost": 5}]
    with pytest.raises(BackendError, match=r"^no such device$"):
        list(run_on_ray(Poison(True), iter([[1]]), RayOptions(actors=1), dict))
    assert list(run_on_ray(Poison(), iter([]), RayOptions(actors=1), dict)) == []


def test_the_example_for_ray_data(cluster, tmp_path, monkeypatch):
    """With the bundled weights: the actors know no thin network."""
    vis = np.stack([np.rint(texture(64, 64, seed) * 255).astype(np.uint8) for seed in range(8)])
    table = pa.table(
        {"id": list(range(8)), "vis": [p.tobytes() for p in vis], "ir": [p.tobytes() for p in vis]}
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--actors", "1", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", ["ray_score.py", *arguments])
    runpy.run_path(str(ROOT / "examples" / "ray_score.py"), run_name="__main__")
    found = pq.read_table(tmp_path / "out").sort_by("id")
    assert found.column_names == ["id", "score", "error"] and found["error"].null_count == 8
    # In this process the module's networks are thin.
    monkeypatch.setattr("kglmatch.models.config.CHANNELS", FULL)
    expected = Matcher.from_pretrained(device="cpu").score(vis, vis)
    np.testing.assert_allclose(found["score"].to_numpy(), expected, atol=1e-5)


def test_options_out_of_range():
    with pytest.raises(KGLMatchError, match="actors must be at least 1"):
        RayOptions(actors=0)
