"""Faults in reading models from files: GGUF."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

CACHE, CONVERSION = "rag_core/pretrained/gguf/cache.py", "rag_core/pretrained/gguf/conversion.py"
CONFIGURATION = "rag_core/pretrained/gguf/configuration.py"
FILES, FAMILIES = "tests/pretrained/gguf/test_folder.py", "tests/pretrained/gguf/test_families.py"
REFUSALS = "tests/pretrained/gguf/test_refusals.py"

MODEL_SOURCES = (
    Mutant(
        "a GGUF file known by its path",
        CACHE,
        "_known_content[place] = sha256_of_file(file)",
        '_known_content[place] = f"{abs(hash(place[0])):064x}"',
        FILES,
    ),
    Mutant(
        "damaged copies of a GGUF file used",
        CACHE,
        "check_content=folder not in _checked",
        "check_content=False",
        FILES,
    ),
    Mutant("two processes dequantise at once", CACHE, "with reserved(folder, math.inf):", "if True:", REFUSALS),
    Mutant("weights left over in a GGUF file", CONVERSION, "if read != expected:", "if read > expected:", REFUSALS),
    Mutant("weights missing in a GGUF file", CONVERSION, "    if missing:\n", "    if False:\n", REFUSALS),
    Mutant(
        "code of a hub's kernels run", CONVERSION, "if source.architecture in GGUF_ARCHS and", "if False and", REFUSALS
    ),
    Mutant(
        "digits of a GGUF file's tokenizer not split", CONVERSION, "if way in SPLIT_DIGITS:", "if way in ():", FILES
    ),
    Mutant(
        "end of turn of a GGUF file forgotten",
        CONVERSION,
        'for end in (*ends, source.metadata.get("tokenizer.ggml.eot_token_id")) if',
        "for end in ends if",
        FILES,
    ),
    Mutant(
        "files beside a GGUF file read",
        CONVERSION,
        'yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}',
        'yield {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}',
        FILES,
    ),
    Mutant(
        "window of a GGUF file ignored",
        CONFIGURATION,
        '    "attention.sliding_window": "sliding_window",\n',
        "",
        FAMILIES,
    ),
    Mutant(
        "scale of Gemma's scores ignored",
        CONFIGURATION,
        "if source.architecture in LAYERS_OF_27B:",
        "if False:",
        FAMILIES,
    ),
    Mutant(
        "Llama 3's positions not stretched", CONFIGURATION, "    if factors is not None:\n", "    if False:\n", FAMILIES
    ),
    Mutant("T5's activation of a GGUF file ignored", CONFIGURATION, 'in ("t5", "umt5")', "in ()", FAMILIES),
)
