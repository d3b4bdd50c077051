"""Published label lists: found beside the data or fetched, and never another content than the pinned one."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loaders.errors import StoreError
from loaders.labels import published, subsets
from loaders.labels.published import HOME, PUBLISHED, PublishedList, cache_folder, entries_of, read_published
from loaders.labels.subsets import resolve
from loaders.plan.views import Complement, Listed
from loaders.store.source import ArraySource

TEXT = b"3\n1\n"
ADDRESS = "someone/lists/main/subsets/few.txt"


class Server:
    """Answers with `answers[path]`: bytes, or a status; remembers what was asked for."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | int] = {}
        self.asked: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                answer = server.answers.get(self.path, 404)
                self.send_response(answer if isinstance(answer, int) else 200)
                self.end_headers()
                if isinstance(answer, bytes):
                    self.wfile.write(answer)

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.home = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache and a published list of our own; no lists of the machine's."""
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTSSL_LISTS", raising=False)
    few = PublishedList("someone/lists/main", "subsets/few.txt", "few-2.txt", hashlib.sha256(TEXT).hexdigest())
    monkeypatch.setitem(PUBLISHED, "few", few)


def five() -> ArraySource:
    return ArraySource("five", np.zeros((5, 4, 4, 1), np.uint8), np.zeros(5, np.int64), ("a",))


def test_a_list_is_fetched_once_and_kept(server, monkeypatch):
    server.answers[f"/{ADDRESS}"] = TEXT
    monkeypatch.setattr(subsets, "read_published", functools.partial(read_published, home=server.home))
    for _ in range(2):
        found = resolve(Listed("few"), five())
        assert found.ids.tolist() == [1, 3] and (found.name, found.count) == ("few", 2)
        assert found.sha256 == hashlib.sha256(TEXT).hexdigest()
    assert server.asked == [f"/{ADDRESS}"]
    assert [f.name for f in cache_folder().iterdir()] == ["few.txt"]
    assert resolve(Complement(Listed("few")), five()).ids.tolist() == [0, 2, 4]


def test_a_wrong_sum_is_refused_and_not_kept(server):
    """A changed list upstream, or a login page in its place, would silently be another experiment."""
    server.answers[f"/{ADDRESS}"] = TEXT + b"4\n"
    with pytest.raises(StoreError, match=rf"{server.home}/{ADDRESS}: not the published list few: its sha256 is"):
        read_published("few", [], server.home)
    assert not cache_folder().exists()


@pytest.mark.parametrize("answer", [404, 500, bytes(published.MAX_BYTES + 1), None])
def test_without_an_answer_the_address_and_the_place_are_told(server, tmp_path, answer):
    home = server.home if answer is not None else "http://127.0.0.1:9"
    server.answers[f"/{ADDRESS}"] = answer or 404
    with pytest.raises(StoreError) as e:
        read_published("few", [tmp_path / "data"], home)
    message = str(e.value)
    assert f"{home}/{ADDRESS}" in message and "\n" not in message
    told = "more than" if isinstance(answer, bytes) else f"save it as {tmp_path / 'data' / 'few-2.txt'}"
    assert told in message


@pytest.mark.parametrize("file", ["few", "few.txt", "few-2.txt", "subsets/few.txt"])
def test_lists_beside_the_data_go_before_the_network(server, tmp_path, monkeypatch, file):
    (tmp_path / "lists" / file).parent.mkdir(parents=True)
    (tmp_path / "lists" / file).write_bytes(TEXT)
    assert read_published("few", [tmp_path / "none", tmp_path / "lists"], server.home)[1] == TEXT
    monkeypatch.setenv("FASTSSL_LISTS", str(tmp_path / "lists"))
    assert resolve(Listed("few"), five()).count == 2
    assert server.asked == []


def test_an_edited_list_of_our_name_is_an_error_another_file_of_the_upstream_name_is_not(server, tmp_path, monkeypatch):
    """`val.txt` beside ImageNet is usually somebody else's; `paws-heldout.txt` can only be meant."""
    server.answers[f"/{ADDRESS}"] = TEXT
    monkeypatch.setitem(PUBLISHED, "held", replace(PUBLISHED["few"], alias="held-2.txt"))
    (tmp_path / "few.txt").write_bytes(b"0\n")
    assert read_published("held", [tmp_path], server.home)[1] == TEXT
    with pytest.raises(StoreError, match=r"few\.txt: not the published list few"):
        read_published("few", [tmp_path], server.home)


def test_a_missing_list_of_no_published_name_is_not_fetched_and_names_those_there_are(tmp_path):
    with pytest.raises(StoreError, match=r"'simclr-5' was not found.*published lists: simclr-1, simclr-10, paws"):
        resolve(Listed("simclr-5"), five(), [tmp_path])


def test_real_lists_have_the_pinned_sums(test_data):
    counts = {}
    for name in [name for name in PUBLISHED if name != "few" and not name.startswith("s4l")]:
        path, data = read_published(name, [test_data / "splits"], "http://127.0.0.1:9")
        counts[name] = len(data.split())
        assert path == test_data / "splits" / PUBLISHED[name].alias
    assert counts == {
        **{"simclr-1": 12_811, "simclr-10": 128_116, "paws-heldout": 12_000},
        **{f"paws-cifar10-4000-split-{seed}": 4000 for seed in (73, 91, 152, 321, 401)},
    }


def test_real_lists_are_disjoint_or_nested_as_published(test_data):
    """simclr-1 lies within simclr-10, and the held-out images in neither: a mixed-up sum would show here."""
    names = ("simclr-1", "simclr-10", "paws-heldout")
    one, ten, held = (set(read_published(name, [test_data / "splits"])[1].split()) for name in names)
    assert one < ten and not ten & held


def test_addresses_are_https_and_of_the_authors_repositories():
    assert HOME == "https://raw.githubusercontent.com"
    homes = {"/".join(entry.address.split("/")[:2]) for name, entry in PUBLISHED.items() if name != "few"}
    assert homes == {"google-research/simclr", "facebookresearch/suncet", "google-research/s4l"}
    assert PUBLISHED["paws-cifar10-4000-split-91"].path == "cifar10_subsets/spc.4000_split.91.txt"
    assert all(len(entry.sha256) == 64 for entry in PUBLISHED.values())


def test_s4ls_lists_are_read_as_their_authors_publish_them(server, tmp_path, monkeypatch):
    """JSON with the names under "values", or these one a line. Catches a list that has to be made by hand, and other
    JSON read as a name."""
    told = json.dumps({"values": ["b.png", "d.png"]}).encode()
    as_json = replace(PUBLISHED["few"], sha256=hashlib.sha256(told).hexdigest(), alias="json-list",
                      as_lines=hashlib.sha256(b"b.png\nd.png\n").hexdigest())  # fmt: skip
    monkeypatch.setitem(PUBLISHED, "s4l", as_json)
    for name, content in (("json-list", told), ("s4l.txt", b"b.png\nd.png\n")):
        (tmp_path / name).write_bytes(content)
        assert read_published("s4l", [tmp_path])[1] == content
        assert entries_of(content) == ["b.png", "d.png"]
        (tmp_path / name).unlink()
    (tmp_path / "other.txt").write_text('{"names": []}')
    with pytest.raises(StoreError, match='neither names one a line nor JSON with names under "values"'):
        resolve(Listed(str(tmp_path / "other.txt")), five())
    with pytest.raises(
        StoreError, match=r"s4l-10 is neither .*google-research/s4l/master/label_map_count_128000_index_0"
    ):
        read_published("s4l-10", [tmp_path / "none"], "http://127.0.0.1:9")


def test_a_read_only_cache_does_not_stop_a_run(server, tmp_path, monkeypatch):
    server.answers[f"/{ADDRESS}"] = TEXT
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "file"))
    path, data = read_published("few", [], server.home)
    assert data == TEXT and "few.txt" in Path(path).name
