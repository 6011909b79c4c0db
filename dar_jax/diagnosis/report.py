"""The report: one HTML file that holds all figures and the main numbers, for a desk and for a phone."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dar_jax import files
from dar_jax.diagnosis.figures import Figure, labels
from dar_jax.evaluation.style import DPI

PIXELS_PER_INCH = 165  # on the page: a figure of a paper's full width fills it

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1240px; margin: 0 auto;
       padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .3rem; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
figure img { max-width: 100%; height: auto; display: block; }
figure img.wide { min-width: 560px; }
figcaption { color: #444; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
"""


SUMMARY = {
    "loss": "Loss (velocity MSE), mean over the times",
    "growth": "Growth of the state: RMS(z_last) / RMS(z_1)",
    "decay": "Decay of its gradient: RMS(dLoss/dz_1) / RMS(dLoss/dz_last)",
    "similarity": "Cosine of neighbouring states, deeper half",
    "probe_r2": "Lowest R² of t behind five blocks",
}


def write_report(results: Sequence[dict], figures: Sequence[Figure], folder: files.Path) -> files.Path:
    """Writes report.html, which needs no other file, from results of `jobs.diagnose`; returns its path."""
    names = labels(results)
    parts = [f"<h1>What routing does: {html.escape(' and '.join(names))}</h1>", _table(results, names)]
    shared = [figure for figure in figures if figure.owner is None]
    parts += [f"<h2>{html.escape(figure.title)}</h2>{_image(figure)}" for figure in shared]
    titles = dict.fromkeys(figure.title for figure in figures if figure.owner is not None)
    own = {title: [figure for figure in figures if figure.title == title] for title in titles}
    for title, group in own.items():
        images = "".join(_image(figure, names[figure.owner]) for figure in group)
        parts.append(f'<h2>{html.escape(title)}</h2><div class="runs">{images}</div>')
    parts += [_canonical(result, name) for result, name in zip(results, names, strict=True) if "canonical" in result]
    parts += [_ablations(result, name) for result, name in zip(results, names, strict=True) if "ablations" in result]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Diagnosis of {html.escape(', '.join(names))}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    path = folder / "report.html"
    files.write_text(path, page)
    return path


def _image(figure: Figure, name: str = "") -> str:
    content = figure.paths[0].read_bytes()
    data, pixels = base64.b64encode(content).decode(), Image.open(io.BytesIO(content)).width
    width = round(pixels / DPI * PIXELS_PER_INCH)
    size = f'width="{width}"' + (' class="wide"' if width > 600 else "")
    alt = html.escape(f"{figure.title} {name}".strip())
    heading = f"<strong>{html.escape(name)}</strong>. " if name else ""
    return (
        f'<figure><div class="scroll"><img {size} src="data:image/png;base64,{data}" alt="{alt}"></div>'
        f"<figcaption>{heading}{html.escape(figure.caption)}</figcaption></figure>"
    )


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line(header, "th")}{body}</table></div>'


def _table(results: Sequence[dict], names: Sequence[str]) -> str:
    def row(what, show):
        return [what, *(str(show(result)) for result in results)]

    return _rows(
        ["", *names],
        [
            row("Routing", _routing),
            row("Blocks, width", lambda r: f"{r['model']['depth']}, {r['model']['hidden_size']}"),
            row("Checkpoint (EMA) of step", lambda r: r["step"]),
            row("Images", lambda r: f"{r['num_images']} of {r['split']}"),
            row("Times", lambda r: len(r["timesteps"])),
            *(row(what, lambda r, name=name: f"{r['summary'][name]:.4g}") for name, what in SUMMARY.items()),
        ],
    )


def _routing(result: dict) -> str:
    routing = result["model"]["routing"]
    if routing["kind"] != "dar":
        return routing["kind"]
    return f"{routing['query']}, chunks of {routing['chunk_size']}"


def _canonical(result: dict, name: str) -> str:
    canonical = result["canonical"]
    rows = [
        ["Loss, mean over the times", *(f"{np.mean(x):.4g}" for x in (
            result["loss"], canonical["loss_content_blind"], canonical["loss"]))],
    ]  # fmt: skip
    for metric, value in canonical.get("scores", {}).items():
        what = f"{metric} of {canonical['num_samples']} samples"
        rows.append([what, f"{canonical['scores_routed'][metric]:.4g}", "", f"{value:.4g}"])
    header = ["", "routed", "content-blind", "canonical"]
    return f"<h2>Frozen routing of {html.escape(name)}</h2>{_rows(header, rows)}"


def _ablations(result: dict, name: str) -> str:
    found, whole = result["ablations"], result["loss"].mean()
    losses = [("shuffled t in the queries", found["loss_shuffled_t"].mean())]
    losses += [(f"without source {s}", x) for s, x in zip(found["sources"], found["loss_without"].mean(0), strict=True)]
    rows = [[what, f"{loss:.4g}", f"{loss / whole - 1:+.2%}"] for what, loss in losses]
    header = ["", "loss, mean over the times", f"against {whole:.4g}"]
    return f"<h2>Parts of the routing of {html.escape(name)}</h2>{_rows(header, rows)}"
