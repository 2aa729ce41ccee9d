"""Suites: the published settings, and files that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from bratune.errors import ConfigError, UnknownNameError
from bratune.suites import load
from bratune.variant import get_variant, stages

GOOD = """\
about: mine
task: segmentation
res: 512
n_win: 8
topks: [1, 4, 16, -2]
models: [biformer_tiny]
batch_size: 4
routes: [local]
"""


@pytest.mark.parametrize(
    ("name", "image", "n_win"),
    [
        ("classification-224", (224, 224), 7),
        ("segmentation-512", (512, 512), 8),
        ("detection-800x1333", (800, 1333), 16),
        ("yolo-640", (640, 640), 8),
    ],
)
def test_the_shipped_suites_hold_the_official_settings(name: str, image: tuple[int, int], n_win: int) -> None:
    suite = load.load(name)
    assert (suite.image, suite.n_win, suite.topks) == (image, n_win, None)
    assert set(suite.routes) == {"recorded", "random", "local", "same"}
    for model in suite.models:
        assert len(stages(get_variant(model), *suite.image, n_win=suite.n_win)) == 4


def test_every_shipped_suite_is_listed_above() -> None:
    attentions = ("attentions-224", "attentions-512", "attentions-800x1333")
    others = ("classification-224", "detection-800x1333", "segmentation-512", "yolo-640")
    assert load.names() == (*attentions, *others)


def test_a_file_of_your_own_is_a_suite(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    suite = load.load(str(path))
    assert (suite.name, suite.topks, suite.batch_sizes) == ("mine", (1, 4, 16, -2), (4,))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("task: segmentation", "task: dancing"), "no task is called 'dancing'"),
        (("res: 512", "res: big"), "'big' is not a size"),
        (("models: [biformer_tiny]", "models: [resnet50]"), "no model is called 'resnet50'"),
        (("routes: [local]", "routes: [scenic]"), "no kind of routes is called 'scenic'"),
        (("n_win: 8", "nwin: 8"), "no key is called 'nwin'"),
        (("n_win: 8\n", ""), "lacks n_win"),
        (("n_win: 8", "n_win: eight"), "invalid literal"),
        (("topks: [1, 4, 16, -2]", "topks: 4"), "not iterable"),
        (("about: mine", "about: ["), "is not YAML"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(ConfigError) as error:
        load.load(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_suite_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="yolo-640"):
        load.load("imagenet")
