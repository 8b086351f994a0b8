"""The Hugging Face Hub: downloads that fail within seconds and say why, and uploads.

`huggingface_hub` does the work; its token, cache and environment variables (HF_HUB_OFFLINE, HF_ENDPOINT,
HF_HOME, HF_TOKEN, HF_HUB_ETAG_TIMEOUT ...) mean here what its documentation says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kglmatch.errors import KGLMatchError, OutputError, WeightsError
from kglmatch.models.files import list_pretrained
from kglmatch.options import __version__

# How long the Hub may take to answer, unless HF_HUB_ETAG_TIMEOUT says otherwise.
TIMEOUT_SECONDS = 5
NO_TOKEN = "token=True was given, but none is stored here: run `hf auth login`"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


# What the client raises, by the name of the class -> what it means; of an error's classes the nearest counts.
# The fields are those of `_Wanted._explain`.
_MEANINGS = {
    "HFValidationError": "{model} is not a valid name on the Hub: {error}",
    "LocalTokenNotFoundError": "{model}: " + NO_TOKEN,
    "GatedRepoError": (
        "{model} is gated: accept its terms at {hub}/{repo}, then run `hf auth login` or give token="
    ),
    "RepositoryNotFoundError": (
        "{model} is neither a local folder nor a model that {hub} shows: check the name; if it is private, "
        "run `hf auth login` or give token=. Bundled models{bundled} need no Hub"
    ),
    "RevisionNotFoundError": (
        "{repo} has no revision {revision!r}: {hub}/{repo}/commits/main lists what it has"
    ),
    "LocalEntryNotFoundError": (
        "{model}: {part}{file} is not in the cache at {cache}, and {why_offline}: download it once without, "
        "or use a bundled model{bundled}"
    ),
    "EntryNotFoundError": (
        "{model} has no {file}: it is not a repository that kglmatch can use (weights in formats other than "
        "safetensors and ONNX are never read)"
    ),
}
_REFUSED = "{hub} refuses {model} to this token (HTTP {status}): run `hf auth login` or give another token="
_LATER = "{hub} answers HTTP {status} for {model}: try again later"
_OTHER_STATUS = "{hub} answers HTTP {status} for {model}: check endpoint and HF_ENDPOINT"
_BROKE_OFF = (
    "the download of {file} from {model} to {cache} failed: {error}; nothing half-written was kept, try again"
)


@dataclass(frozen=True)
class HubOptions:
    """How to reach the Hub; each is an argument of `huggingface_hub.hf_hub_download`.

    Attributes:
        revision: branch, tag or commit; None is the repository's main branch.
        token: access token; None takes the one that `hf auth login` stored, False sends none.
        cache_dir: where downloads are kept; None takes the client's place.
        local_files_only: use what is in the cache, ask nobody.
        force_download: download even what is in the cache.
        endpoint: address of the Hub or of a mirror; None takes HF_ENDPOINT or https://huggingface.co.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    endpoint: str | None = None


DEFAULT_HUB = HubOptions()


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
    repo_id: str, filenames: Sequence[str], hub: HubOptions = DEFAULT_HUB, *, optional: Sequence[str] = ()
) -> Snapshot:
    """Brings files of a model repository into the cache, all of one commit.

    What is in the cache already is not downloaded again, and with a commit's hash as the revision it
    costs no request at all. With a branch or tag the Hub is asked which commit that is; where it
    cannot be reached, the cache's last answer is taken.

    Args:
        repo_id: "owner/name".
        filenames: paths within the repository, at least one.
        optional: paths that need not be there, or that the cache may lack where the Hub cannot be asked.

    Raises:
        WeightsError: no such repository, revision or file, one that needs permission, or a Hub that
            cannot be reached while the cache lacks a file.
    """
    wanted = _Wanted(repo_id, hub)
    if hub.force_download and wanted.offline:
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
    for filename in optional:
        with suppress(_AbsentError):
            wanted.fetch(filename, snapshot)
    return snapshot


class _AbsentError(WeightsError):
    """A file that the repository does not have, or that the cache lacks while the Hub cannot be asked."""


@dataclass(frozen=True)
class _Wanted:
    """One model's download: what was asked for, one file at a time, and what its errors mean."""

    repo_id: str
    options: HubOptions

    def __str__(self) -> str:
        revision = self.options.revision
        return self.repo_id if revision is None else f"{self.repo_id}@{revision}"

    @property
    def offline(self) -> bool:
        from huggingface_hub import constants

        return self.options.local_files_only or constants.HF_HUB_OFFLINE

    @property
    def why_offline(self) -> str:
        local = self.options.local_files_only
        return "local_files_only=True was given" if local else "HF_HUB_OFFLINE is set"

    @property
    def hub(self) -> str:
        return hub_address(self.options.endpoint)

    @property
    def cache_dir(self) -> Path | None:
        given = self.options.cache_dir
        return None if given is None else Path(given).expanduser()

    @property
    def cache(self) -> str:
        from huggingface_hub import constants

        return str(self.cache_dir or constants.HF_HUB_CACHE)

    def fetch(self, filename: str, snapshot: Snapshot | None) -> Path:
        """The path of one file in the cache; later files come from the commit of the first."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        options = self.options
        revision = options.revision if snapshot is None else snapshot.commit
        try:
            cached = try_to_load_from_cache(
                self.repo_id, filename, cache_dir=self.cache_dir, revision=revision
            )
            if not self.offline and (options.force_download or not isinstance(cached, str)):
                self._ask(filename, revision)
            return Path(
                hf_hub_download(
                    self.repo_id,
                    filename,
                    revision=revision,
                    token=options.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.offline,
                    force_download=options.force_download,
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
            metadata = get_hf_file_metadata(url, token=self.options.token, timeout=_timeout())
        except (HfHubHTTPError, LocalTokenNotFoundError):
            raise
        except _client_errors() as error:
            forced = self.options.force_download
            missing = "force_download needs it" if forced else f"{self} is not in {self.cache}"
            raise _AbsentError(
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
        """What an error of the client means here, by `_MEANINGS` or else its HTTP status."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        template = next((_MEANINGS[c.__name__] for c in type(error).__mro__ if c.__name__ in _MEANINGS), None)
        absent = isinstance(error, EntryNotFoundError)
        status = http_status(error)
        if isinstance(error, LocalEntryNotFoundError) and not self.offline:
            # It stands for a download that broke off; its cause says why.
            template, absent = None, False
            if isinstance(error.__cause__, Exception):
                error = error.__cause__
        if template is None:
            if status is None:
                template = _BROKE_OFF
            elif status in (401, 403):
                template = _REFUSED
            else:
                template = _LATER if status == 429 or status >= 500 else _OTHER_STATUS
        text = template.format(
            model=self,
            repo=self.repo_id,
            revision=self.options.revision,
            file=filename,
            hub=self.hub,
            cache=self.cache,
            why_offline=self.why_offline,
            part="" if snapshot is None else f"the cached copy of commit {snapshot.commit} is incomplete: ",
            bundled=_bundled(),
            status=status,
            error=one_line(error),
        )
        return _AbsentError(text) if absent else WeightsError(text)


def upload(
    repo_id: str, folder: Path, hub: HubOptions = DEFAULT_HUB, *, message: str, private: bool | None = None
) -> str:
    """Uploads a folder as one commit to a model repository, made if missing.

    Args:
        repo_id: "owner/name".
        folder: what to upload; other files of the repository stay.
        hub: its token, endpoint, and revision: the branch to commit to, one that exists.
        message: of the commit.
        private: for a new repository; None takes the owner's default.

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

    address = hub_address(hub.endpoint)
    if not _REPO_ID.fullmatch(repo_id):
        raise OutputError(f'cannot push to {repo_id!r}: expected the name of a repository, "owner/name"')
    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"cannot push to {repo_id}: HF_HUB_OFFLINE is set")
    api = HfApi(endpoint=address, token=hub.token, library_name="kglmatch", library_version=__version__)
    try:
        # Asked first, since a token may write to a repository that it may not make.
        try:
            api.model_info(repo_id, timeout=_timeout())
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, revision=hub.revision
        )
    except RevisionNotFoundError as error:
        raise OutputError(
            f"cannot push to {repo_id}: it has no branch {hub.revision!r}; make it first, or give no revision"
        ) from error
    except LocalTokenNotFoundError as error:
        raise OutputError(f"cannot push to {repo_id}: {NO_TOKEN}") from error
    except _client_errors() as error:
        raise OutputError(f"cannot push to {repo_id}: {_why_not_pushed(error, address)}") from error
    return str(commit.commit_url)


def _why_not_pushed(error: Exception, address: str) -> str:
    status = http_status(error)
    if status in (401, 403):
        return f"{address} refuses (HTTP {status}); run `hf auth login` or give a token= that may write there"
    if status is not None:
        return f"{address} answers HTTP {status} ({one_line(error)})"
    return f"{address} cannot be reached or broke off ({one_line(error)})"


def hub_address(endpoint: str | None) -> str:
    """The Hub's address without a final slash: the one given, or the client's."""
    from huggingface_hub import constants

    return (endpoint or constants.ENDPOINT).rstrip("/")


def http_status(error: Exception) -> int | None:
    """The HTTP status that an error of the client stands for, if any."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def one_line(error: Exception) -> str:
    """The first line of an error's text, or its name if it has none."""
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
