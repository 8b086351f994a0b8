"""The Hugging Face Hub: downloads that fail within seconds and say why, and uploads.

`huggingface_hub` does the work; its token, cache and environment variables (HF_HUB_OFFLINE, HF_ENDPOINT,
HF_HOME, HF_TOKEN, HF_HUB_ETAG_TIMEOUT ...) mean here what its documentation says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from kglmatch.errors import KGLMatchError, OutputError, WeightsError
from kglmatch.models.files import list_pretrained
from kglmatch.options import __version__

# How long the Hub may take to answer, unless HF_HUB_ETAG_TIMEOUT says otherwise.
TIMEOUT_SECONDS = 5
NO_TOKEN = "token=True was given, but none is stored here: run `hf auth login`"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class HubOptions(TypedDict, total=False):
    """How to reach the Hub; each is an argument of `huggingface_hub.hf_hub_download`.

    Attributes:
        revision: branch, tag or commit; None is the repository's main branch.
        token: access token; None takes the one that `hf auth login` stored, False sends none.
        cache_dir: where downloads are kept; None takes the client's place.
        local_files_only: use what is in the cache, ask nobody.
        force_download: download even what is in the cache.
        endpoint: address of the Hub or of a mirror; None takes HF_ENDPOINT or https://huggingface.co.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    endpoint: str | None


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit of a repository, in the cache.

    Attributes:
        folder: holds them, under the paths that they have in the repository.
        commit: the commit's hash.
    """

    folder: Path
    commit: str


def parse_hub_name(name: str) -> tuple[str, str | None] | None:
    """Splits `owner/name` or `owner/name@revision`; None if the name is of another form."""
    repo_id, at, revision = name.partition("@")
    if not _REPO_ID.fullmatch(repo_id) or (at and not revision):
        return None
    return repo_id, revision or None


def download(
    repo_id: str,
    filenames: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    endpoint: str | None = None,
) -> Snapshot:
    """Brings files of a model repository into the cache, all of one commit.

    What is in the cache already is not downloaded again, and with a commit's hash as the revision it
    costs no request at all. With a branch or tag the Hub is asked which commit that is; where it
    cannot be reached, the cache's last answer is taken.

    Args:
        repo_id: "owner/name".
        filenames: paths within the repository, at least one.
        revision, token, cache_dir, local_files_only, force_download, endpoint: see `HubOptions`.

    Raises:
        WeightsError: no such repository, revision or file, one that needs permission, or a Hub that
            cannot be reached while the cache lacks a file.
    """
    if cache_dir is not None:
        cache_dir = Path(cache_dir).expanduser()
    wanted = _Wanted(repo_id, revision, token, cache_dir, local_files_only, force_download, endpoint)
    if force_download and wanted.offline:
        raise WeightsError(f"{wanted}: force_download needs the Hub, but {wanted.why_offline}")
    snapshot: Snapshot | None = None
    for filename in filenames:
        path = wanted.fetch(filename, snapshot)
        if snapshot is None:
            # The client keeps <cache>/models--owner--name/snapshots/<commit>/<filename>.
            folder = path.parents[filename.count("/")]
            snapshot = Snapshot(folder, folder.name)
    if snapshot is None:
        raise KGLMatchError(f"download needs at least one file name, got {filenames!r}")
    return snapshot


@dataclass(frozen=True)
class _Wanted:
    """One model's download: what was asked for, one file at a time, and what its errors mean."""

    repo_id: str
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    endpoint: str | None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"

    @property
    def offline(self) -> bool:
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE

    @property
    def why_offline(self) -> str:
        return "local_files_only=True was given" if self.local_files_only else "HF_HUB_OFFLINE is set"

    @property
    def hub(self) -> str:
        return hub_address(self.endpoint)

    @property
    def cache(self) -> str:
        from huggingface_hub import constants

        return str(self.cache_dir or constants.HF_HUB_CACHE)

    def fetch(self, filename: str, snapshot: Snapshot | None) -> Path:
        """The path of one file in the cache; later files come from the commit of the first."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        revision = self.revision if snapshot is None else snapshot.commit
        try:
            cached = try_to_load_from_cache(
                self.repo_id, filename, cache_dir=self.cache_dir, revision=revision
            )
            if not self.offline and (self.force_download or not isinstance(cached, str)):
                self._ask(filename, revision)
            return Path(
                hf_hub_download(
                    self.repo_id,
                    filename,
                    revision=revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.offline,
                    force_download=self.force_download,
                    endpoint=self.hub,
                    etag_timeout=_timeout(),
                    library_name="kglmatch",
                    library_version=__version__,
                )
            )
        except _client_errors() as error:
            raise self._explain(error, filename, snapshot) from error

    def _ask(self, filename: str, revision: str | None) -> None:
        """One request without retries. The client's own first request is repeated for up to minutes."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

        url = hf_hub_url(self.repo_id, filename, revision=revision, endpoint=self.hub)
        try:
            metadata = get_hf_file_metadata(url, token=self.token, timeout=_timeout())
        except (HfHubHTTPError, LocalTokenNotFoundError):
            raise
        except _client_errors() as error:
            missing = "force_download needs it" if self.force_download else f"{self} is not in {self.cache}"
            raise WeightsError(
                f"cannot reach the Hub at {self.hub} ({one_line(error)}), and {missing}: check the "
                f"connection, or use a bundled model{_bundled()} or a downloaded one (HF_HUB_OFFLINE=1 or "
                "local_files_only=True asks nobody)"
            ) from error
        if metadata.commit_hash is None:
            raise WeightsError(
                f"{self.hub} does not answer as a Hub does (no X-Repo-Commit for {self}): check endpoint, "
                "HF_ENDPOINT and the proxy"
            )

    def _explain(self, error: Exception, filename: str, snapshot: Snapshot | None) -> WeightsError:
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            LocalTokenNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if isinstance(error, HFValidationError):
            return WeightsError(f"{self} is not a valid name on the Hub: {one_line(error)}")
        if isinstance(error, LocalTokenNotFoundError):
            return WeightsError(f"{self}: {NO_TOKEN}")
        if isinstance(error, GatedRepoError):
            return WeightsError(
                f"{self} is gated: accept its terms at {self.hub}/{self.repo_id}, then run `hf auth login` "
                "or give token="
            )
        if isinstance(error, RepositoryNotFoundError):
            return WeightsError(
                f"{self} is neither a local folder nor a model that {self.hub} shows: check the name; if it "
                f"is private, run `hf auth login` or give token=. Bundled models{_bundled()} need no Hub"
            )
        if isinstance(error, RevisionNotFoundError):
            return WeightsError(
                f"{self.repo_id} has no revision {self.revision!r}: {self.hub}/{self.repo_id}/commits/main "
                "lists what it has"
            )
        if isinstance(error, LocalEntryNotFoundError) and self.offline:
            part = "" if snapshot is None else f"the cached copy of commit {snapshot.commit} is incomplete: "
            return WeightsError(
                f"{self}: {part}{filename} is not in the cache at {self.cache}, and {self.why_offline}: "
                f"download it once without, or use a bundled model{_bundled()}"
            )
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return WeightsError(
                f"{self} has no {filename}: it is not a repository that kglmatch can use (weights in "
                "formats other than safetensors and ONNX are never read)"
            )
        status = http_status(error)
        if status in (401, 403):
            return WeightsError(
                f"{self.hub} refuses {self} to this token (HTTP {status}): run `hf auth login` or give "
                "another token="
            )
        if status is not None:
            advice = "try again later" if status == 429 or status >= 500 else "check endpoint and HF_ENDPOINT"
            return WeightsError(f"{self.hub} answers HTTP {status} for {self}: {advice}")
        if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        return WeightsError(
            f"the download of {filename} from {self} to {self.cache} failed: {one_line(error)}; "
            "nothing half-written was kept, try again"
        )


def upload(
    repo_id: str,
    folder: Path,
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> str:
    """Uploads a folder as one commit to a model repository, made if missing.

    Args:
        repo_id: "owner/name".
        folder: what to upload; files that the repository holds besides stay.
        message: of the commit.
        private: for a new repository; None takes the owner's default.
        revision: branch to commit to, one that exists; None is the main branch.
        token, endpoint: see `HubOptions`.

    Returns:
        the commit's address.

    Raises:
        OutputError: no valid name, no permission, or a Hub that cannot be reached.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = hub_address(endpoint)
    if not _REPO_ID.fullmatch(repo_id):
        raise OutputError(f'cannot push to {repo_id!r}: expected the name of a repository, "owner/name"')
    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"cannot push to {repo_id}: HF_HUB_OFFLINE is set")
    api = HfApi(endpoint=hub, token=token, library_name="kglmatch", library_version=__version__)
    try:
        # Asked first, since a token may write to a repository that it may not make.
        try:
            api.model_info(repo_id, timeout=_timeout())
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision
        )
    except RevisionNotFoundError as error:
        raise OutputError(
            f"cannot push to {repo_id}: it has no branch {revision!r}; make it first, or leave revision out"
        ) from error
    except LocalTokenNotFoundError as error:
        raise OutputError(f"cannot push to {repo_id}: {NO_TOKEN}") from error
    except _client_errors() as error:
        status = http_status(error)
        if status in (401, 403):
            reason = (
                f"{hub} refuses (HTTP {status}); run `hf auth login` or give a token= that may write there"
            )
        elif status is not None:
            reason = f"{hub} answers HTTP {status} ({one_line(error)})"
        else:
            reason = f"{hub} cannot be reached or broke off ({one_line(error)})"
        raise OutputError(f"cannot push to {repo_id}: {reason}") from error
    return str(commit.commit_url)


def hub_address(endpoint: str | None) -> str:
    """The Hub's address without a final slash: the one given, or the client's."""
    from huggingface_hub import constants

    return (endpoint or constants.ENDPOINT).rstrip("/")


def http_status(error: Exception) -> int | None:
    """The HTTP status that an error of the client stands for, if any."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def one_line(error: Exception) -> str:
    """The first line of an error's words, or its name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".:") if lines else type(error).__name__


def _timeout() -> float:
    from huggingface_hub import constants

    if constants.HF_HUB_ETAG_TIMEOUT != constants.DEFAULT_ETAG_TIMEOUT:
        return constants.HF_HUB_ETAG_TIMEOUT
    return TIMEOUT_SECONDS


def _client_errors() -> tuple[type[Exception], ...]:
    """What `huggingface_hub` raises when things go wrong outside of it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The client's transport changed over time (requests, httpx ...); this is its errors' base class.
    transport: type[Exception] = HfHubHTTPError.__bases__[0]
    # Downloads by Xet report their failures as RuntimeError.
    return (transport, OSError, HFValidationError, RuntimeError)


def _bundled() -> str:
    names = list_pretrained()
    return f" ({', '.join(names)})" if names else ""
