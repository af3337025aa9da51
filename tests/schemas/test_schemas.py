"""The documents for other teams are valid, complete, shipped, and agree with each other and with the settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import schemas
from stream_app.errors import SettingsError
from stream_app.settings import Settings
from stream_app.topics import wanted_topics

MESSAGES = ("click.schema.json", "recommendation.schema.json", "dead-letter-headers.schema.json")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def asyncapi() -> str:
    return files(schemas).joinpath("asyncapi.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MESSAGES)
def test_a_schema_is_valid_and_so_are_its_examples(name):
    schema = schemas.load(name)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)
    assert schema["examples"]
    for example in schema["examples"]:
        Draft202012Validator(schema).validate(example)


@pytest.mark.parametrize("name", MESSAGES)
def test_every_field_is_described_and_takes_a_named_type(name):
    for place, field in _fields(schemas.load(name)):
        assert len(field.get("description", "")) > 15, place
        assert isinstance(field["type"], str), place


@pytest.mark.parametrize("name", MESSAGES)
def test_fields_that_nobody_knows_yet_are_allowed(name):
    schema = schemas.load(name)
    Draft202012Validator(schema).validate(schema["examples"][0] | {"a field of the future": "x"})


@pytest.mark.parametrize("name", MESSAGES)
def test_every_required_field_is_defined_and_shown_in_the_first_example(name):
    schema = schemas.load(name)
    assert set(schema["required"]) <= schema["properties"].keys()
    assert set(schema["required"]) <= schema["examples"][0].keys()


def test_only_documents_that_exist_can_be_loaded():
    with pytest.raises(FileNotFoundError):
        schemas.load("no-such.schema.json")


def test_the_clicks_schema_names_the_default_size_limit():
    limit = Settings().max_click_bytes
    assert f"{limit:,} bytes" in schemas.load("click.schema.json")["description"]


def test_the_list_is_as_long_as_the_settings_allow():
    items = schemas.load("recommendation.schema.json")["properties"]["items"]
    Settings.from_environment({"STREAM_APP_TOP_K": str(items["maxItems"])})
    with pytest.raises(SettingsError, match=f"{items['maxItems']:,}"):
        Settings.from_environment({"STREAM_APP_TOP_K": str(items["maxItems"] + 1)})
    assert f"({Settings().top_k})" in items["description"]
    assert f"({Settings().recent_items})" in items["description"]


def test_the_asyncapi_document_names_the_topics_of_the_default_settings(asyncapi):
    wanted = {topic.name: topic for topic in wanted_topics(Settings())}
    del wanted[Settings().changelog_topic]
    addresses = re.findall(r"^    address: (\S+)$", asyncapi, re.MULTILINE)
    policies = re.findall(r"^          cleanup\.policy: \[(\S+)\]$", asyncapi, re.MULTILINE)
    assert dict(zip(addresses, policies, strict=True)) == {name: topic.policies[0] for name, topic in wanted.items()}
    assert re.findall(r"max\.message\.bytes: (\d+)", asyncapi) == [
        wanted["clicks-dead-letter"].configs["max.message.bytes"]
    ]
    assert re.findall(r"^        partitions: (\d+)$", asyncapi, re.MULTILINE) == [str(Settings().partitions)]


def test_every_reference_of_the_asyncapi_document_leads_somewhere(asyncapi):
    references = set(re.findall(r"\$ref: '(.*)'", asyncapi))
    assert {name for name in references if name.startswith("./")} == {f"./{name}" for name in MESSAGES}
    for pointer in references - {f"./{name}" for name in MESSAGES}:
        assert _leads_somewhere(asyncapi, pointer), pointer


def test_the_wheel_carries_every_document(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    documents = {f"schemas/{path.name}" for path in (ROOT / "schemas").iterdir() if path.suffix in {".json", ".yaml"}}
    assert len(documents) == 5
    assert documents <= shipped


def test_json_documents_have_no_key_twice():
    for name in (*MESSAGES, "user-state.json"):
        text = files(schemas).joinpath(name).read_text(encoding="utf-8")
        json.loads(text, object_pairs_hook=_refuse_repeated_keys)


def _fields(schema: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in schema.get("properties", {}).items():
        yield f"{place}/{name}", field
        yield from _fields(field, f"{place}/{name}")
        yield from _fields(field.get("items", {}), f"{place}/{name}/items")


def _leads_somewhere(text: str, pointer: str) -> bool:
    """Whether the keys of a JSON pointer such as #/channels/clicks stand below each other, two spaces deeper each."""
    for depth, key in enumerate(pointer.removeprefix("#/").split("/")):
        found = re.search(rf"^{'  ' * depth}{re.escape(key)}:", text, re.MULTILINE)
        if not found:
            return False
        rest = text[found.end() :]
        end = re.search(rf"^{'  ' * depth}\S", rest, re.MULTILINE)  # the next key of the same depth
        text = rest[: end.start()] if end else rest
    return True


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    assert len(keys) == len(set(keys)), keys
    return dict(pairs)
