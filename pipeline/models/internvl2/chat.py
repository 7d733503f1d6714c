"""InternVL2's conversation format as a chat template.

Roles, separators and the default system message are those of `internvl_chat/internvl/conversation.py`
(https://github.com/OpenGVLab/InternVL). There is no line break between messages. Text beside an image stays as it was
written; where no white space follows an image, a line break is added, as the original code does behind an image that the
question does not place:

    <s><|im_start|>system\\n...<|im_end|><|im_start|>user\\n<IMG_CONTEXT>\\nWhat is this?<|im_end|><|im_start|>assistant\\n
"""

from dataclasses import dataclass

SYSTEM_MESSAGE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
"""InternVL2's system message in training: its makers, its name, and that it is a helpful and harmless assistant."""


@dataclass(frozen=True)
class Chat:
    """Markers of roles in one kind of conversation."""

    start: str
    """Opening of a message, with `ROLE` for the role."""
    end: str
    """Token that ends a message, and so an answer."""

    @property
    def first(self) -> str:
        """Token that every conversation starts with: the one that opens the system message."""
        opening = self.start.replace("ROLE", "system")
        return opening[: opening.index("|>") + 2]

    def template(self, begin: str, system: str = SYSTEM_MESSAGE) -> str:
        """Returns the Jinja template; `begin` starts the text, `system` is the system message of a conversation without one.

        A conversation starts with exactly the text of its generation prompt, and ends with `end`.
        """
        before, after = self.start.split("ROLE")
        return (
            f"{{{{ {begin!r} }}}}"
            "{% if not messages or messages[0]['role'] != 'system' %}"
            f"{{{{ {before + 'system' + after + system + self.end!r} }}}}"
            "{% endif %}"
            "{% for message in messages %}"
            f"{{{{ {before!r} + message['role'] + {after!r} }}}}{_CONTENT}{{{{ {self.end!r} }}}}"
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {before + 'assistant' + after!r} }}}}{{% endif %}}"
        )


_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>' }}"
    "{% set next = loop.nextitem | default(none) %}"
    "{% if next and (next['type'] != 'text' or next['text'][:1].strip()) %}{{ '\\n' }}{% endif %}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)

CHATML = Chat("<|im_start|>ROLE\n", "<|im_end|>")
PHI3 = Chat("<|ROLE|>\n", "<|end|>")

CHATS = {"internlm2-chat": CHATML, "Hermes-2": CHATML, "phi3-chat": PHI3}
"""Kinds of conversation by `template` in config.json."""
