"""What a rented machine is told: a task file for SkyPilot, or the same two scripts for Hugging Face Jobs.

    setup   install this package, as it is here, with the versions that it was tested with
    run     the command of the user, on every machine; `wf` starts torchrun, which finds the others by WF_HEAD

Secrets are named, never written: the engine takes their values from this environment. The bucket is one of them.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wrinklefree.core.errors import UserError

BUCKET = "WF_BUCKET"  # where checkpoints go: the environment variable here and there

ALWAYS = ("HF_TOKEN", "WANDB_API_KEY", "WANDB_ENTITY")

PACKAGE = "wrinklefree"  # the folder beside the home folder there with the wheel in it

EXTRAS = "cloud,wandb"

RESTARTS = 1  # after an error of the training, besides those after a preemption


@dataclass(frozen=True)
class Store:
    """What opens a kind of store: secrets by their names, and a file of credentials (here, there)."""

    secrets: tuple[str, ...] = ()
    file: str | None = None
    given_by: str | None = None  # the variable that may name another file here


STORES = {
    "gs": Store(
        file="~/.config/gcloud/application_default_credentials.json", given_by="GOOGLE_APPLICATION_CREDENTIALS"
    ),
    "s3": Store(
        secrets=(
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "AWS_DEFAULT_REGION",
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT_URL_S3",
        ),
        file="~/.aws/credentials",
    ),
    "hf": Store(),
}


@dataclass(frozen=True)
class Task:
    """A job for a cloud: its machines, its command and where its checkpoints go."""

    name: str
    infra: str  # a cloud, or cloud/region
    gpu: str
    gpus: int
    nodes: int
    spot: bool
    disk_gb: int
    words: list[str]  # behind `wf`
    bucket: str
    package: str  # the path of a wheel here, or a requirement such as wrinklefree==0.1.0
    constraints: str | None  # the path of a file here

    @property
    def files(self) -> dict[str, str]:
        """Files that the machines need, by their paths there: the wheel, the constraints, and a store's credentials."""
        files = {}
        if self.package.endswith(".whl"):
            files[f"~/{PACKAGE}/{Path(self.package).name}"] = self.package
        if self.constraints is not None:
            files[f"~/{PACKAGE}/constraints.txt"] = self.constraints
        store = store_of(self.bucket)
        if store.file is not None:
            here = os.environ.get(store.given_by or "") or store.file
            if Path(here).expanduser().is_file():
                files[store.file] = here
        return files

    @property
    def secrets(self) -> list[str]:
        """The names of the environment variables that are handed on, of those that are set here."""
        return [BUCKET, *set_here((*ALWAYS, *store_of(self.bucket).secrets))]


def set_here(names: Sequence[str]) -> list[str]:
    """Those of the environment variables `names` that have a value here."""
    return [name for name in names if os.environ.get(name)]


def store_of(bucket: str) -> Store:
    """What opens the store of `bucket`. Raises UserError for a scheme that no rented machine can open."""
    scheme, _, rest = bucket.partition("://")
    if scheme not in STORES or not rest:
        schemes = ", ".join(f"{name}://" for name in STORES)
        raise UserError(f"--bucket {bucket}: a rented machine writes to {schemes}: give one of these")
    return STORES[scheme]


def setup_script(task: Task, at: str = f"$HOME/{PACKAGE}") -> str:
    """Install the package, from the folder `at` on the machine."""
    wheel = task.package.endswith(".whl")
    name, _, version = task.package.partition("==")
    requirement = f"{at}/{Path(task.package).name}[{EXTRAS}]" if wheel else f"{name}[{EXTRAS}]=={version}"
    constraint = "" if task.constraints is None else f' --constraint "{at}/constraints.txt"'
    return f'set -e\npython3 -m venv ~/wf-env\n~/wf-env/bin/pip install --quiet{constraint} "{requirement}"\n'


def run_script(task: Task) -> str:
    """Run the command. SkyPilot says which machine this is, and where the first one is."""
    machines = (
        'export WF_NODES="$SKYPILOT_NUM_NODES" WF_NODE="$SKYPILOT_NODE_RANK"\n'
        'export WF_HEAD="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"\n'
    )
    return f"set -e\n{machines if task.nodes > 1 else ''}{command_line(task)}\n"


def command_line(task: Task) -> str:
    """The command of the user as a line of shell, in which the bucket is a variable."""
    words = [_quoted(word.replace(task.bucket, f"${BUCKET}"), task.bucket in word) for word in task.words]
    return "exec ~/wf-env/bin/wf " + " ".join(words)


def _quoted(word: str, has_bucket: bool) -> str:
    if not has_bucket:
        return shlex.quote(word)
    before, variable, after = word.partition(f"${BUCKET}")
    return f'{shlex.quote(before) if before else ""}"{variable}"{shlex.quote(after) if after else ""}'


def task_yaml(task: Task) -> str:
    """The task file for SkyPilot."""
    values: dict[str, Any] = {
        "name": task.name,
        "num_nodes": task.nodes,
        "resources": {
            "infra": task.infra,
            "accelerators": f"{task.gpu}:{task.gpus}",
            "use_spot": task.spot,
            "disk_size": task.disk_gb,
            "job_recovery": {"max_restarts_on_errors": RESTARTS},
        },
        "file_mounts": task.files,
        "secrets": dict.fromkeys(task.secrets),
        "setup": setup_script(task),
        "run": run_script(task),
    }
    return yaml.dump({k: v for k, v in values.items() if v}, Dumper=_Readable, sort_keys=False, width=1000)


class _Readable(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _block)


def split_bucket(url: str) -> str:
    """The bucket of an address: `gs://bucket` of `gs://bucket/fairy2/tiny`."""
    scheme, _, rest = url.partition("://")
    parts = rest.split("/")
    return f"{scheme}://{'/'.join(parts[: 3 if scheme == 'hf' else 1])}"  # hf://buckets/ME/NAME


def quoted(words: Sequence[str]) -> str:
    """A command line for a person to read."""
    return shlex.join(["wf", *words])
