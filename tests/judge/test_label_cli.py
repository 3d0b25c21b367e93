import json

import pytest
from conftest import write_rows
from judge.faulty_server import MODEL, FaultyServer, ok

from align.cli import main


def message(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture
def pairs(tmp_path):
    """Preferences with labels, a fifth of them wrong."""
    sides = [("a GOOD one", "a BAD one") if n % 5 else ("a BAD one", "a GOOD one") for n in range(20)]
    return write_rows(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": message("user", f"q{n}"), "chosen": message("assistant", f"{n} {c}"), "rejected": message("assistant", f"{n} {r}")}
            for n, (c, r) in enumerate(sides)
        ],
    )


@pytest.fixture
def sampled(tmp_path):
    rows = [
        {"prompt": message("user", f"q{n}"), "completions": [{"text": f"{n} a GOOD one"}, {"text": f"{n} a BAD one"}]} for n in range(20)
    ]
    return write_rows(tmp_path / "completions.jsonl", rows)


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["label", *map(str, arguments)])
    return stop.value.code


def test_labels_are_a_preference_file_and_are_replayed_without_a_judge(sampled, tmp_path, capsys):
    out = tmp_path / "labels.jsonl"
    with FaultyServer() as server:
        judge = f"{server.url}#{MODEL}"
        assert call(sampled, "--judge", judge, "--out", out, "--set", "audit_pairs=0") == 0
        asked = len(server.requests)
    assert asked == 40
    assert "20 of 20 pairs labelled" in capsys.readouterr().out
    first = out.read_bytes()
    rows = [json.loads(line) for line in first.splitlines()]
    assert all("GOOD" in row["chosen"][0]["content"] and row["chosen_probability"] == pytest.approx(0.9) for row in rows)
    out.unlink()
    assert call(sampled, "--judge", judge, "--out", out, "--replay") == 0  # the server is gone
    assert out.read_bytes() == first


def test_agreement_with_the_files_own_labels_is_told(pairs, tmp_path, capsys):
    with FaultyServer() as server:
        assert call(pairs, "--judge", f"{server.url}#{MODEL}", "--out", tmp_path / "l.jsonl", "--set", "audit_pairs=0") == 0
    assert "agrees with the labels of the file on 80.0% of 20 (95% interval 58.4% to 91.9%)" in capsys.readouterr().out


def test_the_judge_is_measured_first_and_refused(sampled, pairs, tmp_path, capsys):
    with FaultyServer(afterwards=ok(lambda asked: {"A": 0.9, "B": 0.1})) as server:
        arguments = (sampled, "--judge", f"{server.url}#{MODEL}", "--gold", pairs, "--out", tmp_path / "l.jsonl")
        assert call(*arguments) == 2
        assert "label: the judge is refused: right on 50.0%" in capsys.readouterr().err
        assert (tmp_path / "l.audit/audit.html").is_file()
        assert not (tmp_path / "l.jsonl").exists()
        assert call(*arguments, "--set", "label.trust_judge=true") == 2
        assert "label: the judge decided none of 20 pairs (20 flipped with the order" in capsys.readouterr().err


def test_mistakes_are_told(sampled, tmp_path, capsys):
    out = tmp_path / "l.jsonl"
    for arguments, message_ in [
        ((sampled, "--judge", "embeded", "--out", out), "Did you mean 'embedded'?"),
        ((sampled, "--judge", "http://127.0.0.1:1/v1#m", "--out", out, "--replay"), "--replay: there is no ledger"),
        ((sampled, "--judge", "http://127.0.0.1:1/v1#m", "--out", out, "--set", "abstian=1"), "Did you mean 'abstain'?"),
        ((sampled, "--judge", "http://127.0.0.1:1/v1#m", "--out", out, "--set", "abstain"), "expected setting=value"),
        ((tmp_path / "none.jsonl", "--judge", "http://127.0.0.1:1/v1#m", "--out", out), "none.jsonl"),
    ]:
        assert call(*arguments) == 2
        assert message_ in capsys.readouterr().err
    broken = write_rows(tmp_path / "broken.jsonl", [json.loads(sampled.read_text().splitlines()[0]), {"prompt": "q"}])
    assert call(broken, "--judge", "http://127.0.0.1:1/v1#m", "--out", out) == 2
    assert "broken.jsonl:2: is no row of sampled completions" in capsys.readouterr().err
