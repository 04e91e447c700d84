"""A RAG model's settings: `ModelConfig` names the parts a model starts from; `ModelSettings` is saved with it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rag_core.embeddings.text_encoder import Pooling
from rag_core.model.adapters.adapter_files import GeneratorType
from rag_core.pretrained.model_source import pin_source, recorded_source
from rag_core.reading.likelihood import Variant
from rag_core.reading.prompt import PromptConfig, RenderedPrompt

KIND = "rag-model"
SETTINGS_FILE = "rag_model.json"
# The settings of a `ModelConfig` that name models.
PARTS = ("question_encoder", "generator")


class ModelConfig(BaseModel):
    """The parts that a RAG model starts from, and the settings that are saved with it."""

    model_config = ConfigDict(extra="forbid")

    question_encoder: str = Field(
        description="folder, hub name (org/model or org/model@REVISION), or package:NAME/FOLDER"
    )
    generator: str = Field(
        description="folder, .gguf file, hub name, package:NAME/FOLDER or package:NAME/FILE.gguf; or a folder of LoRA "
        "adapters"
    )
    generator_dtype: GeneratorType | None = Field(
        None,
        description="bfloat16: hold the generator's frozen matrices in it (with train.lora only); empty: float32, or as "
        "its adapters were trained",
    )
    pooling: Pooling | None = Field(None, description="pooling of the question encoder; empty: as its folder says")
    question_prompt: str | None = Field(
        None,
        description="put before every question for the question encoder, such as 'query: '; empty: as its folder says",
    )
    score_scale: float = Field(
        1.0, gt=0, description="doc_scores = score_scale × inner product; 1 for DPR, about 20 for unit vectors"
    )
    num_docs: int = Field(5, ge=1, description="K, passages per question")
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    trust_remote_code: bool = Field(
        False,
        description="run code that comes with the parts; this is not saved with the model",
    )

    def decisive(self, rendered: RenderedPrompt | None = None) -> dict[str, Any]:
        """The settings that affect the result of training, apart from the parts' weights.

        `rendered` is the prompt as the generator reads it, if it has a form of its own. It stands for the chat template,
        which lies in the generator's folder, but not among its weights.
        """
        unset = set() if self.question_prompt is not None else {"question_prompt"}
        unset |= set() if self.generator_dtype == "bfloat16" else {"generator_dtype"}
        prompted = self.model_copy(update={"prompt": self.prompt.model_copy(update={"rendered": rendered})})
        return prompted.model_dump(mode="json", exclude={*PARTS, "trust_remote_code"} | unset)

    def pinned(self) -> ModelConfig:
        """Return a copy that means the same in every worker: hub models with their commit, folders absolute."""
        return self.model_copy(update={part: pin_source(getattr(self, part)) for part in PARTS})

    def recorded(self) -> dict[str, str]:
        """The parts' names for manifests and MLflow."""
        return {part: recorded_source(getattr(self, part)) for part in PARTS}


class ModelSettings(BaseModel):
    """The contents of `rag_model.json`."""

    model_config = ConfigDict(extra="forbid")

    variant: Variant | None = None
    score_scale: float = 1.0
    num_docs: int = 5
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    document_encoder_fingerprint: str | None = None
