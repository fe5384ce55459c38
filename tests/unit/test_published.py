"""Published scaling efficiencies, from published figures; and the tables of docs/model.md."""

import re
from pathlib import Path

import pytest

from benchmarks import published
from benchmarks.networks import NETWORKS

DOCS = (Path(__file__).parents[2] / "docs" / "model.md").read_text()


@pytest.fixture(scope="module")
def compared():
    return published.comparison()


def test_networks_have_their_published_sizes():
    sizes = {name: sum(layer.parameters for layer in layers) for name, layers in NETWORKS.items()}
    # As torchvision's inception_v3 (without its auxiliary head), resnet101 and vgg16 have them.
    assert sizes == {"Inception V3": 23_834_568, "ResNet-101": 44_549_160, "VGG-16": 138_357_544}
    assert NETWORKS["VGG-16"][-3].parameters == 102_764_544  # fc6


def test_on_512_gpus_from_hardware_figures_within_5_points(compared):
    points = [each for each in compared[1] if each["gpus"] == 512]
    assert len(points) == 3
    for each in points:
        assert each["hardware"] == pytest.approx(each["measured"], abs=0.05), each


def test_contention_from_16_gpus_predicts_more(compared):
    contention, points = compared
    assert 0 < contention < 0.5
    more = [each for each in points if not each["fitted_to"]]
    errors = sorted(abs(each["contention"] - each["measured"]) for each in more)
    assert errors[len(errors) // 2] < 0.05


def test_horovod_fuses_what_a_cycle_brings():
    layers = NETWORKS["VGG-16"]
    buckets = published.fused(layers, 0.3, published.Assumptions())
    assert sum(share for _, share in buckets) == pytest.approx(1)
    moments = [moment for moment, _ in buckets]
    # Linear layers come first, and are nine tenths of all; the last comes a cycle late at most.
    assert sum(share for moment, share in buckets if moment < 0.1) > 0.89
    assert moments == sorted(moments) and 1 <= moments[-1] <= 1 + 0.005 / 0.3
    assert len(published.fused(layers, 0.3, published.Assumptions(cycle_seconds=1.0))) < len(
        buckets
    )


def test_the_documents_table_is_the_commands(capsys):
    published.BENCHMARK.main([])
    printed = capsys.readouterr().out

    def figures(text):
        return re.findall(r"[+-]?\d+\.\d%?", text)

    table = DOCS.partition("<!-- benchmarks.published -->")[2].partition("<!-- end -->")[0]
    assert figures(table) == figures(printed.partition("contention,")[0])
