"""The cache stays under its size: what was used last is there, and nothing is taken from a process that runs."""

import os
import subprocess
import sys
import time

import pytest
from conftest import write_rows

from align.base import cache_folder
from align.data import cache
from align.data.cache import cache_for
from align.data.convert import convert_source
from align.data.sources import Source
from align.errors import AlignError

USED = {"first": 1_000, "second": 2_000, "third": 3_000}  # seconds since 1970
TOKENS = ["f" * 32 + f"_0000{number}_of_00002.arrow" for number in range(2)]
EVERYTHING = [*USED, *TOKENS]


def put(path, size, used):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (used, used))
    os.utime(path.parent, (used, used))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three sources of 1,000 bytes, tokens of 1,000 bytes in two files that were used after the second, and what is no entry."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    for name, used in USED.items():
        put(cache_folder() / "data" / name / "report.json", 200, used)
        put(cache_folder() / "data" / name / "part-00000.arrow", 800, used)
    for number, name in enumerate(TOKENS):
        put(cache_folder() / "tokens" / name, 500, 2_400 + number)
    put(cache_folder() / "base-1234" / "model.safetensors", 10_000, 0)
    put(cache_folder() / "hashes.json", 10_000, 0)
    return cache_folder()


def left(folder):
    assert (folder / "base-1234" / "model.safetensors").is_file()
    assert (folder / "hashes.json").is_file()
    return [name for name in EVERYTHING if (folder / "data" / name).exists() or (folder / "tokens" / name).exists()]


@pytest.mark.parametrize(
    ("limit", "stays"),
    [
        (4_000, EVERYTHING),
        (3_999, ["second", "third", *TOKENS]),
        (3_000, ["second", "third", *TOKENS]),
        (2_000, ["third", *TOKENS]),
        (1_999, ["third"]),
        (0, []),
    ],
)
def test_what_was_not_used_for_longest_goes_first_and_whole(folder, limit, stays):
    cache.clean(folder, limit)
    assert left(folder) == stays


def test_a_process_cleans_when_it_begins_and_not_again(folder, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE_GB", "2e-6")
    assert cache_for("data") == folder / "data"
    assert left(folder) == ["third", *TOKENS]
    monkeypatch.setenv("ALIGN_CACHE_GB", "0")
    assert cache_for("tokens") == folder / "tokens"
    assert left(folder) == ["third", *TOKENS]


def test_nothing_goes_while_another_process_uses_the_cache(folder, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE_GB", "1")
    code = "from align.data.cache import cache_for; cache_for('data'); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        monkeypatch.setenv("ALIGN_CACHE_GB", "0")
        cache_for("data")
        assert left(folder) == EVERYTHING
        other.kill()
    cache._held.close()
    monkeypatch.setattr(cache, "_held", None)
    cache_for("data")
    assert left(folder) == []


def test_a_source_that_is_used_again_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    made = []
    for number in range(2):
        path = write_rows(tmp_path / f"{number}.jsonl", [{"prompt": f"q{number}", "completion": "a"}] * 3)
        made.append(convert_source(Source(str(path)), None, "test").folder)
        for file in (*made[-1].iterdir(), made[-1]):
            os.utime(file, (1_000 + number, 1_000 + number))
    before = time.time()
    assert convert_source(Source(str(tmp_path / "0.jsonl")), None, "test").folder == made[0]
    assert made[0].stat().st_mtime > before - 5
    cache.clean(cache_folder(), sum(file.stat().st_size for file in made[0].iterdir()))
    assert [folder.exists() for folder in made] == [True, False]


@pytest.mark.parametrize("size", ["", "much", "-1", "nan"])
def test_a_size_that_is_none_is_told(folder, monkeypatch, size):
    monkeypatch.setenv("ALIGN_CACHE_GB", size)
    with pytest.raises(AlignError, match=f"ALIGN_CACHE_GB: {size!r}; expected the largest size of the cache in gigabytes, such as 20"):
        cache_for("data")
    assert left(folder) == EVERYTHING
