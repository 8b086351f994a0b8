"""The real Hub client against a local server: what each case of a download or upload does and says."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hub_server import OUTSIDER, TOKEN, HubServer, Repo, sha256
from huggingface_hub import ModelCard as HubCard
from huggingface_hub import constants

from kglmatch import Matcher
from kglmatch.cli import main
from kglmatch.errors import ConfigError, KGLMatchError, NoGraphsError, OutputError, WeightsError
from kglmatch.models import hub
from kglmatch.models.files import CHECKSUMS_FILE, GRAPH_FILES, weights_root
from kglmatch.models.hub import HubOptions
from kglmatch.models.pretrained import load_config, load_model, resolve, resolve_onnx
from kglmatch.onnx_cache import load_pretrained as load_graphs
from kglmatch.options import DEFAULT_MODEL

REPO = "owner/name"
WEIGHTS = "model.safetensors"
CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def real_files() -> dict[str, bytes]:
    """The bundled model's files."""
    folder = weights_root() / DEFAULT_MODEL
    return {name: (folder / name).read_bytes() for name in ("config.json", WEIGHTS)}


@pytest.fixture(scope="module")
def files(real_files) -> dict[str, bytes]:
    """A model repository's files; the weights are small and only good to be carried about.

    Beside them lies a pickle that nobody may touch.
    """
    weights = np.random.default_rng(0).bytes(20_000)
    pickled = pickle.dumps(KGLMatchError("unpickled"))
    return {**real_files, WEIGHTS: weights, "README.md": b"# A model\n", "pytorch_model.bin": pickled}


@pytest.fixture
def server(files, monkeypatch, tmp_path) -> Iterator[HubServer]:
    """A Hub with one model, and a client that knows no token of this machine's user."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as server:
        server.add(REPO, files)
        yield server


@pytest.fixture
def options(server, tmp_path) -> HubOptions:
    """What every call is given: the server's address and an empty cache."""
    return HubOptions(endpoint=server.url, cache_dir=tmp_path / "cache")


def head(server: HubServer, repo_id: str = REPO) -> str:
    """The commit that a repository's main branch is at."""
    return server.repos[repo_id].refs["main"]


def variant(content: bytes) -> bytes:
    """Weights that differ in one bit of the last tensor."""
    return content[:-1] + bytes([content[-1] ^ 1])


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with other Hub variables; kglmatch comes from the checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    return {**kept, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", **variables}


# --- online -----------------------------------------------------------------------------------


def test_online(server, options, matcher, real_files):
    server.add(REPO, real_files)
    loaded = Matcher.from_pretrained(REPO, device="cpu", **asdict(options))
    patches = np.random.default_rng(0).random((2, 64, 64), dtype=np.float32)
    expected = matcher.describe(patches, "ir").descriptors
    assert np.array_equal(loaded.describe(patches, "ir").descriptors, expected)
    assert (loaded.source.source, loaded.source.repo_id) == ("hub", REPO)
    assert loaded.source.commit == head(server)
    assert f"commit {head(server)}" in loaded.source.origin


def test_only_config_and_safetensors_are_asked_for(server, options):
    resolve(REPO, options)
    asked = {request.path.split("?")[0].rsplit("/", 1)[-1] for request in server.requests}
    assert asked == {"config.json", WEIGHTS, sha256(server.repos[REPO].commits[head(server)][WEIGHTS])}


def test_token_goes_to_the_hub_and_not_to_its_cdn(server, options):
    server.repos[REPO].private = True
    resolve(REPO, replace(options, token=TOKEN))
    sent = {(request.origin, request.headers.get("authorization")) for request in server.requests}
    assert sent == {("hub", f"Bearer {TOKEN}"), ("cdn", None)}


def test_tag_as_part_of_the_name(server, options, files):
    repo = server.repos[REPO]
    repo.refs["v1"] = head(server)
    repo.commit({**files, WEIGHTS: variant(files[WEIGHTS])})
    assert resolve(f"{REPO}@v1", options).weights.read_bytes() == files[WEIGHTS]
    assert resolve(REPO, replace(options, revision="v1")).commit == repo.refs["v1"]
    assert resolve(REPO, options).weights.read_bytes() == variant(files[WEIGHTS])


def test_both_files_come_from_one_commit(server, options, files):
    """The branch moves between the two downloads."""
    first = head(server)

    def move(method: str, path: str) -> None:
        if method == "GET" and path.endswith("config.json") and head(server) == first:
            server.repos[REPO].commit({**files, WEIGHTS: variant(files[WEIGHTS])})

    server.on_request = move
    found = resolve(REPO, options)
    assert found.commit == first != head(server)
    assert found.weights.read_bytes() == files[WEIGHTS]


def test_force_download(server, options):
    resolve(REPO, options)
    before = len(server.asked("GET"))
    resolve(REPO, replace(options, force_download=True))
    assert len(server.asked("GET")) == 2 * before


# --- cached -----------------------------------------------------------------------------------


def test_cached_branch_asks_only_what_commit_it_is(server, options):
    first = resolve(REPO, options)
    server.requests.clear()
    assert resolve(REPO, options) == first
    assert server.requests
    assert {(request.method, "config.json" in request.path) for request in server.requests} == {
        ("HEAD", True)
    }


def test_cached_commit_makes_no_request(server, options):
    commit = resolve(REPO, options).commit
    server.requests.clear()
    assert resolve(f"{REPO}@{commit}", options).commit == commit
    assert server.requests == []


def test_new_commit_is_downloaded(server, options, files):
    resolve(REPO, options)
    new = server.repos[REPO].commit({**files, WEIGHTS: variant(files[WEIGHTS])})
    found = resolve(REPO, options)
    assert (found.commit, found.weights.read_bytes()) == (new, variant(files[WEIGHTS]))


@pytest.mark.parametrize("status", [503, "refused"])
def test_cache_serves_when_the_hub_does_not(server, options, status):
    first = resolve(REPO, options)
    if status == "refused":
        options = replace(options, endpoint="http://127.0.0.1:9")
    else:
        server.status = status
    assert resolve(REPO, options) == first


# --- offline ----------------------------------------------------------------------------------


def test_local_files_only(server, options):
    first = resolve(REPO, options)
    server.requests.clear()
    assert resolve(REPO, replace(options, local_files_only=True)) == first
    with pytest.raises(
        WeightsError, match=r"v2: config\.json is not in the cache at .*local_files_only=True"
    ):
        resolve(f"{REPO}@v2", replace(options, local_files_only=True))
    with pytest.raises(WeightsError, match="force_download needs the Hub"):
        resolve(REPO, replace(options, local_files_only=True, force_download=True))
    assert server.requests == []


def test_offline_variable(server, options, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=rf"HF_HUB_OFFLINE is set.*bundled model \(.*{DEFAULT_MODEL}"):
        resolve(REPO, options)
    assert server.requests == []
    assert resolve(DEFAULT_MODEL).source == "bundled"


def test_environment_variables(server, tmp_path):
    """HF_ENDPOINT names a mirror, HF_HOME the cache, HF_HUB_OFFLINE stays with it."""
    script = (
        "import sys; from kglmatch.models.pretrained import resolve\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(resolve(name).commit)\n"
        "    except ValueError as error: print(error)\n"
    )

    def run(*names: str, **variables: str) -> list[str]:
        variables |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url + "/"}
        command = [sys.executable, "-c", script, *names]
        done = subprocess.run(
            command, env=environment(**variables), cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    assert run(REPO) == [head(server)]
    assert list((tmp_path / "home" / "hub").glob("models--owner--name/snapshots/*/model.safetensors"))
    asked = len(server.requests)
    found, refused = run(REPO, "owner/other", HF_HUB_OFFLINE="1")
    assert found == head(server) and "HF_HUB_OFFLINE is set" in refused
    assert len(server.requests) == asked


# --- a Hub that cannot be reached -------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://hub.invalid", "nonsense"])
def test_unreachable_hub_says_the_way_out(options, endpoint, monkeypatch):
    # The client would wait between its attempts; there must be none.
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    expected = rf"cannot reach the Hub at {endpoint} \(.+\), and {REPO} is not in .*HF_HUB_OFFLINE=1"
    with pytest.raises(WeightsError, match=expected) as caught:
        resolve(REPO, replace(options, endpoint=endpoint))
    assert DEFAULT_MODEL in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="force_download needs it"):
        resolve(REPO, replace(options, force_download=True, endpoint=endpoint))


@pytest.fixture
def silent_hub(monkeypatch) -> Iterator[tuple[str, list[socket.socket]]]:
    """An address that takes connections and never answers, and the connections so far."""
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.2)
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    taken.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", taken
    for connection in taken:
        connection.close()


def test_silent_hub_is_asked_once(options, silent_hub):
    endpoint, connections = silent_hub
    with pytest.raises(WeightsError, match="cannot reach the Hub"):
        resolve(REPO, replace(options, endpoint=endpoint))
    assert len(connections) == 1


def test_silent_hub_with_half_a_cache(options, silent_hub):
    """The configuration is there, the weights are not: each is asked for once."""
    hub.download(REPO, ["config.json"], options)
    endpoint, connections = silent_hub
    with pytest.raises(WeightsError, match="cannot reach the Hub"):
        resolve(REPO, replace(options, endpoint=endpoint))
    assert len(connections) == 2


def test_push_to_a_silent_hub(matcher, silent_hub):
    endpoint, connections = silent_hub
    with pytest.raises(OutputError, match="cannot be reached"):
        matcher.push_to_hub(REPO, token=TOKEN, endpoint=endpoint)
    assert len(connections) == 1


# --- refusals, each with its own words --------------------------------------------------------


def refusal(options: HubOptions, name: str = REPO, **changes: object) -> str:
    with pytest.raises(WeightsError) as caught:
        resolve(name, replace(options, **changes))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("token", [None, OUTSIDER])
def test_gated(server, options, token):
    server.repos[REPO].gated = True
    message = refusal(options, token=token)
    assert f"{REPO} is gated: accept its terms at {server.url}/{REPO}" in message
    assert resolve(REPO, replace(options, token=TOKEN)).source == "hub"


@pytest.mark.parametrize("token", [None, OUTSIDER])
@pytest.mark.parametrize("name", ["owner/private", "owner/missing"])
def test_missing_or_private(server, options, files, name, token):
    server.add("owner/private", files, private=True)
    message = refusal(options, name, token=token)
    assert f"{name} is neither a local folder nor a model that {server.url} shows" in message
    assert "private" in message
    assert DEFAULT_MODEL in message


def test_wrong_token(server, options):
    assert "refuses owner/name to this token (HTTP 401)" in refusal(options, token="hf_wrong")


def test_token_that_is_not_stored(server, options, matcher):
    assert "none is stored here" in refusal(options, token=True)
    with pytest.raises(OutputError, match="none is stored here"):
        matcher.push_to_hub(REPO, token=True, endpoint=server.url)
    assert server.requests == []


def test_wrong_revision(server, options):
    assert "owner/name has no revision 'v9'" in refusal(options, f"{REPO}@v9")
    resolve(REPO, options)
    assert "owner/name has no revision 'v9'" in refusal(options, REPO, revision="v9")


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_repository_of_something_else(server, options, files, missing):
    server.add("owner/other", {name: files[name] for name in files if name != missing})
    message = refusal(options, "owner/other")
    assert f"owner/other has no {missing}" in message
    assert not server.asked(part="pytorch_model.bin")


def test_name_that_the_hub_forbids(options):
    assert "owner/na--me is not a valid name on the Hub" in refusal(options, "owner/na--me")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (503, "answers HTTP 503 for owner/name: try again later"),
        (429, "answers HTTP 429 for owner/name: try again later"),
        (404, "answers HTTP 404 for owner/name: check endpoint"),
        (403, "refuses owner/name to this token"),
        (200, "does not answer as a Hub does"),
    ],
)
def test_other_answers(server, options, status, words):
    server.status = status
    assert words in refusal(options)
    assert len(server.requests) == 1


def test_cache_that_cannot_be_written(server, options, tmp_path):
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(options, cache_dir=tmp_path / "file")


# --- downloads that break off, and what they leave ----------------------------------------------


def test_cut_in_mid_file_is_resumed(server, options, files, monkeypatch):
    # Of what comes before the cut, the client keeps whole pieces of this size.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    server.cuts = [10_000]
    assert resolve(REPO, options).weights.read_bytes() == files[WEIGHTS]
    ranges = [request.headers.get("Range") for request in server.asked("GET", "/cdn/")]
    assert ranges == [None, "bytes=8192-"]


def test_cut_again_and_again(server, options, files, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.cuts = [1000] * 10
    message = refusal(options)
    assert "the download of model.safetensors from owner/name to" in message
    assert "try again" in message
    assert "the cached copy of commit" in refusal(options, local_files_only=True)
    server.cuts = []
    assert resolve(REPO, options).weights.read_bytes() == files[WEIGHTS]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill a process at once")
def test_process_killed_in_mid_file(server, options, files):
    server.stall_after = 6000
    script = "import sys; from kglmatch.models.hub import download; download(sys.argv[1], sys.argv[2:])"
    variables = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(options.cache_dir)}
    command = [sys.executable, "-c", script, REPO, "config.json", WEIGHTS]
    with subprocess.Popen(command, env=environment(**variables), stderr=subprocess.DEVNULL) as process:
        while not server.asked("GET", "/cdn/"):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert list(Path(options.cache_dir).glob("**/*.incomplete"))
    server.stall_after = None
    assert "incomplete: model.safetensors is not in the cache" in refusal(options, local_files_only=True)
    assert resolve(REPO, options).weights.read_bytes() == files[WEIGHTS]


@pytest.mark.parametrize("damage", ["truncated", "empty", "zeros at the end"])
def test_half_written_cache(server, options, files, damage):
    found = resolve(REPO, options)
    content = files[WEIGHTS]
    broken = {"truncated": content[:-500], "empty": b"", "zeros at the end": content[:-500] + bytes(500)}
    found.weights.resolve().write_bytes(broken[damage])
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged.*force_download=True"):
        load_model(REPO, options)
    assert resolve(REPO, replace(options, force_download=True)).weights.read_bytes() == content


def test_half_written_configuration(server, options, files):
    config = resolve(REPO, options).config
    config.resolve().write_bytes(files["config.json"][:30])
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON.*force_download=True"):
        load_config(REPO, options)
    assert load_config(REPO, replace(options, force_download=True)).ir_kind == "nir"


def test_dangling_link_in_the_cache(server, options, files):
    resolve(REPO, options).weights.resolve().unlink()
    assert "is incomplete: model.safetensors is not in the cache" in refusal(options, local_files_only=True)
    assert resolve(REPO, options).weights.read_bytes() == files[WEIGHTS]


def test_pickle_under_the_name_of_weights(server, options, files, tmp_path):
    server.add("owner/trap", {**files, WEIGHTS: files["pytorch_model.bin"]})
    with pytest.raises(WeightsError, match="not a valid safetensors file"):
        load_model("owner/trap", options)


# --- the command line -------------------------------------------------------------------------


def test_info_says_that_a_model_is_from_the_hub(server, tmp_path, real_files, monkeypatch, capsys):
    server.add(REPO, real_files)
    monkeypatch.setattr(hub, "hub_address", lambda endpoint: endpoint or server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["info", REPO, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["source"], found["commit"]) == ("hub", head(server))


# --- ONNX graphs ------------------------------------------------------------------------------


def test_onnx_graphs(server, options, files, tmp_path):
    pytest.importorskip("kglmatch.backends.onnx", reason="onnxruntime is not installed")
    graphs = {f"onnx/{name}": name.encode() for name in (*GRAPH_FILES, CHECKSUMS_FILE)}
    server.add("owner/graphs", {**files, **graphs})
    folder = resolve_onnx("owner/graphs", options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name.removeprefix("onnx/"): content for name, content in graphs.items()
    }
    assert not server.asked(part=WEIGHTS)
    server.requests.clear()
    commit = head(server, "owner/graphs")
    assert resolve_onnx("owner/graphs", replace(options, revision=commit)) == folder
    assert server.requests == []
    with pytest.raises(NoGraphsError, match=r"owner/name has no onnx/encoder_vis\.onnx"):
        resolve_onnx(REPO, options)
    assert resolve_onnx(folder) == resolve_onnx(folder.parent) == folder
    with pytest.raises(NoGraphsError, match="kglmatch export --onnx"):
        resolve_onnx(DEFAULT_MODEL)


def test_onnx_graphs_without_checksums_are_taken(server, options, files, tmp_path):
    """On the Hub as in a folder; also from the cache, where nobody can say that there are none."""
    graphs = {f"onnx/{name}": name.encode() for name in GRAPH_FILES}
    server.add("owner/graphs", {**files, **graphs})
    folder = resolve_onnx("owner/graphs", options)
    assert sorted(path.name for path in folder.iterdir()) == sorted(GRAPH_FILES)
    local = tmp_path / "local"
    shutil.copytree(folder, local)
    assert resolve_onnx(local) == local
    assert resolve_onnx("owner/graphs", replace(options, local_files_only=True)) == folder
    assert resolve_onnx("owner/graphs", replace(options, endpoint="http://127.0.0.1:9")) == folder


@pytest.mark.parametrize("missing", [name for name in GRAPH_FILES if name != "encoder_vis.onnx"])
def test_some_graphs_are_not_taken_for_none(server, options, files, missing):
    """A model that lacks one of its graphs is damaged; it is not exported anew without a word."""
    graphs = {f"onnx/{name}": b"" for name in GRAPH_FILES if name != missing}
    server.add("owner/graphs", {**files, **graphs})
    with pytest.raises(WeightsError, match=rf"has no onnx/{missing}") as caught:
        load_graphs("owner/graphs", options, providers=None, device="cpu", dtype=None, batch_size=None)
    assert not isinstance(caught.value, NoGraphsError)
    assert not server.asked(part=WEIGHTS)


# --- uploads ----------------------------------------------------------------------------------


def test_push_and_load(server, options, matcher):
    address = matcher.push_to_hub("owner/new", token=TOKEN, endpoint=server.url)
    assert address == f"{server.url}/owner/new/commit/{head(server, 'owner/new')}"
    pushed = server.repos["owner/new"].commits[head(server, "owner/new")]
    assert set(pushed) == {"config.json", WEIGHTS, "README.md"}
    assert [request.origin for request in server.asked("PUT")] == ["cdn"]
    card = HubCard(pushed["README.md"].decode())
    assert card.data.library_name == "kglmatch"
    loaded = Matcher.from_pretrained("owner/new", device="cpu", **asdict(options))
    patches = np.random.default_rng(1).random((2, 64, 64), dtype=np.float32)
    assert np.array_equal(
        loaded.describe(patches, "vis").descriptors, matcher.describe(patches, "vis").descriptors
    )


def test_push_to_a_branch_keeps_other_files(server, matcher, files):
    repo = server.repos[REPO]
    repo.commit({**files, "onnx/config.json": b"{}"}, branch="dev")
    main = head(server)
    matcher.push_to_hub(REPO, token=TOKEN, endpoint=server.url, revision="dev", card="# New\n", message="New")
    pushed = repo.commits[repo.refs["dev"]]
    assert (pushed["README.md"], pushed["onnx/config.json"]) == (b"# New\n", b"{}")
    assert head(server) == main
    with pytest.raises(OutputError, match="no branch 'nowhere'"):
        matcher.push_to_hub(REPO, token=TOKEN, endpoint=server.url, revision="nowhere")


def test_push_with_onnx_graphs(server, matcher, options, tmp_path):
    pytest.importorskip("kglmatch.backends.onnx", reason="onnxruntime is not installed")
    with pytest.raises(WeightsError, match="unknown model"):
        matcher.push_to_hub("owner/new", token=TOKEN, endpoint=server.url, onnx=tmp_path / "nowhere")
    graphs = {name: name.encode() for name in (*GRAPH_FILES, CHECKSUMS_FILE)}
    (tmp_path / "graphs").mkdir()
    for name, content in graphs.items():
        (tmp_path / "graphs" / name).write_bytes(content)
    matcher.push_to_hub("owner/new", token=TOKEN, endpoint=server.url, onnx=tmp_path / "graphs")
    found = resolve_onnx("owner/new", options)
    assert {path.name: path.read_bytes() for path in found.iterdir()} == graphs
    assert resolve("owner/new", options).weights.is_file()


def test_push_of_a_private_model(server, matcher):
    matcher.push_to_hub("owner/secret", token=TOKEN, endpoint=server.url, private=True)
    assert server.repos["owner/secret"].private


@pytest.mark.parametrize(("repo_id", "known"), [(REPO, True), ("owner/new", False)])
@pytest.mark.parametrize(("token", "status"), [(False, 401), (OUTSIDER, 403), ("hf_wrong", 401)])
def test_push_without_permission(server, matcher, repo_id, known, token, status):
    with pytest.raises(
        OutputError, match=rf"cannot push to {repo_id}.*HTTP {status}.*hf auth login"
    ) as caught:
        matcher.push_to_hub(repo_id, token=token, endpoint=server.url)
    assert "\n" not in str(caught.value)
    assert (repo_id in server.repos) == known


def test_push_that_cannot_be(server, matcher, monkeypatch):
    with pytest.raises(OutputError, match='"owner/name"'):
        matcher.push_to_hub("name", token=TOKEN, endpoint=server.url)
    with pytest.raises(OutputError, match="cannot be reached"):
        matcher.push_to_hub(REPO, token=TOKEN, endpoint="http://127.0.0.1:9")
    server.status = 503
    with pytest.raises(OutputError, match="answers HTTP 503"):
        matcher.push_to_hub(REPO, token=TOKEN, endpoint=server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE"):
        matcher.push_to_hub(REPO, token=TOKEN, endpoint=server.url)


# --- the server itself, by the client's own listings --------------------------------------------


def test_listings_of_the_server(server, files):
    from huggingface_hub import HfApi

    api = HfApi(endpoint=server.url, token=False)
    assert api.model_info(REPO, revision="main").sha == head(server)
    assert sorted(api.list_repo_files(REPO)) == sorted(files)
    sizes = {entry.path: entry.size for entry in api.list_repo_tree(REPO, recursive=True)}
    assert sizes == {name: len(content) for name, content in files.items()}
    assert isinstance(server.repos[REPO], Repo)
