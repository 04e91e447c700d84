"""What DALM, FedRAG and FlashRAG compute on the example, as one JSON object per line.

`make peers` runs this module in `.venv/peers`, where these packages and the older ones that they need are installed. It
calls their own functions and imports nothing of ours.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.example import ANSWERS, CONTEXTS, DOC_SCORES, VOCAB_SIZE, llama_logits, tiny_llama


def dalm() -> dict[str, Any]:
    """DALM's loss of a batch of two questions: the first is ours, and the second one's passage is our passage 2.

    Their loss is a mean over the tokens of prompt and answer. The mask leaves our answer's, and the mean times their
    number is the sum.
    """
    from dalm.training.utils.train_utils import compute_marginalized_loss_from_logits

    nlls, gradients = [], []
    for answer in ANSWERS:
        ids = torch.tensor([context + answer for context in CONTEXTS])
        logits = tiny_llama()(ids).logits.detach()
        mask = torch.zeros_like(ids)
        mask[0, len(CONTEXTS[0]) :] = 1
        scores = torch.tensor([DOC_SCORES, DOC_SCORES], dtype=torch.float64, requires_grad=True)
        prompt_lengths = torch.full((2,), len(CONTEXTS[0]))
        nll = compute_marginalized_loss_from_logits(logits, ids, mask, scores, prompt_lengths) * len(answer)
        nlls.append(nll.item())
        gradients.append(torch.autograd.grad(nll, scores)[0][0, 0].item())
    return {"peer": f"DALM {version('indomain')}", "nlls": nlls, "gradients": gradients}


def fed_rag() -> dict[str, Any]:
    """FedRAG's probability of the answer given passage 1, and its retriever loss's gradient at the question encoder."""
    from fed_rag import RAGConfig, RAGSystem
    from fed_rag.data_collators.huggingface.lsr import DataCollatorForLSR
    from fed_rag.data_structures import KnowledgeNode
    from fed_rag.generators.huggingface import HFPretrainedModelGenerator
    from fed_rag.knowledge_stores.in_memory import InMemoryKnowledgeStore
    from fed_rag.loss.pytorch.lsr import LSRLoss
    from fed_rag.retrievers.huggingface.hf_sentence_transformer import HFSentenceTransformerRetriever

    os.environ["FEDRAG_SKIP_VALIDATION"] = "1"  # the check imports unsloth
    with tempfile.TemporaryDirectory() as folder:
        generator_folder, encoder_folder = save_models(Path(folder))
        generator = HFPretrainedModelGenerator(generator_folder, load_model_kwargs={"dtype": torch.float64})
        retriever = HFSentenceTransformerRetriever(model_name=encoder_folder)
    store = InMemoryKnowledgeStore()
    for context in CONTEXTS:
        text = words(context)
        vector = retriever.encode_context(text).flatten().tolist()
        store.load_node(KnowledgeNode(embedding=vector, node_type="text", text_content=text))
    nlls = [
        -generator.compute_target_sequence_proba(words(CONTEXTS[0]) + " ", words(answer)).log().item()
        for answer in ANSWERS
    ]
    rag_system = RAGSystem(
        generator=generator, retriever=retriever, knowledge_store=store, rag_config=RAGConfig(top_k=2)
    )
    collator = DataCollatorForLSR(rag_system=rag_system, prompt_template="{context} ", target_template="{response}")
    scores = collator([{"query": words(CONTEXTS[0]), "response": words(ANSWERS[0])}])
    LSRLoss()(scores["retrieval_scores"], scores["lm_scores"]).backward()
    assert retriever.encoder is not None
    reached = sum(parameter.grad is not None for parameter in retriever.encoder.parameters())
    gradient = "none" if not reached else f"{reached} tensors"
    return {"peer": f"FedRAG {version('fed-rag')}", "nlls": nlls, "gradients": [gradient, gradient]}


def flashrag() -> dict[str, Any]:
    """−log p of the answer under the distribution that FlashRAG's REPLUG decodes from, p(z|q) given as the scores."""
    module = flashrag_replug()
    doc_probs = torch.tensor(DOC_SCORES, dtype=torch.float64).softmax(0)
    nlls = []
    for answer in ANSWERS:
        logits_KTV = llama_logits(tiny_llama(), answer)
        nll = 0.0
        for t, token in enumerate(answer):
            merged_KV = module.REPLUGLogitsProcessor(doc_probs.clone())(None, logits_KTV[:, t])
            nll -= merged_KV[0].log_softmax(0)[token].item()
        nlls.append(nll)
    return {"peer": f"FlashRAG {version('flashrag-dev')}", "nlls": nlls, "gradients": ["–", "–"]}


def flashrag_replug() -> Any:
    """Their module, loaded alone: the package around it needs spaCy, Streamlit, OpenAI's client and others."""
    package = importlib.util.find_spec("flashrag")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "pipeline" / "replug_utils.py"
    spec = importlib.util.spec_from_file_location("replug_utils", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(ids: list[int]) -> str:
    """Token ids as text of the tokenizer that `save_models` writes."""
    return " ".join(f"w{number}" for number in ids)


def save_models(folder: Path) -> tuple[str, str]:
    """Save the tiny Llama and a tiny sentence encoder, each with a tokenizer of one token per word."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokens = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1")  # noqa: S106
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=VOCAB_SIZE, **sizes))
    for name, model in (("llama", tiny_llama()), ("bert", bert)):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    encoder = SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(16)], device="cpu")
    encoder.save(str(folder / "encoder"))
    return str(folder / "llama"), str(folder / "encoder")


if __name__ == "__main__":
    for compute in (dalm, fed_rag, flashrag):
        print(json.dumps(compute()), flush=True)
