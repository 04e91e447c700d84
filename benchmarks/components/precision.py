"""Answers under bf16 autocast against float32: same model, index and questions, retrieval included.

If the best answers of a question differ, both are scored in float32 over the float32 passages: how much less likely is
the answer that bf16 chose?
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rag_core.index.passage_index import PassageIndex
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import DecodingConfig
from rag_core.questions.questions import read_questions


def main() -> None:
    """Print the share of equal best answers, and the gaps in nats of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of `make demo`")
    parser.add_argument("--variant", choices=["sequence", "token"], default="token")
    parser.add_argument("--questions", type=int, default=500)
    options = parser.parse_args()
    model = RagModel.from_pretrained(options.run / f"rag-{options.variant}")
    index = PassageIndex.open(options.run / "index")
    rows = [row for name in ("test", "dev") for row in read_questions(options.run / f"data/{name}.jsonl")]
    questions = [row.question for row in rows][: options.questions]
    exact, rough = (
        model.answer(questions, index, decoding=DecodingConfig(max_new_tokens=20, precision=precision))
        for precision in ("float32", "bfloat16")
    )
    differ = [at for at in range(len(questions)) if exact[at].text != rough[at].text]
    gaps = []
    for at in differ:
        passages = [candidate.passage for candidate in exact[at].passages]
        log_priors = torch.tensor([[candidate.prior for candidate in exact[at].passages]]).log()
        with torch.inference_mode():
            best, chosen = (
                -model.reader.nll(
                    [questions[at]], [passages], log_priors, [answer.text], model.settings.variant or "token"
                ).item()
                for answer in (exact[at], rough[at])
            )
        gaps.append(best - chosen)
        print(f"{questions[at]}  float32: {exact[at].text}  bf16: {rough[at].text}  gap {gaps[-1]:.3f} nats")
    differences = [abs(a.log_prob - b.log_prob) for a, b in zip(exact, rough, strict=True) if a.text == b.text]
    print(
        f"RAG-{options.variant}, {len(questions)} questions: {1 - len(differ) / len(questions):.1%} same best answer; "
        f"largest gap of the others {max(gaps, default=0.0):.3f} nats; log-probabilities of the same answers apart by "
        f"{max(differences):.3f} nats at most, {sum(differences) / len(differences):.4f} on average"
    )


if __name__ == "__main__":
    main()
