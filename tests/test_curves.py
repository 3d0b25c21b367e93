import json

from align.curves import draw


def test_a_training_stage_gets_a_picture_and_an_evaluation_none(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": i, "loss": 1 / i, "grad_norm": 1.0, "seconds": i}) + "\n" for i in range(1, 5)))
    draw("sft", metrics, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    draw("evaluate", metrics, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
