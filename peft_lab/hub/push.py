"""Push to the Hub.

The command, the function and a training run give the same repository.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_token, validate_repo_id

from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.hub.public_copy import stage
from peft_lab.runs import run_folder
from peft_lab.utils.atomic_files import write_errors


def push(
    adapter: str | Path,
    repo_id: str,
    private: bool = True,
    *,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
) -> CommitInfo:
    """Upload an adapter to the Hub in one commit.

    Its card, evaluation results, processor, labels and metrics go with it. Nothing else of the folder is uploaded: no
    checkpoint, no optimizer state, no pickle, no path of this machine. The card is written anew from metrics.json; that
    of a comparison's run, whose folder holds a standing.json, states the mean of its arm over seeds too.

    Args:
        adapter: folder of a run, or any folder of a peft adapter.
        repo_id: `user/name`; the repository is made if there is none.
        private: False for a repository that everybody can see.
        revision: branch to commit to, made if there is none; the main branch by default.
        token: token with write permission; the one of `hf auth login` by default.
        commit_message: title of the commit.
        base_model: Hub id of the base model, if the adapter was trained on a folder of this machine.

    Returns:
        The commit as huggingface_hub describes it: `commit_url`, `oid`, ...

    Raises:
        ConfigError: no such adapter, a base that others cannot load, or the Hub refuses; nothing was uploaded.
    """
    check_repo_id(repo_id)
    folder = local_adapter(adapter)
    # the copy is checked for paths and secrets before the Hub is asked for anything
    with write_errors(tempfile.gettempdir()), tempfile.TemporaryDirectory() as scratch:
        # the token of the login counts too: no file that holds it may be uploaded
        secrets = [token or get_token() or ""]
        stage(folder, repo_id, Path(scratch), base_model, secrets)
        create_repository(repo_id, private, token)
        message = commit_message or "Upload adapter with peft-lab"
        with hub_errors(repo_id):
            api = HfApi(token=token, library_name="peft-lab")
            if revision not in (None, "main"):
                api.create_branch(repo_id, branch=str(revision), exist_ok=True)
            done = api.upload_folder(repo_id=repo_id, folder_path=scratch, commit_message=message, revision=revision)
    return done


def create_repository(repo_id: str, private: bool = True, token: str | None = None) -> str:
    """Create a repository if there is none; return its full Hub id.

    Raises:
        ConfigError: the Hub refuses, or an existing repository has the other visibility.
    """
    with hub_errors(repo_id):
        api = HfApi(token=token, library_name="peft-lab")
        # the Hub puts the user's name before a bare one, so its answer is taken
        full = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        found = api.model_info(full).private
    # an existing repository keeps its visibility, which must not surprise its owner
    if found is not None and found != private:
        there, mend = ("private", "leave out --public") if found else ("public", "pass --public")
        raise ConfigError(f'Repository "{full}" is there already and is {there}; {mend}, or name another one.')
    return full


def local_adapter(adapter: str | Path) -> Path:
    """Folder of an adapter on this machine.

    Raises:
        ConfigError: there is none, or it holds no safetensors weights.
    """
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        near = did_you_mean(folder.name, [p.name for p in folder.parent.glob("*/")]) if folder.parent.is_dir() else ""
        raise ConfigError(f'There is no adapter folder "{adapter}".{near}')
    return run_folder.find_adapter(folder)


def check_repo_id(repo_id: str) -> None:
    """Raise `ConfigError` if `repo_id` is not `user/name`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f'Repository "{repo_id}" cannot be: {" ".join(str(error).split())}') from error
    # huggingface_hub also accepts a bare name, whose owner would depend on the token
    if repo_id.count("/") != 1:
        raise ConfigError(f'Repository "{repo_id}" must be written USER/NAME.')


#: Refusals of the Hub by status, in words that name the mend.
_REASONS = {
    401: "it knows no valid token (401); log in with `hf auth login`, or pass --token",
    403: "the token may not write there (403); take one with write permission, or another user or organisation",
    404: "there is no such user, organisation or repository that the token may see (404)",
}


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub into a `ConfigError` of one sentence."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError(f'"{repo_id}" cannot be pushed while HF_HUB_OFFLINE is set; unset it.') from error
    # before HTTPError, because it is one too and knows the status
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = " ".join((error.server_message or str(error)).split())[:200]
        reason = _REASONS.get(status, f"{said} ({status})")
        raise ConfigError(f'The Hub refuses "{repo_id}": {reason}.') from error
    except HTTPError as error:
        raise ConfigError(f'The Hub cannot be reached for "{repo_id}": {" ".join(str(error).split())}.') from error
