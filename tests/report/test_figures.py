"""The figures of a report, read from their tooltips."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from branchynet.errors import InputError
from branchynet.report import figure_scores, figure_shares, figure_tradeoff
from branchynet.report.svg import inline
from helpers.html_page import Page


class TestFigures:
    def tips(self, figure):
        return Page(inline(figure, "x", "a figure")).titles

    def test_tradeoff(self):
        us, accuracy = np.array([30.0, 10, 20]), [0.97, 0.95, 0.96]
        figure = figure_tradeoff(us, accuracy, plain=(50, 0.965), chosen=(20, 0.96), tested=(21, 0.955, 0.95, 0.96))
        assert self.tips(figure) == [
            "10 µs, 95.00%",
            "20 µs, 96.00%",
            "30 µs, 97.00%",
            "plain network: 50 µs, 96.50%",
            "chosen thresholds, validation data: 20 µs, 96.00%",
            "chosen thresholds, test data (95%): 21 µs, 95.50%",
        ]
        assert [t.get_text() for t in figure.axes[0].texts] == ["←  2.4× faster"]
        assert [t.get_text() for t in figure.legends[0].get_texts()] == [
            "best thresholds, validation data",
            "plain network",
            "chosen thresholds, validation data",
            "chosen thresholds, test data (95%)",
        ]

    def test_tradeoff_without_marks(self):
        assert self.tips(figure_tradeoff([12_345.0], [0.5])) == ["12.35 ms, 50.00%"]

    def test_tradeoff_shows_the_knee_and_not_every_point(self):
        us = np.linspace(1, 100, 5000)
        tips = self.tips(figure_tradeoff(us, us / 100, chosen=(95, 0.95), most=100))
        assert len(tips) == 101 and tips[99] == "100 µs, 100.00%"
        assert (
            88 < float(tips[0].split()[-1].removesuffix("%")) < 91
        )  # as far below the chosen point as that is below the best

    def test_shares(self):
        figure = figure_shares((0.7, 0.0, 0.3), (0.99, None, 0.8))
        texts = ["70.0%, accuracy 99.00%", "0.0%", "30.0%, accuracy 80.00%"]
        assert [t.get_text() for t in figure.axes[0].texts] == texts
        widths = [bar.get_width() for bar in figure.axes[0].patches]
        assert widths == pytest.approx([69.3, 0.7, 0, 0, 24, 6])

    def test_scores(self):
        scores = np.array([[0.0, 0.1], [0.1, 1.0], [1.0, 0.9], [np.nan, np.inf]])
        losses = np.array([[0, 0], [0, 0], [1, 0], [0, 0]])
        figure = figure_scores(scores, losses, (0.4,), bins=2)
        assert self.tips(figure) == [
            "2 right, 0 wrong at 0 to 0.5",
            "0 right, 1 wrong at 0.5 to 1",
            "exit 1: threshold 0.4",
            "1 right, 0 wrong at 0 to 0.5",
            "2 right, 0 wrong at 0.5 to 1",
        ]

    @pytest.mark.parametrize("scores", [np.full((3, 2), np.nan), np.zeros((3, 2)), np.zeros((3, 1)), np.zeros((2, 5))])
    def test_odd_scores(self, scores):
        figure = figure_scores(scores, np.zeros_like(scores), (0.0,) * (scores.shape[1] - 1))
        assert sum(axes.get_visible() for axes in figure.axes) == scores.shape[1]
        Page(inline(figure, "x", "a figure"))

    @pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
    def test_save_figures(self, tmp_path, kind):
        figures = (
            figure_tradeoff([1, 2], [0.5, 0.6]),
            figure_shares((1.0,), (0.5,)),
            figure_scores(np.zeros((3, 2)), np.zeros((3, 2))),
        )
        for figure in figures:
            assert isinstance(figure, Figure)
            figure.savefig(tmp_path / f"x.{kind}")
            start = (tmp_path / f"x.{kind}").read_bytes()[:100]
            assert {"png": b"PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind] in start

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: figure_tradeoff([1, 2], [0.5]), r"mean_us \(2,\) and accuracy \(1,\)"),
            (lambda: figure_tradeoff([], []), "not empty"),
            (lambda: figure_shares((0.5, 0.5), (1.0,)), "2 shares and 1 accuracies"),
            (lambda: figure_scores(np.zeros((3, 2)), np.zeros((3, 1))), r"scores \(3, 2\) and losses \(3, 1\)"),
        ],
    )
    def test_wrong_shapes(self, make, message):
        with pytest.raises(InputError, match=message):
            make()
