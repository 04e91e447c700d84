"""Small byte-level BPE tokenizers with chat templates in the style of released models.

Each template is short, and has the one habit of its family that matters here: a system text of its own, the date, no
system turn, a thinking switch, a space before the answer, a start token that the tokenizer adds, too.
"""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from transformers import PreTrainedTokenizerFast

LINES = [
    "Lyon: Lyon is a city in France. The Rhone flows through it.",
    "Question: which country is Lyon in? Answer: France",
    "system user assistant model Cork Oslo Norway Paris",
] * 4

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "<pad>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
)
# Added tokens that are not special, as in Qwen3's tokenizer: a tag that the template writes, and white space.
ADDED = ("<think>", "</think>", "\n\n\n")

_CHATML_TURN = "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
CHAT_TEMPLATES = {
    "chatml": (
        "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
        "{%- endif %}{%- for message in messages %}" + _CHATML_TURN + "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "llama3": (
        "{{- bos_token }}{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- else %}"
        "{%- set date = '26 Jul 2024' %}{%- endif %}"
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content|trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n' + system + '<|eot_id|>' }}"
        "{%- for message in messages %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
        "{{- message.content|trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    "gemma": (
        "{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}"
        "{%- endif %}{%- for message in messages %}"
        "{%- set role = 'model' if message.role == 'assistant' else message.role %}"
        "{{- '<start_of_turn>' + role + '\n' + message.content|trim + '<end_of_turn>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
    ),
    "qwen3": (
        "{%- for message in messages %}{%- if message.role == 'assistant' and loop.last %}"
        "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content + '<|im_end|>\n' }}{%- else %}"
        + _CHATML_TURN
        + "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}"
    ),
    "llama2": (
        "{{- bos_token }}{%- if messages[0].role == 'system' %}"
        "{%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{%- set messages = messages[1:] %}"
        "{%- else %}{%- set system = '' %}{%- endif %}{%- for message in messages %}{%- if message.role == 'user' %}"
        "{{- '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}"
        "{%- else %}{{- ' ' + message.content + ' ' + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "r1": (
        "{{- bos_token }}{%- for message in messages %}{{- '<|start|>' + message.role + '<|message|>' }}"
        "{{- message.content }}{%- if message.role == 'assistant' %}{{- eos_token }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant<|message|><think>\n' }}{%- endif %}"
    ),
    "harmony": (
        "{%- for message in messages %}{%- if message.role == 'assistant' %}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}{%- else %}"
        "{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
    ),
}
# What ends a turn of the assistant.
ENDS = {
    **{"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "qwen3": "<|im_end|>"},
    **{"llama2": "</s>", "r1": "<eos>", "harmony": "<|return|>"},
}
_NAMED = {
    "chatml": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama2": {"bos_token": "<s>", "eos_token": "</s>"},
    "r1": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "harmony": {"eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
}


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; one with a start token adds it before every text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(LINES, trainer)
    inner.add_tokens(list(ADDED))
    if start := options.get("bos_token"):
        inner.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, inner.token_to_id(start))]
        )
    options = {"pad_token": options.get("eos_token", "<pad>"), "clean_up_tokenization_spaces": False} | options
    return PreTrainedTokenizerFast(tokenizer_object=inner, **options)


def metaspace(**options: Any) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer that puts a space before a text that stands alone, as Llama 2's does."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = MetaspaceDecoder(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=[*string.printable, *"问题：答案"],
        show_progress=False,
    )
    inner.train_from_iterator(LINES, trainer)
    named = {"unk_token": "<unk>", "pad_token": "</s>", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named, **options)


def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the chat template of CHAT_TEMPLATES."""
    tokenizer = byte_level(**_NAMED[family])
    tokenizer.chat_template = CHAT_TEMPLATES[family]
    return tokenizer
