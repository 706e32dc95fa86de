"""The push: one commit that carries everything, or nothing."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from httpx2 import TransportError  # what huggingface_hub's client lets through when a connection fails
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from dip_hf.hub.settings import PushSettings
from dip_hf.hub.stage import RECORD_NAME, Staging, is_of_a_run, stage


WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt at what the client itself tries only once."""

_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_MOVED = frozenset({409, 412})
_FIRST_FILES = frozenset({".gitattributes"})
"""What the Hub puts into a new repository."""

# A page that is no JSON comes from something before the Hub, such as a proxy
_FAILURES = (HfHubHTTPError, TransportError, OfflineModeIsEnabled, json.JSONDecodeError, RuntimeError)

_T = TypeVar("_T")


class HubError(RuntimeError):
    """The Hub could not be reached, or refused; the message says whether anything was published, and what to do."""


class _GaveUpError(HubError):
    """Every attempt failed."""


def push(
    settings: PushSettings,
    token: str | None = None,
    *,
    endpoint: str | None = None,
    own_commits: Collection[str] = (),
    tags: list[str] | None = None,
    waits: Sequence[float] = WAITS,
    show: Callable[[str], None] | None = None,
) -> CommitInfo | None:
    """Push a finished run in one commit.

    The commit names the head that was looked at as its parent, so that it fails where someone pushes in between. A
    repository's head that did not come from this folder (see `RECORD_NAME`) is overwritten with `settings.force` only.
    Files of an earlier run that this push lacks, and what transformers' own pushes of its folder left besides, are
    deleted in the same commit.

    Args:
        settings: what and where to.
        token: access token; default: `HF_TOKEN` or the one of `hf auth login`.
        endpoint: of the Hub; default: `HF_ENDPOINT`, or the public one.
        own_commits: further commits that may be built upon.
        tags: for the card, besides this project's own.
        waits: seconds before each further attempt.
        show: takes the list of files, line by line.

    Returns:
        The commit; None for a dry run, which sends nothing.

    Raises:
        ValueError: the run cannot be pushed, or the repository has commits that did not come from it, or is public
            where `settings.private` is set.
        HubError: the Hub could not be reached, or refused.
    """
    with tempfile.TemporaryDirectory() as work:
        pusher = _Push(settings, HfApi(endpoint=endpoint, token=token), waits)
        settings = pusher.owned_settings()
        staging = stage(settings, Path(work), tags)
        if show is not None:
            for line in describe(staging):
                show(line)
        if settings.dry_run:
            return None
        return pusher.run(staging, own_commits)


def describe(staging: Staging) -> list[str]:
    """One line per file, with its size in bytes, one on whose results they are, and one per thing that is left out."""
    sizes = staging.sizes()
    lines = [f"{size:>14,}  {name}" for name, size in sizes.items()]
    lines.append(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files")
    if staging.origin is not None:
        lines.append(f"{'results':>14}  {staging.origin}")
    return lines + [f"{'left out':>14}  {name}: {reason}" for name, reason in sorted(staging.left_out.items())]


class _Push:
    """One push to one branch of one repository."""

    def __init__(self, settings: PushSettings, api: HfApi, waits: Sequence[float]) -> None:
        self.settings, self.api, self.waits = settings, api, waits
        self.repo_id = settings.repo_id
        self.record = Path(settings.folder) / RECORD_NAME

    def owned_settings(self) -> PushSettings:
        """The settings with the user's name where the repository's has no owner, but for a dry run."""
        if "/" not in self.repo_id and not self.settings.dry_run:
            self.repo_id = f"{self._attempt('asking for your name', self.api.whoami)['name']}/{self.repo_id}"
        return replace(self.settings, repo_id=self.repo_id)

    def run(self, staging: Staging, own_commits: Collection[str]) -> CommitInfo:
        create = partial(self.api.create_repo, self.repo_id, private=self.settings.private or None, exist_ok=True)
        self._attempt("making the repository", create)
        head, present, is_private = self._attempt("reading the repository", self._head)
        if self.settings.private and not is_private:
            raise ValueError(
                f"private=True, but {self.repo_id} exists and is public; make it private in its settings on the Hub, "
                "or leave private out"
            )
        pushed = self._pushed()
        foreign = present - _FIRST_FILES and head not in {*own_commits, pushed.get(self._key())}
        if foreign and not self.settings.force:
            raise ValueError(
                f"repo_id={self.repo_id!r}: its newest commit {head} did not come from {self.settings.folder}; look "
                "at what it changed, then push with force to put this run on top of it"
            )
        commit = self._commit(staging, head, present)
        try:
            self.record.write_text(json.dumps({**pushed, self._key(): commit.oid}, indent=2) + "\n", encoding="utf-8")
        except OSError as error:  # the push itself is done
            warnings.warn(
                f"pushed, but {self.record} cannot be written ({error}): the next push of this folder will need force",
                stacklevel=2,
            )
        return commit

    def _key(self) -> str:
        return f"{self.api.endpoint}/{self.repo_id}@{self.settings.revision or 'main'}"

    def _pushed(self) -> dict[str, str]:
        """Branches to the commits that earlier pushes of the folder made; empty where the file is no such record."""
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _head(self) -> tuple[str, set[str], bool]:
        """The branch's newest commit, the paths of its files, and whether the repository is private."""
        info = self.api.model_info(self.repo_id, revision=self.settings.revision)
        assert info.sha is not None  # the Hub leaves it out of lists only
        return info.sha, {sibling.rfilename for sibling in info.siblings or []}, bool(info.private)

    def _commit(self, staging: Staging, head: str, present: set[str]) -> CommitInfo:
        additions = {name: staging.files[name] for name in sorted(staging.files)}
        stale = sorted(name for name in present - additions.keys() if is_of_a_run(name))
        message = self.settings.commit_message or f"Push a run with dip_hf {version('dip_hf')}"

        def landed() -> CommitInfo | None:
            """The commit of an attempt whose answer was lost."""
            now, files, _ = self._head()
            if now == head:
                return None
            if files & set(stale) or not self._holds(now, additions):
                raise self._moved(now)
            url = f"{self.api.endpoint}/{self.repo_id}/commit/{now}"
            return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=now)

        attempts = 0

        def send() -> CommitInfo:
            nonlocal attempts
            attempts += 1
            done = landed() if attempts > 1 else None
            if done is not None:
                return done
            # New ones each time: the client keeps its state in them
            operations = [CommitOperationAdd(name, path) for name, path in additions.items()]
            deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
            return self.api.create_commit(
                self.repo_id,
                [*operations, *deletions],
                commit_message=message,
                revision=self.settings.revision,
                parent_commit=head,
            )

        try:
            return self._attempt("sending the files", send)
        except _GaveUpError as error:
            done = self._attempt("reading the repository", landed)  # the last answer may have been lost, too
            if done is None:
                raise HubError(f"{error} Nothing was published.") from error
            return done

    def _moved(self, commit: str | None = None) -> HubError:
        return HubError(
            f"{self.repo_id}: someone else pushed{f' {commit}' if commit else ''} in the meantime, so nothing of this "
            "run was; look at it and push again"
        )

    def _holds(self, revision: str, files: dict[str, Path]) -> bool:
        """Whether the repository holds exactly these contents at that commit."""
        found = {
            entry.path: entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            for entry in self.api.get_paths_info(self.repo_id, list(files), revision=revision)
            if isinstance(entry, RepoFile)
        }
        return all(found.get(name) in _object_ids(path) for name, path in files.items())

    def _attempt(self, step: str, act: Callable[[], _T]) -> _T:
        """Do `act`, and again after a failure that may pass."""
        for wait in self.waits:
            try:
                return act()
            except _FAILURES as error:
                self._check(step, _cause(error))
            time.sleep(wait)
        try:
            return act()
        except _FAILURES as error:
            cause = _cause(error)
            self._check(step, cause)
            raise _GaveUpError(
                f"{self.repo_id}: {step} failed {len(self.waits) + 1} times, last with: {_line(cause)}; push again "
                "later."
            ) from cause

    def _check(self, step: str, error: Exception) -> None:
        """Raise what another attempt would not change."""
        if isinstance(error, OfflineModeIsEnabled):
            raise HubError(f"{self.repo_id}: {step} failed: HF_HUB_OFFLINE is set; unset it to push.") from error
        if isinstance(error, HfHubHTTPError) and error.response.status_code in _MOVED:
            raise self._moved() from error
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in _TRANSIENT:
            raise HubError(f"{self.repo_id}: {step} failed: {_advice(error)} Nothing was published.") from error


def _cause(error: Exception) -> Exception:
    """The client wraps what ends a file's upload in a RuntimeError; another RuntimeError is raised again."""
    if not isinstance(error, RuntimeError):
        return error
    if isinstance(error.__cause__, _FAILURES):
        return error.__cause__
    raise error


def _advice(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "the Hub does not know the access token (401); log in with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "the access token may not write there (403); use one with write access to this repository."
    if isinstance(error, RevisionNotFoundError):
        return "it has no such branch (404); make it on the Hub, or leave revision out."
    if status in (401, 404):
        return (
            f"the Hub finds no such repository ({status}), or the access token may not see it; check repo_id, and log "
            "in with `hf auth login`, or set HF_TOKEN."
        )
    return f"the Hub refused: {_line(error)}."


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _object_ids(path: Path) -> set[str]:
    """What the Hub calls a file's content: its SHA-256 in large file storage, its Git blob id elsewhere."""
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return {sha256.hexdigest(), blob.hexdigest()}
