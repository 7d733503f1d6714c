"""Converts the original tokenizer to the tokenizers library, without running the code that comes with it.

- `tokenizer.json`: as it is.
- `tokenizer.model` (InternLM2, Phi-3, Yi): a sentencepiece BPE model. Its scores become ranks of merges.
- `vocab.json` and `merges.txt` (Qwen2): byte-level BPE.

Added tokens keep their numbers; those of InternLM2 take the places of unused pieces. The result knows the names that the
processor asks for, pads on the left, and ends an answer with the token that ends a message. Nothing is put before a text
by itself: the chat template begins with the token that starts a text, where the original tokenizer put one, and with the
space that some put behind it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from pipeline.models.internvl2.chat import SYSTEM_MESSAGE, Chat
from pipeline.models.internvl2.source import ConversionError, SourceFolder

PROCESSOR_TOKENS = {
    **{"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
    "video_token": "<quad>",
}
"""Special tokens by the names that processors use. transformers' own needs a video token; it must be in the vocabulary already,
since the model has no embedding for a new one."""
BPE, NORMAL, USER_DEFINED = 2, 1, 4
"""Numbers of sentencepiece's format: kind of model, kinds of pieces."""


def convert_tokenizer(source: SourceFolder, chat: Chat, system: str = SYSTEM_MESSAGE) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of an original folder with its chat template; raises ConversionError where it is incomplete.

    `system` is the system message of a conversation that has none.
    """
    settings = source.json("special_tokens_map.json", required=False) | source.json("tokenizer_config.json")
    added = _added_tokens(source, settings)
    backend, begins = _backend(source.folder, settings, added)
    for number, token in sorted(added.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != number:
            raise ConversionError(
                f"{source.folder / 'tokenizer_config.json'}: added token {token.content!r} is to be number {number}, but the "
                f"vocabulary makes it {backend.token_to_id(token.content)}; take all tokenizer files from one release"
            )
    for name in (*PROCESSOR_TOKENS.values(), chat.end):
        if backend.token_to_id(name) is None:
            raise ConversionError(f"{source.folder / 'tokenizer_config.json'}: no token {name!r}; is it InternVL2's?")
    bos, unk, eos = (_content(settings.get(f"{name}_token")) for name in ("bos", "unk", "eos"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        unk_token=unk,
        eos_token=chat.end,
        pad_token=_content(settings.get("pad_token")) or eos,
        add_bos_token=False,
        add_eos_token=False,
        padding_side="left",
        extra_special_tokens=PROCESSOR_TOKENS,
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length"),
        model_input_names=["input_ids", "attention_mask"],
    )
    begin = bos if begins and bos else ""
    if not (source.folder / "tokenizer.json").is_file() and _leads_with_space(settings, chat.first):
        begin += " "
    tokenizer.chat_template = chat.template(begin, system)
    return tokenizer


def _leads_with_space(settings: Mapping[str, Any], first: str) -> bool:
    """Whether the original tokenizer puts a space before a text that starts with the token `first`.

    Llama's does since `legacy: false`, and takes it away again before a token that has a name (`bos_token`, ...) or is one of
    the `additional_special_tokens`; Phi-3's `<|system|>` is neither.
    """
    if settings.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast") or settings.get("legacy", True):
        return False
    named = [value for name, value in settings.items() if name.endswith("_token") and value]
    special = {_content(token) for token in (*named, *(settings.get("additional_special_tokens") or ()))}
    return settings.get("add_prefix_space") is not False and first not in special


def _content(token: Any) -> str | None:
    """Returns the text of a token, which settings hold as a string or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _added_tokens(source: SourceFolder, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    numbers = source.json("added_tokens.json", required=False)
    added = {number: AddedToken(content, special=True, normalized=False) for content, number in numbers.items()}
    for number, token in settings.get("added_tokens_decoder", {}).items():
        flags = {
            key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in token
        }
        added[int(number)] = AddedToken(token["content"], **flags)
    return added


def _backend(folder: Path, settings: Mapping[str, Any], added: dict[int, AddedToken]) -> tuple[Tokenizer, bool]:
    """Returns the vocabulary and its rules, and whether the original tokenizer starts every text with `bos_token`."""
    if (file := folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(file))
        begins = backend.encode("").ids == [backend.token_to_id(_content(settings.get("bos_token")) or "")]
        return backend, begins
    if (file := folder / "tokenizer.model").is_file():
        # Llama's tokenizer of today puts no space before text behind a special token, and all text of a chat is behind one.
        prefix = settings.get("legacy", True) is not False
        return from_sentencepiece(file, added, prefix=prefix), settings.get("add_bos_token", True)
    files = folder / "vocab.json", folder / "merges.txt"
    if all(file.is_file() for file in files):
        vocabulary, merges = map(str, files)
        return Qwen2Tokenizer(vocab=vocabulary, merges=merges).backend_tokenizer, settings.get("add_bos_token", False)
    raise ConversionError(
        f"{folder}: no tokenizer.json, no tokenizer.model, no vocab.json with merges.txt; download them"
    )


def from_sentencepiece(file: Path, added: dict[int, AddedToken], *, prefix: bool) -> Tokenizer:
    """Returns a sentencepiece BPE model as a Tokenizer: identical pieces, merges, byte fallback and treatment of spaces.

    sentencepiece merges the two neighbours whose union scores best, so the rank of a merge is that of its union's score
    (https://github.com/google/sentencepiece, src/bpe_model.cc). `added` tokens take the place of the pieces with their
    numbers; the model's user-defined symbols are added to them. `prefix`: whether text behind a special token gets the space
    in front that the model asks for. Raises ConversionError where the file is no BPE model.
    """
    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ConversionError(f"{file}: not a sentencepiece model ({error}); download it again") from None
    if model.trainer_spec.model_type != BPE:
        raise ConversionError(f"{file}: a sentencepiece model, but not of BPE; is it InternVL2's?")
    for number, piece in enumerate(model.pieces):
        if piece.type == USER_DEFINED:
            added.setdefault(number, AddedToken(piece.piece, special=False, normalized=False))
    names = [added[number].content if number in added else piece.piece for number, piece in enumerate(model.pieces)]
    bpe = models.BPE(
        {name: number for number, name in enumerate(names)},
        _merges(model.pieces),
        unk_token=names[model.trainer_spec.unk_id],
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )
    tokenizer = Tokenizer(bpe)
    rules, steps = model.normalizer_spec, list[normalizers.Normalizer]()
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix := prefix and rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return tokenizer


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Returns all pairs of pieces whose union is a piece, best score first."""
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    pairs = [
        (-score, union[:cut], union[cut:])
        for union, score in scores.items()
        for cut in range(1, len(union))
        if union[:cut] in scores and union[cut:] in scores
    ]
    pairs.sort(key=lambda pair: pair[0])
    return [(left, right) for _, left, right in pairs]
