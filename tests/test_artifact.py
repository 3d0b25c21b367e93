import contextlib
import functools
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import align
from test_run import STAGES, changed, contents, facts_of, times

from align.artifact import ARCHIVE, FACTS, NEEDED, Artifact, identity_of, publish
from align.errors import AlignError

WEIGHTS = "adapter/adapter_model.safetensors"


def message_of(call, *arguments, **keywords):
    with pytest.raises(AlignError) as error:
        call(*arguments, **keywords)
    return str(error.value)


def edit(folder, **changes):
    """Change facts in artifact.json as a user's editor would."""
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps({**facts, **changes}))


# Damage -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_every_file_cut_short_or_missing_is_found(finished_copy, name):
    folder = finished_copy / name
    for file in facts_of(finished_copy)[name]["files"]:
        path = folder / file
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        message = message_of(Artifact.open, folder)
        assert message.startswith(f"{folder}: damaged: {file}: found {len(content) - 1} bytes, expected {len(content)} bytes.")
        assert f"rm -r {folder}" in message
        path.unlink()
        assert f"{file}: found nothing, expected {len(content)} bytes" in message_of(Artifact.open, folder)
        path.write_bytes(content)
        Artifact.open(folder, verify=True)


@pytest.mark.parametrize("file", [WEIGHTS, "head.safetensors", "probes.json"])
def test_one_changed_byte_is_found_where_hashes_are_compared(finished_copy, file):
    path = finished_copy / "reward" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    Artifact.open(finished_copy / "reward")
    assert f"damaged: {file}: its content has changed" in message_of(Artifact.open, finished_copy / "reward", verify=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}', "\x00\x01"])
def test_an_artifact_that_cannot_be_read_is_damaged(finished_copy, text):
    (finished_copy / "sft" / FACTS).write_text(text)
    assert f"damaged: {FACTS} cannot be read" in message_of(Artifact.open, finished_copy / "sft")


@pytest.mark.parametrize("changes", [{"format": "1"}, {"files": []}, {"files": {WEIGHTS: {}}}])
def test_an_artifact_with_facts_of_another_shape_is_damaged(finished_copy, changes):
    edit(finished_copy / "sft", **changes)
    assert "damaged" in message_of(Artifact.open, finished_copy / "sft")


@pytest.mark.parametrize("missing", ["name", "kind", "identity", "parents", "base", "settings", "model", "metrics", "seconds"])
def test_an_artifact_without_what_a_run_reads_is_damaged(finished_copy, missing):
    facts = facts_of(finished_copy)["sft"]
    del facts[missing]
    (finished_copy / "sft" / FACTS).write_text(json.dumps(facts))
    assert f"damaged: {FACTS} cannot be read (no {missing})." in message_of(Artifact.open, finished_copy / "sft")


def test_an_artifact_of_a_newer_format_asks_for_a_newer_align(finished_copy):
    edit(finished_copy / "sft", format=99)
    message = message_of(Artifact.open, finished_copy / "sft")
    assert message == f"{finished_copy / 'sft'}: made by a newer align (format 99; this one reads up to 1). Upgrade align."


def test_a_folder_that_is_no_artifact_says_where_one_is(tmp_path):
    message = message_of(Artifact.open, tmp_path)
    assert message.startswith(f"{tmp_path}: not an artifact (no {FACTS}).")
    assert "align show" in message


@pytest.mark.parametrize("part", ["half a file", "no artifact.json"])
def test_a_damaged_stage_is_made_again_as_the_message_says(finished_copy, script, tmp_path, part):
    made, before = contents(finished_copy), times(finished_copy)
    folder = finished_copy / "dpo"
    if part == "half a file":
        os.truncate(folder / WEIGHTS, 100)
        ended = align("run", script, "--out", finished_copy, folder=tmp_path)
        assert ended.code == 2
        assert ended.err.startswith(f"error: {folder}: damaged: {WEIGHTS}")
        command = ended.err.rpartition(": ")[2].split()
        assert command == ["rm", "-r", str(folder)]
        subprocess.run(command, check=True)
    else:
        (folder / FACTS).unlink()
    assert align("run", script, "--out", finished_copy, folder=tmp_path).code == 0
    assert contents(finished_copy) == made
    assert changed(finished_copy, before) == {"dpo"}


def test_a_parent_whose_bytes_changed_is_not_trained_on(finished_copy, script, tmp_path):
    path = finished_copy / "sft" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ended = align("run", script, "--out", finished_copy, "--from", "dpo", folder=tmp_path)
    assert ended.code == 2
    assert f"{finished_copy / 'sft'}: damaged: {WEIGHTS}: its content has changed since it was published" in ended.err
    assert "Traceback" not in ended.err


# Parents ----------------------------------------------------------------------------------------------------------------------


def test_a_parent_is_found_after_the_run_is_moved(finished_copy):
    moved = finished_copy.rename(finished_copy.with_name("moved"))
    ppo = Artifact.open(moved / "ppo")
    assert [artifact.name for artifact in ppo.chain()] == ["sft", "ppo"]
    assert ppo.parent("reward_model").folder.resolve() == moved / "reward"


def test_a_missing_parent_is_named(finished_copy):
    shutil.rmtree(finished_copy / "sft")
    message = message_of(Artifact.open(finished_copy / "dpo").chain)
    assert message.startswith(f"{finished_copy / 'dpo'}: its policy is 'sft' with identity ")
    assert "found nothing there" in message


def test_an_adapter_is_refused_on_another_parent(finished_copy):
    edit(finished_copy / "sft", identity="f" * 64)
    message = message_of(Artifact.open(finished_copy / "dpo").chain)
    assert "but found only sft with identity ffffffffffff" in message
    assert "An adapter works only on the parent it was trained on" in message


def test_talking_to_an_adapter_on_another_parent_is_refused(finished_copy, tmp_path):
    edit(finished_copy / "sft", identity="f" * 64)
    ended = align("chat", finished_copy / "dpo", folder=tmp_path, stdin="say red\n")
    assert ended.code == 2
    assert "An adapter works only on the parent it was trained on" in ended.err
    assert "Traceback" not in ended.err


def test_an_archived_parent_is_still_its_childs_parent(finished_copy):
    dpo = Artifact.open(finished_copy / "dpo")
    parent = dpo.parent("policy")
    (finished_copy / ARCHIVE).mkdir()
    archived = parent.folder.resolve().rename(finished_copy / ARCHIVE / f"sft-{parent.identity[:12]}")
    assert dpo.parent("policy").folder == archived
    edit(shutil.copytree(archived, finished_copy / "sft"), identity="f" * 64)
    assert dpo.parent("policy").folder == archived
    assert [artifact.name for artifact in dpo.chain()] == ["sft", "dpo"]


# Publishing -------------------------------------------------------------------------------------------------------------------


def made(folder, name, content="weights"):
    """A working folder as a stage leaves it."""
    work = folder / ".partial" / name
    (work / "adapter").mkdir(parents=True)
    (work / "adapter" / "weights").write_text(content)
    return work


def published(folder, identity, content="weights"):
    facts = {**dict.fromkeys(NEEDED), "format": 1, "kind": "policy", "name": "sft", "identity": identity * 64}
    return publish(made(folder, f"sft-{identity}", content), folder / "sft", facts)


def test_what_is_published_is_whole_under_its_name_and_nowhere_else(tmp_path):
    artifact = published(tmp_path, "a")
    assert set(artifact.facts["files"]) == {"adapter/weights"}
    assert artifact.facts == Artifact.open(tmp_path / "sft", verify=True).facts
    assert list((tmp_path / ".partial").iterdir()) == []


def test_publishing_moves_the_older_artifact_to_the_archive(tmp_path):
    for identity in "abc":
        published(tmp_path, identity, identity)
    assert Artifact.open(tmp_path / "sft", verify=True).identity == "c" * 64
    archived = {path.name: Artifact.open(path, verify=True) for path in (tmp_path / ARCHIVE).iterdir()}
    assert {name: artifact.identity[0] for name, artifact in archived.items()} == {f"sft-{i * 12}": i for i in "ab"}
    assert (tmp_path / ARCHIVE / "sft-aaaaaaaaaaaa" / "adapter" / "weights").read_text() == "a"


def test_the_archive_keeps_every_artifact_of_the_same_identity(tmp_path):
    for content in "xyz":
        published(tmp_path, "a", content)
    kept = [path / "adapter" / "weights" for path in [tmp_path / "sft", *(tmp_path / ARCHIVE).iterdir()]]
    assert sorted(path.read_text() for path in kept) == ["x", "y", "z"]


def test_a_folder_that_is_no_artifact_is_moved_aside_and_not_lost(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "notes.txt").write_text("mine")
    published(tmp_path, "a")
    (aside,) = (tmp_path / ARCHIVE).iterdir()
    assert aside.name.startswith("sft-damaged-")
    assert (aside / "notes.txt").read_text() == "mine"


def test_identity_depends_on_content_and_not_on_order():
    one = {"settings": {"a": 1, "b": [1, 2]}, "data": None}
    assert identity_of(one) == identity_of(dict(reversed(one.items()))) == identity_of(json.loads(json.dumps(one)))
    assert identity_of(one) != identity_of({**one, "data": "x"})
    assert identity_of(one) != identity_of({**one, "settings": {"a": 1, "b": [2, 1]}})


# A full disk ------------------------------------------------------------------------------------------------------------------


def allow_files_of(size):
    """No file may grow beyond this many bytes: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def allow_files_of_when_publishing(size, number):
    """The same from the given call of `publish` on."""
    from align import run

    calls = []

    def limited(*arguments):
        calls.append(1)
        if len(calls) == number:
            allow_files_of(size)
        return publish(*arguments)

    run.publish = limited


FULL = {
    "a larger checkpoint": (functools.partial(allow_files_of, 150_000), ("sft", "reward", "dpo")),
    "describing the third": (functools.partial(allow_files_of_when_publishing, 1_500, 3), ("sft", "reward")),
}


@pytest.mark.parametrize("moment", FULL)
def test_a_full_disk_is_a_message_and_the_run_goes_on_when_there_is_room(finished, script, tmp_path, moment):
    before, done = FULL[moment]
    run = tmp_path / "run"
    ended = align("run", script, "--out", run, folder=tmp_path, before=before)
    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert "the disk is full. Nothing that was finished is lost" in ended.err
    assert "make room and run the same command again" in ended.err
    assert set(facts_of(run)) == set(done)
    kept = times(run)
    ended = align("run", script, "--out", run, folder=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out.count("done before") == len(done)
    assert contents(run) == contents(finished)
    assert not changed(run, kept) & set(done)


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, check=False)
    if mounting.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("size", ["60k", "200k"])
def test_a_disk_that_fills_up_anywhere_is_a_message_and_the_run_goes_on_when_there_is_room(finished, script, tmp_path, size):
    disk = tmp_path / "disk"
    with small_disk(disk, size):
        ended = align("run", script, "--out", disk / "run", folder=tmp_path, curves=True)
        assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
        assert "the disk is full" in ended.err
        kept = times(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        ended = align("run", script, "--out", disk / "run", folder=tmp_path)
        assert ended.code == 0, ended.err
        assert contents(disk / "run") == contents(finished)
        assert not changed(disk / "run", kept) & set(kept)


def test_a_full_disk_before_anything_is_made_is_a_message(script, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "4k"):
        filler = disk / "filler"
        with contextlib.suppress(OSError):
            filler.write_bytes(bytes(1 << 16))
        ended = align("run", script, "--out", disk / "run", folder=tmp_path)
        assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
        assert "the disk is full" in ended.err


def test_a_run_is_read_from_a_disk_that_cannot_be_written(finished, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "20m"):
        run = Path(shutil.copytree(finished, disk / "run"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert align("show", run, folder=tmp_path).code == 0
        ended = align("chat", run, "--max-new-tokens", 4, folder=tmp_path, stdin="say red\n")
        assert ended.code == 0, ended.err
