"""What the README shows and links to is what lies in the repository. Runs nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONVERT = ROOT / "examples" / "convert"


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_shown_conversion_is_the_difference_of_the_two_files() -> None:
    (shown,) = code_blocks("diff")
    lines = {sign: [line[1:] for line in shown.splitlines() if line.startswith(sign)] for sign in "-+"}
    before, after = ((CONVERT / name).read_text().splitlines() for name in ("before.py", "after.py"))
    assert len(lines["-"]) > 10 and len(lines["+"]) > 5
    assert [line for line in lines["-"] if line not in before or line in after] == []
    assert [line for line in lines["+"] if line not in after or line in before] == []


def test_the_converted_loop_is_about_sixty_lines() -> None:
    assert all(len((CONVERT / name).read_text().splitlines()) <= 65 for name in ("before.py", "after.py"))


def test_the_shown_configuration_is_the_one_of_the_converted_loop() -> None:
    (shown,) = code_blocks("json")
    assert json.loads(shown) == json.loads((CONVERT / "ds_config.json").read_text())


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_option_of_the_demo_that_is_shown_exists() -> None:
    script = (ROOT / "examples" / "gpt" / "train.py").read_text()
    shown = set(re.findall(r"--(?:minutes|data_path|size)\b", README))
    assert len(shown) == 3
    assert all(f'"{option}"' in script for option in shown)
