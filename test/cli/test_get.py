# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""`clustvit-ros get` against servers that break off, lie, redirect and serve what is no checkpoint."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from clustvit_ros import download as downloading
from clustvit_ros import released
from clustvit_ros.classes import ClassSet
from clustvit_ros.cli.main import main
from clustvit_ros.download import download
from clustvit_ros.errors import ConfigError, ModelError
from clustvit_ros.networks import ViTConfig, build_network, load_config, load_segmenter
from clustvit_ros.networks.official import to_official
from clustvit_ros.paths import find_model
from clustvit_ros.released import load_released

NAME = "suim_vit_b"


class Server:
    """A file at an address, and how it is served.

    Attributes:
        breaks: after how many bytes each answer but the last breaks off.
        length: what the server says its length is; None is the truth.
        ranges: whether it knows them.
        etag: of the file; empty is none.
        answer: status, headers and body instead of the file.
        asked: `Range` of each request.
    """

    def __init__(self, content):
        self.content, self.breaks, self.length, self.ranges, self.etag = content, [], None, True, '"1"'
        self.answer, self.asked = None, []

    def handle(self, request):
        self.asked.append(request.headers.get("Range"))
        if self.answer and request.path != "/file":
            status, headers, body = self.answer
            request.send_response(status)
            for name, value in headers.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(body)
            return
        start, content = 0, self.content
        wanted = self.asked[-1]
        changed = request.headers.get("If-Range") not in (None, self.etag)
        if wanted and self.ranges and not changed:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(content)}")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            request.send_response(200)
        length = len(content) if self.length is None else self.length
        request.send_header("Content-Length", str(max(length - start, 0)))
        if self.etag:
            request.send_header("ETag", self.etag)
        request.end_headers()
        end = start + self.breaks.pop(0) if self.breaks else len(content)
        request.wfile.write(content[start:end])


def checkpoint(classes=9, size=(64, 1, 1), **changes):
    torch.manual_seed(0)
    dimensions = dict(zip(("embed_dim", "depth", "num_heads"), size, strict=True))
    config = ViTConfig(backbone="vit", image_size=(32, 32), head_depth=1, **dimensions)
    weights = to_official(build_network(config, classes).state_dict())
    file = io.BytesIO()
    torch.save({"meta": {}, "state_dict": weights, **changes}, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def content():
    return checkpoint()


@pytest.fixture
def server(content, tmp_path, monkeypatch):
    """A server that has the checkpoint, in a list that names it."""
    served = Server(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            served.handle(self)

        def log_message(self, *_):
            pass

    class Host(ThreadingHTTPServer):
        def handle_error(self, *_):
            """Clients that hang up are what some tests are about."""

    host = Host(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.address = f"http://127.0.0.1:{host.server_port}/weights"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(downloading.time, "sleep", lambda _: None)
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: downloading.shutil._ntuple_diskusage(1, 1, 1 << 40))
    shipped = (released.share_dir() / "config" / "released.yaml").read_text()
    first = shipped.replace("https://data.dtu.dk/ndownloader/files/64205610", served.address)
    served.list = tmp_path / "list.yaml"
    served.list.write_text(first.replace("network: {num_heads: 12}", "network: {num_heads: 1}"))
    yield served
    host.shutdown()
    thread.join()
    host.server_close()


def get(server, *options, name=NAME):
    return main(["get", name, "--list", str(server.list), *map(str, options)])


def error(capsys):
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("clustvit-ros: error: ")]
    assert len(lines) == 1 and "Traceback" not in text
    return lines[0]


def left(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_one_command_makes_a_model_that_every_command_takes_by_name(server, tmp_path, capsys):
    assert get(server) == 0
    told = capsys.readouterr()
    assert f"use it: --model {NAME}" in told.out and "assumed" not in told.err
    config = load_config(NAME)
    assert find_model(NAME) == tmp_path / "data" / "clustvit_ros" / "models" / NAME
    assert "SUIM's terms" in config.licence and config.training["checkpoint"] == server.address
    assert config.classes.names[:3] == ("background", "water", "sky")
    assert load_segmenter(NAME)(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 9, 2, 2)
    assert left(tmp_path) == []
    assert get(server) == 0
    assert "is here already" in capsys.readouterr().out and len(server.asked) == 1
    assert get(server, "--force") == 0
    assert len(server.asked) == 2


def test_a_download_that_breaks_off_goes_on_where_it_stopped(server, content, tmp_path, capsys):
    server.breaks = [1000, 2000]
    assert get(server) == 0
    assert server.asked == [None, "bytes=1000-", "bytes=3000-"]
    server.breaks = [1000, 1, 1, 1, 1]
    assert get(server, "--force") == 2
    assert f"broke off after 1003 of {len(content)} bytes" in error(capsys)
    server.asked.clear()
    assert get(server, "--force") == 0
    assert server.asked == ["bytes=1003-", "bytes=1004-"]


def test_another_version_of_a_file_or_a_server_without_ranges_begins_again(server, content, tmp_path):
    target = tmp_path / "file.pth"
    target.with_name("file.pth.partial").write_bytes(b"PK\x03\x04 of another version")
    target.with_name("file.pth.partial.version").write_text('"0"')
    download(server.address, target, 1 << 30)
    assert target.read_bytes() == content and server.asked == ["bytes=23-"]
    server.ranges, server.breaks = False, [1000]
    download(server.address, tmp_path / "other.pth", 1 << 30)
    assert (tmp_path / "other.pth").read_bytes() == content and server.asked[1:] == [None, "bytes=1000-"]


def test_a_part_of_another_file_is_found_by_its_checksums(server, content, tmp_path, capsys):
    server.etag = ""
    folder = tmp_path / "cache" / "clustvit_ros" / "downloads" / NAME
    folder.mkdir(parents=True)
    (folder / f"{NAME}.pth.partial").write_bytes(content[:900] + bytes(600))
    assert get(server) == 2
    assert "damaged" in error(capsys) and server.asked == ["bytes=1500-"]
    assert get(server) == 0


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_says_too_much_is_not_waited_for(server, content, capsys, ranges):
    server.length, server.ranges = len(content) + 1000, ranges
    if ranges:  # it says then that there is no more
        assert get(server) == 0
    else:
        assert get(server) == 2
        assert f"broke off after {len(content)} of {len(content) + 1000} bytes" in error(capsys)


def test_a_server_that_says_too_little_cuts_the_file_off(server, content, tmp_path, capsys):
    server.length = len(content) - 1000
    assert get(server) == 2
    assert f"the file of {len(content) - 1000} bytes is cut off or damaged" in error(capsys)
    assert left(tmp_path) in ([], [f"{NAME}.pth.partial.version"])


def test_larger_files_than_allowed_are_refused_before_they_come(server, tmp_path, capsys):
    assert get(server, "--max-gigabytes", 0.00001) == 2
    assert "expected at most 0.00; --max-gigabytes raises that" in error(capsys)
    server.length = 10**30
    assert get(server) == 2
    assert "expected at most 4.00" in error(capsys)
    assert get(server, "--max-gigabytes", "nan") == 2
    assert "--max-gigabytes: got nan, expected a positive number" in capsys.readouterr().err


def test_a_full_disk_is_told(server, monkeypatch, capsys):
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: downloading.shutil._ntuple_diskusage(1, 1, 1000))
    assert get(server) == 2
    assert "has 0.00 GB free, expected at least 0.27" in error(capsys)


def test_redirections_are_followed_to_the_web_alone(server, capsys):
    to = server.address.replace("/weights", "/file")
    server.answer = (302, {"Location": to}, b"")
    assert get(server) == 0
    server.answer = (302, {"Location": "file:///etc/passwd"}, b"")
    assert get(server, "--force") == 2
    assert "'file:///etc/passwd' is not allowed" in error(capsys)
    server.answer = (302, {"Location": "ftp://127.0.0.1/x"}, b"")
    assert get(server, "--force") == 2
    assert "leads to ftp://127.0.0.1/x, which is not followed" in error(capsys)
    server.answer = (302, {"Location": server.address}, b"")
    assert get(server, "--force") == 2
    error(capsys)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><html><title>Google Drive - Virus scan</title>"),
            "a web page called 'Google Drive - Virus scan', expected a file of weights; open the address in a browser",
        ),
        ((200, {}, b"\n<html>no title"), "sends a web page, expected"),
        ((200, {}, b"\x1f\x8b\x08 gzip"), "a file that begins with b'\\x1f\\x8b\\x08 gzip'"),
        ((200, {"Content-Length": "0"}, b""), "broke off after 0 bytes"),
        ((202, {"Content-Length": "0"}, b""), "the server says 202 Accepted; open the address in a browser"),
        ((404, {}, b""), "the server says 404 Not Found; look where it was published"),
        ((503, {}, b""), "(the server says 503 Service Unavailable); the same command goes on"),
        ((200, {"Content-Encoding": "gzip"}, b"PK\x03\x04"), "the server packs the file"),
    ],
)
def test_what_is_no_file_of_weights_is_told_as_what_it_is(server, tmp_path, capsys, answer, message):
    server.answer = answer
    assert get(server) == 2
    assert message in error(capsys)
    assert not any(name.endswith((".pth", ".partial")) for name in left(tmp_path) if answer[0] == 200 and answer[2])


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_downloaded_file_is_executed(server, tmp_path, capsys):
    server.content = checkpoint(meta={"time": Bomb(tmp_path / "exploded")})
    assert get(server) == 2
    assert "it asks for io.open, which no weights need" in error(capsys)
    assert not (tmp_path / "exploded").exists() and left(tmp_path) == []


def test_a_compressed_archive_is_refused(server, content, capsys):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    server.content = packed.getvalue()
    assert get(server) == 2
    assert "archive/data.pkl in it is compressed, which PyTorch never does" in error(capsys)


def test_published_checksums_are_held_against_the_file(server, content, tmp_path):
    with pytest.raises(ModelError, match="expected 00; it was deleted"):
        download(server.address, tmp_path / "a.pth", 1 << 30, sha256="00")
    download(server.address, tmp_path / "a.pth", 1 << 30, sha256=hashlib.sha256(content).hexdigest())


def test_without_a_network_the_address_and_the_way_around_are_told(server, tmp_path, capsys, content):
    server.list.write_text(server.list.read_text().replace(server.address, "http://127.0.0.1:9/weights"))
    assert get(server) == 2
    told = error(capsys)
    assert "http://127.0.0.1:9/weights: cannot be reached (Connection refused); check the network" in told
    assert "pass the file with --file" in told
    (tmp_path / "by_hand.pth").write_bytes(content)
    assert get(server, "--file", tmp_path / "by_hand.pth", "--out", tmp_path / "model") == 0
    assert f"use it: --model {tmp_path / 'model'}" in capsys.readouterr().out
    assert (tmp_path / "by_hand.pth").exists() and server.asked == []
    assert get(server, "--file", tmp_path / "none.pth") == 2
    assert "none.pth: is no file" in error(capsys)


def test_any_address_is_taken_and_what_is_none_is_refused(server, tmp_path, capsys):
    assert get(server, "--out", tmp_path / "mine", name=server.address) == 0
    assert load_config(tmp_path / "mine").network.embed_dim == 64
    for name, message in (
        ("mars", "expected an address (https://...) or one of ade20k_clustvit_b_k3_ip3"),
        ("file:///etc/passwd", "expected http://... or https://...; a file: --file PATH"),
        (server.address, "has no name here; pass --out FOLDER"),
    ):
        assert get(server, name=name) == 2
        assert message in error(capsys)


def test_what_the_list_says_of_a_file_is_held_against_it(server, tmp_path, capsys):
    """Another kind is refused; the score of other classes is not claimed."""
    shipped = server.list.read_text()
    section = shipped[shipped.index("- name: suim_vit_b") :]
    server.list.write_text(shipped.replace(section, section.replace("{num_heads: 1}", "{num_heds: 4}", 1)))
    assert get(server) == 2 and "num_heds" in error(capsys) and server.asked == []
    server.list.write_text(shipped)
    server.content = checkpoint(classes=7)
    assert get(server) == 0
    told = capsys.readouterr().err
    assert "is not what the published score is of, which is left out: not the size of a vit_b; 7 classes, suim" in told
    assert load_config(NAME).scores == {}
    server.list.write_text(shipped.replace(section, section.replace("architecture: vit_b", "architecture: cts_b", 1)))
    assert get(server, "--force") == 2
    assert "holds a vit_t, expected cts_b, as the list says; a CTS needs its policy network" in error(capsys)


def test_the_score_is_that_of_the_published_network(server, capsys):
    """A file that is all that the list says has it; one that differs in a single setting has not."""
    server.content = checkpoint(size=(192, 12, 3))
    shipped = server.list.read_text()
    section = shipped[shipped.index("- name: suim_vit_b") :]
    small = section.replace("architecture: vit_b", "architecture: vit_t", 1).replace("num_heads: 1", "num_heads: 3", 1)
    server.list.write_text(shipped.replace(section, small))
    assert get(server) == 0
    assert load_config(NAME).scores == {"miou": 69.91, "split": "SUIM test, published"}
    assert "published score" not in capsys.readouterr().err and main(["models"]) == 0
    assert f"{NAME}: mIoU 69.9 (SUIM test, published), vit_t at 32x32" in capsys.readouterr().out
    server.list.write_text(server.list.read_text().replace("{num_heads: 3}", "{num_heads: 3, head_heads: 1}", 1))
    server.content = checkpoint(size=(192, 12, 3), meta={"cfg": "model = dict(decode_head=dict(num_heads=3))\n"})
    assert get(server, "--force") == 0
    assert "which is left out: head_heads 3, the list says 1" in capsys.readouterr().err
    assert load_config(NAME).scores == {}


def test_a_place_that_another_model_has_is_no_success(server, make_toy_model, capsys):
    toy = make_toy_model(ClassSet.numbered(3))
    assert get(server, "--out", toy) == 2
    assert "is another model; name another folder, or pass --force to replace it" in error(capsys)
    assert server.asked == [] and len(load_config(toy).classes) == 3


def test_two_downloads_of_one_file_do_not_mix(server, tmp_path):
    with downloading._locked(tmp_path), pytest.raises(ModelError, match="another process is downloading it"):
        download(server.address, tmp_path / "a.pth", 1 << 30)


def test_released_models_are_listed_with_addresses_scores_and_terms(server, capsys):
    assert main(["models", "--released", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["released"]
    assert len({row["address"] for row in rows}) == len(rows) == 12
    assert all(row["address"].startswith("https://data.dtu.dk/ndownloader/files/") and row["terms"] for row in rows)
    assert {row["name"]: row["miou"] for row in rows}["ade20k_vit_b"] == 49.22
    assert {row["data"] for row in rows} == {"ade20k", "suim", "rumexweeds"}
    assert main(["models", "--released"]) == 0
    assert "ade20k_cts_b: mIoU 45.96 (ADE20K val, published), cts_b" in capsys.readouterr().out


def test_a_list_of_ones_own_is_checked(tmp_path):
    text = (released.share_dir() / "config" / "released.yaml").read_text()
    for old, new, message in (
        ("name: suim_vit_b", "name: ../evil", "expected the name of a folder"),
        ("https://data.dtu.dk/ndownloader/files/64205610", "ftp://x/y", "expected http://"),
        ("data: suim\n", "data: mars\n", "data: mars is missing"),
        ("https://data.dtu.dk/ndownloader/files/64205610", "http://[x/a", "expected http://"),
        ("https://data.dtu.dk/ndownloader/files/64205610", "http://a..b/a", "expected http://"),
        ("https://data.dtu.dk/ndownloader/files/64205610", "http://a/b c", "without spaces"),
        ("name: suim_vit_b", "name: ade20k_vit_b", "there twice"),
        ("name: suim_vit_b", "name: sim_tiny", "a shipped model's"),
        ("architecture: cts_b", "architecture: foo", "architecture is 'foo', expected vit_b"),
        ("name: suim_vit_b", "name: suim_vit_b\n  sha256: abc", "expected 64 digits"),
    ):
        (tmp_path / "list.yaml").write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=message):
            load_released(tmp_path / "list.yaml")
