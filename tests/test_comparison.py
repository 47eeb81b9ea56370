"""Several runs on one page."""

from __future__ import annotations

import math
import re
import subprocess

import pytest

from distplateau import cli
from distplateau.errors import InputError
from distplateau.record.report.comparison import expand, write_comparison
from test_report import CHROMIUM, HOSTILE, Run, check_page


@pytest.fixture
def sweep(tmp_path):
    """Three runs of a sweep, the best in the middle of the alphabet, and one without a validation."""
    folder = tmp_path / "a sweep"
    for name, losses, patience in (
        ("a", [0.5, 0.4], 1),
        ("b", [0.5, 0.3], 2),
        ("c", [0.5, 0.45, 0.46], 3),
        ("d", [], 4),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.toml").write_text(f'[run]\nname = "{name}"\n[schedule]\npatience = {patience}\n')
        run = Run(folder / name).validate(*losses)
        if losses:
            run.finish()
    return folder


def rows(text):
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("<tr")[1:]]
    return [[re.sub(r"<[^>]*>", "", cell) for cell in row] for row in cells]


def test_sorted_by_the_best_value_with_what_differs(sweep):
    path = write_comparison(expand([sweep]))
    assert path == sweep / "comparison.html"
    text = path.read_text(encoding="utf-8")
    check_page(text)
    table = rows(text)
    assert [row[:4] for row in table] == [
        ["1", "b", "2", "0.3"], ["2", "a", "1", "0.4"], ["3", "c", "3", "0.45"], ["4", "d", "4", "-"],
    ]  # fmt: skip
    assert "Best val/loss 0.3: b; the last of 3, c, came to 0.45." in text
    assert 'href="b/report.html"' in text
    assert "<tr class=best><td>1</td>" in text
    for number in (1, 2, 3):
        assert f'id="curves-curve-{number}"' in text
        assert f'id="parallel-line-{number}"' in text  # d has no value, and no line
    assert 'id="parallel-line-4"' not in text
    assert {path.name for path in sweep.glob("comparison.*")} == {"comparison.html", "comparison.svg", "comparison.png"}


def test_the_larger_is_the_better_in_max_mode(tmp_path):
    from test_report import RULE

    for name, losses in (("low", [0.2]), ("high", [0.8])):
        (tmp_path / name).mkdir()
        Run(tmp_path / name, rule=type(RULE)(mode="max")).validate(*losses)
    text = write_comparison([tmp_path / "low", tmp_path / "high"]).read_text(encoding="utf-8")
    assert [row[1] for row in rows(text)] == ["high", "low"]


def test_parallel_lines_of_settings_that_are_numbers(sweep):
    text = write_comparison([sweep / name for name in "abc"]).read_text(encoding="utf-8")
    assert all(f'id="parallel-line-{number}"' in text for number in (1, 2, 3))
    (sweep / "a" / "config.toml").write_text('[schedule]\npatience = "x"\n')
    text = write_comparison([sweep / name for name in "abc"]).read_text(encoding="utf-8")
    assert "parallel-line" not in text


def test_nan_comes_last_and_hostile_names_are_text(sweep):
    hostile = sweep / HOSTILE.replace("/", "-")
    hostile.mkdir()
    Run(hostile).validate(math.nan)
    text = write_comparison(expand([sweep])).read_text(encoding="utf-8")
    check_page(text)
    assert "<script>" not in text
    assert [row[1] for row in rows(text)][:3] == ["b", "a", "c"]


def test_different_metrics_do_not_compare(sweep):
    (sweep / "e").mkdir()
    Run(sweep / "e").validate(0.3, monitor="val/accuracy")
    with pytest.raises(InputError, match=r"decided by different metrics \(val/accuracy, val/loss\)"):
        write_comparison(expand([sweep]))


def test_the_command(sweep, tmp_path, capsys):
    assert cli.main(["report", str(sweep), "--out", str(tmp_path / "there")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1] == f"comparison {tmp_path / 'there' / 'comparison.html'}"
    assert (
        'href="../a%20sweep' in (tmp_path / "there/comparison.html").read_text()
        or 'href="../a sweep/b/' in (tmp_path / "there/comparison.html").read_text()
    )
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty")]) == 2
    assert "no run below it has" in capsys.readouterr().err
    assert cli.main(["report", str(sweep / "a")]) == 0
    assert "comparison" not in capsys.readouterr().out


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium): the page is not rendered")
def test_a_browser_renders_it(sweep, tmp_path):
    page = write_comparison([sweep / name for name in "abc"])
    shot = tmp_path / "page.png"
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,1500"]
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, timeout=120, capture_output=True)

    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (1500, 1100)
    assert pixels.std() > 0.03  # not an empty page
