import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

import figures
import model
import utils


@pytest.fixture(scope="module")
def results(data):
    return [utils.run(norm, data, 2, progress=False) for norm in model.NORMS]


def drawn(figure):
    figure.canvas.draw()
    return " ".join(text.get_text() for text in figure.findobj(plt.Text))


def test_curves_show_the_histories(results):
    figure = utils.plot_curves(results)
    for ax, name in zip(figure.axes, ("loss", "acc"), strict=True):
        lines = [line for line in ax.lines if len(line.get_xdata()) == 2 and list(line.get_xdata()) == [1, 2]]
        for result, train, test in zip(results, lines[::2], lines[1::2], strict=True):
            for line, split in ((train, "train"), (test, "test")):
                assert list(line.get_ydata()) == [row[f"{split}_{name}"] for row in result.history]
                assert to_hex(line.get_color()) == figures.COLORS[result.norm].lower()
    assert "synthetic" in drawn(figure)
    assert plt.get_fignums() == []  # nothing left open, so a notebook shows it once


def test_curves_of_plain_histories_seeds_and_a_single_epoch(results):
    history = results[0].history
    assert "mine" in drawn(utils.plot_curves({"mine": history[:1]}))
    assert "run 2" in drawn(utils.plot_curves([history, history]))
    assert "batch, seed 0" in drawn(utils.plot_curves([results[0], results[0]]))
    for nothing in ([], {}, {"batch": []}):
        with pytest.raises(ValueError, match="at least one"):
            utils.plot_curves(nothing)


def test_norm_sets_are_those_of_the_layers():
    figure = utils.plot_norm_sets(
        {name: build(8, 4) for name, build in model.NORMS.items()}, images=6, channels=8, size=4
    )
    for ax, (rows, columns) in zip(figure.axes, ((6, 1), (1, 2), (1, 8)), strict=True):
        cells = {(patch.get_x(), patch.get_y()) for patch in ax.patches}
        assert len(cells) == rows * columns
        assert len({y for _, y in cells}) == rows and len({x for x, _ in cells}) == columns
        assert f"{16 * rows * columns} values" in ax.get_title()


def test_samples_and_mistakes(data):
    assert len(utils.plot_samples(data, each=3).axes) == 30
    logits = torch.nn.functional.one_hot(data.test_labels, 10).float() * 5
    logits[7] = torch.eye(10)[(data.test_labels[7] + 1) % 10] * 50
    figure = utils.plot_mistakes(data, logits)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    truth, guess = (data.classes[(data.test_labels[7] + i) % 10] for i in (0, 1))
    assert titles == [f"{guess} 100 %\nis {truth}"]
    assert "synthetic" in drawn(figure)


def test_saved_results_of_the_stand_in_are_marked(results, tmp_path, capsys):
    utils.save_results(results, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "synthetic-curves.png",
        "synthetic-histories.csv",
    ]
    table = utils.pd.read_csv(tmp_path / "new" / "synthetic-histories.csv")
    assert len(table) == 6 and table["test_acc"].tolist() == pytest.approx(
        [row["test_acc"] for r in results for row in r.history], rel=1e-5
    )
