"""The recipe's JSON schema, which editors use to complete and check a recipe."""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from finetune.recipe.adapter import LORA_FIELDS
from finetune.recipe.schema import Recipe

SCHEMA_FILE = "recipe.schema.json"
"""The schema's file name, beside a recipe."""

EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"
"""First line of a recipe, which gives the schema to the YAML language server (for example in VS Code)."""


class _Untitled(GenerateJsonSchema):
    """Generates schemas without titles, which would repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Return False: no key gets a title."""
        return False


def recipe_schema() -> JsonSchemaValue:
    """Return the JSON schema of a recipe file: with descriptions, and with `output` optional.

    The section `adapter` includes the fields of `peft.LoraConfig` that a recipe may set.
    """
    schema = Recipe.model_json_schema(schema_generator=_Untitled)
    schema["required"].remove("output")  # the file's name is the default
    adapter = schema["$defs"]["Adapter"]
    for field, (expected, _) in LORA_FIELDS.items():
        adapter["properties"][field] = {"description": f"peft.LoraConfig's {field}: {expected}."}
    adapter["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
