import pytest

from align.data.formats import recognise
from align.errors import AlignError


def test_feedback_that_says_of_no_reply_whether_it_is_good():
    rows = [{"instruction": "say red", "output": "red"}]
    with pytest.raises(AlignError, match=r"holds conversations .* expected replies that are each labelled good or bad") as error:
        recognise(rows, "feedback", "rows.jsonl")
    assert '"completion": "...", "label": "..."' in str(error.value)
    with pytest.raises(AlignError, match=r"not recognised as replies that are each labelled good or bad, or preferences"):
        recognise([{"foo": "a", "bar": "b"}], "feedback", "rows.jsonl")
