"""The copy of a run in an object store, `training.upload_to`: what a machine that is new continues from.

    URL/step_N/         checkpoints, uploaded beside the training (training/uploads.py)
    URL/final/, ...     all else in the run's folder, once the run is done
    URL/finished.json   the names of these; written last

With `training.resume_from=latest`, a machine without the run's folder fetches what is there before it begins. It also
fetches the stages that this one starts from, if they were uploaded beside it, as URL/../STAGE.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from wrinklefree.config.groups import options
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json, write_json
from wrinklefree.distributed.nodes import this_node
from wrinklefree.runs import folder, prerequisites
from wrinklefree.training import checkpoint, storage
from wrinklefree.training.uploads import ALONGSIDE, Uploads

log = logging.getLogger("wrinklefree")

FINISHED = "finished.json"

FETCHED = ".fetched"  # a folder in a run's folder, for what is being downloaded

FINAL_WAIT = 900.0  # seconds that a finished run tries to upload its results

POLL = 5.0  # seconds between two looks of a machine that waits for what another one uploads


def resumes_latest(config: Config) -> bool:
    """Whether the run is to go on from the newest checkpoint, wherever that is."""
    return "latest" in (config.training.resume_from or "").split(",")


def stage_url(url: str, stage: str) -> str:
    """Where a stage of a command with several stages goes."""
    return f"{url.rstrip('/')}/{stage}"


def bring_back(config: Config) -> None:
    """Fetch the run from its store if this machine has none of it, and the stages that it starts from.

    Does nothing unless `training.upload_to` is set and the run is to go on from `latest`.
    Raises UserError if the store cannot be read.
    """
    url, out = config.training.upload_to, Path(config.output_dir)
    if url is None or not resumes_latest(config):
        return
    for stage in _earlier(config):
        earlier = prerequisites.stage_folder(config, stage)
        if not earlier.exists() and stage != config.training.stage:
            _fetch_finished(stage_url(url.rstrip("/").rpartition("/")[0], stage), earlier)
    if not folder.outputs(out) and not _fetch_finished(url, out):
        _fetch_checkpoint(url, out)


def _earlier(config: Config) -> list[str]:
    """The names of the stages that this one may read."""
    if config.thinking is not None:
        return list(prerequisites.VERBS)
    names = [*config.training.start_from, config.distillation.teacher]
    return [name for name in names if name is not None and name in options("training")]


def _fetch_finished(url: str, out: Path) -> bool:
    """Fetch a finished run. Returns whether there is one."""
    if FINISHED not in storage.names(url):
        return False
    names = read_json(storage.fetch(f"{url}/{FINISHED}", out / FETCHED))
    _fetch(url, [name for name in names if isinstance(name, str) and "/" not in name], out)
    log.info("%s: finished before, and fetched from its store", out)
    return True


def _fetch_checkpoint(url: str, out: Path) -> None:
    """Fetch the newest checkpoint that is whole, with the log beside it."""
    names = storage.names(url)
    for name in sorted(filter(checkpoint.is_step, names), key=checkpoint.number_of, reverse=True):
        try:
            fetched = storage.fetch(f"{url}/{name}", out / FETCHED)
        except UserError as error:
            log.warning("%s; an earlier one is tried", error)
            continue
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        fetched.rename(out / "checkpoints" / name)
        _fetch(url, [file for file in ALONGSIDE if file in names], out)
        log.info("%s: %s fetched from its store", out, name)
        return


def _fetch(url: str, names: Sequence[str], out: Path) -> None:
    """Fetch files and folders into `out`, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        fetched = storage.fetch(f"{url}/{name}", out / FETCHED)
        if not (out / name).exists():
            fetched.rename(out / name)


def begun(config: Config) -> bool:
    """Whether there is anything on this machine to go on from."""
    return folder.can_go_on(Path(config.output_dir))


def send(config: Config) -> None:
    """Upload what a finished run has left, checkpoints too, if `training.upload_to` is set, and wait for it.

    Of several machines, the first one does; the others wait, and fetch it.
    Raises UserError if the store does not take it within FINAL_WAIT; the same command tries again.
    """
    url, out = config.training.upload_to, Path(config.output_dir)
    if url is None or not storage.is_remote(url):
        return
    if this_node().number:
        _await(url, out)
        return
    names = sorted(path.name for path in out.iterdir() if _travels(path))
    write_json(out / FINISHED, names)
    _wait_for(Uploads(out, url, names), out)
    _wait_for(Uploads(out / "checkpoints", url, keep=config.training.save_total_limit), out)
    _wait_for(Uploads(out, url, [FINISHED]), out)


def _wait_for(uploads: Uploads, out: Path) -> None:
    left = uploads.close(FINAL_WAIT)
    if left:
        raise UserError(f"{out}: done, but not uploaded ({', '.join(left)}): the same command tries again")


def send_missing(config: Config) -> None:
    """Upload a run that was finished before, unless it is in its store already."""
    url = config.training.upload_to
    if url is not None and FINISHED not in storage.names(url):
        send(config)


def _travels(path: Path) -> bool:
    kept_here = ("checkpoints", "wandb", folder.BLOCKS, FINISHED, "uploads.json")
    return not path.name.startswith(".") and path.name not in kept_here


def _await(url: str, out: Path) -> None:
    """Wait until the first machine has uploaded the finished run, and fetch it."""
    until = time.monotonic() + FINAL_WAIT
    while FINISHED not in storage.names(url):
        if time.monotonic() > until:
            raise UserError(f"{out}: the first machine has not uploaded it")
        time.sleep(POLL)
    _fetch_finished(url, out)
