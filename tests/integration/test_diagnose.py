"""The diagnosis of two runs, from workdirs to report: numbers that no batching changes, a page that a browser shows."""

import html
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dar_jax import models, sharding
from dar_jax.checkpoint import load_config, write_weights
from dar_jax.data.pipeline import load_images
from dar_jax.diagnosis import canonical, pairs, probes
from dar_jax.diagnosis.runs import diagnose
from dar_jax.errors import UserError
from dar_jax.evaluation.features import Features
from tests.training import tiny

NUM_IMAGES, TIMES = 20, (0.0, 0.4, 1.0)


def make_run(folder: pathlib.Path, kind: str):
    """A workdir of random weights, also where a model starts at zero."""
    config = tiny.make_config()
    config.model.routing.update(kind=kind, chunk_size=2)
    config.eval.num_samples = 16
    config.mesh.update(fsdp=2, tensor=2)  # of eight devices, where nothing says otherwise
    params = sharding.unbox(jax.eval_shape(lambda: tiny.initial(config)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), jnp.float32), params)
    write_weights(str(folder), config, params)
    return config, params


def fake_features(*_):
    """A network of 4 features."""
    return Features("test", jax.jit(lambda x: {"pool": x.astype(jnp.float32).reshape(len(x), 4, -1).mean(-1) / 255}), 8)


def run(folder, out, batch_size, canonical):
    workdirs = [str(folder / "residual"), str(folder / "dar")]
    diagnose(
        [load_config(workdir) for workdir in workdirs],
        workdirs,
        str(out),
        num_images=NUM_IMAGES,
        timesteps=TIMES,
        batch_size=batch_size,
        canonical=canonical,
        ablations=canonical,
    )
    return json.loads((out / "diagnosis.json").read_text())["runs"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a residual and a routed run, and their configs and weights."""
    folder = tmp_path_factory.mktemp("diagnosis")
    return folder, {kind: make_run(folder / kind, kind) for kind in ("residual", "dar")}


@pytest.fixture(scope="module")
def diagnosed(runs, tmp_path_factory):
    """Workdirs, the output directory, what was found on one device in one batch, and what the runs are made of."""
    folder, made = runs
    one_device = tiny.all_runs_on((1, 1), tmp_path_factory.mktemp("cache"))
    with one_device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(canonical, "load_features", fake_features)
        found = run(folder, folder / "out", NUM_IMAGES, True)
    return folder, folder / "out", found, made


def assert_alike(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_alike(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(initial=0), err_msg=path)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5), path
    else:
        assert a == b, path


def test_numbers_do_not_hang_on_devices_or_batches(diagnosed, tmp_path):
    """Eight devices and three batches, of which half of the last is filling, against one batch on one device."""
    folder, _, found, _ = diagnosed
    found = [{name: x for name, x in result.items() if name not in ("canonical", "ablations")} for result in found]
    for actual, expected in zip(run(folder, tmp_path, 8, False), found, strict=True):
        assert_alike(actual, expected)


def pairs_of(config):
    data = config.data
    images, labels = load_images(data, data.eval_split, channels=1)
    with sharding.use(tiny.make_mesh(1, 1)) as mesh:
        (batch,) = pairs.batches(config, pairs.Pairs("test", NUM_IMAGES, NUM_IMAGES, TIMES), mesh)
    batch = jax.device_get(batch)
    for image, label in zip(batch["x1"], batch["condition"]["label"], strict=True):  # held-out ones, whatever the order
        same = np.isclose(images / 127.5 - 1, image, atol=1e-6).all(axis=(1, 2, 3))
        assert label in labels[same]
    assert len(np.unique(batch["x1"], axis=0)) == NUM_IMAGES
    return batch


def test_losses_are_those_of_the_model_with_its_own_and_with_frozen_weights(diagnosed):
    _, _, found, made = diagnosed
    for result, (config, params) in zip(found, made.values(), strict=True):
        model, batch = models.build(config.model), pairs_of(config)

        def loss(t, weights=None, model=model, params=params, batch=batch, config=config):
            if weights is not None:
                model = model.clone(plain=True, frozen_weights=weights[..., None])
            predict = lambda x, t: model.apply({"params": params}, x, t, batch["condition"]).prediction  # noqa: E731
            return probes.make_velocity_loss(config)(predict, batch, jnp.full(NUM_IMAGES, t)).mean()

        loss = jax.jit(loss)
        assert result["loss"] == pytest.approx([float(loss(t)) for t in TIMES], rel=1e-5)
    ablations, is_source = result["ablations"], np.array(result["is_source"])
    assert ablations["sources"] == np.flatnonzero(is_source.any(axis=0)).tolist()
    without = np.array(ablations["loss_without"])
    assert without.shape == (len(TIMES), len(ablations["sources"])) and len(ablations["loss_shuffled_t"]) == len(TIMES)
    assert (np.abs(without / np.array(result["loss"])[:, None] - 1).max(axis=0) > 1e-4).all()  # each source matters
    frozen, weights = result["canonical"], np.array(result["weights"], np.float32)
    np.testing.assert_allclose(frozen["weights"], weights.mean(axis=0), rtol=1e-5, atol=1e-7)
    for name, used in (("loss_content_blind", weights), ("loss", [weights.mean(axis=0)] * 3)):
        expected = [float(loss(t, fixed)) for t, fixed in zip(TIMES, used, strict=True)]
        assert frozen[name] == pytest.approx(expected, rel=1e-5)
    assert frozen["num_samples"] == 16
    assert frozen["scores"].keys() == frozen["scores_routed"].keys() == {"fd_test"}
    assert frozen["scores"] != frozen["scores_routed"]


def test_numbers_have_their_shapes_and_ranges(diagnosed):
    residual, routed = diagnosed[2]
    for result in (residual, routed):
        assert np.shape(result["forward_rms"]) == np.shape(result["backward_rms"]) == (3, 2)
        assert np.shape(result["similarity"]) == (3, 1) and np.shape(result["probe_r2"]) == (5,)
        assert result["num_images"] == NUM_IMAGES and result["timesteps"] == list(TIMES)
    weights, mask = np.array(routed["weights"]), np.array(routed["is_source"])
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert (weights[:, ~mask] == 0).all() and (weights[:, mask] > 0).all()
    assert mask.sum(axis=1).tolist() == [1, 2, 2, 3, 4]  # chunks of 2: |S_1..S_4| and the head's
    assert np.array(residual["is_source"]).sum(axis=1).tolist() == [1, 2, 3, 4, 5]
    assert (np.array(routed["relative_entropy"]) <= 1 + 1e-6).all()


def test_figures_are_on_disk_and_in_the_report(diagnosed):
    out = diagnosed[1]
    pictures = sorted(path.stem for path in out.glob("*.png"))
    expected = {"curves", "probe", "canonical_dar", "ablations_dar"}
    expected |= {f"{name}_{run}" for name in ("by_time", "depth", "sources") for run in ("residual", "dar")}
    assert set(pictures) == expected
    page = (out / "report.html").read_text()
    assert page.count("<img ") == len(expected) and page.count('src="data:image/png;base64,') == len(expected)
    assert not re.search(r'(src|href)="(?!data:)', page)
    for name in pictures:
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        picture = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert picture.std() > 5  # something is drawn
        edges = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
        assert all((edge == 255).all() for edge in edges), f"{name} is cut off"


PROBE = """
<body><iframe id="page" width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe><script>
document.getElementById("page").onload = (event) => {{
  const page = event.target.contentDocument, images = [...page.images];
  const spills = [...page.body.querySelectorAll("*")].filter((e) =>
    !(e.parentElement.closest(".scroll")) && e.getBoundingClientRect().right > {width} + 0.5);
  document.body.dataset.found = JSON.stringify({{
    images: images.length, loaded: images.filter((i) => i.complete && i.naturalWidth > 0).length,
    width: page.documentElement.scrollWidth, client: page.documentElement.clientWidth,
    spills: spills.map((e) => e.outerHTML.slice(0, 80)),
    scrolled: [...page.querySelectorAll(".scroll")].filter((e) => e.scrollWidth > e.clientWidth).length,
    columns: new Set(images.map((i) => Math.round(i.getBoundingClientRect().left))).size,
  }});
}};</script></body>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
def test_report_fits_in_a_browser(diagnosed, tmp_path, width):
    """In a frame of that width, because a headless window is at least 500 wide. At 1280 two runs stand side by side."""
    wrapper = tmp_path / "wrapper.html"
    page = html.escape((diagnosed[1] / "report.html").read_text())
    wrapper.write_text(PROBE.format(width=width, page=page))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=20000"]
    shown = subprocess.run([*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=300)
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', shown.stdout)[1]))
    assert found["loaded"] == found["images"] == len(list(diagnosed[1].glob("*.png")))
    assert found["width"] <= found["client"] <= width and not found["spills"]
    assert found["columns"] == (2 if width == 1280 else 1)
    assert (found["scrolled"] > 0) == (width == 390)  # wide figures stay legible on a phone


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workdirs": ["nowhere"]}, '"nowhere/config.json" does not exist'),
        ({"workdirs": ["dar", "empty"]}, 'workdir "empty" holds no checkpoint'),
        ({"workdirs": ["latents"], "canonical": True}, "config.data.vae, eval.inception and eval.reference to score"),
        ({"timesteps": [0.5]}, "--timesteps = 0.5 must be at least two times in [0, 1]"),
        ({"timesteps": [0.5, 1.5]}, "--timesteps = 0.5,1.5 must be"),
        ({"timesteps": [0.5, math.nan]}, "--timesteps = 0.5,nan must be"),
        ({"batch_size": 10}, "--batch_size = 10 must be divisible by the 4 devices"),
        ({"workdirs": ["residual"], "canonical": True}, "--canonical freezes routing weights"),
        ({"workdirs": ["residual"], "ablations": True}, "--ablate removes sources of routing, and a residual model"),
        ({"eval_split": "trian"}, '"trian"'),
        ({"out": "/proc/nowhere"}, '--out = "/proc/nowhere/diagnosis.json" cannot be written'),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(runs, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(runs[0])
    for name, channels in (("empty", 1), ("latents", 4)):
        config = load_config("dar")
        config.model.update(channels=channels, space="pixels" if channels == 1 else "latents")
        config.data.source = "digits" if channels == 1 else "synthetic"
        pathlib.Path(name, "checkpoints").mkdir(parents=True, exist_ok=True)
        pathlib.Path(name, "config.json").write_text(config.to_json())
    shutil.copytree("dar/checkpoints", "latents/checkpoints", dirs_exist_ok=True)
    monkeypatch.setattr("dar_jax.diagnosis.runs._measure_run", lambda *_: pytest.fail("nothing may be measured"))
    arguments = {"workdirs": ["dar"], "out": str(tmp_path / "out"), "num_images": 8, "timesteps": None}
    arguments |= {"batch_size": 8, "canonical": False} | changes
    split = arguments.pop("eval_split", "test")
    with pytest.raises(UserError, match=re.escape(words)):
        configs = [load_config(workdir) for workdir in arguments["workdirs"]]
        for config in configs:
            config.data.eval_split = split
        diagnose(configs, **arguments)


def test_the_door_refuses_in_one_line():
    command = [sys.executable, "-m", "dar_jax.diagnose", "--workdir=x", "--out=y", "--timesteps=0,one"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 2
    assert result.stderr == "error: --timesteps = 0,one must be numbers: 0,0.5,1.\n"
