"""A decoder-only generator that reads chats: its likelihoods and answers are those of the conversation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rag_core.corpus.passages import Passage
from rag_core.errors import ConfigError
from rag_core.model.reader import DecodingConfig, GeneratorReader, load_generator
from rag_core.reading.prompt import PromptConfig
from tests.support.models.chat_tokenizers import ENDS, byte_level, chat_tokenizer

QUESTION, ANSWER = "which country is Lyon in?", "France"
LYON = Passage("1", "Lyon", "Lyon is a city in France.")
PROMPT = PromptConfig(template="chat", user="{text}\n{question}")
FAMILIES = ("chatml", "gemma", "qwen3", "llama2")


def _llama(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    # As in base models, the generation config knows another end than the chat's.
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).double().eval()


def _conversation(tokenizer: Any, answer: str | None) -> list[int]:
    messages = [{"role": "user", "content": f"{LYON.text}\n{QUESTION}"}]
    messages += [{"role": "assistant", "content": answer}] if answer is not None else []
    options = {"add_generation_prompt": answer is None, "enable_thinking": False, "return_dict": False}
    return list(tokenizer.apply_chat_template(messages, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likelihood_of_an_answer_is_that_of_the_conversations_tokens(family: str) -> None:
    tokenizer = chat_tokenizer(family)
    generator = _llama(tokenizer)
    reader = GeneratorReader(generator, tokenizer, PROMPT)
    start, end = len(_conversation(tokenizer, None)), tokenizer.convert_tokens_to_ids(ENDS[family])
    assert reader.end == end
    ids = _conversation(tokenizer, ANSWER)
    # Llama 2's template writes a space between the answer and its end, which ours leaves out.
    last = ids.index(end, start)
    spaces = 1 if family == "llama2" else 0
    ids = [*ids[: last - spaces], end]
    with torch.no_grad():
        log_probs = generator(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = -sum(log_probs[place - 1, ids[place]] for place in range(start, len(ids)))
        nll = reader.nll([QUESTION], [[LYON]], torch.zeros(1, 1), [ANSWER], "token")
    torch.testing.assert_close(nll, torch.stack([expected]), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_passage_is_answered_as_the_model_itself_continues_the_chat(family: str, tmp_path) -> None:
    tokenizer = chat_tokenizer(family)
    generator = _llama(tokenizer)
    prompt = PROMPT.model_copy(update={"max_answer_tokens": 8})
    reader = GeneratorReader(generator, tokenizer, prompt)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        reader.nll([QUESTION], [[LYON]], torch.zeros(1, 1), [ANSWER], "token").sum().backward()
        optimizer.step()
    decoding = DecodingConfig(num_beams=1, max_new_tokens=8, num_return_sequences=1, precision="float32")
    context = torch.tensor([_conversation(tokenizer, None)])
    own = generator.generate(context, do_sample=False, max_new_tokens=8, pad_token_id=0)[0, context.shape[1] :].tolist()
    assert own[-1] == reader.end
    (answer,) = reader.answer_from([QUESTION], [[LYON]], torch.zeros(1, 1), variant="token", decoding=decoding)
    assert answer.text == tokenizer.decode(own[:-1]).strip() == ANSWER
    # Whoever loads the parts gets the same end, although the tokenizer's own end is another.
    reader.save_pretrained(tmp_path)
    loaded = GeneratorReader(*load_generator(tmp_path), reader.prompt)
    assert (loaded.end, loaded.ends, loaded.prompt) == (reader.end, reader.ends, reader.prompt)
    (again,) = loaded.answer_from([QUESTION], [[LYON]], torch.zeros(1, 1), variant="token", decoding=decoding)
    assert again.text == ANSWER


def test_a_chat_that_is_asked_of_a_base_model_is_refused_before_any_work() -> None:
    tokenizer = byte_level(eos_token="</s>")
    with pytest.raises(ConfigError, match="has no chat template"):
        GeneratorReader(_llama(tokenizer), tokenizer, PROMPT)
    plain = PromptConfig(template="plain")
    assert GeneratorReader(_llama(tokenizer), tokenizer, plain).prompt.rendered is not None
