import gzip
import json

from conftest import write_rows

from align.data.mix import load_data
from align.data.originals import original_rows
from align.data.sources import Source


def loaded(*paths):
    return load_data(tuple(Source(str(path)) for path in paths), "prompt", "test")


def rows(count, start=0):
    return [{"question": f"what is {i} + {i}?", "answer": 2 * i, "hints": [i]} for i in range(start, start + count)]


def test_rows_keep_the_columns_that_prompts_have_not(tmp_path):
    data = loaded(write_rows(tmp_path / "a.jsonl", rows(4)))
    assert "answer" not in next(data.records())
    assert original_rows(data, [2, 0]) == [rows(4)[2], rows(4)[0]]


def test_rows_of_several_files_and_forms_are_found_again(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", rows(3))
    (tmp_path / "b.json").write_text(json.dumps(rows(3, start=3)))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows(3, start=6)))
    data = loaded(first, tmp_path / "b.json", tmp_path / "c.jsonl.gz")
    assert original_rows(data, range(9)) == rows(9)


def test_refused_lines_and_duplicates_shift_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    good = rows(5)
    path.write_text("\n".join(["{broken", json.dumps(good[0]), "", json.dumps(good[1]), json.dumps(good[0]), json.dumps(good[2])]) + "\n")
    data = loaded(path)
    found = original_rows(data, range(len(data)))
    assert found == good[:3]
    assert [data.place(i) for i in range(3)] == [f"{path}:{line}" for line in (2, 4, 6)]
