"""The HTML page: complete, self-contained, and safe to open whatever the models said."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from swift.cli.main import main
from swift.experiments.charts import PALETTE, Series, line_chart, point_chart
from swift.experiments.compare import Comparison, collect
from swift.experiments.report import render_html
from swift.experiments.types import Job, JobSpec

EVIL = "</td><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> \" ' & {{ 7 * 7 }}"
EMPTY = {"meta", "input", "img", "br", "link"}


class Page(HTMLParser):
    """Tags with their attributes, texts, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def experiment(folder: Path, name: str, loss: float, text: str = "fine", **fields: object) -> Job:
    run = folder / name
    run.mkdir(parents=True)
    rows = [{"step": n, "loss": loss + 1 / n, "num_tokens": 50 * n, "step_time": 0.1} for n in range(1, 90)]
    rows += [{"step": 89, "eval_loss": loss}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = {"messages": [{"role": "user", "content": f"question {text}"}], "reference": text,
              "response": f"{name} says {text}", "exact_match": 0.0}  # fmt: skip
    other = {**answer, "messages": [{"role": "user", "content": "another"}], "response": "same"}
    (run / "eval/evaluate").mkdir(parents=True)
    (run / "eval/evaluate/samples.jsonl").write_text(json.dumps(other) + "\n" + json.dumps(answer) + "\n")
    spec = JobSpec(
        name, name, "sft", run_dir=str(run), parameters={"lora_rank": int(loss * 10), "kind": text}
    )
    return Job(**{"id": name, "group": "g", "spec": spec, "state": "succeeded", **fields})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_fanova(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its libraries take seconds to import; test_statistics runs it for real."""
    monkeypatch.setitem(sys.modules, "sklearn", None)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    jobs = [experiment(tmp_path, f"e{n}", 1.0 + n / 10) for n in range(4)]
    jobs.append(experiment(tmp_path, "bad", 3.0, state="failed", reason="out of memory", exit_code=1,
                           retries=[{"reason": "micro-batch 4 -> 2", "attempt": 1}]))  # fmt: skip
    return collect(jobs)


def test_the_page_has_every_part(comparison: Comparison) -> None:
    text = render_html(comparison)
    page = Page(text)
    assert page.open == []
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {"winner", "experiments", "curves", "parameters", "samples", "troubles"} <= ids
    shown = " ".join(page.texts)
    for part in ("e0", "out of memory", "micro-batch 4 -> 2", "e3 says fine", "Importance: "):
        assert part in shown
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 2 * 3 + 1  # losses and eval losses against three axes, and lora_rank
    for chart in charts:
        ElementTree.fromstring(chart)
    assert charts[0].count("<polyline") == 5


def test_the_page_needs_nothing_from_outside_and_runs_no_script(comparison: Comparison) -> None:
    page = Page(render_html(comparison))
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(name for name, _ in page.tags)
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "xlink:href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    policy = [entry["content"] for entry in page.named("meta") if entry.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "url(" not in render_html(comparison) and "@import" not in render_html(comparison)


def test_figures_say_what_they_count(comparison: Comparison) -> None:
    page = Page(render_html(comparison))
    titles = {entry.get("title") for entry in page.named("th")}
    assert "of the training, not of its stages" in titles
    assert "retries: of the training, not of its stages" in " ".join(" ".join(page.texts).split())


def test_the_page_fits_a_telephone_and_the_dark(comparison: Comparison) -> None:
    text = render_html(comparison)
    assert "width=device-width" in text and "color-scheme: light dark" in text
    style = text.partition("<style>")[2].partition("</style>")[0]
    light, dark = (set(re.findall(r"(--\w+):", part)) for part in re.findall(r":root \{(.*?)\}", style))
    assert light == dark == set(re.findall(r"var\((--\w+)\)", style)), "every colour has one for the dark"
    narrow = style.partition("@media (max-width: 600px)")[2]
    assert narrow.count("{") == narrow.count("}"), "the last rule, so that nothing after it undoes it"
    assert not re.search(r"(?<!max-)(?<!min-)width: \d{3,}px", style), "nothing has a fixed width"
    tables = re.findall(r'(<div class="scroll">)?<table', text)
    assert tables and all(tables), "what is too wide scrolls by itself"


def test_lines_can_be_seen_on_light_and_dark() -> None:
    for back in ("#ffffff", "#14181e"):
        for colour in PALETTE:
            assert contrast(colour, back) >= 3, (colour, back)  # WCAG 2.2, 1.4.11


def contrast(first: str, second: str) -> float:
    """WCAG's ratio of luminances."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_of_models_data_and_names_stay_texts(tmp_path: Path) -> None:
    jobs = [
        experiment(tmp_path, "a", 1.0, EVIL, state="failed", reason=EVIL, retries=[{EVIL: EVIL}]),
        experiment(tmp_path, "b", 2.0, EVIL),
        experiment(tmp_path, "c", 2.5, "plain"),
    ]
    text = render_html(collect(jobs, name=EVIL))
    page = Page(text)
    assert page.open == []
    assert {"script", "img"}.isdisjoint(name for name, _ in page.tags)
    assert EVIL in " ".join(page.texts)
    assert "49" not in re.findall(r"<title>(.*?)</title>", text)[0]
    for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(chart)


def test_answers_that_differ_come_first(comparison: Comparison) -> None:
    text = render_html(comparison)
    assert text.index("question fine") < text.index(">another<")


def test_a_page_before_anything_ran(tmp_path: Path) -> None:
    spec = JobSpec("a", "a", "sft", run_dir=str(tmp_path / "a"))
    page = Page(render_html(collect([Job("j1", "g", spec, "queued")])))
    assert page.open == []
    assert "No experiment has a value of eval_loss yet." in " ".join(page.texts)
    assert not page.named("svg")


def test_many_long_runs_make_no_huge_page(tmp_path: Path) -> None:
    comparison = collect([experiment(tmp_path, f"e{n}", 1.0 + n) for n in range(3)])
    for row in comparison.rows:
        row.losses = row.losses * 400
    assert len(render_html(comparison)) < 2_500_000


def test_lines_are_drawn_to_scale() -> None:
    chart = ElementTree.fromstring(
        line_chart([Series("a", [(0, 0), (50, 5), (100, 10)], "#000")], x_label="step", y_label="loss")
    )
    path = chart.find("polyline")
    assert path is not None
    points = [tuple(map(float, pair.split(","))) for pair in path.attrib["points"].split()]
    (left, bottom), (middle, half), (right, top) = points
    assert middle == pytest.approx((left + right) / 2, abs=0.1) and half == pytest.approx(
        (top + bottom) / 2, abs=0.1
    )
    assert 58 <= left < right <= 628 and 10 <= top < bottom <= 278
    labels = [node.text for node in chart.iter("text")]
    assert {"0", "20", "100", "step", "loss"} <= set(labels)


def test_wide_parameters_are_logarithmic_and_words_are_places() -> None:
    points = [Series(f"t{n}", [(10.0**-n, 1.0)], "#000") for n in (5, 4, 3)]
    text = point_chart(points, x_label="rate", y_label="loss")
    places = [float(node.attrib["cx"]) for node in ElementTree.fromstring(text).iter("circle")]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert "rate (logarithmic)" in text
    words = point_chart(
        [Series("a", [(0.0, 1.0)], "#000"), Series("b", [(1.0, 1.0)], "#000")],
        x_label="kind", y_label="loss", names=["<b>", "full"],
    )  # fmt: skip
    assert "&lt;b&gt;" in words and "full" in words
    assert line_chart([], x_label="", y_label="") == ""


def test_the_command_writes_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    experiment(tmp_path / "out", "a", 1.0)
    experiment(tmp_path / "out", "b", 2.0)
    assert main(["report", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")
    assert Page((tmp_path / "out" / "report.html").read_text()).open == []
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "out" / "a")]) == 1
    assert "cannot be written" in capsys.readouterr().err
