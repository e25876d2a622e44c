"""Folders in stores (s3://, gs://, hf://, ... as `unidiff.addresses` knows them) as folders of this machine."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from unidiff.addresses import PAUSES, Unreachable, download, in_store, open_store
from unidiff.errors import first_line

EVERY = 300.0
"""Seconds between two times that what has changed is written to a store."""
_LOG = logging.getLogger(__name__)


@contextmanager
def local_folder(where: str | Path, every: float = EVERY) -> Iterator[Path]:
    """`where` as a folder of this machine. A folder in a store is one for temporary use: what is there comes first, and what
    has changed goes back every so often, and at the end, however it comes; the latest files last, so that a pointer never
    comes before what it points to.

    Raises:
        Unreachable: a store that cannot be read or written. ValueError: a store and several processes (torchrun).
    """
    if not in_store(where):
        yield Path(where)
        return
    url = str(where)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{url!r}: several processes cannot share a folder in a store; name one that all machines see")
    with tempfile.TemporaryDirectory(prefix="unidiff-") as place:
        mirror = _Mirror(url, Path(place))
        mirror.pull()
        over = threading.Event()
        thread = threading.Thread(target=mirror.keep, args=(every, over), daemon=True)
        thread.start()
        try:
            yield Path(place)
        finally:
            over.set()
            thread.join()
            mirror.push()


@cache
def pulled(url: str) -> Path:
    """A copy of a folder or file in a store, which stays until this process ends. Raises `Unreachable`: nothing is there."""
    place = Path(tempfile.mkdtemp(prefix="unidiff-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    mirror = _Mirror(url.rstrip("/"), place)
    if not mirror.pull():
        raise Unreachable(f"{url!r} holds nothing", gone=True)
    single = place / url.rstrip("/").rpartition("/")[2]
    return single if single.is_file() and mirror.is_file else place


def local_model(name: str) -> str:
    """A name as it is; of a folder or file in a store the name of its copy here."""
    return str(pulled(name)) if in_store(name) else name


def _bar(url: str, size: int) -> Any:
    """Bytes and time left, on a terminal, of a download that takes longer than two seconds."""
    from huggingface_hub.utils import tqdm

    return tqdm(desc=url, total=size, unit="B", unit_scale=True, delay=2, disable=None)


class _Mirror:
    """A folder in a store and its copy in `place`."""

    def __init__(self, url: str, place: Path) -> None:
        self.url, self.place = url.rstrip("/"), place
        self.system, self.path = open_store(self.url)
        self.known: dict[str, tuple[int, int]] = {}  # size and time of change, by name
        self.is_file = False

    def pull(self) -> int:
        """Fetch everything; how many files that are."""
        found = self._try(lambda: self.system.find(self.path, detail=True) if self.system.exists(self.path) else {})
        root, head = str(self.path).strip("/"), self.url[: self.url.index("://") + 3]
        with _bar(self.url, sum(entry.get("size") or 0 for entry in found.values())) as bar:
            for name in found:
                inner, before = name.strip("/").removeprefix(root).strip("/"), bar.n
                self.is_file = not inner
                target = self.place / (inner or root.rpartition("/")[2])
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "wb") as file:
                    told = lambda size, before=before: bar.update(before + size - bar.n)  # noqa: E731
                    download(head + name.lstrip("/"), file, told=told)
        self.known = self._now()
        return len(found)

    def push(self) -> None:
        """Write what has changed since, the latest last, and remove what is gone."""
        now = self._now()
        for name in sorted(now, key=lambda name: now[name][1]):
            if self.known.get(name) != now[name]:
                with suppress(FileNotFoundError):  # removed meanwhile: the next time sees it
                    self._try(partial(self.system.put_file, str(self.place / name), f"{self.path}/{name}"))
        for name in self.known.keys() - now.keys():
            with suppress(FileNotFoundError):
                self._try(partial(self.system.rm_file, f"{self.path}/{name}"))
        self.known = now

    def keep(self, every: float, over: threading.Event) -> None:
        """Push until it is over; a store that does not answer is tried again the next time."""
        while not over.wait(every):
            try:
                self.push()
            except Unreachable as error:
                _LOG.warning("%s", error)

    def _now(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self.place.rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self.place).parts):
                    found[path.relative_to(self.place).as_posix()] = (path.stat().st_size, path.stat().st_mtime_ns)
        return found

    def _try(self, ask: Callable[[], Any]) -> Any:
        """An answer of the store, after faults that may pass."""
        for pause in (*PAUSES, None):
            try:
                return ask()
            except FileNotFoundError:
                raise
            except Exception as error:  # each store has errors of its own
                if pause is None or isinstance(error, PermissionError):
                    raise Unreachable(f"{self.url!r} cannot be used ({first_line(error)})") from error
                time.sleep(pause)
