"""The documents name files, configs, commands and pages that exist."""

import re
from pathlib import Path

import pytest

from solo_d2 import __main__ as front
from solo_d2 import get_config_file, list_models

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.md", "docs/*.md", "configs/*/README.md", "solo_d2/models/*/README.md")
    for path in REPOSITORY.glob(pattern)
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name):
    path = REPOSITORY / name
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("#"):
            assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_name_verbs_and_configs(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for block in re.findall(r"```\n(.*?)```", text, re.DOTALL):
        for verb in re.findall(r"^solo-d2 ([\w-]+)", block, re.MULTILINE):
            assert verb in front.VERBS
        for config in re.findall(r"[\w./-]+\.yaml", block):
            get_config_file(config)  # raises where there is none


def test_the_readme_is_short_and_links_every_page_with_weights():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    pages = {model.weights_page for model in list_models()} - {None}
    assert pages and all(f"({page})" in text for page in pages)
