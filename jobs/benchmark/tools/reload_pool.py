"""The other process of `pointsman benchmark families`: loads a pool from the registry as anyone would, and answers.

    python -m jobs.benchmark.tools.reload_pool sqlite:////runs/mlflow.db models:/internvl.pool.demo/latest prompts.json answers

Nothing of the project is imported before the pool is loaded: what answers is the code that the pool's version holds, not
the code that lies here.
"""

import base64
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

TOKENS = 2
"""Length of the answers; how they come about shows in the logits."""


@torch.inference_mode()
def routed_logits(
    routed: Any, processor: Any, rows: Sequence[Mapping[str, str | None]]
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the logits (T, V) of each prompt by its number, and the experts that the router chose.

    Each prompt is a batch of its own. `rows` are those of a pool's `predict`: `prompt`, and `image` as base64 text or None.
    """
    from pipeline.models.encoding import collate_for, encode  # after loading, and so from the loaded version

    logits, experts = {}, []
    for number, row in enumerate(rows):
        images = [Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")] if row["image"] else []
        question = {"role": "user", "content": "<image>" * len(images) + str(row["prompt"])}
        encoded = encode(processor, [question, {"role": "assistant", "content": ""}], images, answer=False)
        batch = collate_for(processor, [encoded], "left")
        del batch["labels"]
        logits[f"{number:03d}"] = routed.model(**batch, use_cache=False).logits[0]
        experts.append(routed.decisions[0].expert or "base")
    return logits, experts


def main(uri: str, model: str, prompts: str, answers: str) -> None:
    """Answers the prompts in the file `prompts`; writes logits, experts and whose code it was to the folder `answers`."""
    mlflow.set_tracking_uri(uri)
    loaded = mlflow.pyfunc.load_model(model)
    rows, folder = json.loads(Path(prompts).read_text()), Path(answers)
    predicted = loaded.predict(pd.DataFrame(rows), {"max_new_tokens": TOKENS})
    pool = loaded.unwrap_python_model()
    folder.mkdir(parents=True, exist_ok=True)
    logits, _ = routed_logits(pool.routed, pool.processor, rows)
    save_file(logits, folder / "logits.safetensors")
    answers = predicted.to_dict("list") | {"code": sys.modules[type(pool).__module__].__file__}
    (folder / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
