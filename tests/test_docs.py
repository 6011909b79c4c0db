"""The README and the pages of docs/ do not rot: what they name exists, and every command in them could start."""

import importlib.util
import pathlib
import re
import shlex
import subprocess

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from dar_jax.config import RIVALS, VARIANTS, default
from dar_jax.errors import UserError
from dar_jax.validate import validate

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def commands():
    """The shell commands of all bash blocks, as lists of words, each command once."""
    found = {}
    for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found |= {tuple(shlex.split(part)): None for part in line.split("&&")}
    return [list(words) for words in found if words]


def launches():
    return [words for words in commands() if words[0].startswith("launch/")]


def trainings():
    """The flags of every command that trains, by the door or by a launch script."""
    launched = [words[words.index("--") + 1 :] for words in launches() if "--" in words]
    return [words[3:] for words in commands() if words[:3] == ["python", "-m", "dar_jax.main"]] + launched


def programs():
    """Every other command of ours, as the file that runs and its arguments."""
    for words in commands():
        if words[:2] == ["python", "-m"] and words[2].startswith("dar_jax.") and words[2] != "dar_jax.main":
            yield ROOT / f"{words[2].replace('.', '/')}.py", words[3:]
        elif words[0] == "python" and words[1].endswith(".py"):
            yield ROOT / words[1], words[2:]


def layout():
    """The paths of the tree in docs/layout.md."""
    block = (ROOT / "docs" / "layout.md").read_text().split("```text\n")[1].split("```")[0]
    parents = []  # (indentation, folder)
    for line in block.splitlines():
        name = line.split()[0]
        indentation = line.index(name)
        parents = [parent for parent in parents if parent[0] < indentation]
        yield "".join(folder for _, folder in parents) + name
        if name.endswith("/"):
            parents.append((indentation, name))


def test_layout_is_the_tree():
    paths = list(layout())
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"docs/layout.md names {missing}"
    found = [path for folder in ("dar_jax", "benchmarks", "launch") for path in (ROOT / folder).rglob("*.*")]
    files = {str(path.relative_to(ROOT)) for path in found if path.suffix in (".py", ".sh", ".txt")}
    absent = sorted(path for path in files - set(paths) if not path.endswith("__init__.py"))
    assert not absent, f"docs/layout.md lacks {absent}"


def test_readme_is_short_and_names_the_index_of_the_pages():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    assert "](docs/README.md)" in readme
    index = (ROOT / "docs" / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == {page.name for page in PAGES} - {"README.md"}


def test_programs_exist():
    named = set(re.findall(r"python -m (dar_jax\.\w+)", TEXT))
    assert {"dar_jax.main", "dar_jax.sample", "dar_jax.plan"} <= named
    assert not [name for name in named if importlib.util.find_spec(name) is None]
    scripts = set(re.findall(r"\b((?:benchmarks|docs|launch|studies)/\w+\.(?:py|sh))\b", TEXT))
    assert len(scripts) > 5 and not [path for path in scripts if not (ROOT / path).exists()]


@pytest.mark.parametrize("words", trainings(), ids=" ".join)
def test_training_command_gives_a_valid_config(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["main", *words]
    monkeypatch.setattr("sys.argv", words)  # config_flags looks there for overrides
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    assert values(words) == words[:1]  # nothing but flags, all of them known
    validate(config.value)
    assert values.workdir


@pytest.mark.parametrize("words", launches(), ids=" ".join)
def test_launch_command_is_understood(words, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)  # else it is inside a job, and says srun
    result = subprocess.run([words[0], "--dry_run", *words[1:]], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0 and result.stdout.startswith(("gcloud ", "sbatch ")), result.stderr


@pytest.mark.parametrize(("path", "words"), programs(), ids=lambda part: getattr(part, "name", None) or " ".join(part))
def test_options_exist(path, words):
    # The text is read, because importing two doors would define --workdir twice.
    text = path.read_text()
    for name in ("step_time", "study"):  # a script that shares the flags of another
        if re.search(rf"^(import|from) {name}\b", text, re.MULTILINE):
            text += path.with_name(f"{name}.py").read_text()
    if "--" in words:  # what follows is for a study
        text += (ROOT / "studies" / "study.py").read_text()
    defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', text))
    # --config.x.y is of --config
    used = {re.split("[=.]", word.removeprefix("--"))[0] for word in words if word != "--"}
    assert used <= defined, used - defined


def test_config_fields_exist():
    named = set(re.findall(r"config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", TEXT)) - {"py", "json"}
    assert len(named) > 5
    for name in named:
        node = default()
        for part in name.split("."):
            assert isinstance(node, ConfigDict) and part in node, f"the docs name config.{name}"
            node = node[part]


def test_routing_table_is_complete():
    page = (ROOT / "docs" / "routing.md").read_text()
    fields = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE)  # a field and its default
    assert dict(fields) == {field: str(value) for field, value in default().model.routing.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_in_every_variant(path, variant):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    if config.model.family == "mmdit" and variant in (*RIVALS, "shared"):
        with pytest.raises(UserError, match=r"is of config\.model\.family = sit alone"):
            validate(config)
    else:
        validate(config)
    routing = config.model.routing
    assert (routing.query if routing.kind == "dar" else routing.kind) == variant


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_resolve():
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not target.startswith("https://"):
                name, _, anchor = target.partition("#")
                linked = page.parent / name if name else page
                assert linked.exists(), f"{page.relative_to(ROOT)} links to {target}"
                assert not anchor or anchor in anchors(linked), f"{page.relative_to(ROOT)} links to {target}"
