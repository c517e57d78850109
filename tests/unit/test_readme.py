"""What the documents say is true: links lead somewhere, the example runs."""

import re
import subprocess
import sys

import pytest

DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_into_the_repository_leads_to_a_file(repository, name):
    links = re.findall(r"\]\(([^)]+)\)", (repository / name).read_text(encoding="utf-8"))
    inside = [link for link in links if not link.startswith(("http://", "https://", "#"))]
    missing = [link for link in inside if not (repository / link.split("#")[0]).exists()]
    assert not missing
    assert "@@" not in (repository / name).read_text(encoding="utf-8")


def test_files_named_in_the_documents_exist(repository):
    for name in DOCUMENTS:
        text = (repository / name).read_text(encoding="utf-8")
        named = re.findall(
            r"\b((?:bdtrain|launchers|tools|configs|kernels|tests)/[\w/.-]+\.(?:py|yaml|md|json))\b", text
        )
        missing = [path for path in named if not (repository / path).exists()]
        assert not missing, name


def test_python_example_of_the_readme_trains(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", example],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loss = float(re.search(r"loss ([\d.]+) nats", done.stdout).group(1))
    assert 0 < loss < 6
