"""What the tests of planning plan: a recipe for the 9B, and what is trained of it."""

from finetune.recipe.schema import Recipe
from modeling.shapes import IDEFICS_9B
from modeling.towers import TOWERS

LORA = {"cross_attention": "lora", "decoder": "lora", "gates": "full", "added_tokens": "full"}
FULL = dict.fromkeys(TOWERS, "full")
INSTRUCT_9B = {**IDEFICS_9B, "additional_vocab_size": 3}
GIB = 2**30
MATRICES_80B = {"cross_attention": "lora", "decoder": "lora"}


def recipe_of(**sections):
    document = {
        "model": {"base": "HuggingFaceM4/idefics-9b", **LORA},
        "data": {"sources": [{"format": "messages", "path": "nowhere.jsonl"}], "max_length": 512},
        "training": {"steps": 10, "row_tokens": 2048, "row_images": 8, "tokens_per_step": 8192},
        "output": "run",
    }
    for name, section in sections.items():
        document[name] = {**document.get(name, {}), **section}
    return Recipe.model_validate(document)
