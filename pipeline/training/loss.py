"""What both stages compute: the loss on answer tokens, and the modes that a model computes it in."""

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.models.bases import Base
from pipeline.models.encoding import IGNORED


def answer_loss(model: Any, batch: dict[str, Any], *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Returns the cross-entropy of the answers' tokens: the mean, as transformers' models return for `labels`, or the sum."""
    logits_KV, tokens_K = answer_logits(model, batch)
    return functional.cross_entropy(logits_KV.float(), tokens_K, reduction=reduction)


def answer_logits(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the logits (K, V) from which the answers' tokens (K,) are predicted, row after row.

    Logits are computed only at the K tokens whose next one is learned. Over all T tokens they would be the largest tensor
    of all: 12 T V bytes with their gradient, 4.5 GB for a row of 4,096 tokens and InternVL-2's vocabulary V.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    next_BT = batch["labels"][:, 1:]
    learned_BT = next_BT != IGNORED
    kept_BT = functional.pad(learned_BT, (0, 1))  # the last token has no next one
    logits_KV = model(**inputs, logits_to_keep=kept_BT, use_cache=False).logits
    return logits_KV, next_BT[learned_BT]


def checkpoint_activations(base: Base) -> None:
    """Makes the language model compute activations again for the backward pass instead of keeping them.

    To be called when adapters are in place: PEFT, when it finds checkpointing on, makes all embeddings require gradients,
    those of image patches among them, and the vision tower would run backward. Only the re-entrant form needs that.
    """
    language = base.model.get_submodule(base.family.language)
    language.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    language.disable_input_require_grads()


def without_dropout(model: nn.Module) -> None:
    """Puts a model into evaluation mode, in which layers that are checkpointed go on being so.

    Transformers' layers look at their own `training` before they compute anything twice; what is inside them does not.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
