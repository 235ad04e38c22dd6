"""Claims of the documents that can be checked against the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from streams.audit.report import COUNTS
from streams.joiner.metrics import OUTCOME_NAMES
from tests.guaranteed import named_tests

ROOT = Path(__file__).parent.parent
FOLDERS = ("", "docs/**/", "benchmarks/", ".github/**/")
DOCUMENTS = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}*.md"))


@pytest.mark.parametrize(("document", "least"), [("docs/guarantees.md", 10), ("SECURITY.md", 5)])
def test_every_test_that_a_document_names_exists(document: str, least: int) -> None:
    """That it also runs and passes is checked by `tests/guaranteed.py`."""
    named = named_tests(document)
    source = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    defined = set(re.findall(r"def (test_\w+)\(", source))
    assert len(named) > least
    assert named <= defined, f"claimed and not there: {sorted(named - defined)}"


def test_every_guarantee_names_a_test() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|(.+)\|$", text, re.MULTILINE)[2:]
    assert len(rows) > 10
    assert not [row for row in rows if not re.search(r"`test_\w+`", row.rpartition("|")[2])]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(((?!http)[^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_counter_of_an_audit_and_of_the_joiner_is_explained() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for name in [*COUNTS, *OUTCOME_NAMES]:
        assert re.search(rf"[`\"]{name}[`\"]", operations), name


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = set(re.findall(r"\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in folder.glob("0*.md")}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "decisions").glob("0*.md")), ids=lambda p: p.name.removesuffix(".md")
)
def test_every_decision_has_the_same_sections_in_the_same_order(path: Path) -> None:
    sections = re.findall(r"^\*\*([A-Z][a-z ]+?)\.?\*\*", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert sections == ["Decision", "Why", "Alternatives", "Consequences", "Revisit if"]


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PICTURE = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()


def imported_by(file: str) -> set[str]:
    """Modules that a file names in its import statements, wherever they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def attributes_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_the_files_of_the_walk_exist() -> None:
    named = set(re.findall(r"`((?:streams|cortex_core)/[\w/]+\.py)`", ARCHITECTURE))
    assert len(named) > 15
    assert not [file for file in named if not (ROOT / file).is_file()]
    drawn = {box.attrib["data-file"] for box in PICTURE.iter() if "data-file" in box.attrib}
    assert drawn <= named, f"drawn and not told: {sorted(drawn - named)}"


def test_every_arrow_of_the_picture_is_an_import_or_a_topic() -> None:
    arrows = [a.attrib for a in PICTURE.iter() if a.tag.endswith("path") and "data-from" in a.attrib]
    assert len(arrows) > 15
    for arrow in arrows:
        writer, reader, via = arrow["data-from"], arrow["data-to"], arrow["data-via"]
        if via == "import":
            module = reader.removesuffix(".py").replace("/", ".")
            assert module in imported_by(writer), f"{writer} does not import {module}"
        else:
            assert via in attributes_of(writer), f"{writer} does not name the topic {via}"
            assert via in attributes_of(reader), f"{reader} does not name the topic {via}"
