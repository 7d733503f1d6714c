from pathlib import Path

from pipeline.config import AddConfig, LearnConfig, PredictConfig, read_values, with_paths

STREAM = """
base: {path: models/small, dtype: float32}
stream:
  tasks:
    - {name: first, train: rows.jsonl, eval: {path: eval/*.jsonl, image_root: photos}, adapter: lora}
  benchmarks:
    - {name: kept, eval: {path: kept.tsv}}
  base_prompts: prompts.jsonl
expert: {r: 4}
"""


def test_paths_wherever_a_configuration_names_files(tmp_path: Path) -> None:
    file, below = tmp_path / "stream.yaml", tmp_path / "mine.yaml"
    file.write_text(STREAM)
    below.write_text("extends: stream.yaml\nname: mine\n")
    values = read_values(below, ["expert.steps=3"], LearnConfig)
    assert (values["name"], values["expert"]) == ("mine", {"rank": 4, "steps": 3})
    seen: list[str] = []

    def moved(path: str) -> str:
        seen.append(path)
        return f"there/{path}"

    changed = with_paths(values, LearnConfig, moved)
    names = "models/small", "rows.jsonl", "eval/*.jsonl", "photos", "lora", "kept.tsv", "prompts.jsonl"
    assert sorted(seen) == sorted(names)
    (task,) = changed["stream"]["tasks"]
    assert task["train"] == "there/rows.jsonl"
    assert task["eval"] == {"path": "there/eval/*.jsonl", "image_root": "there/photos"}
    assert changed["base"]["dtype"] == "float32"
    assert values["stream"]["base_prompts"] == "prompts.jsonl"  # what was read stays as it is


def test_other_configurations() -> None:
    assert with_paths({"source": "rows"}, PredictConfig, str.upper) == {"source": "ROWS"}
    task = {"task": {"name": "x", "train": "a", "eval": "b"}}
    assert with_paths(task, AddConfig, str.upper) == {"task": {"name": "x", "train": "A", "eval": "B"}}
