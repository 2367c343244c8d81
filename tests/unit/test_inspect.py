"""Looking into models: what is printed, and how little of a file behind a URL is fetched."""

from __future__ import annotations

import http.server
import json
import re
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from conftest import TOP

from labdeploy import inspection

sys.path.insert(0, str(TOP / "tests"))
import make_lock
from snapshot_maker import write_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Lab

MIB = 2**20


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files of a folder; the first part of a path says how well."""

    server: Server

    def do_GET(self) -> None:
        """Answer as the first part of the path says."""
        _, how, *rest = self.path.partition("?")[0].split("/")
        name = "/".join(rest)
        if how in ("301", "302", "307", "308"):
            self._head(int(how), Location=f"/good/{name}?signed=1")
        elif how == "to-file":
            self._head(302, Location=f"file://{self.server.folder / name}")
        elif how == "round":
            self._head(302, Location=self.path)
        elif not (self.server.folder / name).is_file():
            self._head(404)
        else:
            self._serve(how, self.server.folder / name)

    def _serve(self, how: str, path: Path) -> None:
        size = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        assert match, "asked without a range"
        start, end = int(match[1]), min(int(match[2]), size - 1)
        if how == "deaf":  # it knows no ranges
            self._head(200, Content_Length=str(size))
            self._send(path, 0, size)
            return
        told = f"bytes {0 if how == 'elsewhere' and start else start}-{end}/{'*' if how == 'unsure' else size}"
        self._head(206, Content_Range=told, Content_Length=str(end - start + 1))
        self._send(path, start, (end - start + 1) // (2 if how == "broken" else 1))

    def _send(self, path: Path, start: int, n: int) -> None:
        with path.open("rb") as file:
            file.seek(start)
            for left in range(n, 0, -MIB):
                try:
                    self.wfile.write(file.read(min(MIB, left)))
                except OSError:  # the other side has seen enough
                    break
                self.server.sent += min(MIB, left)
        self.close_connection = True

    def _head(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if code not in (200, 206):
            self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing on stderr."""


class Server(http.server.ThreadingHTTPServer):
    """A web server of one folder on a port of its own, which counts what it sends."""

    folder: Path
    sent: int = 0

    def url(self, how: str, name: str) -> str:
        """Give the URL at which a file is served in some way."""
        return f"http://127.0.0.1:{self.server_address[1]}/{how}/{name}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model of real length: 4.68 GiB that take some MiB on this disk."""
    folder = tmp_path_factory.mktemp("models")
    make_lock.MAKERS["qwen3-8b"](folder)
    return folder


@pytest.fixture
def server(models: Path) -> Iterator[Server]:
    """Serve it."""
    with Server(("127.0.0.1", 0), Handler) as found:
        found.folder = models
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


BIG = "Qwen3-8B-Q4_K_M.gguf"

# --- what is shown ------------------------------------------------------------------------------------------------


def test_the_text_is_a_table_and_a_plot_of_80_columns(lab: Lab, models: Path):
    """It reads the same in a pipe; bars grow with the context and end at the sum beside them."""
    text = lab.bare("inspect", str(models / BIG)).out
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 79 + len(str(models))
    bars = re.findall(r"^ +(\d+) \|(#+)(=+)(\++) +([\d.]+) GiB$", text, re.MULTILINE)
    assert [int(bar[0]) for bar in bars] == [4096, 8192, 16384, 32768, 40960]
    assert len({bar[1] for bar in bars}) == 1, "weights do not depend on the context"
    lengths = [sum(map(len, bar[1:4])) for bar in bars]
    assert lengths == sorted(lengths)
    assert lengths[-1] == inspection.PLOT_WIDTH
    sums = [float(bar[4]) for bar in bars]
    for length, total in zip(lengths, sums, strict=True):
        assert abs(length / inspection.PLOT_WIDTH - total / sums[-1]) < 0.02
    row = re.search(r"^ +40960 +5760 +3060 +(\d+) +\d+ +\d+$", text, re.MULTILINE)
    assert row
    assert abs(int(row[1]) / 1024 - sums[-1]) < 0.06


def test_the_json_has_the_figures_of_the_table(lab: Lab, models: Path):
    """Context by context; the contract's keys keep their meaning."""
    document = json.loads(lab.bare("inspect", str(models / BIG), "--json").out)
    assert document["context_mib"] == {"4096": 576.0, "8192": 1152.0, "16384": 2304.0, "32768": 4608.0, "40960": 5760.0}
    most = document["memory_mib"]["40960"]
    assert (most["context"], most["context_q8_0"]) == (5760.0, 3060.0)
    assert most["gpu"] == pytest.approx(most["weights"] + most["context"] + most["scratch"], abs=0.02)


def test_a_snapshot_has_its_cache_too(lab: Lab):
    """By what one token takes in 16 bits: 28 layers of 4 KV heads of 128, K and V."""
    make_lock.MAKERS["qwen2.5-7b-awq"](lab.folder)
    folder = next(path for path in lab.folder.iterdir() if path.is_dir())
    ran = lab.bare("inspect", str(folder), "--json")
    document = json.loads(ran.out)
    assert (document["arch"], document["n_layer"]) == ("qwen2", 28)
    assert document["context_mib"]["4096"] == 4096 * 28 * 4 * 128 * 2 * 2 / MIB
    assert f"\n      4096{document['context_mib']['4096']:>9.0f}\n" in lab.bare("inspect", str(folder)).out


# --- URLs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["good", "301", "302", "307", "308"])
def test_of_a_url_only_the_header_is_fetched(lab: Lab, server: Server, models: Path, how: str):
    """5 GB behind it and a header of 2.4 MB; the same facts as of the file, also through redirects."""
    ran = lab.bare("inspect", server.url(how, BIG), "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == lab.bare("inspect", str(models / BIG), "--json").out
    assert server.sent <= 18 * MIB


def test_all_parts_of_a_split_model_are_read(lab: Lab, server: Server):
    """Given any one of them; a query stays with each part."""
    from test_gguf import write_parts  # noqa: PLC0415

    write_parts(server.folder)
    ran = lab.bare("inspect", server.url("good", "m-00001-of-00002.gguf") + "?download=true", "--json")
    assert ran.code == 0, ran.err
    there = lab.bare("inspect", str(server.folder / "m-00002-of-00002.gguf"), "--json")
    assert ran.out == there.out
    (server.folder / "m-00002-of-00002.gguf").unlink()
    ran = lab.bare("inspect", server.url("good", "m-00001-of-00002.gguf"))
    assert ran.code == 2
    assert "m-00002-of-00002.gguf: the server says 404" in ran.err


def test_a_short_file_needs_no_ranges(lab: Lab, server: Server, tmp_path: Path):
    """The whole of it is no more than what the header of a long one may be."""
    from labdeploy.tiny_model import write_tiny_model  # noqa: PLC0415

    write_tiny_model(server.folder / "tiny.gguf")
    assert lab.bare("inspect", server.url("deaf", "tiny.gguf")).code == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "name", "said"),
    [
        ("deaf", BIG, "the server ignores range requests and would send all 4.68 GiB; only the header is wanted"),
        ("unsure", BIG, "the server ignores range requests and would send"),
        ("broken", BIG, "the answer broke off after 1048576 of 2097152 bytes"),
        ("good", "gone.gguf", "the server says 404 Not Found"),
        ("good", "page.gguf", "is not a GGUF file: it starts with b'<htm'"),
        ("good", "cut.gguf", "bytes are missing: the file has 8388608, its tensors end at"),
        ("to-file", BIG, "the server says 302 Found - Redirection to url 'file:///"),
        ("round", BIG, "the server says 302 The HTTP server returned a redirect error that would lead to an infinite"),
    ],
)  # fmt: skip
def test_a_url_that_is_no_model_is_one_error(lab: Lab, server: Server, how: str, name: str, said: str):
    """Exit code 2, the URL, what is wrong; and never gigabytes."""
    (server.folder / "page.gguf").write_text("<html>\n" * 100)
    with (server.folder / BIG).open("rb") as whole:
        (server.folder / "cut.gguf").write_bytes(whole.read(8 * MIB))
    ran = lab.bare("inspect", server.url(how, name))
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith(f"error: {server.url(how, name)}: ")
    assert said in ran.err
    assert ran.err.count("error: ") == 1
    assert server.sent <= 36 * MIB


def test_a_page_about_a_file_is_not_the_file(lab: Lab, server: Server):
    """The link that people copy from Hugging Face; the hint has the right one."""
    (server.folder / "blob").mkdir()
    (server.folder / "blob" / "m.gguf").write_text("<!doctype html>" * 50)
    url = server.url("good", "blob/m.gguf")
    assert f"\nhint: labdeploy inspect '{url.replace('/blob/', '/resolve/')}'\n" in lab.bare("inspect", url).err


def test_nobody_there(lab: Lab):
    """A port that nobody listens at, and a name that is none."""
    for url in ("http://127.0.0.1:9/m.gguf", "http:///m.gguf", "http://[::/m.gguf"):
        ran = lab.bare("inspect", url)
        assert ran.code == 2, url
        assert ran.err.startswith(f"error: {url}: "), ran.err


def test_a_url_goes_into_the_lock(lab: Lab, server: Server):
    """Under a name of the inventory; a name that is not there is told with the file's own name."""
    inventory = lab.host("cpu: {cores: 4}, ram: 64GiB", a="model: qwen3-8b, port: 8080")
    assert lab.run("inspect", server.url("good", BIG), "--add", "qwen3-8b").code == 0
    assert inventory.lock_path.is_file()
    assert lab.run("plan").code == 0
    refused = lab.run("inspect", server.url("good", BIG) + "?download=true", "--add", "qwen")
    assert f"hint: add  qwen: {{path: {BIG}}}  below models:" in refused.err


def test_a_window_costs_no_more_than_its_tokens(lab: Lab):
    """As in the planner: layers that see a window keep a window, however long the context."""
    base = {"num_hidden_layers": 12, "max_position_embeddings": 65536, "sliding_window": 1024, "head_dim": 64}
    costs = {}
    for name, more in {"all": {}, "none": {"use_sliding_window": False}, "most": {"sliding_window_pattern": 6}}.items():
        folder = write_snapshot(lab.folder / name, **base, **more)
        costs[name] = json.loads(lab.bare("inspect", str(folder), "--json").out)["context_mib"]["65536"]
    assert costs["all"] < costs["most"] < costs["none"]
    assert costs["most"] < costs["none"] / 4
