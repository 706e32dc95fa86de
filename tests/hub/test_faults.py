"""What goes wrong on the way: tried again, or a clear error; never half a run there, nor a changed folder here."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub.repo import TOKEN, Fault
from tests.hub.server import Hub


Call = Callable[..., dict[str, Any]]
FAST = [0.01, 0.01]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def settings(folder: Path, repo_id: str, **changes: Any) -> dict[str, Any]:
    return {"folder": str(folder), "repo_id": repo_id, **changes}


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT /lfs/.*", "drop"),
        Fault("PUT /lfs/.*", 500),
        Fault("POST .*/preupload/main", 429, headers={"Retry-After": "0"}),
        Fault("POST .*/commit/main", 500),
        Fault("POST .*/commit/main", 429),
        Fault("POST .*/commit/main", "drop"),
        Fault("POST .*/commit/main", "lose"),
        Fault("POST /api/repos/create", 503),
        Fault("POST /api/validate-yaml", 502),
        Fault("GET /api/models/.*", "drop"),
    ],
    ids=lambda fault: f"{fault.request} {fault.action}",
)
def test_what_passes_is_tried_again(
    call: Call, hub: Hub, run_folder: Path, request: pytest.FixtureRequest, fault: Fault
) -> None:
    repo_id = f"you/passes-{hashlib.sha1(request.node.name.encode()).hexdigest()[:8]}"
    hub.store.clear()  # so that everything is sent anew
    hub.faults.append(fault)
    before = hashes(run_folder)
    answer = call("push", settings(run_folder, repo_id), waits=FAST)
    assert fault.times == 0, "the fault did not happen"
    repo = hub.repos[repo_id]
    assert answer == {"value": repo.head}
    assert len(repo.commits) == 2  # that of the new repository, and one push
    assert repo.files["adapter_model.safetensors"] == (run_folder / "adapter_model.safetensors").read_bytes()
    assert "lora/adapter_model.safetensors" in repo.files and "training_args.bin" not in repo.files
    after = hashes(run_folder)
    assert after.pop(".dip_hf_push.json") and after == before


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("POST /api/repos/create", 401, 9), "log in with `hf auth login`"),
        (Fault("POST /api/repos/create", 403, 9), "may not write there"),
        (Fault("POST .*/preupload/main", 404, 9, {"X-Error-Code": "RepoNotFound"}), "finds no such repository"),
        (Fault("POST .*/preupload/main", 401, 9), "log in with `hf auth login`"),
        (Fault("PUT /lfs/.*", 403, 9), "may not write there"),
        (Fault("POST .*/commit/main", 500, 99), "failed 3 times, .*push again later. Nothing was published"),
        (Fault("POST .*/commit/main", "drop", 99), "failed 3 times, .*push again later. Nothing was published"),
        (Fault("POST .*/commit/main", 400, 9), "the Hub refused"),
        (Fault("POST .*/commit/main", 412, 9), "someone else pushed"),
    ],
    ids=lambda value: f"{value.request} {value.action}" if isinstance(value, Fault) else "",
)
def test_what_stays_is_a_clear_error(call: Call, hub: Hub, run_folder: Path, fault: Fault, message: str) -> None:
    # The client takes a repository that it may not make, but finds, for one that was there
    exists = "create" not in fault.request
    repo = hub.add_repo("you/stays")
    if not exists:
        del hub.repos["you/stays"]
    hub.store.clear()
    hub.faults.append(fault)
    before = hashes(run_folder)
    answer = call("push", settings(run_folder, "you/stays"), waits=FAST)
    assert answer.get("error") == "HubError"
    assert re.search(message, answer["message"]), answer["message"]
    assert TOKEN not in answer["message"]
    assert len(repo.commits) == 1 and set(repo.files) == {".gitattributes"}
    assert ("you/stays" in hub.repos) == exists
    assert hashes(run_folder) == before


def test_commits_of_others_are_not_overwritten(call: Call, hub: Hub, run_folder: Path) -> None:
    assert "value" in call("push", settings(run_folder, "you/shared"))
    repo = hub.repos["you/shared"]
    assert "value" in call("push", settings(run_folder, "you/shared", datasets=["other"]))
    assert len(repo.commits) == 3
    theirs = repo.add_commit("theirs", {**repo.files, "README.md": b"theirs", "model.bin": b"old"})
    refused = call("push", settings(run_folder, "you/shared"))
    assert refused["error"] == "ValueError"
    assert theirs in refused["message"] and "force" in refused["message"]
    assert repo.head == theirs
    assert call("push", settings(run_folder, "you/shared", force=True)) == {"value": repo.head}
    assert repo.head != theirs and repo.files["README.md"] != b"theirs"


def test_a_whole_model_over_an_adapter_leaves_nothing_of_it(
    call: Call, hub: Hub, run_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(base_folder, tmp_path / "whole"))
    assert "value" in call("push", settings(run_folder, "you/replaced"))
    repo = hub.repos["you/replaced"]
    assert {"adapter_config.json", "lora/adapter_config.json", "environment.json"} <= repo.files.keys()
    repo.add_commit("theirs", {**repo.files, "notes.txt": b"theirs"})
    assert "value" in call("push", settings(whole, "you/replaced", force=True))
    mine = {path.name for path in base_folder.iterdir()}
    assert repo.files.keys() == mine | {".gitattributes", "README.md", "notes.txt"}


def test_a_push_of_others_in_between_stops_ours(call: Call, hub: Hub, run_folder: Path) -> None:
    """The answer to our commit is lost, and what stands there is not ours: no claim, and no second commit."""
    repo = hub.add_repo("you/raced")
    hub.store.clear()
    theirs = {**repo.files, "README.md": b"theirs"}
    hub.faults.append(Fault("POST .*/commit/main", 500, also=lambda: repo.add_commit("theirs", theirs)))
    answer = call("push", settings(run_folder, "you/raced"), waits=FAST)
    assert answer["error"] == "HubError" and "someone else pushed" in answer["message"]
    assert [message for _, message, _ in repo.commits] == ["initial commit", "theirs"]


def test_the_last_answer_may_be_lost_too(call: Call, hub: Hub, run_folder: Path) -> None:
    hub.add_repo("you/last")
    hub.faults.append(Fault("POST .*/commit/main", "lose"))
    answer = call("push", settings(run_folder, "you/last"), waits=[])
    assert answer == {"value": hub.repos["you/last"].head}
    assert len(hub.repos["you/last"].commits) == 2


def test_an_unchanged_run_makes_no_second_commit(call: Call, hub: Hub, run_folder: Path) -> None:
    first = call("push", settings(run_folder, "you/twice"))
    assert call("push", settings(run_folder, "you/twice")) == first
    assert len(hub.repos["you/twice"].commits) == 2


def test_a_dry_run_sends_nothing(call: Call, hub: Hub, run_folder: Path) -> None:
    sent = len(hub.requests)
    before = hashes(run_folder)
    assert call("push", settings(run_folder, "you/dry", dry_run=True)) == {"value": None}
    assert call("command", ["push", str(run_folder), "you/dry", "--dry_run"]) == {"value": 0}
    assert len(hub.requests) == sent and "you/dry" not in hub.repos
    assert hashes(run_folder) == before


def test_a_private_push_to_a_public_repository_sends_nothing(call: Call, hub: Hub, run_folder: Path) -> None:
    repo = hub.add_repo("you/public")
    refused = call("push", settings(run_folder, "you/public", private=True, force=True))
    assert refused["error"] == "ValueError"
    assert "private=True, but you/public exists and is public; make it private" in refused["message"]
    assert len(repo.commits) == 1 and not repo.private
    repo.private = True
    assert call("push", settings(run_folder, "you/public", private=True)) == {"value": repo.head}
    assert len(repo.commits) == 2


def test_the_command_makes_a_private_repository(call: Call, hub: Hub, run_folder: Path) -> None:
    assert call("command", ["push", str(run_folder), "you/hidden", "--private"]) == {"value": 0}
    assert hub.repos["you/hidden"].private
    hub.faults.append(Fault("POST .*/preupload/main", 401))
    assert call("command", ["push", str(run_folder), "you/hidden"]) == {"value": 1}
    assert call("command", ["push", str(run_folder), "no/such/name"]) == {"value": 2}


def test_a_push_that_cannot_be_recorded_has_been_made(call: Call, hub: Hub, run_folder: Path) -> None:
    (run_folder / ".dip_hf_push.json").mkdir()  # as a folder that may not be written to
    answer = call("push", settings(run_folder, "you/unrecorded"), waits=FAST)
    assert answer == {"value": hub.repos["you/unrecorded"].head}
    again = call("push", settings(run_folder, "you/unrecorded"), waits=FAST)
    assert "push with force" in str(again)
