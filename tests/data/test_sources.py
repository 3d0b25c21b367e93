"""What a recipe writes as its data, and the files that it stands for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from align.data.sources import SUFFIXES, Source, as_sources, data_suffix, find_files, hub_rows, is_hub_id
from align.errors import AlignError

W = "sft.data"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with data in it and below it."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.csv", "sub/c.json.gz", "sub/deep/d.parquet", ".hidden.jsonl", ".git/x.json", "__pycache__/y.json"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    for name in ("README.md", "LICENSE.txt", "dataset_info.json", "train.py"):
        Path(name).write_text("x")
    return tmp_path


def names(source):
    return [str(path) for path in find_files(Source(source), W)]


# What may be written --------------------------------------------------------------------------------------------------


def test_every_way_to_write_a_source(tmp_path):
    assert as_sources("a.jsonl") == (Source("a.jsonl"),)
    assert as_sources(tmp_path / "a.jsonl") == (Source(str(tmp_path / "a.jsonl")),)
    assert as_sources(Source("a.jsonl", weight=2)) == (Source("a.jsonl", weight=2.0),)
    assert as_sources({"path": "a.jsonl", "cap": 10, "columns": {"prompt": "q"}}) == (Source("a.jsonl", cap=10, columns={"prompt": "q"}),)
    assert as_sources(["a.jsonl", {"path": Path("b")}]) == (Source("a.jsonl"), Source("b"))


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("org/name", Source("org/name")),
        ("org/name:test", Source("org/name", split="test")),
        ("org/name@v1.2", Source("org/name", revision="v1.2")),
        ("org/name@refs/pr/3:test", Source("org/name", revision="refs/pr/3", split="test")),
        ("org/a.b-c@main:train_sft", Source("org/a.b-c", revision="main", split="train_sft")),
        ("a/b/c@x", Source("a/b/c@x")),
        ("C:/rows:train", Source("C:/rows:train")),
        ("org/rows@2.jsonl", Source("org/rows@2.jsonl")),
    ],
)
def test_shorthand_of_a_hub_id(text, source):
    assert as_sources(text) == (source,)


def test_an_existing_file_is_no_shorthand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/name:test").write_text("x")
    assert as_sources("org/name:test") == (Source("org/name:test"),)


WRONG = {
    "number": (3, "data: 3 (int) is no source of rows; expected a path"),
    "none": (None, "data: None (NoneType) is no source of rows"),
    "empty list": ([], "data: the list of sources is empty"),
    "in a list": (["a", 3], "data[1]: 3 (int) is no source"),
    "list in a list": ([["a"]], "data[0]: ['a'] (list) is no source"),
    "unknown key": ({"path": "a", "wieght": 2}, "data: a source has no 'wieght'. Did you mean 'weight'? There are: path, split,"),
    "no path": ({"weight": 2}, "data: the source has no 'path'"),
    "empty path": ("", "data: 'path' is ''; expected a file"),
    "bytes": (Source(b"a"), "data: 'path' is b'a'; expected a file"),
    "weight 0": (Source("a", weight=0), "data: 'weight' is 0; expected a number above 0"),
    "weight nan": (Source("a", weight=float("nan")), "data: 'weight' is nan"),
    "weight text": ({"path": "a", "weight": "2"}, "data: 'weight' is '2'"),
    "weight bool": (Source("a", weight=True), "data: 'weight' is True"),
    "cap 0": (Source("a", cap=0), "data: 'cap' is 0; expected a whole number of rows from 1"),
    "cap half": (Source("a", cap=1.5), "data: 'cap' is 1.5"),
    "columns list": (Source("a", columns=["q"]), "data: 'columns' is ['q']; expected names to names"),
    "columns to number": (Source("a", columns={"prompt": 1}), "data: 'columns' is {'prompt': 1}"),
    "split number": (Source("a", split=1), "data: 'split' is 1; expected a text, or None"),
    "empty revision": (Source("a", revision=""), "data: 'revision' is ''"),
}


@pytest.mark.parametrize(("value", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_source_is_refused(value, message):
    with pytest.raises(AlignError, match=re.escape(message)):
        as_sources(value)


# Files ----------------------------------------------------------------------------------------------------------------


def test_suffixes():
    assert data_suffix("a.JSONL.GZ") == (".jsonl", "gzip")
    assert data_suffix("x/a.b.csv") == (".csv", None)
    assert data_suffix("a.txt.zst") == (".txt", "zstd")
    assert data_suffix("a.gz") is None
    assert data_suffix("a.md") is None
    assert data_suffix("json") is None


def test_a_file_a_folder_and_globs(folder):
    assert names("b.jsonl") == ["b.jsonl"]
    assert names("sub") == ["sub/c.json.gz", "sub/deep/d.parquet"]
    assert names(".") == ["a.csv", "b.jsonl", "sub/c.json.gz", "sub/deep/d.parquet"]
    assert names("*") == ["a.csv", "b.jsonl"], "not what only describes data"
    assert names("LICENSE*") == ["LICENSE.txt"], "unless it is all that was asked for"
    assert names("**/*.parquet") == ["sub/deep/d.parquet"]
    assert names("sub/**") == ["sub/c.json.gz", "sub/deep/d.parquet"]
    assert names(str(folder / "[ab].*")) == [str(folder / "a.csv"), str(folder / "b.jsonl")]


def test_a_name_with_brackets_that_exists_is_no_glob(folder):
    Path("rows[1].jsonl").write_text("x")
    assert names("rows[1].jsonl") == ["rows[1].jsonl"]


def test_a_folder_with_a_link_to_itself_ends(folder):
    (folder / "sub" / "again").symlink_to(folder)
    assert len(names(".")) == 4


def test_files_that_come_with_align(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [found] = names("datasets/chat.jsonl")
    assert found.endswith("datasets/chat.jsonl")
    assert Path(found).is_file()
    assert found in names("datasets")
    Path("datasets").mkdir()
    Path("datasets/chat.jsonl").write_text("x")
    assert names("datasets/chat.jsonl") == ["datasets/chat.jsonl"], "the user's own comes first"


def test_hub_ids(folder):
    assert is_hub_id(Source("org/name"))
    assert find_files(Source("org/name", split="test", revision="main"), W) == []
    Path("org").mkdir()
    Path("org/name").mkdir()
    local = ("org/name", "org/x.jsonl", "org/x.csv.gz", "./org", "../x", "a/b/c", "name", "/a/b", "~/b", "org/*", "datasets/chat.jsonl")
    assert [path for path in local if is_hub_id(Source(path))] == []


def test_nothing_there(folder):
    for path, message in {
        "c.jsonl": "sft.data: there is no file 'c.jsonl'. Did you mean 'b.jsonl'? In '.' there are: a.csv, b.jsonl",
        "sub/zzzz.json": "sft.data: there is no file 'sub/zzzz.json'. In 'sub' there are: c.json.gz.",
        "nowhere/at/all.json": "sft.data: there is no file 'nowhere/at/all.json'. There is no folder 'nowhere/at' either.",
        "x" * 5000: "sft.data: there is no file 'xxx",
        "*.tsv": "sft.data: nothing matches '*.tsv'. In '.' there are: a.csv, b.jsonl",
        "nowhere/*.tsv": "sft.data: nothing matches 'nowhere/*.tsv'. There is no folder 'nowhere'.",
    }.items():
        with pytest.raises(AlignError, match=re.escape(message)):
            names(path)


def test_nothing_that_can_be_read(folder):
    Path("empty").mkdir()
    Path("code").mkdir()
    Path("code/a.py").write_text("x")
    Path("saved").mkdir()
    Path("saved/data-00000-of-00001.arrow").write_text("x")
    Path("saved/state.json").write_text("{}")
    os.mkfifo("pipe.jsonl")
    for path, message in {
        "empty": "sft.data: the folder 'empty' has no data files; expected .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .txt, each also",
        "code": "It holds a.py.",
        "saved": "holds .arrow files, as `save_to_disk` of `datasets` writes them",
        "train.py": "sft.data: 'train.py' has the suffix '.py'; expected one of .json",
        "*.py": "sft.data: '*.py' matches train.py; expected files in .json",
        "sub/dee*": "sft.data: 'sub/dee*' matches sub/deep; expected files in .json",
        "pipe.jsonl": "sft.data: 'pipe.jsonl' is neither a file nor a folder",
    }.items():
        with pytest.raises(AlignError, match=re.escape(message)):
            names(path)


@pytest.mark.parametrize("name", ["split", "revision", "config"])
def test_a_file_has_no_split(folder, name):
    with pytest.raises(AlignError, match=re.escape(f"sft.data: {name}='test' belongs to a hub data set, and 'b.jsonl' is none.")):
        find_files(Source("b.jsonl", **{name: "test"}), W)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(folder):
    Path("sub").chmod(0)
    try:
        with pytest.raises(AlignError, match=r"the folder 'sub' cannot be read \(Permission denied\)"):
            names("sub")
    finally:
        Path("sub").chmod(0o755)


# The hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    import huggingface_hub.constants

    import datasets

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_hub_id_while_offline(offline):
    with pytest.raises(AlignError) as error:
        hub_rows(Source("org/name", revision="v1"), W)
    told = str(error.value)
    assert told.startswith("sft.data: 'org/name' is no file here, and as a hub data set it was not fetched yet and the hub is out of reach")
    assert "(HF_HUB_OFFLINE is set).\n  Fetch it where there is a network: hf download org/name --repo-type dataset --revision v1" in told


def fetched(root, files):
    """A hub data set as `hf download` leaves it."""
    repository = root / "hub" / "datasets--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        path = repository / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_what_was_fetched_is_read_offline(offline):
    fetched(offline, {"train.jsonl": '{"a": "x"}\n{"a": "y"}\n', "test.jsonl": '{"a": "z"}\n'})
    assert list(hub_rows(Source("org/name"), W)) == [(1, {"a": "x"}), (2, {"a": "y"})]
    assert list(hub_rows(Source("org/name", split="test"), W)) == [(1, {"a": "z"})]
    with pytest.raises(AlignError, match=r"(?s)sft.data: the hub data set 'org/name' cannot be read: .*dev.*Asked for: split 'dev'"):
        hub_rows(Source("org/name", split="dev"), W)
    with pytest.raises(AlignError, match="(?s)cannot be read: .*Asked for: split 'train', revision 'main', config 'large'"):
        hub_rows(Source("org/name", config="large"), W)


def test_a_folder_that_was_fetched_without_data(offline):
    fetched(offline, {"notes.md": "x"})
    with pytest.raises(AlignError, match="sft.data: the hub data set 'org/name' cannot be read: "):
        hub_rows(Source("org/name"), W)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RevisionNotFoundError", "sft.data: the hub data set 'org/name' has no revision 'v9'."),
        ("RepositoryNotFoundError", "sft.data: there is no 'org/name': no such file here, and no data set of that name on the hub"),
        ("HfHubHTTPError", "the hub is out of reach (503"),
        ("ConnectionError", "the hub is out of reach (no route to host)"),
    ],
)
def test_what_the_hub_answers(offline, monkeypatch, kind, message):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*args, **kwargs):
        if kind == "ConnectionError":
            raise OSError("no route to host")
        error = getattr(errors, kind).__new__(getattr(errors, kind))
        Exception.__init__(error, "503 busy")
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(AlignError, match=re.escape(message)):
        hub_rows(Source("org/name", revision="v9"), W)


def test_a_hub_id_that_cannot_be_one(offline):
    with pytest.raises(AlignError, match=r"sft.data: 'org/a--b' is no file here and no hub id"):
        hub_rows(Source("org/a--b"), W)


def test_the_import_is_cheap():
    heavy = ("torch", "pandas", "pyarrow", "datasets", "huggingface_hub")
    code = f"import sys, align.data.sources; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_suffix_is_named_in_the_refusal(folder):
    with pytest.raises(AlignError) as error:
        names("train.py")
    assert all(suffix in str(error.value) for suffix in (*SUFFIXES, ".gz", ".zst", ".bz2", ".xz"))
