"""`wf push`: upload an exported folder with its card to a hub of models."""

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, errors

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import first_line
from wrinklefree.data.hub import hub_reachable
from wrinklefree.tracking.terminal import short_size

REPO = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = ("*.safetensors", "*.gguf", "*.pt", "*.mlpackage", "*.aimodel")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def run(repo: str, path: Path, private: bool = False, dry_run: bool = False, message: str | None = None) -> None:
    """Upload the exported folder `path`, or the packed folder of the run `path`, as the model `repo`.

    Raises UserError if there is nothing to upload, the name is no ORG/NAME, or the hub refuses.
    """
    if not REPO.fullmatch(repo):
        raise UserError(f"{repo}: not ORG/NAME")
    folder = exported(path)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    print(f"{len(files)} files, {short_size(size)}, from {folder}")
    if dry_run:
        print("\n".join(f"  {file.relative_to(folder)}" for file in files))
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE=1 is set: nothing can be uploaded")
    if not hub_reachable(constants.ENDPOINT):
        raise UserError(f"{repo}: {constants.ENDPOINT} does not answer")
    print(f"wrote {upload(repo, folder, private, message or f'{folder.name} by wrinklefree')}")


def exported(path: Path) -> Path:
    """The folder to upload: `path`, or what its run packed. Raises UserError if it is no exported folder."""
    folder = path / "packed" if (path / "packed").is_dir() else path
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise UserError(f"{folder}: has no weights; `wf export RUN` writes a folder to upload")
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder}: has no card (README.md); push what `wf export` wrote")
    return folder


def upload(repo: str, folder: Path, private: bool, message: str) -> str:
    """Make the repository if there is none, and upload the folder as one commit. Returns its address."""
    hub = HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url)
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"{repo}: no token for {constants.ENDPOINT}: {LOGIN}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{repo}: {error}") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        hint = f": {LOGIN}" if code in (401, 403) else ""
        raise UserError(f"{repo}: {constants.ENDPOINT} answered {code}{hint}") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # that of the client's own HTTP library
        raise UserError(f"{repo}: {constants.ENDPOINT}: {first_line(error)}; run it again") from error
