"""One question, two passages: −log p of two answers and its gradient, by hand, by us, and by the installed peers.

    python -m benchmarks.peers.one_example    # Hugging Face RAG; with `make peers` also DALM, FedRAG and FlashRAG

"By hand" is the definition in plain Python floats, its gradient a central difference. `docs/peers.md` shows the
printed table and says what the differences mean.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.peers.example import (
    ANSWERS,
    CONTEXTS,
    DOC_SCORES,
    VOCAB_SIZE,
    llama_logits,
    tiny_llama,
    with_seeded_weights,
)
from rag_core import rag_sequence_nll, rag_token_nll

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(os.environ.get("RAG_PEERS") or Path(sys.prefix) / "peers/bin/python")
START = 2  # the decoder's start token, BART's
OURS: dict[str, Callable[..., Tensor]] = {"RAG-Sequence": rag_sequence_nll, "RAG-Token": rag_token_nll}


class Row(NamedTuple):
    """One implementation. Per answer: −log p in nats, and its derivative by passage 1's score (or why there is none)."""

    computes: str
    who: str
    nlls: list[float]
    gradients: list[float | str]

    def as_line(self) -> str:
        """The row in Markdown."""
        cells = [self.computes, self.who]
        for nll, gradient in zip(self.nlls, self.gradients, strict=True):
            cells += [f"{nll:.3f}", gradient if isinstance(gradient, str) else f"{gradient + 0.0:+.3f}"]
        return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    print("| computes | who | 1 token: nll | gradient | 3 tokens: nll | gradient |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows(PEERS if PEERS.exists() else None):
        print(row.as_line())
    if not PEERS.exists():
        print(f"DALM, FedRAG and FlashRAG are not in {PEERS.parent.parent}: `make peers` installs and shows them.")


def rows(peers: Path | None) -> Iterator[Row]:
    """The table's rows. Those of peers that have their own environment need its Python."""
    bart = tiny_bart()
    bart_logits = [teacher_forced_logits(bart, answer) for answer in ANSWERS]
    for variant in OURS:
        yield by_hand(f"{variant}, BART", variant, bart_logits)
        yield ours(f"{variant}, BART", variant, bart_logits)
        yield hugging_face(f"{variant}, BART", variant, bart)
    llama = tiny_llama()
    logits = [llama_logits(llama, answer) for answer in ANSWERS]
    for variant in OURS:
        yield by_hand(f"{variant}, Llama", variant, logits)
        yield ours(f"{variant}, Llama", variant, logits)
    if peers is None:
        return
    dalm, fed_rag, flashrag = (Row("", *record.values()) for record in run_peers(peers))
    yield dalm._replace(computes="p(z₁) times p(token given z₁), at every token")
    alone = [-sum(answer_log_probs(*pair)[0]) for pair in zip(logits, ANSWERS, strict=True)]
    yield Row("p(answer given z₁)", "by hand", alone, ["–", "–"])
    yield fed_rag._replace(computes="p(answer given z₁), for its retriever's loss")
    yield flashrag._replace(computes="softmax of Σ p(z) · logits, at every token")


def by_hand(computes: str, variant: str, logits: list[Tensor]) -> Row:
    """The paper's formulas, section 2.1, summed over the passages one by one."""

    def nll(scores: list[float], number: int) -> float:
        log_norm = math.log(sum(math.exp(score) for score in scores))
        weights = [math.exp(score - log_norm) for score in scores]
        log_probs_KT = answer_log_probs(logits[number], ANSWERS[number])
        if variant == "RAG-Sequence":
            return -math.log(sum(w * math.exp(sum(row)) for w, row in zip(weights, log_probs_KT, strict=True)))
        tokens = zip(*log_probs_KT, strict=True)
        return -sum(math.log(sum(w * math.exp(x) for w, x in zip(weights, token, strict=True))) for token in tokens)

    first, *others = DOC_SCORES
    step = 1e-5
    gradients: list[float | str] = [
        (nll([first + step, *others], number) - nll([first - step, *others], number)) / (2 * step)
        for number in range(len(ANSWERS))
    ]
    return Row(computes, "by hand", [nll(DOC_SCORES, number) for number in range(len(ANSWERS))], gradients)


def answer_log_probs(logits_KTV: Tensor, answer: list[int]) -> list[list[float]]:
    """log p(a_t | q, z, a_<t) for each passage and token, in plain floats."""
    return [
        [row[token] - math.log(sum(map(math.exp, row))) for row, token in zip(rows_TV, answer, strict=True)]
        for rows_TV in logits_KTV.tolist()
    ]


def ours(computes: str, variant: str, logits: list[Tensor]) -> Row:
    """`rag_sequence_nll` or `rag_token_nll`."""
    values = []
    for logits_KTV, answer in zip(logits, ANSWERS, strict=True):
        scores = torch.tensor([DOC_SCORES], dtype=torch.float64, requires_grad=True)
        values.append(with_gradient(OURS[variant](logits_KTV[None], scores, torch.tensor([answer])), scores))
    return row_of(computes, "rag-pipeline", values)


def hugging_face(computes: str, variant: str, bart: Any) -> Row:
    """The loss of `RagSequenceForGeneration` or `RagTokenForGeneration` around the same generator."""
    import transformers

    dpr = transformers.DPRConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    encoder = transformers.DPRQuestionEncoder(dpr)
    config = transformers.RagConfig.from_question_encoder_generator_configs(dpr, bart.config, n_docs=len(CONTEXTS))
    kind = {"RAG-Sequence": "RagSequenceForGeneration", "RAG-Token": "RagTokenForGeneration"}[variant]
    model = getattr(transformers, kind)(config=config, question_encoder=encoder, generator=bart).eval()
    ids = torch.tensor(CONTEXTS)
    values = []
    for answer in ANSWERS:
        scores = torch.tensor([DOC_SCORES], dtype=torch.float64, requires_grad=True)
        loss = model(
            context_input_ids=ids,
            context_attention_mask=torch.ones_like(ids),
            doc_scores=scores,
            labels=torch.tensor([[START, *answer]]),
        ).loss
        values.append(with_gradient(loss, scores))
    return row_of(computes, f"Transformers {transformers.__version__}", values)


def run_peers(python: Path) -> list[dict[str, Any]]:
    """What `installed_peers.py` prints in the peers' environment."""
    command = [str(python), "-W", "ignore", "-m", "benchmarks.peers.installed_peers"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def tiny_bart() -> Any:
    """An encoder-decoder with random weights. Padding is 1, as in the released BART models."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCAB_SIZE,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        forced_eos_token_id=None,
        tie_word_embeddings=False,
    )
    return with_seeded_weights(BartForConditionalGeneration(config), spread=0.6)


def teacher_forced_logits(bart: Any, answer: list[int]) -> Tensor:
    """Logits of shape (K, T, V) of an answer's tokens."""
    decoder_input_ids = torch.tensor([[START, *answer[:-1]]] * len(CONTEXTS))
    with torch.no_grad():
        logits_KTV: Tensor = bart(input_ids=torch.tensor(CONTEXTS), decoder_input_ids=decoder_input_ids).logits
    return logits_KTV


def with_gradient(nll: Tensor, scores_1K: Tensor) -> tuple[float, float]:
    """The value, and its derivative by the first passage's score."""
    (gradient_1K,) = torch.autograd.grad(nll.sum(), scores_1K)
    return nll.item(), gradient_1K[0, 0].item()


def row_of(computes: str, who: str, values: list[tuple[float, float]]) -> Row:
    """A row of (nll, gradient) per answer."""
    return Row(computes, who, [nll for nll, _ in values], [gradient for _, gradient in values])


if __name__ == "__main__":
    main()
