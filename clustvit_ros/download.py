# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""How a file of weights comes here.

A download that broke off goes on where it stopped (HTTP ranges, RFC 9110), also days later; servers that do not know
ranges begin again. Standard library alone: of the well-kept libraries, pooch does not resume, and huggingface_hub reads
its own servers.
"""

from __future__ import annotations

import contextlib
import fcntl
import html
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any

from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.paths import hash_file

_TIMEOUT_S = 30.0
_BLOCK_BYTES = 1 << 18
# An attempt that brings less than this counts as failed; after so many in a row the download is given up.
_LEAST_PROGRESS_BYTES, _MOST_FAILURES = 1 << 20, 4
_SPARE_BYTES = 1 << 28
_BY_HAND = "open the address in a browser, save the file, and pass it with --file"


def check_address(address: str, where: str) -> None:
    """Refuse what is no address on the web.

    Raises:
        ConfigError: another scheme, or no host.
    """
    if not re.fullmatch(r"[!-~]*", address):
        raise ConfigError(f"{where}: address is {address!r}, expected ASCII without spaces; write those as %20")
    try:
        parts = urllib.parse.urlsplit(address)
        known = parts.scheme in ("http", "https") and bool(parts.hostname and parts.hostname.encode("idna"))
        known = known and (parts.port or 80) > 0
    except ValueError:  # brackets without an address, labels without a letter, a port that is no number
        known = False
    if not known:
        raise ConfigError(f"{where}: address is {address!r}, expected http://... or https://...; a file: --file PATH")


def download(
    address: str, target: Path, most_bytes: int, sha256: str = "", progress: Callable[..., Any] | None = None,
    pause_s: float = 1.0,
) -> None:  # fmt: skip
    """Bring a file of weights here, or what is missing of it.

    Args:
        address: http or https; redirections are followed, but never from https to http.
        target: file to make; its folder is made. What has come lies in `<target>.partial` until it is whole.
        most_bytes: a larger file is refused.
        sha256: of the whole file; empty is not known. PyTorch's own checksums are held against it in any case.
        progress: `tqdm`, or what is called and used alike; None shows nothing.
        pause_s: before the first further attempt; it doubles.

    Raises:
        ConfigError: no address on the web.
        ModelError: not reachable, refused, too large, no weights, damaged, or it broke off again and again.
    """
    check_address(address, "download")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with _locked(target.parent):
        transfer = _Transfer(address, partial, most_bytes, progress)
        failures = 0
        while True:
            before, problem = transfer.most_had, None
            try:
                transfer.attempt()
            except (OSError, http.client.HTTPException) as error:
                problem = error
            if transfer.whole:
                break
            came = transfer.most_had - before
            failures = 0 if came >= (_LEAST_PROGRESS_BYTES if problem or transfer.broke_off else 1) else failures + 1
            if failures == _MOST_FAILURES or (not transfer.reached and isinstance(problem, urllib.error.URLError)):
                raise ModelError(_gave_up(transfer, problem)) from problem
            if failures:
                time.sleep(pause_s * 2 ** (failures - 1))
        try:
            check_weights_file(partial, sha256)
        except ModelError as error:
            partial.unlink()
            raise ModelError(f"{address}: {error}; it was deleted: try again, or tell its authors") from error
        partial.replace(target)


def check_weights_file(path: Path, sha256: str = "") -> None:
    """Refuse a file that is damaged, as far as its own or a published checksum tells.

    Raises:
        ModelError: what is wrong with it.
    """
    if sha256 and (found := hash_file(path)) != sha256:
        raise ModelError(f"SHA-256 is {found}, expected {sha256}")
    size = path.stat().st_size
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if not zipped:  # neither safetensors nor PyTorch's oldest format has checksums; their readers see a missing end
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = next((entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED), None)
            if packed:  # a few bytes could become gigabytes
                raise ModelError(f"{packed.filename} in it is compressed, which PyTorch never does")
            archive.filelist = [entry for entry in archive.infolist() if entry.CRC]  # PyTorch can be told to leave it 0
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"the file of {size} bytes is cut off or damaged ({error})") from error
    if broken:
        raise ModelError(f"the file of {size} bytes is damaged: {broken} in it fails its checksum")


class _Transfer:
    """One file's way here, over several connections.

    Attributes:
        whole: whether all of it is here.
        reached: whether a server has answered.
        most_had: bytes of it that were here at best.
        total: its size in bytes, as the server says; None before it does.
        part_end: where what the server sends at once ends in it, as it says.
        broke_off: whether the latest answer ended before that.
    """

    def __init__(self, address: str, partial: Path, most_bytes: int, progress: Callable[..., Any] | None) -> None:
        self.address = address
        self.partial = partial
        self.validator_file = partial.with_name(f"{partial.name}.version")
        self.most_bytes = most_bytes
        self.progress = progress
        self.whole = self.reached = False
        self.most_had = self._have()
        self.total: int | None = None
        self.part_end: int | None = None
        self.broke_off = True

    def _have(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def attempt(self) -> None:
        """Ask for what is missing, and write what comes.

        Raises:
            ModelError: further attempts cannot help.
            OSError, http.client.HTTPException: they can.
        """
        have = self._have()
        headers = {"User-Agent": "clustvit-ros", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            with contextlib.suppress(OSError):
                headers |= {"If-Range": version} if (version := self.validator_file.read_text(encoding="utf-8")) else {}
        try:
            response = _OPENER.open(urllib.request.Request(self.address, headers=headers), timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            self.reached = True
            with error:
                self._refused(error, have)
            return
        self.reached = True
        with response:
            if response.status not in (200, 206):  # 202: a challenge for browsers
                raise ModelError(f"{self.address}: the server says {response.status} {response.reason}; {_BY_HAND}")
            start = _first_byte(response.headers) if response.status == 206 else 0
            if start is None or start not in (0, have):
                raise ModelError(f"{self.address}: the server sends another part than asked for; try again later")
            self._check(response.headers, start)
            self._write(response, start)

    def _refused(self, error: urllib.error.HTTPError, have: int) -> None:
        found = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if error.code == 416 and have:
            if found and int(found[1]) == have:
                self.whole = True
            else:  # not the end of that file
                self.partial.unlink()
            return
        if error.code in (408, 425, 429) or error.code >= 500:
            raise ConnectionError(f"the server says {error.code} {error.reason}")
        raise ModelError(
            f"{self.address}: the server says {error.code} {error.reason}; look where it was published whether it has "
            "moved, and pass the file with --file"
        )

    def _check(self, headers: Message, start: int) -> None:
        """Hold what the server says of the file against what can be taken."""
        length = headers.get("Content-Length", "")
        self.part_end = self.total = start + int(length) if re.fullmatch(r"\d{1,99}", length) else None
        # A part may end before the file does: servers limit how much they send at once.
        if of_all := re.fullmatch(r"bytes \d+-\d+/(\d{1,99})", headers.get("Content-Range", "")):
            self.total = int(of_all[1])
        if self.total is not None and self.total > self.most_bytes:
            raise ModelError(
                f"{self.address}: has {self.total / 1e9:.2f} GB, expected at most {self.most_bytes / 1e9:.2f}; "
                "--max-gigabytes raises that"
            )
        free = shutil.disk_usage(self.partial.parent).free
        if free < (self.total or 0) - start + _SPARE_BYTES:
            raise ModelError(
                f"{self.partial.parent}: has {free / 1e9:.2f} GB free, expected at least "
                f"{((self.total or 0) - start + _SPARE_BYTES) / 1e9:.2f}; make room, or let XDG_CACHE_HOME name "
                "another place"
            )
        if headers.get("Content-Encoding", "identity") != "identity":
            raise ModelError(f"{self.address}: the server packs the file, asked not to; pass it with --file")

    def _write(self, response: http.client.HTTPResponse, start: int) -> None:
        page = "html" in response.headers.get("Content-Type", "")
        if not start:
            self.validator_file.write_text(_validator(response.headers), encoding="utf-8")
        had = start
        with self.partial.open("r+b" if start else "wb") as file, self._bar(start) as bar:
            file.seek(start)
            while block := response.read(_BLOCK_BYTES):
                if had == 0 and (page or not _is_weights(block)):
                    self.partial.unlink()
                    raise ModelError(_no_weights(self.address, block))
                file.write(block)
                had += len(block)
                self.most_had = max(self.most_had, had)
                bar.update(len(block))
                if had > self.most_bytes:
                    self.partial.unlink()
                    raise ModelError(
                        f"{self.address}: has more than {self.most_bytes / 1e9:.2f} GB; --max-gigabytes raises that"
                    )
            file.truncate()
        self.broke_off = had != self.part_end
        self.whole = had > 0 and had == (self.total if self.total is not None else had)

    def _bar(self, start: int) -> Any:
        if self.progress is None:
            return _NoBar()
        return self.progress(
            total=self.total, initial=start, unit="B", unit_scale=True, unit_divisor=1000, mininterval=0.5,
            desc=self.partial.name.removesuffix(".partial"),
        )  # fmt: skip


class _NoBar(contextlib.nullcontext):
    def __enter__(self) -> _NoBar:
        return self

    def update(self, _: int) -> None:
        pass


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows to the web alone, and never from an encrypted address to an open one."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        try:
            check_address(newurl, "redirection")
            followed = req.type == "http" or newurl.lower().startswith("https:")
        except ConfigError:
            followed = False
        if not followed:
            raise ModelError(f"{req.full_url}: leads to {newurl}, which is not followed; pass the file with --file")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_SafeRedirects)


def _first_byte(headers: Message) -> int | None:
    """Where the part of a file begins that a server sends."""
    found = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _is_weights(block: bytes) -> bool:
    """Whether a file begins as one of PyTorch (zip, or the older pickle) or safetensors."""
    return block.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")) or block[8:9] == b"{"


def _no_weights(address: str, block: bytes) -> str:
    title = re.search(rb"<title[^>]*>([^<]{1,200})", block, re.I)
    if title or b"<html" in block[:1000].lower() or b"<!doctype" in block[:1000].lower():
        text = html.unescape(" ".join((title[1] if title else b"").decode(errors="replace").split()))
        called = f" called {text[:80]!r}" if text.isprintable() and text else ""
        got = f"a web page{called}"
    else:
        got = f"a file that begins with {block[:16]!r}"
    return f"{address}: the server sends {got}, expected a file of weights; {_BY_HAND}"


def _gave_up(transfer: _Transfer, problem: Exception | None) -> str:
    cause = problem.reason if isinstance(problem, urllib.error.URLError) else problem
    reason = getattr(cause, "strerror", None) or " ".join(str(cause or "").split())[:200]
    reason = reason or "the server closed the connection"
    if isinstance(cause, TimeoutError):
        reason = "no answer in time"
    if not transfer.reached:
        return (
            f"{transfer.address}: cannot be reached ({reason}); check the network, or fetch it elsewhere and pass the "
            "file with --file"
        )
    had = f"{transfer.most_had} of {transfer.total}" if transfer.total else str(transfer.most_had)
    return f"{transfer.address}: broke off after {had} bytes ({reason}); the same command goes on from there"


def _validator(headers: Message) -> str:
    """What tells a file's versions apart, for a server that is asked for the rest of one; empty where it says none."""
    for name, form in (("ETag", r'"[\x21\x23-\x7e]*"'), ("Last-Modified", r"[\w ,:+-]+")):
        if re.fullmatch(form, value := headers.get(name, "")):
            return value
    return ""


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time writes into a folder.

    Raises:
        ModelError: another one does.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ModelError(f"{folder}: another process is downloading it; wait for that one") from error
    finally:
        os.close(descriptor)


def progress_bar() -> Callable[..., Any] | None:
    """`tqdm`, which comes with training and prediction; a download goes without."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
