# Copyright 2026 clustvit_ros maintainers
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0 Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Downloads from servers that send a file in parts, and of files that are called otherwise than they are."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save

from clustvit_ros.cli.main import main
from clustvit_ros.download import download
from clustvit_ros.networks import ViTConfig, build_network, load_config
from clustvit_ros.networks.official import to_official

PART = 100_000


@pytest.fixture(scope="module")
def content():
    torch.manual_seed(0)
    config = ViTConfig(backbone="vit", image_size=(32, 32), embed_dim=64, depth=2, num_heads=1)
    weights = to_official(build_network(config, 3).state_dict())
    return save({name: tensor.contiguous() for name, tensor in weights.items()})


@pytest.fixture
def address(content):
    """A server that breaks off once, and answers whoever asks for the rest with a part at a time."""
    answers = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(wanted[1]) if wanted else 0
            part = content[start : start + PART]
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part) if wanted else len(content)))
            self.send_header("ETag", '"1"')
            self.end_headers()
            answers.append(self.wfile.write(part))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/weights.safetensors"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_part_is_not_taken_for_the_end_of_the_file(address, content, tmp_path):
    assert len(content) > 2 * PART
    download(address, tmp_path / "a", 10**9, pause_s=0.0)
    assert (tmp_path / "a").read_bytes() == content


def test_safetensors_at_an_address_become_a_model(address, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["get", address, "--out", str(tmp_path / "model")]) == 0, capsys.readouterr().err
    assert len(load_config(tmp_path / "model").classes) == 3
