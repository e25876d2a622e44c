"""Finding model folders: on disk, embedded in the package, or on the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from unidiff.addresses import in_store
from unidiff.errors import first_line
from unidiff.mirror import pulled
from unidiff.world import WORLDS

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
SAFE_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
ALL_FILES = (*SAFE_FILES, *("*.yaml", "*.yml", "*.bin", "*.pt", "*.pth", "*.ckpt"))
"""Released weights come as torch files too."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def embedded_models() -> dict[str, Path]:
    """Folders of the models that ship with the worlds, by name."""
    return {name: world.model for name, world in WORLDS.items() if world.model is not None}


class Sought(NamedTuple):
    """What `locate` looks for, and how its messages call that."""

    noun: str = "model"
    expected: str = "a folder, a hub model 'owner/name', or an embedded model: 'emoji', 'faces'"
    patterns: Sequence[str] = SAFE_FILES
    """Files to download from the hub."""
    caller: str = "from_pretrained"
    embedded: bool = True
    """Whether the name may be one of `embedded_models`."""


MODEL, RELEASED = Sought(), Sought(patterns=ALL_FILES)


def locate(name: str | Path, sought: Sought = MODEL, **hub_options: Any) -> Path:
    """The folder behind a folder name, the name of an embedded model (`emoji`, `faces`) or a hub name (`owner/model`).

    A name that looks like a path is never looked up on the network.

    Raises:
        FileNotFoundError: nothing there. ValueError: no name at all. TypeError: an option that the hub does not know.
    """
    noun, article = sought.noun, "an" if sought.noun[0] in "aeiou" else "a"
    if not isinstance(name, str | PathLike):
        raise ValueError(f"the {noun} is {name!r}; expected {sought.expected}")
    if unknown := sorted(set(hub_options) - set(HUB_OPTIONS)):
        raise TypeError(f"{sought.caller} got unknown arguments {unknown}; expected some of {list(HUB_OPTIONS)}")
    if not str(name):
        raise FileNotFoundError(f"{noun} folder '' does not exist; name {sought.expected}")
    if in_store(name):
        return pulled(str(name))
    folder = Path(name)
    embedded = embedded_models().get(str(name)) if sought.embedded else None
    if embedded is not None:  # first: the default must not depend on where one is
        if not embedded.is_dir():
            raise FileNotFoundError(f"the embedded model {str(name)!r} is not part of this installation ({embedded})")
        return embedded
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{str(name)!r} is a file, not {article} {noun} folder; name the folder that holds it")
    if isinstance(name, Path) or not _HUB_NAME.fullmatch(str(name)) or folder.parent.is_dir():
        raise FileNotFoundError(f"{noun} folder {str(name)!r} does not exist; name {sought.expected}")
    return download(str(name), sought.patterns, noun, **hub_options)


def download(name: str, wanted: Sequence[str], what: str, **hub_options: Any) -> Path:
    """The folder that files of the hub of these patterns are downloaded to; `what` they are, for instance "model".

    Raises:
        FileNotFoundError: nothing of that name, or no network.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), **hub_options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a reachable hub {what}: {first_line(error)}"
        ) from error
