"""The prompt: a template that joins title, text and question, and the longest contexts and answers in tokens."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

# "bart" is the paper's template (Hugging Face's `title_sep` and `doc_sep`).
TEMPLATES = {
    "bart": "{title} / {text} // {question}",
    "t5": "question: {question} context: {title} {text}",
}


class PromptConfig(BaseModel):
    """How title, text and question become the generator's input. A short name is replaced by its template when set."""

    model_config = ConfigDict(extra="forbid")

    template: str = Field(
        TEMPLATES["bart"],
        description=f"{' or '.join(TEMPLATES)} (short for {' or '.join(TEMPLATES.values())}), or a template of your "
        "own that holds {text} and {question}; {title} is optional",
    )
    max_context_tokens: int = Field(256, ge=8, description="the passage's text is cut so that a context fits")
    max_answer_tokens: int = Field(32, ge=2, description="longest answer in training, end token included")

    @field_validator("template")
    @classmethod
    def _whole(cls, template: str) -> str:
        template = TEMPLATES.get(template, template)
        if template.count("{text}") != 1 or template.count("{question}") != 1 or template.count("{title}") > 1:
            raise ValueError(
                "the template must hold {text} and {question} once each, and {title} at most once, or be one of the "
                f"names {', '.join(TEMPLATES)}"
            )
        return template
