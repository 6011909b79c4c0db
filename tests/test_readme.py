"""The README does not rot: what it names exists, and every command in it could start."""

import importlib.util
import pathlib
import re
import shlex
import subprocess

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from dar_jax.config import VARIANTS, default, validate

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def commands():
    """The shell commands of all bash blocks, as lists of words."""
    for block in re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (shlex.split(part) for part in line.split("&&"))


def doors(name=r"\w+"):
    return [words for words in commands() if re.fullmatch(rf"python -m dar_jax\.{name}", " ".join(words[:3]))]


def launches():
    return [words for words in commands() if words and words[0].startswith("launch/")]


def trainings():
    """Every command that trains, by the door or by a launch script, as one for the door."""
    launched = [words[words.index("--") + 1 :] for words in launches() if "--" in words]
    return doors("main") + [["python", "-m", "dar_jax.main", *flags] for flags in launched]


def layout():
    """The paths of the tree in the section "Layout"."""
    block = README.split("## Layout")[1].split("```text\n")[1].split("```")[0]
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
    assert not missing, f"the README's layout names {missing}"
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dar_jax").rglob("*.py")}
    absent = sorted(path for path in modules - set(paths) if not path.endswith("__init__.py"))
    assert not absent, f"the README's layout lacks {absent}"


def test_doors_exist():
    named = set(re.findall(r"python -m (dar_jax\.\w+)", README))
    assert {"dar_jax.main", "dar_jax.sample"} <= named
    assert not [name for name in named if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("words", trainings(), ids=" ".join)
def test_training_command_gives_a_valid_config(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", words[2:])  # config_flags looks there for overrides
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    assert values(words[2:]) == words[2:3]  # nothing but flags, all of them known
    validate(config.value)
    assert values.workdir


@pytest.mark.parametrize("words", launches(), ids=" ".join)
def test_launch_command_is_understood(words, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)  # else it is inside a job, and says srun
    result = subprocess.run([words[0], "--dry_run", *words[1:]], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0 and result.stdout.startswith(("gcloud ", "sbatch ")), result.stderr


@pytest.mark.parametrize("words", [w for w in doors() if w[2] != "dar_jax.main"], ids=" ".join)
def test_options_of_other_doors_exist(words):
    # The text is read, because importing two doors would define --workdir twice.
    source = pathlib.Path(importlib.util.find_spec(words[2]).origin).read_text()
    defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source))
    used = {re.split("[=.]", word.removeprefix("--"))[0] for word in words[3:]}  # --config.x.y is of --config
    assert used <= defined, used - defined


def test_config_fields_exist():
    named = set(re.findall(r"config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", README)) - {"py", "json"}
    assert len(named) > 5
    for name in named:
        node = default()
        for part in name.split("."):
            assert isinstance(node, ConfigDict) and part in node, f"the README names config.{name}"
            node = node[part]


def test_routing_table_is_complete():
    section = README.split("## Routing choices")[1].split("\n## ")[0]
    fields = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", section, re.MULTILINE)  # a field and its default
    assert dict(fields) == {field: str(value) for field, value in default().model.routing.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_in_every_variant(path, variant):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    validate(config)
    routing = config.model.routing
    assert (routing.query if routing.kind == "dar" else routing.kind) == variant


def test_links_resolve():
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
