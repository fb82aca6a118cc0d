"""The recipe's JSON schema, with which editors complete and check a recipe while it is written."""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from finetune.recipe.adapter import LORA_FIELDS
from finetune.recipe.schema import Recipe

SCHEMA_FILE = "recipe.schema.json"
"""The schema's file name, beside a recipe."""

EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"
"""First line of a recipe: it points the YAML language server, as in VS Code, to the schema."""


class _Untitled(GenerateJsonSchema):
    """Without titles, which would repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Leave the title of a key out."""
        return False


def recipe_schema() -> JsonSchemaValue:
    """Return the JSON schema of a recipe as it is written: with descriptions, and without `output`'s being required.

    LoRA's further fields are those of `peft.LoraConfig` that a recipe may set.
    """
    schema = Recipe.model_json_schema(schema_generator=_Untitled)
    schema["required"].remove("output")  # the file's name is the default
    adapter = schema["$defs"]["Adapter"]
    for field, (expected, _) in LORA_FIELDS.items():
        adapter["properties"][field] = {"description": f"peft.LoraConfig's {field}: {expected}."}
    adapter["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
