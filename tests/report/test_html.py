"""The page of a report: its parts, its text, and what it refuses."""

import base64
import io
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from branchynet.errors import FileError, InputError
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.exit_record import ExitRecord
from branchynet.policy.values import Choice, Outcome, Policy, Promise
from branchynet.report import Gallery, write_report
from branchynet.report.html import RunReport
from helpers.html_page import Page


def run(samples=60, exits=3, seed=0, **more):
    """The contents of a report; only their counts must be consistent, not their values."""
    rng = np.random.default_rng(seed)
    thresholds = (0.3, None, 0.4, 0.5, 0.6)[: exits - 1]
    share = tuple(np.full(exits, 1 / exits))
    right = (0.99, None, 0.9, 0.9, 0.9, 0.9)[:exits]
    outcome = Outcome(samples, 0.951, (0.94, 0.96), 0.962, share, right, 40.0, 95.0, 99.0)
    chosen = Outcome(77, 0.97, (0.9, 0.99), 0.97, share, (0.99,) * exits, 41.5, 95.0, 99.0)
    return {
        "title": "B-LeNet on digits",
        "choice": Choice(Policy("entropy", thresholds), {"max_drop": 0.005}, chosen, "c0ffee" * 8),
        "outcome": outcome,
        "record": ExitRecord.from_scores(rng.random((samples, exits)), rng.random((samples, exits)) < 0.1),
        "scores": rng.exponential(0.3, (samples, exits)),
        "curve": SimpleNamespace(mean_us=np.linspace(20, 80, 500), accuracy=1 - 0.3 * np.exp(-np.linspace(0, 5, 500))),
        "cost": ExitCost((20.5,) * exits, (4.0,) * exits, (1000,) * exits, (70,) * exits, batch_size=64, threads=2),
        "bench": [a_row(1, 1), a_row(64, 2)],
        "galleries": [a_gallery("Left first"), a_gallery("Left last")],
        "facts": {"machine": "Xeon, 2 cores", "torch": "2.13.0", "seed": 7},
        **more,
    }


def a_row(batch, threads):
    return {
        "network": "b_lenet",
        "runtime": "onnxruntime",
        "batch": batch,
        "threads": threads,
        "plain_us": 88.5 + batch,
        "branchy_us": 30.25,
        "limit_us": 29.0,
        "speedup": 2.93,
        "overhead": 1.043,
        "plain_accuracy": 0.9612,
        "accuracy_branchy": 0.951,
        "exit_share": [0.5, 0.3, 0.2],
        "thresholds": [0.3, None],
    }


def a_gallery(title="Left first", count=5, size=(8, 8), **more):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (count, *size), dtype=np.uint8)
    label = np.arange(count) % 3
    fields = {"label": label, "predicted": label, "exit": np.full(count, 2), "score": np.full(count, 0.0123)}
    return Gallery(title, images, **{**fields, **more})


def written(tmp_path, **more):
    write_report(tmp_path / "report.html", RunReport(**run(**more)))
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class TestPage:
    def test_everything_is_there(self, tmp_path):
        page = Page(written(tmp_path))
        assert [a["aria-label"] for a in page.all("svg")] == [
            "Accuracy against mean time per sample for 500 threshold settings; the chosen one reaches 95.10% "
            "on test data.",
            "Shares of the test samples. exit 1: 33.3% of the samples; exit 2: 33.3% of the samples; "
            "exit 3: 33.3% of the samples.",
            "Histograms of the entropy at each of 3 exits, for right and wrong predictions.",
        ]
        for words in (
            "chosen on 77 validation samples under max drop 0.005 ; this page shows results for 60 test samples",
            "95.10% 95% interval 94.00% to 96.00%",
            "96.20% −1.10 points with early exits",
            "Speed-up at batch 64 2.93×",  # timed as the cost was
            "40 µs 95% within 95 µs, worst 99 µs",
            "1 entropy < 0.3 33.3% 99.00% 20.5 4 1,000 70",
            "2 never (left out) 33.3% 20.5",
            "3 always",
            "costs per sample of the stages at batch 64, 2 threads",
            "b_lenet onnxruntime 1 1 89.5 30.2 29 2.93× 1.043 96.12% 95.10% 50.0, 30.0, 20.0 0.3, never",
            "b_lenet onnxruntime 64 2 152.5",
            "Left first",
            "Left last",
            "machine Xeon, 2 cores torch 2.13.0 seed 7",
            "chosen on record c0ffeec0ffee, 77 samples",
        ):
            assert words in page.text, words
        assert run()["record"].digest[:12] in page.text
        assert len(page.all("img")) == 10

    def test_is_accessible(self, tmp_path):
        page = Page(written(tmp_path))
        assert page.all("html") == [{"lang": "en"}] and page.titles[0] == "B-LeNet on digits"
        assert len(page.all("h1")) == 1 and len(page.all("main")) == 1
        assert all(image["alt"] for image in page.all("img"))
        assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
        assert all(head["scope"] in ("col", "row") for head in page.all("th"))
        assert len(page.all("caption")) == len(page.all("table")) == 2
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids))
        labeled = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
        assert labeled and set(labeled) <= set(ids)

    def test_loads_nothing_from_other_machines(self, tmp_path):
        text = written(tmp_path)
        page = Page(text)
        assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
        ids = {a["id"] for _, a in page.tags if "id" in a}
        seen = set()
        for tag, attributes in page.tags:
            for name, value in attributes.items():
                if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                    seen.add(tag)
                    assert value.startswith("data:image/png;base64,") or value.removeprefix("#") in ids, value
        assert seen == {"img", "use"}
        urls = re.findall(r"url\(([^)]*)\)", text)
        assert urls and all(url.removeprefix("#") in ids for url in urls)
        assert "http:" not in text and "https:" not in text and "@import" not in text and "//" not in strip_data(text)
        assert "default-src 'none'" in page.all("meta")[2]["content"]

    def test_light_dark_print_and_narrow(self, tmp_path):
        text = written(tmp_path)
        for query in ("prefers-color-scheme: dark", "@media print", "max-width"):
            assert query in text
        svg = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
        assert {"var(--ink)", "var(--muted)", "var(--right)", "var(--wrong)", "var(--chosen)"} <= set(
            re.findall(r"var\(--\w+\)", svg)
        )
        # no fixed color, which could be invisible on a dark page
        assert not re.findall(r"#[0-9a-f]{6}(?=[;\"])", svg)
        declared = set(re.findall(r"(--\w+):", text))
        assert set(re.findall(r"var\((--\w+)\)", text)) <= declared

    def test_all_text_is_escaped(self, tmp_path):
        evil = "<script>alert(1)</script>&\"'"
        row = {**a_row(1, 1), "network": evil, "runtime": evil, "batch": evil}
        choice = run()["choice"]

        def score(outputs):
            return outputs

        score.__name__ = evil
        choice = Choice(Policy(score, choice.policy.thresholds), {evil: 1.0}, choice.outcome, evil)
        galleries = [a_gallery(evil, names=(evil, evil + "1", evil + "2"), predicted=np.array([1, 1, 1, 1, 1]))]
        text = written(tmp_path, title=evil, bench=[row], facts={evil: evil}, galleries=galleries, choice=choice)
        page = Page(text)
        assert "<script" not in text and not page.all("script")
        assert page.text.count("alert(1)") >= 10
        assert page.titles[0] == evil
        assert all("alert" not in name for _, attributes in page.tags for name in attributes)

    def test_small_with_many_samples_and_large_images(self, tmp_path):
        rng = np.random.default_rng(0)
        curve = SimpleNamespace(mean_us=np.sort(rng.random(10_000)), accuracy=np.sort(rng.random(10_000)))
        galleries = [a_gallery(size=(256, 256, 3), count=200)] * 2
        text = written(tmp_path, samples=10_000, exits=6, curve=curve, galleries=galleries)
        assert len(text.encode()) < 3e6
        Page(text)

    def test_only_what_is_given(self, tmp_path):
        outcome = Outcome(60, 0.9, (0.8, 1.0), 0.9, (0.5, 0.2, 0.3), (0.9, 0.9, 0.9))
        more = {"curve": None, "cost": None, "bench": (), "galleries": (), "facts": None, "outcome": outcome}
        page = Page(written(tmp_path, **more))
        assert len(page.all("svg")) == 2 and not page.all("img") and len(page.all("table")) == 1
        assert "Speed-up" not in page.text and "µs" not in page.text and "Mean time" not in page.text

    def test_warns_when_chosen_and_reported_on_the_same_data(self, tmp_path):
        parts = run()
        choice = Choice(parts["choice"].policy, {"max_drop": 0}, parts["outcome"], parts["record"].digest)
        assert "chosen on the data that this page reports" in Page(written(tmp_path, choice=choice)).text
        assert "chosen on the data that this page reports" not in Page(written(tmp_path)).text

    def test_shows_the_promise(self, tmp_path):
        promise = Promise("max_drop", 0.005, 0.95, "betting", 500, 500)
        page = Page(written(tmp_path, choice=replace(run()["choice"], promise=promise)))
        assert str(promise) in page.text and "95% confidence" not in Page(written(tmp_path)).text

    def test_shows_why_no_sample_leaves_early(self, tmp_path):
        page = Page(written(tmp_path, choice=replace(run()["choice"], reason="no <exit> pays")))
        assert "no <exit> pays" in page.text and "no <exit> pays" not in Page(written(tmp_path)).text

    def test_is_deterministic(self, tmp_path):
        assert written(tmp_path) == written(tmp_path)

    def test_baseline_is_the_row_timed_as_the_cost_was(self, tmp_path):
        tips = lambda **more: [t for t in Page(written(tmp_path, **more)).titles if t.startswith("plain network")]  # noqa: E731
        assert tips() == ["plain network: 152.5 µs, 96.12%"]
        alike = ExitCost((20.5,) * 3, (4.0,) * 3, batch_size=64, threads=2, plain_us=99.0)  # timed with the curve
        assert tips(cost=alike) == ["plain network: 99 µs, 96.12%"]
        assert tips(plain=(70.0, 0.5)) == ["plain network: 70 µs, 50.00%"]
        assert tips(bench=[a_row(1, 1)]) == []
        assert tips(bench=[{**a_row(64, 2), "plain_accuracy": None}]) == []

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"cost": ExitCost((1,), (1,))}, "the record has 3 exits, the cost has 1 exits"),
            ({"record": run(exits=2)["record"]}, "the outcome has 3 exits, the record has 2 exits"),
            ({"scores": np.zeros((60, 2))}, r"scores of shape \(60, 2\).*60 samples of 3 exits"),
            ({"outcome": run(samples=59)["outcome"]}, "an outcome of 59 samples"),
            ({"bench": [{"network": "x"}]}, r"a row of bench lacks \['accuracy_branchy'"),
        ],
    )
    def test_inconsistent_values(self, tmp_path, more, message):
        with pytest.raises(InputError, match=message):
            written(tmp_path, **more)
        assert not (tmp_path / "report.html").exists()

    def test_unwritable(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(FileError, match="cannot write"):
            write_report(tmp_path / "file" / "report.html", RunReport(**run()))


def strip_data(text):
    return re.sub(r"data:image/png;base64,[\w+/=]*", "", text)


class TestGallery:
    def test_pictures_are_the_images(self, tmp_path):
        gray, color = a_gallery(), a_gallery(size=(8, 6, 3))
        page = Page(written(tmp_path, galleries=[gray, color]))
        sources = [image["src"].partition(",")[2] for image in page.all("img")]
        shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]
        assert all(np.array_equal(a, b) for a, b in zip(shown, [*gray.images, *color.images], strict=True))

    def test_wrong_answers_are_marked_in_words_too(self, tmp_path):
        gallery = a_gallery(count=3, predicted=np.array([0, 2, 2]), names=("zero", "one", "two"))
        page = Page(written(tmp_path, galleries=[gallery]))
        assert [a.get("class") for a in page.all("li")] == [None, "missed", None]
        assert "zero exit 2 0.0123 two , true class one exit 2 0.0123 two exit 2" in page.text

    def test_at_most_24_and_small(self, tmp_path):
        page = Page(written(tmp_path, galleries=[a_gallery(count=30, size=(300, 150))]))
        sources = [image["src"].partition(",")[2] for image in page.all("img")]
        assert len(sources) == 24
        assert Image.open(io.BytesIO(base64.b64decode(sources[0]))).size == (48, 96)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"size": (8,)}, r"uint8 \(B, H, W\).*\(5, 8\)"),
            ({"size": (8, 8, 4)}, "must be uint8"),
            ({"label": [0]}, r"label has shape \(1,\) for 5 images"),
            ({"score": np.zeros((5, 2))}, r"score has shape \(5, 2\)"),
            ({"names": ("a", "b")}, "class 2 has no name; there are 2 names"),
        ],
    )
    def test_wrong(self, more, message):
        with pytest.raises(InputError, match=message):
            a_gallery(**more)

    def test_float_images_are_refused(self):
        with pytest.raises(InputError, match=r"uint8.*float64"):
            Gallery("x", np.zeros((1, 8, 8)), [0], [0], [1], [0.0])


def test_undecodable_names_of_files_are_escaped(tmp_path):
    """A folder name, which is part of the title, may contain any bytes."""
    made = run(title="net on folder:/data/caf\udce9", facts={"data": "folder:/data/caf\udce9", "\udcff": 1})
    write_report(tmp_path / "report.html", RunReport(**made))
    text = (tmp_path / "report.html").read_bytes().decode("utf-8")
    assert r"folder:/data/caf\udce9" in Page(text).text
