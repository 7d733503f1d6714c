"""What the demo's base is pretrained by: which examples a step draws, and the loss of answers and of print.

Shapes: N images, P image tokens of one, D the language model's width, V words, U words of the longest caption, B rows.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.demo.abilities import ABILITIES, BENCHMARKS, Example
from pipeline.data.demo.drawing import SIDE, Print
from pipeline.data.demo.operations import MODALITIES, NOTHING, OPERATIONS, draw_symbols, twins
from pipeline.models.encoding import IGNORED, Encoded

TOGETHER = 2
"""Operations that are asked about one sequence, each on both modalities; its picture is looked at once."""
SPREAD_OUT = 0.5
"""Share of the written sequences that are spread out as print is over image tokens."""
APART = 8.0
"""How many times likelier an image token is that lies at its word than at another of the same length and at a right angle
to it, as a logarithm: sets the width of the Gaussians."""
FAR = -8.0
"""Log probability of naming a word in a token that it does not touch."""


class Sampler:
    """Draws abilities and operations in proportion to their running loss: what is learned makes room for what is not."""

    FLOOR, MEMORY = 0.03, 0.98

    def __init__(self, losses: dict[str, float] | None = None) -> None:
        self.losses = losses or dict.fromkeys((*BENCHMARKS, *(f"{o}.{m}" for o in OPERATIONS for m in MODALITIES)), 1.0)

    def draw(self, random: np.random.Generator, count: int) -> tuple[list[Example], list[str]]:
        """Returns about `count` examples, a third of them abilities, and what each of them asks for."""
        names = self._choose(random, {name: self.losses[name] for name in BENCHMARKS}, count // 3)
        examples = [ABILITIES[name](random) for name in names]
        losses = {name: sum(self.losses[f"{name}.{m}"] for m in MODALITIES) for name in OPERATIONS}
        while len(examples) + 2 * TOGETHER <= count:
            asked = self._choose(random, losses, TOGETHER)
            operations = [OPERATIONS[name] for name in asked]
            pairs = twins(random, operations, draw_symbols(random, *operations), spread_out=SPREAD_OUT)
            for name, pair in zip(asked, pairs, strict=True):
                examples += pair
                names += [f"{name}.{m}" for m in MODALITIES]
        return examples, names

    def _choose(self, random: np.random.Generator, losses: dict[str, float], count: int) -> list[str]:
        weights, options = self.FLOOR + np.array(list(losses.values())), list(losses)
        return [options[i] for i in random.choice(len(options), size=count, p=weights / weights.sum())]

    def update(self, names: Iterable[str], losses: Tensor) -> None:
        """Takes in the mean loss a token of every drawn example."""
        drawn: dict[str, list[float]] = {}
        for name, loss in zip(names, losses.tolist(), strict=True):
            drawn.setdefault(name, []).append(loss)
        for name, now in drawn.items():
            self.losses[name] = self.MEMORY * self.losses[name] + (1 - self.MEMORY) * float(np.mean(now))


class Losses(NamedTuple):
    """Of one batch."""

    answers: Tensor
    """Mean over answer tokens."""
    reading: Tensor
    """Mean over the image tokens of captioned images; 0 without."""
    by_row: Tensor
    """(B,) mean over each row's answer tokens, detached."""


def places(prints: Sequence[Print], side: int) -> Tensor:
    """Returns which of an image's `side` x `side` tokens each word touches, (side * side, U), bool."""
    edges = torch.arange(side) * SIDE / side
    boxes_U4 = torch.tensor([p.box for p in prints])
    columns, rows = (
        (edges[:, None] < boxes_U4[:, axis + 2]) & (edges[:, None] + SIDE / side > boxes_U4[:, axis]) for axis in (0, 1)
    )
    return (rows[:, None] & columns[None]).reshape(side * side, -1)


def reading_loss(
    features_NPD: Tensor, embedding_VD: Tensor, captions: Sequence[Sequence[int]], touched: Sequence[Tensor], blank: int
) -> Tensor:
    """Returns how far image tokens are from naming the captions' words, in order, with `blank` between them.

    A token names a word by lying at its embedding, so that the language model gets for print what it gets for written
    words: minus its log density in a Gaussian around that embedding, and minus the log probability that it belongs to no
    other word's. Each word takes one token, any after that of the word before, and rather one that it touches; the sum
    over all such places is one pass over the tokens, as in connectionist temporal classification (Graves et al., 2006)
    without its merging of repeats.
    """
    targets_NU = torch.full((len(captions), max(map(len, captions))), blank)
    outside_NPU = torch.zeros(len(captions), features_NPD.shape[1], targets_NU.shape[1])
    for n, (caption, touched_PU) in enumerate(zip(captions, touched, strict=True)):
        targets_NU[n, : len(caption)] = torch.tensor(caption)
        outside_NPU[n, :, : len(caption)] = FAR * ~touched_PU
    lengths_N = torch.tensor([len(caption) for caption in captions])
    scale = APART / (
        2 * embedding_VD[sorted({word for caption in captions for word in caption})].square().sum(-1).mean()
    )
    square_NPV = features_NPD.square().sum(-1, keepdim=True) - 2 * features_NPD @ embedding_VD.T
    density_NPV = -scale * (square_NPV + embedding_VD.square().sum(-1))
    logp_NPV = density_NPV + density_NPV.log_softmax(-1)
    empty_NP = logp_NPV[..., blank]
    named_NPU = logp_NPV.gather(2, targets_NU[:, None].expand(-1, logp_NPV.shape[1], -1)) + outside_NPU
    reached = torch.full((len(captions), targets_NU.shape[1] + 1), -1e4)  # log probability, first u words being named
    reached[:, 0] = 0
    for p in range(logp_NPV.shape[1]):
        stay = reached + empty_NP[:, p, None]
        reached = torch.cat([stay[:, :1], torch.logaddexp(stay[:, 1:], reached[:, :-1] + named_NPU[:, p])], 1)
    return -reached.gather(1, lengths_N[:, None]).mean() / features_NPD.shape[1]


def batch_losses(model: Any, processor: Any, rows: Sequence[Encoded], examples: Sequence[Example]) -> Losses:
    """Runs the model on encoded `examples`; an image that several of them share is looked at once."""
    images = {id(e.image): (row, e.prints) for row, e in zip(rows, examples, strict=True) if e.image is not None}
    numbers = {image: n for n, image in enumerate(images)}
    features_NPD = torch.zeros(0, processor.image_seq_length, model.config.text_config.hidden_size)
    reading = torch.zeros(())
    if images:
        pixels = np.concatenate([row.images["pixel_values"] for row, _ in images.values()])
        features_NPD = model.model.get_image_features(torch.from_numpy(pixels), return_dict=True).pooler_output
    printed = {n: prints for n, (_, prints) in enumerate(images.values()) if prints}
    if printed:
        captions = [processor.tokenizer.convert_tokens_to_ids([p.word for p in prints]) for prints in printed.values()]
        touched = [places(prints, math.isqrt(features_NPD.shape[1])) for prints in printed.values()]
        embedding_VD = model.get_input_embeddings().weight.detach()  # print comes to the words, not words to print
        blank = processor.tokenizer.convert_tokens_to_ids(NOTHING)
        reading = reading_loss(features_NPD[list(printed)], embedding_VD, captions, touched, blank)
    parts, by_row = [], torch.zeros(len(rows))
    for seen in (True, False):  # apart, as rows with images are twice as long
        chosen = [i for i, e in enumerate(examples) if (e.image is not None) == seen]
        if chosen:
            of_row = [numbers[id(examples[i].image)] for i in chosen] if seen else []
            losses, means = answer_losses(model, processor, [rows[i] for i in chosen], features_NPD[of_row])
            parts.append(losses)
            by_row[chosen] = means
    return Losses(torch.cat(parts).mean(), reading, by_row)


def answer_losses(model: Any, processor: Any, rows: Sequence[Encoded], features_NPD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss of every answer token, and its mean by row (B,), detached; with an image of each row, or none."""
    length = max(len(row.input_ids) for row in rows)
    ids_BT = torch.full((len(rows), length), processor.tokenizer.pad_token_id)
    labels_BT = torch.full((len(rows), length), IGNORED)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.input_ids)] = torch.from_numpy(row.input_ids)
        labels_BT[b, : len(row.labels)] = torch.from_numpy(row.labels)
    image_BT = (ids_BT == processor.image_token_id)[..., None]
    inputs_BTD = model.get_input_embeddings()(ids_BT).masked_scatter(image_BT, features_NPD)
    # Rows are padded on the right, where causal attention looks from no token that counts: no mask.
    hidden_BTD = model.model.language_model(inputs_embeds=inputs_BTD, use_cache=False).last_hidden_state
    asked_BT = labels_BT[:, 1:] != IGNORED
    logits = model.lm_head(hidden_BTD[:, :-1][asked_BT])
    losses = functional.cross_entropy(logits, labels_BT[:, 1:][asked_BT], reduction="none")
    sums = torch.zeros(len(rows)).index_add(0, asked_BT.nonzero()[:, 0], losses.detach())
    return losses, sums / asked_BT.sum(1)
